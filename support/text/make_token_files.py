"""Encodes a text of any size into shards of ids, in several processes. join_shards.py then joins the shards
into token files.

    text -> pieces -> shards of --shard-chars characters -> .shards/train-000000.npy, ...

A shard is on disk whole or not at all, with the sha256 of its text. So if the command is killed and run
again, it encodes only what is missing, and notices if the text has changed. torch is not imported here.
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
from support.text.encode_corpus import Piece, encode_pieces, join_pieces
from support.text.hub import open_dataset
from tokenizer import Tokenizer, tokenizer_from_dict


@dataclass
class Source:
    """Text to read: local files, or a dataset of the hub, streamed."""

    files: list[Path]
    dataset: str | None = None
    config: str | None = None
    split: str | None = "train"  # has no use with files
    revision: str | None = None
    text_field: str = "text"
    errors: str = "strict"
    stream: DocumentStream | None = None

    @property
    def n_bytes(self) -> int | None:
        """The size of the text, for a progress bar; None if it is not known (a dataset, or compressed
        files)."""
        if self.dataset or any(kind_of(file) == ".parquet" for file in self.files):
            return None
        return sum(file.stat().st_size for file in self.files)

    def parts(self, position: dict | None = None) -> Iterator[Piece]:
        """The documents in parts. A stream starts at `position`. Files are always read from their start,
        since that is quick."""
        if self.dataset is None:
            for file in self.files:
                yield from read_parts(file, self.text_field, self.errors)
            return
        if self.stream is None:
            rows = open_dataset(
                self.dataset,
                self.config,
                self.split,
                path=None,
                revision=self.revision,
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
    """Cut a text into shards of about `shard_chars` characters: (pieces of the shard, whether the first piece
    begins a document). The number of workers does not change the cuts."""
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
    """A checksum of the texts, and of where pieces and documents end."""
    digest = hashlib.sha256()
    for piece, ends in pieces:
        text = piece.encode()
        digest.update(f"{len(text)} {ends} ".encode() + text)
    return digest.hexdigest()


def start_worker(state: dict, parent: int) -> None:
    """What a worker process does first. It makes its tokenizer, ignores Ctrl-C (the main process handles
    that), and will end if the main process is gone."""
    global WORKER_TOKENIZER
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(grace=0.0, parent=parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads: the workers already keep all cores busy
    WORKER_TOKENIZER = tokenizer_from_dict(state)


def joined(pieces: list[Piece]) -> tuple[bytes, list[int], list[bool]]:
    """(text of all pieces, length of each piece, whether a document ends with it), for `encode_shard`. One
    long text is sent to another process ten times as fast as many short ones."""
    return (
        "".join(piece for piece, _ in pieces).encode(),
        [len(piece) for piece, _ in pieces],
        [ends for _, ends in pieces],
    )


def encode_shard(
    path: Path, text: bytes, lengths: list[int], ends: list[bool], begins: bool, position: dict | None
) -> dict[str, Any]:
    """Runs in a worker: encode the text, write path.npy, and then path.json, which shows that the shard is
    complete. Returns what path.json holds. `position` is where a stream continues after this shard."""
    whole = text.decode()
    cuts = accumulate(lengths, initial=0)
    pieces = []
    for (start, stop), is_end in zip(pairwise(cuts), ends, strict=True):
        pieces.append((whole[start:stop], is_end))
    ids = encode_pieces(pieces, WORKER_TOKENIZER, begins)
    with atomic_write(path.with_suffix(".npy")) as file:
        np.save(file, ids)
    found = {
        "tokens": len(ids),
        "documents": sum(ends),
        "bytes": len(text),
        "sha256": pieces_sha256(pieces),
        "position": position if ends[-1] else None,  # a stream cannot continue inside a document
    }
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(json.dumps(found).encode())
    return found


@contextlib.contextmanager
def workers(n: int, tokenizer: Tokenizer) -> Iterator[Executor]:
    """`n` processes that encode shards. After Ctrl-C they finish the shards that they have begun."""
    context = multiprocessing.get_context("spawn")  # "fork" is not safe in a process that has threads
    with ProcessPoolExecutor(n, context, start_worker, (tokenizer.to_dict(), os.getpid())) as pool:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes that start now inherit this
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


def shard_info(folder: Path, name: str, number: int) -> dict[str, Any] | None:
    """What the .json file of a shard says; None if the shard is not there."""
    path = folder / f"{name}-{number:06}.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_already(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the .json files of the first shards say, up to the last shard after which a stream can continue:
    the text of these shards is not read again. For local files an empty list, since they are read again."""
    infos = []
    while shard_info(folder, name, len(infos)):
        infos.append(shard_info(folder, name, len(infos)))
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
    """Encode the shards that are not there yet. The text is read only a few shards ahead of the workers.
    `advance` is called with the number of bytes just done. Raises UserError if the text has changed."""
    already = read_already(folder, name)
    advance(sum(info["bytes"] for info in already))
    waiting: set[Future] = set()

    def wait_until_at_most(n_waiting: int) -> None:
        nonlocal waiting
        while len(waiting) > n_waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                advance(future.result()["bytes"])

    position = already[-1]["position"] if already else None
    number = len(already)
    try:
        for pieces, begins in cut_shards(source.parts(position), tokenizer, shard_chars):
            info = shard_info(folder, name, number)
            if info is None:
                path = folder / f"{name}-{number:06}"
                waiting.add(pool.submit(encode_shard, path, *joined(pieces), begins, source.position()))
                wait_until_at_most(n_workers)
            elif info["sha256"] == pieces_sha256(pieces):
                advance(info["bytes"])
            else:
                raise text_has_changed(folder.parent)
            number += 1
        wait_until_at_most(0)
    except BrokenExecutor:
        raise UserError(
            "a worker process has ended, possibly killed for lack of memory; to continue, run the same "
            "command again, with a lower --num-proc"
        ) from None
    if shard_info(folder, name, number):
        raise text_has_changed(folder.parent)


def text_has_changed(output: Path) -> UserError:
    return UserError(
        f"the text has changed since the token files in {output} were begun; start again with --fresh, or "
        "name another --output"
    )
