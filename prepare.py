"""Turn a text, once, into the files that training reads fastest: a tokenizer of its own, and files of token
ids. The text can be of any size.

python3 prepare.py tokenizer --input 'books/*.txt' --vocab-size 8192 --output tokens/tokenizer.json
python3 prepare.py tokens --input 'books/*.txt' --tokenizer tokens/tokenizer.json --output tokens/
python3 prepare.py tokens --dataset roneneldan/TinyStories --tokenizer gpt2 --output tokens/ts --num-proc 8
python3 train.py --config config.yaml --override data.source=tokens --override data.path=tokens/

If it is stopped or killed, the same command resumes where it was. docs/DATA.md says what is in the files.
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line; `task` is its first word, tokenizer or tokens."""
    parser = make_parser(__doc__)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="tokenizer|tokens")
    for task, text, add_own_flags in (
        ("tokenizer", "train a tokenizer on a text and write its tokenizer.json", add_tokenizer_flags),
        ("tokens", "turn a text into token files", add_token_flags),
    ):
        task_parser = tasks.add_parser(task, help=text, description=text, allow_abbrev=False)
        add_text_flags(task_parser)
        add_own_flags(task_parser)
    return parser.parse_args(argv)


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that both tasks share: which text to read, and where to write."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        type=file_path,
        metavar="PATH",
        help=".txt, .jsonl or .parquet files, folders, or quoted globs",
    )
    source.add_argument("--dataset", metavar="NAME", help="a dataset of the Hugging Face hub, streamed")
    parser.add_argument(
        "--dataset-config", metavar="NAME", help="the dataset's configuration, e.g. 20231101.en"
    )
    parser.add_argument("--split", default="train", help="the dataset's split (default train)")
    parser.add_argument(
        "--revision", metavar="COMMIT", help="a commit of the dataset, so that the data stays the same"
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field of .jsonl, .parquet or dataset that holds the text",
    )
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="at bytes that are not UTF-8: stop, or read them as U+FFFD",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        metavar="PATH",
        required=True,
        help="the tokenizer.json, or the folder, to write",
    )


def add_tokenizer_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the task tokenizer."""
    parser.add_argument(
        "--kind",
        choices=("bpe", "char"),
        default="bpe",
        help="byte-pair encoding (default), or a token for each character",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="tokens of a bpe vocabulary (default 8192)"
    )


def add_token_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the task tokens."""
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
        help="share of the text held out (default: a tenth, or a million tokens if that is less)",
    )
    parser.add_argument(
        "--val-input", nargs="+", type=file_path, metavar="PATH", help="validation text of its own"
    )
    parser.add_argument("--val-split", metavar="NAME", help="the dataset's split to validate on")
    parser.add_argument(
        "--seed", type=int, default=42, help="draws the documents that are held out (default 42)"
    )
    parser.add_argument(
        "--num-proc", type=int, metavar="N", help="processes that encode (default: one for each core)"
    )
    parser.add_argument(
        "--shard-chars",
        type=int,
        default=2**24,
        metavar="N",
        help="characters in a shard, which is encoded at once: that much text is in memory, and that much "
        "work is lost if the command is killed",
    )
    parser.add_argument("--fresh", action="store_true", help="start over, whatever is in the folder")


if __name__ == "__main__":
    guarded(parse_args)  # --help and wrong flags are answered before the slow imports below
    from prepare import main  # this file again, as a module

    sys.exit(guarded(main))

