"""A checkpoint is one file that holds a model, its tokenizer and the state of its run. Here it is read
safely, turned back into a model, and written whole or not at all.

The file is a Lightning .ckpt of tensors and plain Python types. The weights are under `state_dict`, as
`net.*`. Our own fields are under one key, `tiny_transformer`:

    format_version       a number; this code reads and writes FORMAT_VERSION
    model                the fields of GPTConfig
    tokenizer            the whole tokenizer, as `tokenizer_from_dict` reads it
    config               the config of the run; None for a model that was not trained here
    template             how a conversation is laid out; None unless fine-tuned on instructions
    lora                 rank and alpha of adapters that are not merged yet; None without adapters
    metrics              step, tokens and losses so far
    stream_state         the position in a stream of documents; None for data of known length
    data_fingerprint     tells whether the training data is still the same
    sequences_per_step   size of the whole step
    run                  versions, git commit, command line
"""

import hashlib
import reprlib
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from lora import merge_adapters
from model import GPTConfig, GPTMini
from support.files.atomic import atomic_write
from support.files.safe_archive import Damage, check_archive, check_legacy, check_plain, check_tensors
from support.foreign.model_files import AS_FOLDER, LEGACY_MAGIC, TORCH, read_from_hub, what_is
from support.messages import UserError, printable
from support.text.chat_template import Template
from support.weights import load_weights, oversized
from tokenizer import Tokenizer, tokenizer_from_dict

KEY = "tiny_transformer"  # checkpoint[KEY] holds the fields that this project adds to Lightning's
FORMAT_VERSION = 1

# ---- reading -------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """The dictionary in one of our checkpoints, on the CPU. Only tensors and plain types are read:
    anything else could run code. With `mmap`, each weight is read from the disk when it is first used.

    Raises UserError for a file that is missing, truncated, unsafe or not ours.
    """
    path = Path(path)
    _refuse_what_is_no_file(path)
    try:
        checkpoint = open_archive(path, mmap)
    except UserError:
        foreign = what_is(path)
        if foreign and not foreign.startswith(TORCH):  # for a file of PyTorch the first reason says more
            raise UserError(f"{path} is not a checkpoint but {foreign}") from None
        raise
    _check_layout(checkpoint, path)
    if odd := odd_fields(checkpoint):
        raise UserError(
            f"checkpoint {path} is damaged: {', '.join(odd[:3])} missing or of the wrong type; "
            "take another one"
        )
    for tree in (checkpoint[KEY], checkpoint[KEY].get("config")):
        if isinstance(tree, dict) and isinstance(tree.get("template"), dict):
            # Written by an older version, which trained on the names of special tokens as text.
            tree["template"].setdefault("special_tokens", False)
    return checkpoint


def _refuse_what_is_no_file(path: Path) -> None:
    """Raise UserError for a missing file, a folder, or something that could block for ever when opened."""
    if not path.exists():
        raise UserError(
            f"checkpoint {path} does not exist; python3 list.py shows those there "
            f"are{read_from_hub(str(path))}"
        )
    if path.is_dir():
        what = what_is(path) or "a folder without a checkpoint; python3 list.py shows those there are"
        raise UserError(f"checkpoint {path} is {what}")
    if not path.is_file():
        raise UserError(f"checkpoint {path} is a pipe, a socket or a device; name a file")


def open_archive(path: Path, mmap: bool) -> Any:
    """What torch.save put into the file at `path`, checked as far as possible without knowing what it should
    be. Raises UserError if it cannot be read, or would run code when opened."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(LEGACY_MAGIC))
        legacy = head == LEGACY_MAGIC
        if legacy:
            check_legacy(path)
        elif not head.startswith(b"PK\x03\x04"):
            what = "an empty file" if path.stat().st_size == 0 else "not a .ckpt archive"
            raise UserError(f"{path} is not a checkpoint ({what}); python3 list.py shows those there are")
        else:
            check_archive(path)
        # A legacy file can only be read, not mapped.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and not legacy)
        check_tensors(checkpoint)
        return checkpoint
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error.strerror or 'truncated or damaged'}); take another one"
        ) from None
    except Exception as error:  # a damaged file can fail anywhere, in a dozen ways
        if "WeightsUnpickler" in str(error) or "weights_only" in str(error):
            reason = "it would run code when opened"
        elif isinstance(error, Damage):
            reason = str(error)
        else:
            reason = "truncated or damaged"
        raise UserError(f"checkpoint {path} cannot be opened ({reason}); take another one") from None


