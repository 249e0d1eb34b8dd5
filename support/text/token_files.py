"""Token files: a row of ids on disk, train.npy and val.npy with meta.json as `prepare.py` writes them, or
those of other programs.

No torch here.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from support.files.find_files import kind_of
from support.messages import UserError
from support.text.mid_document import text_after
from tokenizer import Tokenizer, tokenizer_from_dict

FORMAT_VERSION = 1
SAMPLES, SAMPLE_TOKENS = 256, 4096  # windows of a file that stand for the whole
DECODE_TOKENS = 2**16
HOW_TO_MAKE = (
    "python3 prepare.py tokens --input my_book.txt --tokenizer gpt2 --output tokens makes a folder of "
    "token files"
)


class TokenFile:
    """Tokens `start` to `stop` of a file, indexed like an array; only what is asked for comes into memory.

    `.npy` of whole numbers in one dimension, or a raw file (.bin) of `dtype`, little-endian. The file is
    mapped anew for each access: what was read then leaves this process with the mapping, so memory stays flat
    however much of a file is visited. Raises UserError for a file that is something else.
    """

    def __init__(self, path: str | Path, dtype: str | None = None, key: str = "data.path"):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if kind_of(self.path) == ".npy":
                self.offset, self.dtype, n = self._header(file)
                if dtype not in (None, self.dtype.name):
                    raise UserError(
                        f"data.dtype={dtype}, and {path} says of itself that it holds {self.dtype.name}; "
                        "leave data.dtype out"
                    )
            else:
                if dtype is None:
                    raise UserError(
                        f"{key}={path} is a raw file, which does not say what it holds; add --override "
                        "data.dtype=uint16 (or uint32)"
                    )
                self.offset, self.dtype = 0, np.dtype(dtype).newbyteorder("<")
                n, rest = divmod(size, self.dtype.itemsize)
                if rest:
                    raise UserError(
                        f"{path} has {size:,} bytes, which are no whole number of {dtype}; is data.dtype "
                        "right, and the file complete?"
                    )
            if self.offset + n * self.dtype.itemsize > size:
                raise UserError(
                    f"{path} should hold {n:,} tokens and ends before; it was cut off: make or copy it again"
                )
        self.start, self.stop = 0, n
        self.vocab_size: int | None = None  # once it is known, larger ids are refused

    def _header(self, file: Any) -> tuple[int, np.dtype, int]:
        """(where the numbers begin, their type, how many) of a .npy file."""
        try:
            version = np.lib.format.read_magic(file)
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[
                version[0]
            ]
            shape, _, dtype = read(file)
        except (ValueError, KeyError, EOFError):
            raise UserError(
                f"{self.path} is no .npy file of numpy, or a damaged one; {HOW_TO_MAKE}"
            ) from None
        if dtype.kind not in "ui" or len(shape) != 1:
            raise UserError(
                f"{self.path} holds {dtype} in the shape {shape}; token files hold whole numbers in one row"
            )
        return file.tell(), dtype, shape[0]

    def part(self, start: int, stop: int) -> "TokenFile":
        """Some of the tokens, as a file of their own."""
        other = object.__new__(TokenFile)
        other.__dict__ = {**self.__dict__, "start": self.start + start, "stop": self.start + stop}
        return other

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        mapped = (
            np.memmap(
                self.path, self.dtype, "r", self.offset + self.start * self.dtype.itemsize, (len(self),)
            )
            if len(self)
            else []
        )
        ids = np.array(np.asarray(mapped, self.dtype)[index])  # a copy: no page of the file stays in use
        if self.vocab_size and ids.size and (wrong := largest(ids)) not in range(self.vocab_size):
            raise UserError(
                f"{self.path} holds the id {wrong}, and the tokenizer has ids 0 to {self.vocab_size - 1}; "
                "name the tokenizer that made the file by "
                "tokenizer.kind and tokenizer.path, or the right data.dtype"
            )
        return ids

    def samples(self) -> np.ndarray:
        """Windows spread evenly over the file; all of a file that has no more."""
        if len(self) <= SAMPLES * SAMPLE_TOKENS:
            return self[:]
        starts = np.linspace(0, len(self) - SAMPLE_TOKENS, SAMPLES, dtype=np.int64)
        return np.concatenate([self[start : start + SAMPLE_TOKENS] for start in starts])

    def fingerprint(self) -> str:
        """sha256 of the length and the samples: a terabyte is not read at each start."""
        return hashlib.sha256(
            f"{len(self)} {self.dtype.name} ".encode() + self.samples().tobytes()
        ).hexdigest()

    def text_of(self, tokenizer: Tokenizer, n_tokens: int) -> str:
        """The text of the first document, at most so many tokens of it."""
        ids = self[:n_tokens]
        ends = np.flatnonzero(ids[1:] == tokenizer.eos_id)  # one at the very beginning ends nothing
        return tokenizer.decode(
            [
                int(i)
                for i in ids[: ends[0] + 1 if len(ends) else None]
                if i not in (tokenizer.eos_id, *tokenizer.bos_ids)
            ]
        )

    def count(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """(documents that end in it, bytes of their text without that of the first token), by decoding all
        of it."""
        n_documents, n_bytes, left, before = (
            0,
            0,
            [],
            [],
        )  # before: what a document that is counted in parts has had
        for start in range(0, len(self), DECODE_TOKENS):
            ids = self[start : start + DECODE_TOKENS]
            *ended, rest = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)
            for document in ended:
                n_bytes += n_text_bytes([*left, *document.tolist()], tokenizer, before)
                left, before = [], []
            n_documents += len(ended)
            left += rest.tolist()
            if (
                len(left) > DECODE_TOKENS
            ):  # a long document in parts; a character that is cut waits for its end
                whole = n_whole(left, tokenizer)
                n_bytes += n_text_bytes(left[:whole], tokenizer, before)
                left, before = left[whole:], left[:whole]
        return n_documents, n_bytes + n_text_bytes(left, tokenizer, before) - n_first_bytes(
            self[:4].tolist(), tokenizer
        )


def n_whole(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many of the ids end with a whole character: all, or up to three less; all too where the text
    itself is broken."""
    ends = (
        n
        for n in range(len(ids), len(ids) - 4, -1)
        if not tokenizer.decode(ids[max(0, n - 8) : n]).endswith("\ufffd")
    )
    return next(ends, len(ids))


