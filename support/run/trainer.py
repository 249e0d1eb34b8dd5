"""Lightning's trainer and our callbacks, put together for a run."""

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from support.run.metrics import Console, JsonlFile, Metrics, TextSamples
from support.run.plan import Plan
from support.run.saving import AtomicCheckpointIO, CheckpointSaver, StopOnSignal

LOGGERS_TO_QUIET = (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
)


def quiet_lightning() -> None:
    """Hide its notices about loggers, devices and dataloaders, which do not help our readers. Errors still
    show."""
    for name in LOGGERS_TO_QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


def make_callbacks(
    plan: Plan,
    start_step: int,
    *,
    sinks: list[Any],
    console: Console | None,
    stop: StopOnSignal,
    saver: CheckpointSaver,
) -> list[pl.Callback]:
    """What happens after each step, in this order: metrics before checkpoints, so that no row is lost between
    the two. Only the main process has sinks and a console."""
    training = plan.config.training
    metrics = Metrics(
        sinks=sinks,
        log_every=training.log_every,
        n_steps=plan.n_steps,
        sequences_per_step=plan.sequences_per_step,
        device=plan.device,
    )
    callbacks = [metrics, stop, saver]
    if training.sample_every:
        samples = TextSamples(
            tokenizer=plan.tokenizer,
            prompts=training.sample_prompts,
            every=training.sample_every,
            temperature=training.sample_temperature,
            seed=plan.config.seed,
            console=console,
            file=JsonlFile(plan.folder / "samples.jsonl", start_step) if console else None,
        )
        callbacks.append(samples)
    return callbacks


def build_trainer(plan: Plan, callbacks: list[pl.Callback], validates_first: bool) -> pl.Trainer:
    """Lightning's engine: devices, processes, precision, and the loop over steps. Its other features are
    switched off."""
    hardware = plan.config.hardware
    strategy = "auto"
    if plan.world > 1 and hardware.strategy == "fsdp":
        strategy = ModelParallelStrategy(
            data_parallel_size=plan.world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    elif plan.world > 1:
        strategy = DDPStrategy()
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(plan.device, plan.device),
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=strategy,
        precision=plan.precision,
        deterministic=hardware.deterministic,
        max_steps=plan.n_steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=plan.config.training.val_every,
        num_sanity_val_steps=-1
        if validates_first
        else 0,  # -1: the whole validation set, before the first step
        use_distributed_sampler=False,
        logger=False,  # ours get rows and nothing else, and a failure of theirs does not end the run
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
