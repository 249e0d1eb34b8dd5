"""The pages say what is true: their commands parse and run, and every file, symbol, key, flag and link in
them exists. A list item "- `file.py`: `A`, `B`" says that the file defines A and B.

tests/read_pages.py reads the pages and the code; here are the promises.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import REPO
from read_pages import (
    COMMAND,
    GUIDES,
    OURS,
    PAGES,
    SECTIONS,
    TESTS,
    all_blocks,
    anchors,
    blocks,
    command_lines,
    config_keys,
    definitions,
    exists,
    missing_places,
    name,
    page_commands,
    prose,
    script_call,
    simple_commands,
    skip_reasons,
    spans,
    string_constants,
    words_in_source,
)

from support.config.read import flag_overrides, load_config
from support.evaluation.case_files import read_case_file

README = REPO / "README.md"
TROUBLESHOOTING = REPO / "docs" / "TROUBLESHOOTING.md"
# These hold only what another page or the code says, or figures that take hours to make again.
NOT_RUN = {"docs/CONFIG_REFERENCE.md", "docs/EXPERIMENTS.md", "docs/RELIABILITY.md"}
RUN = [name(page) for page in GUIDES if name(page) not in NOT_RUN]
# The project has promised that these commands are enough, in this order.
QUICKSTART = [
    "pip install -r requirements.txt",
    "python3 train.py --config config_smoke.yaml",
    'python3 infer.py --ckpt checkpoints/final.ckpt --tokenizer gpt2 --prompt "Attention is"',
    "python3 list.py",
    "python3 train.py --config config.yaml",
    "python3 train.py --config config_smoke.yaml --override data.path=my_book.txt "
    "--override training.max_steps=1000",
]
# Files that a page may name although they are not in the repository.
WRITTEN_BY_RUNS = {"run_config.yaml"}
RUN_FILE = re.compile(r"[\w*-]+\.(ckpt|jsonl|svg|png|json|csv|html)")
FILES_OF_THE_USER = {
    "my_book.txt",
    "my_instructions.json",
    "data/instructions.json",
    "data/shakespeare.txt",
    "data/wikitext2.txt",
    "tokenizer.json",
}
# Names of the environment, of Lightning and of PyTorch, and names that other projects give our fields.
NOT_OUR_NAMES = {
    "HF_HOME",
    "HTTPS_PROXY",
    "lr_schedulers",
    "optimizer_states",
    "torch._dynamo",
    "torch._inductor",
    "model_state_dict",
    "optimizer_state_dict",
}
COLUMNS_OF_PROSE = 100


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=name)


# ---- commands ------------------------------------------------------------------------------------

LINES = [
    pytest.param(line, id=f"{name(page)}: {line[:90]}")
    for page in PAGES
    for line in dict.fromkeys(page_commands(page))
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_parses_and_its_files_and_keys_exist(line, capsys):
    for words in simple_commands(line):
        if call := script_call(words):
            if missing_package(call[1]) == "lm_eval":  # parse_args needs it to answer
                pytest.skip("lm-eval is not installed")
            check_script_call(*call, capsys)
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= make_targets()
        elif words[:2] in (["python3", "-m"], ["python", "-m"]):
            is_ours = (REPO / (words[2].replace(".", "/") + ".py")).is_file()
            assert is_ours or words[2] in ("venv", "pytest"), line
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


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M))


def test_readme_has_the_promised_commands_in_order():
    commands = page_commands(README)
    promised = [line for line in commands if line in QUICKSTART]
    assert list(dict.fromkeys(promised)) == QUICKSTART
    assert {"make smoke", "make test"} <= set(commands)


@each(PAGES)
def test_no_command_is_in_a_block_of_another_kind(page):
    others = [text for language, text in all_blocks(page) if language not in ("sh", "python")]
    assert [line for text in others for line in re.findall(rf"^{COMMAND}", text, re.M)] == []


def test_the_readers_of_commands_and_names_notice():
    """Each reader, on a line that must fail or whose answer is plain."""
    assert simple_commands("echo hi | A=1 python3 infer.py --ckpt 'a b'  # why") == [
        ["echo", "hi"],
        ["python3", "infer.py", "--ckpt", "a b"],
    ]
    assert command_lines("# first\nmake a \\\n    b\n\nmake c\n") == ["make a b", "make c"]
    assert script_call(["torchrun", "--nnodes", "2", "train.py", "--fresh"]) == ("train.py", ["--fresh"])
    assert script_call(["python3", "-m", "pytest", "tests/core/test_model.py"]) is None
    assert "model.n_kv_heads" in config_keys()
    assert "model.n_heds" not in config_keys()
    assert {"GPTMini", "GPTMini.generate", "GPTConfig.d_model"} <= definitions(REPO / "model.py")
    assert exists("GPTMini.generate")
    assert exists("pl.Trainer")
    assert not exists("GPTMini.generates")
    assert not exists("GPTMaxi")


# ---- names ---------------------------------------------------------------------------------------

FILE = re.compile(r"[\w./-]*\w\.(py|yaml|md|toml|txt)")
KEY = re.compile(rf"(?:{'|'.join(SECTIONS)})\.[a-z_]+")
SYMBOL = re.compile(r"_?[A-Za-z]\w*(\.\w+)*(\(\))?")


@each(PAGES)
def test_files_in_backticks_exist(page):
    files = {span for span in spans(page) if FILE.fullmatch(span)} - WRITTEN_BY_RUNS - FILES_OF_THE_USER
    folders = (REPO, page.parent)
    assert [file for file in files if not any((folder / file).is_file() for folder in folders)] == []


@each(PAGES)
def test_config_keys_in_backticks_exist(page):
    not_files = [span for span in spans(page) if not FILE.fullmatch(span)]
    keys = {key for span in not_files for key in re.findall(rf"(?<![\w./-]){KEY.pattern}(?!\.?\w)", span)}
    overridden = set(re.findall(r"--override '?([a-z_.]+)=", prose(page))) - {"key"}
    assert (keys | overridden) - config_keys() == set()


@each(PAGES)
def test_config_settings_in_backticks_are_possible(page):
    """`model.norm=layernorm`: the value as well as the key. Settings of `data` depend on each other, so they
    are left out."""
    for span in spans(page):
        if re.fullmatch(rf"(?!data){KEY.pattern}=[\w.-]+", span):
            load_config(REPO / "config_smoke.yaml", [span])


@each(PAGES)
def test_symbols_in_backticks_exist(page):
    """Names with a capital or an underscore, `Class.member` and `call()`. Plain words are not checked."""

    def is_symbol(span: str) -> bool:
        looks_like_one = SYMBOL.fullmatch(span) and re.search(r"[A-Z_.()]", span)
        is_another_thing = any(kind.fullmatch(span) for kind in (FILE, KEY, RUN_FILE))
        return bool(looks_like_one) and not is_another_thing

    symbols = {span.removesuffix("()") for span in set(spans(page)) - NOT_OUR_NAMES if is_symbol(span)}
    assert {symbol for symbol in symbols if not exists(symbol)} == set()


@each(PAGES)
def test_flags_in_backticks_exist(page):
    flags = {flag for span in spans(page) for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}
    assert flags - words_in_source() == set()


@each(PAGES)
def test_symbols_listed_for_a_file_are_defined_in_it(page):
    items_on_one_line = re.sub(r"\n +", " ", prose(page))
    item = r"^- `([\w/]+\.py)`: ((?:`[^`]+`(?:,? (?:and |then |above all )?)?)+)"
    for file, listed in re.findall(item, items_on_one_line, re.M):
        symbols = set(re.findall(r"`([^`]+)`", listed))
        assert symbols - definitions(REPO / file) == set(), file


@each(PAGES)
def test_snippets_import_names_that_exist(page):
    for _, snippet in blocks(page, "python"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom):
                file = REPO / (node.module.replace(".", "/") + ".py")
                if node.module.startswith("support.") or file.is_file():
                    assert {alias.name for alias in node.names} <= definitions(file), node.module


def test_messages_quoted_in_troubleshooting_are_said():
    """A quoted message is in bold, with `...` for what varies. Each piece must be part of a string in the
    code."""
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", TROUBLESHOOTING.read_text(encoding="utf-8"))
    said = "\n".join(text for path in OURS for text in string_constants(path))
    assert len(quoted) > 5
    assert [piece for message in quoted for piece in message.split("...") if piece.strip() not in said] == []


@each(PAGES)
def test_yaml_blocks_are_of_configs_or_cases(page, tmp_path):
    for _, text in blocks(page, "yaml"):
        tree = yaml.safe_load(text)
        if "cases" in tree:
            (tmp_path / "cases.yaml").write_text(text, encoding="utf-8")
            assert read_case_file(tmp_path / "cases.yaml")
            continue
        for section, value in tree.items():
            keys = {f"{section}.{key}" for key in value} if isinstance(value, dict) else {section}
            assert keys - config_keys() == set()


# ---- links and rules -----------------------------------------------------------------------------


@each(PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(linked), f"{name(linked)} has no heading {anchor}"


@pytest.mark.parametrize("path", OURS, ids=name)
def test_pages_and_sections_named_in_the_code_exist(path):
    """In strings, and in comments."""
    comments = re.findall(r"#.*", path.read_text(encoding="utf-8"))
    texts = [*string_constants(path), *comments]
    assert [place for text in texts for place in missing_places(text)] == []


CONFIGS = sorted([*REPO.glob("*.yaml"), *REPO.glob("*/*.yaml"), REPO / "Makefile"])


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_pages_and_sections_named_in_configs_exist(path):
    assert missing_places(path.read_text(encoding="utf-8")) == []


def test_the_reader_of_pages_and_sections_notices():
    right = (
        "see docs/DATA.md#token-files, docs/EVALUATION.md (docs/TROUBLESHOOTING.md, no network) or README.md."
    )
    wrong = (
        "docs/DATA.md#tokens; docs/NOWHERE.md; (docs/TROUBLESHOOTING.md, offline); "
        'docs/DATA.md, section "No such"'
    )
    assert missing_places(right) == []
    assert missing_places(wrong) == [
        "docs/DATA.md tokens",
        "docs/NOWHERE.md",
        "docs/TROUBLESHOOTING.md offline",
        "docs/DATA.md No such",
    ]


def test_readme_leads_to_every_page():
    readme = README.read_text(encoding="utf-8")
    assert [name(page) for page in PAGES[1:] if f"]({name(page)})" not in readme] == []


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_tree_in_the_readme_is_complete():
    """Every file of the top level and of support/, and every folder of support/; and what it names exists."""
    tree = next(text for _, text in blocks(README, "text") if "model.py" in text)
    rooms = {name(path) + "/" for path in (REPO / "support").iterdir() if path.is_dir()}
    rooms.discard("support/__pycache__/")
    files = {name(path) for path in OURS if path.parent in (REPO, REPO / "support")}
    assert set(re.findall(r"[\w/]+\.py", tree)) == files
    assert rooms <= set(tree.split())
    named = re.findall(r"[\w./]+\.(?:yaml|txt)|[\w/]+/(?= )", tree)
    assert [file for file in named if not (REPO / file).exists()] == []


@each([page for page in PAGES if page.name != "CONFIG_REFERENCE.md"])
def test_lines_of_prose_fit_their_columns(page):
    """Tables, and lines that are one link or one picture, may be longer."""
    lines = [line for line in prose(page).splitlines() if not line.startswith("|")]
    breakable = [line for line in lines if not re.fullmatch(r"\s*(- )?!?\[.*\]\(\S+\)[,.]?", line)]
    assert [line for line in breakable if len(line) > COLUMNS_OF_PROSE] == []


@each(PAGES)
def test_pages_name_no_line_numbers_and_no_machine(page):
    assert re.findall(r"\.py:\d+|#L\d+|\b[Ll]ines? \d+", prose(page)) == []
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.])/(?:work|tmp|root|home|Users)/\S*", text) == []


def test_every_skip_of_the_suite_is_listed_and_every_listed_one_exists():
    """The gate fails on a skip that CONTRIBUTING.md does not list; this test finds it sooner."""
    contributing = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- skip: (.+)$", contributing, re.M)
    reasons = {reason for path in (*TESTS, Path(__file__)) for reason in skip_reasons(path)}
    assert [reason for reason in reasons if not reason.startswith(tuple(listed))] == []
    assert [entry for entry in listed if not any(reason.startswith(entry) for reason in reasons)] == []


def test_the_licence_is_the_whole_apache_licence():
    digest = hashlib.sha256((REPO / "LICENSE").read_bytes()).hexdigest()
    # The digest of the text that the Apache foundation publishes.
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


# ---- running them --------------------------------------------------------------------------------

NOT_COPIED = (".git", ".venv*", "checkpoints*", "runs", "results", "__pycache__", ".*_cache")
# What configs/ ask the user to bring; here the bundled text takes their place.
TEXTS_TO_BRING = ("wikitext2.txt", "shakespeare.txt", "the-verdict.txt")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository, without what runs and tools have left in it, and with files of the user's. It
    is the working folder."""
    here = tmp_path / "clone"
    shutil.copytree(REPO, here, ignore=shutil.ignore_patterns(*NOT_COPIED))
    shutil.copy(here / "data" / "tiny_corpus.txt", here / "my_book.txt")
    shutil.copy(here / "data" / "tiny_instructions.json", here / "my_instructions.json")
    for text in TEXTS_TO_BRING:
        shutil.copy(here / "data" / "tiny_corpus.txt", here / "data" / text)
    monkeypatch.chdir(here)
    return here


