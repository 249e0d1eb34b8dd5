"""Reads YAML and JSON files of a user safely: their size is limited, and odd values are refused. Configs and
case files are read here."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from support.messages import UserError

MAX_BYTES = 2**20  # in a file
MAX_VALUES = 50_000  # in a file; an alias (a reference to an earlier value) counts as if written out
MAX_DIGITS = 100  # in a number
TOO_MANY = f"more than {MAX_VALUES} values, each alias counted in full"
TOO_LONG = f"a number of more than {MAX_DIGITS} digits"
HALF_OF_A_PAIR = "half of a surrogate pair, which is not a character"
SURROGATE = re.compile("[\ud800-\udfff]")

# ---- YAML ----------------------------------------------------------------------------------------


class Plain(str):
    """A value that was written without quotes, just as it was written: `007`, `on`, `3e-4`. Whether it is a
    text, a number or a switch depends on its key (see `support.config.values`); YAML alone would guess."""


class _Loader(yaml.SafeLoader):
    """YAML without its surprises. A value without quotes stays as written (`Plain`). It is an error if a key
    is given twice, or if aliases unfold to too many values (a list of ten lists of ten lists ...)."""

    def resolve(self, kind: type, value: str | None, implicit: Any) -> str:
        """The tag of a value, which says what type it has: "!plain" for a value without quotes."""
        tag = super().resolve(kind, value, implicit)
        is_merge = tag == "tag:yaml.org,2002:merge"  # the key `<<` copies the keys of another mapping
        is_unquoted = kind is yaml.ScalarNode and implicit[0]
        return "!plain" if is_unquoted and not is_merge else tag

    def get_single_node(self) -> yaml.Node | None:
        """The document as nodes, before they become values. Raises ComposerError if it has too many values,
        or one that no config can hold."""
        root = super().get_single_node()
        todo = [root] if root else []
        count = 0
        while todo:
            node = todo.pop()
            count += 1
            problem = TOO_MANY if count > MAX_VALUES else None
            if isinstance(node, yaml.MappingNode):
                for key_node, value_node in node.value:
                    todo += [key_node, value_node]
            elif isinstance(node, yaml.SequenceNode):
                todo += node.value
            elif len(node.value) > MAX_DIGITS and node.tag.endswith((":int", ":float")):
                problem = TOO_LONG
            elif SURROGATE.search(node.value):
                problem = HALF_OF_A_PAIR
            if problem:
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The dict of a mapping node. Raises ConstructorError if a key is given twice."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("!plain", lambda loader, node: Plain(node.value))


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; in it, each value without quotes is a `Plain`. Raises UserError, which names
    the `source` of the text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise UserError(f"{where}: {problem}; fix the YAML there") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        # An impossible tag, a list as a key, values nested too deep, ...
        raise UserError(
            f"{source}: this cannot be read as the value of a config ({error}); fix the YAML there"
        ) from None


class _Dumper(yaml.SafeDumper):
    """Writes YAML with quotes around each text that a reader could take for something else: the text 8e42519
    looks like a number."""

    def represent_text(self, text: str) -> yaml.Node:
        r"""A text as YAML. Line ends of all kinds are written as escapes, such as \n: PyYAML writes some of
        them, such as U+0085, in a way that it reads back as a blank."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
# Whatever begins like a number and matches this pattern gets quotes if it is a text.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+.]?[0-9][-+.:_0-9a-zA-Z]*$"), list("-+.0123456789")
)


def dump_yaml(tree: dict) -> str:
    """The tree as YAML text. Every reader of YAML gets the same tree back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# ---- JSON ----------------------------------------------------------------------------------------

JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)
COLON = re.compile(r"\s*:")
# (what the text holds at the place of an error, the rule that it breaks)
JSON_HINTS = (
    (re.compile(r"#|/[/*]"), "JSON has no comments"),
    (re.compile(r"'"), 'JSON writes texts and keys in double quotes: "text"'),
    (re.compile(r"True|False|None"), "JSON writes true, false and null"),
    (re.compile(r"(,\s*)?[}\]]"), "the comma before it is one too many, or a value is missing"),
    (re.compile(r"[.+]?[0-9]"), "JSON writes numbers as 10, -0.5 and 3e-4"),
    (re.compile(r"[A-Za-z_]"), 'JSON writes texts and keys in double quotes: "text"'),
    (re.compile(r"\n|\t"), r"JSON writes a line end inside a text as \n, a tab as \t"),
)


def parse_json(text: str, source: str) -> Any:
    """The value of a JSON text, with the same limits as YAML. Raises UserError, which gives line and
    column."""
    if odd := find_odd_json(text):
        at, problem = odd
        raise UserError(f"{source}, {_place(text, at)}: {problem}; fix the JSON there")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = next((f" ({hint})" for start, hint in JSON_HINTS if start.match(text, error.pos)), "")
        problem = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
        raise UserError(f"{source}, {_place(text, error.pos)}: {problem}{hint}; fix the JSON there") from None
    except RecursionError:
        raise UserError(f"{source}: lists inside lists without end; fix the JSON there") from None


def _place(text: str, at: int) -> str:
    """A position in the text, in words: `line 3, column 14`."""
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"


def find_odd_json(text: str) -> tuple[int, str] | None:
    """Find the first thing in a JSON text that Python's `json` accepts but no config can hold. Returns
    (position, what is wrong), or None if all is well."""
    count = 0
    # For each object that is open at this point, the keys it has so far; for each open list, an empty set.
    open_keys: list[set[str]] = []
    for token in JSON_TOKEN.finditer(text):
        word = token[0]
        problem = None
        if word not in (",", ":", "}", "]"):
            count += 1
        if word in ("{", "["):
            open_keys.append(set())
        elif word in ("}", "]"):
            open_keys = open_keys[:-1]
        elif word[0] == '"':
            value = _json_text(word)
            if SURROGATE.search(value):
                problem = HALF_OF_A_PAIR
            if open_keys and COLON.match(text, token.end()):
                if value in open_keys[-1]:
                    problem = f"key {value!r} is given twice"
                open_keys[-1].add(value)
        elif word.strip("-") in ("NaN", "Infinity"):
            problem = f"{word} is not a number that a config can hold"
        elif re.fullmatch(r"[-+.eE0-9]+", word) and len(word) > MAX_DIGITS:
            problem = TOO_LONG
        if problem or count > MAX_VALUES:
            return token.start(), problem or TOO_MANY
    return None


def _json_text(word: str) -> str:
    """The text that a quoted word of JSON stands for. An invalid word is returned as it is: `parse_json` will
    say what is wrong with it."""
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        return word


# ---- files ---------------------------------------------------------------------------------------


def read_mapping(path: str | Path, what: str, instead: str, expected: str) -> dict:
    """The mapping (a dict) in a file, read as JSON if its name ends in .json, otherwise as YAML.

    Raises UserError if it holds something else. Its message uses `what`, the kind of file; `instead`, what to
    try if the file is missing; and `expected`, where to read about its keys.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist; {instead}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(
            f"{what} {path} has {size:,} bytes, and at most {MAX_BYTES:,} are read; is it the right file?"
        )
    try:
        text = (
            path.read_bytes().decode("utf-8").removeprefix("\ufeff")
        )  # some Windows programs put this first
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not text (byte {error.start})") from None
    if path.suffix.lower() == ".json":
        tree = parse_json(text, str(path)) if text.strip() else None
    else:
        tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        problem = "is empty" if tree in (None, "") else "is not a mapping of keys"
        raise UserError(f"{what} {path} {problem}; {expected}")
    return tree
