"""What train.py adds to a bare loop: Lightning, metrics, the console, reading the data.

Both train the same model on the same batches. The bare loop is what one would write by hand: no check, no
metrics, batches in memory.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from data import make_dataloaders
from model import GPTMini
from optim import build_optimizer
from support.benchmark.model_speed import count_params
from support.benchmark.rounds import Side
from support.benchmark.subject import Subject, on_device, overrides_of
from support.run.estimates import time_when_done
from support.run.plan import Plan, plan_run

FIRST_TIMED, N_STEPS = 10, 41  # steps 0 to 9 warm up; the last one is not timed: validation follows it
SETTINGS = (  # for a short run that is timed; log_every is the default; the user's --override come after them
    "training.epochs=null",
    "training.schedule_steps=null",
    "training.warmup_steps=0",
    "training.val_every=1000000",
    "training.val_batches=1",
    "training.train_eval_batches=0",
    "training.sample_every=null",
    "training.log_every=10",
    "checkpoint.save_every=1000000",
)


def plan_overhead(args: argparse.Namespace, folder: str) -> Plan:
    """The plan of the run that is timed. Raises UserError."""
    length = f"training.max_steps={N_STEPS}"
    overrides = [*SETTINGS, *overrides_of(args), length, f"checkpoint.dir={folder}"]
    return plan_run(
        argparse.Namespace(
            config=args.config or "config_smoke.yaml",
            override=overrides,
            seed=None,
            device=None,
            resume=None,
            fresh=True,
        ),
        finetuning=False,
        only_looks=False,
    )


def overhead_sides(plan: Plan, run: Callable[..., int], module_class: type) -> list[Callable[[], Side]]:
    """Builders of the sides: `run` of train.py with its module class, and the bare loop."""
    return [
        lambda: Side(
            "train.py", lambda: seconds_of_run(plan, run, module_class), note=plan.config.training.optimizer
        ),
        lambda: bare_side(plan),
    ]


def seconds_per_step(starts: list[float]) -> float:
    """From the times at which steps 0, 1, ... began."""
    return (starts[-1] - starts[FIRST_TIMED]) / (len(starts) - 1 - FIRST_TIMED)


def seconds_of_run(plan: Plan, run: Callable[..., int], module_class: type) -> float:
    """Train as train.py does, in a folder of its own; returns the seconds of a step."""
    starts: list[float] = []

    class Timed(module_class):
        def training_step(self, *args: Any) -> None:
            starts.append(time_when_done(plan.device))
            super().training_step(*args)

    with tempfile.TemporaryDirectory() as folder:
        plan.config.checkpoint.dir = folder
        with contextlib.redirect_stdout(io.StringIO()):
            status = run(plan, Timed)
    if status:  # Ctrl-C ends a run in order, after its step
        raise KeyboardInterrupt
    return seconds_per_step(starts)


def bare_side(plan: Plan) -> Side:
    """The same training as a loop of a few lines."""
    subject = Subject("", plan.config, plan.model_config, plan.device, plan.tokenizer, plan.data)
    loader, _ = make_dataloaders(plan.config, plan.data, plan.tokenizer, N_STEPS)
    steps = [[on_device(batch, plan.device) for batch in step.micro_batches] for step in loader]
    net = subject.new_model().train()

    def run() -> float:
        return seconds_of_loop(net, steps, subject)

    return Side("bare loop", run, n_params=count_params(net))


def seconds_of_loop(net: GPTMini, steps: list[list[dict]], subject: Subject) -> float:
    """Train on the steps; returns the seconds of a step."""
    training = subject.config.training
    optimizer = build_optimizer(net, training)
    starts = []
    for micro_batches in steps:
        starts.append(time_when_done(subject.device))
        for batch in micro_batches:
            with subject.autocast():
                loss_sum, n_targets = net(**batch)
            (loss_sum / n_targets / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), training.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    return seconds_per_step(starts)