def needs_network(argv: list[str]) -> bool:
    """Whether a command reads a model, a data set or a task from the hub."""
    if "--from" in argv:
        return not Path(argv[argv.index("--from") + 1]).exists()
    if "--config" not in argv:
        return "--lm-eval" in argv or "--dataset" in argv
    overrides = [argv[i + 1] for i, word in enumerate(argv) if word == "--override"]
    data = load_config(REPO / argv[argv.index("--config") + 1], overrides).data
    return data.source != "text" and data.path is None


def missing_package(argv: list[str]) -> str | None:
    """The optional package that a command needs, if it is not installed."""
    if "--lm-eval" in argv:
        package = "lm_eval"
    elif "gguf" in argv:
        package = "gguf"
    elif "--against" in argv and "litgpt" in argv[argv.index("--against") + 1]:
        package = "litgpt"
    elif "--against" in argv and "llamacpp" in argv[argv.index("--against") + 1]:
        package = "llama_cpp"
    else:
        return None
    return package if importlib.util.find_spec(package) is None else None


def names_a_checkout(argv: list[str]) -> bool:
    """Whether a command of benchmark.py compares with code that the user has cloned."""
    return "--against" in argv and "=" in argv[argv.index("--against") + 1]


def shortened(script: str, argv: list[str]) -> list[str]:
    """The arguments, with two steps if the command trains, and one round of a small shape if it measures."""
    if script == "benchmark.py":
        small = ["s1" if before == "--shape" else word for before, word in pairwise(["", *argv])]
        return [*small, "--rounds", "1", "--seconds", "1"]
    shows_only = {"--show-step", "--show-mask", "training.max_steps=0"} & set(argv)
    if script not in ("train.py", "finetune.py") or shows_only:
        return argv
    settings = ("max_steps=2", "warmup_steps=0", "schedule_steps=2", "epochs=null")
    return argv + [word for setting in settings for word in ("--override", f"training.{setting}")]


