"""Lightning's trainer and our callbacks, put together for a run."""

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
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
    """Hide Lightning's notices about loggers, devices and dataloaders, which do not help our readers. Errors
    are still shown."""
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
    """The callbacks of a run, in the order in which Lightning calls them after each step: metrics come before
    checkpoints, so that a checkpoint never exists without the rows of metrics up to it.

    `sinks` are what takes the rows of metrics. Only the main process has sinks and a console.
    """
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


def allow_tf32(plan: Plan) -> None:
    """Let PyTorch multiply float32 matrices in TF32, if the config says so and the device may have it."""
    if plan.config.hardware.tf32 and plan.device == "cuda":
        torch.set_float32_matmul_precision("high")


def build_trainer(plan: Plan, callbacks: list[pl.Callback], validates_first: bool) -> pl.Trainer:
    """Lightning's trainer, which handles devices, processes, precision and the loop over steps. Its other
    features are switched off."""
    hardware = plan.config.hardware
    allow_tf32(plan)
    val_batches_before_training = -1 if validates_first else 0  # -1: the whole validation set
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
        num_sanity_val_steps=val_batches_before_training,
        use_distributed_sampler=False,
        logger=False,  # we log through `sinks`: if one of them fails, the run continues
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
