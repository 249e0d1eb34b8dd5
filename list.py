"""Show checkpoints: step, epoch, tokens, losses, size.

python3 list.py                              # those under checkpoints/
python3 list.py runs/a 'old/*.ckpt'          # folders and quoted globs
python3 list.py --sort val_loss              # the best first
python3 list.py --json                       # one JSON object a line
python3 list.py --diff runs/a runs/b         # which config keys differ, of the newest checkpoint in each
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.cli import file_path, guarded, make_parser, print_wide
from support.messages import UserError, printable

TABLE_COLUMNS = {  # name in the JSON and for --sort: (heading, format of a value)
    "file": ("file", "{}"),
    "step": ("step", "{}"),
    "epoch": ("epoch", "{:.2f}"),
    "tokens": ("tokens", "{:,}"),
    "train_loss": ("train loss", "{:.4f}"),
    "val_loss": ("val loss", "{:.4f}"),
    "perplexity": ("perplexity", "{:,.1f}"),
    "n_params": ("params", "{:,}"),
    "tokenizer": ("tokenizer", "{}"),
    "config": ("config", "{}"),
    "size_mb": ("MB", "{:.1f}"),
    "age_s": ("age", "{}"),
    "names": ("also", "{}"),
}
LEFT_ALIGNED = ("file", "names", "tokenizer", "config")
METRICS = ("step", "epoch", "tokens", "train_loss", "val_loss", "perplexity", "best_val_loss")
FILES_FOR_PARALLEL_READING = 40  # fewer are read by one process
TOKENIZER_CHARS = 20  # of a tokenizer's kind in the table: a damaged file may hold a text of any length there


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "paths",
        nargs="*",
        default=["checkpoints"],
        type=file_path,
        metavar="PATH",
        help="checkpoint files, folders (searched at any depth) or quoted globs",
    )
    parser.add_argument(
        "--sort",
        default="step",
        choices=[*TABLE_COLUMNS],
        metavar="COLUMN",
        help=f"{', '.join(TABLE_COLUMNS)} (default step)",
    )
    parser.add_argument("--reverse", action="store_true", help="in the reverse order")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")
    output.add_argument(
        "--diff",
        action="store_true",
        help="show the config keys in which two checkpoints (or the newest of two folders) differ",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(parse_args)  # --help and wrong flags are answered before the slow imports below
    from list import main

    sys.exit(guarded(main))

from support.checkpoint import KEY, empty_model, read_checkpoint, read_metadata, saved_config
from support.config.values import flat_keys
from support.find_checkpoints import find_checkpoints, other_names


def config_hash(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits, the same for the same config: to see which runs share one."""
    content = json.dumps(config, sort_keys=True)  # sorted: the order of the keys means nothing
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def describe(path: Path) -> dict[str, Any]:
    """One row, {column: value}: what the file says about itself. A damaged file is a row with an `error`, so
    that it does not hide the others."""
    row: dict[str, Any] = {"file": str(path), "names": other_names(path), "size_mb": 0.0, "age_s": 0}
    try:
        status = path.stat()
        row["size_mb"] = round(status.st_size / 2**20, 1)
        row["age_s"] = max(0, round(time.time() - status.st_mtime))  # a clock may have been wrong
        return row | describe_contents(path)
    except UserError as error:
        return row | {"error": printable(error)}
    except OSError as error:  # a broken link, or a file that has just been removed
        return row | {"error": f"cannot be read ({error.strerror})"}
    except (KeyError, TypeError, ValueError) as error:  # a field is missing, or of another type
        return row | {"error": f"damaged metadata: {error!r}"}


