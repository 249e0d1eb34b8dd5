"""Checks that stop a run before it does harm (a NaN, gradients that are all zero), and advice to the user
when a run fails (no memory left, another process gone)."""

import errno
import json
import math
from typing import Any

import torch

from support.checkpoint import read_metadata
from support.compilers import advice_on_compiling, causes, is_of_compiler
from support.find_checkpoints import find_latest_checkpoint
from support.messages import UserError
from support.run.plan import Plan
from support.weights import first_not_finite

# With a loss below this, nothing is left to learn, so it is normal that every gradient rounds to zero.
LEARNED_LOSS = 1e-3

# ---- bad numbers ---------------------------------------------------------------------------------


def refuse_bad_step(
    plan: Plan, *, step: int, loss: float, grad_norm: float, dataset: Any, stream_state: str | None
) -> None:
    """Raise UserError if the loss or the gradient of a step is not finite, or if every gradient is zero. It
    is called before the weights change, so that no checkpoint can hold a NaN or an infinity.

    `step` counts from 0. `stream_state` says where a stream was before this step; None for other data.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        samples = samples_of_step(plan, step, dataset, stream_state)
        raise not_finite_error(
            plan,
            f"step {step + 1}: loss={loss}, gradient norm={grad_norm} on {samples}; the weights are as "
            "before this step",
            step,
        )
    if grad_norm == 0 and loss > LEARNED_LOSS:
        raise UserError(
            f"step {step + 1}: every gradient is zero while the loss is {loss:.4f}, so nothing would be "
            f"learned; the weights are as before this step\n       try {why_no_gradient(plan)}"
        )


def refuse_bad_val_loss(plan: Plan, *, step: int, val_loss: float) -> None:
    """Raise UserError if the validation loss after `step` steps is not finite."""
    if not math.isfinite(val_loss):
        raise not_finite_error(plan, f"step {step}: val_loss={val_loss} on the validation text", step - 1)


def refuse_bad_weights(plan: Plan, *, step: int, tensors: dict[str, Any], strategy: Any) -> None:
    """Raise UserError, in every process, if a tensor of any process is not finite. Even with a finite
    gradient, one step can be so large that a weight overflows."""
    bad = first_not_finite(tensors)
    if strategy.reduce_boolean_decision(bad is not None, all=False):
        bad = bad or "a shard of the weights"
        raise not_finite_error(
            plan, f"step {step}: {bad} is no longer finite; this step has not been saved", step - 1
        )


def not_finite_error(plan: Plan, what: str, step: int) -> UserError:
    """The error for a number that is not finite; it says what to look at and what to try. `step` counts from
    0."""
    last = find_latest_checkpoint(plan.folder)
    return UserError(
        f"{what}\n       last good checkpoint: {last or 'none yet'}; look at the text with --show-step "
        f"{step + 1}\n"
        "       try a lower training.lr, a longer training.warmup_steps, grad_clip=1.0 or "
        "hardware.precision=32-true"
    )


def samples_of_step(plan: Plan, step: int, dataset: Any, stream_state: str | None) -> str:
    """Says which text a step trains on: `samples 16 to 23 (blocks 4, 91, ...)`, or a position in the
    stream."""
    if plan.data.streaming:
        position = json.loads(stream_state)
        return (
            f"a stream, before document {position['used']} of group {position['group']} in epoch "
            f"{position['epoch']}"
        )
    size = plan.sequences_per_step
    first, last = step * size, (step + 1) * size - 1
    blocks = ", ".join(str(dataset.block_of(sample)) for sample in range(first, last + 1)[:8])
    more = ", ..." if size > 8 else ""
    return f"samples {first} to {last} (blocks {blocks}{more})"


def why_no_gradient(plan: Plan) -> str:
    """What to try when every gradient is zero: advice for the most likely reason."""
    config = plan.config
    if plan.compiles:
        return (
            f"--override training.compile=false: PyTorch {torch.__version__} seems to compile this model "
            "wrongly; or install another version of PyTorch"
        )
    if config.training.freeze:
        return (
            f"to freeze less: with training.freeze={config.training.freeze} nothing is left that this model "
            "can learn with"
        )
    if config.base_ckpt:
        return f"another base_ckpt: no gradient gets through the weights in {config.base_ckpt} (all zero?)"
    return (
        "model.zero_init=false, or hardware.accelerator=cpu: with these first weights, or on this device, no "
        "gradient gets through the network"
    )


# ---- advice --------------------------------------------------------------------------------------


def explain(error: Exception, plan: Plan) -> UserError | None:
    """The same error with advice, if it is not a bug of ours: no memory left, or a data worker or another
    process gone. None for any other error."""
    text = " ".join(str(error).split())
    advice = None
    if is_out_of_memory(error):
        training = plan.config.training
        advice = (
            f"out of memory on {plan.device}: {text[:160]}\n       halve training.micro_batch_size (now "
            f"{training.micro_batch_size}) and double training.grad_accum_steps (now "
            f"{training.grad_accum_steps}); or set model.gradient_checkpointing=true"
        )
    elif plan.config.hardware.num_workers and is_out_of_shared_memory(error):
        advice = (
            "data workers need shared memory (/dev/shm), and there is no room in it\n       try "
            "hardware.num_workers=0, or give the container more: docker run --shm-size=1g"
        )
    elif "DataLoader worker" in text:
        advice = f"a data worker has ended: {text[:160]}\n       try hardware.num_workers=0"
    elif plan.world > 1 and ("gloo/" in text or isinstance(error, torch.distributed.DistError)):
        advice = (
            f"the connection to another process of this run is lost: {text[-160:]}\n       it may have been "
            "killed, possibly for lack of memory: see its output, and the system's log"
        )
    elif plan.compiles and is_of_compiler(error):
        advice = advice_on_compiling(error)
    return UserError(f"{advice}\n       {how_to_resume(plan)}") if advice else None


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was no memory left, in the machine or on its GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = " ".join(str(error).split())
    return "can't allocate memory" in text or "not enough memory" in text


def is_out_of_shared_memory(error: Exception) -> bool:
    """Whether the memory that processes share is full. The system reports that as a full disk, but without
    the name of a file."""
    return any(
        isinstance(cause, OSError) and cause.errno == errno.ENOSPC and cause.filename is None
        for cause in causes(error)
    )


def how_to_resume(plan: Plan) -> str:
    """The newest checkpoint of the run, and the command that resumes from it."""
    last = find_latest_checkpoint(plan.folder)
    if last is None:
        return "nothing had been saved yet"
    command = plan.command.replace(" --fresh", "")
    if "--resume" not in command:
        command += " --resume"
    return f"saved {last} at step {read_metadata(last)['metrics']['step']}; resume with: {command}"
