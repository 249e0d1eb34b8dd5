"""Training to a loss, side by side: our run of a config, and nanoGPT's CPU recipe at the same size, on the
same text.

The two take turns: each trains a slice of its own run, then the other does. So both meet the same
disturbances, and their training times can be compared. Evaluation is not counted.

The validation text is cut in two. Hyperparameters may be chosen by the loss on its first half; a figure for a
page is the loss on the second half, which no choice has seen.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch, make_dataloaders
from model import GPTMini
from optim import lr_factor
from support.benchmark.model_speed import count_params, our_step
from support.benchmark.opponents import NanoGPT, silently
from support.benchmark.subject import Subject
from support.chunked_loss import IGNORE
from support.messages import UserError

N_SLICES = 40
# nanoGPT's README, "I only have a macbook": its command for a CPU.
STEPS, BATCH_SIZE, LR, MIN_LR, WARMUP_STEPS, BETAS, WEIGHT_DECAY = 2000, 12, 1e-3, 1e-4, 100, (0.9, 0.99), 0.1


@dataclass
class Runner:
    """One side of the race. Each call of `step` trains one step."""

    name: str
    model: nn.Module
    step: Callable[[], None]
    n_steps: int
    tokens_per_step: int
    seconds: float = 0.0

    def run_slice(self, i: int) -> None:
        """Train the steps of slice i of N_SLICES, on the clock."""
        n = self.n_steps * (i + 1) // N_SLICES - self.n_steps * i // N_SLICES
        start = time.perf_counter()
        for _ in range(n):
            self.step()
        self.seconds += time.perf_counter() - start


def our_runner(subject: Subject) -> Runner:
    """The run of the config, as train.py does it."""
    config, model = subject.config, subject.new_model().train()
    n_steps = config.training.max_steps
    loader, _ = make_dataloaders(config, subject.data, subject.tokenizer, n_steps)
    return Runner("ours", model, our_step(model, loader, subject), n_steps, subject.tokens_per_step)


def nanogpt_runner(subject: Subject, path: str, lr: float) -> Runner:
    """nanoGPT's CPU recipe with its own model and optimizer, in the size of our config: random windows of the
    training text, a cosine schedule. Its README's learning rate is 1e-3."""
    tokens, length = torch.from_numpy(subject.data.train.tokens[:].astype("int64")), subject.config.seq_len
    torch.manual_seed(subject.config.seed)
    size = subject.model_config.model_copy(update={"dropout": 0.0, "max_seq_len": length})
    model = silently(lambda: NanoGPT(subject, path).build(size))
    optimizer = silently(lambda: model.configure_optimizers(WEIGHT_DECAY, lr, BETAS, "cpu"))
    generator = torch.Generator().manual_seed(subject.config.seed)
    indices = itertools.count()

    def step() -> None:
        rate = nanogpt_rate(next(indices), lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - length, (BATCH_SIZE,), generator=generator)
        x = torch.stack([tokens[start : start + length] for start in starts])
        y = torch.stack([tokens[start + 1 : start + 1 + length] for start in starts])
        _, loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Runner(f"nanogpt, lr {lr:g}", model, step, STEPS, BATCH_SIZE * length)


def nanogpt_rate(step: int, lr: float) -> float:
    """The learning rate of its schedule: warmup, then half a cosine down to a tenth."""
    if step < WARMUP_STEPS:
        return lr * (step + 1) / (WARMUP_STEPS + 1)
    return lr * lr_factor(step, "cosine", WARMUP_STEPS, STEPS, floor=MIN_LR / LR)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The logits (B, T, V) of either side's model; nanoGPT's gives all of them only if it gets labels too."""
    if isinstance(model, GPTMini):
        return model(batch["input_ids"])
    return model(batch["input_ids"], batch["labels"].clamp(min=0))[0]


@torch.no_grad()
def validation_halves(subject: Subject, model: nn.Module) -> tuple[float, float]:
    """The mean loss on the first and on the second half of the validation blocks."""
    model.eval()
    n_blocks = len(subject.data.val)
    means = []
    for blocks in (range(n_blocks // 2), range(n_blocks // 2, n_blocks)):
        total = n_targets = 0.0
        for start in range(blocks.start, blocks.stop, 64):
            batch = subject.data.val.batch(range(start, min(start + 64, blocks.stop)))
            logits, labels = logits_of(model, batch).flatten(0, 1), batch["labels"].flatten()
            total += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
            n_targets += (labels != IGNORE).sum().item()
        means.append(total / n_targets)
    return means[0], means[1]


def check_race(subject: Subject, against: dict[str, str | None]) -> None:
    """Raise UserError for what cannot be raced."""
    if subject.data is None or subject.data.streaming:
        raise UserError("loss trains on a text; name a config, e.g. --config configs/shakespeare_fast.yaml")
    if subject.device != "cpu":
        raise UserError(
            f"loss compares runs on a CPU, and the device here is {subject.device}; add --device cpu"
        )
    if set(against) != {"nanogpt"}:
        raise UserError("loss needs one opponent: --against nanogpt=PATH, the folder of a checkout")


def hold_race(subject: Subject, path: str, lr: float) -> list[dict[str, Any]]:
    """Train both sides; a row for each with its losses, tokens and training time."""
    runners = [our_runner(subject), nanogpt_runner(subject, path, lr)]
    for i in range(N_SLICES):
        for runner in runners if i % 2 == 0 else runners[::-1]:
            runner.run_slice(i)
    rows = []
    for runner in runners:
        first, second = validation_halves(subject, runner.model)
        rows.append(
            {
                "side": runner.name,
                "steps": runner.n_steps,
                "tokens": runner.n_steps * runner.tokens_per_step,
                "n_params": count_params(runner.model),
                "val_loss_first_half": first,
                "val_loss_second_half": second,
                "training_seconds": runner.seconds,
            }
        )
    return rows


def print_race(rows: list[dict[str, Any]]) -> None:
    """Print the rows, and in how much of the opponent's tokens and time ours was done."""
    for row in rows:
        print(
            f"{row['side']}: {row['n_params']:,} parameters, {row['steps']:,} steps, "
            f"{row['tokens']:,} tokens, {row['training_seconds']:.1f} s of training"
        )
        print(
            f"    val_loss {row['val_loss_first_half']:.4f} on the first half of the validation text, "
            f"{row['val_loss_second_half']:.4f} on the second"
        )
    ours, theirs = rows
    print(
        f"ours took 1/{theirs['tokens'] / ours['tokens']:.1f} of the tokens and "
        f"{ours['training_seconds'] / theirs['training_seconds']:.3f} of the training time"
    )
