"""Joins the shards of ids that make_token_files.py writes into train.npy and val.npy. Only one shard is in
memory at a time.

.shards/train-000000.npy, ...
    -> of each shard [tokens to train on, tokens to validate on]
    -> train.npy, val.npy

torch is not imported here.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support.files.atomic import atomic_write
from support.messages import UserError
from support.text.encode_corpus import id_type, ids_around_document
from support.text.validation_split import HoldOutByDraw, held_out_end, random_of_documents, warn_of_share
from tokenizer import Tokenizer

DEFAULT_VAL_FRACTION = 0.1
DEFAULT_VAL_TOKENS = 2**20  # if no fraction is asked for, at most this many tokens are held out


def read_infos(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the .json file of each shard says, in the order of the shards' numbers."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]


def shard_rows(folder: Path, name: str) -> Iterator[np.ndarray]:
    """The ids of each shard, in the order of the shards' numbers."""
    for path in sorted(folder.glob(f"{name}-*.npy")):
        yield np.load(path)


# ---- what is held out ----------------------------------------------------------------------------


def document_lengths(row: np.ndarray, eos_id: int) -> np.ndarray:
    """How many tokens of this shard each document has, for the documents that are in it."""
    ends = np.flatnonzero(row == eos_id) + 1
    lengths = np.diff(ends, prepend=0, append=len(row))
    return lengths if lengths[-1] else lengths[:-1]


class HeldOut(NamedTuple):
    """Which documents are held out for validation: whole ones whose random number is below `limit`, and the
    last `fraction` of each large one. `large` holds (first token, token after the last) of those."""

    limit: float
    large: list[tuple[int, int]]
    fraction: float


def choose_held_out(
    folder: Path, *, n_documents: int, n_tokens: int, fraction: float, seed: int, eos_id: int
) -> HeldOut:
    """Read all shards once, and choose what is held out. A document may span several shards; it is counted in
    the shard where it ends."""
    documents = HoldOutByDraw(n_tokens, n_documents, fraction)
    n_ended = 0  # documents that end in the shards before
    begun = 0  # tokens, in the shards before, of the document that this shard begins with
    position = 0  # tokens in the shards before
    for row in shard_rows(folder, "train"):
        stops = np.flatnonzero(row == eos_id) + 1
        lengths = np.diff(stops, prepend=0)
        if len(stops):
            lengths[0] += begun
            begun = len(row) - int(stops[-1])
        else:
            begun += len(row)
        documents.add(lengths, position + stops, random_of_documents(n_ended, len(stops), seed))
        n_ended += len(stops)
        position += len(row)
    return HeldOut(documents.limit(), documents.large, fraction)


def divide_shards(
    folder: Path, held_out: HeldOut, seed: int, tokenizer: Tokenizer
) -> Iterator[list[np.ndarray]]:
    """For each shard [tokens to train on, tokens to validate on]. A large document is cut in two, but never
    inside a character. Each half then is a document of its own, with an EOS (end of text) at its end."""
    n_ended = 0  # documents that end in the shards before
    first_token = 0  # tokens in the shards before
    for row in shard_rows(folder, "train"):
        lengths = document_lengths(row, tokenizer.eos_id)
        draws = random_of_documents(n_ended, len(lengths), seed)
        for_val = np.repeat(draws < held_out.limit, lengths)
        cuts = []
        for start, stop in held_out.large:
            cut = start + held_out_end(stop - start, held_out.fraction) - first_token
            if 0 <= cut < len(row):
                cut = next_character(row, cut, tokenizer)
                cuts.append(cut)
            for_val[max(0, start - first_token) : max(0, stop - first_token)] = False
            for_val[max(0, cut) : max(0, stop - first_token)] = True
        n_ended += int((row == tokenizer.eos_id).sum())
        first_token += len(row)
        row, for_val = end_documents_at(row, for_val, cuts, tokenizer)
        yield [row[~for_val], row[for_val]]


def next_character(row: np.ndarray, place: int, tokenizer: Tokenizer) -> int:
    """The first place at or after `place` where a character begins; the end of the row if there is none. A
    text that ends inside a character decodes to a text that ends with U+FFFD."""
    while place < len(row) and tokenizer.decode(row[max(0, place - 8) : place].tolist()).endswith("\ufffd"):
        place += 1
    return place