def run_here(script: str, argv: list[str]) -> None:
    """Run `main` in this process, as the script would."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(Path(script).stem).main(argv)
        except SystemExit as end:
            code = end.code
    said = f"{out.getvalue()[-2000:]}\n{err.getvalue()[-2000:]}"
    assert not code, f"python3 {script} {shlex.join(argv)}: exit {code}\n{said}"


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_commands_and_snippets_of_a_page_run_in_order(page, clone, monkeypatch):
    """All `python3 x.py` commands and all Python snippets, in the order of the page, in one folder."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    n_run = 0
    not_made = []  # what commands that need a network would have written
    for language, text in blocks(clone / page, "sh", "python"):
        if language == "python":
            exec(compile(text, f"a snippet of {page}", "exec"), {"__name__": "__main__"})
            n_run += 1
            continue
        for words in (words for line in command_lines(text) for words in simple_commands(line)):
            call = script_call(words)
            if call is None or words[0] == "torchrun":
                continue
            script, argv = call
            uses_what_is_not_made = any(path in word for word in argv for path in not_made)
            if (
                needs_network(argv)
                or missing_package(argv)
                or uses_what_is_not_made
                or names_a_checkout(argv)
            ):
                if "--output" in argv:
                    not_made.append(argv[argv.index("--output") + 1])
                continue
            run_here(script, shortened(script, argv))
            n_run += 1
    assert n_run or page == "docs/ARCHITECTURE.md", "nothing was run: have the marks of the blocks changed?"


