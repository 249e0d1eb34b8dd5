"""Where documents come from: text files, .jsonl files, and Hugging Face datasets, held in memory or streamed."""

import codecs
import contextlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from support.files.find_files import find_files, kind_of, refuse_disguised
from support.messages import UserError, warn
from support.text.hub import open_dataset, read_rows
from support.text.validation_split import check_share, hold_out_rows
from tokenizer import EOS_TEXT

STREAM_VAL_DOCS = 200
SEPARATOR = re.compile(
    r"<\|endoftext\|>[^\S\n]*\n"
)  # found fast for its fixed beginning; what stands before it is looked at then
LINE_CHARS = 1000  # a separator with the blanks around it is shorter
PART_CHARS = 2**20  # characters of a long document that are held at once
MEMORY_PER_BYTE = 2  # at least: a file is held as bytes and as text, later as text and as token ids
TOLD = [10**n for n in range(10)]  # how many rows have been left out when a stream says so
LIST_OF_TEXTS = "name it .json and read it with data.source=hf, data.dataset=json"
FIELD_HINT = "set data.text_field (prepare.py: --text-field)"
SMALLER = (
    "give data.path a part of it, or stream it as .jsonl: --override data.source=hf --override "
    "data.dataset=json --override data.streaming=true"
)


@contextlib.contextmanager
def memory_for_text() -> Iterator[None]:
    """While text is read and encoded: memory that runs out is answered with what a user can do about it."""
    try:
        yield
    except MemoryError:
        from support.device import memory_total

        raise UserError(
            f"the text is too large for the {memory_total('cpu') / 2**20:,.0f} MB of memory that this "
            f"process may use; {SMALLER}"
        ) from None


def refuse_larger_than_memory(files: list[Path], path: str, key: str, advice: str = SMALLER) -> None:
    """Before anything is read: a process that takes more than there is gets killed by the system, without
    a word."""
    from support.device import memory_total

    size, has = sum(file.stat().st_size for file in files), memory_total("cpu")
    if size * MEMORY_PER_BYTE > has:
        raise UserError(
            f"{key}={path}: {size / 2**20:,.0f} MB of text need at least "
            f"{size * MEMORY_PER_BYTE / 2**20:,.0f} MB of memory, and there are "
            f"{has / 2**20:,.0f} MB; {advice}"
        )


def read_blocks(file: Path, errors: str) -> Iterator[str]:
    """The text of a UTF-8 file, about PART_CHARS at a time, line ends as \n. Raises UserError with the
    byte offset of what is no text."""
    offset, raw, decoder = 0, b"", codecs.getincrementaldecoder("utf-8")(errors)
    with open(file, "rb") as stream:
        while True:
            raw = stream.read(PART_CHARS)
            if offset == 0:
                refuse_disguised(file, raw)
            if b"\0" in raw and errors == "strict":
                raise UserError(
                    f"{file}: NUL byte at offset {offset + raw.index(0)}, so this looks like binary or "
                    "UTF-16, not UTF-8 text; "
                    "convert it, or read it as it is with --override data.errors=replace (prepare.py: "
                    "--errors replace)"
                )
            pending = len(decoder.getstate()[0])  # bytes of a character that the block before began
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}: byte {error.object[error.start]:#04x} at offset "
                    f"{offset - pending + error.start} is not UTF-8; "
                    "convert the file, or put U+FFFD in its place with --override data.errors=replace "
                    "(prepare.py: --errors replace)"
                ) from None
            yield text.removeprefix("\ufeff") if offset == 0 else text
            offset += len(raw)
            if not raw:
                return


def unix_lines(blocks: Iterable[str]) -> Iterator[str]:
    """The blocks with \r\n as \n, also where it lies across two of them."""
    held = ""
    for block in blocks:
        block = held + block
        held = "\r" if block.endswith("\r") else ""
        yield block[: len(block) - len(held)].replace("\r\n", "\n")
    yield held


def read_lines(file: Path, errors: str) -> Iterator[str]:
    """The lines of a UTF-8 file, line ends as \n. Raises UserError with the byte offset of what is no text."""
    begun = ""
    for block in unix_lines(read_blocks(file, errors)):
        *lines, begun = (begun + block).split("\n")
        yield from (line + "\n" for line in lines)
    if begun:
        yield begun


