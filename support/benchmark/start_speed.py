"""The time before the first token: loading a checkpoint, and starting infer.py."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from support.benchmark.rounds import Side
from support.benchmark.subject import REPO, read_subject
from support.checkpoint import load_model, read_metadata, write_model
from support.messages import UserError
from support.run.folder import run_record

PROMPT = "e"  # a letter that every tokenizer knows


def checkpoint_to_load(args: argparse.Namespace, folder: Path) -> Path:
    """--ckpt, after a look at it; without it, a checkpoint of --shape with random weights, made in `folder`.
    Raises UserError."""
    if args.ckpt:
        read_metadata(args.ckpt)
        return Path(args.ckpt)
    subject = read_subject(args, "m1")
    path = folder / f"{subject.name}.ckpt"
    write_model(path, subject.new_model(), subject.some_tokenizer(), run_record())
    return path


def loading_sides(path: Path, device: str) -> list[Callable[[], Side]]:
    """Builders of the sides: `load_model`, and only reading the bytes of the file."""
    n_bytes = path.stat().st_size
    return [
        lambda: Side("ours", lambda: load_model(path, device) and None, n_bytes=n_bytes, units=n_bytes / 1e6),
        lambda: Side("its bytes", lambda: path.read_bytes() and None, n_bytes=n_bytes, units=n_bytes / 1e6),
    ]


def starting_sides(path: Path, device: str) -> list[Callable[[], Side]]:
    """Builders of the sides, each a new process: infer.py up to its first token, and `import torch`."""
    infer = ["infer.py", "--ckpt", str(path.resolve()), "--prompt", PROMPT, "--max-new-tokens", "1"]
    return [
        lambda: Side("ours", lambda: run_python([*infer, "--device", device])),
        lambda: Side("import torch", lambda: run_python(["-c", "import torch"])),
    ]


def run_python(words: list[str]) -> None:
    """Run Python with these arguments to its end, with as many threads as this process. Raises UserError if
    it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, *words], cwd=REPO, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{words[0]} failed: {done.stderr.strip()[-300:]}")
