"""The rules of the layout: which file may import which, how long a file and a function may be, what is
never done."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import arrows
import pytest
from arrows import FILES, OURS, imported_rooms, imports, module_name
from conftest import REPO

BY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPO).as_posix())

LINES_PER_FILE, LINES_PER_FUNCTION = 500, 60
LESSONS = {"from_scratch.py": 1000}  # one lesson after another, each a screen long

# Who may import whom: one row for each file of the top level and each folder of support/. A row names what it
# may import besides what is in its own folder. A new arrow is a decision: argue for it where the change is
# reviewed.
ARROWS = {
    "train": (
        "data model optim support.checkpoint support.chunked_loss support.cli support.files "
        "support.messages support.run"
    ),
    "finetune": "data instruct support.checkpoint support.cli support.messages support.run train",
    "infer": (
        "model sampling support.checkpoint support.cli support.device support.int8 support.messages "
        "support.text tokenizer"
    ),
    "evaluate_checkpoints": (
        "model support.checkpoint support.cli support.config support.device support.evaluation "
        "support.find_checkpoints support.messages support.run support.text tokenizer"
    ),
    "benchmark": (
        "support.benchmark support.cli support.device support.files support.messages support.run train"
    ),
    "eval_val": (
        "support.checkpoint support.cli support.config support.device support.evaluation support.int8 "
        "support.messages support.text"
    ),
    "list": "support.checkpoint support.cli support.config support.find_checkpoints support.messages",
    "prepare": (
        "support.checkpoint support.cli support.exchange support.files support.messages support.text "
        "tokenizer"
    ),
    "convert": (
        "model sampling support.checkpoint support.cli support.evaluation support.exchange support.files "
        "support.messages support.run support.text tokenizer"
    ),
    "from_scratch": "model sampling support.cli support.files support.messages tokenizer",
    "data": "support.chunked_loss support.config support.messages support.text tokenizer",
    "instruct": "data support.chunked_loss support.config support.messages support.text tokenizer",
    "model": "sampling support.chunked_loss support.device support.hand_gradients",
    "sampling": "support.decoding",
    "tokenizer": "support.files support.messages",
    "optim": "from_scratch support.config",
    "lora": "support.messages",
    "support.benchmark": (
        "data model optim sampling support.checkpoint support.chunked_loss support.cli support.config "
        "support.device support.exchange support.files support.int8 support.messages support.plots "
        "support.run support.text tokenizer"
    ),
    "support.checkpoint": (
        "lora model support.files support.foreign support.messages support.text support.weights tokenizer"
    ),
    "support.chunked_loss": "support.device",
    "support.cli": "support.foreign support.messages",
    "support.compilers": "",
    "support.config": "model support.cli support.files support.foreign support.messages support.text",
    "support.decoding": "support.compilers support.device support.messages",
    "support.device": "support.messages",
    "support.hand_gradients": "",
    "support.evaluation": (
        "data instruct model sampling support.checkpoint support.cli support.config support.decoding "
        "support.files support.messages support.plots support.text tokenizer"
    ),
    "support.exchange": (
        "model support.checkpoint support.files support.foreign support.messages support.text "
        "support.weights tokenizer"
    ),
    "support.files": "support.messages",
    "support.foreign": "support.messages",
    "support.int8": "model support.messages",
    "support.messages": "",
    "support.plots": "support.files",
    "support.run": (
        "data instruct lora model optim sampling support.checkpoint support.chunked_loss support.cli "
        "support.compilers support.config support.device support.files support.find_checkpoints "
        "support.messages support.plots support.text support.weights tokenizer"
    ),
    "support.find_checkpoints": "support.checkpoint support.files support.foreign support.messages",
    "support.weights": "model support.files support.messages",
    "support.text": "support.cli support.device support.files support.foreign support.messages tokenizer",
}
SCRIPTS = {
    "train",
    "finetune",
    "convert",
    "prepare",
    "from_scratch",
    "infer",
    "list",
    "eval_val",
    "evaluate_checkpoints",
    "benchmark",
}
KNOW_LIGHTNING = {"train", "support.run.trainer", "support.run.saving", "support.run.metrics"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(the function as written, the call), e.g. ("torch.load", ...)."""
    for node in ast.walk(arrows.tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


# ---- names ---------------------------------------------------------------------------------------


@BY_FILE
def test_a_file_is_named_for_a_thing_or_a_job(path):
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}, (
        "code without an owner: the design is missing a noun"
    )


def test_no_top_level_name_shadows_what_we_or_our_dependencies_import():
    """`python3 train.py` puts this folder first on the path: a tokenizers.py here would replace the
    library everywhere."""
    here = {path.stem for path in REPO.glob("*.py")} | {"support"}
    assert not here & set(sys.stdlib_module_names)
    assert not here & set(importlib.metadata.packages_distributions())


