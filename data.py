"""Text in, training steps out: documents -> one row of token ids -> blocks -> steps.

    doc A          doc B        doc C
    a a a a EOS    b b EOS      c c c c c EOS          every document ends with EOS
    |-- block 0 --| a|...                              one long row, cut into blocks of seq_len + 1 tokens:
     input_ids = block[:-1], labels = block[1:]        the label of a position is the token that follows it

What a step trains on depends only on the config and the step. Number all samples of the run 0, 1, 2, ...
With N blocks, sample k belongs to epoch k // N, and is number k % N in that epoch's shuffled order, which is
drawn from (seed, epoch). So a resume, another number of workers or a split over processes sees the same
samples. A stream can only be read forward. So each of its steps also stores where the next one begins.
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
SHUFFLE_GROUP_CHARS = 2**26  # with this many characters a group is full, even if it has few documents
STREAM_TOKENIZER_DOCS = 2000  # a bpe tokenizer is trained on the first documents of a stream, this many
# How much of a document's beginning is kept as a sample, to try the tokenizer on:
SAMPLE_CHARS = 2000  # of a document that is text
SAMPLE_TOKENS = 500  # of one in a token file


# ---- documents -----------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Documents cut into a training and a validation part. `train` is a list, or a stream."""

    train: list[str] | DocumentStream
    val: list[str]


@memory_for_text()
def load_corpus(config: Config) -> Corpus:
    """The documents that the config names. The validation part is set aside here, before anything is
    trained. Raises UserError if the documents cannot be read or split."""
    train, val = load_documents(config.data, config.seed)
    if val is None:  # the config names no validation text
        train, val = split_documents(train, config.data.val_fraction, config.seed)
    return Corpus(train, val)


def tokenizer_documents(corpus: Corpus, kind: str) -> Iterable[str]:
    """The documents that a tokenizer is trained on: the training documents, or for a stream, the first ones.
    A `char` tokenizer gets the validation text too: it could not encode a character it has not seen."""
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
    """The number of the document that each position belongs to, (B, T). It grows by one after every EOS:
    a EOS b b -> 0 0 1 1."""
    segments = np.zeros(input_ids.shape, np.int64)
    segments[:, 1:] = (input_ids[:, :-1] == eos_id).cumsum(axis=1)
    return segments


