"""Text in, training steps out: documents -> one row of token ids, each document closed by EOS -> blocks ->
steps.

    doc A          doc B        doc C
    a a a a EOS    b b EOS      c c c c c EOS          every document ends with EOS
    |-- block 0 --| a|...                              one long row, cut into blocks of seq_len + 1 tokens:
     input_ids = block[:-1], labels = block[1:]        the label of a position is the token that follows it

What a step trains on is a function of (config, step): global sample k is position k % N in the permutation of
epoch k // N, which is drawn from (seed, epoch). So a resume, another number of workers or a split over
processes sees the same samples. A stream cannot jump to a step; each of its steps carries the position after
it.
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
from support.messages import UserError
from support.text.block_order import BlockOrder
from support.text.documents import DocumentStream
from support.text.encode_corpus import document_pieces, encode_pieces, ids_around_document
from support.text.read_text import memory_for_text
from support.text.sources import load_documents
from support.text.token_files import TokenFile, TokenFiles
from support.text.validation_split import split_documents
from tokenizer import Tokenizer

Batch = dict[str, Tensor]
SHUFFLE_GROUP = 1000  # documents of a stream that are shuffled among themselves
SHUFFLE_GROUP_CHARS = 2**26  # a group is full with this many characters, however few its documents are
STREAM_TOKENIZER_DOCS = 2000  # documents of a stream that a bpe tokenizer is trained on
SAMPLE_CHARS = 2000  # of a document's beginning, to try the tokenizer on
SAMPLE_TOKENS = 500


# ---- documents -----------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Documents cut into a training and a validation part. `train` is a list, or a stream."""

    train: list[str] | DocumentStream
    val: list[str]


@memory_for_text()
def load_corpus(config: Config) -> Corpus:
    """The documents that the config names; what validates is held out before anything else sees it. Raises
    UserError."""
    train, val = load_documents(config.data, config.seed)
    if val is None:
        train, val = split_documents(train, config.data.val_fraction, config.seed)
    return Corpus(train, val)


def tokenizer_documents(corpus: Corpus, kind: str) -> Iterable[str]:
    """The documents that a tokenizer is trained on: only training documents, of a stream its beginning. A
    `char` tokenizer is given the validation text too: it could not encode a character it has not seen."""
    if isinstance(corpus.train, DocumentStream):
        return corpus.train.head(STREAM_TOKENIZER_DOCS, SHUFFLE_GROUP_CHARS)
    return corpus.train + corpus.val if kind == "char" else corpus.train


# ---- one row of ids ------------------------------------------------------------------------------