def test_pip_install_of_this_folder_brings_the_requirements_and_no_module():
    """`pip install -e .`: a module named data or list on the path of every program would hide those of
    others."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["packages"] == settings["tool"]["setuptools"]["py-modules"] == []
    assert settings["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert {"dependencies", "optional-dependencies"} == set(settings["project"]["dynamic"])


@pytest.mark.slow
def test_what_pip_installs_of_this_folder(tmp_path):
    """The wheel that `pip install -e .` makes, without network: the requirements, and an import hook that
    finds nothing."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    for file in (
        *REPO.glob("*.py"),
        *REPO.glob("requirements*.txt"),
        REPO / "pyproject.toml",
        REPO / "LICENSE",
    ):
        shutil.copy(file, tmp_path)
    shutil.copytree(REPO / "support", tmp_path / "support")
    (tmp_path / "data").mkdir()
    code = "from setuptools.build_meta import build_editable; build_editable('wheel')"
    (tmp_path / "wheel").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        inside = {name: files.read(name).decode() for name in files.namelist()}
    assert all("dist-info/" in name or name.startswith("__editable__") for name in inside)
    assert not [text for text in inside.values() if str(tmp_path) in text], (
        "the folder is not put on the path"
    )
    metadata = next(text for name, text in inside.items() if name.endswith("METADATA"))
    lines = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needed = [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]
    assert re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.M) == needed


def test_data_the_folder_does_not_shadow_data_the_module():
    """With an __init__.py, `import data` would find the folder of texts, and data.py would vanish."""
    assert (REPO / "data").is_dir() and (REPO / "data.py").is_file()
    assert not (REPO / "data" / "__init__.py").exists()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_nothing_that_a_run_leaves_is_in_the_repository():
    """A clone that came with a finished run would begin by moving it aside. Outside of a git checkout
    there is nothing to see."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""


# ---- budgets -------------------------------------------------------------------------------------


@BY_FILE
def test_a_file_fits_its_budget(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LESSONS.get(path.name, LINES_PER_FILE), (
        "two ideas live together: find the second one a file"
    )


@BY_FILE
def test_a_function_fits_a_screen(path):
    functions = [
        node
        for node in ast.walk(arrows.tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [f.name for f in functions if f.end_lineno - f.lineno + 1 > LINES_PER_FUNCTION] == []


@BY_FILE
def test_a_script_has_one_entry(path):
    """`if __name__ == "__main__"` once, so that a reader finds in one place what running the file does."""
    entries = [
        node
        for node in arrows.tree(path).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    ]
    assert len(entries) <= 1


# ---- arrows --------------------------------------------------------------------------------------


def test_the_table_of_arrows_names_exactly_the_rooms_there_are():
    assert set(ARROWS) == set(imported_rooms()), (
        "a new file or folder needs a row in ARROWS, a removed one gives its row back"
    )


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_exactly_what_its_row_says(room):
    """Equal, not only allowed: an arrow that is no longer used leaves the table, so the table is the
    picture."""
    assert imported_rooms()[room] == set(ARROWS[room].split())


def in_a_circle(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left when everything is taken away that imports nothing of the rest."""
    left = dict(arrows)
    while ready := {name for name, used in left.items() if not used}:
        left = {name: used - ready for name, used in left.items() if name not in ready}
    return left


def test_neither_rooms_nor_files_import_in_a_circle():
    assert in_a_circle({name: set(row.split()) for name, row in ARROWS.items()}) == {}
    files = {module_name(path): set(imports(path)) & OURS for path in FILES}
    # A script imports itself, as a module, once its command line has been understood.
    assert in_a_circle({name: used - {name} for name, used in files.items()}) == {}


def test_the_drawing_in_the_page_is_that_of_the_imports():
    """docs/ARCHITECTURE.md shows who imports whom; `make docs` draws it anew."""
    assert arrows.PAGE.read_text(encoding="utf-8") == arrows.page_with_drawing(), "run: make docs"


def test_scripts_build_on_each_other_only_where_that_is_the_point():
    assert {
        name: SCRIPTS & set(row.split()) for name, row in ARROWS.items() if SCRIPTS & set(row.split())
    } == {
        "benchmark": {"train"},  # to time it
        "finetune": {"train"},
        "optim": {"from_scratch"},  # for its AdamW, when the config asks for that
    }


@BY_FILE
def test_lightning_is_known_to_the_training_script_and_its_callbacks_alone(path):
    if module_name(path) not in KNOW_LIGHTNING:
        assert not roots(path) & {"lightning", "pytorch_lightning"}


@BY_FILE
def test_what_only_some_runs_need_is_imported_where_it_is_needed(path):
    """Seconds each: a run on local text needs no datasets, a sample no pictures."""
    at_top = {
        alias.name for node in arrows.tree(path).body if isinstance(node, ast.Import) for alias in node.names
    }
    at_top |= {node.module for node in arrows.tree(path).body if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in at_top} & {
        "datasets",
        "transformers",
        "matplotlib",
        "tiktoken",
        "tokenizers",
        "lm_eval",
    }