def make_batch(rows: np.ndarray, labels: np.ndarray, segment_end_id: int | None) -> Batch:
    """What the model takes, from `rows` (B, T + 1) and `labels` (B, T): input_ids, labels and, if attention
    must stay inside each document, segments. Each is a tensor (B, T)."""
    arrays = {"input_ids": rows[:, :-1], "labels": labels}
    if segment_end_id is not None:
        arrays["segments"] = document_segments(rows[:, :-1], segment_end_id)
    batch = {}
    for name, array in arrays.items():
        batch[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    return batch


class PackedLMDataset(Dataset):
    """Blocks of a row of tokens, in memory or in a file. Item i is the block that starts at token i * stride.

    The tokens after the last full block are left out (`n_dropped`). With `pad_last` they make one more block,
    whose missing labels are -100. Then, if stride equals seq_len, each token but the first is predicted once.
    `segment_end_id` is the id of EOS if attention must stay inside each document, else None.
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
        n_full = max(0, 1 + (len(tokens) - 1 - seq_len) // self.stride)  # blocks of seq_len + 1 that fit
        n_used = 0 if n_full == 0 else (n_full - 1) * self.stride + seq_len + 1
        has_rest = len(tokens) > max(n_used, 1)  # a token is left that can be a label; token 0 never is one
        if pad_last and has_rest:
            self.n_blocks, self.n_dropped = n_full + 1, 0
        else:
            self.n_blocks, self.n_dropped = n_full, len(tokens) - n_used

    def __len__(self) -> int:
        return self.n_blocks

    def __getitem__(self, i: int) -> Batch:
        return {name: tensor[0] for name, tensor in self.batch([i]).items()}

    def batch(self, indices: Iterable[int]) -> Batch:
        """Several blocks at once, each tensor (B, T)."""
        starts = np.asarray(indices)[:, None] * self.stride  # (B, 1): the first position of each block
        positions = starts + np.arange(self.seq_len + 1)  # (B, T + 1)
        # Only a padded block reaches past the last token: there it repeats that token, without a label.
        rows = self.tokens[np.minimum(positions, len(self.tokens) - 1)].astype(np.int64)
        labels = np.where(positions[:, 1:] < len(self.tokens), rows[:, 1:], IGNORE)
        return make_batch(rows, labels, self.segment_end_id)

    def fingerprint(self) -> str:
        """A sha256 of the tokens; for a token file, of its length and of samples."""
        if isinstance(self.tokens, TokenFile):
            return self.tokens.fingerprint()
        return hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest()

    def describe(self, n_documents: int | None) -> str:
        """The sizes, on one line to print."""
        documents = f"{n_documents:,} documents, " if n_documents is not None else ""
        dropped = (
            f" ({self.n_dropped} tokens after the last full block are left out)" if self.n_dropped else ""
        )
        return f"{documents}{len(self.tokens):,} tokens, {len(self):,} blocks of {self.seq_len}{dropped}"


# ---- steps ---------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one optimizer step trains on. For a stream, also where the next step starts, as JSON."""

    micro_batches: list[Batch]
    stream_state: str | None = None


@dataclass(frozen=True)
class StepShape:
    """How one optimizer step is cut up: each of `world` processes takes `grad_accum_steps` micro-batches.
    `rank` is the number of this process."""

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
        """Which samples a micro-batch trains on: their numbers among all samples of the run."""
        first = self.micro_index(step, micro) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


def step_shape(config: Config, rank: int = 0, world: int = 1) -> StepShape:
    """The shape of a step that the config asks for."""
    return StepShape(config.training.micro_batch_size, config.training.grad_accum_steps, rank, world)


class IndexedSteps(Dataset):
    """Item `step` is what that optimizer step trains on; steps can be asked for in any order."""

    def __init__(self, blocks: Any, shape: StepShape, seed: int, shuffle: bool, n_steps: int):
        self.blocks, self.shape, self.n_steps = blocks, shape, n_steps
        self.order = BlockOrder(len(blocks), seed, shuffle)

    def __len__(self) -> int:
        return self.n_steps

    def block_of(self, sample: int) -> int:
        """The number of the block that sample 0, 1, ... of the run is."""
        return self.order.block_of(sample)

    def __getitem__(self, step: int) -> Step:
        micro_batches = []
        for micro in range(self.shape.grad_accum_steps):
            block_numbers = [self.block_of(sample) for sample in self.shape.samples(step, micro)]
            micro_batches.append(self.blocks.batch(block_numbers))
        return Step(micro_batches)


class StepSampler(Sampler):
    """The step numbers start, start + 1, ..., n_steps - 1. The length is n_steps even after a resume, since
    Lightning counts from the beginning of the run."""

    def __init__(self, start: int, n_steps: int):
        self.start, self.n_steps = start, n_steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.n_steps))

    def __len__(self) -> int:
        return self.n_steps