def end_documents_at(
    row: np.ndarray, for_val: np.ndarray, cuts: list[int], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Put the end of one document and the beginning of the next into the row at each cut. Returns the row and
    its mask `for_val`, both longer now."""
    before, after = ids_around_document(tokenizer, begins=True, ends=True)
    between = [*after, *before]  # EOS belongs to the part that is trained on, BOS to the one held out
    sides = [False] * len(after) + [True] * len(before)
    places = np.repeat(np.array(cuts, np.int64), len(between))
    row = np.insert(row, places, np.array(between * len(cuts), row.dtype))
    for_val = np.insert(for_val, places, np.array(sides * len(cuts), bool))
    return row, for_val


# ---- the files -----------------------------------------------------------------------------------


def write_npy_header(file: Any, dtype: np.dtype, n: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (n,)}
    np.lib.format.write_array_header_1_0(file, header)


def write_rows(
    output: Path, rows: Callable[[], Iterable[list[np.ndarray]]], dtype: type, vocab_size: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Write train.npy and val.npy. Returns their number of tokens and sha256, and how often each id occurs in
    each, an array of shape (2, vocab_size).

    `rows()` gives [train, val] for each shard. It is called twice, because a file must say in its first bytes
    how many tokens follow.
    """
    counts = np.zeros((2, vocab_size), np.int64)
    for pair in rows():
        for count, row in zip(counts, pair, strict=True):
            count += np.bincount(row, minlength=vocab_size)
    on_disk = np.dtype(dtype).newbyteorder("<")
    digests = [hashlib.sha256(), hashlib.sha256()]
    with atomic_write(output / "val.npy") as val, atomic_write(output / "train.npy") as train:
        files = (train, val)
        for file, count in zip(files, counts, strict=True):
            write_npy_header(file, on_disk, int(count.sum()))
        for pair in rows():
            for file, digest, row in zip(files, digests, pair, strict=True):
                content = row.astype(on_disk, copy=False).tobytes()
                digest.update(content)
                file.write(content)
    sizes = {
        name: {"tokens": int(count.sum()), "sha256": digest.hexdigest()}
        for name, count, digest in zip(("train", "val"), counts, digests, strict=True)
    }
    return sizes, counts


def refuse_no_text(infos: dict[str, list[dict[str, Any]]], own_val: bool) -> None:
    """Raises UserError if no shard holds a document to train on, or to validate on."""
    names = {"train": "train", "val": "validate"} if own_val else {"train": "train"}
    for name, verb in names.items():
        if not sum(info["documents"] for info in infos[name]):
            raise UserError(f"there is no text to {verb} on; check the files, and --text-field")


def join_shards(
    folder: Path, output: Path, tokenizer: Tokenizer, *, own_val: bool, fraction: float | None, seed: int
) -> dict[str, Any]:
    """Write train.npy and val.npy; returns what meta.json will say about them. `own_val` says whether there
    are shards of a separate validation text; if not, `fraction` is held out. Raises UserError if there is no
    text."""
    infos = {name: read_infos(folder, name) for name in ("train", "val")}
    refuse_no_text(infos, own_val)
    both = infos["train"] + infos["val"]
    n_tokens = sum(info["tokens"] for info in both)
    n_bytes = sum(info["bytes"] for info in both)
    dtype = id_type(tokenizer.vocab_size)
    fraction = fraction or min(DEFAULT_VAL_FRACTION, DEFAULT_VAL_TOKENS / n_tokens)
    if not own_val:
        held_out = choose_held_out(
            folder,
            n_documents=sum(info["documents"] for info in both),
            n_tokens=n_tokens,
            fraction=fraction,
            seed=seed,
            eos_id=tokenizer.eos_id,
        )

    def rows() -> Iterator[list[np.ndarray]]:
        if not own_val:
            yield from divide_shards(folder, held_out, seed, tokenizer)
            return
        nothing = np.array([], dtype)
        for row in shard_rows(folder, "train"):
            yield [row, nothing]
        for row in shard_rows(folder, "val"):
            yield [nothing, row]

    (output / "meta.json").unlink(missing_ok=True)  # from here on the folder is not finished
    meta, counts = write_rows(output, rows, dtype, tokenizer.vocab_size)
    if not own_val:
        warn_of_share(
            held=meta["val"]["tokens"],
            total=n_tokens,
            fraction=fraction,
            unit="tokens",
            advice="name a text of its own by --val-input",
        )
    for name, count in zip(("train", "val"), counts, strict=True):
        meta[name]["documents"] = int(count[tokenizer.eos_id])
    id_counts = counts.sum(axis=0)
    ids_in_use = np.flatnonzero(id_counts).tolist()
    return meta | {
        "dtype": np.dtype(dtype).name,
        "bytes": n_bytes,
        "bytes_per_token": round(n_bytes / n_tokens, 4),
        "tokens_in_use": len(ids_in_use),
        "unknown": 0 if tokenizer.unknown_id is None else int(id_counts[tokenizer.unknown_id]),
        "longest_tokens": [
            [id, text, int(id_counts[id])] for id, text in longest_tokens(ids_in_use, tokenizer)
        ],
        "source_sha256": source_sha256(info["sha256"] for info in both),
    }


def longest_tokens(ids: Iterable[int], tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """(id, text) of those ten tokens that stand for the most bytes. They show what a text is full of."""
    texts = [(id, tokenizer.decode([id])) for id in ids if id != tokenizer.eos_id]
    return sorted(texts, key=lambda pair: (-len(pair[1].encode()), pair[0]))[:10]


def source_sha256(shards: Iterable[str]) -> str:
    """A checksum of a whole text, made from the checksums of its shards."""
    return hashlib.sha256(" ".join(shards).encode()).hexdigest()