def text_ids(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids without EOS and BOS, which are no text."""
    return [i for i in ids if i != tokenizer.eos_id and i not in tokenizer.bos_ids]


def n_text_bytes(ids: list[int], tokenizer: Tokenizer, before: list[int] | tuple[()] = ()) -> int:
    """Bytes of the text of `ids`, where they follow `before`."""
    return len(text_after(tokenizer, before, text_ids(ids, tokenizer)).encode())


def n_first_bytes(ids: list[int], tokenizer: Tokenizer) -> int:
    """Bytes of the text of the first id, which nothing predicts: none of BOS. Of a token that ends within
    a character, they are those of the character (four tokens at most) less the bytes in the tokens after,
    each of which is shown as U+FFFD."""
    first, whole = text_ids(ids[:1], tokenizer), 1
    while tokenizer.decode(ids[:whole]).endswith("\ufffd") and whole < len(ids):
        whole += 1
    if not first or whole == 1:
        return n_text_bytes(first, tokenizer)
    rest = tokenizer.decode(text_ids(ids[1:whole], tokenizer))
    shown = rest.lstrip("\ufffd")
    return n_text_bytes(ids[:whole], tokenizer) - (len(rest) - len(shown)) - len(shown.encode())


@dataclass
class TokenFiles:
    """The training and validation tokens a config names, with what meta.json says of them (None without one)."""

    train: TokenFile
    val: TokenFile
    meta: dict[str, Any] | None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return tokenizer_from_dict(self.meta["tokenizer"]) if self.meta else None

    def n_documents(self, part: str) -> int | None:
        return self.meta[part]["documents"] if self.meta else None

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise UserError if the ids are not this tokenizer's; of files without meta.json, those that are
        read are looked at."""
        if self.tokenizer and self.tokenizer.fingerprint() != tokenizer.fingerprint():
            raise UserError(
                f"{self.train.path.parent} was made by another tokenizer ({described(self.tokenizer)}) "
                f"than the model's ({described(tokenizer)}); "
                "make token files for this one: python3 prepare.py tokens --tokenizer CHECKPOINT"
            )
        for file in (self.train, self.val):
            file.vocab_size = tokenizer.vocab_size
            file.samples()


def largest(ids: np.ndarray) -> int:
    """The largest id; a negative one counts as larger than any."""
    return int(ids.min()) if ids.min() < 0 else int(ids.max())


def described(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"


def read_meta(folder: Path) -> dict[str, Any] | None:
    """meta.json of a folder that `prepare.py` made, None where there is none. Raises UserError for a
    damaged one."""
    path = folder / "meta.json"
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} is of format {meta['format_version']}, and this version reads {FORMAT_VERSION}; "
                "make the folder again"
            )
        sizes = {part: (meta[part]["tokens"], meta[part]["documents"]) for part in ("train", "val")}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged; make the folder again by prepare.py") from None
    if not all(isinstance(n, int) for pair in sizes.values() for n in pair) or not isinstance(
        meta.get("tokenizer"), dict
    ):
        raise UserError(f"{path} is damaged; make the folder again by prepare.py")
    return meta


def open_token_files(
    path: str, val_path: str | None = None, dtype: str | None = None, val_fraction: float = 0.1
) -> TokenFiles:
    """The files under a path: a folder with train and val (.npy or .bin), or one file, whose validation
    part is `val_path` or its own end. Raises UserError."""
    where, meta = Path(path), None
    if where.is_dir():
        meta = read_meta(where)
        files = {file.name.lower(): file for file in sorted(where.iterdir(), reverse=True) if file.is_file()}
        train = files.get("train.npy") or files.get("train.bin")
        if train is None:
            unfinished = (
                " (an unfinished preparation: the same prepare.py command goes on)"
                if (where / ".shards").is_dir()
                else ""
            )
            raise UserError(f"data.path={path}: no train.npy or train.bin there{unfinished}; {HOW_TO_MAKE}")
        if val_path is None and (val := files.get(f"val{kind_of(train)}")):
            val_path = str(val)
    elif where.is_file() and kind_of(where) in (".npy", ".bin"):
        train = where
    elif where.exists():
        raise UserError(
            f"data.path={path} is no token file (.npy, .bin); {HOW_TO_MAKE}, and data.source=text reads text"
        )
    else:
        raise UserError(f"data.path={path} does not exist; {HOW_TO_MAKE}")
    row = TokenFile(train, dtype)
    if val_path:
        if not Path(val_path).is_file():
            raise UserError(
                f"data.val_path={val_path}: no such file; name a .npy or .bin file, or leave it out"
            )
        files = TokenFiles(row, TokenFile(val_path, dtype, "data.val_path"), meta)
    else:
        cut = int(len(row) * (1 - val_fraction))
        files = TokenFiles(row.part(0, cut), row.part(cut, len(row)), meta)
    for part in ("train", "val") if meta else ():
        n, file = meta[part]["tokens"], getattr(files, part)
        if len(file) != n and file.path.parent == where:
            raise UserError(
                f"{file.path} has {len(file):,} tokens, and {where / 'meta.json'} says {n:,}; make the "
                "folder again by prepare.py"
            )
    return files
