"""What --override does to a config's tree: one key set, by its declared type, and what excludes it taken
out."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from support.config.values import key_type, typed_override
from support.messages import UserError
from support.text.hub import LOCAL_FORMATS

SHARE = (
    "data.val_fraction"  # given beside what takes its place it is not looked at, which is no contradiction
)
# Keys that exclude each other, or of which one is not looked at when the other is there: (key, what it takes
# the place of).
INSTEAD_OF = {
    "training.max_steps": ("training.epochs",),
    "training.epochs": ("training.max_steps",),
    "data.val_path": ("data.val_split",),
    "data.val_split": ("data.val_path",),
    SHARE: ("data.val_path", "data.val_split", "data.val_docs"),
}
OF_A_DATASET = (
    "data.dataset",
    "data.config",
    "data.revision",
    "data.val_split",
)  # of instructions from the hub


def apply_override(tree: dict, override: str, schema: type[BaseModel]) -> None:
    """Set one `a.b=value` in place; the value is read as its key's type says. Raises UserError."""
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--override {override}: write KEY=VALUE, e.g. training.max_steps=1000")
    *sections, leaf = key.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            raise UserError(f"--override {override}: {section} is no section")
        tree = below
    tree[leaf] = typed_override(override, key, value, key_type(schema, key))


def apply_overrides(tree: dict, overrides: list[str], schema: type[BaseModel]) -> None:
    """All of them, in order. What they say wins over what the tree says for an alternative; two overrides
    that exclude each other are refused. Raises UserError."""
    for override in overrides:
        apply_override(tree, override, schema)
    typed_in = dict(_named(tree, overrides))
    for key, value in typed_in.items():
        for other in alternatives(key, value, tree) if value is not None else ():
            if typed_in.get(other) is not None and key != SHARE:
                raise UserError(
                    f"--override {key} and --override {other} exclude each other; give one of them"
                )
            section, _, leaf = other.partition(".")
            tree[section].pop(leaf, None) if isinstance(
                tree.get(section), dict
            ) and other not in typed_in else None
    if typed_in.get("tokenizer.path") is not None and "tokenizer.kind" not in typed_in:
        tree["tokenizer"]["kind"] = "file"


def _named(tree: dict, overrides: list[str]) -> Iterator[tuple[str, Any]]:
    """(key, value) of all keys that the overrides name; of a whole section, each key in it."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        value: Any = tree
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        yield from (
            ((f"{key}.{name}", item) for name, item in value.items())
            if isinstance(value, dict)
            else [(key, value)]
        )


def alternatives(key: str, value: Any, tree: dict) -> tuple[str, ...]:
    """The keys that this one, with this value, takes the place of."""
    data = tree.get("data") if isinstance(tree.get("data"), dict) else {}
    if key == "data.path" and data.get("source") == "instructions":
        return OF_A_DATASET
    if key == "data.dataset" and (
        data.get("source") == "instructions" or (data.get("source") == "hf" and value not in LOCAL_FORMATS)
    ):
        return ("data.path",)
    if data.get("streaming") is True and key == SHARE:
        return ()  # a stream has no share
    if key == "tokenizer.kind" and value != "file":
        return ("tokenizer.path",)
    return INSTEAD_OF.get(key, ())
