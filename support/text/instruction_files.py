"""Files and datasets of instructions: rows, whatever their format."""

import glob
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.files.find_files import find_files, kind_of
from support.messages import UserError, printable
from support.text.documents import is_conversation, parse_json_row, read_lines, refuse_larger_than_memory
from support.text.hub import open_dataset, read_rows

KINDS = (".json", ".jsonl", ".parquet")
INSTEAD = (
    "fine-tune on rows of your own:\n       python3 finetune.py --config configs/finetune_tiny.yaml "
    "--override data.path=my_rows.json "
)
INSTEAD += "--override training.warmup_steps=0"
EXAMPLE = '{"instruction": "...", "input": "...", "output": "..."}'


# ---- reading -------------------------------------------------------------------------------------


def read_json_rows(path: Path) -> Iterator[dict]:
    """The rows of a .json file: a list of objects."""
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise UserError(
            f"{path} is not JSON: {str(error)[:150]}; if it has a row a line, name it .jsonl"
        ) from None
    if isinstance(rows, dict):
        raise UserError(
            f"{path} is one object, and should be a list of rows, [{EXAMPLE}, ...]; {how_to_list(rows, path)}"
        )
    if not isinstance(rows, list):
        raise UserError(f"{path} should be a list of rows, [{EXAMPLE}, ...]")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, row {number} is {json.dumps(row)[:60]}, not an object with instruction and output"
            )
        yield row


def how_to_list(tree: dict, path: Path) -> str:
    """What to do with a .json file that is one object: take out the list of rows that is in it, or put it
    into one."""
    key = next(
        (
            key
            for key, value in tree.items()
            if isinstance(value, list) and value and isinstance(value[0], dict)
        ),
        None,
    )
    if key is None or is_conversation(tree[key]):
        return "put it in square brackets"
    take_out = (
        f"import json, sys; json.dump(json.load(open(sys.argv[1], encoding='utf-8'))[{key!r}], "
        "open('rows.json', 'w'))"
    )
    return (
        f"its rows are in {printable(key)!r}:\n       {shlex.join(['python3', '-c', take_out, str(path)])} "
        "writes them to rows.json"
    )


def read_parquet_rows(path: Path) -> Iterator[dict]:
    try:
        yield from read_rows(open_dataset("parquet", None, "train", glob.escape(str(path)), None, False))
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_files(path: str, key: str, errors: str = "strict") -> Iterator[tuple[dict, str]]:
    """(row, where it stands) of local files: one, those of a folder, or those of a glob. Raises UserError."""
    files = find_files(path, key, KINDS, strict=True)
    refuse_larger_than_memory(files, path, key, "give a part of it")
    for file in files:
        if kind_of(file) == ".jsonl":
            for number, line in enumerate(read_lines(file, errors), 1):
                if line.strip():
                    yield (
                        parse_json_row(line, f"{file}, line {number}", EXAMPLE, "name it .json"),
                        f"{file}, line {number}",
                    )
            continue
        for number, row in enumerate(
            read_json_rows(file) if kind_of(file) == ".json" else read_parquet_rows(file), 1
        ):
            yield row, f"{file}, row {number}"


def read_hub(data: Any, split: str) -> Iterator[tuple[dict, str]]:
    rows = open_dataset(data.dataset, data.config, split, None, data.revision, False, instead=INSTEAD)
    for number, row in enumerate(read_rows(rows), 1):
        yield row, f"{data.dataset}, row {number} of {split}"
