"""A run's folder on disk: which files belong to the run, whether a new run may write there, how an earlier
run is moved aside, and what is recorded so that a run can be repeated."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from support.config.schema import Config
from support.files.atomic import atomic_write
from support.files.safe_yaml import dump_yaml
from support.messages import UserError

# Patterns of the files that a run writes into its folder.
RUN_FILES = (
    "step-*.ckpt",
    "last.ckpt",
    "best.ckpt",
    "metrics.jsonl",
    "samples.jsonl",
    "loss.svg",
    "loss.png",
    "tensorboard",
    "wandb",
    "wandb_id.txt",
    "run_config.yaml",
    "final.ckpt",  # keep it last: a run is finished when it has this file, so it is moved last too
)


def run_files(folder: Path) -> list[Path]:
    """The files of a run in this folder, `final.ckpt` last."""
    return [path for pattern in RUN_FILES for path in sorted(folder.glob(pattern))]


def has_checkpoint(files: list[Path]) -> bool:
    return any(path.suffix == ".ckpt" for path in files)


def refuse_unwritable(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists. Raises UserError if no run can write there."""
    nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"checkpoint.dir={folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(
            f"checkpoint.dir={folder}: {nearest} cannot be written; choose another with --override "
            "checkpoint.dir=PATH"
        )
    return nearest


def refuse_unfinished(folder: Path) -> None:
    """Raise UserError if `folder` holds a run that has not reached its end, since that is never
    overwritten."""
    if has_checkpoint(run_files(folder)) and not (folder / "final.ckpt").exists():
        raise UserError(
            f"{folder} holds an unfinished run; resume it with --resume, move it aside with --fresh,\n"
            f"       or write elsewhere with --override checkpoint.dir={folder}-2"
        )


def refuse_base_in_folder(base_ckpt: str, folder: Path) -> None:
    """Raise UserError if `base_ckpt` belongs to the earlier run in `folder`: the new run would move that run
    aside, and its own base with it."""
    if Path(base_ckpt).resolve() in [file.resolve() for file in run_files(folder)]:
        raise UserError(
            f"base_ckpt={base_ckpt} is in checkpoint.dir, whose run this one would move aside; write "
            f"elsewhere with --override checkpoint.dir={folder}-2"
        )


def move_aside(folder: Path) -> Path | None:
    """Move the files of an earlier run into a new folder inside `folder`: `old-1`, `old-2`, ... Returns the
    new folder, or None if there was no run."""
    files = run_files(folder)
    if not has_checkpoint(files):
        return None
    number = 1
    while (folder / f"old-{number}").exists():
        number += 1
    target = folder / f"old-{number}"
    target.mkdir()
    for path in files:
        path.rename(target / path.name)
    return target


def run_record() -> dict[str, Any]:
    """What one needs to repeat a run, besides its config: versions of packages, git commit, command line."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "lightning", "numpy", "tokenizers", "tiktoken", "datasets"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "git_commit": git_commit(),
        "command": shlex.join(sys.argv),
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """The git commit of this code, followed by `-dirty` if files have been changed since; None if there is no
    git."""
    here = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def write_run_config(folder: Path, config: Config, record: dict[str, Any]) -> None:
    """Write run_config.yaml: every key of the config with the value in use, below the run's record in
    comments."""
    comments = {**record["versions"], "git_commit": record["git_commit"], "command": record["command"]}
    header = [f"# {key}: {value}".replace("\n", " ") for key, value in comments.items()]
    with atomic_write(folder / "run_config.yaml") as file:
        file.write(("\n".join(header) + "\n" + dump_yaml(config.to_dict())).encode())