def _check_layout(checkpoint: Any, path: Path) -> None:
    """Raise UserError unless this is one of our checkpoints, of this format version, with plain fields."""
    if type(checkpoint) is not dict or KEY not in checkpoint or "state_dict" not in checkpoint:
        foreign = what_is(path) or f"{TORCH} of another program; {AS_FOLDER}"
        raise UserError(f"{path} is not a Tiny Transformer checkpoint (no {KEY!r} in it) but {foreign}")
    ours, weights = checkpoint[KEY], checkpoint["state_dict"]
    added_to_weights = getattr(weights, "__dict__", {}).keys() - {"_metadata"}  # PyTorch itself adds that
    if not isinstance(ours, dict) or not isinstance(weights, dict) or added_to_weights:
        raise UserError(f"checkpoint {path} is damaged: {KEY!r} and 'state_dict' should both be mappings")
    try:
        check_plain(ours)
    except Damage as error:
        raise UserError(f"checkpoint {path} is damaged: {error}; take another one") from None
    version = ours.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"checkpoint {path} has format_version {reprlib.repr(version)}, this code reads "
            f"{FORMAT_VERSION}; use the version of the code that wrote it"
        )


def odd_fields(checkpoint: dict[str, Any]) -> list[str]:
    """The names of fields that are missing, or not of the type that the rest of the code expects."""
    ours, weights = checkpoint[KEY], checkpoint["state_dict"]
    odd = [name for name in ("model", "tokenizer", "metrics") if not isinstance(ours.get(name), dict)]
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor) or not isinstance(name, str):
            odd.append(repr(name)[:100])
    metrics = {} if "metrics" in odd else ours["metrics"]
    for name in ("step", "tokens", "epoch", "lr", "train_loss", "val_loss", "best_val_loss"):
        value = metrics.get(name, 0)
        is_count = type(value) is int and 0 <= value < 2**63
        # step and tokens are always counts; the others can also be a float, or None while unknown.
        is_measured = name not in ("step", "tokens") and (value is None or type(value) is float)
        if not (is_count or is_measured):
            odd.append(f"metrics.{name}={reprlib.repr(value)}")
    return odd


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pytorch_model.bin, after the same checks. Each is read from the disk when it is first
    used, unless PyTorch before 1.6 wrote the file. Raises UserError if it holds something else."""
    tensors = open_archive(path, mmap=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{path} holds something else than named weights")
    return tensors


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Our fields of a checkpoint. The weights are not read, so this takes milliseconds."""
    return read_checkpoint(path)[KEY]


# ---- its parts -----------------------------------------------------------------------------------


def load_model(path: str | Path, device: str = "cpu") -> tuple[GPTMini, Tokenizer, dict[str, Any]]:
    """(model in eval mode, tokenizer, metadata) from a checkpoint; no other file is needed.

    >>> model, tokenizer, metadata = load_model("checkpoints/final.ckpt")            # doctest: +SKIP
    """
    checkpoint = read_checkpoint(path)
    metadata = checkpoint[KEY]
    tokenizer = saved_tokenizer(metadata["tokenizer"], str(path))
    model = empty_model(checkpoint, str(path))
    if model.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"checkpoint {path}: the model's head has {model.config.vocab_size} rows but its tokenizer "
            f"{tokenizer.vocab_size} tokens; they do not belong together"
        )
    load_weights(model, model_weights(checkpoint), str(path))
    return model.to(device).eval(), tokenizer, metadata


def empty_model(checkpoint: dict[str, Any], source: str) -> GPTMini:
    """The model that a checkpoint describes, still without weights: on the "meta" device a tensor has a shape
    but no numbers, and takes no memory. Raises UserError if the description is damaged."""
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


def model_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under plain names, with adapters merged. Raises UserError if adapters do
    not fit."""

    def plain(name: str) -> str:
        """The name without `net.`, and without what torch.compile or DDP put into it."""
        parts = [part for part in name.split(".") if part not in ("_orig_mod", "module")]
        return ".".join(parts).removeprefix("net.")

    weights = {plain(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    lora = checkpoint[KEY].get("lora")
    if not lora:
        return weights
    try:
        return merge_adapters(weights, lora["rank"], lora["alpha"])
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"a checkpoint's adapters do not fit its weights ({printable(error)[:150]}); take another one"
        ) from None


def weights_sha256(path: str | Path) -> str:
    """The sha256 of all weights, in the order of their names. Two checkpoints have the same one only if their
    weights are the same, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model_weights(read_checkpoint(path)).items()):
        digest.update(name.encode())
        # as bytes, because NumPy has no bf16; a tensor without dimensions cannot be viewed as bytes
        digest.update(tensor.contiguous().view(torch.uint8).numpy() if tensor.dim() else tensor.numpy())
    return digest.hexdigest()


