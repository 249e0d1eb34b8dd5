"""What tests of training runs share: stopping a run with a signal, and comparing two runs."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train

BYTE = ("tokenizer.kind=byte",)
STREAM = (
    "data.source=hf",
    "data.dataset=json",
    "data.streaming=true",
    "data.val_docs=4",
    "data.val_fraction=0.1",
)


def stop_before(patch: pytest.MonkeyPatch, *steps: int, signum: int = signal.SIGTERM) -> None:
    """Let a signal arrive in each of these steps, counted from 1. The run stops after such a step."""
    step = train.LitCausalLM.training_step

    def stop(self, *args):
        if self.trainer.global_step + 1 in steps:
            os.kill(os.getpid(), signum)
        return step(self, *args)

    patch.setattr(train.LitCausalLM, "training_step", stop)


def start_until_first_row(argv: list[str]) -> subprocess.Popen:
    """train.py, started as a user does, once it has shown its first row."""
    command = [sys.executable, "train.py", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r"step +1/", line):
            break
    return process


def stopped_run(run: Callable, folder: Path, *words: str, at: int, signum: int = signal.SIGTERM, **options):
    """A run that a signal has stopped after step `at`."""
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, at, signum=signum)
        made = run(folder, *words, **options)
    assert made.code == 128 + signum
    assert made.checkpoint("last")["tiny_transformer"]["metrics"]["step"] == at
    return made


def assert_same_tree(one, other, path: str = "optimizer") -> None:
    """Nested dicts and lists hold the same types, keys, tensors and values."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same_tree(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_tree(a, b, f"{path}.{i}")
    else:
        assert one == other, path


def assert_same_run(resumed, straight) -> None:
    """Weights, optimizer, metrics in the checkpoint, all rows except times, and the best step are equal."""
    assert (resumed.code, resumed.sha256) == (0, straight.sha256)
    one, other = resumed.checkpoint(), straight.checkpoint()
    assert_same_tree(one["optimizer_states"], other["optimizer_states"])
    assert one["tiny_transformer"]["metrics"] == other["tiny_transformer"]["metrics"]
    assert resumed.timeless_rows == straight.timeless_rows
    best_steps = [r.checkpoint("best")["tiny_transformer"]["metrics"]["step"] for r in (resumed, straight)]
    assert best_steps[0] == best_steps[1]
