"""Token files: long rows of ids on disk, read piece by piece, so that they may be larger than the memory.
`prepare.py` writes train.npy, val.npy and meta.json; files of other programs come without meta.json.

torch is not imported here.
"""

import copy
import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from support.files.find_files import kind_of
from support.messages import UserError
from support.text.mid_document import text_after
from support.text.validation_split import held_out_end
from tokenizer import Tokenizer, tokenizer_from_dict

FORMAT_VERSION = 1
N_SAMPLES = 256  # checks that would take too long on a whole file look at this many pieces of it
SAMPLE_TOKENS = 4096  # tokens in each piece
DECODE_TOKENS = 2**16  # tokens that are decoded at once
HOW_TO_MAKE = (
    "python3 prepare.py tokens --input my_book.txt --tokenizer gpt2 --output tokens makes a folder of "
    "token files"
)


class TokenFile:
    """Tokens `start` to `stop` of a file, indexed like an array. Only the tokens asked for are read.

    The file is a .npy file that holds whole numbers in one dimension, or a raw .bin file of such numbers,
    little-endian, of type `dtype`. For each access the file is mapped into memory anew, and unmapped
    again: so memory use stays small, however much of a file is read. Raises UserError for other files.
    """

    def __init__(self, path: str | Path, dtype: str | None = None, key: str = "data.path"):
        self.path = Path(path)
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if kind_of(self.path) == ".npy":
                self.offset, self.dtype, n = self._read_header(file)
                if dtype not in (None, self.dtype.name):
                    raise UserError(
                        f"data.dtype={dtype}, and {path} says of itself that it holds {self.dtype.name}; "
                        "leave data.dtype out"
                    )
            else:
                self.offset, self.dtype, n = self._raw_layout(size, dtype, key)
        if self.offset + n * self.dtype.itemsize > size:
            raise UserError(
                f"{path} should hold {n:,} tokens and ends before; it was cut off: make or copy it again"
            )
        self.start, self.stop = 0, n
        self.vocab_size: int | None = None  # once this is set, ids outside the vocabulary are refused

    def _read_header(self, file: Any) -> tuple[int, np.dtype, int]:
        """(offset of the first number, type of the numbers, how many there are) of a .npy file."""
        try:
            version, _ = np.lib.format.read_magic(file)
            readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, _, dtype = readers[version](file)
        except (ValueError, KeyError, EOFError):
            raise UserError(
                f"{self.path} is not a .npy file of numpy, or is damaged; {HOW_TO_MAKE}"
            ) from None
        if dtype.kind not in "ui" or len(shape) != 1:
            raise UserError(
                f"{self.path} holds {dtype} in the shape {shape}; token files hold whole numbers in one row"
            )
        return file.tell(), dtype, shape[0]

    def _raw_layout(self, size: int, dtype: str | None, key: str) -> tuple[int, np.dtype, int]:
        """The same for a raw file of `size` bytes."""
        if dtype is None:
            raise UserError(
                f"{key}={self.path} is a raw file, which does not say what it holds; add --override "
                "data.dtype=uint16 (or uint32)"
            )
        number = np.dtype(dtype).newbyteorder("<")
        if size % number.itemsize:
            raise UserError(
                f"{self.path} has {size:,} bytes, and one {dtype} takes {number.itemsize}, which leaves a "
                "rest; is data.dtype right, and the file complete?"
            )
        return 0, number, size // number.itemsize

    def part(self, start: int, stop: int) -> "TokenFile":
        """Tokens `start` to `stop` of this one, as another TokenFile."""
        part = copy.copy(self)
        part.start, part.stop = self.start + start, self.start + stop
        return part

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        if len(self) == 0:  # an empty file cannot be mapped
            return np.array([], self.dtype)[index]
        offset = self.offset + self.start * self.dtype.itemsize
        # Not np.memmap: with it a batch of 32 x 128 tokens takes 0.22 ms in place of 0.14 ms.
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        in_file = np.frombuffer(mapped, self.dtype, len(self), offset)
        ids = np.array(in_file[index])  # a copy, so that no page of the file stays in use
        if self.vocab_size and ids.size:
            self._refuse_ids_outside(ids, self.vocab_size)
        return ids

    def _refuse_ids_outside(self, ids: np.ndarray, vocab_size: int) -> None:
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise UserError(
                f"{self.path} holds the id {wrong}, and the tokenizer has ids 0 to {vocab_size - 1}; set "
                "tokenizer.kind and tokenizer.path to the tokenizer that made the file, or fix data.dtype"
            )

    def samples(self) -> np.ndarray:
        """N_SAMPLES pieces spread evenly over the file; all of a file that is no longer than they are."""
        if len(self) <= N_SAMPLES * SAMPLE_TOKENS:
            return self[:]
        starts = np.linspace(0, len(self) - SAMPLE_TOKENS, N_SAMPLES, dtype=np.int64)
        return np.concatenate([self[start : start + SAMPLE_TOKENS] for start in starts])

    def fingerprint(self) -> str:
        """sha256 of the length and the samples. Not of all tokens: that would read a huge file at each
        start."""
        head = f"{len(self)} {self.dtype.name} ".encode()
        return hashlib.sha256(head + self.samples().tobytes()).hexdigest()

    def text_of(self, tokenizer: Tokenizer, n_tokens: int) -> str:
        """The text of the first document, or of its first `n_tokens` tokens if it is longer."""
        ids = self[:n_tokens]
        ends = np.flatnonzero(ids[1:] == tokenizer.eos_id)  # [1:]: an EOS at the very beginning ends nothing
        if len(ends):
            ids = ids[: ends[0] + 1]
        return tokenizer.decode(text_ids(ids.tolist(), tokenizer))

    def count(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """(number of documents that end in the file, bytes of its text without its first token), found by
        decoding all of it. A long document is decoded in parts; a character that is cut waits for its
        end."""
        n_documents = n_bytes = 0
        waiting: list[int] = []  # ids of the current document that are not decoded yet
        before: list[int] = []  # ids of it that were decoded last
        for start in range(0, len(self), DECODE_TOKENS):
            ids = self[start : start + DECODE_TOKENS]
            *documents, rest = np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)
            for document in documents:
                n_bytes += n_text_bytes([*waiting, *document.tolist()], tokenizer, before)
                waiting, before = [], []
            n_documents += len(documents)
            waiting += rest.tolist()
            if len(waiting) > DECODE_TOKENS:
                n = n_whole(waiting, tokenizer)
                n_bytes += n_text_bytes(waiting[:n], tokenizer, before)
                waiting, before = waiting[n:], waiting[:n]
        n_bytes += n_text_bytes(waiting, tokenizer, before)
        return n_documents, n_bytes - n_first_bytes(self[:4].tolist(), tokenizer)