def saved_tokenizer(state: dict[str, Any], source: str) -> Tokenizer:
    """The tokenizer in a checkpoint. Raises UserError if it is damaged, even if the `tokenizers` library
    panics."""
    try:
        chars = state.get("chars", "")
        if not isinstance(chars, str) or len(set(chars)) < len(chars):
            raise ValueError("its characters should be a text in which none comes twice")
        chars.encode()  # half of a surrogate pair could not be printed
        return tokenizer_from_dict(state)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is not an Exception
        what = printable(" ".join(str(error).split())[:200])
        raise UserError(f"checkpoint {source} has a damaged tokenizer: {what}; take another one") from None


def saved_config(metadata: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The config of the run that wrote a checkpoint. Raises UserError if the file has none; its model can
    still be sampled from."""
    config = metadata.get("config")
    if not isinstance(config, dict):
        raise UserError(
            f"checkpoint {source} does not hold the config of its run; take another one, or name a config "
            "where that is possible"
        )
    return config


def saved_template(metadata: dict[str, Any], source: str | Path) -> Template | None:
    """How the model of a checkpoint expects a conversation to be written; None if it was not fine-tuned on
    instructions. Raises UserError if the template is damaged."""
    if metadata.get("template") is None:
        return None
    try:
        return Template.model_validate(metadata["template"])
    except ValidationError as error:
        what = printable(error.errors()[0]["msg"])[:150]
        raise UserError(f"checkpoint {source} has a damaged template ({what}); take another one") from None


# ---- writing -------------------------------------------------------------------------------------


def save_archive(content: Any, path: Path) -> None:
    """torch.save, whole or not at all. Raises OSError if the file cannot be written; torch would hide that in
    an error of its own."""
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_merged(path: Path, target: Path) -> None:
    """Write a checkpoint with adapters as one without, the adapters merged into the weights. It can do all
    but resume the run."""
    checkpoint = read_checkpoint(path)
    only_for_resuming = ("sequences_per_step", "data_fingerprint")
    ours = {name: value for name, value in checkpoint[KEY].items() if name not in only_for_resuming}
    ours["lora"] = None
    kept_of_lightning = ("epoch", "global_step", "pytorch-lightning_version")
    merged = {name: checkpoint[name] for name in kept_of_lightning if name in checkpoint}
    merged["state_dict"] = {f"net.{name}": tensor for name, tensor in model_weights(checkpoint).items()}
    merged[KEY] = ours
    save_archive(merged, target)


def build_metadata(
    *,
    model: GPTConfig,
    tokenizer: Tokenizer,
    metrics: dict[str, Any],
    run: dict[str, Any],
    config: dict[str, Any] | None = None,
    template: BaseModel | None = None,
    lora: BaseModel | None = None,
    stream_state: str | None = None,
    **only_to_resume: Any,
) -> dict[str, Any]:
    """Our fields of a checkpoint, in plain types. A new field belongs here.

    `only_to_resume` are data_fingerprint and sequences_per_step, which an imported model does not have.
    """
    return {
        "format_version": FORMAT_VERSION,
        "model": model.model_dump(),
        "tokenizer": tokenizer.to_dict(),
        "config": config,
        "template": template.model_dump() if template else None,
        "lora": lora.model_dump() if lora else None,
        "metrics": metrics,
        "stream_state": stream_state,
        **only_to_resume,
        "run": run,
    }


def write_model(path: Path, model: GPTMini, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Write a checkpoint of a model that was not trained here. It can do all but resume a run."""
    unknown = dict.fromkeys(("epoch", "train_loss", "lr", "val_loss", "best_val_loss"))
    metadata = build_metadata(
        model=model.config, tokenizer=tokenizer, metrics={"step": 0, "tokens": 0, **unknown}, run=record
    )
    weights = {f"net.{name}": weight for name, weight in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_archive({"state_dict": weights, "global_step": 0, KEY: metadata}, path)
