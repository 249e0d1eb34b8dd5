"""Files and folders have the mode that the umask asks for, whichever library writes them."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest

import convert
import evaluate_checkpoints
import prepare
from support.files.atomic import atomic_write, link_or_copy, temporary_folder


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_of_a_run_and_of_its_exports_obeys_the_umask(run, tmp_path, umask):
    made = tmp_path / "made"
    made.mkdir()
    run(
        made / "run",
        "training.max_steps=2",
        "training.schedule_steps=2",
        "training.val_every=2",
        pictures=True,
    )
    text = tmp_path / "a.txt"
    text.write_text("attention is a sum. " * 200)
    ckpt = str(made / "run" / "final.ckpt")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert convert.main(["--ckpt", ckpt, "--to", "hf", "--output", str(made / "hf")]) == 0
        assert convert.main(["--ckpt", ckpt, "--to", "weights", "--output", str(made / "small.ckpt")]) == 0
        assert convert.main(["--from", str(made / "hf"), "--output", str(made / "back.ckpt")]) == 0
        assert (
            prepare.main(
                ["tokens", "--input", str(text), "--tokenizer", "byte", "--output", str(made / "tokens")]
            )
            == 0
        )
        cases = tmp_path / "cases.json"
        cases.write_text(json.dumps([{"prompt": "attention", "target": " is"}]))
        argv = [
            "--checkpoints",
            ckpt,
            "--cases",
            "cases/tiny_corpus.yaml",
            "--output-dir",
            str(made / "report"),
        ]
        assert evaluate_checkpoints.main(argv) == 0
    found = modes(made)
    assert {
        "final.ckpt",
        "metrics.jsonl",
        "loss.png",
        "model.safetensors",
        "meta.json",
        "report.html",
    } <= found.keys()
    assert {name: oct(mode) for name, mode in found.items() if mode != 0o666 & ~umask} == {}
    folders = {path for path in (made, *made.rglob("*")) if path.is_dir()}
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o777 & ~umask}


def test_a_gguf_obeys_the_umask(tiny_run, tmp_path, umask):
    pytest.importorskip("gguf", reason="gguf is not installed")
    with contextlib.redirect_stdout(io.StringIO()):
        convert.main(
            [
                "--ckpt",
                str(tiny_run.folder / "final.ckpt"),
                "--to",
                "gguf",
                "--output",
                str(tmp_path / "m.gguf"),
            ]
        )
    assert (tmp_path / "m.gguf").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_temporary_folder_and_a_copy_obey_the_umask_too(tmp_path, umask, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = temporary_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    assert temporary_folder() != folder
    with atomic_write(folder / "a") as file:
        file.write(b"a")

    def no_links(*args) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    link_or_copy(folder / "a", folder / "b")
    assert modes(folder) == dict.fromkeys("ab", 0o666 & ~umask)
