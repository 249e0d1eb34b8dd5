"""A config file and --override values to one checked `Config`, or one error that lists every mistake."""

import copy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from support.cli import at_home
from support.config.foreign_config import ported
from support.config.overrides import apply_overrides
from support.config.schema import PATHS, SOURCE_KEYS, Config
from support.config.values import typed
from support.files.safe_yaml import read_mapping
from support.foreign.config_values import our_word
from support.messages import UserError


def read_config_file(path: str | Path) -> dict:
    """The mapping in a YAML or JSON file, each value as its key's type says. Raises UserError where there
    is none."""
    return typed(
        read_mapping(path, "config file", "try --config config_smoke.yaml", "see docs/CONFIG_REFERENCE.md"),
        Config,
    )


HINTS = {  # by the type of a pydantic error: what to write instead
    "int_type": "write a whole number in decimal digits, without quotes",
    "float_type": "write a decimal number such as 0.1 or 3e-4, without quotes",
    "bool_type": "write true or false",
    "list_type": "a list is written [a, b]",
    "dict_type": "keys and values are written {key: value}",
}


def _explain(error: dict) -> str:
    """One line for one pydantic error."""
    key = ".".join(str(part) for part in error["loc"])
    message, value = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] == "missing":
        return f"{key} is required"
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if error["type"] == "model_type":
        message = "this is a section of keys; write {key: value}"
    hint = HINTS.get(error["type"])
    if error["type"] == "string_type":
        hint = "put it in quotes" if value is None or isinstance(value, bool | int | float) else None
    if error["type"] == "literal_error" and (word := our_word(key, value)) != value:
        hint = f"here that is {word}"
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    return f"{key}={shown}: {message[0].lower()}{message[1:]}" + (f"; {hint}" if hint else "")


def _problems(tree: Any) -> list[str]:
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        return [_explain(e) for e in error.errors()]
    return []


def validate_config(tree: dict, source: str = "config") -> Config:
    """The typed config, or one UserError that lists everything wrong with it."""
    try:
        return Config.model_validate(tree)
    except ValidationError:
        answers, ours = ported(tree, Config) if isinstance(tree, dict) else ([], tree)
    raise UserError(f"{source}: " + "\n       ".join(answers + _problems(ours)))


def config_tree(path: str | Path | None, overrides: list[str] = (), base: dict | None = None) -> dict:
    """File (or `base`, a checkpoint's own config), then overrides; not checked yet. Raises UserError.

    Where an override names another data.source, what the file says for its own source goes:
    `data.source=tokens` and `data.path` are all that it takes to train on token files. ~ at the start of a
    path is the home folder.
    """
    tree = read_config_file(path) if path is not None else copy.deepcopy(base)
    source = _source_of(tree)
    apply_overrides(tree, overrides, Config)
    if (new := _source_of(tree)) != source and new in SOURCE_KEYS:
        named = {override.partition("=")[0].strip() for override in overrides}
        foreign = set().union(*SOURCE_KEYS.values()) - SOURCE_KEYS[new]
        tree["data"] = {
            key: value for key, value in tree["data"].items() if key not in foreign or f"data.{key}" in named
        }
    for key in PATHS:
        section, _, leaf = key.rpartition(".")
        inner = tree.get(section) if section else tree
        if isinstance(inner, dict) and isinstance(inner.get(leaf), str):
            inner[leaf] = at_home(inner[leaf], key)
    return tree


def _source_of(tree: dict) -> Any:
    data = tree.get("data")
    return data.get("source", "text") if isinstance(data, dict) else None


def load_config(path: str | Path | None, overrides: list[str] = (), base: dict | None = None) -> Config:
    """File (or `base`), then overrides, then checks. Raises UserError."""
    return validate_config(config_tree(path, overrides, base), str(path or "config"))


def flag_overrides(args: Any) -> list[str]:
    """The --override values of a command line, with --seed and --device spelled as overrides."""
    short = [("seed", args.seed), ("hardware.accelerator", args.device)]
    return args.override + [f"{key}={value}" for key, value in short if value is not None]
