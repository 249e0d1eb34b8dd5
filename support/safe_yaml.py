"""YAML of users: read with a safe loader that also bounds what a file may unfold to. Configs and case files come through here."""

import re
from pathlib import Path
from typing import Any

import yaml

from support.cli import UserError

MAX_BYTES, MAX_VALUES, MAX_DIGITS = 2**20, 50_000, 100  # of a file, values with aliases written out, digits of a number


class _Loader(yaml.SafeLoader):
    """Safe YAML, less three surprises: `3e-4` is a number; a key given twice is an error, as are ten aliases of ten of ten of ten ..."""

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        todo, count = [root] if root else [], 0
        while todo:
            node, count = todo.pop(), count + 1
            problem = f"more than {MAX_VALUES} values, each alias counted in full" if count > MAX_VALUES else None
            if isinstance(node, yaml.CollectionNode):
                todo += [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            elif len(node.value) > MAX_DIGITS and node.tag.endswith((":int", ":float")):
                problem = f"a number of more than {MAX_DIGITS} digits"
            elif re.search("[\ud800-\udfff]", node.value):
                problem = "half of a surrogate pair, which is no character"
            if problem:
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` holds; `source` names it in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise UserError(f"{where}: {' '.join(str(getattr(error, 'problem', None) or error).split())[:200]}; mend the YAML there") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:  # an impossible date, a list as key, ...
        raise UserError(f"{source}: no value of a config can be made of this ({error}); mend the YAML there") from None


def dump_yaml(tree: dict) -> str:
    """Text that `parse_yaml` reads back as it was: a string that looks like a number to our reader is quoted."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_mapping(path: str | Path, what: str, instead: str, expected: str) -> dict:
    """The mapping in a YAML or JSON file. Raises UserError where there is none: `what` names the kind of file,
    `instead` says what to try where it is missing, `expected` where to read about its keys."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist; {instead}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{what} {path} has {size:,} bytes, and {MAX_BYTES:,} at most are read; is it another file?")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not text (byte {error.start})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} {path} {'is empty' if tree is None else 'is not a mapping of keys'}; {expected}")
    return tree
