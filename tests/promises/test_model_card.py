"""The model card of an export: what it says, that its example runs, and that it shows no path of ours."""

import contextlib
import functools
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run
from converting import call, random_model, save_checkpoint, train_bpe

import finetune
from support.checkpoint import KEY
from tokenizer import BPETokenizer


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """saved(name, model, tokenizer): the path of a checkpoint without a run."""
    return functools.partial(save_checkpoint, tmp_path)


@pytest.fixture
def trained_bpe() -> BPETokenizer:
    return train_bpe()


def test_an_imported_model_is_fine_tuned_like_any_other(saved, tmp_path, monkeypatch):
    call("--ckpt", saved("ours", random_model(max_seq_len=64)), "--to", "hf", "--output", tmp_path / "hf")
    call("--from", tmp_path / "hf", "--output", tmp_path / "base.ckpt")
    monkeypatch.setattr("support.run.show.draw_loss", lambda folder: None)
    overrides = [
        f"base_ckpt={tmp_path / 'base.ckpt'}",
        f"checkpoint.dir={tmp_path / 'sft'}",
        "training.epochs=null",
        "training.max_steps=2",
    ]
    argv = [
        "--config",
        "configs/finetune_tiny.yaml",
        "--device",
        "cpu",
        *(f"--override={o}" for o in [*overrides, "training.warmup_steps=0"]),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert finetune.main(argv) == 0
    rows = Run(tmp_path / "sft", 0, "", "").val_rows
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    call("--ckpt", tmp_path / "sft" / "final.ckpt", "--to", "hf", "--output", tmp_path / "hf2")
    assert "chat_template" in json.loads((tmp_path / "hf2" / "tokenizer_config.json").read_text())
    for folder, said in (("hf", "Once"), ("hf2", "Who are you?")):
        assert said in run_card(tmp_path / folder)
    card = (tmp_path / "hf2" / "README.md").read_text()
    row = rows[-1]
    for said in (
        "trained for 2 steps",
        "data/tiny_instructions.json",
        "base.ckpt",
        f"- val_loss: {row['val_loss']:.4f}",
        "adamw, lr 0.003",
    ):
        assert said in card, card
    assert "trained for" not in (tmp_path / "hf" / "README.md").read_text()


HERE = re.compile(rb"/tmp/|/home/|/root|Users|secret|ada|\\.\\.")


def test_a_card_of_an_import_says_so_and_no_exported_file_names_a_path(
    saved, tmp_path, trained_bpe, monkeypatch
):
    """Of a local folder, only its name is published."""
    home = tmp_path / "home" / "ada" / "secret" / "small-model"
    call(
        "--ckpt",
        saved("ours", random_model(vocab_size=trained_bpe.vocab_size), trained_bpe),
        "--to",
        "hf",
        "--output",
        home,
    )
    monkeypatch.setattr(sys, "argv", ["convert.py", "--from", str(home)])
    monkeypatch.chdir(home.parent)
    for given, name in ((home, "small-model"), (".", "secret"), ("../secret/small-model", "small-model")):
        output = tmp_path / "ada.ckpt"
        source = tmp_path / "home" / "ada" / "secret"
        if given == ".":
            monkeypatch.chdir(home)
            name = "small-model"
        call("--from", given, "--output", output)
        monkeypatch.chdir(source)
        call("--ckpt", output, "--to", "hf", "--output", tmp_path / "out")
        card = (tmp_path / "out" / "README.md").read_text()
        assert (
            f"# {name}\n" in card
            and f"imported from `{name}` with Tiny Transformer; nothing was trained here." in card
        )
        for file in (tmp_path / "out").iterdir():
            if file.name not in ("tokenizer.json", "model.safetensors"):
                assert not HERE.search(file.read_bytes()), file.name
        output.unlink()
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("data/tiny_corpus.txt", "data/tiny_corpus.txt"),
        ("some/dataset", "some/dataset"),
        ("/books/secret/plays.txt", "plays.txt"),
        ("~/secret/plays.txt", "plays.txt"),
        ("../../ada/plays.txt", "plays.txt"),
        ("C:\\Users\\ada\\plays.txt", "plays.txt"),
        ("/books/*.txt", "*.txt"),
    ],
)
def test_a_card_of_a_run_shows_no_path_of_this_machine(tiny_run, tmp_path, path, shown):
    pytest.importorskip("gguf", reason="gguf is not installed")
    checkpoint = tiny_run.checkpoint()
    config = checkpoint[KEY]["config"]
    config["data"]["path"] = config["base_ckpt"] = path
    config["tokenizer"]["path"] = "/books/secret/tokenizer.json"
    config["checkpoint"]["dir"] = "/books/runs/plays"
    torch.save(checkpoint, tmp_path / "run.ckpt")
    call("--ckpt", tmp_path / "run.ckpt", "--to", "hf", "--output", tmp_path / "hf")
    call("--ckpt", tmp_path / "run.ckpt", "--to", "gguf", "--output", tmp_path / "m.gguf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.count(f"`{shown}`") == 2 and "# plays\n" in card and "trained with Tiny Transformer." in card
    for name in ("README.md", "config.json", "generation_config.json", "tokenizer_config.json"):
        assert not HERE.search((tmp_path / "hf" / name).read_bytes()), name
    assert (
        b"/home" not in (tmp_path / "m.gguf").read_bytes()
        and b"secret" not in (tmp_path / "m.gguf").read_bytes()
    )


def run_card(folder: Path) -> str:
    """What the example of the model card prints."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue()
