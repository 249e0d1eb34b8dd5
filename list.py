"""Show checkpoints: step, epoch, tokens, losses, size.

python3 list.py                        # those under checkpoints/
python3 list.py runs/a 'old/*.ckpt'    # folders and quoted globs
python3 list.py --json                 # one JSON object a line
"""

import argparse
import glob
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from support.cli import UserError, guarded, make_parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "paths", nargs="*", default=["checkpoints"], metavar="PATH", help="checkpoint files, folders (searched at any depth) or quoted globs"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(parse_args, sys.argv[1:])  # --help and wrong flags answer before torch is imported

from support.checkpoint import KEY, empty_model, printable, read_checkpoint


def find_checkpoints(paths: list[str]) -> list[Path]:
    """Every .ckpt the paths name. Raises UserError for a path that names none."""
    found: list[Path] = []
    for path in paths:
        if os.path.isdir(path):
            here = list(Path(path).rglob("*.ckpt"))
        else:
            here = [Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)] or [Path(path)] * os.path.isfile(path)
        if not here:
            raise UserError(f"{path}: no checkpoint (.ckpt) there; python3 train.py --config config_smoke.yaml makes some")
        found += here
    return sorted(set(found))


def describe(path: Path) -> dict[str, Any]:
    """One row: what the file says about itself. A damaged file is a row with an `error`."""
    row: dict[str, Any] = {"file": str(path), "size_mb": 0.0, "age_s": 0}
    try:
        status = path.stat()
        row |= {"size_mb": round(status.st_size / 2**20, 1), "age_s": max(0, round(time.time() - status.st_mtime))}
        checkpoint = read_checkpoint(path)
        metadata, model = checkpoint[KEY], empty_model(checkpoint, str(path))
        return (
            row
            | {key: metadata["metrics"].get(key) for key in ("step", "epoch", "tokens", "train_loss", "val_loss", "best_val_loss")}
            | {"n_params": model.n_params(), "tokenizer": str(metadata["tokenizer"]["kind"]), "vocab_size": model.config.vocab_size}
        )
    except UserError as error:
        return row | {"error": printable(error)}
    except OSError as error:  # a link to nothing, a file that has just been removed
        return row | {"error": f"cannot be read ({error.strerror})"}
    except KeyError as error:
        return row | {"error": f"damaged metadata: {error!r}"}


def age(seconds: float) -> str:
    """90 is `1m`, 7200 is `2h`."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("file", "step", "epoch", "tokens", "train loss", "val loss", "params", "tokenizer", "MB", "age"):
        table.add_column(
            name, justify="left" if name in ("file", "tokenizer") else "right", no_wrap=True, overflow="ignore" if name == "file" else "ellipsis"
        )

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        common = [f"{row['size_mb']:.1f}", age(row["age_s"])]
        if "error" in row:
            table.add_row(printable(row["file"]), *["-"] * 7, *common)
            continue
        table.add_row(
            printable(row["file"]),
            number(row["step"], ""),
            number(row["epoch"], ".2f"),
            number(row["tokens"], ","),
            number(row["train_loss"], ".4f"),
            number(row["val_loss"], ".4f"),
            number(row["n_params"], ","),
            printable(f"{row['tokenizer'][:20]} {row['vocab_size']}"),
            *common,
        )
    # Wide, so that no name is ever cut: a narrow terminal folds the line itself. Names are shown as they are, brackets too.
    console = Console(width=10_000, height=100, highlight=False, markup=False, emoji=False)
    console.print(table)
    for row in rows:
        if "error" in row:
            print(f"{printable(row['file'])}: {row['error']}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    rows = sorted(map(describe, find_checkpoints(args.paths)), key=lambda row: (-1 if row.get("step") is None else row["step"], row["file"]))
    if args.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
