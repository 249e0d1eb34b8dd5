"""Text, once and for all, into what training reads fastest: a tokenizer of its own, and files of token ids of
any size.

python3 prepare.py tokenizer --input 'books/*.txt' --vocab-size 8192 --output tokens/tokenizer.json
python3 prepare.py tokens --input 'books/*.txt' --tokenizer tokens/tokenizer.json --output tokens/
python3 prepare.py tokens --dataset roneneldan/TinyStories --tokenizer gpt2 --output tokens/ts --num-proc 8
python3 train.py --config config.yaml --override data.source=tokens --override data.path=tokens/

Killed or stopped, the same command goes on where it was. docs/DATA.md tells what is in the files.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from support.cli import byte_progress, file_path, guarded, make_parser
from support.messages import UserError, printable, warn


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="tokenizer|tokens")
    for task, text in (
        ("tokenizer", "train a tokenizer on a text and write its tokenizer.json"),
        ("tokens", "turn a text into token files"),
    ):
        part = tasks.add_parser(task, help=text, description=text, allow_abbrev=False)
        source = part.add_mutually_exclusive_group(required=True)
        source.add_argument(
            "--input",
            nargs="+",
            type=file_path,
            metavar="PATH",
            help=".txt, .jsonl or .parquet files, folders, or quoted globs",
        )
        source.add_argument("--dataset", metavar="NAME", help="a dataset of the Hugging Face hub, streamed")
        part.add_argument(
            "--dataset-config", metavar="NAME", help="the dataset's configuration, e.g. 20231101.en"
        )
        part.add_argument("--split", default="train", help="the dataset's split (default train)")
        part.add_argument(
            "--revision", metavar="COMMIT", help="a commit of the dataset, so that it cannot change under you"
        )
        part.add_argument(
            "--text-field",
            default="text",
            metavar="NAME",
            help="the field of .jsonl, .parquet or dataset that holds the text",
        )
        part.add_argument(
            "--errors",
            choices=("strict", "replace"),
            default="strict",
            help="bytes that are not UTF-8: stop, or read as U+FFFD",
        )
        part.add_argument(
            "--output",
            type=file_path,
            metavar="PATH",
            required=True,
            help="the tokenizer.json, or the folder, to write",
        )
        if task == "tokenizer":
            part.add_argument(
                "--kind",
                choices=("bpe", "char"),
                default="bpe",
                help="byte-pair encoding (default), or a token for each character",
            )
            part.add_argument(
                "--vocab-size",
                type=int,
                default=8192,
                metavar="N",
                help="tokens of a bpe vocabulary (default 8192)",
            )
        else:
            add_token_flags(part)
    return parser.parse_args(argv)


def add_token_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=file_path,
        metavar="NAME",
        help="gpt2, byte, a tokenizer.json, or a checkpoint whose tokenizer to take",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="share of the documents held out (default: a tenth, or a million tokens if less)",
    )
    parser.add_argument(
        "--val-input", nargs="+", type=file_path, metavar="PATH", help="validation text of its own"
    )
    parser.add_argument("--val-split", metavar="NAME", help="the dataset's split to validate on")
    parser.add_argument(
        "--seed", type=int, default=42, help="draws the documents that are held out (default 42)"
    )
    parser.add_argument(
        "--num-proc", type=int, metavar="N", help="processes that encode (default: one a core)"
    )
    parser.add_argument(
        "--shard-chars",
        type=int,
        default=2**24,
        metavar="N",
        help="characters encoded at once: what a kill loses, and what memory holds",
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew, whatever lies in the folder")


if __name__ == "__main__":
    guarded(parse_args, sys.argv[1:])  # --help and wrong flags answer at once

from support.exchange.tokenizer_json import tokenizer_json
from support.files.atomic import atomic_write, claim_folder
from support.files.cut_text import cut_at_word, cut_pieces
from support.files.find_files import each_once, find_files
from support.text.make_token_files import (
    Source,
    changed,
    cut_shards,
    join_shards,
    longest_tokens,
    pieces_sha256,
    source_sha256,
    workers,
    write_shards,
)
from support.text.token_files import FORMAT_VERSION, described, read_meta
from tokenizer import (
    PIECE_CHARS,
    TRAIN_CHARS,
    BPETokenizer,
    CharTokenizer,
    FileTokenizer,
    Tokenizer,
    build_tokenizer,
    tokenizer_from_dict,
)

KINDS = (".txt", ".jsonl", ".parquet")


def source_of(args: argparse.Namespace, paths: list[str] | None, split: str, flag: str = "--input") -> Source:
    """The text that flags name. Raises UserError if there is none."""
    files = each_once(file for path in paths or [] for file in find_files(path, flag, KINDS))
    return Source(
        files, args.dataset, args.dataset_config, split, args.revision, args.text_field, args.errors
    )


# ---- a tokenizer ---------------------------------------------------------------------------------


def training_pieces(source: Source) -> Iterator[str]:
    """Text to train a bpe tokenizer on, at most TRAIN_CHARS: of files each second (third, ...) piece, of a
    stream its beginning."""
    pieces = (piece for part, _ in source.parts() for piece in cut_pieces(part, cut_at_word, PIECE_CHARS))
    if source.dataset is None:
        total = sum(
            file.stat().st_size for file in source.files
        )  # of packed files too little, and then more is read
        yield from islice(pieces, 0, None, max(1, math.ceil(total / TRAIN_CHARS)))
        return
    n_chars = 0
    for piece in pieces:
        yield piece
        n_chars += len(piece)
        if n_chars >= TRAIN_CHARS:
            return


def print_longest(texts: list[str]) -> None:
    print(f"longest tokens: {', '.join(repr(printable(text)) for text in texts)}")


def make_tokenizer(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name the file, e.g. {output / 'tokenizer.json'}")
    if output.exists():
        raise UserError(
            f"--output {output} is there already, and token files may depend on it; remove it, or name "
            "another"
        )
    if args.kind == "char" and args.dataset:
        raise UserError(
            "--kind char needs all of the text to collect its characters, and a stream is read in part; "
            "give files by --input"
        )
    source, began = source_of(args, args.input, args.split), time.monotonic()
    with byte_progress("reading", source.n_bytes) as advance:

        def counted(texts: Iterator[str]) -> Iterator[str]:
            for text in texts:
                advance(len(text.encode()))
                yield text

        if args.kind == "char":
            tokenizer: Tokenizer = CharTokenizer.train(counted(part for part, _ in source.parts()))
        else:
            tokenizer = BPETokenizer.train_on(counted(training_pieces(source)), args.vocab_size)
    if args.kind == "bpe" and tokenizer.vocab_size < args.vocab_size:
        warn(
            f"the text gives {tokenizer.vocab_size:,} tokens, not {args.vocab_size:,}: no pair is left to "
            "merge"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(tokenizer_json(tokenizer).encode())
    print(f"{output}: {described(tokenizer)}, in {time.monotonic() - began:.1f} s")
    print_longest([text for _, text in longest_tokens(range(tokenizer.vocab_size), tokenizer)])
    return 0


# ---- token files ---------------------------------------------------------------------------------


def read_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `--tokenizer` names. Raises UserError."""
    if name in ("gpt2", "byte"):
        return build_tokenizer(name, [])
    if name.endswith(".ckpt"):
        from support.checkpoint import read_metadata  # this needs torch

        return tokenizer_from_dict(read_metadata(name)["tokenizer"])
    if not os.path.exists(name):
        raise UserError(
            f"--tokenizer {name}: no such file; give gpt2, byte, a checkpoint, or a tokenizer.json "
            "(python3 prepare.py tokenizer makes one)"
        )
    return FileTokenizer.from_file(name)


