"""Reads files and datasets of instructions, in any of their formats. A row is a dict, such as
{"instruction": "...", "output": "..."}."""

import glob
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.files.find_files import find_files, kind_of
from support.messages import UserError, printable
from support.text.hub import open_dataset, read_rows
from support.text.read_text import refuse_larger_than_memory
from support.text.rows import is_conversation, jsonl_rows

KINDS = (".json", ".jsonl", ".parquet")
OWN_ROWS_INSTEAD = (
    "fine-tune on rows of your own:\n       python3 finetune.py --config configs/finetune_tiny.yaml "
    "--override data.path=my_rows.json --override training.warmup_steps=0"
)
ROW_EXAMPLE = '{"instruction": "...", "input": "...", "output": "..."}'


def read_files(path: str, key: str, errors: str = "strict") -> Iterator[tuple[dict, str]]:
    """Pairs (row, where it is) from local files: one file, all in a folder, or all that match a glob. Raises
    UserError."""
    files = find_files(path, key, KINDS, strict=True)
    refuse_larger_than_memory(files, path, key, "give a part of it")
    for file in files:
        if kind_of(file) == ".jsonl":
            yield from jsonl_rows(file, errors, example=ROW_EXAMPLE, list_hint="name it .json")
            continue
        rows = json_rows(file) if kind_of(file) == ".json" else parquet_rows(file)
        for number, row in enumerate(rows, 1):
            yield row, f"{file}, row {number}"


def read_hub(data: Any, split: str) -> Iterator[tuple[dict, str]]:
    """Pairs (row, where it is) from one split of the dataset that the config's `data` section names. Raises
    UserError."""
    dataset = open_dataset(
        data.dataset,
        data.config,
        split,
        path=None,
        revision=data.revision,
        streaming=False,
        instead=OWN_ROWS_INSTEAD,
    )
    for number, row in enumerate(read_rows(dataset), 1):
        yield row, f"{data.dataset}, row {number} of {split}"


def json_rows(path: Path) -> Iterator[dict]:
    """The rows of a .json file, which must be a list of objects. Raises UserError."""
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise UserError(
            f"{path} is not JSON: {str(error)[:150]}; if it has a row a line, name it .jsonl"
        ) from None
    if isinstance(rows, dict):
        raise UserError(
            f"{path} is one object, and should be a list of rows, [{ROW_EXAMPLE}, ...]; "
            f"{how_to_list(rows, path)}"
        )
    if not isinstance(rows, list):
        raise UserError(f"{path} should be a list of rows, [{ROW_EXAMPLE}, ...]")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, row {number} is {json.dumps(row)[:60]}, not an object with instruction and output"
            )
        yield row


def key_of_rows(tree: dict) -> str | None:
    """The first key whose value is a list of objects; None if there is none."""
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return key
    return None


def how_to_list(tree: dict, path: Path) -> str:
    """Advice on a .json file that is one object: how to write the list of rows inside it to a file, or, if
    it has no such list, how to make the object a list of one."""
    key = key_of_rows(tree)
    if key is None or is_conversation(tree[key]):
        return "put it in square brackets"
    program = (
        f"import json, sys; json.dump(json.load(open(sys.argv[1], encoding='utf-8'))[{key!r}], "
        "open('rows.json', 'w'))"
    )
    command = shlex.join(["python3", "-c", program, str(path)])
    return f"its rows are in {printable(key)!r}:\n       {command} writes them to rows.json"


def parquet_rows(path: Path) -> Iterator[dict]:
    """The rows of a .parquet file, with all columns. Raises UserError."""
    escaped = glob.escape(str(path))  # the library takes the name for a pattern
    try:
        yield from read_rows(
            open_dataset("parquet", None, "train", path=escaped, revision=None, streaming=False)
        )
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
