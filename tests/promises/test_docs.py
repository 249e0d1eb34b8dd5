"""The pages say what is true: their commands parse and run, and every file, symbol, key, flag and link in
them exists.

Commands stand in fenced blocks marked `sh` (or are indented by four), one a line; snippets in blocks marked
`python`; names in `backticks`. A list item "- `file.py`: `A`, `B`" says that A and B are defined in that
file.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPO

from support.config.read import flag_overrides, load_config
from support.config.schema import Config, sections
from support.evaluation.case_files import read_case_file

GUIDES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
PAGES = [*GUIDES, REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md"]
EXECUTED = [
    "README.md",
    "docs/LEARNING_PATH.md",
    "docs/TROUBLESHOOTING.md",
    "docs/ARCHITECTURE.md",
    "docs/EVALUATION.md",
    "docs/FINETUNING.md",
    "docs/CONVERTING.md",
    "docs/GPT2_TO_LLAMA.md",
    "docs/DATA.md",
]
QUICKSTART = [  # what the project has promised to be enough, in this order
    "pip install -r requirements.txt",
    "python3 train.py --config config_smoke.yaml",
    'python3 infer.py --ckpt checkpoints/final.ckpt --tokenizer gpt2 --prompt "Attention is"',
    "python3 list.py",
    "python3 train.py --config config.yaml",
    "python3 train.py --config config_smoke.yaml --override data.path=my_book.txt --override "
    "training.max_steps=1000",
]
SECTIONS = sections()
WRITTEN_BY_RUNS = {"run_config.yaml"}
WRITTEN = re.compile(r"[\w*-]+\.(ckpt|jsonl|svg|png|json|csv|html)")
THE_USERS = {
    "my_book.txt",
    "my_instructions.json",
    "data/instructions.json",
    "data/shakespeare.txt",
    "data/wikitext2.txt",
    "tokenizer.json",
}
OUTSIDE = {  # names in backticks that are not ours: the environment's, Lightning's, PyTorch's, and what other projects call our fields
    *(
        "HF_HOME",
        "HTTPS_PROXY",
        "lr_schedulers",
        "optimizer_states",
        "torch._dynamo",
        "torch._inductor",
        "model_state_dict",
        "optimizer_state_dict",
    )
}


def name(page: Path) -> str:
    return str(page.relative_to(REPO))


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=name)


# ---- reading pages -------------------------------------------------------------------------------

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks, in order."""
    return [
        (language, text)
        for language, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if language in languages
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """What stands in `backticks`."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def command_lines(text: str) -> list[str]:
    joined = re.sub(r"\s*\\\n\s*", " ", text)  # a backslash ends a line that the next one continues
    return [
        line for line in (raw.strip() for raw in joined.splitlines()) if line and not line.startswith("#")
    ]


def simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a line; pipes, && and redirections separate, variables in front are
    dropped."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;<>()"):
            commands.append([])
        elif commands[-1] or not re.match(r"[A-Z_]+=", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def script_call(words: list[str]) -> tuple[str, list[str]] | None:
    """(script, its arguments) of `python3 x.py ...` and `torchrun ... x.py ...`."""
    if words[0] in ("python3", "python", "torchrun"):
        for i, word in enumerate(words[1:], 1):
            if word.endswith(".py"):
                return word, words[i + 1 :]
            if words[0] != "torchrun":
                return None
    return None


def all_lines(page: Path) -> list[str]:
    indented = re.findall(r"^(?: {4,}|\t)((?:python3?|make|pip|torchrun)\b.*)$", prose(page), re.M)
    return [
        line
        for text in (*(text for _, text in blocks(page, "sh")), *indented)
        for line in command_lines(text)
    ]


LINES = [
    pytest.param(page, line, id=f"{name(page)}: {line[:90]}")
    for page in PAGES
    for line in dict.fromkeys(all_lines(page))
]


# ---- what there is -------------------------------------------------------------------------------


@functools.cache
def config_keys() -> frozenset[str]:
    return frozenset(
        {
            *Config.model_fields,
            *(f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields),
        }
    )


@functools.cache
def definitions(path: Path) -> frozenset[str]:
    """Functions, classes, `Class.member` and constants that a file defines."""
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

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(names)


OURS = [*sorted(REPO.glob("*.py")), *sorted((REPO / "support").rglob("*.py"))]
TESTS = [path for path in sorted((REPO / "tests").rglob("*.py")) if path != Path(__file__).resolve()]
SOURCES = [*OURS, *TESTS]


@functools.cache
def words_in_source() -> frozenset[str]:
    """Every identifier of the code, and every string constant that could be one (metrics, checkpoint
    fields, flags)."""
    words: set[str] = set()
    for path in SOURCES:
        words |= definitions(path)
        for node in (
            ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.parent.name != "tests" else ()
        ):
            for field in ("id", "attr", "arg", "name"):
                if isinstance(value := getattr(node, field, None), str):
                    words.add(value)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                words.add(node.value)
    return frozenset(words | {key.rsplit(".", 1)[-1] for key in config_keys()})


def exists(symbol: str) -> bool:
    """Whether the code knows the name; of `Class.member`, whether our class has it, or the code uses both
    parts."""
    first, _, member = symbol.partition(".")
    if member and any(first in definitions(path) for path in SOURCES):
        return any(symbol in definitions(path) for path in SOURCES)
    return set(symbol.split(".")) <= words_in_source()


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M))


# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "line"), LINES)
def test_a_command_parses_and_its_files_and_keys_exist(page, line, capsys):
    for words in simple_commands(line):
        if call := script_call(words):
            if missing_package(call[1]) == "lm_eval":  # answered before the flags are returned
                pytest.skip("lm-eval is not installed")
            check_script_call(*call, capsys)
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= make_targets()
        elif words[:2] in (["python3", "-m"], ["python", "-m"]):
            assert (
                words[2] in ("venv", "pytest") or (REPO / (words[2].replace(".", "/") + ".py")).is_file()
            ), line
        for word in words:
            if re.fullmatch(r"(tests|docs|configs|\.ci)/\S+|requirements\S*\.txt", word):
                assert (REPO / word).exists(), f"{word} does not exist"


def check_script_call(script: str, argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert (REPO / script).is_file(), f"{script} does not exist"
    try:
        args = importlib.import_module(Path(script).stem).parse_args(argv)
    except SystemExit as end:
        assert end.code == 0, capsys.readouterr().err
        return
    overrides = flag_overrides(args) if hasattr(args, "override") else []
    if getattr(args, "config", None):
        load_config(REPO / args.config, overrides)
    unknown = {override.partition("=")[0] for override in overrides} - config_keys()
    assert not unknown, f"no such key: {unknown}"


def test_readme_has_the_promised_commands_in_order():
    lines = [line for line in all_lines(REPO / "README.md") if line in QUICKSTART]
    assert list(dict.fromkeys(lines)) == QUICKSTART
    assert {"make smoke", "make test"} <= set(all_lines(REPO / "README.md"))


@each(PAGES)
def test_no_command_hides_in_a_block_of_another_kind(page):
    other = [
        text
        for language, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if language not in ("sh", "python")
    ]
    assert not [
        line for text in other for line in re.findall(r"^(?:python3?|make|pip|torchrun)\b.*$", text, re.M)
    ]


def test_the_checks_of_this_file_notice():
    """Each of the readers above, on a line that must fail or whose answer is plain."""
    assert simple_commands("echo hi | A=1 python3 infer.py --ckpt 'a b'  # why") == [
        ["echo", "hi"],
        ["python3", "infer.py", "--ckpt", "a b"],
    ]
    assert script_call(["torchrun", "--nnodes", "2", "train.py", "--fresh"]) == ("train.py", ["--fresh"])
    assert "model.n_kv_heads" in config_keys() and "model.n_heds" not in config_keys()
    assert {"GPTMini", "GPTMini.generate", "GPTConfig.d_model"} <= definitions(REPO / "model.py")
    assert (
        exists("GPTMini.generate")
        and exists("pl.Trainer")
        and not exists("GPTMini.generates")
        and not exists("GPTMaxi")
    )


# ---- names ---------------------------------------------------------------------------------------

FILE = re.compile(r"[\w./-]*\w\.(py|yaml|md|toml|txt)")
KEY = re.compile(rf"(?:{'|'.join(SECTIONS)})\.[a-z_]+")
SYMBOL = re.compile(r"_?[A-Za-z]\w*(\.\w+)*(\(\))?")


@each(PAGES)
def test_files_in_backticks_exist(page):
    files = {span for span in spans(page) if FILE.fullmatch(span)} - WRITTEN_BY_RUNS - THE_USERS
    missing = [file for file in files if not (REPO / file).is_file() and not (page.parent / file).is_file()]
    assert not missing


@each(PAGES)
def test_config_keys_in_backticks_exist(page):
    keys = {
        match
        for span in spans(page)
        if not FILE.fullmatch(span)
        for match in re.findall(rf"(?<![\w./-]){KEY.pattern}(?!\.?\w)", span)
    }
    named_override = {
        key for key in re.findall(r"--override '?([a-z_.]+)=", prose(page)) if key not in ("key", "a.b")
    }
    assert (keys | named_override) <= config_keys(), (keys | named_override) - config_keys()


@each(PAGES)
def test_config_settings_in_backticks_are_possible(page):
    """`model.norm=layernorm`: not only the key, the value too. Those of `data` hang together and are left
    out."""
    for span in spans(page):
        if re.fullmatch(rf"(?!data){KEY.pattern}=[\w.-]+", span):
            load_config(REPO / "config_smoke.yaml", [span])


@each(PAGES)
def test_symbols_in_backticks_exist(page):
    """Names with a capital or an underscore, `Class.member` and `call()`; plain words are left alone."""
    named = {
        span.removesuffix("()")
        for span in set(spans(page)) - OUTSIDE
        if SYMBOL.fullmatch(span) and re.search(r"[A-Z_.()]", span)
    }
    ours = {
        symbol
        for symbol in named
        if not FILE.fullmatch(symbol) and not KEY.fullmatch(symbol) and not WRITTEN.fullmatch(symbol)
    }
    assert not {symbol for symbol in ours if not exists(symbol)}


@each(PAGES)
def test_flags_in_backticks_exist(page):
    flags = {flag for span in spans(page) for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}
    assert flags <= words_in_source(), flags - words_in_source()


@each(PAGES)
def test_symbols_listed_for_a_file_are_defined_in_it(page):
    on_one_line = re.sub(r"\n +", " ", prose(page))
    for file, listed in re.findall(
        r"^- `([\w/]+\.py)`: ((?:`[^`]+`(?:,? (?:and |then |above all )?)?)+)", on_one_line, re.M
    ):
        symbols = set(re.findall(r"`([^`]+)`", listed))
        assert symbols <= definitions(REPO / file), (
            f"{file} does not define {symbols - definitions(REPO / file)}"
        )


def test_messages_quoted_in_troubleshooting_are_said():
    """A message stands there in bold, `...` in place of what varies; each piece must be part of a string
    of the code."""
    quoted = re.findall(
        r"\*\*`([^`]+)`\*\*", (REPO / "docs" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
    )
    nodes = [node for path in OURS for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    said = "\n".join(
        node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert len(quoted) > 5
    assert [piece for message in quoted for piece in message.split("...") if piece.strip() not in said] == []


@each(PAGES)
def test_yaml_blocks_hold_keys_that_exist(page, tmp_path):
    """Of a config, or of a file of cases, which is read."""
    for _, text in blocks(page, "yaml"):
        if "cases" in yaml.safe_load(text):
            (tmp_path / "cases.yaml").write_text(text, encoding="utf-8")
            assert read_case_file(tmp_path / "cases.yaml")
            continue
        for section, keys in yaml.safe_load(text).items():
            assert (
                {f"{section}.{key}" for key in keys} <= config_keys()
                if isinstance(keys, dict)
                else section in config_keys()
            )


# ---- links and rules -----------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each(PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(there), f"{name(there)} has no heading {anchor}"


# A page with its section: page.md#anchor, or (page.md, heading), or page.md, "heading".
PLACE = re.compile(
    r"(?<![\w/])((?:docs/)?[A-Z][A-Z0-9_]+\.md)(?:#([\w-]*\w)|, (?:section )?[\"'`]([^\"'`\n]+)[\"'`]|, "
    r"([^()\n]+)\))?"
)


def missing_places(text: str) -> list[str]:
    """The pages and sections that a text names and that are not there."""
    missing = []
    for page, anchor, quoted, bare in PLACE.findall(text):
        there = next((path for path in (REPO / page, REPO / "docs" / page) if path.is_file()), None)
        heading = (quoted or bare).removesuffix(".")
        slug = anchor or re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        if there is None or (slug and slug not in anchors(there)):
            missing.append(f"{page} {anchor or heading}".strip())
    return missing


@pytest.mark.parametrize("path", OURS, ids=name)
def test_pages_and_sections_named_in_the_code_exist(path):
    """In its messages, where a name may be put together of several strings, and in its comments."""
    source = path.read_text(encoding="utf-8")
    nodes = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    comments = re.findall(r"#.*", source)
    assert [
        place for text in (*(node.value for node in nodes), *comments) for place in missing_places(text)
    ] == []


@pytest.mark.parametrize(
    "path", sorted([*REPO.glob("*.yaml"), *REPO.glob("*/*.yaml"), REPO / "Makefile"]), ids=name
)
def test_pages_and_sections_named_in_configs_exist(path):
    assert missing_places(path.read_text(encoding="utf-8")) == []


def test_the_reader_of_pages_and_sections_notices():
    assert (
        missing_places(
            "see docs/DATA.md#token-files, docs/EVALUATION.md (docs/TROUBLESHOOTING.md, no network) or "
            "README.md."
        )
        == []
    )
    wrong = (
        "docs/DATA.md#tokens; docs/NOWHERE.md; (docs/TROUBLESHOOTING.md, offline); docs/DATA.md, section "
        '"No such"'
    )
    assert missing_places(wrong) == [
        "docs/DATA.md tokens",
        "docs/NOWHERE.md",
        "docs/TROUBLESHOOTING.md offline",
        "docs/DATA.md No such",
    ]


def test_readme_leads_to_every_page():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert [name(page) for page in PAGES[1:] if f"]({name(page)})" not in readme] == []


def test_readme_is_short_and_its_tree_complete():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    tree = next(text for _, text in blocks(REPO / "README.md", "text") if "model.py" in text)
    assert {name(path) for path in OURS if path.parent.parent.name != "support"} == set(
        re.findall(r"[\w/]+\.py", tree)
    )
    assert {
        name(path) + "/" for path in (REPO / "support").iterdir() if path.is_dir() and path.name[0] != "_"
    } <= set(tree.split())
    assert all((REPO / file).exists() for file in re.findall(r"[\w./]+\.(?:yaml|txt)|[\w/]+/(?= )", tree))


@each(PAGES)
def test_pages_name_no_line_numbers_and_no_machine(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"\.py:\d+|#L\d+|\b[Ll]ines? \d+", prose(page))
    assert not re.findall(r"(?<![\w.])/(?:work|tmp|root|home|Users)/\S*", text)


def test_every_skip_of_the_suite_is_listed_and_every_listed_one_exists():
    """The gate fails on a skip that CONTRIBUTING.md does not list; better to fail here, where it is cheap."""
    listed = re.findall(r"^- skip: (.+)$", (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    reasons = {reason for path in TESTS for reason in skip_reasons(path)}
    assert [reason for reason in reasons if not reason.startswith(tuple(listed))] == []
    assert [entry for entry in listed if not any(reason.startswith(entry) for reason in reasons)] == []


def skip_reasons(path: Path) -> set[str]:
    """The (beginnings of the) reasons given to pytest.skip and skipif."""
    reasons = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(
            (".skip", ".skipif", ".importorskip")
        ):
            continue
        given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"] or node.args[:1]
        for value in given:
            first = value.values[0] if isinstance(value, ast.JoinedStr) else value
            reasons.add(first.value if isinstance(first, ast.Constant) else ast.unparse(first))
    return reasons


def test_the_licence_is_the_whole_apache_licence():
    import hashlib

    digest = hashlib.sha256((REPO / "LICENSE").read_bytes()).hexdigest()
    assert (
        digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )  # of the text the Apache foundation publishes


# ---- running them --------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository without what runs and tools have left there, as working folder; with a text
    of the user's."""
    here = tmp_path / "clone"
    shutil.copytree(
        REPO,
        here,
        ignore=shutil.ignore_patterns(
            ".git", ".venv*", "checkpoints*", "runs", "results", "__pycache__", ".*_cache"
        ),
    )
    shutil.copy(here / "data" / "tiny_corpus.txt", here / "my_book.txt")
    shutil.copy(here / "data" / "tiny_instructions.json", here / "my_instructions.json")
    for text in (
        "wikitext2.txt",
        "shakespeare.txt",
        "the-verdict.txt",
    ):  # in place of what configs/ ask the user to bring
        shutil.copy(here / "data" / "tiny_corpus.txt", here / "data" / text)
    monkeypatch.chdir(here)
    return here


def needs_network(argv: list[str]) -> bool:
    """Whether the config names a dataset of the Hugging Face hub, the harness one of its tasks, convert.py
    a model or prepare.py a dataset."""
    if "--from" in argv:
        return not Path(argv[argv.index("--from") + 1]).exists()
    if "--config" not in argv:
        return "--lm-eval" in argv or "--dataset" in argv
    overrides = [argv[i + 1] for i, word in enumerate(argv) if word == "--override"]
    data = load_config(REPO / argv[argv.index("--config") + 1], overrides).data
    return data.source != "text" and data.path is None


def missing_package(argv: list[str]) -> str | None:
    """The optional package that a command needs, where it is not installed."""
    needed = "lm_eval" if "--lm-eval" in argv else "gguf" if "gguf" in argv else None
    return needed if needed and importlib.util.find_spec(needed) is None else None


def shrunk(script: str, argv: list[str]) -> list[str]:
    """The same command, with two steps where it trains."""
    if script not in ("train.py", "finetune.py") or {
        "--show-step",
        "--show-mask",
        "training.max_steps=0",
    } & set(argv):
        return argv
    keys = ("max_steps=2", "warmup_steps=0", "schedule_steps=2", "epochs=null")
    return argv + [word for key in keys for word in ("--override", f"training.{key}")]


def run_here(script: str, argv: list[str]) -> None:
    """Run `main` as the script would, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(Path(script).stem).main(argv)
        except SystemExit as end:
            code = end.code
    assert not code, (
        f"python3 {script} {shlex.join(argv)}: exit {code}\n{out.getvalue()[-2000:]}\n"
        f"{err.getvalue()[-2000:]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", EXECUTED)
def test_the_commands_and_snippets_of_a_page_run_in_order(page, clone, monkeypatch):
    """All `python3 x.py` commands and all Python snippets, in the page's order, in one folder."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    ran, not_made = 0, []  # commands; what those that need the network would have written
    for language, text in blocks(clone / page, "sh", "python"):
        if language == "python":
            exec(compile(text, f"a snippet of {page}", "exec"), {"__name__": "__main__"})
            ran += 1
            continue
        for words in (words for line in command_lines(text) for words in simple_commands(line)):
            call = script_call(words)
            if call is None or words[0] == "torchrun":
                continue
            if (
                needs_network(call[1])
                or missing_package(call[1])
                or any(path in word for word in call[1] for path in not_made)
            ):
                not_made += [call[1][call[1].index("--output") + 1]] if "--output" in call[1] else []
                continue
            run_here(call[0], shrunk(*call))
            ran += 1
    assert ran or page == "docs/ARCHITECTURE.md", "nothing was run: have the marks of the blocks changed?"


@pytest.mark.slow
def test_the_table_of_machines_is_what_its_snippet_prints():
    page = REPO / "docs" / "TROUBLESHOOTING.md"
    [snippet] = [text for _, text in blocks(page, "python") if "estimate_memory" in text]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "the snippet", "exec"), {})
    rows = re.search(r"^\| machine \|.*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.M)[1]
    assert out.getvalue() == rows


@pytest.mark.slow
def test_the_quickstart_runs_as_typed(clone):
    """Real processes, the real number of steps in the first run, and what a learner sees in the end."""
    commands = [
        line
        for line in all_lines(clone / "README.md")
        if line in QUICKSTART and line.startswith("python3") and "config.yaml" not in line
    ]
    said = {}
    for line in commands:
        words = simple_commands(line)[0]
        argv = words[2:] if line == QUICKSTART[1] else shrunk(words[1], words[2:])
        done = subprocess.run(
            [sys.executable, words[1], *argv], capture_output=True, text=True, env={**os.environ}, cwd=clone
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said[line] = done
    losses = [float(loss) for loss in re.findall(r"  loss (\S+)", said[QUICKSTART[1]].stdout)]
    assert losses[-1] < 2 / 3 * losses[0]
    assert (
        said[QUICKSTART[2]].stdout.startswith("Attention is") and len(said[QUICKSTART[2]].stdout.split()) > 10
    )
    assert "--tokenizer gpt2 is not what this model was trained with" in said[QUICKSTART[2]].stderr
    assert re.search(
        r"^checkpoints/step-0000050\.ckpt .* last best final *$", said[QUICKSTART[3]].stdout, re.M
    )
    assert (clone / "checkpoints" / "old-1" / "final.ckpt").exists(), (
        "the second run moves the first one aside"
    )
