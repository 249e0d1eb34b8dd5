"""A config written for another project, put under our names: one answer for each of its keys that we do not
have, and a tree with our keys in their place, so that wrong values are found in the same reading.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from support.config.values import key_type, section_of_keys, typed
from support.foreign.config_keys import leaf_of, normalised
from support.foreign.config_values import answer_and_keys, known_dataset, rule_of, shown


def answers_and_our_tree(tree: dict, schema: type[BaseModel]) -> tuple[list[str], dict]:
    """One line for each key that the schema lacks, and the tree with our keys in their place."""
    unknown = list(unknown_keys(tree, schema))
    ours = without_unknown_keys(tree, schema)
    look_up = look_up_in(ours, unknown, schema)
    answers = {}
    # Keys that are only named differently come first: the conversions ask for their values.
    for key, written in sorted(unknown, key=lambda item: rule_of(item[0]) is not None):
        value = typed(written)
        answers[key], converted = answer_and_keys(key, value, look_up)
        for our_key, new in converted.items():
            is_unchanged = new is value
            put(ours, our_key, typed(written, key_type(schema, our_key)) if is_unchanged else new)
    lines = [f"unknown key {key}; {answers[key]}" for key, _ in unknown]
    return lines + take_out_misread(ours, look_up), ours


def look_up_in(ours: dict, unknown: list[tuple[str, Any]], schema: type[BaseModel]) -> Callable[[str], Any]:
    """The function that conversions call to ask what else the config says: see `LookUp` in
    `support.foreign.config_values`."""
    theirs = {normalised(leaf_of(key)): typed(value) for key, value in unknown}

    def look_up(key: str) -> Any:
        scope, _, name = key.partition(".")
        if scope == "theirs":
            return theirs.get(name)
        if scope == "given":
            return value_in(ours, name) is not None
        if key == "seq_len":
            return look_up("training.seq_len") or look_up("model.max_seq_len")
        value = value_in(ours, key)
        return default_of(schema, key) if value is None else value

    return look_up


def take_out_misread(ours: dict, look_up: Callable[[str], Any]) -> list[str]:
    """One line for each key of ours that other projects fill in differently; its value is then taken out of
    the tree."""
    lines = []
    tokenizer = ours.get("tokenizer")
    if isinstance(tokenizer, str):
        lines.append(f"tokenizer is a section; write tokenizer: {{kind: {tokenizer}}}")
        ours["tokenizer"] = {"kind": tokenizer}
    model = ours.get("model")
    size = model.pop("vocab_size", None) if isinstance(model, dict) else None
    if size:
        advice = "set tokenizer.vocab_size for bpe"
        if look_up("tokenizer.kind") == "bpe" and isinstance(size, int):
            advice = f"write tokenizer.vocab_size: {size}"
            put(ours, "tokenizer.vocab_size", size)
        lines.append(f"model.vocab_size is not set here: it comes from the tokenizer; {advice}")
    data = ours.get("data")
    answer = known_dataset(data.get("dataset")) if isinstance(data, dict) else None
    if answer:
        name = data.pop("dataset")
        if answer.startswith("leave"):
            lines.append(f"data.dataset: {shown(name)}; {answer}")
        else:
            lines.append(f"data.dataset: {name} is {answer}")
        put(ours, "data.path", "data")  # so that no second line asks for a path
    return lines


# ---- trees ---------------------------------------------------------------------------------------


def unknown_keys(tree: dict, schema: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """(key, value) of each key that the schema lacks; for a section that it lacks, of each key in it."""
    for name, value in tree.items():
        if name not in schema.model_fields:
            yield from leaves(str(name), value)
            continue
        section = section_of_keys(schema.model_fields[name].annotation)
        if section and isinstance(value, dict):
            for key, inner in value.items():
                if key not in section.model_fields:
                    yield f"{name}.{key}", inner


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of each value in a mapping, at any depth; of anything else, itself.

    >>> list(leaves("optim", {"lr": 1, "adam": {"beta1": 0.9}}))
    [('optim.lr', 1), ('optim.adam.beta1', 0.9)]
    """
    if not isinstance(value, dict) or not value:
        yield key, value
    else:
        for name, item in value.items():
            yield from leaves(f"{key}.{name}", item)


def without_unknown_keys(tree: dict, schema: type[BaseModel]) -> dict:
    """A copy of the tree without the keys that the schema lacks."""
    known = {name: copy.deepcopy(value) for name, value in tree.items() if name in schema.model_fields}
    for name, value in known.items():
        section = section_of_keys(schema.model_fields[name].annotation)
        if section and isinstance(value, dict):
            known[name] = {key: inner for key, inner in value.items() if key in section.model_fields}
    return known


def value_in(tree: dict, key: str) -> Any:
    """The value of `section.key` in the tree; None where it has none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def put(tree: dict, key: str, value: Any) -> None:
    """Set `section.key`, unless the tree has it already."""
    *sections, leaf = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
    if isinstance(tree, dict):
        tree.setdefault(leaf, value)


def default_of(schema: type[BaseModel], key: str) -> Any:
    """The value that `section.key` has in a config that leaves it out; None if it must be given."""
    *sections, leaf = key.split(".")
    for section in sections:
        schema = section_of_keys(schema.model_fields[section].annotation)
    value = schema.model_fields[leaf].default
    return None if value is PydanticUndefined else value
