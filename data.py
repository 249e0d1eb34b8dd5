"""Text in, training steps out: documents -> token ids, each document closed by EOS -> fixed-length blocks ->
steps.

    doc A          doc B        doc C
    a a a a EOS    b b EOS      c c c c c EOS          every document ends with EOS
    |-- block 0 --| a|...                              one long row, cut into blocks of seq_len + 1 tokens:
     input_ids = block[:-1], labels = block[1:]        the label of a position is the token that follows it

What a step trains on is a function of (config, step). Global sample k is position k % N in the permutation of
epoch k // N, drawn from (seed, epoch). So a resume, another number of workers or a split over processes sees
the same samples, by arithmetic. A stream cannot jump; it carries its position inside the step it yields.
"""

import hashlib
import json
import math
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from support.chunked_loss import IGNORE
from support.config.schema import Config
from support.messages import UserError, warn
from support.text.block_order import permuted
from support.text.documents import DocumentStream, hf_documents, memory_for_text, text_documents
from support.text.encode_corpus import around, document_pieces, tokenize
from support.text.token_files import TokenFile, TokenFiles
from support.text.validation_split import check_share, hold_out
from tokenizer import Tokenizer

Batch = dict[str, Tensor]


class Step(NamedTuple):
    """What one optimizer step trains on, and for a stream the position after it, as JSON to resume from."""

    micro_batches: list[Batch]
    stream_state: str | None = None


SHUFFLE_GROUP = 1000  # documents of a stream that are shuffled among themselves
STREAM_TOKENIZER_DOCS = 2000  # documents of a stream that a bpe tokenizer is trained on
ORDER_IN_MEMORY = 2**22  # blocks whose order is drawn as an array
TAKE_CHARS = 2**26  # characters after which such a group is full, however few its documents are


@dataclass
class Corpus:
    """Documents cut into a training and a validation part. `train` is a list, or a stream."""

    train: list[str] | DocumentStream
    val: list[str]


def split_documents(documents: list[str], val_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Hold out whole documents, drawn by `seed`, until they hold `val_fraction` of the characters; of one
    that is too large for that, and of a single one, its end."""
    order = np.random.default_rng(seed).permutation(len(documents))
    whole, cut = hold_out([len(document) for document in documents], order, val_fraction)
    train, val = [], []
    for i, document in enumerate(documents):
        at = (
            max(1, int(len(document) * (1 - val_fraction)))
            if i in cut
            else 0
            if i in whole
            else len(document)
        )
        train += [document[:at]] * (i not in whole)
        val += [document[at:]] * (i in whole or i in cut)
    check_share(
        sum(map(len, val)),
        sum(map(len, documents)),
        val_fraction,
        "characters",
        "give data.val_path a text of its own",
    )
    return train, val


@memory_for_text()
def load_corpus(config: Config) -> Corpus:
    """The documents the config names, validation cut off before anything else sees them. Raises UserError."""
    data = config.data
    if data.source == "hf":
        train, val = hf_documents(data, config.seed)
    else:
        train = text_documents(data.path, data)
        val = text_documents(data.val_path, data, "data.val_path") if data.val_path else None
        if val and (n_same := len(set(val) & set(train))):
            warn(
                f"{n_same} of {len(val)} validation documents are trained on too, so val_loss says little; "
                "give data.val_path another text"
            )
    return (
        Corpus(train, val)
        if val is not None
        else Corpus(*split_documents(train, data.val_fraction, config.seed))
    )


# ---- blocks --------------------------------------------------------------------------------------


def document_segments(input_ids: np.ndarray, eos_id: int) -> np.ndarray:
    """The number of the document each position belongs to, (B, T): it grows behind every EOS. a EOS b b ->
    0 0 1 1."""
    segments = np.zeros(input_ids.shape, np.int64)
    segments[:, 1:] = (input_ids[:, :-1] == eos_id).cumsum(axis=1)
    return segments


def make_batch(rows: np.ndarray, labels: np.ndarray, mask_eos: int | None) -> Batch:
    """Tensors for blocks (B, T + 1): input_ids, labels and, with a document mask, segments, each (B, T)."""
    batch = {"input_ids": rows[:, :-1], "labels": labels}
    if mask_eos is not None:
        batch["segments"] = document_segments(rows[:, :-1], mask_eos)
    return {
        name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for name, array in batch.items()
    }


class PackedLMDataset(Dataset):
    """Blocks of a row of tokens, in memory or in a file. Item i is the block that starts at token i * stride.

    The tokens behind the last full block are left out (`n_dropped`), or, with `pad_last`, make one more block
    whose missing labels are -100: so every token but the first is predicted exactly once when stride equals
    seq_len.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenFile,
        seq_len: int,
        stride: int | None = None,
        pad_last: bool = False,
        mask_eos: int | None = None,
    ):
        self.tokens, self.seq_len, self.stride, self.mask_eos = tokens, seq_len, stride or seq_len, mask_eos
        spare = len(tokens) - 1 - seq_len  # where the last full block could start
        self.n_blocks = math.ceil(spare / self.stride) + 1 if pad_last else spare // self.stride + 1
        self.n_blocks = max(self.n_blocks, int(pad_last and len(tokens) > 1), 0)
        self.n_dropped = (
            max(0, len(tokens) - 1 - ((self.n_blocks - 1) * self.stride + seq_len))
            if self.n_blocks
            else len(tokens)
        )

    def __len__(self) -> int:
        return self.n_blocks

    def __getitem__(self, i: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.batch([i]).items()}

    def batch(self, indices: Iterable[int]) -> Batch:
        """Several blocks at once, each tensor (B, T)."""
        position = np.asarray(indices)[:, None] * self.stride + np.arange(self.seq_len + 1)  # (B, T + 1)
        rows = self.tokens[np.minimum(position, len(self.tokens) - 1)].astype(np.int64)
        labels = np.where(position[:, 1:] < len(self.tokens), rows[:, 1:], IGNORE)
        return make_batch(rows, labels, self.mask_eos)

    def fingerprint(self) -> str:
        """sha256 of the tokens."""
        return (
            self.tokens.fingerprint()
            if isinstance(self.tokens, TokenFile)
            else hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest()
        )

    def describe(self, n_documents: int | None) -> str:
        documents = f"{n_documents:,} documents, " if n_documents is not None else ""
        dropped = (
            f" ({self.n_dropped} tokens behind the last full block are left out)" if self.n_dropped else ""
        )
        return f"{documents}{len(self.tokens):,} tokens, {len(self):,} blocks of {self.seq_len}{dropped}"


