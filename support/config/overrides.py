"""What does --override do to a config's tree? It sets one key, read by the key's type, and takes out the keys
that exclude it."""

from typing import Any

from pydantic import BaseModel

from support.config.values import key_type, typed_override
from support.messages import UserError
from support.text.hub import LOCAL_FORMATS

VAL_FRACTION = "data.val_fraction"
# An override of the key on the left takes out the keys on the right: they exclude each other, or only one of
# them is looked at. Two overrides that exclude each other are refused, except that data.val_fraction may be
# given together with what takes its place.
TAKES_OUT = {
    "training.max_steps": ("training.epochs",),
    "training.epochs": ("training.max_steps",),
    "data.val_path": ("data.val_split",),
    "data.val_split": ("data.val_path",),
    VAL_FRACTION: ("data.val_path", "data.val_split", "data.val_docs"),
}
# Keys of instructions from the hub, which a local file replaces.
KEYS_OF_A_HUB_DATASET = ("data.dataset", "data.config", "data.revision", "data.val_split")


def apply_overrides(tree: dict, overrides: list[str], schema: type[BaseModel]) -> None:
    """Apply all of them, in order. They win over what the tree says for an alternative; two overrides that
    exclude each other are refused. Raises UserError."""
    for override in overrides:
        apply_override(tree, override, schema)
    overridden = _overridden_keys(tree, overrides)
    for key, value in overridden.items():
        if value is None:
            continue
        for other in taken_out_by(key, value, tree):
            if overridden.get(other) is not None and key != VAL_FRACTION:
                raise UserError(
                    f"--override {key} and --override {other} exclude each other; give one of them"
                )
            section, _, leaf = other.partition(".")
            if isinstance(tree.get(section), dict) and other not in overridden:
                tree[section].pop(leaf, None)
    if overridden.get("tokenizer.path") is not None and "tokenizer.kind" not in overridden:
        tree["tokenizer"]["kind"] = "file"


def apply_override(tree: dict, override: str, schema: type[BaseModel]) -> None:
    """Set one `a.b=value` in place; the value is read as its key's type says. Raises UserError."""
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--override {override}: write KEY=VALUE, e.g. training.max_steps=1000")
    *sections, leaf = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"--override {override}: {section} is not a section of keys")
    tree[leaf] = typed_override(override, key, value, key_type(schema, key))


def _overridden_keys(tree: dict, overrides: list[str]) -> dict[str, Any]:
    """The keys that the overrides name, with their values in the tree; for a whole section, each key in
    it."""
    found: dict[str, Any] = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        value: Any = tree
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, dict):
            found |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            found[key] = value
    return found


def taken_out_by(key: str, value: Any, tree: dict) -> tuple[str, ...]:
    """The keys that an override of this key, with this value, takes out of this tree."""
    data = tree.get("data") if isinstance(tree.get("data"), dict) else {}
    source = data.get("source")
    if key == "data.path" and source == "instructions":
        return KEYS_OF_A_HUB_DATASET
    if key == "data.dataset":
        on_the_hub = source == "instructions" or (source == "hf" and value not in LOCAL_FORMATS)
        return ("data.path",) if on_the_hub else ()
    if key == VAL_FRACTION and data.get("streaming") is True:
        return ()  # a stream has no share
    if key == "tokenizer.kind" and value != "file":
        return ("tokenizer.path",)
    return TAKES_OUT.get(key, ())
