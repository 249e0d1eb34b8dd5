"""What the tests of fine-tuning share: the rows they train on, the settings of a short run, and comparing
weights."""

from pathlib import Path

import torch

from support.checkpoint import model_weights, read_checkpoint

PLAIN_TEMPLATE = (
    "template={prompt: 'Ask {instruction} Say ', prompt_with_input: 'Ask {instruction} {input} Say '}"
)
LORA = ("lora={rank: 2, alpha: 4}",)
SIX_STEPS = (
    PLAIN_TEMPLATE,
    "data.val_docs=6",
    "training.epochs=null",
    "training.max_steps=6",
    "training.schedule_steps=6",
    "training.warmup_steps=1",
    "training.log_every=1",
    "training.micro_batch_size=3",
    "training.grad_accum_steps=2",
    "training.val_every=3",
    "checkpoint.save_every=3",
    "checkpoint.keep_last=null",
)


def rows(n: int) -> list[dict]:
    """Questions and answers of unequal lengths, half of them with an input."""
    words = ["loss", "head", "step", "data", "the", "of", "is", "text", "and", "word"]
    return [
        {
            "instruction": f"{words[i % 10]} {i}?",
            "input": words[i % 7] if i % 2 else "",
            "output": " ".join([words[i % 10]] * (1 + i % 4)) + ".",
        }
        for i in range(n)
    ]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return model_weights(read_checkpoint(path))


def same_weights(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