def is_separated(file: Path) -> bool:
    """Whether a text file has a line that is `<|endoftext|>` and nothing more."""
    begun = ""  # a line that goes on in the next block
    for block in itertools.chain(unix_lines(read_blocks(file, "replace")), ["\n"]):
        text = begun + block
        if EOS_TEXT in text and len(between_separators(text)) > 1:
            return True
        begun = text[text.rfind("\n") + 1 :]
        begun = begun if len(begun) < LINE_CHARS else "-"  # too long to be one, and it need not be held
    return False


def read_parts(file: Path, text_field: str = "text", errors: str = "strict") -> Iterator[tuple[str, bool]]:
    """The documents of one file, long ones in parts of about PART_CHARS: (text, whether its document ends
    with it). A document is a row of a .jsonl or .parquet file (of any spelling), else the text between
    lines that are `<|endoftext|>` and nothing more, else the whole file. Blank ones are left out."""
    if kind_of(file) in (".jsonl", ".parquet"):
        texts = RowTexts(text_field)
        for row, where in (
            parquet_rows(file, text_field) if kind_of(file) == ".parquet" else jsonl_rows(file, errors)
        ):
            if text := texts.text_of(row, where):
                yield text, True
        texts.warn_of_empty()
        return
    warn_of_rows(file)
    separated, text, begun = is_separated(file), "", False
    for block in unix_lines(read_blocks(file, errors)):
        text += block
        if separated and EOS_TEXT in text:
            *documents, text = between_separators(text)
            yield from ended(documents, begun)
            begun = begun and not documents
        if len(text) >= PART_CHARS and (begun or text.strip()):
            part = text
            if (
                separated
            ):  # line ends around a document are not its own, and its last line may yet become a separator
                part = text[: text.rfind("\n", len(text) - LINE_CHARS) + 1 or None].rstrip("\n")
            yield part if begun or not separated else part.lstrip("\n"), False
            text, begun = text[len(part) :], True
    if separated:
        yield from ended(between_separators(text + "\n"), begun)
    elif begun or text.strip():
        yield text, True


def warn_of_rows(file: Path) -> None:
    """A text whose first line is a JSON object is a .jsonl file by another name, most likely, and its
    markup would be learned."""
    line = next(read_blocks(file, "replace")).partition("\n")[0]
    if line.startswith("{") and line.rstrip().endswith("}"):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(line)
            warn(
                f"{file} is read as plain text, and its first line is a JSON object; if each line is one, "
                "name it .jsonl"
            )


def between_separators(text: str) -> list[str]:
    """The text between lines that are `<|endoftext|>`, with the line ends around it; last what follows the
    last of them."""
    documents, start = [], 0
    for found in SEPARATOR.finditer(text):
        line = text.rfind("\n", 0, found.start()) + 1
        if not text[line : found.start()].strip():
            documents.append(text[start:line])
            start = found.end()
    return [*documents, text[start:]]


def ended(documents: list[str], begun: bool) -> Iterator[tuple[str, bool]]:
    """Ends of documents, without the line ends around them; the first may be the end of one that has begun
    before."""
    for document in documents:
        if begun or document.strip():
            yield document.rstrip("\n") if begun else document.strip("\n"), True
        begun = False


def read_documents(file: Path, text_field: str = "text", errors: str = "strict") -> Iterator[str]:
    """The documents of one file, each whole."""
    parts: list[str] = []
    for part, ends in read_parts(file, text_field, errors):
        parts.append(part)
        if ends:
            yield "".join(parts)
            parts = []


def jsonl_rows(file: Path, errors: str) -> Iterator[tuple[dict, str]]:
    """(row, where it stands) of a .jsonl file."""
    for number, line in enumerate(read_lines(file, errors), 1):
        if line.strip():
            yield parse_json_row(line, f"{file}, line {number}"), f"{file}, line {number}"


def parquet_rows(file: Path, text_field: str) -> Iterator[tuple[dict, str]]:
    """The same of a .parquet file; of its columns only the text is read. Raises UserError for a damaged one."""
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise UserError(
                    f"{file} has no column {text_field!r} (columns: {', '.join(names)}); name the right one"
                )
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield {text_field: text}, f"{file}, row {number}"
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{file} is no parquet file that can be read ({' '.join(str(error).split())[:150]})"
        ) from None


