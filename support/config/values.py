"""What a written value means: the declared type of its key decides. Configs, case files and --override all
ask here.

checkpoint.dir: 007        a text, as written: "007"
training.max_steps: 010    a number, always decimal: 10
training.compile: on       a switch: true
data.val_path: null        none, where the key may be left out
"""

import re
import shlex
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel

from support.files.safe_yaml import HALF, MAX_DIGITS, SURROGATE, Plain, parse_yaml
from support.messages import UserError

NONE = {"", "null", "Null", "NULL", "~"}
SWITCHES = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
WHOLE = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")  # 1_000 is 1000
NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
QUOTED = re.compile(r"'(?:[^']|'')*'" + r'|"(?:[^"\\]|\\.)*"', re.DOTALL)
NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)


def options(kind: Any) -> list[Any]:
    """The types that a key may have: those of a union, else the type alone. What is only annotated counts
    as its type."""
    if typing.get_origin(kind) is typing.Annotated:
        return options(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(kind) for option in options(part)]
    return [kind]


def takes_text(kind: Any) -> bool:
    """Whether a key of this type holds a text, or one of a few words."""
    return any(option is str or typing.get_origin(option) is Literal for option in options(kind))


def _part(kind: Any, *origins: type) -> Any:
    """Of a list the type of its items, of a mapping that of its values; Any where the key holds neither."""
    found = [typing.get_args(option)[-1] for option in options(kind) if typing.get_origin(option) in origins]
    return found[0] if found else Any


def section_of_keys(kind: Any) -> type[BaseModel] | None:
    """The section of keys that a key of this type holds, if it does."""
    return next(
        (option for option in options(kind) if isinstance(option, type) and issubclass(option, BaseModel)),
        None,
    )


def key_type(kind: Any, key: str) -> Any:
    """The declared type of `a.b` in a section; Any for a key that there is none of."""
    for name in key.split("."):
        section = section_of_keys(kind)
        kind = (
            section.model_fields[name].annotation
            if section and name in section.model_fields
            else _part(kind, dict)
        )
    return kind


def typed(value: Any, kind: Any = Any) -> Any:
    """A value as `parse_yaml` reads it, with all that was written without quotes as what its type says;
    what does not fit stays text, and the schema says so. All else, such as the values of a JSON file,
    stays as it is."""
    if isinstance(value, Plain):
        return typed_plain(value, kind)
    if isinstance(value, dict):
        section, items = section_of_keys(kind), _part(kind, dict)
        fields = section.model_fields if section else {}
        named = {str(key) if isinstance(key, str) else key: item for key, item in value.items()}
        if section:  # a key that it lacks stays as written, for the answer about its name
            return {
                key: typed(item, fields[key].annotation) if key in fields else item
                for key, item in named.items()
            }
        return {key: typed(item, items) for key, item in named.items()}
    if isinstance(value, list):
        return [typed(item, _part(kind, list)) for item in value]
    return value


def typed_plain(written: str, kind: Any) -> Any:
    """One value that was written without quotes. A number for a switch, say, is still a number, and the
    schema refuses it."""
    if written in NONE:
        return None
    if takes_text(kind) or takes_text(_part(kind, list)):
        return str(written)
    word = written.strip()
    if word.lower() in SWITCHES:
        return SWITCHES[word.lower()]
    if WHOLE.fullmatch(word) and len(word) <= MAX_DIGITS:
        return int(word)
    if (NUMBER.fullmatch(word) or NOT_FINITE.fullmatch(word)) and len(word) <= MAX_DIGITS:
        return float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return str(written)


# ---- the command line ----------------------------------------------------------------------------


def typed_override(override: str, key: str, written: str, kind: Any) -> Any:
    """What is typed after `--override KEY=`. A text is taken as typed, less the quotes around all of it,
    and null is none; lists and mappings are YAML. Raises UserError."""
    if SURROGATE.search(written):
        raise UserError(f"--override {key}: {HALF}")
    if takes_text(kind):
        return _text(override, written, kind)
    possible, source = (
        options(kind),
        f"--override {override if len(override) < 100 else override[:97] + '...'}",
    )
    if Any in possible:  # a key that we do not have: the answer will be about its name
        try:
            return parse_yaml(written, source)
        except UserError:
            return Plain(written)
    if not section_of_keys(kind) and not any(
        typing.get_origin(option) in (list, dict) for option in possible
    ):
        return typed_plain(written.strip(), kind)
    value = parse_yaml(written, source)
    if isinstance(value, str) and value not in NONE and takes_text(_part(kind, list)):
        raise UserError(f"{source}: {key} takes a list of texts; write {_as_list(key, written)}")
    return typed(value, kind)


def _text(override: str, written: str, kind: Any) -> str | None:
    """A text as typed, less the quotes around it; one of a few words also without blanks around it."""
    bare = written.strip()
    if (bare or written) in NONE - {"~"}:  # of a path, ~ is the home folder
        return None
    if not QUOTED.fullmatch(bare):
        return bare if str not in options(kind) else written
    if bare[0] == "'":
        return bare[1:-1].replace("''", "'")
    try:
        return str(parse_yaml("".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in bare), "text"))
    except UserError:
        raise UserError(
            f"--override {override}: inside double quotes \\ begins an escape such as \\n, and one of them "
            "is not known; "
            "leave the double quotes out, and \\ is itself"
        ) from None


def _as_list(key: str, text: str) -> str:
    """The flag that gives this text as a list of one, for a shell."""
    item = text.strip().replace("\\", "\\\\").replace('"', '\\"')
    return "--override " + shlex.quote(f'{key}=["{item}"]')


def flat_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config tree as `section.key: value` pairs: {"a": {"b": 1}} gives {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
