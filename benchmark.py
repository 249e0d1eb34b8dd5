"""Time what Tiny Transformer does, beside what this machine can do at most, and beside other programs.

python3 benchmark.py                                   # everything once, in about two minutes
python3 benchmark.py train --config config_smoke.yaml --against hf
python3 benchmark.py decode --ckpt checkpoints/final.ckpt
python3 benchmark.py train --shape s1 --against hf,litgpt,nanogpt=path/to/checkout --json speed.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from support.cli import add_config_flags, file_path, guarded, make_parser
from support.messages import UserError, inform

TASKS = {  # what is timed: the flags that go with it, besides those for all
    "all": "",
    "train": "config override shape against compile optimizer",
    "prefill": "config override shape ckpt against compile",
    "decode": "config override shape ckpt against compile quantize",
}
SHAPES = ("s1", "s2", "s3", "m1", "m2", "gpt2")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked flags of the command line. Raises UserError."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "task", nargs="?", default="all", choices=tuple(TASKS), help="what to time (default: all)"
    )
    add_config_flags(parser)
    parser.add_argument(
        "--shape", choices=SHAPES, help="a named shape instead of a config: s for small, m for middle"
    )
    parser.add_argument("--ckpt", type=file_path, metavar="FILE", help="the checkpoint to time")
    parser.add_argument(
        "--against",
        default="",
        metavar="NAME[=PATH],...",
        help="opponents: hf, litgpt, llamacpp (packages), nanogpt=PATH, gptfast=PATH (checkouts)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile both sides where that is possible"
    )
    parser.add_argument("--quantize", choices=("int8",), help="decode: our weights in 8 bits")
    parser.add_argument("--optimizer", help="short for --override training.optimizer=NAME")
    parser.add_argument("--rounds", type=int, metavar="N", help="undisturbed rounds (default 9; for all: 5)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="at most about this long for each comparison (default 60)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each core)")
    parser.add_argument("--json", type=file_path, metavar="FILE", help="write all figures to this file")
    args = parser.parse_args(argv)
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together, or have a value out of range."""
    for flag in ("config", "override", "shape", "ckpt", "against", "compile", "quantize", "optimizer"):
        if getattr(args, flag) and flag not in TASKS[args.task].split():
            tasks = [task for task, flags in TASKS.items() if flag in flags.split()]
            raise UserError(
                f"--{flag} goes with {', '.join(tasks)}; e.g. benchmark.py {tasks[0]} --{flag} ..."
            )
    subjects = [flag for flag in ("config", "shape", "ckpt") if getattr(args, flag)]
    if len(subjects) > 1:
        raise UserError(f"--{subjects[0]} and --{subjects[1]} both say what to time; give one of them")
    for flag in ("rounds", "seconds", "threads"):
        value = getattr(args, flag)
        if value is not None and value <= 0:
            raise UserError(f"--{flag} {value} must be above 0")


if __name__ == "__main__":
    guarded(parse_args)  # --help and wrong flags are answered before the slow imports below
    from benchmark import main  # this file again, as a module

    sys.exit(guarded(main))

import torch

from support.benchmark.contest import Contest, Effort, Row, hold, print_rows
from support.benchmark.machine import Machine, measure_machine
from support.benchmark.model_speed import decode_sides, prefill_sides, training_sides
from support.benchmark.opponents import Opponents, parse_against
from support.benchmark.subject import read_subject
from support.device import resolve_device
from support.files.atomic import atomic_write
from support.run.folder import run_record

PREFILL_TOKENS = 512
PROMPT_TOKENS, NEW_TOKENS = 16, 200  # of decoding

# ---- the tasks -----------------------------------------------------------------------------------


def time_training(
    args: argparse.Namespace, against: Opponents, machine: Machine, effort: Effort
) -> list[Row]:
    """One optimizer step on batches that are in memory already: forward, backward, clip, update."""
    subject = read_subject(args, "s1")
    contest = Contest("train", subject.name, "tokens", "step", binds="matmul", dtype=subject.dtype)
    return hold(contest, training_sides(subject, against, args.compile), machine, effort)


def time_prefill(args: argparse.Namespace, against: Opponents, machine: Machine, effort: Effort) -> list[Row]:
    """Reading a prompt, up to the first new token."""
    subject = read_subject(args, "m1")
    length = min(PREFILL_TOKENS, subject.model_config.max_seq_len)
    contest = Contest("prefill", subject.name, "tokens", "prompt", binds="matmul", dtype=subject.dtype)
    return hold(contest, prefill_sides(subject, against, length, args.compile), machine, effort)


def time_decoding(
    args: argparse.Namespace, against: Opponents, machine: Machine, effort: Effort
) -> list[Row]:
    """Writing one token after another, always the likeliest, for one prompt."""
    subject = read_subject(args, "m1")
    n_new = min(NEW_TOKENS, subject.model_config.max_seq_len - PROMPT_TOKENS)
    if n_new < 1:
        raise UserError(
            f"{subject.name} sees only {subject.model_config.max_seq_len} tokens; decoding takes a prompt of "
            f"{PROMPT_TOKENS} and at least one more"
        )
    contest = Contest(
        "decode", subject.name, "tokens", "token", per_run=n_new, binds="bandwidth", dtype=subject.dtype
    )
    return hold(contest, decode_sides(subject, against, PROMPT_TOKENS, n_new, args.compile), machine, effort)


TIMERS = {"train": time_training, "prefill": time_prefill, "decode": time_decoding}

# ---- all together --------------------------------------------------------------------------------


def write_json(path: Path, machine: Machine, rows: list[Row]) -> None:
    """Write the limits of the machine and all rows."""
    record = run_record()
    limits: dict[str, Any] = vars(machine)
    report = {
        "machine": limits,
        "versions": record["versions"],
        "command": record["command"],
        "results": rows,
    }
    with atomic_write(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """The whole script as one call. Returns the exit status; raises UserError."""
    args = parse_args(argv)
    against = parse_against(args.against)
    device = resolve_device(args.device or "auto")
    if args.threads:
        torch.set_num_threads(args.threads)
    is_quick = args.task == "all"
    effort = Effort(
        n_rounds=args.rounds or (5 if is_quick else 9),
        max_seconds=args.seconds or (12 if is_quick else 60),
        n_threads=torch.get_num_threads(),
    )
    machine = measure_machine(device, seconds=min(6.0, effort.max_seconds))
    print("\n".join(machine.describe()), flush=True)
    rows: list[Row] = []
    for task in TIMERS if is_quick else [args.task]:
        inform(f"timing {task} ...")
        rows += TIMERS[task](args, against, machine, effort)
    print_rows(rows)
    if args.json:
        write_json(Path(args.json), machine, rows)
    return 0
