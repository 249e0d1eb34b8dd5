"""list.py: a row for each checkpoint, also for a damaged one."""

import importlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from support.checkpoint import load_model
from support.messages import UserError

listing = importlib.import_module("list")


@pytest.fixture
def show(capsys):
    def call(*argv: object) -> str:
        capsys.readouterr()
        assert listing.main([str(word) for word in argv]) == 0
        return capsys.readouterr().out

    return call


def json_rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def row_of(out: str, name: str) -> str:
    [line] = [line for line in out.splitlines() if name in line]
    return line


def test_every_file_is_named_with_its_step_and_losses(show, tiny_run):
    out = show(tiny_run.folder)
    for path in tiny_run.folder.glob("step-*.ckpt"):
        metrics = load_model(path)[2]["metrics"]
        cells = row_of(out, str(path)).split()
        assert cells[:2] == [str(path), str(metrics["step"])]
        assert f"{metrics['train_loss']:.4f}" in cells
        assert f"{metrics['val_loss']:.4f}" in cells
        assert f"{metrics['tokens']:,}" in cells
    last = row_of(out, "step-0000012.ckpt")
    assert f"{load_model(tiny_run.folder / 'final.ckpt')[0].n_params():,}" in last
    assert "bpe 400" in last


def test_other_names_of_a_file_are_shown_in_its_row(show, tiny_run, tmp_path):
    """Names of hard links and of copies, because a plain copy of a run's folder has copies."""
    best = load_model(tiny_run.folder / "best.ckpt")[2]["metrics"]["step"]
    for row in map(json.loads, show(tiny_run.folder, "--json").splitlines()):
        assert row["names"] == ["last"] * (row["step"] == 12) + ["best"] * (row["step"] == best) + [
            "final"
        ] * (row["step"] == 12)
    assert "last" in row_of(show(tiny_run.folder / "step-0000012.ckpt"), "step-0000012").split()
    assert "last" in row_of(show(tiny_run.folder / "final.ckpt"), "final.ckpt").split()
    shutil.copytree(tiny_run.folder, tmp_path / "copy")
    assert not (tmp_path / "copy" / "final.ckpt").samefile(tmp_path / "copy" / "step-0000012.ckpt"), (
        "a copy loses the links"
    )
    names, copied = (
        [
            (Path(row["file"]).name, row["names"])
            for row in map(json.loads, show(folder, "--json").splitlines())
        ]
        for folder in (tiny_run.folder, tmp_path / "copy")
    )
    assert copied == names
    shutil.copyfile(tiny_run.folder / "final.ckpt", tmp_path / "copy" / "mine.ckpt")
    assert json_rows(show(tmp_path / "copy", "--json"))[-1]["names"] == [*names[-1][1], "mine"]