from support.exchange.tokenizer_json import tokenizer_json
from support.files.atomic import atomic_write, claim_folder
from support.files.cut_text import cut_at_word, cut_pieces
from support.files.find_files import each_once, find_files
from support.text.join_shards import join_shards, longest_tokens, source_sha256
from support.text.make_token_files import (
    Source,
    cut_shards,
    pieces_sha256,
    text_has_changed,
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

TEXT_ENDINGS = (".txt", ".jsonl", ".parquet")


def text_source(args: argparse.Namespace, paths: list[str] | None, split: str | None, flag: str) -> Source:
    """The text to read: the files that `paths` name, or this split of --dataset. `paths` is None with
    --dataset, and `split` has no use with files. Raises UserError for a path without text files; `flag` is
    the flag that gave the paths, for the message."""
    files = each_once(file for path in paths or [] for file in find_files(path, flag, TEXT_ENDINGS))
    return Source(
        files=files,
        dataset=args.dataset,
        config=args.dataset_config,
        split=split,
        revision=args.revision,
        text_field=args.text_field,
        errors=args.errors,
    )


# ---- a tokenizer ---------------------------------------------------------------------------------


def make_tokenizer(args: argparse.Namespace) -> int:
    """Train a tokenizer and write its tokenizer.json. Returns the exit status; raises UserError."""
    check_tokenizer_flags(args)
    began = time.monotonic()
    output = Path(args.output)
    tokenizer = train_tokenizer(args, text_source(args, args.input, args.split, "--input"))
    if args.kind == "bpe" and tokenizer.vocab_size < args.vocab_size:
        warn(
            f"the text gives {tokenizer.vocab_size:,} tokens, not {args.vocab_size:,}: "
            "no pair is left to merge"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(tokenizer_json(tokenizer).encode())
    print(f"{output}: {described(tokenizer)}, in {time.monotonic() - began:.1f} s")
    all_ids = range(tokenizer.vocab_size)
    print_longest([text for _, text in longest_tokens(all_ids, tokenizer)])
    return 0


def check_tokenizer_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that are wrong or do not go together."""
    output = Path(args.output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name the file, e.g. {output / 'tokenizer.json'}")
    if output.exists():
        raise UserError(
            f"--output {output} is there already, and token files may depend on it; "
            "remove it, or name another"
        )
    if args.kind == "char" and args.dataset:
        raise UserError(
            "--kind char needs all of the text to collect its characters, and a stream is read only in part; "
            "give files with --input"
        )


def train_tokenizer(args: argparse.Namespace, source: Source) -> Tokenizer:
    """A tokenizer of --kind for this text: of all its characters, or of byte pairs that are frequent in a
    sample of it. Shows a progress bar while the text is read."""
    with byte_progress("reading", source.n_bytes) as advance:

        def counted(texts: Iterator[str]) -> Iterator[str]:
            """The same texts; the progress bar advances as they are read."""
            for text in texts:
                advance(len(text.encode()))
                yield text

        if args.kind == "char":
            all_text = (part for part, _ in source.parts())
            return CharTokenizer.train(counted(all_text))
        return BPETokenizer.train_on(counted(training_pieces(source)), args.vocab_size)


def training_pieces(source: Source) -> Iterator[str]:
    """Text to train a bpe tokenizer on, about TRAIN_CHARS characters, which is enough to find the frequent
    words: from files it takes every n-th piece, from a stream the beginning."""
    pieces = (piece for part, _ in source.parts() for piece in cut_pieces(part, cut_at_word, PIECE_CHARS))
    if source.dataset is None:
        # Compressed files (.parquet) hold more text than their size says; then more than TRAIN_CHARS is read.
        n_bytes = sum(file.stat().st_size for file in source.files)
        every_nth = max(1, math.ceil(n_bytes / TRAIN_CHARS))
        yield from islice(pieces, 0, None, every_nth)  # pieces[::every_nth], without a list of all
        return
    n_chars = 0
    for piece in pieces:
        yield piece
        n_chars += len(piece)
        if n_chars >= TRAIN_CHARS:
            return


def print_longest(texts: list[str]) -> None:
    """Print the longest tokens: they show what a text is full of, such as a line of dashes."""
    print(f"longest tokens: {', '.join(repr(printable(text)) for text in texts)}")


# ---- token files ---------------------------------------------------------------------------------


def make_token_files(args: argparse.Namespace) -> int:
    """Write train.npy, val.npy and meta.json: encode the text in shards, then join these. Shards that an
    earlier, stopped run has finished are used again. Returns the exit status; raises UserError."""
    check_token_flags(args)
    sources = {"train": text_source(args, args.input, args.split, "--input")}
    if args.val_input or args.val_split:
        sources["val"] = text_source(args, args.val_input, args.val_split, "--val-input")
    tokenizer = read_tokenizer(args.tokenizer)
    began = time.monotonic()
    output = Path(args.output)
    shard_folder = output / ".shards"
    plan = token_plan(args, tokenizer)
    n_workers = args.num_proc or os.cpu_count() or 1
    lock = claim_folder(output, flag="--output ")
    try:
        if args.fresh:
            shutil.rmtree(shard_folder, ignore_errors=True)
        elif is_up_to_date(output, plan, sources, tokenizer):
            print(f"{output} is up to date: nothing to do")
            return 0
        open_shard_folder(shard_folder, plan)
        sizes = [source.n_bytes for source in sources.values()]
        n_bytes = None if None in sizes else sum(sizes)  # None: not known, so the bar shows no end
        with workers(n_workers, tokenizer) as pool, byte_progress("tokens", n_bytes) as advance:
            for name, source in sources.items():
                write_shards(
                    shard_folder,
                    name,
                    source,
                    tokenizer,
                    shard_chars=args.shard_chars,
                    pool=pool,
                    n_workers=n_workers,
                    advance=advance,
                )
        meta = join_shards(
            shard_folder,
            output,
            tokenizer,
            own_val="val" in sources,
            fraction=args.val_fraction,
            seed=args.seed,
        )
        meta |= origin_of_files(args, sources, tokenizer, plan)
        # Last: a folder without meta.json counts as not finished.
        with atomic_write(output / "meta.json") as file:
            file.write(json.dumps(meta, indent=1).encode())
        shutil.rmtree(shard_folder, ignore_errors=True)
    finally:
        lock.release()
    print_summary(meta, output, tokenizer, time.monotonic() - began, n_workers)
    return 0


def origin_of_files(
    args: argparse.Namespace, sources: dict[str, Source], tokenizer: Tokenizer, plan: dict[str, Any]
) -> dict[str, Any]:
    """The part of meta.json that says what the token files were made from, and how."""
    return {
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


def check_token_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that are wrong or do not go together."""
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
            "--val-fraction holds out a part of the text; --val-input and --val-split name another text: "
            "leave one of them out"
        )
    if (args.val_split and args.input) or (args.val_input and args.dataset):
        raise UserError("--val-split goes with --dataset, --val-input with --input")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a file; name a folder")


def read_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that --tokenizer names. Raises UserError."""
    if name in ("gpt2", "byte"):
        return build_tokenizer(name, documents=[])  # not trained, so it needs no text
    if name.endswith(".ckpt"):
        from support.checkpoint import read_metadata  # this needs torch

        return tokenizer_from_dict(read_metadata(name)["tokenizer"])
    if not os.path.exists(name):
        raise UserError(
            f"--tokenizer {name}: no such file; give gpt2, byte, a checkpoint, or a tokenizer.json "
            "(python3 prepare.py tokenizer makes one)"
        )
    return FileTokenizer.from_file(name)


def token_plan(args: argparse.Namespace, tokenizer: Tokenizer) -> dict[str, Any]:
    """The flags that must not change between two runs into one folder, {flag: value}. Most decide which ids
    are written; --shard-chars decides where shards end. Files are not listed: their text is compared by its
    sha256, so a file may be moved. plan.json holds the plan while shards are made, then meta.json does."""
    return {
        "--tokenizer": f"{described(tokenizer)}, sha256 {tokenizer.fingerprint()[:16]}",
        "--dataset": args.dataset,
        "--dataset-config": args.dataset_config,
        "--split": args.split if args.dataset else None,  # its default means nothing for files
        "--revision": args.revision,
        "--text-field": args.text_field,
        "--errors": args.errors,
        "--val-split": args.val_split,
        "--val-input": bool(args.val_input),  # only whether there is one
        "--shard-chars": args.shard_chars,
        "--seed": args.seed,
        "--val-fraction": args.val_fraction,
    }


def refuse_different_plan(output: Path, old_plan: dict[str, Any], new_plan: dict[str, Any]) -> None:
    """Raise UserError if the files in this folder were made with other flags than the ones given now."""
    different = [flag for flag in new_plan if new_plan[flag] != old_plan.get(flag)]
    if different:
        changes = "; ".join(
            f"{flag} was {old_plan.get(flag)} and is now {new_plan[flag]}" for flag in different[:3]
        )
        raise UserError(
            f"{output} holds token files that were made differently: {changes}; "
            "name another --output, or start over with --fresh"
        )


def is_up_to_date(
    output: Path, plan: dict[str, Any], sources: dict[str, Source], tokenizer: Tokenizer
) -> bool:
    """Whether the token files in this folder are finished. Raises UserError if they are, but were made with
    another plan or from another text."""
    meta = read_meta(output)
    if meta is None:
        return False
    refuse_different_plan(output, meta["plan"], plan)
    # A dataset is known by its name and commit, which are in the plan. Files are read again and compared.
    if plan["--dataset"] is None:
        sums = (
            pieces_sha256(pieces)
            for source in sources.values()
            for pieces, _ in cut_shards(source.parts(), tokenizer, plan["--shard-chars"])
        )
        if source_sha256(sums) != meta["source_sha256"]:
            raise text_has_changed(output)
    return True


def open_shard_folder(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder of the shards, with plan.json in it. If it is there already, its shards will be used
    again; raises UserError if they were made with another plan."""
    plan_path = folder / "plan.json"
    if plan_path.exists():
        refuse_different_plan(folder.parent, json.loads(plan_path.read_text()), plan)
        n_shards = len(list(folder.glob("*-*.json")))  # one for each finished shard
        print(f"resuming: {n_shards} shards are there already", file=sys.stderr)
    folder.mkdir(exist_ok=True)
    with atomic_write(plan_path) as file:
        file.write(json.dumps(plan).encode())


def print_summary(
    meta: dict[str, Any], output: Path, tokenizer: Tokenizer, seconds: float, n_workers: int
) -> None:
    """Print what was made, how fast, and in how much memory. `meta` is what meta.json holds."""
    for name in ("train", "val"):
        part = meta[name]
        counts = f"{part['tokens']:,} tokens, {part['documents']:,} documents"
        print(f"{output / name}.npy: {counts}, {meta['dtype']}")
    print(
        f"tokenizer {described(tokenizer)}: {meta['bytes_per_token']:.2f} bytes per token, "
        f"{meta['tokens_in_use']:,} different tokens used, {meta['unknown']:,} unknown"
    )
    print_longest([text for _, text, _ in meta["longest_tokens"]])
    megabytes = meta["bytes"] / 1e6
    processes = "process" if n_workers == 1 else "processes"
    own_memory = peak_memory_mb(resource.RUSAGE_SELF)
    worker_memory = peak_memory_mb(resource.RUSAGE_CHILDREN)
    print(
        f"{megabytes:,.1f} MB of text in {seconds:.1f} s: {megabytes / seconds:.1f} MB/s with {n_workers} "
        f"{processes}; peak memory {own_memory:,.0f} MB in the main process, at most "
        f"{worker_memory:,.0f} MB in each of the others"
    )


def peak_memory_mb(who: int) -> float:
    """The most memory that this process has used, or any one of its children; `who` is RUSAGE_SELF or
    RUSAGE_CHILDREN."""
    units_per_mb = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(who).ru_maxrss / units_per_mb


def main(argv: list[str] | None = None) -> int:
    """The whole script as one call. Returns the exit status; raises UserError."""
    args = parse_args(argv)
    if args.task == "tokenizer":
        return make_tokenizer(args)
    try:
        return make_token_files(args)
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):  # Ctrl-C also ends the program that reads our output
            print("\nstopped; what has been encoded is kept, and the same command resumes", file=sys.stderr)
        sys.exit(130)  # as the shell reports a program that Ctrl-C has ended
