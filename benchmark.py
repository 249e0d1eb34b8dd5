"""Time what Tiny Transformer does, beside what this machine can do at most, and beside other programs.

python3 benchmark.py                                       # everything once, in about two minutes
python3 benchmark.py train --config config_smoke.yaml --against hf
python3 benchmark.py decode --ckpt checkpoints/final.ckpt
python3 benchmark.py train --shape s1 --against litgpt,nanogpt=path/to/checkout --json speed.json --plot speed
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from support.cli import add_config_flags, add_quantize_flag, file_path, guarded, make_parser
from support.messages import UserError, inform

TASKS = {  # what is timed, and the flags that go with it besides those for all
    "all": "",
    "train": "config override shape against compile optimizer",
    "prefill": "config override shape ckpt against compile",
    "decode": "config override shape ckpt against compile quantize",
    "tokens": "config override ckpt against",
    "batches": "config override shape",
    "load": "ckpt shape",
    "start": "ckpt shape",
    "overhead": "config override optimizer",
    "loss": "config override against opponent_lr",
}
SHAPES = ("s1", "s2", "s3", "m1", "m2", "gpt2")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked flags of the command line. Raises UserError."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "task",
        nargs="?",
        default="all",
        choices=tuple(TASKS),
        help="train: a step; prefill: reading a prompt; decode: writing; tokens: encoding text; batches: "
        "from token files; load: a checkpoint; start: infer.py to its first token; overhead: train.py over "
        "a bare loop; loss: a whole run beside nanoGPT's; default: all but the last, quickly",
    )
    add_config_flags(parser)
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="a named shape in place of a config (SHAPES in support/benchmark/subject.py lists them)",
    )
    parser.add_argument("--ckpt", type=file_path, metavar="FILE", help="the checkpoint to time")
    parser.add_argument(
        "--against",
        default="",
        metavar="NAME[=PATH],...",
        help="opponents: hf, litgpt, llamacpp (packages), nanogpt=PATH, gptfast=PATH (checkouts), for "
        "tokens: tokenizers, tiktoken",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile all sides that allow it")
    add_quantize_flag(parser)
    parser.add_argument("--optimizer", metavar="NAME", help="short for --override training.optimizer=NAME")
    parser.add_argument(
        "--opponent-lr", type=float, metavar="LR", help="loss: the opponent's learning rate (default 1e-3)"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="undisturbed rounds (default 9; for all: 5)")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="at most about this long for the rounds of a comparison (default 60; for all: 12)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each core)")
    parser.add_argument("--json", type=file_path, metavar="FILE", help="write all figures to this file")
    parser.add_argument(
        "--plot", type=file_path, metavar="NAME", help="draw the figures under the limits: NAME.svg, NAME.png"
    )
    args = parser.parse_args(argv)
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together, or have a value out of range."""
    for flag in dict.fromkeys(" ".join(TASKS.values()).split()):
        if getattr(args, flag) and flag not in TASKS[args.task].split():
            tasks = [task for task, flags in TASKS.items() if flag in flags.split()]
            name = flag.replace("_", "-")
            raise UserError(f"--{name} goes with {', '.join(tasks)}; name one: benchmark.py {tasks[0]} ...")
    subjects = [flag for flag in ("config", "shape", "ckpt") if getattr(args, flag)]
    if len(subjects) > 1:
        raise UserError(f"--{subjects[0]} and --{subjects[1]} both say what to time; give one of them")
    if args.quantize and args.compile:
        raise UserError("--quantize and --compile do not go together: PyTorch cannot compile its int8 kernel")
    for flag in ("rounds", "seconds", "threads", "opponent_lr"):
        value = getattr(args, flag)
        if value is not None and not value > 0:
            raise UserError(f"--{flag.replace('_', '-')} {value} must be above 0")


if __name__ == "__main__":
    guarded(parse_args)  # --help and wrong flags are answered before the slow imports below
    from benchmark import main  # this file again, as a module

    sys.exit(guarded(main))

import torch

from support.benchmark.contest import Contest, Effort, Row, hold, print_rows
from support.benchmark.data_speed import batch_sides, tokenizing_sides
from support.benchmark.machine import Machine, measure_machine
from support.benchmark.model_speed import Builder, decode_sides, prefill_sides, training_sides
from support.benchmark.opponents import parse_against
from support.benchmark.overhead import overhead_sides, plan_overhead
from support.benchmark.picture import draw_roofline
from support.benchmark.race import check_race, hold_race, print_race
from support.benchmark.start_speed import checkpoint_to_load, loading_sides, starting_sides
from support.benchmark.subject import read_subject
from support.device import resolve_device
from support.files.atomic import atomic_write
from support.run.folder import run_record

PREFILL_TOKENS = 512
PROMPT_TOKENS, NEW_TOKENS = 16, 200  # of decoding
Prepared = tuple[Contest, list[Builder]]  # what is compared, and what makes its sides

# ---- the tasks -----------------------------------------------------------------------------------
#
# Each reads its flags, raises UserError for a mistake, and returns what `hold` needs. `folder` is for
# temporary files.


def training(args: argparse.Namespace, folder: Path) -> Prepared:
    """One optimizer step on batches that are in memory already: forward, backward, clip, update. Its limit is
    the speed of matrix products, of which it mostly consists."""
    against = parse_against(args.against, "train")
    subject = read_subject(args, "s1")
    contest = Contest("train", subject.label, "tokens", "step", binds="matmul", dtype=subject.dtype)
    return contest, training_sides(subject, against, args.compile)