def test_checkpoints_of_equal_size_and_different_content_are_separate_rows(show, tiny_run, tmp_path):
    for name, offset in (("a", 0), ("b", 1)):
        checkpoint = tiny_run.checkpoint()
        checkpoint["state_dict"]["net.norm.weight"][0] += offset
        torch.save(checkpoint, tmp_path / f"{name}.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size == (tmp_path / "b.ckpt").stat().st_size
    assert len(show(tmp_path).splitlines()) == 3
    for name in ("a", "b"):
        (tmp_path / f"{name}.ckpt").write_bytes(b"both are broken")
    assert len(json_rows(show(tmp_path, "--json"))) == 2


def test_linked_folders_are_followed_once_and_hidden_ones_left_out(show, tiny_run, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").symlink_to(tiny_run.folder)
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs")
    assert len(json_rows(show(tmp_path / "runs", "--json"))) == 3
    (tmp_path / "other" / ".trash").mkdir(parents=True)
    shutil.copyfile(tiny_run.folder / "final.ckpt", tmp_path / "other" / ".trash" / "final.ckpt")
    with pytest.raises(UserError, match=r"no checkpoint \(\.ckpt\) there \(1 hidden left out\)"):
        listing.main([str(tmp_path / "other")])
    shutil.copyfile(tiny_run.folder / "final.ckpt", tmp_path / "other" / "FINAL.CKPT")
    assert "FINAL.CKPT" in show(tmp_path / "other")


@pytest.mark.parametrize("column", ["step", "val_loss", "train_loss", "size_mb", "file", "names", "config"])
def test_rows_are_sorted_by_any_column(show, tiny_run, tmp_path, column):
    (tmp_path / "bad.ckpt").touch()
    rows = list(map(json.loads, show(tiny_run.folder, tmp_path, "--json", "--sort", column).splitlines()))
    known = [row[column] for row in rows if row.get(column) is not None]
    assert known == sorted(known)
    assert len(rows) == 4
    backward = [
        row["file"]
        for row in map(
            json.loads, show(tiny_run.folder, tmp_path, "--json", "--sort", column, "--reverse").splitlines()
        )
    ]
    assert backward == [row["file"] for row in reversed(rows)]


def test_the_config_hash_is_computed_from_the_config(show, run, tmp_path):
    words = ("training.max_steps=2", "training.warmup_steps=1")
    for name, extra in (("one", ()), ("two", ("training.lr=1e-3",))):
        run(tmp_path / name, *words, *extra)
    one, two = (json.loads(show(tmp_path / name, "--json")) for name in ("one", "two"))
    assert one["config"] == listing.config_hash(load_model(one["file"])[2]["config"])
    assert one["config"] != two["config"]
    out = show(tmp_path / "one", tmp_path / "two", "--diff").splitlines()
    assert out[0] == f"{one['file']} -> {two['file']}"
    assert [line.split(":")[0].strip() for line in out[1:]] == ["training.lr", "checkpoint.dir"]
    assert show(tmp_path / "one", tmp_path / "one", "--diff").splitlines()[1] == "  the same config"
    with pytest.raises(UserError, match="compares two"):
        listing.main([str(tmp_path / "one"), "--diff"])


def test_rows_are_in_order_of_steps(show, tiny_run):
    files = [line.split()[0].rsplit("/", 1)[1] for line in show(tiny_run.folder).splitlines()[1:]]
    steps = [load_model(tiny_run.folder / name)[2]["metrics"]["step"] for name in files]
    assert steps == sorted(steps)
    assert files == ["step-0000004.ckpt", "step-0000008.ckpt", "step-0000012.ckpt"]


def test_json_rows_agree_with_the_checkpoints(show, tiny_run):
    rows = [json.loads(line) for line in show(tiny_run.folder, "--json").splitlines()]
    assert {row["file"] for row in rows} == {str(path) for path in tiny_run.folder.glob("step-*.ckpt")}
    [final] = [row for row in rows if "final" in row["names"]]
    metrics = load_model(final["file"])[2]["metrics"]
    assert {
        name: final[name] for name in ("step", "epoch", "tokens", "train_loss", "val_loss", "best_val_loss")
    } == {
        name: metrics[name] for name in ("step", "epoch", "tokens", "train_loss", "val_loss", "best_val_loss")
    }
    assert final["size_mb"] == pytest.approx((tiny_run.folder / "final.ckpt").stat().st_size / 2**20, abs=0.1)


def test_a_damaged_file_is_a_row_that_says_so(show, tiny_run, tmp_path):
    shutil.copyfile(tiny_run.folder / "final.ckpt", tmp_path / "whole.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "whole.ckpt").read_bytes()[:-500])
    (tmp_path / "empty.ckpt").touch()
    out = show(tmp_path)
    assert row_of(out, "whole.ckpt").split()[1] == "12"
    for name, reason in (("cut.ckpt", "truncated or damaged"), ("empty.ckpt", "an empty file")):
        lines = [line for line in out.splitlines() if name in line]
        assert lines[0].split()[1] == "-"
        assert reason in lines[1]
    errors = {row["file"]: row.get("error") for row in map(json.loads, show(tmp_path, "--json").splitlines())}
    assert [errors[str(tmp_path / f"{name}.ckpt")] is None for name in ("whole", "cut", "empty")] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "damage",
    [
        {"metrics": {}},
        {"metrics": None},
        {"tokenizer": {}},
        {"model": {"d_model": 32, "n_heads": 5}},
        {"model": None},
    ],
    ids=str,
)
def test_a_checkpoint_with_damaged_fields_is_a_row_too(show, tiny_run, tmp_path, damage):
    checkpoint = tiny_run.checkpoint()
    checkpoint["tiny_transformer"] |= damage
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    assert "odd.ckpt" in show(tmp_path)


def test_no_checkpoint_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(
        UserError, match=r"no checkpoint \(\.ckpt\) there; python3 train\.py --config config_smoke\.yaml"
    ):
        listing.main([str(tmp_path)])
    with pytest.raises(UserError, match=r"nowhere\.ckpt"):
        listing.main([str(tmp_path / "nowhere.ckpt")])


def test_without_arguments_the_checkpoints_folder_is_shown(show, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "old-1").mkdir(parents=True)
    shutil.copyfile(tiny_run.folder / "final.ckpt", tmp_path / "checkpoints" / "old-1" / "final.ckpt")
    monkeypatch.chdir(tmp_path)
    assert "checkpoints/old-1/final.ckpt" in show()


def test_files_folders_and_globs_may_be_named(show, tiny_run):
    one = show(tiny_run.folder / "final.ckpt").splitlines()
    some = show(tiny_run.folder / "step-*.ckpt", tiny_run.folder / "step-0000004.ckpt").splitlines()
    assert (len(one), len(some)) == (2, 4)  # a header and the rows; a file named twice is shown once


@pytest.mark.parametrize(
    "name", ["a" * 200, "run [bold]7 :smile:", "mit Leerzeichen ü"], ids=["long", "markup", "spaces"]
)
def test_piped_output_shows_names_as_they_are_and_folds_no_line(show, tiny_run, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copyfile(tiny_run.folder / "final.ckpt", folder / "final.ckpt")
    out = show(folder)
    assert len(out.splitlines()) == 2
    assert out.splitlines()[1].startswith(str(folder / "final.ckpt"))


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_terminal_shows_whole_names_too(tiny_run, monkeypatch, terminal):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", terminal)
    assert listing.main([str(tiny_run.folder)]) == 0
    for path in tiny_run.folder.glob("step-*.ckpt"):
        assert path.name in screen.getvalue()


def test_many_files_are_read_by_several_processes_and_give_the_same_rows(show, tiny_run, tmp_path):
    for n in range(listing.FILES_FOR_PARALLEL_READING):
        (tmp_path / str(n)).mkdir()
        shutil.copyfile(tiny_run.folder / "final.ckpt", tmp_path / str(n) / "copy.ckpt")
    (tmp_path / "bad.ckpt").touch()
    rows = {row["file"]: row for row in map(json.loads, show(tmp_path, "--json").splitlines())}
    assert len(rows) == listing.FILES_FOR_PARALLEL_READING + 1
    assert {file: row | {"age_s": 0} for file, row in rows.items()} == {
        file: listing.describe(Path(file)) | {"age_s": 0} for file in rows
    }
