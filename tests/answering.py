"""Checkpoints that no run has made, and a run of infer.py in this process, for the tests of infer.py."""

from pathlib import Path

import pytest
import torch

import infer
from model import GPTConfig, GPTMini
from support.checkpoint import KEY
from tokenizer import Tokenizer


def output_of(capsys: pytest.CaptureFixture, *argv: str) -> tuple[str, str]:
    """(stdout, stderr) of infer.py with these flags."""
    capsys.readouterr()
    assert infer.main([*argv, "--device", "cpu"]) == 0
    return capsys.readouterr()


def craft(path: Path, model: GPTMini, tokenizer: Tokenizer) -> str:
    """A checkpoint of this model and tokenizer."""
    ours = {
        "format_version": 1,
        "model": model.config.model_dump(),
        "tokenizer": tokenizer.to_dict(),
        "metrics": {"step": 0},
    }
    weights = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, KEY: ours}, path)
    return str(path)


def tiny_model(vocab_size: int, **changes) -> GPTMini:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16}
    return GPTMini(GPTConfig(vocab_size=vocab_size, **(sizes | changes)))