# ---- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepShape:
    """How one optimizer step is cut up: accum micro-batches on each of `world` processes, of which this is
    `rank`."""

    micro_batch_size: int
    grad_accum_steps: int
    rank: int = 0
    world: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of one step, over all processes."""
        return self.micro_batch_size * self.grad_accum_steps * self.world

    def micro_index(self, step: int, micro: int) -> int:
        """The number of a micro-batch in the whole run; it names its blocks and seeds its dropout."""
        return (step * self.grad_accum_steps + micro) * self.world + self.rank


class IndexedSteps(Dataset):
    """Item `step` is what that optimizer step trains on, whoever asks and whenever."""

    def __init__(self, blocks: Any, shape: StepShape, seed: int, shuffle: bool, n_steps: int):
        self.blocks, self.shape, self.seed, self.shuffle, self.n_steps = blocks, shape, seed, shuffle, n_steps
        self.drawn: tuple[int, np.ndarray] | None = None  # (epoch, its permutation)

    def __len__(self) -> int:
        return self.n_steps

    def block_of(self, sample: int) -> int:
        """The block that global sample k = 0, 1, ... trains on."""
        epoch, position = divmod(sample, len(self.blocks))
        if not self.shuffle:
            return position
        if len(self.blocks) > ORDER_IN_MEMORY:
            return permuted(position, len(self.blocks), (self.seed, epoch))
        if self.drawn is None or self.drawn[0] != epoch:
            self.drawn = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.blocks))
        return int(self.drawn[1][position])

    def samples(self, step: int, micro: int) -> range:
        first = self.shape.micro_index(step, micro) * self.shape.micro_batch_size
        return range(first, first + self.shape.micro_batch_size)

    def __getitem__(self, step: int) -> Step:
        return Step(
            [
                self.blocks.batch([self.block_of(k) for k in self.samples(step, micro)])
                for micro in range(self.shape.grad_accum_steps)
            ]
        )


class StepSampler(Sampler):
    """Steps start, start + 1, ... Its length is that of the whole run: Lightning counts from the run's
    beginning."""

    def __init__(self, start: int, n_steps: int):
        self.start, self.n_steps = start, n_steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.n_steps))

    def __len__(self) -> int:
        return self.n_steps


class StreamingPackedLMDataset(IterableDataset):
    """The same steps from documents that are read, tokenized and packed while training.

    Documents are shuffled within groups of SHUFFLE_GROUP. Every process reads the whole stream and keeps its
    share of the blocks. The `stream_state` of each step is the position after it: the epoch, the group and where it starts in the source, the documents of it already
    used, and in the document that follows the pieces already used, the tokens left over from them, and how
    many tokens of the next piece are taken.
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: Tokenizer,
        seq_len: int,
        stride: int,
        shape: StepShape,
        seed: int,
        shuffle: bool = True,
        mask_eos: int | None = None,
        state: str | None = None,
    ):
        self.documents, self.tokenizer, self.shape = documents, tokenizer, shape
        self.seq_len, self.stride, self.seed, self.shuffle, self.mask_eos = (
            seq_len,
            stride,
            seed,
            shuffle,
            mask_eos,
        )
        start = {"epoch": 0, "group": 0, "source": None, "used": 0, "piece": 0, "tokens": [], "taken": 0}
        self.state = start | (json.loads(state) if state else {})  # older states lack piece and taken

    def __iter__(self) -> Iterator[Step]:
        buffer: list[int] = list(self.state["tokens"])
        taken = self.state["taken"]  # tokens of the buffer that are trained on
        needed = (self.shape.blocks - 1) * self.stride + self.seq_len + 1
        for piece, ends, position in self._pieces(self.state):
            left_over = len(buffer)
            before, behind = around(position["piece"] == 0, ends, self.tokenizer)
            buffer += [*before, *self.tokenizer.encode(piece), *behind]
            while len(buffer) - taken >= needed:
                starts = range(taken, taken + self.shape.blocks * self.stride, self.stride)
                rows = np.array([buffer[i : i + self.seq_len + 1] for i in starts])  # (blocks, T + 1)
                taken += self.shape.blocks * self.stride
                yield self._step(
                    rows,
                    json.dumps(
                        {**position, "tokens": buffer[taken:left_over], "taken": max(0, taken - left_over)}
                    ),
                )
            del buffer[:taken]
            taken = 0

    def _step(self, rows: np.ndarray, state: str) -> Step:
        """The step of this process: its share of the blocks (blocks, T + 1)."""
        B, batches = self.shape.micro_batch_size, []
        for micro in range(self.shape.grad_accum_steps):
            first = self.shape.micro_index(0, micro) * B
            batches.append(make_batch(rows[first : first + B], rows[first : first + B, 1:], self.mask_eos))
        return Step(batches, state)

    def _pieces(self, state: dict) -> Iterator[tuple[str, bool, dict]]:
        """(piece, whether its document ends with it, the position before it): shuffled documents for ever."""
        skipped = state["piece"]
        for document, position in self._documents(state):
            for n, (piece, ends) in enumerate(document_pieces([document], self.tokenizer)):
                if n >= skipped:
                    yield piece, ends, {**position, "piece": n}
            skipped = 0

    def _documents(self, state: dict) -> Iterator[tuple[str, dict]]:
        """Shuffled documents for ever, each with the position before it."""
        epoch, group, source, used = state["epoch"], state["group"], state["source"], state["used"]
        while True:
            self.documents.seek(source)
            while documents := self.documents.take(SHUFFLE_GROUP, TAKE_CHARS):
                order = (
                    np.random.default_rng((self.seed, epoch, group)).permutation(len(documents))
                    if self.shuffle
                    else range(len(documents))
                )
                for n in range(used, len(documents)):
                    yield documents[order[n]], {"epoch": epoch, "group": group, "source": source, "used": n}
                source, group, used = self.documents.position(), group + 1, 0
            epoch, group, source, used = epoch + 1, 0, None, 0