def describe_contents(path: Path) -> dict[str, Any]:
    """The part of a row that needs the checkpoint to be opened. Raises UserError, KeyError, TypeError or
    ValueError if it is damaged."""
    checkpoint = read_checkpoint(path)
    model = empty_model(checkpoint, str(path))  # without memory for weights, so its size costs nothing
    metadata = checkpoint[KEY]
    config = metadata.get("config")
    metrics = {name: metadata["metrics"].get(name) for name in METRICS}
    return metrics | {
        "n_params": model.n_params(),
        "tokenizer": str(metadata["tokenizer"]["kind"]),
        "vocab_size": model.config.vocab_size,
        "config": config_hash(config) if isinstance(config, dict) else None,
    }


def describe_all(paths: list[Path]) -> list[dict[str, Any]]:
    """A row for each file. Reading one takes a few hundredths of a second of computing, so many files are
    divided among the cores."""
    # Only Linux forks: on other systems each new process would import torch again.
    if len(paths) < FILES_FOR_PARALLEL_READING or sys.platform != "linux":
        return [describe(path) for path in paths]
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(describe, paths, chunksize=8)


def age(seconds: float) -> str:
    """A time in its largest unit, rounded down: 90 seconds are `1m`, 7200 are `2h`."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def cell_text(row: dict[str, Any], name: str) -> str:
    """The text of one cell; `-` where the checkpoint does not say."""
    value = row.get(name)
    if name == "names":
        return printable(" ".join(value))
    if value is None:
        return "-"
    if name == "tokenizer":
        value = f"{value[:TOKENIZER_CHARS]} {row['vocab_size']}"
    if name == "age_s":
        value = age(value)
    _, value_format = TABLE_COLUMNS[name]
    return printable(value_format.format(value))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, and under it what is wrong with damaged files."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, (heading, _) in TABLE_COLUMNS.items():
        table.add_column(
            heading,
            justify="left" if name in LEFT_ALIGNED else "right",
            no_wrap=True,
            overflow="ignore" if name == "file" else "ellipsis",
        )
    for row in rows:
        table.add_row(*[cell_text(row, name) for name in TABLE_COLUMNS])
    print_wide(table)
    for row in rows:
        if "error" in row:
            print(f"{printable(row['file'])}: {row['error']}")


def newest(path: str) -> Path:
    """The checkpoint with the highest step of those that a file, folder or glob names."""

    def step(file: Path) -> int:
        return describe(file).get("step") or -1  # a damaged file has none, and comes last

    return max(find_checkpoints([path]), key=step)


def print_diff(paths: list[str]) -> None:
    """Print the keys in which the configs of two checkpoints differ, with both values. Raises UserError."""
    if len(paths) != 2:
        raise UserError(
            f"--diff compares two checkpoints or folders, and {len(paths)} are named; "
            "e.g. list.py --diff runs/a runs/b"
        )
    first, second = newest(paths[0]), newest(paths[1])
    before = flat_keys(saved_config(read_metadata(first), first))
    after = flat_keys(saved_config(read_metadata(second), second))
    print(f"{printable(first)} -> {printable(second)}")
    all_keys = dict.fromkeys([*before, *after])  # each once, in the order of the configs
    different = [key for key in all_keys if before.get(key) != after.get(key)]
    for key in different:
        old, new = json.dumps(before.get(key)), json.dumps(after.get(key))
        print(f"  {printable(key)}: {printable(old)} -> {printable(new)}")
    if not different:
        print("  the same config")


def sort_key(name: str) -> Callable[[dict[str, Any]], tuple]:
    """A key for sorting rows by the value `name`. Rows without it come last, and rows with the same
    value in the order of their file names; --reverse turns both around."""

    def key(row: dict[str, Any]) -> tuple:
        value = row.get(name)
        is_missing = value is None  # false sorts before true
        return is_missing, 0 if is_missing else value, row["file"]

    return key


def main(argv: list[str] | None = None) -> int:
    """The whole script as one call. Returns the exit status; raises UserError."""
    args = parse_args(argv)
    if args.diff:
        print_diff(args.paths)
        return 0
    rows = sorted(describe_all(find_checkpoints(args.paths)), key=sort_key(args.sort), reverse=args.reverse)
    if args.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(rows)
    return 0
