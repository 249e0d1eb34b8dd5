"""A corpus of any size to token files: shards of ids by several processes, then one row of them for training
and one for validation.

    text -> pieces -> shards of --shard-chars characters -> .shards/train-000000.npy, ... -> train.npy,
    val.npy, meta.json

A shard is on disk whole or not at all, with the sha256 of its text: whoever starts again after a kill encodes
only what is missing, and a text that has changed since is noticed. No torch here.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from support.cli import end_with_parent
from support.files.atomic import atomic_write
from support.files.find_files import kind_of
from support.messages import UserError
from support.text.documents import DocumentStream, read_parts
from support.text.encode_corpus import Piece, encode_pieces, id_type, join_pieces
from support.text.hub import open_dataset
from support.text.validation_split import check_share, largest_whole, most_held
from tokenizer import Tokenizer, tokenizer_from_dict

VAL_FRACTION, VAL_TOKENS = 0.1, 2**20  # a tenth is held out, or so many tokens where that is less
DRAWS, BINS = 2**12, 2**16  # random numbers drawn at once; steps in which they are told apart


@dataclass
class Source:
    """Text to read: local files, or a dataset of the hub, streamed."""

    files: list[Path]
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    errors: str = "strict"
    stream: DocumentStream | None = None

    @property
    def n_bytes(self) -> int | None:
        """Of the files, for a progress bar; None where the text is packed."""
        packed = self.dataset or any(kind_of(file) == ".parquet" for file in self.files)
        return None if packed else sum(file.stat().st_size for file in self.files)

    def parts(self, position: dict | None = None) -> Iterator[Piece]:
        """The documents in parts. A stream goes on from `position`; files are read from their start, since
        that costs little."""
        if self.dataset is None:
            for file in self.files:
                yield from read_parts(file, self.text_field, self.errors)
            return
        if self.stream is None:
            where = self.dataset, self.config, self.split, None, self.revision
            rows = open_dataset(
                *where,
                streaming=True,
                flag="--dataset ",
                instead="read local files: --input my_book.txt in place of --dataset",
            )
            self.stream = DocumentStream(rows, self.text_field)
        self.stream.seek(position)
        while documents := self.stream.take(1):
            if documents[0].strip():
                yield documents[0], True

    def position(self) -> dict | None:
        return self.stream.position() if self.stream else None


# ---- shards --------------------------------------------------------------------------------------


def cut_shards(
    parts: Iterable[Piece], tokenizer: Tokenizer, shard_chars: int
) -> Iterator[tuple[list[Piece], bool]]:
    """(pieces, whether the first begins a document), about `shard_chars` characters at a time, whoever
    encodes them."""
    pieces, n_chars, begins = [], 0, True
    for piece, ends in join_pieces(parts, tokenizer):
        pieces.append((piece, ends))
        n_chars += len(piece)
        if n_chars >= shard_chars:
            yield pieces, begins
            pieces, n_chars, begins = [], 0, ends
    if pieces:
        yield pieces, begins


def pieces_sha256(pieces: list[Piece]) -> str:
    digest = hashlib.sha256()
    for piece, ends in pieces:
        text = piece.encode()
        digest.update(f"{len(text)} {ends} ".encode() + text)
    return digest.hexdigest()


def start_worker(state: dict, parent: int) -> None:
    """What a worker process does first: it makes its tokenizer, leaves Ctrl-C to the main process, and
    ends when that is gone."""
    global WORKER_TOKENIZER
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(grace=0.0, parent=parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core is busy with each worker already
    WORKER_TOKENIZER = tokenizer_from_dict(state)


def task(pieces: list[Piece]) -> tuple[bytes, list[int], list[bool]]:
    """Pieces as `encode_shard` takes them: one text crosses to another process ten times as fast as many."""
    return (
        "".join(piece for piece, _ in pieces).encode(),
        [len(piece) for piece, _ in pieces],
        [ends for _, ends in pieces],
    )


def encode_shard(
    path: Path, text: bytes, lengths: list[int], ends: list[bool], begins: bool, position: dict | None
) -> dict[str, Any]:
    """In a worker: write path.npy, and then path.json, which says that it is there. Returns what path.json
    holds."""
    whole, cuts = text.decode(), accumulate(lengths, initial=0)
    pieces = [(whole[a:b], is_end) for (a, b), is_end in zip(pairwise(cuts), ends, strict=True)]
    ids = encode_pieces(pieces, WORKER_TOKENIZER, begins)
    with atomic_write(path.with_suffix(".npy")) as file:
        np.save(file, ids)
    found = {
        "tokens": len(ids),
        "documents": sum(ends),
        "bytes": len(text),
        "sha256": pieces_sha256(pieces),
        "position": position if ends[-1] else None,  # in the middle of a document there is none
    }
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(json.dumps(found).encode())
    return found


@contextlib.contextmanager
def workers(n: int, tokenizer: Tokenizer) -> Iterator[Executor]:
    """So many processes that encode shards. Those they have in hand are finished, also after Ctrl-C."""
    context = multiprocessing.get_context("spawn")  # a process that has threads is not safely forked
    with ProcessPoolExecutor(n, context, start_worker, (tokenizer.to_dict(), os.getpid())) as pool:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit until they have started
        try:
            for _ in range(n):
                pool.submit(os.getpid)
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read_infos(folder: Path, name: str) -> list[dict[str, Any]]:
    """What path.json says of each shard that is there, by number; they may have come in another order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]