class ValBatches(Dataset):
    """The validation blocks in order, in batches; with several processes every one gets equally many, an
    empty one (all labels -100) if need be, so that none waits for another."""

    def __init__(self, blocks: Any, batch_size: int, rank: int, world: int, limit: int | None):
        self.blocks, self.batch_size, self.rank, self.world = blocks, batch_size, rank, world
        n_batches = math.ceil(len(blocks) / batch_size)
        self.n_batches = min(n_batches, limit or n_batches)

    def __len__(self) -> int:
        return math.ceil(self.n_batches / self.world)

    def __getitem__(self, i: int) -> Batch:
        number = i * self.world + self.rank
        start = min(number, self.n_batches - 1) * self.batch_size
        batch = self.blocks.batch(range(start, min(start + self.batch_size, len(self.blocks))))
        if number >= self.n_batches:
            batch["labels"].fill_(IGNORE)
        return batch


# ---- all together --------------------------------------------------------------------------------


@dataclass
class PackedData:
    """A corpus ready to train on. `train` and `val` give batches of rows by their numbers
    (`PackedLMDataset`, or the pairs of instruct.py); a DocumentStream is packed on the way."""

    train: Any
    val: Any
    n_train_docs: int | None
    n_val_docs: int | None
    sample_text: str = ""  # the beginning of a document, to try the tokenizer on

    @property
    def streaming(self) -> bool:
        return isinstance(self.train, DocumentStream)

    @cached_property
    def fingerprint(self) -> str | None:
        """Of what is trained on, so that a resume on another text is noticed; None for a stream."""
        return None if self.streaming else self.train.fingerprint()

    def describe(self) -> list[str]:
        """Sizes, one line a part."""
        train = "a stream" if self.streaming else self.train.describe(self.n_train_docs)
        return [f"train: {train}", f"val:   {self.val.describe(self.n_val_docs)}"]


