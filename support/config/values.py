"""What does a written value mean? The declared type of its key decides; configs, case files and --override
all ask here.

checkpoint.dir: 007        a text, as written: "007"
training.max_steps: 010    a number, always decimal: 10
data.shuffle: on           a switch: true
data.val_path: null        no value, where the key may be left out
"""

import re
import shlex
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel

from support.files.safe_yaml import HALF_OF_A_PAIR, MAX_DIGITS, SURROGATE, Plain, parse_yaml
from support.messages import UserError

NO_VALUE = {"", "null", "Null", "NULL", "~"}
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WHOLE = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")  # 1_000 is 1000
NUMBER = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
QUOTED = re.compile(r"'(?:[^']|'')*'" + r'|"(?:[^"\\]|\\.)*"', re.DOTALL)

# ---- the type of a key ---------------------------------------------------------------------------


def options(kind: Any) -> list[Any]:
    """The types that a key may have: the members of a union, else the type alone; Annotated[int, ...] is int.

    >>> options(int | None)
    [<class 'int'>, <class 'NoneType'>]
    """
    if typing.get_origin(kind) is typing.Annotated:
        return options(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(kind) for option in options(part)]
    return [kind]


def takes_text(kind: Any) -> bool:
    """Whether a key of this type holds a text, or one of a few words."""
    return any(option is str or typing.get_origin(option) is Literal for option in options(kind))


def is_switch(kind: Any) -> bool:
    """Whether a key of this type can be true or false."""
    return any(option is bool or True in typing.get_args(option) for option in options(kind))


def no_number(value: Any) -> Any:
    """Returns the value. Raises ValueError for 1 and 0, which Python holds for the same as true and false, so
    that a key that takes true, false or a word would take them too."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError(f"{value} is a number; write a word, true or false")
    return value


def _items_of(kind: Any, container: type) -> Any:
    """The type of the items of a list, or of the values of a mapping; Any for a key that holds neither.

    >>> _items_of(list[int] | None, list)
    <class 'int'>
    """
    for option in options(kind):
        if typing.get_origin(option) is container:
            return typing.get_args(option)[-1]
    return Any


def section_of_keys(kind: Any) -> type[BaseModel] | None:
    """The section of keys that a key of this type holds, if it does."""
    for option in options(kind):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def key_type(kind: Any, key: str) -> Any:
    """The declared type of `a.b` in a section; Any for a key that does not exist."""
    for name in key.split("."):
        section = section_of_keys(kind)
        if section and name in section.model_fields:
            kind = section.model_fields[name].annotation
        else:
            kind = _items_of(kind, dict)
    return kind


# ---- values of a file ----------------------------------------------------------------------------


def typed(value: Any, kind: Any = Any) -> Any:
    """A value as `parse_yaml` reads it, with everything that was written without quotes turned into its type.

    What does not fit stays text, and the schema then says so. Quoted texts and the values of a JSON file
    stay as they are.
    """
    if isinstance(value, Plain):
        return typed_plain(value, kind)
    if isinstance(value, list):
        return [typed(item, _items_of(kind, list)) for item in value]
    if not isinstance(value, dict):
        return value
    named = {str(key) if isinstance(key, str) else key: item for key, item in value.items()}
    section = section_of_keys(kind)
    if not section:
        return {key: typed(item, _items_of(kind, dict)) for key, item in named.items()}
    fields = section.model_fields
    # The value of an unknown key stays as written, for the answer about its name.
    return {
        key: typed(item, fields[key].annotation) if key in fields else item for key, item in named.items()
    }


def typed_plain(written: str, kind: Any) -> Any:
    """One value that was written without quotes. A number where a switch belongs is still read as a number,
    and the schema refuses it."""
    if written in NO_VALUE:
        return None
    word = written.strip()
    if takes_text(kind) or takes_text(_items_of(kind, list)):
        return SWITCHES.get(word.lower(), str(written)) if is_switch(kind) else str(written)
    if word.lower() in SWITCHES:
        return SWITCHES[word.lower()]
    if WHOLE.fullmatch(word) and len(word) <= MAX_DIGITS:
        return int(word)
    if (NUMBER.fullmatch(word) or NOT_FINITE.fullmatch(word)) and len(word) <= MAX_DIGITS:
        return float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return str(written)


# ---- values of the command line ------------------------------------------------------------------


def typed_override(override: str, key: str, written: str, kind: Any) -> Any:
    """The value of `--override KEY=WRITTEN`. A text is taken as typed, without the quotes around all of it;
    null means no value; lists and mappings are YAML. Raises UserError."""
    if SURROGATE.search(written):
        raise UserError(f"--override {key}: {HALF_OF_A_PAIR}")
    if is_switch(kind) and written.strip().lower() in SWITCHES:
        return SWITCHES[written.strip().lower()]
    if takes_text(kind):
        return _text(override, written, kind)
    source = f"--override {override if len(override) < 100 else override[:97] + '...'}"
    possible = options(kind)
    if Any in possible:  # a key that we do not have: the answer will be about its name
        try:
            return parse_yaml(written, source)
        except UserError:
            return Plain(written)
    holds_several = any(typing.get_origin(option) in (list, dict) for option in possible)
    if not holds_several and not section_of_keys(kind):
        return typed_plain(written.strip(), kind)
    value = parse_yaml(written, source)
    if isinstance(value, str) and value not in NO_VALUE and takes_text(_items_of(kind, list)):
        raise UserError(f"{source}: {key} takes a list of texts; write {_as_list(key, written)}")
    return typed(value, kind)


def _text(override: str, written: str, kind: Any) -> str | None:
    """A text as typed, without the quotes around it; where a key takes one of a few words, also without
    blanks around it."""
    bare = written.strip()
    if (bare or written) in NO_VALUE - {"~"}:  # as a path, ~ is the home folder
        return None
    if not QUOTED.fullmatch(bare):
        return written if str in options(kind) else bare
    if bare[0] == "'":
        return bare[1:-1].replace("''", "'")
    try:
        escaped = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in bare)
        return str(parse_yaml(escaped, "text"))
    except UserError:
        raise UserError(
            f"--override {override}: inside double quotes \\ begins an escape such as \\n, and one of them "
            "is not known; leave the double quotes out, and \\ is itself"
        ) from None


def _as_list(key: str, text: str) -> str:
    """The flag that gives this text as a list of one, quoted for a shell."""
    item = text.strip().replace("\\", "\\\\").replace('"', '\\"')
    return "--override " + shlex.quote(f'{key}=["{item}"]')


# ---- keys with their section ---------------------------------------------------------------------


def flat_keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config tree as `section.key: value` pairs.

    >>> flat_keys({"seed": 1, "model": {"d_model": 64}})
    {'seed': 1, 'model.d_model': 64}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flat_keys(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
