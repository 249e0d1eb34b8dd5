"""Micro-batches of bytes, and whether two lists of them are equal, for the tests of data.py."""

from collections.abc import Iterable

import torch

from data import Step
from tokenizer import ByteTokenizer

BYTE = ByteTokenizer()
SEQ_LEN = 7


def flat(batches: Iterable[dict], name: str = "labels") -> list[int]:
    return torch.cat([batch[name].flatten() for batch in batches]).tolist()


def batches_of(steps: Iterable[Step]) -> list[dict]:
    return [batch for step in steps for batch in step.micro_batches]


def same(one: list[dict], other: list[dict]) -> bool:
    """Whether two lists of micro-batches hold equal tensors."""
    one, other = (
        [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]
        for batches in (one, other)
    )
    return one == other


def same_steps(one: list[Step], other: list[Step]) -> bool:
    """Whether the steps have equal micro-batches. Their stream states may differ: one position can be
    written in several ways."""
    return len(one) == len(other) and all(
        same(a.micro_batches, b.micro_batches) for a, b in zip(one, other, strict=True)
    )
