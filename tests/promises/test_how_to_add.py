"""docs/ARCHITECTURE.md says how to add a schedule, a text source, a norm and so on. Here each is added.

An addition is a block of type `diff` on that page. Its lines are put into a copy of the project, and the
copy is run with what was added. So the page cannot promise a change that is not enough, and an addition that
suddenly needs a third file fails here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, TINY_OVERRIDES

PAGE = (REPO / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## How to add") :]
ADDITIONS = {}
for part in SECTION.split("\n### ")[1:]:
    block = re.search(r"^```diff\n(.*?)^```", part, re.M | re.S)
    if block:
        ADDITIONS[part.splitlines()[0]] = block[1]


def change_a_file(folder: Path, name: str, lines: list[str]) -> None:
    """Apply one part of a diff: lines with a space must be in the file, `-` lines go, `+` lines are added."""
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", "-"))
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", "+"))
    text = (folder / name).read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{name} does not have exactly one place like this:\n{before}"
    (folder / name).write_text(text.replace(before, after), encoding="utf-8")


def add(folder: Path, diff: str) -> set[str]:
    """Make the changes of a whole diff in `folder`; returns the names of the changed files."""
    names = set()
    for part in re.split(r"^@@ ", diff, flags=re.M)[1:]:
        name, *lines = part.splitlines()
        change_a_file(folder, name, lines)
        names.add(name)
    return names


@pytest.fixture
def copy(tmp_path):
    """The project without its history, tests and pages."""
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "tests", "docs", "checkpoints*", "runs", "__pycache__", ".*_cache"
    )
    return Path(shutil.copytree(REPO, tmp_path / "copy", ignore=left_out))


def run_in(folder: Path, *words: str) -> str:
    """What `python3 WORDS` prints when it is run in `folder`."""
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def train(folder: Path, *overrides: str) -> str:
    flags = [
        word for key in (*TINY_OVERRIDES, "training.max_steps=4", *overrides) for word in ("--override", key)
    ]
    return run_in(folder, "train.py", "--config", "config_smoke.yaml", "--device", "cpu", *flags)


# ---- what each addition must then do -------------------------------------------------------------


def trains_with(*overrides: str):
    """A check: the changed project trains with these overrides."""

    def check(folder: Path, checkpoint: Path) -> None:
        assert "done: " in train(folder, *overrides)

    return check


def reads_a_table(folder: Path, checkpoint: Path) -> None:
    rows = "".join(f'"Row {n}, about tokens, layers and losses.",{n}\n' for n in range(200))
    (folder / "rows.csv").write_text("text,number\n" + rows, encoding="utf-8")
    said = train(folder, "data.source=csv", f"data.path={folder / 'rows.csv'}", "tokenizer.vocab_size=300")
    documents = re.findall(r"(\d+) documents", said)
    assert sum(map(int, documents)) == 200


def samples_with_the_filter(folder: Path, checkpoint: Path) -> None:
    flags = [
        "--ckpt",
        str(checkpoint),
        "--prompt",
        "The model",
        "--max-new-tokens",
        "8",
        "--temperature",
        "1",
    ]
    greedy = run_in(folder, "infer.py", *flags, "--top-k", "1")
    assert run_in(folder, "infer.py", *flags, "--min-p", "0.999") == greedy, "only the likeliest is left"


def writes_the_column(folder: Path, checkpoint: Path) -> None:
    train(folder)
    row = json.loads((folder / "checkpoints" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["bits_per_token"] == pytest.approx(row["loss"] * 1.442695, rel=1e-5)


def writes_the_field(folder: Path, checkpoint: Path) -> None:
    said = train(folder)
    saved = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)
    assert f"model: {saved['tiny_transformer']['n_parameters']:,} parameters" in said
    assert "step-0000004.ckpt" in run_in(folder, "list.py"), "and every script still opens it"


CHECKS = {
    "A schedule": trains_with("training.schedule=inverse_sqrt"),
    "An optimizer": trains_with("training.optimizer=sgd"),
    "A text source": reads_a_table,
    "A norm": trains_with("model.norm=scalenorm"),
    "A tokenizer": trains_with("tokenizer.kind=hex"),
    "A sampling filter": samples_with_the_filter,
    "A column of the metrics": writes_the_column,
    "A field of the checkpoint": writes_the_field,
}


def test_every_addition_of_the_page_has_a_check_and_every_check_an_addition():
    assert set(ADDITIONS) == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addition_is_two_files_at_most_and_works(name, copy, tiny_run):
    changed = add(copy, ADDITIONS[name])
    assert len(changed) <= 2
    CHECKS[name](copy, tiny_run.folder / "final.ckpt")


@pytest.mark.parametrize("name", ADDITIONS)
def test_the_lines_of_an_addition_fit_the_files_as_they_are(name, copy):
    """The fast half: a change of the code that the page does not follow is noticed at once."""
    for file in add(copy, ADDITIONS[name]):
        compile((copy / file).read_text(encoding="utf-8"), file, "exec")
