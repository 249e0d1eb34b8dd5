"""A checkpoint file to (model, tokenizer, metadata) and back; everything on disk is written whole or not at
all.

The file is a Lightning .ckpt of tensors and plain Python types. Weights are under `state_dict` as `net.*`,
our own fields under one key, `tiny_transformer`:

    format_version, model (GPTConfig), tokenizer, config (the whole run's), template (of a conversation, or
    None), lora (of adapters that are not merged yet, or None), metrics (step, tokens, losses), stream_state,
    data_fingerprint, sequences_per_step, run (versions, git commit, command line)
"""

import glob
import hashlib
import os
import re
import reprlib
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lora import merge_adapters
from model import GPTConfig, GPTMini
from support.files.atomic import atomic_write
from support.files.find_files import counted, kind_of, walk
from support.files.safe_archive import (
    Damage,
    check_archive,
    check_legacy,
    check_plain,
    check_tensors,
    named_tensors,
)
from support.foreign.model_files import AS_FOLDER, LEGACY_MAGIC, TORCH, read_from_hub, what_is
from support.messages import UserError, printable, warn
from support.text.chat_template import Template
from tokenizer import Tokenizer, tokenizer_from_dict

KEY = "tiny_transformer"
FORMAT_VERSION = 1

SPECIAL = ("last", "best", "final")  # further names of step files
MISFITS = 20  # kinds of tensors that do not fit, in one message
MAX_CONTEXT = 2**22  # tokens: the one size of a model that no weight need bear out


def save_archive(content: Any, path: Path) -> None:
    """torch.save, whole or not at all. Raises OSError where the disk refuses, which torch hides behind an
    error of its own."""
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def odd_fields(checkpoint: dict[str, Any]) -> list[str]:
    """Names of what is missing or of a type that the rest of the code does not expect."""
    ours, weights = checkpoint[KEY], checkpoint["state_dict"]
    odd = [name for name in ("model", "tokenizer", "metrics") if not isinstance(ours.get(name), dict)]
    odd += [
        repr(name)[:100]
        for name, weight in weights.items()
        if not isinstance(weight, torch.Tensor) or not isinstance(name, str)
    ]
    metrics = {} if "metrics" in odd else ours["metrics"]
    for name in ("step", "tokens", "epoch", "lr", "train_loss", "val_loss", "best_val_loss"):
        value = metrics.get(name, 0)
        count = type(value) is int and 0 <= value < 2**63
        measured = name not in ("step", "tokens") and (value is None or type(value) is float)
        if not (count or measured):
            odd.append(f"metrics.{name}={reprlib.repr(value)}")
    return odd


