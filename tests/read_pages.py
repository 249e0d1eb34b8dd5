"""Reads the pages, and the names in the code that the pages may use.

Commands are in fenced blocks marked `sh` (or are indented by four blanks), one a line; a backslash continues
a line. Snippets are in blocks marked `python`, names in `backticks`.
"""

import ast
import functools
import re
import shlex
from pathlib import Path

from conftest import REPO

from support.config.schema import Config, sections

GUIDES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
PAGES = [*GUIDES, REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md"]
OURS = [*sorted(REPO.glob("*.py")), *sorted((REPO / "support").rglob("*.py"))]
# test_docs.py itself names things that must not exist.
TESTS = [path for path in sorted((REPO / "tests").rglob("*.py")) if path.name != "test_docs.py"]
SECTIONS = sections()


def name(path: Path) -> str:
    return str(path.relative_to(REPO))


# ---- pages ---------------------------------------------------------------------------------------

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def all_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks, in order."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks in these languages, in order."""
    return [(language, text) for language, text in all_blocks(page) if language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """The texts in `backticks`."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may give after its #."""
    return {anchor(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.M)}


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# A page with its section: page.md#anchor, or (page.md, heading), or page.md, "heading".
PLACE = re.compile(
    r"(?<![\w/])((?:docs/)?[A-Z][A-Z0-9_]+\.md)"
    r"(?:#([\w-]*\w)|, (?:section )?[\"'`]([^\"'`\n]+)[\"'`]|, ([^()\n]+)\))?"
)


def missing_places(text: str) -> list[str]:
    """The pages and sections that a text names but that do not exist."""
    missing = []
    for page, given, quoted, bare in PLACE.findall(text):
        path = next((path for path in (REPO / page, REPO / "docs" / page) if path.is_file()), None)
        heading = (quoted or bare).removesuffix(".")
        wanted = given or anchor(heading)
        if path is None or (wanted and wanted not in anchors(path)):
            missing.append(f"{page} {given or heading}".strip())
    return missing


# ---- commands ------------------------------------------------------------------------------------

COMMAND = r"(?:python3?|make|pip|torchrun)\b.*$"


def command_lines(text: str) -> list[str]:
    """The commands of a block, each on one line, without comments and empty lines."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    lines = (line.strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def page_commands(page: Path) -> list[str]:
    """All command lines of a page."""
    fenced = [text for _, text in blocks(page, "sh")]
    indented = re.findall(rf"^(?: {{4,}}|\t)({COMMAND})", prose(page), re.M)
    return [line for text in (*fenced, *indented) for line in command_lines(text)]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a line. Pipes, && and redirections separate commands; variables in front
    of a command are dropped."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        is_variable = not commands[-1] and re.match(r"[A-Z_]+=", word)
        if set(word) <= set("|&;<>()"):
            commands.append([])
        elif not is_variable:
            commands[-1].append(word)
    return [words for words in commands if words]


def script_call(words: list[str]) -> tuple[str, list[str]] | None:
    """(script, its arguments) of `python3 x.py ...` and `torchrun ... x.py ...`, else None."""
    if words[0] in ("python3", "python"):
        at = 1
    elif words[0] == "torchrun":
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
    else:
        return None
    if at < len(words) and words[at].endswith(".py"):
        return words[at], words[at + 1 :]
    return None


# ---- names of the code ---------------------------------------------------------------------------


@functools.cache
def config_keys() -> frozenset[str]:
    """Every key of a config: `seed`, `model.d_model`, ..."""
    nested = {f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields}
    return frozenset({*Config.model_fields, *nested})


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def string_constants(path: Path) -> list[str]:
    """The string constants of a file, docstrings included."""
    constants = (node.value for node in ast.walk(parsed(path)) if isinstance(node, ast.Constant))
    return [value for value in constants if isinstance(value, str)]


@functools.cache
def definitions(path: Path) -> frozenset[str]:
    """The functions, classes, `Class.member`s and constants that a file defines."""
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef) and not prefix:
                visit(node.body, f"{node.name}.")
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    names.add(prefix + target.id)

    visit(parsed(path).body, "")
    return frozenset(names)


@functools.cache
def words_in_source() -> frozenset[str]:
    """Every identifier of the code, every string constant that could be one (metrics, checkpoint fields,
    flags), and what the tests define."""
    words = {key.rsplit(".", 1)[-1] for key in config_keys()}
    for path in (*OURS, *TESTS):
        words |= definitions(path)
    for path in OURS:
        words |= {value for value in string_constants(path) if " " not in value}
        for node in ast.walk(parsed(path)):
            values = (getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
            words |= {value for value in values if isinstance(value, str)}
    return frozenset(words)


def exists(symbol: str) -> bool:
    """Whether the code knows the name. `Class.member` must be in our class, if the class is ours; else the
    code must use both parts."""
    first, _, member = symbol.partition(".")
    files = [path for path in (*OURS, *TESTS) if first in definitions(path)]
    if member and files:
        return any(symbol in definitions(path) for path in files)
    return set(symbol.split(".")) <= words_in_source()


def skip_reasons(path: Path) -> set[str]:
    """The reasons (or their beginnings) that a file gives to pytest.skip, skipif and importorskip."""
    reasons = set()
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        if not ast.unparse(node.func).endswith((".skip", ".skipif", ".importorskip")):
            continue
        given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"] or node.args[:1]
        for value in given:
            first = value.values[0] if isinstance(value, ast.JoinedStr) else value
            reasons.add(first.value if isinstance(first, ast.Constant) else ast.unparse(first))
    return reasons