def read_already(folder: Path, name: str) -> list[dict[str, Any]]:
    """The same of the first shards, up to the last behind which a stream can go on: those are not read
    again. Of files, none."""
    infos = []
    while (path := folder / f"{name}-{len(infos):06}.json").exists():
        infos.append(json.loads(path.read_text()))
    while infos and infos[-1]["position"] is None:
        infos.pop()
    return infos


def write_shards(
    folder: Path,
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    shard_chars: int,
    pool: Executor,
    n_workers: int,
    advance: Callable,
) -> None:
    """Encode what is not there yet, a few shards ahead of the slowest worker. Raises UserError where the
    text has changed."""
    already = read_already(folder, name)
    advance(sum(info["bytes"] for info in already))
    waiting: set[Future] = set()

    def collect(room: int) -> None:
        nonlocal waiting
        while len(waiting) > room:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                advance(future.result()["bytes"])

    try:
        position, number = already[-1]["position"] if already else None, len(already)
        for pieces, begins in cut_shards(source.parts(position), tokenizer, shard_chars):
            path = folder / f"{name}-{number:06}"
            number += 1
            if path.with_suffix(".json").exists():
                found = json.loads(path.with_suffix(".json").read_text())
                if found["sha256"] != pieces_sha256(pieces):
                    raise changed(folder.parent)
                advance(found["bytes"])
            else:
                waiting.add(pool.submit(encode_shard, path, *task(pieces), begins, source.position()))
                collect(n_workers)
        collect(0)
    except BrokenExecutor:
        raise UserError(
            "a worker process has ended, killed for want of memory perhaps; try a lower --num-proc, the "
            "same command goes on"
        ) from None
    if (folder / f"{name}-{number:06}.json").exists():
        raise changed(folder.parent)


def changed(output: Path) -> UserError:
    return UserError(
        f"the text has changed since the token files in {output} were begun; begin anew by --fresh, or "
        "name another --output"
    )


# ---- one row -------------------------------------------------------------------------------------


