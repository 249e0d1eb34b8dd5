"""A run's folder on disk: which files are a run's, whether a new run may write there, and moving an
earlier run aside."""

import importlib.metadata
import importlib.util
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
)
RUN_FILES += ("wandb_id.txt", "run_config.yaml", "final.ckpt")


# ---- the folder ----------------------------------------------------------------------------------


def run_files(folder: Path) -> list[Path]:
    """What a run has written into its folder, `final.ckpt` last."""
    return [path for pattern in RUN_FILES for path in sorted(folder.glob(pattern))]


def refuse_unwritable(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists; UserError if no run could write there."""
    nearest = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"checkpoint.dir={folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(
            f"checkpoint.dir={folder}: {nearest} cannot be written; choose another by --override "
            "checkpoint.dir=PATH"
        )
    return nearest


def refuse_unfinished(folder: Path) -> None:
    """Raise UserError if `folder` holds a run that did not reach its end: it is never overwritten."""
    if (folder / "final.ckpt").exists() or not any(path.suffix == ".ckpt" for path in run_files(folder)):
        return
    raise UserError(
        f"{folder} holds an unfinished run; go on with it by --resume, move it aside by --fresh,\n"
        f"       or write elsewhere by --override checkpoint.dir={folder}-2"
    )


def move_aside(folder: Path) -> Path | None:
    """Move an earlier run's files to the first free `old-<n>` in the same folder; returns that, or None if
    there are none."""
    files = run_files(folder)
    if not any(path.suffix == ".ckpt" for path in files):
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
    """What is needed to repeat a run besides its config: versions, git commit, command line."""
    names = ("torch", "lightning", "numpy", "tokenizers", "tiktoken", "datasets")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    here = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5)
        commit = answer.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "versions": versions,
        "git_commit": commit,
        "command": shlex.join(sys.argv),
        "threads": torch.get_num_threads(),
    }


def write_run_config(folder: Path, config: Config, record: dict[str, Any]) -> None:
    """run_config.yaml: the whole config as it was understood, with the run's record as comments on top."""
    header = [
        f"# {key}: {value}".replace("\n", " ")
        for key, value in (record["versions"] | {k: record[k] for k in ("git_commit", "command")}).items()
    ]
    with atomic_write(folder / "run_config.yaml") as file:
        file.write(("\n".join(header) + "\n" + dump_yaml(config.to_dict())).encode())