def tokenizer_documents(corpus: Corpus, kind: str) -> Iterable[str]:
    """What a tokenizer is trained on: training documents only; for `char` the validation text's characters
    count too, or it could not be read at all; of a stream, its beginning."""
    if isinstance(corpus.train, DocumentStream):
        return corpus.train.head(STREAM_TOKENIZER_DOCS, TAKE_CHARS)
    return corpus.train + corpus.val if kind == "char" else corpus.train


@memory_for_text()
def pack_corpus(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> PackedData:
    """Tokenize and cut into blocks. Raises UserError if the text is too short for one block."""
    seq_len, mask_eos = config.seq_len, tokenizer.eos_id if config.data.document_mask else None
    val = PackedLMDataset(tokenize(corpus.val, tokenizer), seq_len, pad_last=True, mask_eos=mask_eos)
    if len(val) == 0:
        raise UserError("the validation text is empty; raise data.val_fraction, or give it a text of its own")
    if isinstance(corpus.train, DocumentStream):
        return PackedData(corpus.train, val, None, len(corpus.val), corpus.val[0][:2000])
    train = training_blocks(tokenize(corpus.train, tokenizer), config, mask_eos)
    return PackedData(train, val, len(corpus.train), len(corpus.val), corpus.train[0][:2000])


def training_blocks(tokens: np.ndarray | TokenFile, config: Config, mask_eos: int | None) -> PackedLMDataset:
    """Raises UserError where there is not one block."""
    train = PackedLMDataset(tokens, config.seq_len, config.stride, mask_eos=mask_eos)
    if len(train) == 0:
        raise UserError(
            f"the training text has {len(tokens)} tokens, fewer than one block of seq_len + 1 = "
            f"{config.seq_len + 1}; "
            f"give more text, or lower it with --override training.seq_len={max(2, len(tokens) // 2)}"
        )
    return train


def pack_token_files(files: TokenFiles, tokenizer: Tokenizer, config: Config) -> PackedData:
    """Token files cut into blocks, without reading them. Raises UserError if their ids are not the
    tokenizer's, or too few."""
    files.check(tokenizer)
    mask_eos = tokenizer.eos_id if config.data.document_mask else None
    val = PackedLMDataset(files.val, config.seq_len, pad_last=True, mask_eos=mask_eos)
    if len(val) == 0:
        raise UserError(
            f"{files.val.path} has no tokens to validate on; raise data.val_fraction, or name others by "
            "data.val_path"
        )
    train = training_blocks(files.train, config, mask_eos)
    return PackedData(
        train, val, files.n_documents("train"), files.n_documents("val"), files.train.text_of(tokenizer, 500)
    )


def step_shape(config: Config, rank: int = 0, world: int = 1) -> StepShape:
    return StepShape(config.training.micro_batch_size, config.training.grad_accum_steps, rank, world)


def leave_signals_alone(worker: int) -> None:
    """Ctrl-C, or a scheduler's SIGTERM, reaches data workers too; they work on, since the step in hand is
    to be finished. A second SIGTERM ends them: a worker that waits for the network must not hold up the
    end of the run."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def make_dataloaders(
    config: Config,
    data: PackedData,
    tokenizer: Tokenizer,
    n_steps: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    stream_state: str | None = None,
) -> tuple[DataLoader, DataLoader]:
    """(train, val). One item of `train` is a Step, of micro-batches {input_ids, labels, ...}, each (B, T); the
    first is `start_step`, or where `stream_state` says. One item of `val` is a batch."""
    shape, workers = step_shape(config, rank, world), config.hardware.num_workers
    mask_eos = tokenizer.eos_id if config.data.document_mask else None
    own_random = {
        "batch_size": None,
        "generator": torch.Generator().manual_seed(0),
    }  # the global generator is for dropout
    options = dict(own_random)
    if workers:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the tokenizers library warns when workers fork
        options |= {"persistent_workers": True, "worker_init_fn": leave_signals_alone}
    if data.streaming:
        steps = StreamingPackedLMDataset(
            data.train,
            tokenizer,
            config.seq_len,
            config.stride,
            shape,
            config.seed,
            config.data.shuffle,
            mask_eos,
            stream_state,
        )
        train = DataLoader(steps, num_workers=min(workers, 1), **options)
    else:
        steps = IndexedSteps(data.train, shape, config.seed, config.data.shuffle, n_steps)
        train = DataLoader(steps, sampler=StepSampler(start_step, n_steps), num_workers=workers, **options)
    val_batches = ValBatches(
        data.val, config.training.micro_batch_size, rank, world, config.training.val_batches
    )
    return train, DataLoader(val_batches, **own_random)