def open_archive(path: Path, mmap: bool) -> Any:
    """What torch.save put into the file at `path`, after every check that can be made without knowing what
    it is."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(LEGACY_MAGIC))
        if legacy := head == LEGACY_MAGIC:  # it can only be read, not mapped
            check_legacy(path)
        elif not head.startswith(b"PK\x03\x04"):
            what = "an empty file" if path.stat().st_size == 0 else "not a .ckpt archive"
            raise UserError(f"{path} is not a checkpoint ({what}); python3 list.py shows those there are")
        else:
            check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and not legacy)
        check_tensors(checkpoint)
        return checkpoint
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error.strerror or 'truncated or damaged'}); take another one"
        ) from None
    except (
        Exception
    ) as error:  # a damaged file can fail anywhere, in a dozen ways; only our own checks know how
        unsafe = "WeightsUnpickler" in str(error) or "weights_only" in str(error)
        reason = str(error) if isinstance(error, Damage) else "truncated or damaged"
        raise UserError(
            f"checkpoint {path} cannot be opened "
            f"({'it would run code when opened' if unsafe else reason}); take another one"
        ) from None


def read_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """The dictionary in a checkpoint of ours, on the CPU. Only tensors and plain types are ever unpickled.

    Raises UserError for what is missing, truncated, unsafe or not ours.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"checkpoint {path} does not exist; python3 list.py shows those there "
            f"are{read_from_hub(str(path))}"
        )
    if path.is_dir():
        raise UserError(
            f"checkpoint {path} is "
            f"{what_is(path) or 'a folder without a checkpoint; python3 list.py shows those there are'}"
        )
    if not path.is_file():  # reading from a pipe would wait for ever
        raise UserError(f"checkpoint {path} is a pipe, a socket or a device; name a file")
    try:
        checkpoint = open_archive(path, mmap)
    except UserError:
        if (foreign := what_is(path)) and not foreign.startswith(
            TORCH
        ):  # of such a file the reason says more
            raise UserError(f"{path} is not a checkpoint but {foreign}") from None
        raise
    if type(checkpoint) is not dict or KEY not in checkpoint or "state_dict" not in checkpoint:
        foreign = what_is(path) or f"{TORCH} of another program; {AS_FOLDER}"
        raise UserError(f"{path} is not a Tiny Transformer checkpoint (no {KEY!r} in it) but {foreign}")
    weights = checkpoint["state_dict"]
    if (
        not isinstance(checkpoint[KEY], dict)
        or not isinstance(weights, dict)
        or getattr(weights, "__dict__", {}).keys() - {"_metadata"}
    ):
        raise UserError(f"checkpoint {path} is damaged: {KEY!r} and 'state_dict' should both be mappings")
    try:
        check_plain(checkpoint[KEY])
    except Damage as error:
        raise UserError(f"checkpoint {path} is damaged: {error}; take another one") from None
    version = checkpoint[KEY].get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        found = reprlib.repr(version)
        raise UserError(
            f"checkpoint {path} has format_version {found}, this code reads {FORMAT_VERSION}; use the "
            "version of the code that wrote it"
        )
    if odd := odd_fields(checkpoint):
        raise UserError(
            f"checkpoint {path} is damaged: {', '.join(odd[:3])} missing or of the wrong type; take "
            "another one"
        )
    for tree in (checkpoint[KEY], checkpoint[KEY].get("config")):
        if isinstance(tree, dict) and isinstance(tree.get("template"), dict):
            tree["template"].setdefault(
                "special_tokens", False
            )  # an older version, which trained on their names as letters
    return checkpoint


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pytorch_model.bin, after the same checks; mapped and not read, unless PyTorch
    before 1.6 wrote it. Raises UserError."""
    found = open_archive(path, mmap=True)
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise UserError(f"{path} holds something else than named weights")
    return found


def first_not_finite(tree: Any, name: str = "") -> str | None:
    """The name of the first tensor in nested dicts and lists that holds a NaN or an infinity, None if there
    is none.

    Reads each tensor once and copies nothing.

    >>> first_not_finite({"net": [torch.zeros(2), torch.tensor([1.0, float("nan")])]})
    'net.1'
    """
    for path, tensor in named_tensors(tree, name):
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not all(edge.isfinite() for edge in tensor.detach().aminmax())
        ):
            return path
    return None


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Our fields of a checkpoint; weights are mapped, not read, so this takes milliseconds."""
    return read_checkpoint(path)[KEY]