def plan_of(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the ids that are written, in words; the text itself is compared by its sha256."""
    return {
        "--tokenizer": f"{described(tokenizer)}, sha256 {tokenizer.fingerprint()[:16]}",
        "--dataset": args.dataset,
        "--dataset-config": args.dataset_config,
        "--split": args.split if args.dataset else None,
        "--revision": args.revision,
        "--text-field": args.text_field,
        "--errors": args.errors,
        "--val-split": args.val_split,
        "--val-input": bool(args.val_input),
        "--shard-chars": args.shard_chars,
        "--seed": args.seed,
        "--val-fraction": args.val_fraction,
    }


def refuse_other_plan(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError if what lies in the folder was made from something else."""
    if different := [key for key in now if now[key] != before.get(key)]:
        listed = "; ".join(f"{key} was {before.get(key)} and is now {now[key]}" for key in different[:3])
        raise UserError(
            f"{output} holds token files of another making: {listed}; name another --output, or begin anew "
            "by --fresh"
        )


def up_to_date(output: Path, plan: dict[str, Any], sources: dict[str, Source], tokenizer: Tokenizer) -> bool:
    """Whether the folder is finished, and from this very text. Raises UserError if it is finished and from
    another."""
    meta = read_meta(output)
    if meta is None:
        return False
    refuse_other_plan(output, meta["plan"], plan)
    if plan["--dataset"] is None:  # a dataset is known by its name and commit; files are read
        sums = (
            pieces_sha256(p)
            for source in sources.values()
            for p, _ in cut_shards(source.parts(), tokenizer, plan["--shard-chars"])
        )
        if source_sha256(sums) != meta["source_sha256"]:
            raise changed(output)
    return True


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that mean nothing, or nothing together."""
    if args.num_proc is not None and args.num_proc < 1:
        raise UserError(f"--num-proc {args.num_proc} must be at least 1")
    if args.shard_chars < 1:
        raise UserError(f"--shard-chars {args.shard_chars} must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must be at least 0")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UserError(f"--val-fraction {args.val_fraction} must be between 0 and 1")
    if args.val_fraction and (args.val_input or args.val_split):
        raise UserError(
            "--val-fraction holds documents out; --val-input and --val-split name others: leave one of "
            "them out"
        )
    if (args.val_split and args.input) or (args.val_input and args.dataset):
        raise UserError("--val-split goes with --dataset, --val-input with --input")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a file; name a folder")


def make_token_files(args: argparse.Namespace) -> int:
    check_flags(args)
    sources = {"train": source_of(args, args.input, args.split)}
    if args.val_input or args.val_split:
        sources["val"] = source_of(args, args.val_input, args.val_split, "--val-input")
    tokenizer, output, began = read_tokenizer(args.tokenizer), Path(args.output), time.monotonic()
    plan, folder, n_workers = (
        plan_of(args, tokenizer),
        output / ".shards",
        args.num_proc or os.cpu_count() or 1,
    )
    lock = claim_folder(output, "--output ")
    try:
        if args.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        elif up_to_date(output, plan, sources, tokenizer):
            print(f"{output} is up to date: nothing to do")
            return 0
        begin(folder, plan)
        sizes = [source.n_bytes for source in sources.values()]
        with (
            workers(n_workers, tokenizer) as pool,
            byte_progress("tokens", None if None in sizes else sum(sizes)) as advance,
        ):
            for name, source in sources.items():
                write_shards(folder, name, source, tokenizer, args.shard_chars, pool, n_workers, advance)
        meta = join_shards(folder, output, tokenizer, "val" in sources, args.val_fraction, args.seed)
        meta |= {
            "format_version": FORMAT_VERSION,
            "tokenizer": tokenizer.to_dict(),
            "tokenizer_sha256": tokenizer.fingerprint(),
            "source": {
                "input": args.input,
                "val_input": args.val_input,
                "files": sum(len(source.files) for source in sources.values()),
            },
            "plan": plan,
            "command": f"python3 {shlex.join(sys.argv)}",
        }
        with atomic_write(output / "meta.json") as file:
            file.write(json.dumps(meta, indent=1).encode())
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    report(meta, output, tokenizer, time.monotonic() - began, n_workers)
    return 0


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """The folder of the shards, with the plan they are made by. Raises UserError if it holds shards of
    another plan."""
    if (folder / "plan.json").exists():
        refuse_other_plan(folder.parent, json.loads((folder / "plan.json").read_text()), plan)
        print(f"going on: {len(list(folder.glob('*-*.json')))} shards are there", file=sys.stderr)
    folder.mkdir(exist_ok=True)
    with atomic_write(folder / "plan.json") as file:
        file.write(json.dumps(plan).encode())


def report(meta: dict[str, Any], output: Path, tokenizer: Tokenizer, seconds: float, n_workers: int) -> None:
    for name in ("train", "val"):
        part = meta[name]
        print(
            f"{output / name}.npy: {part['tokens']:,} tokens, {part['documents']:,} documents, "
            f"{meta['dtype']}"
        )
    print(
        f"tokenizer {described(tokenizer)}: {meta['bytes_per_token']:.2f} bytes a token, "
        f"{meta['tokens_in_use']:,} tokens in use, "
        f"{meta['unknown']:,} unknown"
    )
    print_longest([text for _, text, _ in meta["longest_tokens"]])
    main, worker = (
        resource.getrusage(who).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(
        f"{meta['bytes'] / 1e6:,.1f} MB of text in {seconds:.1f} s, {meta['bytes'] / 1e6 / seconds:.1f} "
        f"MB/s by {n_workers} processes; peak memory "
        f"{main:,.0f} MB, and {worker:,.0f} MB for each process at most"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return make_tokenizer(args) if args.task == "tokenizer" else make_token_files(args)
    except KeyboardInterrupt:
        if args.task == "tokens":
            with contextlib.suppress(BrokenPipeError):
                print(
                    "\nstopped; what has been encoded is kept, and the same command goes on", file=sys.stderr
                )
            sys.exit(130)
        raise


if __name__ == "__main__":
    sys.exit(guarded(main))
