"""Reads rows of .jsonl and .parquet files, and the text of a document from one field of each row."""

import json
from collections.abc import Iterator
from pathlib import Path

from support.messages import UserError, warn
from support.text.read_text import read_lines

LIST_OF_TEXTS_HINT = "name it .json and read it with data.source=hf, data.dataset=json"
FIELD_HINT = "set data.text_field (prepare.py: --text-field)"
TEXT_EXAMPLE = '{"text": "..."}'


# ---- reading -------------------------------------------------------------------------------------


def jsonl_rows(
    file: Path, errors: str, example: str = TEXT_EXAMPLE, list_hint: str = LIST_OF_TEXTS_HINT
) -> Iterator[tuple[dict, str]]:
    """Pairs (row, where it is) from a .jsonl file, which has a JSON object in each line. Raises UserError."""
    for number, line in enumerate(read_lines(file, errors), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield parse_json_row(line, where, example, list_hint), where


def parquet_rows(file: Path, text_field: str) -> Iterator[tuple[dict, str]]:
    """Pairs (row, where it is) from a .parquet file; only the column with the text is read. Raises UserError
    if the file is damaged or has no such column."""
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
            f"{file} cannot be read as a parquet file ({' '.join(str(error).split())[:150]})"
        ) from None


def parse_json_row(line: str, where: str, example: str, list_hint: str) -> dict:
    """The object in one line of a .jsonl file. Raises UserError; `list_hint` says what to do if the file is
    one JSON list."""
    if line.lstrip().startswith("["):
        raise UserError(
            f"{where} is not a JSON object: a list begins there; {list_hint}, or write a row a line, "
            f"{example}"
        )
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON, too many digits, or lists nested too deep
        raise UserError(
            f"{where} is not JSON: {str(error)[:150]}; each line of a .jsonl file is a whole object, "
            f"{example}"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; write {example}")
    return row


# ---- the text of a row ---------------------------------------------------------------------------


def is_conversation(value: object) -> bool:
    """Whether a field holds the turns of a conversation: [{"role": "user", "content": "Hi"}, ...]."""
    if not isinstance(value, list) or not value:
        return False
    names = {"role", "from", "content", "value"}
    return all(isinstance(turn, dict) and names & turn.keys() for turn in value)


def row_text(
    row: dict, text_field: str, where: str, hint: str = FIELD_HINT, example: str = TEXT_EXAMPLE
) -> str:
    """The text of a row. Raises UserError if the field is missing, or if it holds no valid text."""
    text = row.get(text_field)
    if not isinstance(text, str):
        raise no_text_error(row, text_field, where, hint, example)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} holds half a character ({text[error.start]!r}), which is not valid text; remove it"
            ) from None
    return text


def no_text_error(row: dict, text_field: str, where: str, hint: str, example: str) -> UserError:
    """The error for a row whose `text_field` is missing, or is not a text."""
    for name, value in row.items():
        if is_conversation(value):
            return UserError(
                f"{where} is a conversation (its turns are in {name!r}), and conversations are not read; "
                f"write rows like {example}"
            )
    missing = f"{where} has no text in field {text_field!r} (fields: {', '.join(row)})"
    if text_field not in row:
        return UserError(f"{missing}; {hint}")
    held = json.dumps(row[text_field], default=str)[:60]
    return UserError(f"{missing}, it holds {held}; remove the row, or {hint}")


class RowTexts:
    """Gives the text of each row, and counts the rows without text (null or blank), which are left out.

    In a file, a row with something other than text is an error, which is found before the training starts. A
    dataset (`from_dataset`) may be read during training: there, an error would end the run, and end it again
    at the same row after each resume. So such a row of a dataset is left out too. But until a first text has
    been found, it is an error, so that a wrong field name is noticed.
    """

    def __init__(self, text_field: str, from_dataset: bool = False):
        self.text_field, self.from_dataset = text_field, from_dataset
        self.has_found_text = False
        self.n_without_text = 0
        self.first_without_text = ""
        self.n_warned_of = 0

    def text_of(self, row: dict, where: str, counts: bool = True) -> str:
        """The text of a row, or "" if the row is left out. `counts` is False for a row that was seen before,
        in an earlier epoch."""
        text, reason = "", f"{where} has no text"
        is_null = self.text_field in row and row[self.text_field] is None
        if not is_null:
            try:
                text = row_text(row, self.text_field, where)
            except UserError as error:
                if not (self.from_dataset and self.has_found_text):
                    raise
                reason = str(error).partition(";")[0]
        if not self.from_dataset and not text.strip():
            text = ""
        if text:
            self.has_found_text = True
        elif counts:
            self.n_without_text += 1
            self.first_without_text = self.first_without_text or reason
        return text

    def warn_of_rows_without_text(self) -> None:
        """Warn of the rows left out, unless the last warning gave the same number."""
        n = self.n_without_text
        if n > self.n_warned_of:
            rows = "row" if n == 1 else "rows"
            warn(f"{n:,} {rows} without text left out; the first: {self.first_without_text}")
        self.n_warned_of = n
