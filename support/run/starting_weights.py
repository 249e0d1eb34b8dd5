"""Which weights a run starts from (random ones, or the weights of another checkpoint), and which of them are
trained, directly or through adapters.

Fine-tuning uses the architecture and the tokenizer of its base, since the base's weights mean nothing without
them. For the same reason, training on token files uses the tokenizer that made them.
"""

import difflib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora import add_adapters
from model import GPTConfig, GPTMini
from support.checkpoint import model_weights, read_checkpoint, read_metadata
from support.config.schema import Config
from support.messages import UserError, warn
from support.text.token_files import described, read_meta
from support.weights import load_weights
from tokenizer import tokenizer_from_dict

# Keys of the config's `model` section that change how a model is trained, but not which model it is.
MAY_DIFFER_FROM_BASE = ("dropout", "gradient_checkpointing")


def with_base(tree: dict[str, Any]) -> dict[str, Any]:
    """Fill in a config for fine-tuning: `tree` is the config as it was read from its file. Returns it with
    the model and the tokenizer of the checkpoint `base_ckpt`, and with its template if `tree` names none.

    Raises UserError if there is no such checkpoint, or if the config asks for another model or tokenizer.
    """
    path = tree["base_ckpt"]
    if not isinstance(path, str):
        return tree  # the schema will refuse it
    metadata = read_base(path)
    model = {key: value for key, value in metadata["model"].items() if key != "vocab_size"}
    of_base = {"model": model, "tokenizer": tokenizer_section(metadata, path)}
    merged = dict(tree)
    for section, base_values in of_base.items():
        asked = tree.get(section) or {}
        if not isinstance(asked, dict):
            return tree  # the schema will refuse it
        refuse_other_values(section, asked, base_values, path)
        given = {key: value for key, value in asked.items() if value is not None}
        merged[section] = {**base_values, **given}
    data = tree.get("data")
    has_instructions = isinstance(data, dict) and data.get("source") == "instructions"
    if not has_instructions or tree.get("template") is None:
        # Training on plain text teaches no new template, so the model keeps the one it knows.
        merged["template"] = metadata.get("template")
    return merged


def read_base(path: str) -> dict[str, Any]:
    """The metadata (config, tokenizer, progress) of the checkpoint that fine-tuning starts from. Raises
    UserError."""
    try:
        return read_metadata(path)
    except UserError as error:
        advice = ""
        if not Path(path).exists():
            advice = (
                "\n       fine-tuning starts from a trained model; python3 train.py --config "
                "config_smoke.yaml makes one"
            )
        raise UserError(f"base_ckpt: {error}{advice}") from None


def refuse_other_values(section: str, asked: dict, base_values: dict, path: str) -> None:
    """Raise UserError if a config asks for an architecture or a tokenizer that its base does not have."""
    for key, value in asked.items():
        if key not in base_values or key in MAY_DIFFER_FROM_BASE:
            continue
        if value not in (None, base_values[key]):
            raise UserError(
                f"{section}.{key}={value}, and {path} has {base_values[key]}: fine-tuning keeps the "
                f"architecture and tokenizer of its base checkpoint; leave {section}.{key} out"
            )


def tokenizer_section(metadata: dict[str, Any], path: str) -> dict[str, Any]:
    """The `tokenizer` section of a checkpoint's config. An imported checkpoint has no config, so the section
    is made from its tokenizer."""
    config = metadata.get("config")
    if isinstance(config, dict):
        return config.get("tokenizer", {})
    return section_of(metadata["tokenizer"], path)


def section_of(state: dict[str, Any], path: str) -> dict[str, Any]:
    """The `tokenizer` section of a config for the tokenizer `state` that the file at `path` holds."""
    if state.get("kind") == "file":
        return {"kind": "file", "path": path}
    return {"kind": state.get("kind")}


def with_own_tokenizer(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the config as it was read, with the tokenizer of the token files that it names: the ids in them
    mean nothing to another tokenizer. Raises UserError."""
    data = tree.get("data")
    if not isinstance(data, dict) or data.get("source") != "tokens" or not isinstance(data.get("path"), str):
        return tree
    meta = read_meta(Path(data["path"]))
    if meta is None:
        return tree
    own = tokenizer_from_dict(meta["tokenizer"])
    section = section_of(meta["tokenizer"], str(Path(data["path"]) / "meta.json"))
    if own.kind == "bpe":
        section["vocab_size"] = own.vocab_size
    asked = tree.get("tokenizer") or {}
    if isinstance(asked, dict) and asked.get("kind", own.kind) != own.kind:
        warn(
            f"tokenizer.kind={asked['kind']}, but {data['path']} was made with {described(own)}, which is "
            "used"
        )
    return {**tree, "tokenizer": section}


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Do not train the parameters that `patterns` name. A pattern is the name of a parameter or of a layer,
    and may have * and ? in it.

    A head tied to the embedding table is the same tensor, so freezing one freezes the other. Raises UserError
    if a pattern names nothing, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        hits = [
            name for name in parameters if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
        ]
        if not hits:
            known = [*parameters, *(name for name, _ in model.named_modules())]
            near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"training.freeze: {pattern} names no parameter{hint}")
        for name in hits:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"training.freeze={patterns} leaves nothing to train; freeze less")


def shape_net(net: GPTMini, config: Config) -> GPTMini:
    """Add the adapters and freeze the parameters that the config names; returns the same network. Raises
    UserError."""
    if config.lora:
        add_adapters(net, config.lora.rank, config.lora.alpha, config.lora.targets)
    freeze(net, config.training.freeze)
    return net


def net_on_meta(model_config: GPTConfig, config: Config) -> GPTMini:
    """The network of a run on PyTorch's meta device, where weights have a shape but no numbers and take no
    memory: to count them, or to find mistakes early. Raises UserError."""
    with torch.device("meta"):
        return shape_net(GPTMini(model_config), config)


def starting_net(model_config: GPTConfig, config: Config, from_base: bool = True) -> GPTMini:
    """The network before its first step, in float32, with random weights drawn from `config.seed`, or with
    the weights of `base_ckpt` (its adapters, if any, merged into them). Raises UserError.

    `from_base` is False for a run that resumes: its checkpoint holds all weights, so the base is not read.
    """
    torch.manual_seed(config.seed)
    net = GPTMini(model_config)
    if config.base_ckpt and from_base:
        weights = model_weights(read_checkpoint(config.base_ckpt, mmap=False))
        load_weights(net, {name: weight.float() for name, weight in weights.items()}, config.base_ckpt)
    return shape_net(net, config)