def prefill(args: argparse.Namespace, folder: Path) -> Prepared:
    """Reading a prompt, up to the choice of the first new token. Many tokens share each weight that is read,
    so the limit is that of matrix products again."""
    against = parse_against(args.against, "prefill")
    subject = read_subject(args, "m1")
    length = min(PREFILL_TOKENS, subject.model_config.max_seq_len)
    contest = Contest("prefill", subject.label, "tokens", "prompt", binds="matmul", dtype=subject.dtype)
    return contest, prefill_sides(subject, against, length, args.compile)


def decoding(args: argparse.Namespace, folder: Path) -> Prepared:
    """Writing one token after another, always the likeliest, for one prompt. Each token needs all weights
    once, so the limit is how fast they can be read."""
    against = parse_against(args.against, "decode")
    subject = read_subject(args, "m1")
    n_new = min(NEW_TOKENS, subject.model_config.max_seq_len - PROMPT_TOKENS)
    if n_new < 1:
        raise UserError(
            f"{subject.name} sees only {subject.model_config.max_seq_len} tokens; decoding takes a prompt of "
            f"{PROMPT_TOKENS} and at least one more"
        )
    contest = Contest("decode", subject.label, "tokens", "token", n_new, "bandwidth", subject.dtype)
    return contest, decode_sides(
        subject, against, PROMPT_TOKENS, n_new, args.compile, int8=args.quantize == "int8"
    )


def tokenizing(args: argparse.Namespace, folder: Path) -> Prepared:
    """Encoding a text with `encode_batch`, in the pieces in which training encodes it."""
    against = parse_against(args.against, "tokens")
    tokenizer, builders = tokenizing_sides(args, against)
    return Contest("tokens", f"{tokenizer.kind} {tokenizer.vocab_size}", "tokens", "text"), builders


def batches(args: argparse.Namespace, folder: Path) -> Prepared:
    """Taking the batches of a training run from token files."""
    subject = read_subject(args, "s1")
    return Contest("batches", subject.name, "tokens", "step", 100), batch_sides(subject, folder)


def loading(args: argparse.Namespace, folder: Path) -> Prepared:
    """Turning a checkpoint into a model and its tokenizer."""
    device = resolve_device(args.device or "auto")
    path = checkpoint_to_load(args, folder)
    return Contest("load", path.name, "MB", "file", differs=True), loading_sides(path, device)


def starting(args: argparse.Namespace, folder: Path) -> Prepared:
    """From the command line to the first token."""
    device = resolve_device(args.device or "auto")
    path = checkpoint_to_load(args, folder)
    return Contest("start", path.name, "starts", "process", differs=True), starting_sides(path, device)


def overhead(args: argparse.Namespace, folder: Path) -> Prepared:
    """What train.py adds to a loop of a few lines, with its default logging."""
    plan = plan_overhead(args, str(folder / "run"))
    from train import LitCausalLM, run  # here, since Lightning takes seconds to import

    contest = Contest("overhead", args.config or "config_smoke.yaml", "steps", "step", differs=True)
    return contest, overhead_sides(plan, run, LitCausalLM)


PREPARE = {
    "train": training,
    "prefill": prefill,
    "decode": decoding,
    "tokens": tokenizing,
    "batches": batches,
    "load": loading,
    "start": starting,
    "overhead": overhead,
}

# ---- all together --------------------------------------------------------------------------------


def measure(args: argparse.Namespace, effort: Effort, folder: Path) -> tuple[Machine, list[Row]]:
    """The limits of the machine, which are printed, and the rows of the tasks. Raises UserError."""
    machine, rows = None, []
    for task in PREPARE if args.task == "all" else [args.task]:
        contest, builders = PREPARE[task](args, folder)
        if machine is None:  # after the first task has been read: a mistake is answered at once
            device = resolve_device(args.device or "auto")
            machine = measure_machine(device, seconds=min(6.0, effort.max_seconds))
            print("\n".join(machine.describe()), flush=True)
        inform(f"timing {task} ...")
        rows += hold(contest, builders, machine, effort)
    return machine, rows


def race(args: argparse.Namespace) -> list[Row]:
    """A whole run beside nanoGPT's recipe, for their losses; the rows, which are printed."""
    against = parse_against(args.against, "loss")
    subject = read_subject(args, "s1")
    check_race(subject, against)
    inform("training both sides in turn; this takes minutes ...")
    rows = hold_race(subject, against["nanogpt"], args.opponent_lr or 1e-3)
    print_race(rows)
    return rows


def write_json(path: Path, machine: Machine | None, rows: list[Row]) -> None:
    """Write the limits of the machine, if they were measured, and all rows."""
    record = run_record()
    about = {"command": record["command"], "git_commit": record["git_commit"], "versions": record["versions"]}
    text = json.dumps(about | {"machine": machine and vars(machine), "results": rows}, indent=1)
    with atomic_write(path) as file:
        file.write((text + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    """The whole script as one call. Returns the exit status; raises UserError."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    # The library tokenizers reads the first, and ours the second, which is off for one thread.
    os.environ["RAYON_NUM_THREADS"] = str(torch.get_num_threads())
    os.environ["TOKENIZERS_PARALLELISM"] = str(torch.get_num_threads() > 1).lower()
    is_quick = args.task == "all"
    effort = Effort(
        n_rounds=args.rounds or (5 if is_quick else 9),
        max_seconds=args.seconds or (12.0 if is_quick else 60.0),
        n_threads=torch.get_num_threads(),
    )
    if args.task == "loss":
        machine, rows = None, race(args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            machine, rows = measure(args, effort, Path(folder))
        print_rows(rows)
    if args.json:
        write_json(Path(args.json), machine, rows)
    if args.plot and machine:
        print(f"drawn: {draw_roofline(Path(args.plot), machine, rows)}")
    return 0
