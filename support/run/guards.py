"""What a user can do when a run fails: memory that ran out, a lost process, gradients that are all zero."""

import errno

import torch

from support.checkpoint import read_metadata
from support.config.schema import Config
from support.find_checkpoints import find_latest_checkpoint
from support.messages import UserError
from support.run.compiling import advice_on_compiling, causes, is_of_compiler
from support.run.plan import Plan

# ---- what is said --------------------------------------------------------------------------------


def explain(error: Exception, plan: Plan) -> UserError | None:
    """What a user can do about an error that is not ours: memory that ran out, a data worker or another
    process that is gone."""
    text = " ".join(str(error).split())
    if (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in text
        or "not enough memory" in text
    ):
        training = plan.config.training
        return UserError(
            f"out of memory on {plan.device}: {text[:160]}\n       halve training.micro_batch_size (now "
            f"{training.micro_batch_size}) and double training.grad_accum_steps (now "
            f"{training.grad_accum_steps}); "
            f"or model.gradient_checkpointing=true\n       {how_to_resume(plan)}"
        )
    no_room = any(
        isinstance(cause, OSError) and cause.errno == errno.ENOSPC and cause.filename is None
        for cause in causes(error)
    )
    if (
        plan.config.hardware.num_workers and no_room
    ):  # no file is full, so it is where processes share their memory
        return UserError(
            "data workers need shared memory (/dev/shm), and there is no room in it\n       try "
            "hardware.num_workers=0, or give the container "
            f"more: docker run --shm-size=1g\n       {how_to_resume(plan)}"
        )
    if "DataLoader worker" in text:
        return UserError(
            f"a data worker has ended: {text[:160]}\n       try hardware.num_workers=0\n       "
            f"{how_to_resume(plan)}"
        )
    if plan.world > 1 and ("gloo/" in text or isinstance(error, torch.distributed.DistError)):
        return UserError(
            f"the connection to another process of this run is lost: {text[-160:]}\n       it may have "
            "been killed, for want of memory "
            f"too: see what it said, and the system's log\n       {how_to_resume(plan)}"
        )
    if plan.config.training.compile and is_of_compiler(error):
        return UserError(f"{advice_on_compiling(error)}\n       {how_to_resume(plan)}")
    return None


def why_no_gradient(config: Config) -> str:
    """What to try where every gradient is zero, the likeliest reason alone."""
    if config.training.compile:
        return (
            f"--override training.compile=false: PyTorch {torch.__version__} seems to compile this model "
            "wrongly; or another version of it"
        )
    if config.training.freeze:
        return (
            f"to freeze less: of training.freeze={config.training.freeze} nothing is left that this model "
            "can learn with"
        )
    if config.base_ckpt:
        return f"another base_ckpt: the weights in {config.base_ckpt} pass nothing on (are they all zero?)"
    return (
        "model.zero_init=false, or hardware.accelerator=cpu: by the way it begins, or on this device, the "
        "network passes nothing on"
    )


def how_to_resume(plan: Plan) -> str:
    """The newest checkpoint of the run, and the command that goes on from it."""
    last = find_latest_checkpoint(plan.folder)
    if last is None:
        return "nothing had been saved yet"
    command = plan.command.replace(" --fresh", "")
    if "--resume" not in command:
        command += " --resume"
    return f"saved {last} at step {read_metadata(last)['metrics']['step']}; go on with: {command}"