# ---- ids to bytes of text ------------------------------------------------------------------------


def n_whole(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many of the ids to decode so that the text ends with a whole character: all, or up to three fewer.
    If that does not help, the text itself is broken, and the answer is all."""
    for n in range(len(ids), len(ids) - 4, -1):
        if not tokenizer.decode(ids[max(0, n - 8) : n]).endswith("\ufffd"):
            return n
    return len(ids)


def text_ids(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids without EOS and BOS, which are not text."""
    return [i for i in ids if i != tokenizer.eos_id and i not in tokenizer.bos_ids]


def n_text_bytes(ids: list[int], tokenizer: Tokenizer, before: list[int] | tuple[()] = ()) -> int:
    """How many bytes the text of `ids` has when they follow `before`."""
    return len(text_after(tokenizer, before, text_ids(ids, tokenizer)).encode())


def n_first_bytes(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many bytes the text of the first id has. Nothing predicts that id, so its text is not counted. BOS
    has no text.

    If the first token ends inside a character (of four tokens at most), decode all tokens of the character,
    and subtract what the later ones hold: each byte of theirs is shown as U+FFFD.
    """
    first = text_ids(ids[:1], tokenizer)
    whole = 1  # how many ids make whole characters
    while tokenizer.decode(ids[:whole]).endswith("\ufffd") and whole < len(ids):
        whole += 1
    if not first or whole == 1:
        return n_text_bytes(first, tokenizer)
    rest = tokenizer.decode(text_ids(ids[1:whole], tokenizer))
    after_character = rest.lstrip("\ufffd")
    n_rest = len(rest) - len(after_character)
    return n_text_bytes(ids[:whole], tokenizer) - n_rest - len(after_character.encode())


# ---- a folder of token files ---------------------------------------------------------------------


@dataclass
class TokenFiles:
    """The training and validation tokens that a config names, and what meta.json holds (None if there is no
    meta.json)."""

    train: TokenFile
    val: TokenFile
    meta: dict[str, Any] | None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return tokenizer_from_dict(self.meta["tokenizer"]) if self.meta else None

    def n_documents(self, part: str) -> int | None:
        return self.meta[part]["documents"] if self.meta else None

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise UserError if the ids were not made by this tokenizer. If there is no meta.json to compare,
        samples of the files must at least have no ids outside its vocabulary."""
        if self.tokenizer and self.tokenizer.fingerprint() != tokenizer.fingerprint():
            raise UserError(
                f"{self.train.path.parent} was made by another tokenizer ({described(self.tokenizer)}) "
                f"than the model's ({described(tokenizer)}); "
                "make token files for this one: python3 prepare.py tokens --tokenizer CHECKPOINT"
            )
        for file in (self.train, self.val):
            file.vocab_size = tokenizer.vocab_size
            file.samples()  # reading them checks them


def described(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What meta.json holds in a folder that `prepare.py` made; None if there is no such file. Raises
    UserError if it is damaged."""
    path = folder / "meta.json"
    if not path.is_file():
        return None
    damaged = UserError(f"{path} is damaged; make the folder again with prepare.py")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is of format {version}, and this version reads {FORMAT_VERSION}; make the folder again"
        )
    try:
        counts = [meta[part][key] for part in ("train", "val") for key in ("tokens", "documents")]
        tokenizer = meta.get("tokenizer")
    except (KeyError, TypeError):
        raise damaged from None
    if not all(isinstance(count, int) for count in counts) or not isinstance(tokenizer, dict):
        raise damaged
    return meta


def open_token_files(
    path: str, *, val_path: str | None = None, dtype: str | None = None, val_fraction: float = 0.1
) -> TokenFiles:
    """Open the token files at `path`: a folder with train and val (.npy or .bin), or one file. The validation
    tokens are `val_path`; else the folder's val; else the end of the training tokens. Raises UserError."""
    folder = Path(path)
    meta = read_meta(folder) if folder.is_dir() else None
    train, val = find_token_files(folder)
    row = TokenFile(train, dtype)
    if val_path and not Path(val_path).is_file():
        raise UserError(f"data.val_path={val_path}: no such file; name a .npy or .bin file, or leave it out")
    val = val_path or val
    if val:
        files = TokenFiles(row, TokenFile(val, dtype, "data.val_path"), meta)
    else:
        end = held_out_end(len(row), val_fraction)
        files = TokenFiles(row.part(0, end), row.part(end, len(row)), meta)
    if meta:
        refuse_other_sizes(files, folder)
    return files


def find_token_files(path: Path) -> tuple[Path, Path | None]:
    """(training file, validation file or None). `path` is the folder they are in, or the training file
    itself. Raises UserError."""
    if path.is_dir():
        files = {file.name.lower(): file for file in sorted(path.iterdir(), reverse=True) if file.is_file()}
        train = files.get("train.npy") or files.get("train.bin")
        if train is None:
            unfinished = ""
            if (path / ".shards").is_dir():
                unfinished = " (an unfinished preparation: run the same prepare.py command again to continue)"
            raise UserError(f"data.path={path}: no train.npy or train.bin there{unfinished}; {HOW_TO_MAKE}")
        return train, files.get(f"val{kind_of(train)}")
    if not path.exists():
        raise UserError(f"data.path={path} does not exist; {HOW_TO_MAKE}")
    if not path.is_file() or kind_of(path) not in (".npy", ".bin"):
        raise UserError(
            f"data.path={path} is not a token file (.npy, .bin); {HOW_TO_MAKE}; or set data.source=text"
        )
    return path, None


def refuse_other_sizes(files: TokenFiles, folder: Path) -> None:
    """Raise UserError if a file in the folder does not have the number of tokens that meta.json says."""
    for part, file in (("train", files.train), ("val", files.val)):
        n = files.meta[part]["tokens"]
        if file.path.parent == folder and len(file) != n:
            raise UserError(
                f"{file.path} has {len(file):,} tokens, and {folder / 'meta.json'} says {n:,}; make the "
                "folder again with prepare.py"
            )
