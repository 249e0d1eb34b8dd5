"""docs/CONFIG_REFERENCE.md, made from the schema: `python3 -m support.config.reference >
docs/CONFIG_REFERENCE.md`."""

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from support.config.schema import Config, sections

INTRODUCTION = """# Config reference

Made from the schema by `python3 -m support.config.reference`: every key, its default and its effect.
Any of them can be set on the command line: `--override training.lr=3e-4`.

The type of a key decides how its value is read, in a file and in an override:

- a text is taken as written; the text `null` needs quotes
- a number is decimal: `010` is 10, `1_000` is 1000; `0x1F`, `1:30` and infinity are refused
- a switch is `true` or `false`, also `yes`, `no`, `on`, `off`
- `null` stands for no value, where a key may be left out

A file that ends in `.json` is JSON (`configs/sample_custom.json` is one); every other file is YAML.
In paths `~` is the home folder.
"""


def default_of(field: FieldInfo) -> str:
    """The default of a key as a config file writes it."""
    if field.is_required():
        return "required"
    return yaml.safe_dump(field.default, default_flow_style=True).removesuffix("\n...\n").strip()


def table_of(section: type[BaseModel], prefix: str) -> list[str]:
    """The lines of the table of one section, without the sections inside it."""
    lines = ["| key | default | effect |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        key = prefix + name
        if field.description and key != "model.vocab_size":  # which the tokenizer decides
            lines.append(f"| `{key}` | `{default_of(field)}` | {field.description} |")
    return lines


def reference_markdown() -> str:
    """The whole page."""
    parts = [("## Top level", table_of(Config, prefix=""))]
    for name, section in sections().items():
        parts.append((f"## `{name}`", table_of(section, prefix=f"{name}.")))
    lines = [*INTRODUCTION.splitlines(), ""]
    for title, table in parts:
        lines += [title, "", *table, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference_markdown(), end="")