def tokenize(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as one row of ids, `a a a a EOS b b EOS`. `ids_around_document` puts EOS after each
    document, and BOS before it if the tokenizer has one."""
    return encode_pieces(document_pieces(documents, tokenizer), tokenizer)


# ---- blocks --------------------------------------------------------------------------------------


def document_segments(input_ids: np.ndarray, eos_id: int) -> np.ndarray:
    """The number of the document each position belongs to, (B, T): it grows after every EOS. a EOS b b -> 0 0
    1 1."""
    segments = np.zeros(input_ids.shape, np.int64)
    segments[:, 1:] = (input_ids[:, :-1] == eos_id).cumsum(axis=1)
    return segments


def make_batch(rows: np.ndarray, labels: np.ndarray, segment_end_id: int | None) -> Batch:
    """Tensors for blocks (B, T + 1): input_ids, labels and, with a document mask, segments, each (B, T)."""
    arrays = {"input_ids": rows[:, :-1], "labels": labels}
    if segment_end_id is not None:
        arrays["segments"] = document_segments(rows[:, :-1], segment_end_id)
    batch = {}
    for name, array in arrays.items():
        batch[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    return batch


class PackedLMDataset(Dataset):
    """Blocks of a row of tokens, in memory or in a file. Item i is the block that starts at token i * stride.

    The tokens after the last full block are left out (`n_dropped`), or, with `pad_last`, they make one more
    block whose missing labels are -100. So every token but the first is predicted exactly once when stride
    equals seq_len. `segment_end_id` is the id of EOS if attention is to stay inside each document.
    """

    def __init__(
        self,
        tokens: np.ndarray | TokenFile,
        seq_len: int,
        stride: int | None = None,
        pad_last: bool = False,
        segment_end_id: int | None = None,
    ):
        self.tokens, self.seq_len, self.segment_end_id = tokens, seq_len, segment_end_id
        self.stride = stride or seq_len
        n_labels = max(0, len(tokens) - 1)  # every token but the first
        after_first = n_labels - seq_len  # labels after those of block 0, negative if block 0 is not full
        if pad_last and n_labels:
            self.n_blocks = 1 + math.ceil(max(0, after_first) / self.stride)
        elif not pad_last and after_first >= 0:
            self.n_blocks = 1 + after_first // self.stride
        else:
            self.n_blocks = 0
        n_used = (self.n_blocks - 1) * self.stride + seq_len + 1 if self.n_blocks else 0
        self.n_dropped = max(0, len(tokens) - n_used)

    def __len__(self) -> int:
        return self.n_blocks

    def __getitem__(self, i: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.batch([i]).items()}

    def batch(self, indices: Iterable[int]) -> Batch:
        """Several blocks at once, each tensor (B, T)."""
        starts = np.asarray(indices)[:, None] * self.stride  # (B, 1)
        positions = starts + np.arange(self.seq_len + 1)  # (B, T + 1)
        # Only a padded block reaches beyond the last token: there it repeats that token, without a label.
        rows = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int64)
        labels = np.where(positions[:, 1:] < len(self.tokens), rows[:, 1:], IGNORE)
        return make_batch(rows, labels, self.segment_end_id)

    def fingerprint(self) -> str:
        """sha256 of the tokens."""
        if isinstance(self.tokens, TokenFile):
            return self.tokens.fingerprint()
        return hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest()

    def describe(self, n_documents: int | None) -> str:
        """Sizes, on one line."""
        documents = f"{n_documents:,} documents, " if n_documents is not None else ""
        dropped = (
            f" ({self.n_dropped} tokens after the last full block are left out)" if self.n_dropped else ""
        )
        return f"{documents}{len(self.tokens):,} tokens, {len(self):,} blocks of {self.seq_len}{dropped}"


# ---- steps ---------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one optimizer step trains on. Of a stream also the position after the step, as JSON, to resume
    from."""

    micro_batches: list[Batch]
    stream_state: str | None = None


@dataclass(frozen=True)
class StepShape:
    """How one optimizer step is cut up: `grad_accum_steps` micro-batches on each of `world` processes, of
    which this one is `rank`."""

    micro_batch_size: int
    grad_accum_steps: int
    rank: int = 0
    world: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of one step, over all processes."""
        return self.micro_batch_size * self.grad_accum_steps * self.world

    def micro_index(self, step: int, micro: int) -> int:
        """The number of a micro-batch in the whole run; it decides its blocks and seeds its dropout."""
        return (step * self.grad_accum_steps + micro) * self.world + self.rank

    def samples(self, step: int, micro: int) -> range:
        """The numbers of the samples of a micro-batch, among all that the run trains on."""
        first = self.micro_index(step, micro) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


def step_shape(config: Config, rank: int = 0, world: int = 1) -> StepShape:
    return StepShape(config.training.micro_batch_size, config.training.grad_accum_steps, rank, world)


class IndexedSteps(Dataset):
    """Item `step` is what that optimizer step trains on, in whatever order steps are asked for."""

    def __init__(self, blocks: Any, shape: StepShape, seed: int, shuffle: bool, n_steps: int):
        self.blocks, self.shape, self.n_steps = blocks, shape, n_steps
        self.order = BlockOrder(len(blocks), seed, shuffle)

    def __len__(self) -> int:
        return self.n_steps

    def block_of(self, sample: int) -> int:
        """The block that global sample k = 0, 1, ... trains on."""
        return self.order.block_of(sample)

    def __getitem__(self, step: int) -> Step:
        micro_batches = []
        for micro in range(self.shape.grad_accum_steps):
            numbers = [self.block_of(sample) for sample in self.shape.samples(step, micro)]
            micro_batches.append(self.blocks.batch(numbers))
        return Step(micro_batches)


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
    share of the blocks. The `stream_state` of a step names the piece of text that the step ends in, and what
    of it comes next:

        epoch, group    of documents; both decide the order within the group
        source          where the group starts in the source
        used            documents of the group that come before this one
        piece           pieces of the document that come before this one
        tokens          ids of earlier pieces that are not trained on yet
        taken           ids of this piece that have been trained on
    """

    def __init__(
        self,
        documents: DocumentStream,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        stride: int,
        shape: StepShape,
        seed: int,
        shuffle: bool = True,
        segment_end_id: int | None = None,
        state: str | None = None,
    ):
        self.documents, self.tokenizer, self.shape = documents, tokenizer, shape
        self.seq_len, self.stride, self.segment_end_id = seq_len, stride, segment_end_id
        self.seed, self.shuffle = seed, shuffle
        start = {"epoch": 0, "group": 0, "source": None, "used": 0, "piece": 0, "tokens": [], "taken": 0}
        self.state = start | (json.loads(state) if state else {})  # older states lack piece and taken

    def __iter__(self) -> Iterator[Step]:
        """Pieces of text go into a buffer of ids; whenever it holds the blocks of a step, they are taken
        out."""
        step_tokens = self.shape.blocks * self.stride
        needed = step_tokens - self.stride + self.seq_len + 1  # the last block reaches beyond its stride
        buffer: list[int] = list(self.state["tokens"])
        first = self.state["taken"]  # where the next step starts in the buffer
        for piece, ends, position in self._pieces():
            n_earlier = len(buffer)  # ids of earlier pieces
            before, after = ids_around_document(self.tokenizer, begins=position["piece"] == 0, ends=ends)
            buffer += [*before, *self.tokenizer.encode(piece), *after]
            while len(buffer) - first >= needed:
                starts = range(first, first + step_tokens, self.stride)
                rows = np.array([buffer[start : start + self.seq_len + 1] for start in starts])
                first += step_tokens
                rest = {"tokens": buffer[first:n_earlier], "taken": max(0, first - n_earlier)}
                yield self._step(rows, json.dumps(position | rest))
            del buffer[:first]
            first = 0

    def _step(self, rows: np.ndarray, state: str) -> Step:
        """The step of this process: its share of the blocks (blocks, T + 1)."""
        micro_batches = []
        for micro in range(self.shape.grad_accum_steps):
            samples = self.shape.samples(0, micro)
            share = rows[samples.start : samples.stop]
            micro_batches.append(make_batch(share, share[:, 1:], self.segment_end_id))
        return Step(micro_batches, state)

    def _pieces(self) -> Iterator[tuple[str, bool, dict]]:
        """(piece, whether its document ends with it, the position before it): shuffled documents without
        end."""
        n_skipped = self.state["piece"]  # of the first document
        for document, position in self._documents():
            for number, (piece, ends) in enumerate(document_pieces([document], self.tokenizer)):
                if number >= n_skipped:
                    yield piece, ends, position | {"piece": number}
            n_skipped = 0

    def _documents(self) -> Iterator[tuple[str, dict]]:
        """Shuffled documents without end, each with the position before it."""
        epoch, group, source, used = (self.state[key] for key in ("epoch", "group", "source", "used"))
        while True:
            self.documents.seek(source)
            while documents := self.documents.take(SHUFFLE_GROUP, SHUFFLE_GROUP_CHARS):
                order = range(len(documents))
                if self.shuffle:
                    order = np.random.default_rng((self.seed, epoch, group)).permutation(len(documents))
                for n in range(used, len(documents)):
                    yield documents[order[n]], {"epoch": epoch, "group": group, "source": source, "used": n}
                source = self.documents.position()
                group += 1
                used = 0
            epoch += 1
            group, source, used = 0, None, 0


class ValBatches(Dataset):
    """The validation blocks in order, in batches. With several processes each one gets equally many batches,
    if need be one whose labels are all -100: so no process waits for another."""

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
    """A corpus ready to train on. `train` and `val` give batches of rows by their numbers (`PackedLMDataset`,
    or the pairs of instruct.py); a DocumentStream is packed while training."""

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


def segment_end_id_of(config: Config, tokenizer: Tokenizer) -> int | None:
    """The id after which a new segment begins, or None without a document mask."""
    return tokenizer.eos_id if config.data.document_mask else None


@memory_for_text()
def pack_corpus(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> PackedData:
    """Tokenize and cut into blocks. Raises UserError if the text is too short for one block."""
    segment_end_id = segment_end_id_of(config, tokenizer)
    val_row = tokenize(corpus.val, tokenizer)
    val = PackedLMDataset(val_row, config.seq_len, pad_last=True, segment_end_id=segment_end_id)
    if len(val) == 0:
        raise UserError("the validation text is empty; raise data.val_fraction, or give it a text of its own")
    if isinstance(corpus.train, DocumentStream):
        return PackedData(
            train=corpus.train,
            val=val,
            n_train_docs=None,
            n_val_docs=len(corpus.val),
            sample_text=corpus.val[0][:SAMPLE_CHARS],
        )
    return PackedData(
        train=training_blocks(tokenize(corpus.train, tokenizer), config, segment_end_id),
        val=val,
        n_train_docs=len(corpus.train),
        n_val_docs=len(corpus.val),
        sample_text=corpus.train[0][:SAMPLE_CHARS],
    )


def pack_token_files(files: TokenFiles, tokenizer: Tokenizer, config: Config) -> PackedData:
    """Token files cut into blocks, without reading them. Raises UserError if their ids are not the
    tokenizer's, or too few."""
    files.check(tokenizer)
    segment_end_id = segment_end_id_of(config, tokenizer)
    val = PackedLMDataset(files.val, config.seq_len, pad_last=True, segment_end_id=segment_end_id)
    if len(val) == 0:
        raise UserError(
            f"{files.val.path} has no tokens to validate on; raise data.val_fraction, or name others by "
            "data.val_path"
        )
    return PackedData(
        train=training_blocks(files.train, config, segment_end_id),
        val=val,
        n_train_docs=files.n_documents("train"),
        n_val_docs=files.n_documents("val"),
        sample_text=files.train.text_of(tokenizer, SAMPLE_TOKENS),
    )


def training_blocks(
    tokens: np.ndarray | TokenFile, config: Config, segment_end_id: int | None
) -> PackedLMDataset:
    """Raises UserError if there is not one block."""
    train = PackedLMDataset(tokens, config.seq_len, config.stride, segment_end_id=segment_end_id)
    if len(train) == 0:
        raise UserError(
            f"the training text has {len(tokens)} tokens, fewer than one block of seq_len + 1 = "
            f"{config.seq_len + 1}; "
            f"give more text, or lower it with --override training.seq_len={max(2, len(tokens) // 2)}"
        )
    return train


def leave_signals_alone(worker: int) -> None:
    """Ctrl-C, or a scheduler's SIGTERM, reaches data workers too; they keep working, because the current step
    is to be finished. A second SIGTERM ends them: a worker that waits for the network must not hold up the
    end of the run."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def make_dataloaders(
    config: Config,
    data: PackedData,
    tokenizer: Tokenizer,
    n_steps: int,
    *,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    stream_state: str | None = None,
) -> tuple[DataLoader, DataLoader]:
    """(train, val). One item of `train` is a `Step`, its micro-batches {input_ids, labels, ...}, each (B, T);
    the first is `start_step`, or where `stream_state` says. One item of `val` is a batch."""
    shape = step_shape(config, rank, world)
    workers = config.hardware.num_workers
    # Loaders draw from a generator of their own: the global one is for dropout.
    options: dict[str, Any] = {"batch_size": None, "generator": torch.Generator().manual_seed(0)}
    val_batches = ValBatches(
        data.val, config.training.micro_batch_size, rank, world, config.training.val_batches
    )
    val = DataLoader(val_batches, **options)
    if workers:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the tokenizers library warns when workers fork
        options |= {"persistent_workers": True, "worker_init_fn": leave_signals_alone}
    if data.streaming:
        stream = StreamingPackedLMDataset(
            data.train,
            tokenizer,
            seq_len=config.seq_len,
            stride=config.stride,
            shape=shape,
            seed=config.seed,
            shuffle=config.data.shuffle,
            segment_end_id=segment_end_id_of(config, tokenizer),
            state=stream_state,
        )
        return DataLoader(stream, num_workers=min(workers, 1), **options), val
    steps = IndexedSteps(data.train, shape, config.seed, config.data.shuffle, n_steps)
    train = DataLoader(steps, sampler=StepSampler(start_step, n_steps), num_workers=workers, **options)
    return train, val
