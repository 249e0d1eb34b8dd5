"""How files and datasets become documents: text files, .jsonl and .parquet files, and streamed datasets.

a .jsonl or .parquet file                         each row is a document
a file with lines that are `<|endoftext|>`        the text between two such lines is a document
any other file                                    the whole file is one document
"""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.files.find_files import find_files, kind_of
from support.messages import UserError, warn
from support.text.hub import read_rows
from support.text.read_text import PART_CHARS, read_blocks, refuse_larger_than_memory, unix_lines
from support.text.rows import RowTexts, jsonl_rows, parquet_rows
from tokenizer import EOS_TEXT

# A pattern that begins with fixed text is found fast. `between_separators` checks that only blanks come
# before it on its line.
SEPARATOR = re.compile(r"<\|endoftext\|>[^\S\n]*\n")
SEPARATOR_CHARS = 1000  # a longer line is never a separator, even if most of it is blanks
ROWS_TO_WARN_AT = [10**n for n in range(10)]  # a stream warns when 1, 10, 100, ... rows have been left out
Part = tuple[str, bool]  # a part of a document, and whether the document ends with it


# ---- documents of files --------------------------------------------------------------------------


def text_documents(path: str, data: Any, key: str = "data.path") -> list[str]:
    """All documents of the files under `path`, without blank ones. `key` is the config key that holds the
    path, for errors. Raises UserError if there is no text."""
    files = find_files(path, key)
    refuse_larger_than_memory(files, path, key)
    documents = []
    for file in files:
        for document in read_documents(file, data.text_field, data.errors):
            if document.strip():
                documents.append(document)
    if not documents:
        raise UserError(
            f"{path} holds no text ({len(files)} file{'s' * (len(files) > 1)}, "
            f"{sum(f.stat().st_size for f in files)} bytes); give a file with some"
        )
    return documents


def read_documents(file: Path, text_field: str = "text", errors: str = "strict") -> Iterator[str]:
    """The documents of one file, each whole."""
    parts: list[str] = []
    for part, ends in read_parts(file, text_field, errors):
        parts.append(part)
        if ends:
            yield "".join(parts)
            parts = []


def read_parts(file: Path, text_field: str = "text", errors: str = "strict") -> Iterator[Part]:
    """The documents of one file; a long one comes in parts of about PART_CHARS characters. Blank documents
    are left out."""
    if kind_of(file) in (".jsonl", ".parquet"):
        yield from parts_of_rows(file, text_field, errors)
        return
    warn_of_rows(file)
    if is_separated(file):
        yield from parts_between_separators(file, errors)
    else:
        yield from parts_of_one_document(file, errors)


def parts_of_rows(file: Path, text_field: str, errors: str) -> Iterator[Part]:
    """The text of each row, as a whole document."""
    texts = RowTexts(text_field)
    rows = parquet_rows(file, text_field) if kind_of(file) == ".parquet" else jsonl_rows(file, errors)
    for row, where in rows:
        text = texts.text_of(row, where)
        if text:
            yield text, True
    texts.warn_of_rows_without_text()


def parts_of_one_document(file: Path, errors: str) -> Iterator[Part]:
    """The whole file as one document, in parts."""
    text = ""
    begun = False  # whether a part of the document has been given already
    for block in unix_lines(read_blocks(file, errors)):
        text += block
        if len(text) >= PART_CHARS and (begun or text.strip()):
            yield text, False
            text, begun = "", True
    if begun or text.strip():
        yield text, True


def parts_between_separators(file: Path, errors: str) -> Iterator[Part]:
    """The documents between lines that are `<|endoftext|>`, in parts. Line ends before and after a document
    do not belong to it."""
    text = ""
    begun = False  # whether an earlier part of the document in `text` has been given already
    for block in unix_lines(read_blocks(file, errors)):
        text += block
        if EOS_TEXT in text:
            *documents, text = between_separators(text)
            yield from last_parts(documents, begun)
            if documents:
                begun = False
        if len(text) >= PART_CHARS and (begun or text.strip()):
            part = without_last_line(text).rstrip("\n")
            text = text[len(part) :]
            yield part if begun else part.lstrip("\n"), False
            begun = True
    yield from last_parts(between_separators(text + "\n"), begun)


def without_last_line(text: str) -> str:
    """The text without its last line: that may turn out to be a separator when more is read. If the line is
    too long for a separator, the whole text."""
    last_line = text.rfind("\n", len(text) - SEPARATOR_CHARS) + 1
    return text[:last_line] if last_line else text