# ---- what a process loads ------------------------------------------------------------------------


def loaded(code: str, *suspects: str) -> list[str]:
    """Which of the suspects a fresh process has imported after `code`."""
    code = f"import sys\n{code}\nprint(*sorted(set(sys.modules) & set({suspects!r})), file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stderr.splitlines()[-1].split()  # the last line: warnings may stand before it


def test_sampling_and_listing_start_without_lightning_transformers_and_datasets():
    """Each takes seconds to import. `import infer` brings everything that it imports at the top of a file."""
    code = "import infer\nimport importlib; importlib.import_module('list')"
    assert loaded(code, "torch", "model", "lightning", "transformers", "datasets") == ["model", "torch"]


def test_help_imports_nothing_heavy():
    """Every script, run as `python3 SCRIPT.py --help`, in one fresh process."""
    code = f"""
import runpy
for script in {sorted(SCRIPTS)}:
    sys.argv = [script + ".py", "--help"]
    try:
        runpy.run_path(script + ".py", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, end.code
    else:
        raise AssertionError(script + " did not exit")
"""
    heavy = (
        "torch",
        "lightning",
        "numpy",
        "pydantic",
        "transformers",
        "datasets",
        "tokenizers",
        "rich",
        "matplotlib",
        "yaml",
    )
    assert loaded(code, "argparse", *heavy) == ["argparse"]


# ---- safety --------------------------------------------------------------------------------------


@BY_FILE
def test_files_are_unpickled_in_one_place_and_as_plain_tensors_only(path):
    """torch.load is a pickle; weights_only=True keeps a downloaded checkpoint from running code."""
    assert not roots(path) & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not any(name in ("torch.serialization", "torch.jit") for name in imports(path))
    loads = [
        call
        for name, call in calls(path)
        if name in ("torch.load", "load") or name.endswith((".serialization.load", "jit.load"))
    ]
    if module_name(path) != "support.checkpoint":
        assert not loads
    for call in loads:
        flags = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert flags.get("weights_only") == "True", f"line {call.lineno}"


@BY_FILE
def test_numpy_never_unpickles(path):
    assert not any(
        keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
        for _, call in calls(path)
        for keyword in call.keywords
    )


@BY_FILE
def test_yaml_is_read_with_a_safe_loader(path):
    """yaml.load with any other loader builds arbitrary Python objects from a config file."""
    import yaml

    for name, call in calls(path):
        assert not name.endswith(("unsafe_load", "full_load", "load_all")), f"line {call.lineno}"
        if name == "yaml.load":
            loader = next(
                (ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "Loader"), None
            )
            module = __import__(module_name(path), fromlist=["_"])
            assert loader is not None and issubclass(
                getattr(module, loader.split(".")[-1], yaml.Loader), yaml.SafeLoader
            ), f"line {call.lineno}"


RUN_CODE = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
RUN_CODE |= {"importlib.import_module", "runpy.run_path", "torch.hub.load"}


@BY_FILE
def test_no_code_is_built_from_strings(path):
    assert not RUN_CODE & {name for name, _ in calls(path)}
    for flag in ("shell", "trust_remote_code"):
        assert not any(
            k.arg == flag and ast.unparse(k.value) != "False"
            for _, call in calls(path)
            for k in call.keywords
        ), flag
    assert not any(name.endswith(".load_from_checkpoint") for name, _ in calls(path)), (
        "Lightning's own reader unpickles; ours is read_checkpoint"
    )


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("import pickle", "unpickled"),
        ("from torch.serialization import load", "unpickled"),
        ("torch.load(f)", "unpickled"),
        ("torch.load(f, weights_only=False)", "unpickled"),
        ("np.load(f, allow_pickle=True)", "numpy"),
        ("yaml.unsafe_load(f)", "yaml"),
        ("yaml.full_load_all(f)", "yaml"),
        ("yaml.load(f)", "yaml"),
        ("yaml.load(f, Loader=yaml.UnsafeLoader)", "yaml"),
        ("eval('1')", "code"),
        ("subprocess.run('ls', shell=True)", "code"),
        ("load_dataset('x', trust_remote_code=True)", "code"),
        ("Module.load_from_checkpoint(f)", "code"),
    ],
)
def test_these_rules_notice(monkeypatch, line, rule):
    """Each line, put into support/checkpoint.py, where torch.load is allowed, would be refused."""
    rules = {
        "unpickled": test_files_are_unpickled_in_one_place_and_as_plain_tensors_only,
        "numpy": test_numpy_never_unpickles,
        "yaml": test_yaml_is_read_with_a_safe_loader,
        "code": test_no_code_is_built_from_strings,
    }
    path = REPO / "support" / "checkpoint.py"
    changed = ast.parse(path.read_text(encoding="utf-8") + "\n" + line)
    monkeypatch.setattr(arrows, "tree", lambda path: changed)
    with pytest.raises(AssertionError):
        rules[rule](path)
