"""Kill training at random moments, resume it, and count what is lost. It takes minutes; run `make torture`.

python3 tests/torture.py --kills 200 --seed 1
python3 tests/torture.py --kills 20 --keep /tmp/torture      # keeps the folders of the runs

For every case of the matrix, the witness is a run without any disturbance. The same run is then killed and
resumed until it ends, each time with a random number of data workers. Its weights, optimizer, metrics and
best checkpoint must equal those of the witness. Every process is forked from this one, which has PyTorch and
Lightning loaded, so that a kill costs one second, not ten.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from conftest import REPO, Run, tiny_argv  # sets one thread and no network, so before torch
from runs import assert_same_run

STEPS = 40
COMMON = (
    "model.dropout=0.1",
    f"training.max_steps={STEPS}",
    f"training.schedule_steps={STEPS}",
    "training.val_every=5",
    "checkpoint.save_every=2",
)
SOURCES = {
    "text": ("tokenizer.kind=byte", "data.path={folder}/small.txt"),
    "stream": (
        "tokenizer.kind=byte", "data.source=hf", "data.dataset=json", "data.path={folder}/rows.jsonl",
        "data.streaming=true", "data.val_docs=4", "data.val_fraction=0.1",
    ),
}  # fmt: skip
# "alone" kills only the main process, so that its data workers live on. Repeated entries are more likely.
SIGNALS = ["SIGKILL"] * 5 + ["SIGKILL alone"] * 2 + ["SIGTERM", "SIGINT", "SIGINT twice"]


@dataclass
class Case:
    """One cell of the matrix: its command line, and what happened to its runs."""

    name: str
    words: tuple[str, ...]
    extended: bool
    seconds: float = 0.0  # how long the undisturbed run takes
    kills: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


def cases(folder: Path) -> list[Case]:
    """Source x optimizer x accumulation. One run of each source is also extended while it is being killed."""
    made = []
    for source, optimizer, accum in itertools.product(SOURCES, ("adamw", "muon"), (1, 3)):
        words = (
            *COMMON,
            *SOURCES[source],
            f"training.optimizer={optimizer}",
            f"training.grad_accum_steps={accum}",
        )
        extended = accum == 3 and optimizer == "muon"
        name = f"{source}, {optimizer}, accumulation {accum}" + (", extended" if extended else "")
        made.append(Case(name, tuple(word.format(folder=folder) for word in words), extended))
    return made


def write_corpora(folder: Path) -> None:
    """Write texts for about six steps, so that every run goes through several epochs."""
    (folder / "small.txt").write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(2000)))
    rows = [" ".join(f"word{(i * j) % 17}" for j in range(1, 30)) for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))


def start(argv: list[str], log: Path) -> int:
    """The process id of `train.py` with these words, forked from this process, in a session of its own."""
    # Blocked, because Ctrl-C in the child's first moment would unwind a copy of this process.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    log.write_text("")
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return pid
    code = 70  # an error of ours, with its traceback in the log
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import support.run.show
        import train
        from support.cli import guarded

        sys.argv = ["train.py", *argv]
        support.run.show.draw_loss = lambda folder: None  # the pictures take half the time
        code = guarded(train.main, argv)
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 130  # as Python itself would end
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid: int, seconds: float, how: str) -> int:
    """Let the process run for `seconds`, then send the signal to it and its data workers. Returns its exit
    status."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    send = os.kill if how.endswith("alone") else os.killpg
    for _ in range(2 if how.endswith("twice") else 1):
        with contextlib.suppress(ProcessLookupError):  # no group of its own yet: it is not killed this time
            send(pid, signal.Signals[how.split()[0]])
    return wait(pid)


def check_files(case: Case, folder: Path, best_before: float) -> float:
    """After a kill, every checkpoint is whole and best.ckpt no worse than before. Returns its val_loss."""
    from support.checkpoint import read_checkpoint
    from support.messages import UserError

    best = best_before
    for path in folder.glob("*.ckpt"):
        try:
            metrics = read_checkpoint(path, mmap=False)["tiny_transformer"]["metrics"]
        except UserError as error:
            case.lost.append(f"damaged: {error}")
            continue
        if path.name == "best.ckpt":
            best = metrics["val_loss"]
    if best > best_before:
        case.lost.append(f"{folder.name}: best.ckpt has val_loss {best}, after {best_before}")
    return best


