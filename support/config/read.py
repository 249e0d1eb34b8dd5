"""How a config file and --override values become one checked `Config`, or one error that lists every mistake.

file + overrides -> `config_tree` (plain dicts) -> `validate_config` (the typed `Config`)
"""

import argparse
import copy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from support.cli import at_home
from support.config.foreign_config import answers_and_our_tree
from support.config.overrides import apply_overrides
from support.config.schema import PATHS, Config
from support.config.values import typed
from support.files.safe_yaml import read_mapping
from support.foreign.config_values import our_word
from support.messages import UserError
from support.text.sources import SOURCES, keys_of_other_sources


def load_config(path: str | Path | None, overrides: list[str] = (), base: dict | None = None) -> Config:
    """File (or `base`), then overrides, then checks. Raises UserError."""
    return validate_config(config_tree(path, overrides, base), str(path or "config"))


# ---- file and overrides to a tree ----------------------------------------------------------------


def read_config_file(path: str | Path) -> dict:
    """The mapping in a YAML or JSON file, each value read as the type of its key says. Raises UserError for
    a file that does not hold one."""
    mapping = read_mapping(
        path,
        what="config file",
        instead="try --config config_smoke.yaml",
        expected="see docs/CONFIG_REFERENCE.md",
    )
    return typed(mapping, Config)


def config_tree(path: str | Path | None, overrides: list[str] = (), base: dict | None = None) -> dict:
    """File (or `base`, a checkpoint's own config), then overrides; not checked yet. Raises UserError."""
    tree = read_config_file(path) if path is not None else copy.deepcopy(base)
    source_before = _source_of(tree)
    apply_overrides(tree, overrides, Config)
    if _source_of(tree) != source_before:
        _drop_keys_of_other_sources(tree, overrides)
    for key in PATHS:
        section, _, leaf = key.rpartition(".")
        inner = tree.get(section) if section else tree
        if isinstance(inner, dict) and isinstance(inner.get(leaf), str):
            inner[leaf] = at_home(inner[leaf], key)
    return tree


def flag_overrides(args: argparse.Namespace) -> list[str]:
    """The --override values of a command line, with --seed and --device as overrides after them."""
    overrides = list(args.override)
    if args.seed is not None:
        overrides.append(f"seed={args.seed}")
    if args.device is not None:
        overrides.append(f"hardware.accelerator={args.device}")
    return overrides


def _source_of(tree: dict) -> Any:
    data = tree.get("data")
    return data.get("source", "text") if isinstance(data, dict) else None


def _drop_keys_of_other_sources(tree: dict, overrides: list[str]) -> None:
    """After an override of data.source: remove what the file says for its own source, so that
    `data.source=tokens` and `data.path` are enough to train on token files."""
    source = _source_of(tree)
    if not isinstance(source, str) or source not in SOURCES:
        return
    overridden = {override.partition("=")[0].strip() for override in overrides}
    for key in keys_of_other_sources(source) & tree["data"].keys():
        if f"data.{key}" not in overridden:
            del tree["data"][key]


# ---- tree to config ------------------------------------------------------------------------------


def validate_config(tree: dict, source: str = "config") -> Config:
    """The typed config, or one UserError that lists everything wrong with it; `source` names it there."""
    try:
        return Config.model_validate(tree)
    except ValidationError:
        if isinstance(tree, dict):
            answers, our_tree = answers_and_our_tree(tree, Config)
        else:
            answers, our_tree = [], tree
    raise UserError(f"{source}: " + "\n       ".join(answers + _problems(our_tree)))


def _problems(tree: Any) -> list[str]:
    """One line for each mistake that the schema finds."""
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        return [_explain(mistake) for mistake in error.errors()]
    return []


# By the type of a pydantic error: what to write instead.
HINTS = {
    "int_type": "write a whole number in decimal digits, without quotes",
    "float_type": "write a decimal number such as 0.1 or 3e-4, without quotes",
    "bool_type": "write true or false",
    "list_type": "a list is written [a, b]",
    "dict_type": "keys and values are written {key: value}",
}


def _explain(error: dict) -> str:
    """One line for one pydantic error: key, value, rule and next step."""
    key = ".".join(str(part) for part in error["loc"])
    kind, value = error["type"], error["input"]
    message = error["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return f"{key} is required"
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    if kind == "model_type":
        message = "this is a section of keys; write {key: value}"
    if kind == "literal_error":
        message = message.replace("True or False", "true or false")  # as YAML writes them
    hint = HINTS.get(kind)
    if kind == "string_type" and (value is None or isinstance(value, bool | int | float)):
        hint = "put it in quotes"
    if kind == "literal_error" and our_word(key, value) != value:
        hint = f"here that is {our_word(key, value)}"
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    line = f"{key}={shown}: {message[0].lower()}{message[1:]}"
    return f"{line}; {hint}" if hint else line
