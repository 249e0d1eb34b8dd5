"""A checkpoint file to (model, tokenizer, metadata) and back; everything on disk is written whole or not at all.

The file is a Lightning .ckpt of tensors and plain Python types. Weights are under `state_dict` as `net.*`, our own
fields under one key, `tiny_transformer`:

    format_version, model (GPTConfig), tokenizer, config (the whole run's), template, metrics (step, tokens, losses),
    stream_state, data_fingerprint, sequences_per_step, run (versions, git commit, command line)
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from model import GPTConfig, GPTMini
from support.cli import UserError, warn
from tokenizer import Tokenizer, tokenizer_from_dict

KEY = "tiny_transformer"
FORMAT_VERSION = 1


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` at the end: complete, or as it was before if anything goes wrong."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` be another name of `source`'s content (a hard link; a copy where links fail), atomically."""
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)  # rename leaves it where both names already were one file


def read_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """The dictionary in a checkpoint of ours, on the CPU. Only tensors and plain types are ever unpickled.

    Raises UserError for what is missing, truncated, unsafe or not ours.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"checkpoint {path} does not exist; python3 list.py shows those there are")
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder; name a file in it, e.g. {path / 'final.ckpt'}")
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise UserError(f"{path} is not a checkpoint ({'an empty file' if path.stat().st_size == 0 else 'not a .ckpt archive'})")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can fail anywhere in torch.load, in a dozen ways
        reason = "it would run code when opened" if "WeightsUnpickler" in str(error) or "weights_only" in str(error) else "truncated or damaged"
        raise UserError(f"checkpoint {path} cannot be opened ({reason}); take another one") from None
    if not isinstance(checkpoint, dict) or KEY not in checkpoint or "state_dict" not in checkpoint:
        raise UserError(f"{path} is a PyTorch file but not a Tiny Transformer checkpoint (no {KEY!r} in it)")
    if not isinstance(checkpoint[KEY], dict) or not isinstance(checkpoint["state_dict"], dict):
        raise UserError(f"checkpoint {path} is damaged: {KEY!r} and 'state_dict' should both be mappings")
    version = checkpoint[KEY].get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {path} has format_version {version}, this code reads {FORMAT_VERSION}; use the version of the code that wrote it"
        )
    damaged = [name for name in ("model", "tokenizer", "metrics") if not isinstance(checkpoint[KEY].get(name), dict)]
    damaged += [name for name, weight in checkpoint["state_dict"].items() if not isinstance(weight, torch.Tensor)]
    if damaged:
        raise UserError(f"checkpoint {path} is damaged: {', '.join(map(str, damaged[:3]))} missing or of the wrong type; take another one")
    return checkpoint


def first_not_finite(tree: Any, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts and lists that holds a NaN or an infinity, None if there is none.

    Reads each tensor once and copies nothing.

    >>> first_not_finite({"net": [torch.zeros(2), torch.tensor([1.0, float("nan")])]})
    'net.1'
    """
    todo, seen = [(name, tree)], set()
    while todo:  # a loop, with the names still to visit: a tree of any depth, or one that holds itself, ends
        name, value = todo.pop()
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and value.numel() and not all(edge.isfinite() for edge in value.detach().aminmax()):
                return name
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{name}.{key}" if name else str(key), item) for key, item in reversed(list(inner))]
    return None


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Our fields of a checkpoint; weights are mapped, not read, so this takes milliseconds."""
    return read_checkpoint(path)[KEY]


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict under plain names: `net.` and what torch.compile or DDP put before a name are taken off."""

    def plain(name: str) -> str:
        parts = [part for part in name.split(".") if part not in ("_orig_mod", "module")]
        return ".".join(parts).removeprefix("net.")

    return {plain(name): tensor for name, tensor in checkpoint["state_dict"].items()}


def load_model(path: str | Path, device: str = "cpu") -> tuple[GPTMini, Tokenizer, dict[str, Any]]:
    """(model in eval mode, tokenizer, metadata) from one checkpoint file; nothing else is needed.

    >>> model, tokenizer, metadata = load_model("checkpoints/final.ckpt")            # doctest: +SKIP
    """
    checkpoint = read_checkpoint(path)
    metadata = checkpoint[KEY]
    try:
        tokenizer = tokenizer_from_dict(metadata["tokenizer"])
        config = GPTConfig(**metadata["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path} has a damaged description of its model or tokenizer: {' '.join(str(error).split())[:200]}") from None
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"checkpoint {path}: the model's head has {config.vocab_size} rows but its tokenizer {tokenizer.vocab_size} tokens; "
            "they do not belong together"
        )
    with torch.device("meta"):  # shapes only: the weights come from the file
        model = GPTMini(config)
    load_weights(model, model_weights(checkpoint), str(path))
    return model.to(device).eval(), tokenizer, metadata


def load_weights(model: GPTMini, weights: dict[str, torch.Tensor], source: str) -> None:
    """Put `weights` into `model`: every name there, every shape right, nothing left over. Raises UserError."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or extra:
        raise UserError(f"{source}: weights do not fit the model; missing {missing[:3] or 'none'}, not expected {extra[:3] or 'none'}")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise UserError(f"{source}: {name} has shape {tuple(weights[name].shape)}, the model expects {tuple(shape)}")
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()


def step_of(path: Path) -> int:
    """The step in a step file's name: step-0000500.ckpt is 500."""
    return int(path.stem.removeprefix("step-"))


def step_files(folder: str | Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    return sorted((p for p in Path(folder).glob("step-*.ckpt") if p.stem.removeprefix("step-").isdigit()), key=step_of)


def find_latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest readable checkpoint of a run, None if there is none; damaged files are skipped with a warning."""
    folder = Path(folder)
    candidates = [*reversed(step_files(folder)), *(p for name in ("last", "final", "best") if (p := folder / f"{name}.ckpt").exists())]
    for path in candidates:
        try:
            read_metadata(path)
        except UserError as error:
            warn(f"{error}; skipped")
            continue
        return path
    return None
