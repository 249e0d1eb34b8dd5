"""The smallest config, with changes, and the error for a wrong one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from support.config.read import validate_config
from support.config.schema import Config, sections
from support.messages import UserError


def tree(**changes) -> dict:
    """The smallest valid config, with changes to its sections: tree(model={"d_model": 48})."""
    smallest = {"data": {"path": "x.txt"}, "training": {"max_steps": 5}}
    for name, value in changes.items():
        smallest[name] = {**smallest.get(name, {}), **value} if isinstance(value, dict) else value
    return smallest


def refusal(config: dict) -> str:
    """What `validate_config` says about it."""
    with pytest.raises(UserError) as caught:
        validate_config(config)
    return str(caught.value)


def key_names() -> set[str]:
    """Every key of a config: `seed`, `model`, `model.d_model`, ..."""
    in_sections = {f"{name}.{key}" for name, section in sections().items() for key in section.model_fields}
    return set(Config.model_fields) | in_sections


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    """The path of a new file with this text."""
    (folder / name).write_text(text)
    return folder / name


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(`section.key`, field) of each key, of those in sections too."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field