def parse_json_row(
    line: str, where: str, example: str = '{"text": "..."}', of_list: str = LIST_OF_TEXTS
) -> dict:
    """The object that a line of a .jsonl file holds; `of_list` says what to do with a file that is one
    JSON list."""
    if line.lstrip().startswith("["):
        raise UserError(
            f"{where} is not a JSON object: a list begins there; {of_list}, or write a row a line, {example}"
        )
    try:
        row = json.loads(line)
    except (
        ValueError,
        RecursionError,
    ) as error:  # also a number of too many digits, lists in lists without end
        raise UserError(
            f"{where} is not JSON: {str(error)[:150]}; each line of a .jsonl file is a whole object, "
            f"{example}"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; write {example}")
    return row


def is_conversation(value: object) -> bool:
    """Whether a field holds the turns of a conversation: [{"role": "user", "content": "Hi"}, ...], or the
    like."""
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(
        isinstance(turn, dict) and {"role", "from", "content", "value"} & turn.keys() for turn in turns
    )


def row_text(
    row: dict, text_field: str, where: str, hint: str = FIELD_HINT, example: str = '{"text": "..."}'
) -> str:
    """Raises UserError for a row whose field is missing, or holds something else than text."""
    text = row.get(text_field)
    if not isinstance(text, str):
        turns = next((name for name, value in row.items() if is_conversation(value)), None)
        if turns is not None:
            raise UserError(
                f"{where} is a conversation (its turns are in {turns!r}), and conversations are not read; "
                f"write rows like {example}"
            )
        held = f", it holds {json.dumps(text, default=str)[:60]}" if text_field in row else ""
        remedy = f"remove the row, or {hint}" if text_field in row else hint
        raise UserError(
            f"{where} has no text in field {text_field!r} (fields: {', '.join(row)}){held}; {remedy}"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} holds half a character ({text[error.start]!r}), which is no text; remove it"
            ) from None
    return text


class RowTexts:
    """The texts of rows, one field of each. A row without text (null or blank) is left out, and counted in a
    warning.

    Of a file, a row that holds something else than text is an error, before anything is trained. A stream
    (`lasting`) is read while training, and an error there would end the run, and each resume of it at the
    same row: it leaves such a row out too, once it has found a text, so that a wrong field is noticed.
    """

    def __init__(self, text_field: str, lasting: bool = False):
        self.text_field, self.lasting, self.found = text_field, lasting, False
        self.n_empty, self.first, self.n_said = 0, "", 0

    def text_of(self, row: dict, where: str, counts: bool = True) -> str:
        """An empty text for a row that is left out; `counts` is false for one that has been counted before."""
        text, why = "", f"{where} has no text"
        try:
            if self.text_field not in row or row[self.text_field] is not None:
                text = row_text(row, self.text_field, where)
        except UserError as error:
            if not (self.lasting and self.found):
                raise
            why = str(error).partition(";")[0]
        text = text if text.strip() or self.lasting else ""
        self.found = self.found or bool(text)
        if not text and counts:
            self.n_empty += 1
            self.first = self.first or why
        return text

    def warn_of_empty(self) -> None:
        """Once for each number of rows, whoever asks."""
        if self.n_empty > self.n_said:
            warn(
                f"{self.n_empty:,} row{'s' * (self.n_empty > 1)} without text left out; the first: "
                f"{self.first}"
            )
        self.n_said = self.n_empty


class DocumentStream:
    """Documents of an iterable Hugging Face dataset, with a position that can be saved and sought.

    The first `skip` rows belong to validation; at most `limit` rows follow.
    """

    def __init__(self, dataset, text_field: str, skip: int = 0, limit: int | None = None):
        self.dataset, self.skip, self.limit = dataset, skip, limit
        self.texts, self.n_looked_at = RowTexts(text_field, lasting=True), 0
        self.start = dataset.state_dict()
        self.seek(None)

    def seek(self, position: dict | None) -> None:
        """Go on reading from a `position()`, or (None) from the start."""
        self.rows_read = position["rows_read"] if position else 0
        self.texts.found |= self.rows_read > self.skip
        self.dataset.load_state_dict(position["dataset"] if position else self.start)
        self.rows = None  # opened by the first take: an open iterator could not travel to a worker process

    def position(self) -> dict:
        """Where reading stands, as plain values."""
        return {"rows_read": self.rows_read, "dataset": self.dataset.state_dict()}

    def take(self, n: int, n_chars: float = math.inf) -> list[str]:
        """The next n documents, or fewer where these hold `n_chars` characters; at last none, at the end."""
        self.rows = read_rows(self.dataset) if self.rows is None else self.rows
        documents: list[str] = []
        while (
            len(documents) < n
            and n_chars > 0
            and (self.limit is None or self.rows_read < self.skip + self.limit)
        ):
            row = next(self.rows, None)
            if row is None:
                self.texts.warn_of_empty()
                break
            self.rows_read += 1
            if self.rows_read <= self.skip:
                continue
            text = self.texts.text_of(row, f"row {self.rows_read}", counts=self.rows_read > self.n_looked_at)
            self.n_looked_at = max(self.n_looked_at, self.rows_read)
            if self.texts.n_empty in TOLD:
                self.texts.warn_of_empty()
            if text:
                documents.append(text)
                n_chars -= len(text)
        return documents

    def head(self, n: int, n_chars: float = math.inf) -> list[str]:
        """The first n documents, as by `take`, wherever reading stands; reading then stands at the start."""
        self.seek(None)
        documents = self.take(n, n_chars)
        self.seek(None)
        return documents


