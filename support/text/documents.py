"""How files and datasets become documents: text files, .jsonl and .parquet files, and datasets that are
streamed.

a .jsonl or .parquet file                         a document a row
a file with lines that are `<|endoftext|>`        the text between those lines
any other file                                    one document
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

# It begins with fixed text, which is found fast; what comes before it on its line is looked at afterwards.
SEPARATOR = re.compile(r"<\|endoftext\|>[^\S\n]*\n")
SEPARATOR_CHARS = 1000  # a separator with the blanks around it is shorter
ROWS_TO_WARN_AT = [10**n for n in range(10)]  # a stream warns each time as many rows have been left out
Part = tuple[str, bool]  # a part of a document, and whether the document ends with it


# ---- documents of files --------------------------------------------------------------------------


def text_documents(path: str, data: Any, key: str = "data.path") -> list[str]:
    """All documents of the files under `path` that hold any text; `key` names it in errors. Raises UserError
    if there is none."""
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
    """The documents of one file, long ones in parts of about PART_CHARS. Blank documents are left out."""
    if kind_of(file) in (".jsonl", ".parquet"):
        yield from parts_of_rows(file, text_field, errors)
        return
    warn_of_rows(file)
    if is_separated(file):
        yield from parts_between_separators(file, errors)
    else:
        yield from parts_of_one_document(file, errors)


def parts_of_rows(file: Path, text_field: str, errors: str) -> Iterator[Part]:
    texts = RowTexts(text_field)
    rows = parquet_rows(file, text_field) if kind_of(file) == ".parquet" else jsonl_rows(file, errors)
    for row, where in rows:
        text = texts.text_of(row, where)
        if text:
            yield text, True
    texts.warn_of_rows_without_text()


def parts_of_one_document(file: Path, errors: str) -> Iterator[Part]:
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
    """The text between lines that are `<|endoftext|>`. Line ends around a document do not belong to it."""
    text = ""
    begun = False  # whether a part of the document that `text` continues has been given already
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
    """The text without its last line, which may yet become a separator; all of it if that line is too long to
    be one."""
    last_line = text.rfind("\n", len(text) - SEPARATOR_CHARS) + 1
    return text[:last_line] if last_line else text


def last_parts(documents: list[str], begun: bool) -> Iterator[Part]:
    """The ends of documents, without the line ends around them. The first may continue a document that has
    `begun` before; a blank document is left out."""
    for document in documents:
        if begun:
            yield document.rstrip("\n"), True
        elif document.strip():
            yield document.strip("\n"), True
        begun = False


def between_separators(text: str) -> list[str]:
    """The texts between lines that are `<|endoftext|>`, line ends included; the last one is what follows the
    last of those lines."""
    documents, start = [], 0
    for found in SEPARATOR.finditer(text):
        line = text.rfind("\n", 0, found.start()) + 1
        if not text[line : found.start()].strip():
            documents.append(text[start:line])
            start = found.end()
    return [*documents, text[start:]]


def is_separated(file: Path) -> bool:
    """Whether a text file has a line that is `<|endoftext|>` and nothing more."""
    begun = ""  # a line that continues in the next block
    for block in itertools.chain(unix_lines(read_blocks(file, "replace")), ["\n"]):
        text = begun + block
        if EOS_TEXT in text and len(between_separators(text)) > 1:
            return True
        begun = text[text.rfind("\n") + 1 :]
        if len(begun) >= SEPARATOR_CHARS:
            begun = "-"  # too long to be a separator: it need not be held
    return False


def warn_of_rows(file: Path) -> None:
    """Warn of a text whose first line is a JSON object: it is probably a .jsonl file with another name, and
    its markup would be learned."""
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
    """Documents of an iterable Hugging Face dataset, with a position that can be saved and returned to.

    The first `skip` rows are held out for validation; at most `limit` rows follow.
    """

    def __init__(self, dataset, text_field: str, skip: int = 0, limit: int | None = None):
        self.dataset, self.skip, self.limit = dataset, skip, limit
        self.texts = RowTexts(text_field, from_dataset=True)
        self.n_counted = 0  # rows that have been looked at once; later epochs do not count them again
        self.start = dataset.state_dict()
        self.seek(None)

    def seek(self, position: dict | None) -> None:
        """Continue to read from a `position()`, or (None) from the start."""
        self.rows_read = position["rows_read"] if position else 0
        if self.rows_read > self.skip:
            self.texts.has_found_text = True
        self.dataset.load_state_dict(position["dataset"] if position else self.start)
        self.rows = None  # opened by the first take: an open iterator could not travel to a worker process

    def position(self) -> dict:
        """How far reading has come, as plain values."""
        return {"rows_read": self.rows_read, "dataset": self.dataset.state_dict()}

    def is_at_limit(self) -> bool:
        return self.limit is not None and self.rows_read >= self.skip + self.limit

    def take(self, n: int, n_chars: float = math.inf) -> list[str]:
        """The next n documents, or fewer if these hold `n_chars` characters; an empty list at the end."""
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
        """The first n documents, as by `take`. Reading is at the start afterwards."""
        self.seek(None)
        documents = self.take(n, n_chars)
        self.seek(None)
        return documents