def torture(case: Case, folder: Path, dice: random.Random, kills: int) -> None:
    """Kill and resume the run of this case until it has been killed `kills` times. Each time it ends, start a
    new one."""
    straight_argv = tiny_argv(folder / "straight", *case.words)
    began = time.monotonic()
    code = wait(start(straight_argv, folder / "straight.log"))
    case.seconds = time.monotonic() - began
    straight = Run(folder / "straight", code, (folder / "straight.log").read_text(), "")
    for number in itertools.count():
        if sum(case.kills.values()) >= kills:
            return
        killed_until_done(case, folder / f"killed-{number}", dice, straight)


def killed_until_done(case: Case, folder: Path, dice: random.Random, straight: Run) -> None:
    """Kill and resume one run until it ends, then compare it with the straight one."""
    log = folder.with_suffix(".log")
    best = math.inf
    steps = STEPS // 2 if case.extended else STEPS
    while True:
        workers = dice.choice([0, 0, 1, 2])
        words = (*case.words, f"training.max_steps={steps}", f"hardware.num_workers={workers}")
        resume = ("--resume",) if (folder / "run_config.yaml").exists() else ()
        how = dice.choice(SIGNALS)
        pid = start(tiny_argv(folder, *words, *resume), log)
        code = kill_after(pid, dice.uniform(0, 1.3 * case.seconds), how)
        best = check_files(case, folder, best)
        if code == 0 and steps == STEPS:
            break
        if code == 0:
            steps = STEPS  # the run has reached half its length: extend it
        elif code in (-signal.SIGKILL, 130, 143, -signal.SIGINT, -signal.SIGTERM):
            case.kills[how] += 1
        else:
            case.lost.append(f"{folder.name}, {how}: exit status {code}: {log.read_text()[-2000:]}")
            return
    ended = Run(folder, code, log.read_text(), "")
    try:
        if "weights sha256" not in ended.out:  # killed after the last checkpoint, so nothing was left to do
            ended.out = straight.out if same_weights(ended, straight) else ended.out
        assert_same_run(ended, straight)
    except AssertionError as error:
        case.lost.append(f"{folder.name}: differs from the undisturbed run: {str(error)[:300]}")


def same_weights(one: Run, other: Run) -> bool:
    from support.checkpoint import weights_sha256

    return weights_sha256(one.folder / "final.ckpt") == weights_sha256(other.folder / "final.ckpt")


def report(done: list[Case], seed: int, seconds: float) -> str:
    """The counts as a Markdown table."""
    names = sorted({how for case in done for how in case.kills})
    lines = [f"| case | {' | '.join(names)} | kills | lost |", f"|---|{'---:|' * (len(names) + 2)}"]
    for case in done:
        lines.append(
            f"| {case.name} | {' | '.join(str(case.kills[how]) for how in names)} | "
            f"{sum(case.kills.values())} | {len(case.lost)} |"
        )
    total = sum((case.kills for case in done), Counter())
    lines.append(
        f"| all | {' | '.join(str(total[how]) for how in names)} | {sum(total.values())} | "
        f"{sum(len(case.lost) for case in done)} |"
    )
    return "\n".join([*lines, "", f"seed {seed}, {seconds / 60:.0f} minutes"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=120, help="number of kills over all cases (default 120)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments and signals (default 0)")
    parser.add_argument(
        "--keep", type=Path, help="folder for the runs (default: a temporary one, removed at the end)"
    )
    return parser.parse_args(argv)


def main() -> int:
    args = parse_args()
    os.chdir(REPO)
    # A shell makes the processes it starts in the background ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import datasets  # noqa: F401 (loaded once, before the forks)
    import torch

    import train  # noqa: F401

    torch.set_num_threads(1)
    began = time.monotonic()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = args.keep or Path(temporary)
        base.mkdir(parents=True, exist_ok=True)
        write_corpora(base)
        done = cases(base)
        for i, case in enumerate(done):
            folder = base / str(i)
            folder.mkdir()
            torture(case, folder, dice, -(-args.kills // len(done)))
            counts = f"{sum(case.kills.values())} kills, {len(case.lost)} lost"
            print(f"{case.name}: {counts} ({case.seconds:.1f} s undisturbed)", flush=True)
    print(report(done, args.seed, time.monotonic() - began))
    for case in done:
        for what in case.lost:
            print(f"LOST in {case.name}: {what}")
    return 1 if any(case.lost for case in done) else 0


if __name__ == "__main__":
    sys.exit(main())