class StreamingPackedLMDataset(IterableDataset):
    """Steps from documents that are read, tokenized and packed while training.

    Documents are shuffled within groups of SHUFFLE_GROUP. Every process reads the whole stream and keeps its
    share of the blocks. The `stream_state` of a step says where the next step starts: in which piece of text,
    and at which id.

        epoch, group    the number of the epoch, and of the group in it; they seed the group's order
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
        """Fill a buffer with the ids of one piece after another; take out each step that it holds."""
        step_tokens = self.shape.blocks * self.stride  # from the start of a step to the start of the next
        needed = step_tokens - self.stride + self.seq_len + 1  # the last block reaches past its stride
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
                # what is left of earlier pieces, and how much of this piece is used up
                rest = {"tokens": buffer[first:n_earlier], "taken": max(0, first - n_earlier)}
                yield self._step(rows, json.dumps(position | rest))
            del buffer[:first]
            first = 0

    def _step(self, rows: np.ndarray, state: str) -> Step:
        """The part of a step for this process. `rows` (blocks, T + 1) holds the blocks of all processes."""
        micro_batches = []
        for micro in range(self.shape.grad_accum_steps):
            samples = self.shape.samples(0, micro)  # step 0, because `rows` begins with this step
            share = rows[samples.start : samples.stop]
            micro_batches.append(make_batch(share, share[:, 1:], self.segment_end_id))
        return Step(micro_batches, state)

    def _pieces(self) -> Iterator[tuple[str, bool, dict]]:
        """Yields (piece, whether it ends its document, the position before it), epoch after epoch."""
        n_skipped = self.state["piece"]  # of the first document
        for document, position in self._documents():
            for number, (piece, ends) in enumerate(document_pieces([document], self.tokenizer)):
                if number >= n_skipped:
                    yield piece, ends, position | {"piece": number}
            n_skipped = 0

    def _documents(self) -> Iterator[tuple[str, dict]]:
        """Yields (document, the position before it), shuffled in each group, epoch after epoch."""
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
    """The validation blocks in order, in batches, at most `limit` of them. Each process gets equally many; a
    missing one is replaced by a batch without labels, so that no process waits for another."""

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
        if number >= self.n_batches:  # a missing one: the last batch again, without its labels
            batch["labels"].fill_(IGNORE)
        return batch


# ---- all together --------------------------------------------------------------------------------


@dataclass
class PackedData:
    """A corpus ready to train on. `train` and `val` have a method `batch(numbers)` (`PackedLMDataset`, or the
    pairs of instruct.py). Only `train` can also be a DocumentStream, which is packed while training."""

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
        """A digest of the training data, so that a resume on other data is noticed; None for a stream."""
        return None if self.streaming else self.train.fingerprint()

    def describe(self) -> list[str]:
        """Sizes: one line for train, one for val."""
        train = "a stream" if self.streaming else self.train.describe(self.n_train_docs)
        return [f"train: {train}", f"val:   {self.val.describe(self.n_val_docs)}"]


def segment_end_id_of(config: Config, tokenizer: Tokenizer) -> int | None:
    """The token that ends a segment, if attention must stay inside each document; else None."""
    return tokenizer.eos_id if config.data.document_mask else None


@memory_for_text()  # if memory runs out, say what to do
def pack_corpus(corpus: Corpus, tokenizer: Tokenizer, config: Config) -> PackedData:
    """The corpus tokenized and cut into blocks. Raises UserError if nothing is left to validate on, or the
    training text does not fill one block."""
    segment_end_id = segment_end_id_of(config, tokenizer)
    val_row = tokenize(corpus.val, tokenizer)
    # padded, so that all of the validation text is scored
    val = PackedLMDataset(val_row, config.seq_len, pad_last=True, segment_end_id=segment_end_id)
    if len(val) == 0:
        raise UserError("the validation text is empty; raise data.val_fraction, or give it a text of its own")
    if isinstance(corpus.train, DocumentStream):
        return PackedData(
            train=corpus.train,
            val=val,
            n_train_docs=None,
            n_val_docs=len(corpus.val),
            sample_text=corpus.val[0][:SAMPLE_CHARS],  # a stream is not read before training
        )
    return PackedData(
        train=training_blocks(tokenize(corpus.train, tokenizer), config, segment_end_id),
        val=val,
        n_train_docs=len(corpus.train),
        n_val_docs=len(corpus.val),
        sample_text=corpus.train[0][:SAMPLE_CHARS],
    )


def pack_token_files(files: TokenFiles, tokenizer: Tokenizer, config: Config) -> PackedData:
    """Token files cut into blocks; the blocks are read when they are needed. Raises UserError if the files
    were made by another tokenizer, have nothing to validate on, or do not fill one block."""
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
    """The blocks to train on. Raises UserError if there is not even one."""
    train = PackedLMDataset(tokens, config.seq_len, config.stride, segment_end_id=segment_end_id)
    if len(train) == 0:
        raise UserError(
            f"the training text has {len(tokens)} tokens, fewer than one block of seq_len + 1 = "
            f"{config.seq_len + 1}; "
            f"give more text, or lower it with --override training.seq_len={max(2, len(tokens) // 2)}"
        )
    return train


def leave_signals_alone(worker: int) -> None:
    """Ctrl-C, or a scheduler's SIGTERM, reaches the data workers too. They keep working, so that the current
    step can be finished. A second SIGTERM ends them: a worker that waits for the network must not hold up the
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
    """(train, val). An item of `train` is a `Step`. The first one is `start_step`, or for a stream, the one
    that starts at `stream_state`. An item of `val` is a batch {input_ids, labels, ...}, each (B, T)."""
    shape = step_shape(config, rank, world)
    workers = config.hardware.num_workers
    # No batch_size: an item already is a whole step, or a whole batch. A generator of their own, because a
    # loader draws a seed from it, and the global one is for dropout.
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
        # One worker at most: each worker would read the whole stream.
        return DataLoader(stream, num_workers=min(workers, 1), **options), val
    steps = IndexedSteps(data.train, shape, config.seed, config.data.shuffle, n_steps)
    train = DataLoader(steps, sampler=StepSampler(start_step, n_steps), num_workers=workers, **options)
    return train, val
