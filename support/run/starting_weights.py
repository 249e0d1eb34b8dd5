"""Where a run's weights begin: drawn anew, or those of another checkpoint; which of them are trained, and
through what.

Fine-tuning takes architecture and tokenizer from its base, since the weights mean nothing without them;
training on token files takes their tokenizer.
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

FREE = (
    "dropout",
    "gradient_checkpointing",
)  # keys of the model that change how it is trained, and not what it is


def with_base(tree: dict[str, Any]) -> dict[str, Any]:
    """A config tree as read, with model, tokenizer and (where it names none) template of the checkpoint
    `base_ckpt`.

    Raises UserError if there is no such checkpoint, or if the tree asks for another model or tokenizer.
    """
    path = tree["base_ckpt"]
    if not isinstance(path, str):
        return tree  # the schema will say so
    try:
        metadata = read_metadata(path)
    except UserError as error:
        makes_one = (
            "\n       fine-tuning starts from a trained model; python3 train.py --config config_smoke.yaml "
            "makes one"
        )
        raise UserError(f"base_ckpt: {error}{'' if Path(path).exists() else makes_one}") from None
    model = {key: value for key, value in metadata["model"].items() if key != "vocab_size"}
    own = {"model": model, "tokenizer": tokenizer_section(metadata, path)}
    merged = dict(tree)
    for section, theirs in own.items():
        asked = tree.get(section) or {}
        if not isinstance(asked, dict):
            return tree
        for key, value in asked.items():
            if key in theirs and key not in FREE and value not in (None, theirs[key]):
                raise UserError(
                    f"{section}.{key}={value}, and {path} has {theirs[key]}: architecture and tokenizer "
                    "are the base checkpoint's; "
                    f"leave {section}.{key} out"
                )
        merged[section] = theirs | {key: value for key, value in asked.items() if value is not None}
    on_text = not isinstance(tree.get("data"), dict) or tree["data"].get("source") != "instructions"
    if (
        on_text or tree.get("template") is None
    ):  # more text does not make a model answer, nor forget that it does
        merged["template"] = metadata.get("template")
    return merged


def tokenizer_section(metadata: dict[str, Any], path: str) -> dict[str, Any]:
    """What a config would say of the tokenizer in a checkpoint; one that was imported has no config to ask."""
    if isinstance(config := metadata.get("config"), dict):
        return config.get("tokenizer", {})
    return section_of(metadata["tokenizer"], path)


def section_of(state: dict[str, Any], path: str) -> dict[str, Any]:
    """What a config would say of a tokenizer that a file at `path` holds."""
    return {"kind": "file", "path": path} if state.get("kind") == "file" else {"kind": state.get("kind")}


def with_own_tokenizer(tree: dict[str, Any]) -> dict[str, Any]:
    """A config tree as read, with the tokenizer of the token files it names: their ids mean nothing under
    another. Raises UserError."""
    data = tree.get("data")
    if not isinstance(data, dict) or data.get("source") != "tokens" or not isinstance(data.get("path"), str):
        return tree
    meta = read_meta(Path(data["path"]))
    if meta is None:
        return tree
    own, asked = tokenizer_from_dict(meta["tokenizer"]), tree.get("tokenizer") or {}
    section = section_of(meta["tokenizer"], str(Path(data["path"]) / "meta.json"))
    if own.kind == "bpe":
        section["vocab_size"] = own.vocab_size
    if isinstance(asked, dict) and asked.get("kind", own.kind) != own.kind:
        warn(
            f"tokenizer.kind={asked['kind']}, and {data['path']} was made by {described(own)}, which is used"
        )
    return {**tree, "tokenizer": section}


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Leave the parameters that `patterns` name untrained: whole names, their beginnings, or with * and ?.

    A tied head is the embedding table, so freezing the one freezes the other. Raises UserError for a pattern
    that names nothing, and if nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        hit = [name for name in parameters if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not hit:
            near = difflib.get_close_matches(
                pattern, [*parameters, *(name for name, _ in model.named_modules())], n=1, cutoff=0.3
            )
            raise UserError(
                f"training.freeze: {pattern} names no parameter"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        for name in hit:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"training.freeze={patterns} leaves nothing to train; freeze less")


def shape_net(net: GPTMini, config: Config) -> GPTMini:
    """The network with its adapters, and with what is frozen frozen. Raises UserError."""
    if config.lora:
        add_adapters(net, config.lora.rank, config.lora.alpha, config.lora.targets)
    freeze(net, config.training.freeze)
    return net


def net_on_meta(model_config: GPTConfig, config: Config) -> GPTMini:
    """The same without memory for its weights: to count them, or to find mistakes early. Raises UserError."""
    with torch.device("meta"):
        return shape_net(GPTMini(model_config), config)


def starting_net(model_config: GPTConfig, config: Config, from_base: bool = True) -> GPTMini:
    """The network before its first step, in float32: weights drawn by `config.seed`, or those of
    `base_ckpt` (its adapters, if it has some, merged). A resume, which brings all weights, needs no base.
    Raises UserError."""
    torch.manual_seed(config.seed)
    net = GPTMini(model_config)
    if config.base_ckpt and from_base:
        weights = model_weights(read_checkpoint(config.base_ckpt, mmap=False))
        load_weights(net, {name: weight.float() for name, weight in weights.items()}, config.base_ckpt)
    return shape_net(net, config)