def saved_config(metadata: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint. Raises UserError for a file without one, which can be
    sampled from all the same."""
    if not isinstance(config := metadata.get("config"), dict):
        raise UserError(
            f"checkpoint {source} does not hold the config of its run; take another one, or name a config "
            "where that is possible"
        )
    return config


def saved_template(metadata: dict[str, Any], source: str | Path) -> Template | None:
    """How a checkpoint lays out a conversation; None if it has not been fine-tuned on instructions. Raises
    UserError."""
    if metadata.get("template") is None:
        return None
    try:
        return Template.model_validate(metadata["template"])
    except ValidationError as error:
        raise UserError(
            f"checkpoint {source} has a damaged template ({printable(error.errors()[0]['msg'])[:150]}); "
            "take another one"
        ) from None


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict under plain names: `net.` and what torch.compile or DDP put before a name are taken
    off, and adapters are merged. Raises UserError for adapters that do not fit."""

    def plain(name: str) -> str:
        parts = [part for part in name.split(".") if part not in ("_orig_mod", "module")]
        return ".".join(parts).removeprefix("net.")

    weights = {plain(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    if lora := checkpoint[KEY].get("lora"):
        try:
            return merge_adapters(weights, lora["rank"], lora["alpha"])
        except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError, OverflowError) as error:
            raise UserError(
                f"a checkpoint's adapters do not fit its weights ({printable(error)[:150]}); take another one"
            ) from None
    return weights


def weights_sha256(path: str | Path) -> str:
    """Of all weights in the order of their names: equal if and only if two checkpoints hold the same
    model, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model_weights(read_checkpoint(path)).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy() if tensor.dim() else tensor.numpy())
    return digest.hexdigest()


def write_merged(path: Path, target: Path) -> None:
    """Write the model of a checkpoint with adapters as a plain one: complete for every use but going on
    with the run."""
    checkpoint = read_checkpoint(path)
    ours = {
        name: value
        for name, value in checkpoint[KEY].items()
        if name not in ("sequences_per_step", "data_fingerprint")
    }
    state = {f"net.{name}": tensor for name, tensor in model_weights(checkpoint).items()}
    kept = {
        name: checkpoint[name]
        for name in ("epoch", "global_step", "pytorch-lightning_version")
        if name in checkpoint
    }
    save_archive(kept | {"state_dict": state, KEY: ours | {"lora": None}}, target)


def write_model(path: Path, model: GPTMini, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """A checkpoint of a model that was not trained here: complete for every use but going on with a run."""
    ours = {
        "format_version": FORMAT_VERSION,
        "model": model.config.model_dump(),
        "tokenizer": tokenizer.to_dict(),
        **dict.fromkeys(("config", "template", "lora", "stream_state")),
        "metrics": {"step": 0, "tokens": 0}
        | dict.fromkeys(("epoch", "train_loss", "lr", "val_loss", "best_val_loss")),
        "run": record,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_archive(
        {
            "state_dict": {f"net.{name}": weight for name, weight in model.state_dict().items()},
            "global_step": 0,
            KEY: ours,
        },
        path,
    )


def saved_tokenizer(state: dict[str, Any], source: str) -> Tokenizer:
    """The tokenizer in a checkpoint. Raises UserError, also where the `tokenizers` library panics."""
    try:
        chars = state.get("chars", "")
        if not isinstance(chars, str) or len(set(chars)) < len(chars):
            raise ValueError("its characters should be a text in which none comes twice")
        chars.encode()  # half of a surrogate pair could not be printed
        return tokenizer_from_dict(state)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise UserError(
            f"checkpoint {source} has a damaged tokenizer: "
            f"{printable(' '.join(str(error).split())[:200])}; take another one"
        ) from None


def oversized(sizes: dict[str, Any], weights: Collection[torch.Tensor]) -> str | None:
    """The size of a model that these weights cannot bear out, in words; None if there is none. A million
    layers would take hours and gigabytes even when empty."""
    widths = ("vocab_size", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim")
    limits = dict.fromkeys(widths, max((weight.numel() for weight in weights), default=0)) | {
        "n_layers": len(weights),
        "max_seq_len": MAX_CONTEXT,
    }
    for name, limit in limits.items():
        if isinstance(sizes.get(name), int) and sizes[name] > limit:
            return f"{name}={reprlib.repr(sizes[name])}, but its weights allow {limit} at most"
    return None


def empty_model(checkpoint: dict[str, Any], source: str) -> GPTMini:
    """The model that a checkpoint describes, without memory for its weights (the meta device). Raises
    UserError."""
    sizes = checkpoint[KEY]["model"]
    if wrong := oversized(sizes, checkpoint["state_dict"].values()):
        raise UserError(f"checkpoint {source} is damaged: {wrong}; take another one")
    try:
        with torch.device("meta"):
            return GPTMini(GPTConfig(**sizes))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        what = printable(" ".join(str(error).split())[:200])
        raise UserError(
            f"checkpoint {source} has a damaged description of its model: {what}; take another one"
        ) from None


def load_model(path: str | Path, device: str = "cpu") -> tuple[GPTMini, Tokenizer, dict[str, Any]]:
    """(model in eval mode, tokenizer, metadata) from one checkpoint file; nothing else is needed.

    >>> model, tokenizer, metadata = load_model("checkpoints/final.ckpt")            # doctest: +SKIP
    """
    checkpoint = read_checkpoint(path)
    metadata = checkpoint[KEY]
    tokenizer, model = saved_tokenizer(metadata["tokenizer"], str(path)), empty_model(checkpoint, str(path))
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"checkpoint {path}: the model's head has {model.config.vocab_size} rows but its tokenizer "
            f"{tokenizer.vocab_size} tokens; "
            "they do not belong together"
        )
    load_weights(model, model_weights(checkpoint), str(path))
    return model.to(device).eval(), tokenizer, metadata


def warn_of_other_tokenizer(wanted: str, kind: str, vocab_size: int) -> None:
    """What --tokenizer names is not used where the checkpoint has another one."""
    if wanted not in ("auto", kind):
        warn(
            f"--tokenizer {wanted} is not what this model was trained with; using the checkpoint's own "
            f"({kind}, "
            f"{vocab_size:,} tokens), since ids mean nothing under another vocabulary"
        )


def misfits(wanted: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> str | None:
    """All that keeps `weights` from fitting a model that wants tensors of these names and shapes, in words;
    None if they fit. What is wrong in the same way in many blocks is said once.

    >>> misfits({"layers.0.a": torch.zeros(2), "layers.1.a": torch.zeros(2)}, {"layers.0.a": torch.zeros(3), "layers.1.a": torch.zeros(3)})
    'layers.*.a: expected (2,), provided (3,) (2 times)'
    """
    found: Counter[str] = Counter()
    names: dict[str, str] = {}
    for name in [*wanted, *sorted(weights.keys() - wanted.keys())]:
        expected, given = (tuple(side[name].shape) if name in side else "none" for side in (wanted, weights))
        if expected != given:
            kind = (
                f"{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', name)[:100]}: expected {expected}, provided {given}"
            )
            found[kind] += 1
            names[kind] = f"{name[:100]}: expected {expected}, provided {given}"
    listed = [names[kind] if times == 1 else f"{kind} ({times} times)" for kind, times in found.items()]
    more = f"; and {len(listed) - MISFITS} more" if len(listed) > MISFITS else ""
    return "; ".join(printable(item) for item in listed[:MISFITS]) + more if listed else None


def load_weights(model: GPTMini, weights: dict[str, torch.Tensor], source: str) -> None:
    """Put `weights` into `model`: every name there, every shape right, nothing left over. Raises UserError
    that names all that is not."""
    if wrong := misfits(model.state_dict(), weights):
        raise UserError(f"{source}: weights do not fit the model: {wrong}")
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    if len(dtypes) > 1 or "float" not in dtypes[0]:
        raise UserError(
            f"{source}: weights of {', '.join(dtypes)}; all should be of one kind of float, so take "
            "another checkpoint"
        )
    if bad := first_not_finite(weights):
        raise UserError(
            f"{source}: {bad} holds a NaN or an infinity, so the model can say nothing; take an earlier "
            "checkpoint"
        )
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()


def find_checkpoints(paths: list[str]) -> list[Path]:
    """Every checkpoint that files, folders (at any depth) and globs name, each once: where `last`, `best`
    or `final` is a step file by another name, or a copy of it beside it, the step file stands for all.
    Raises UserError for a path that names none."""
    found: dict[Any, Path] = {}
    for path in paths:
        hidden = ""
        if os.path.isdir(path):
            files, left_out = walk(path)
            here = [file for file in files if kind_of(file) == ".ckpt"]  # also what is no file, to be told
            here += [
                folder for folder in Path(path).rglob("*.ckpt") if folder.is_dir()
            ]  # of a sharded checkpoint, say
            hidden = f" ({counted(left_out)} left out)" if left_out else ""
        else:
            here = [file for file in map(Path, [*glob.glob(path, recursive=True), path]) if file.is_file()]
        if not here:
            foreign = what_is(Path(path)) if os.path.isdir(path) else None
            if foreign:
                raise UserError(f"{path} is {foreign}")
            raise UserError(
                f"{path}: no checkpoint (.ckpt) there{hidden}; python3 train.py --config config_smoke.yaml "
                "makes some"
            )
        for file in here:
            status = file.stat() if file.exists() else None  # a link to nothing has none
            same = (status.st_dev, status.st_ino) if status else file
            found[same] = min(found.get(same, file), file, key=_first_name)
    return _each_content_once(found.values())


def _each_content_once(files: Iterable[Path]) -> list[Path]:
    """A plain copy of a run's folder turns the further names of a step file into files of their own."""
    alike: dict[Any, list[Path]] = {}
    for file in sorted(files, key=_first_name):
        alike.setdefault((file.parent, file.stat().st_size if file.exists() else file), []).append(file)
    kept: dict[Any, Path] = {}
    for group in alike.values():
        for file in group:
            kept.setdefault((file.parent, _content(file) or file) if len(group) > 1 else file, file)
    return sorted(kept.values())


def _first_name(file: Path) -> tuple[bool, int, Path]:
    """Sorts the name that stands for all names of a checkpoint before the others: a step file's."""
    return not file.name.startswith("step-"), len(file.parts), file


def _content(path: Path) -> tuple | None:
    """Equal for archives of equal content: the checksums of all parts, which an archive's table holds, so
    that no weight is read. None for a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(
                (part.filename.partition("/")[2], part.file_size, part.CRC) for part in archive.infolist()
            )
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return None


def other_names(path: Path) -> list[str]:
    """Which other checkpoints in its folder are this very file, or a copy of it."""
    if not path.is_file():
        return []
    size, others = (
        path.stat().st_size,
        [file for file in path.parent.glob("*.ckpt") if file.name != path.name and file.is_file()],
    )
    same = [
        file.stem
        for file in others
        if file.stat().st_size == size and (file.samefile(path) or _content(file) == (_content(path) or ()))
    ]
    return sorted(
        same, key=lambda name: (name not in SPECIAL, SPECIAL.index(name) if name in SPECIAL else 0, name)
    )


def step_of(path: Path) -> int:
    """The step in a step file's name: step-0000500.ckpt is 500."""
    return int(path.stem.removeprefix("step-"))


def step_files(folder: str | Path) -> list[Path]:
    """The step checkpoints of a run, oldest first."""
    return sorted(
        (p for p in Path(folder).glob("step-*.ckpt") if p.stem.removeprefix("step-").isdecimal()), key=step_of
    )


def find_latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest readable checkpoint of a run, None if there is none; damaged files are skipped with a
    warning."""
    folder = Path(folder)
    candidates = [
        *reversed(step_files(folder)),
        *(p for name in ("last", "final", "best") if (p := folder / f"{name}.ckpt").exists()),
    ]
    for path in candidates:
        try:
            read_metadata(path)
        except UserError as error:
            warn(f"{printable(error)}; skipped")
            continue
        return path
    return None