def last_parts(documents: list[str], begun: bool) -> Iterator[Part]:
    """The last part of each document, without line ends before and after the document. `begun` says that
    earlier parts of the first one have been given. Blank documents are left out."""
    for document in documents:
        if begun:
            yield document.rstrip("\n"), True
        elif document.strip():
            yield document.strip("\n"), True
        begun = False


def between_separators(text: str) -> list[str]:
    """The texts between lines that are `<|endoftext|>`, line ends included. The last item is the text after
    the last such line."""
    documents, start = [], 0
    for found in SEPARATOR.finditer(text):
        line = text.rfind("\n", 0, found.start()) + 1
        if not text[line : found.start()].strip():
            documents.append(text[start:line])
            start = found.end()
    return [*documents, text[start:]]


def is_separated(file: Path) -> bool:
    """Whether a text file has a line that holds `<|endoftext|>` and nothing else."""
    begun = ""  # the beginning of a line that continues in the next block
    for block in itertools.chain(unix_lines(read_blocks(file, "replace")), ["\n"]):
        text = begun + block
        if EOS_TEXT in text and len(between_separators(text)) > 1:
            return True
        begun = text[text.rfind("\n") + 1 :]
        if len(begun) >= SEPARATOR_CHARS:
            begun = "-"  # this line is too long for a separator; any text that is none will do
    return False


def warn_of_rows(file: Path) -> None:
    """Warn if the first line of a text is a JSON object: this is probably a .jsonl file with another name,
    and the model would learn its braces and quotes."""
    line = next(read_blocks(file, "replace")).partition("\n")[0]
    if line.startswith("{") and line.rstrip().endswith("}"):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(line)
            warn(
                f"{file} is read as plain text, and its first line is a JSON object; if each line is one, "
                "name it .jsonl"
            )


# ---- documents of a dataset that is streamed -----------------------------------------------------


class DocumentStream:
    """Documents of a Hugging Face dataset that is read row by row. Its position can be saved, and reading
    can continue there later.

    The first `skip` rows are held out for validation; after them, at most `limit` rows are read.
    """

    def __init__(self, dataset, text_field: str, skip: int = 0, limit: int | None = None):
        self.dataset, self.skip, self.limit = dataset, skip, limit
        self.texts = RowTexts(text_field, from_dataset=True)
        self.n_counted = 0  # rows looked at so far; later epochs do not count their blank rows again
        self.start = dataset.state_dict()
        self.seek(None)

    def seek(self, position: dict | None) -> None:
        """Go to a position that `position()` returned, or to the start (None)."""
        self.rows_read = position["rows_read"] if position else 0
        if self.rows_read > self.skip:
            self.texts.has_found_text = True
        self.dataset.load_state_dict(position["dataset"] if position else self.start)
        self.rows = (
            None  # opened by the first `take`, since an open iterator cannot be sent to a worker process
        )

    def position(self) -> dict:
        """How far the stream has been read, as plain values that a checkpoint can hold."""
        return {"rows_read": self.rows_read, "dataset": self.dataset.state_dict()}

    def is_at_limit(self) -> bool:
        return self.limit is not None and self.rows_read >= self.skip + self.limit

    def take(self, n: int, n_chars: float = math.inf) -> list[str]:
        """The next n documents; fewer if they reach `n_chars` characters before; an empty list at the end."""
        if self.rows is None:
            self.rows = read_rows(self.dataset)
        documents: list[str] = []
        while len(documents) < n and n_chars > 0 and not self.is_at_limit():
            row = next(self.rows, None)
            if row is None:
                self.texts.warn_of_rows_without_text()
                break
            self.rows_read += 1
            if self.rows_read <= self.skip:
                continue
            is_new = self.rows_read > self.n_counted
            self.n_counted = max(self.n_counted, self.rows_read)
            text = self.texts.text_of(row, f"row {self.rows_read}", counts=is_new)
            if self.texts.n_without_text in ROWS_TO_WARN_AT:
                self.texts.warn_of_rows_without_text()
            if text:
                documents.append(text)
                n_chars -= len(text)
        return documents

    def head(self, n: int, n_chars: float = math.inf) -> list[str]:
        """The first n documents, with the same limits as `take`. Afterwards the stream is at its start."""
        self.seek(None)
        documents = self.take(n, n_chars)
        self.seek(None)
        return documents
