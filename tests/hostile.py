"""Checkpoints to be damaged, and how they are refused, for the tests of files made to do harm."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import GPTConfig, GPTMini
from support.checkpoint import KEY, load_model
from support.messages import UserError
from tokenizer import ByteTokenizer

REPO = Path(__file__).parents[1]
NAME = "net.layers.1.self_attn.k_proj.weight"


def checkpoint_of(**changes) -> dict:
    """The smallest checkpoint of ours; `changes` go into our fields."""
    torch.manual_seed(0)
    model = GPTMini(
        GPTConfig(vocab_size=257, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16)
    )
    ours = {
        "format_version": 1,
        "model": model.config.model_dump(),
        "tokenizer": ByteTokenizer().to_dict(),
        "metrics": {"step": 3, "tokens": 9},
    }
    return {
        "state_dict": {f"net.{name}": tensor for name, tensor in model.state_dict().items()},
        KEY: ours | changes,
    }


def with_weight(weight: object, name: object = NAME) -> dict:
    checkpoint = checkpoint_of()
    checkpoint["state_dict"][name] = weight
    return checkpoint


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message.isprintable(), message  # one line, without control characters
    assert len(message) < 500
    return message


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = one_line(caught.value)
    assert str(path) in message
    return message


OPENS = """
import sys
from support.checkpoint import load_model
from support.cli import UserError
for path in sys.argv[1:]:
    try:
        load_model(path)
        print("opened")
    except UserError as error:
        print(error)
"""


def in_little_memory(*paths: Path) -> list[str]:
    """What a process with 8 GiB of address space and a minute of computing says about each file."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))

    command, environment = (
        [sys.executable, "-c", OPENS, *map(str, paths)],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, preexec_fn=limit, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")  # no signal, no traceback
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    return lines


class Call:
    """Its pickle is the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call