def draws(first: int, n: int, seed: int) -> np.ndarray:
    """A random number in [0, 1) for each of the documents first, first + 1, ...: the same ones however
    shards are cut."""
    blocks = range(first // DRAWS, (first + n - 1) // DRAWS + 1)
    drawn = [np.random.default_rng((seed, block)).random(DRAWS) for block in blocks]
    return np.concatenate([*drawn, []])[first - blocks.start * DRAWS :][:n]


def shard_rows(folder: Path, name: str) -> Iterator[np.ndarray]:
    for path in sorted(folder.glob(f"{name}-*.npy")):
        yield np.load(path)


def document_lengths(row: np.ndarray, eos_id: int) -> np.ndarray:
    """How many tokens of a shard belong to each document that has some in it."""
    ends = np.flatnonzero(row == eos_id) + 1
    lengths = np.diff(ends, prepend=0, append=len(row))
    return lengths if lengths[-1] else lengths[:-1]


@dataclass
class Cut:
    """What is held out: whole the documents that drew less than `limit`, of each (start, stop) in tokens
    its last `fraction`."""

    limit: float
    large: list[tuple[int, int]]
    fraction: float


def choose_cut(folder: Path, n_documents: int, n_tokens: int, fraction: float, seed: int, eos_id: int) -> Cut:
    """As `hold_out` does with lists. Tokens are counted by what their document drew, so nothing need be
    remembered of each; those too large to be held out whole are few."""
    limits = n_tokens, n_documents, fraction
    tokens_by_draw, highest, large, first, begun, position = np.zeros(BINS), 0.0, [], 0, 0, 0
    for row in shard_rows(folder, "train"):
        lengths = document_lengths(row, eos_id)
        drawn = draws(first, len(lengths), seed)
        tokens_by_draw += np.bincount((drawn * BINS).astype(np.int64), weights=lengths, minlength=BINS)
        whole = lengths.copy()
        whole[0] += begun  # what an earlier shard holds of it
        stops, ended = position + np.cumsum(lengths), len(lengths) - int(row[-1] != eos_id)
        for i in np.flatnonzero(whole[:ended] > largest_whole(*limits)):
            large.append((int(stops[i] - whole[i]), int(stops[i])))
            tokens_by_draw[int(drawn[i] * BINS)] -= whole[i]
        begun = 0 if ended == len(lengths) else int(whole[-1])
        highest, first, position = max(highest, drawn.max()), first + ended, position + len(row)
    held = np.cumsum(tokens_by_draw)
    n_cut = n_tokens - held[-1]
    crossing = int(np.searchsorted(held, fraction * (n_tokens - n_cut)))  # where the share is reached
    too_much = fraction * n_cut + held[crossing] > most_held(*limits)
    return Cut(min((crossing + (not too_much)) / BINS, highest), large, fraction)


def divided(folder: Path, cut: Cut, seed: int, tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
    """[tokens to train on, tokens to validate on], a shard at a time. A document that is cut, not within a
    character, ends with EOS on both sides."""
    first_document, first_token = 0, 0
    for row in shard_rows(folder, "train"):
        lengths = document_lengths(row, tokenizer.eos_id)
        for_val = np.repeat(draws(first_document, len(lengths), seed) < cut.limit, lengths)
        first_document += len(lengths) - int(row[-1] != tokenizer.eos_id)
        joints = []
        for start, stop in cut.large:
            at = min(start + int((stop - start) * (1 - cut.fraction)), stop - 1) - first_token
            if 0 <= at < len(row):
                while at < len(row) and tokenizer.decode(row[max(0, at - 8) : at].tolist()).endswith(
                    "\ufffd"
                ):
                    at += 1
                joints.append(at)
            for_val[max(0, start - first_token) : max(0, stop - first_token)] = False
            for_val[max(0, at) : max(0, stop - first_token)] = True
        first_token += len(row)
        between = [tokenizer.eos_id, *tokenizer.bos_ids]
        where = np.repeat(np.array(joints, np.int64), len(between))
        row = np.insert(row, where, np.array(between * len(joints), row.dtype))
        for_val = np.insert(for_val, where, [False, *[True] * len(tokenizer.bos_ids)] * len(joints))
        yield [row[~for_val], row[for_val]]


def write_rows(
    output: Path, rows: Callable[[], Iterable[list[np.ndarray]]], dtype: type, vocab_size: int
) -> tuple[dict[str, Any], np.ndarray]:
    """train.npy and val.npy from rows of [train, val], in the memory of one; (their sizes and sums, how
    often each id occurs). The rows are gone through twice, since the head of a file says how many they
    are."""
    counts = np.zeros((2, vocab_size), np.int64)
    for pair in rows():
        for count, row in zip(counts, pair, strict=True):
            count += np.bincount(row, minlength=vocab_size)
    on_disk, digests = np.dtype(dtype).newbyteorder("<"), [hashlib.sha256(), hashlib.sha256()]
    with atomic_write(output / "val.npy") as val, atomic_write(output / "train.npy") as train:
        for file, count in zip((train, val), counts, strict=True):
            np.lib.format.write_array_header_1_0(
                file, {"descr": on_disk.str, "fortran_order": False, "shape": (int(count.sum()),)}
            )
        for pair in rows():
            for file, digest, row in zip((train, val), digests, pair, strict=True):
                content = row.astype(on_disk, copy=False).tobytes()
                digest.update(content)
                file.write(content)
    sizes = {
        name: {"tokens": int(count.sum()), "sha256": digest.hexdigest()}
        for name, count, digest in zip(("train", "val"), counts, digests, strict=True)
    }
    return sizes, counts


def join_shards(
    folder: Path, output: Path, tokenizer: Tokenizer, own_val: bool, fraction: float | None, seed: int
) -> dict[str, Any]:
    """Write train.npy and val.npy; returns what meta.json says of them. Raises UserError if there is no text."""
    infos = {name: read_infos(folder, name) for name in ("train", "val")}
    for name in ("train", "val") if own_val else ("train",):
        if not sum(info["documents"] for info in infos[name]):
            raise UserError(
                f"there is no text to {'train' if name == 'train' else 'validate'} on; check the files, "
                "and --text-field"
            )
    both = infos["train"] + infos["val"]
    n_tokens, n_documents, n_bytes = (
        sum(info[key] for info in both) for key in ("tokens", "documents", "bytes")
    )
    dtype, none = id_type(tokenizer.vocab_size), np.array([], id_type(tokenizer.vocab_size))

    fraction = fraction or min(VAL_FRACTION, VAL_TOKENS / n_tokens)
    cut = None if own_val else choose_cut(folder, n_documents, n_tokens, fraction, seed, tokenizer.eos_id)

    def rows() -> Iterator[list[np.ndarray]]:
        if cut is not None:
            yield from divided(folder, cut, seed, tokenizer)
        else:
            yield from ([row, none] for row in shard_rows(folder, "train"))
            yield from ([none, row] for row in shard_rows(folder, "val"))

    (output / "meta.json").unlink(missing_ok=True)  # from here on the folder is not finished
    meta, counts = write_rows(output, rows, dtype, tokenizer.vocab_size)
    if cut is not None:
        check_share(
            meta["val"]["tokens"], n_tokens, fraction, "tokens", "name a text of its own by --val-input"
        )
    for name, count in zip(("train", "val"), counts, strict=True):
        meta[name]["documents"] = int(count[tokenizer.eos_id])
    counts = counts.sum(axis=0)
    return meta | {
        "dtype": np.dtype(dtype).name,
        "bytes": n_bytes,
        "bytes_per_token": round(n_bytes / n_tokens, 4),
        "tokens_in_use": int((counts > 0).sum()),
        "unknown": 0 if tokenizer.unknown_id is None else int(counts[tokenizer.unknown_id]),
        "longest_tokens": [
            [id, text, int(counts[id])]
            for id, text in longest_tokens(np.flatnonzero(counts).tolist(), tokenizer)
        ],
        "source_sha256": source_sha256(info["sha256"] for info in both),
    }


def longest_tokens(ids: Iterable[int], tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """(id, text) of the ten of these that stand for most bytes: a look at them tells what a text is full of."""
    texts = [(id, tokenizer.decode([id])) for id in ids if id != tokenizer.eos_id]
    return sorted(texts, key=lambda pair: (-len(pair[1].encode()), pair[0]))[:10]


def source_sha256(shards: Iterable[str]) -> str:
    """Of a text, from the sums of its shards."""
    return hashlib.sha256(" ".join(shards).encode()).hexdigest()