def text_documents(path: str, data: Any, key: str = "data.path") -> list[str]:
    """The documents under `path` that hold any text; `key` names it in errors. Raises UserError if there
    is none."""
    files = find_files(path, key)
    refuse_larger_than_memory(files, path, key)
    documents = [d for file in files for d in read_documents(file, data.text_field, data.errors) if d.strip()]
    if not documents:
        raise UserError(
            f"{path} holds no text ({len(files)} file{'s' * (len(files) > 1)}, "
            f"{sum(f.stat().st_size for f in files)} bytes); give a file with some"
        )
    return documents


def hf_documents(data: Any, seed: int) -> tuple[list[str] | DocumentStream, list[str] | None]:
    """(training documents, validation documents or None if they are still to be cut off). Raises UserError."""

    def rows_of(split: str):
        return open_dataset(data.dataset, data.config, split, data.path, data.revision, data.streaming)

    def texts(rows: Iterable[dict], limit: int | None = None) -> list[str]:
        """A text for each row; "" for one that has none."""
        found = RowTexts(data.text_field, lasting=True)
        numbered = zip(range(2**63 if limit is None else limit), read_rows(rows), strict=False)
        documents = [found.text_of(row, f"row {i + 1}") for i, row in numbered]
        found.warn_of_empty()
        return documents

    val = [text for text in texts(rows_of(data.val_split), data.val_docs) if text] if data.val_split else None
    rows = rows_of(data.split)
    if data.streaming:
        skip = 0 if val else data.val_docs or STREAM_VAL_DOCS
        own_val = bool(val)
        val = val or [text for text in texts(rows_of(data.split), skip) if text]
        train = DocumentStream(rows, data.text_field, skip, data.train_docs)
        found = bool(train.head(1))
        if found and not (own_val or data.train_docs):
            check_stream(train, val)
    else:
        if val is None and data.val_docs:
            train, val = hold_out_docs(texts, rows, data, seed)
        else:
            train = [text for text in texts(rows, data.train_docs) if text]
        found = bool(train)
    if not found:
        raise UserError(
            f"data.dataset={data.dataset}: no document is left to train on in split {data.split}; check "
            "data.val_docs and the split"
        )
    return train, val


def hold_out_docs(texts: Callable, rows, data: Any, seed: int) -> tuple[list[str], list[str]]:
    """`val_docs` rows of a dataset in memory, drawn by `seed`, and the others, or the first `train_docs`
    of them. Other rows are not read."""
    order = np.random.default_rng(seed).permutation(len(rows))
    pool = np.sort(
        np.concatenate([order[: data.val_docs], np.sort(order[data.val_docs :])[: data.train_docs]])
    )
    documents = texts(rows.select(pool))
    drawn = np.searchsorted(pool, order[np.isin(order, pool)])
    held = hold_out_rows([len(text) for text in documents], drawn, min(data.val_docs, len(documents)))
    val = [text for i, text in enumerate(documents) if i in held and text]
    train = [text for i, text in enumerate(documents) if i not in held and text][: data.train_docs]
    if train:
        check_share(
            sum(map(len, val)),
            sum(map(len, train + val)),
            data.val_docs / len(pool),
            "characters",
            "set data.val_docs",
        )
    return train, val


def check_stream(train: DocumentStream, val: list[str]) -> None:
    """Warn where a stream has little more text than its beginning, which is held out. No more of it is
    read than that takes."""
    n_val = sum(map(len, val))
    n_train = sum(map(len, train.head(2**63, 2 * n_val)))
    if n_train < 2 * n_val:
        warn(
            f"the first {train.skip:,} rows of the stream are held out for validation ({n_val:,} "
            f"characters), and {n_train:,} characters are left "
            "to train on; lower data.val_docs, or read the data set into memory with data.streaming=false"
        )