@pytest.mark.slow
def test_the_table_of_machines_is_what_its_snippet_prints():
    [snippet] = [text for _, text in blocks(TROUBLESHOOTING, "python") if "estimate_memory" in text]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "the snippet", "exec"), {})
    page = TROUBLESHOOTING.read_text(encoding="utf-8")
    assert out.getvalue() == re.search(r"^\| machine \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)[1]


@pytest.mark.slow
def test_the_quickstart_runs_as_typed(clone):
    """Real processes, the real number of steps in the first run, and what a learner sees in the end."""
    _, train, sample, list_them, _, own_text = QUICKSTART
    said = {}
    for line in (train, sample, list_them, own_text):
        _, script, *argv = simple_commands(line)[0]
        if line != train:
            argv = shortened(script, argv)
        done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, cwd=clone)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said[line] = done
    losses = [float(loss) for loss in re.findall(r"  loss (\S+)", said[train].stdout)]
    assert losses[-1] < 2 / 3 * losses[0]
    assert said[sample].stdout.startswith("Attention is")
    assert len(said[sample].stdout.split()) > 10
    assert "--tokenizer gpt2 is not what this model was trained with" in said[sample].stderr
    assert re.search(r"^checkpoints/step-0000050\.ckpt .* last best final *$", said[list_them].stdout, re.M)
    old = clone / "checkpoints" / "old-1" / "final.ckpt"
    assert old.exists(), "the second run moves the first one aside"
