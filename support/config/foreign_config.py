"""A config written for another project: what each of its names is here, and the whole under our names, as far
as that goes.

So one answer holds all names that are unknown, and what is wrong with the values besides.
"""

import copy
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from support.config.values import key_type, section_of_keys, typed
from support.foreign.config_keys import leaf_of, normalised
from support.foreign.config_values import answer_and_keys, known_dataset, rule_of, shown


def unknown_keys(tree: dict, schema: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """(key, value) of all that the schema has no key for; of a section that it lacks, each key in it."""
    for name, value in tree.items():
        field = schema.model_fields.get(name)
        section = section_of_keys(field.annotation) if field else None
        if field is None:
            yield from leaves(str(name), value)
        elif section and isinstance(value, dict):
            yield from (
                (f"{name}.{key}", inner) for key, inner in value.items() if key not in section.model_fields
            )


def leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of each value in a mapping, at any depth; of anything else, itself."""
    if not isinstance(value, dict) or not value:
        yield key, value
    else:
        for name, item in value.items():
            yield from leaves(f"{key}.{name}", item)


def ours_alone(tree: dict, schema: type[BaseModel]) -> dict:
    """A copy of the tree without the keys that the schema lacks."""
    known = {name: copy.deepcopy(value) for name, value in tree.items() if name in schema.model_fields}
    for name, value in known.items():
        section = section_of_keys(schema.model_fields[name].annotation)
        if section and isinstance(value, dict):
            known[name] = {key: inner for key, inner in value.items() if key in section.model_fields}
    return known


def given(tree: dict, key: str) -> Any:
    """The value of `section.key` in the tree; None where it has none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def put(tree: dict, key: str, value: Any) -> None:
    """Set `section.key`, unless the tree has it already."""
    *sections, leaf = key.split(".")
    for section in sections:
        tree[section] = {} if tree.get(section) is None else tree[section]
        tree = tree[section]
    if isinstance(tree, dict):
        tree.setdefault(leaf, value)


def default(schema: type[BaseModel], key: str) -> Any:
    """What `section.key` is in a config that leaves it out."""
    *sections, leaf = key.split(".")
    for section in sections:
        schema = section_of_keys(schema.model_fields[section].annotation)
    value = schema.model_fields[leaf].default
    return None if value is PydanticUndefined else value


def ported(tree: dict, schema: type[BaseModel]) -> tuple[list[str], dict]:
    """One line for each key that the schema lacks, and the tree with our names in their place."""
    unknown, ours, lines = list(unknown_keys(tree, schema)), ours_alone(tree, schema), {}
    theirs = {normalised(leaf_of(key)): typed(value) for key, value in unknown}

    def at(key: str) -> Any:
        scope, _, name = key.partition(".")
        if scope == "theirs":
            return theirs.get(name)
        if scope == "given":
            return given(ours, name) is not None
        if key == "seq_len":
            return at("training.seq_len") or at("model.max_seq_len")
        value = given(ours, key)
        return default(schema, key) if value is None else value

    for key, written in sorted(
        unknown, key=lambda pair: rule_of(pair[0]) is not None
    ):  # conversions ask what the others say
        value = typed(written)
        lines[key], keys = answer_and_keys(key, value, at)
        for name, new in keys.items():
            put(ours, name, typed(written, key_type(schema, name)) if new is value else new)
    named = [f"unknown key {key}; {lines[key]}" for key, _ in unknown]
    return named + misread(ours, at), ours


def misread(ours: dict, at: Any) -> list[str]:
    """One line for each key of ours that other projects fill in another way; what it says is then taken
    out of the tree."""
    lines, model, data, tokenizer = [], ours.get("model"), ours.get("data"), ours.get("tokenizer")
    if isinstance(tokenizer, str):
        lines.append(f"tokenizer is a section; write tokenizer: {{kind: {tokenizer}}}")
        ours["tokenizer"] = {"kind": tokenizer}
    if isinstance(model, dict) and (size := model.pop("vocab_size", None)):
        lines.append(
            "model.vocab_size is not set here: it comes from the tokenizer; set tokenizer.vocab_size for bpe"
        )
        if at("tokenizer.kind") == "bpe" and isinstance(size, int):
            lines[-1] = lines[-1].replace(
                "set tokenizer.vocab_size for bpe", f"write tokenizer.vocab_size: {size}"
            )
            put(ours, "tokenizer.vocab_size", size)
    if isinstance(data, dict) and (answer := known_dataset(data.get("dataset"))):
        name = data.pop("dataset")
        lines.append(
            f"data.dataset: {shown(name)}; {answer}"
            if answer.startswith("leave")
            else f"data.dataset: {name} is {answer}"
        )
        put(ours, "data.path", "data")  # none is asked for beside that
    return lines
