"""YAML and JSON of users: read safely, with bounds on what a file may unfold to. Configs and case files
come through here."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from support.messages import UserError

MAX_BYTES, MAX_VALUES, MAX_DIGITS = (
    2**20,
    50_000,
    100,
)  # of a file, values with aliases written out, digits of a number
TOO_MANY = f"more than {MAX_VALUES} values, each alias counted in full"
TOO_LONG = f"a number of more than {MAX_DIGITS} digits"
HALF_OF_A_PAIR = "half of a surrogate pair, which is not a character"
SURROGATE = re.compile("[\ud800-\udfff]")

# ---- YAML ----------------------------------------------------------------------------------------


class Plain(str):
    """A value as it is written, without quotes around it: `007`, `on`, `3e-4`. Whether that is a text, a
    number or a switch depends on its key, see `support.config.values`; plain YAML would guess."""


class _Loader(yaml.SafeLoader):
    """Safe YAML, less two surprises: what is written without quotes stays as written, and a key given
    twice is an error, as are ten aliases of ten of ten of ten ..."""

    def resolve(self, kind: type, value: str | None, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        merge = tag == "tag:yaml.org,2002:merge"  # `<<` takes in the keys of another mapping
        return "!plain" if kind is yaml.ScalarNode and implicit[0] and not merge else tag

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        todo, count = [root] if root else [], 0
        while todo:
            node, count = todo.pop(), count + 1
            problem = TOO_MANY if count > MAX_VALUES else None
            if isinstance(node, yaml.CollectionNode):
                todo += [
                    part for item in node.value for part in (item if isinstance(item, tuple) else (item,))
                ]
            elif len(node.value) > MAX_DIGITS and node.tag.endswith((":int", ":float")):
                problem = TOO_LONG
            elif SURROGATE.search(node.value):
                problem = HALF_OF_A_PAIR
            if problem:
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
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
    """The value that `text` holds, with all that has no quotes as `Plain`; `source` names it in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise UserError(
            f"{where}: {' '.join(str(getattr(error, 'problem', None) or error).split())[:200]}; fix the "
            "YAML there"
        ) from None
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
    ) as error:  # an impossible tag, a list as key, ...
        raise UserError(
            f"{source}: no value of a config can be made of this ({error}); fix the YAML there"
        ) from None


class _Dumper(yaml.SafeDumper):
    """Quotes each text that any reader of YAML could take for something else, such as 8e42519 or 007."""

    def represent_text(self, text: str) -> yaml.Node:
        """Line ends of all kinds are written as escapes: PyYAML writes some, such as U+0085, so that it
        reads a blank."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+.]?[0-9][-+.:_0-9a-zA-Z]*$"), list("-+.0123456789")
)


def dump_yaml(tree: dict) -> str:
    """Text that is read back as it was."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# ---- JSON ----------------------------------------------------------------------------------------

JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)
COLON = re.compile(r"\s*:")
JSON_HINTS = (  # what is found where JSON expects something else, and the rule
    (re.compile(r"#|/[/*]"), "JSON has no comments"),
    (re.compile(r"'"), 'JSON writes texts and keys in double quotes: "text"'),
    (re.compile(r"True|False|None"), "JSON writes true, false and null"),
    (re.compile(r"(,\s*)?[}\]]"), "the comma before it is one too many, or a value is missing"),
    (re.compile(r"[.+]?[0-9]"), "JSON writes numbers as 10, -0.5 and 3e-4"),
    (re.compile(r"[A-Za-z_]"), 'JSON writes texts and keys in double quotes: "text"'),
    (re.compile(r"\n|\t"), r"JSON writes a line end inside a text as \n, a tab as \t"),
)


def parse_json(text: str, source: str) -> Any:
    """The value of a JSON text. Raises UserError with line and column, within the same bounds as YAML."""
    if found := odd_json(text):
        at, problem = found
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
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"


def odd_json(text: str) -> tuple[int, str] | None:
    """Where the text has something that Python's reader of JSON lets pass and no config can hold, and
    what; else None."""
    count, keys_of = 0, []  # for each object around the token its keys so far, for each list an empty set
    for token in JSON_TOKEN.finditer(text):
        word, problem = token[0], None
        count += word not in ",:}]"
        if word in "{[":
            keys_of.append(set())
        elif word in "}]":
            keys_of = keys_of[:-1]
        elif word[0] == '"':
            value = _json_text(word)
            problem = HALF_OF_A_PAIR if SURROGATE.search(value) else None
            if keys_of and COLON.match(text, token.end()):
                problem = f"key {value!r} is given twice" if value in keys_of[-1] else problem
                keys_of[-1].add(value)
        elif word.strip("-") in ("NaN", "Infinity"):
            problem = f"{word} is not a number that a config can hold"
        elif re.fullmatch(r"[-+.eE0-9]+", word) and len(word) > MAX_DIGITS:
            problem = TOO_LONG
        if problem or count > MAX_VALUES:
            return token.start(), problem or TOO_MANY
    return None


def _json_text(word: str) -> str:
    """The text that a quoted word of JSON means; the word itself where it is not valid, which `json.loads`
    then says."""
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        return word


# ---- files ---------------------------------------------------------------------------------------


def read_mapping(path: str | Path, what: str, instead: str, expected: str) -> dict:
    """The mapping in a file: JSON where its name ends in .json, else YAML. Raises UserError where there is
    none: `what` names the kind of file, `instead` says what to try where it is missing, `expected` where
    to read about its keys."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist; {instead}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(
            f"{what} {path} has {size:,} bytes, and {MAX_BYTES:,} at most are read; is it another file?"
        )
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")  # the mark that Windows puts first
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not text (byte {error.start})") from None
    if path.suffix.lower() == ".json":
        tree = parse_json(text, str(path)) if text.strip() else None
    else:
        tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(
            f"{what} {path} {'is empty' if tree in (None, '') else 'is not a mapping of keys'}; {expected}"
        )
    return tree
