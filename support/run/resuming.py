"""Whether a run can be resumed from a checkpoint with this config and this data."""

from pathlib import Path
from typing import Any

from support.checkpoint import read_metadata
from support.config.read import validate_config
from support.config.schema import Config
from support.config.values import flat_keys
from support.messages import UserError

# Keys that may change when a run is resumed, or how such keys begin: how long the run is, what it shows, and
# where it runs. `compare_data` compares the size of a step and the text.
MAY_CHANGE = (
    "training.max_steps",
    "training.epochs",
    "training.schedule_steps",
    "training.micro_batch_size",
    "training.grad_accum_steps",
    "training.compile",
    "training.val_every",
    "training.val_batches",
    "training.train_eval_batches",
    "training.log_every",
    "training.sample_",
    "data.path",
    "data.val_path",
    "model.gradient_checkpointing",
    "hardware.",
    "checkpoint.",
    "logging.",
)


def read_run(path: Path) -> dict[str, Any]:
    """The metadata (config, tokenizer, progress) of a checkpoint that a run can resume from. Raises UserError
    if it holds only a model."""
    metadata = read_metadata(path)
    missing = {"config", "sequences_per_step", "data_fingerprint", "run"} - metadata.keys()
    if missing or not isinstance(metadata["config"], dict):
        what = ", ".join(sorted(missing)) or "config"
        raise UserError(
            f"checkpoint {path} holds a model but no run to resume ({what} missing); it can be the base of a "
            f"new one: python3 finetune.py --config config_finetune.yaml --override base_ckpt={path}"
        )
    return metadata


def in_folder(checkpoint: Path | None, folder: Path) -> bool:
    """Whether a run that resumes from `checkpoint` and writes to `folder` continues the run that is there."""
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def compare_configs(saved: dict, config: Config, source: Path) -> None:
    """Raise UserError if a key has changed that would make this another run. The error gives old and new
    values."""
    old = flat_keys(validate_config(saved, str(source)).to_dict())
    new = flat_keys(config.to_dict())
    changed = [key for key in new if new[key] != old.get(key) and not key.startswith(MAY_CHANGE)]
    if changed:
        listed = "; ".join(f"{key} was {old.get(key)!r} and is now {new[key]!r}" for key in changed[:5])
        raise UserError(
            f"cannot resume {source} with another config: {listed}; change it back, or start a new run "
            "with --fresh"
        )


def compare_data(metadata: dict, sequences_per_step: int, fingerprint: str | None) -> None:
    """Raise UserError if the text has changed, or the number of sequences in a step."""
    if metadata["sequences_per_step"] != sequences_per_step:
        raise UserError(
            f"cannot resume: a step had {metadata['sequences_per_step']} sequences and would now have "
            f"{sequences_per_step} (micro_batch_size x grad_accum_steps x devices x num_nodes); keep the "
            "product"
        )
    if metadata["data_fingerprint"] != fingerprint:
        raise UserError(
            "cannot resume: the training text has changed since this run began; restore it, or start a new "
            "run with --fresh"
        )
