"""If a flag that takes a model is given a model of another program, the error names its kind and a next
step that works."""

import contextlib
import gzip
import importlib
import io
import json
import pickle
import re
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import convert
import eval_val
import evaluate_checkpoints
import finetune
import infer
import prepare
import train
from model import GPTConfig, GPTMini
from support.checkpoint import load_model, write_model
from support.exchange.hf_names import config_json, to_theirs
from support.exchange.tokenizer_json import tokenizer_json
from support.foreign.model_files import own_checkpoint, what_is
from support.messages import UserError
from tokenizer import ByteTokenizer

listing = importlib.import_module("list")
REPO = Path(__file__).parents[2]


def tiny_model() -> GPTMini:
    torch.manual_seed(0)
    return GPTMini(
        GPTConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32, max_seq_len=32)
    )


def model_folder(folder: Path, **changes) -> Path:
    """A model folder as transformers saves it; `changes` go into its config.json."""
    folder.mkdir(parents=True)
    model = tiny_model()
    (folder / "config.json").write_text(json.dumps(config_json(model.config, 256) | changes))
    (folder / "tokenizer.json").write_text(tokenizer_json(ByteTokenizer()))
    save_file(to_theirs(model.config, model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    return folder


def file_of(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def saved(content: object, **options) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        torch.save(content, path, **options)
        return path

    return make


def weights_alone(path: Path) -> Path:
    (path.parent / "alone").mkdir()
    save_file({"a": torch.zeros(2)}, path.parent / "alone" / path.name)
    return path.parent / "alone" / path.name


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/config.json", "{}")
    return path


def tarred(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(REPO / "README.md", "README.md")
    return path


def arrays(path: Path) -> Path:
    np.savez(path, a=np.zeros(3))
    return path


def folder_with(*names: str, **texts: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.mkdir()
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"GGUF" if name.endswith(".gguf") else b"x")
        for name, text in texts.items():
            (path / f"{name}.json").write_text(text)
        return path

    return make


def shards_missing(path: Path) -> Path:
    model_folder(path)
    names = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    return path


def no_weights(path: Path) -> Path:
    (model_folder(path) / "model.safetensors").unlink()
    return path


def scripted(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"model/{name}", pickle.dumps(()))
    return path


NANOGPT = {
    "model": {"transformer.wte.weight": torch.zeros(2, 2)},
    "model_args": {"n_layer": 1},
    "iter_num": 3,
    "config": {},
}
LIGHTNING = {
    "state_dict": {"a": torch.zeros(2)},
    "pytorch-lightning_version": "2.0",
    "epoch": 1,
    "global_step": 2,
}
STATE = {"layer.weight": torch.zeros(2, 2)}
TRAINER = {"model_state_dict": STATE, "optimizer_state_dict": {}}
ADAPTERS = '{"base_model_name_or_path": "some/base"}'
FOLDER_STEP = "convert.py reads a model as a folder"
FOREIGN = {
    "hf": ("hf", model_folder, "a Hugging Face model folder (llama)", "python3 convert.py --from"),
    "hf-bert": (
        "bert",
        lambda path: model_folder(path, model_type="bert"),
        "a Hugging Face model folder (bert)",
        "cannot be read",
    ),
    "hf-weights": (
        "w",
        lambda path: model_folder(path) / "model.safetensors",
        "a safetensors file in a Hugging Face",
        "python3 convert.py --from",
    ),
    "hf-config": (
        "c",
        lambda path: model_folder(path) / "config.json",
        "a file in a Hugging Face model folder",
        "python3 convert.py --from",
    ),
    "hf-no-weights": ("n", no_weights, "a model folder without weights", "model.safetensors"),
    "hf-tf": (
        "t",
        folder_with("tf_model.h5", config="{}"),
        "without weights (only tf_model.h5)",
        "model.safetensors",
    ),
    "hf-cache": (
        "models--a--b",
        lambda path: model_folder(path / "snapshots" / "abc").parents[1],
        "Hugging Face cache",
        "snapshots/abc",
    ),
    "hf-trainer": (
        "out",
        lambda path: model_folder(path / "checkpoint-20").parent,
        "transformers' Trainer",
        "checkpoint-20",
    ),
    "peft": (
        "lora",
        folder_with("adapter_model.safetensors", adapter_config=ADAPTERS),
        "adapters (PEFT) for some/base",
        "merge",
    ),
    "meta": ("llama", folder_with("consolidated.00.pth", params="{}"), "in Meta's own layout", FOLDER_STEP),
    "distcp": ("dcp", folder_with(".metadata", "__0_0.distcp"), "torch.distributed", FOLDER_STEP),
    "tensorflow": ("tf", folder_with("saved_model.pb"), "a SavedModel of TensorFlow", FOLDER_STEP),
    "tokens": (
        "tokens",
        folder_with("train.bin", "val.bin", meta="{}"),
        "a folder of token files",
        "data.source=tokens",
    ),
    "odd-names": (
        "odd",
        folder_with("a.gguf\x1b[2J.gguf"),
        "a folder with a.gguf\\x1b[2J.gguf, a GGUF file",
        "does not read it",
    ),
    "gguf-folder": (
        "g",
        folder_with("model-q8.gguf"),
        "a folder with model-q8.gguf, a GGUF file",
        "does not read it",
    ),
    "bare-weights": ("b", folder_with("model.safetensors"), "weights without their config.json", FOLDER_STEP),
    "gguf": (
        "model.gguf",
        file_of(b"GGUF\x03\x00\x00\x00"),
        "a GGUF file",
        "convert.py writes GGUF and does not read it",
    ),
    "safetensors": (
        "model.safetensors",
        weights_alone,
        "a safetensors file",
        "next to the model's config.json",
    ),
    "bin": (
        "pytorch_model.bin",
        saved(STATE),
        "a PyTorch file of another program",
        "next to the model's config.json",
    ),
    "old-bin": (
        "old.bin",
        saved(STATE, _use_new_zipfile_serialization=False),
        "before version 1.6",
        "next to the model's config.json",
    ),
    "nanogpt": ("ckpt.pt", saved(NANOGPT), "a checkpoint of nanoGPT", "configs/shakespeare_char.yaml"),
    "lightning": ("epoch=1.ckpt", saved(LIGHTNING), "a Lightning checkpoint of another program", FOLDER_STEP),
    "training": ("train.pth", saved(TRAINER), "a training checkpoint of another program", FOLDER_STEP),
    "scripted": ("model.pt", scripted, "a TorchScript program", FOLDER_STEP),
    "pickle": ("model.pkl", file_of(pickle.dumps({"a": 1})), "a Python pickle", "it is not opened here"),
    "upper": ("MODEL.ONNX", file_of(b"\x08\x07"), "an ONNX file", FOLDER_STEP),
    "onnx": ("model.onnx", file_of(b"\x08\x07"), "an ONNX file", FOLDER_STEP),
    "hdf5": ("model.h5", file_of(b"\x89HDF\r\n\x1a\n"), "an HDF5 file", FOLDER_STEP),
    "numpy": ("w.npy", file_of(b"\x93NUMPY\x01"), "a NumPy array", FOLDER_STEP),
    "npz": ("w.npz", arrays, "an archive of NumPy arrays", FOLDER_STEP),
    "zip": ("model.zip", zipped, "a zip archive", "unpack it"),
    "tar": ("model.tar", tarred, "a tar archive", "unpack it"),
    "gz": ("model.tar.gz", file_of(gzip.compress(b"x")), "a gzip archive", "unpack it"),
    "lfs": (
        "big.ckpt",
        file_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a pointer of Git LFS",
        "git lfs pull",
    ),
    "html": ("page.ckpt", file_of(b"<!DOCTYPE html><html>"), "an HTML page", "download the file itself"),
    "text": ("notes.yaml", file_of(b"a: 1\n"), "a text file", "python3 list.py"),
}


def said_by(main: Callable, *argv: object) -> str:
    """The refusal of a script, printed as an error or as a line of its report."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in argv])
        except UserError as error:
            assert len(str(error).splitlines()) <= 3
            return str(error)
    return out.getvalue() + err.getvalue()


FLAGS = {
    "infer": lambda path: (infer.main, "--ckpt", path, "--prompt", "x"),
    "eval_val": lambda path: (eval_val.main, "--ckpt", path, "--data", REPO / "data/tiny_corpus.txt"),
    "evaluate": lambda path: (
        evaluate_checkpoints.main,
        "--checkpoints",
        path,
        "--cases",
        REPO / "cases/tiny_corpus.yaml",
    ),
    "list": lambda path: (listing.main, path),
    "convert --ckpt": lambda path: (
        convert.main,
        "--ckpt",
        path,
        "--to",
        "weights",
        "--output",
        path.parent / "new.ckpt",
    ),
    "convert --from": lambda path: (convert.main, "--from", path, "--output", path.parent / "new.ckpt"),
    "resume": lambda path: (train.main, "--resume", path),
    "base_ckpt": lambda path: (
        finetune.main,
        "--config",
        "configs/finetune_tiny.yaml",
        "--override",
        f"base_ckpt={path}",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_each_flag_that_takes_a_model_names_the_kind_of_a_foreign_file(tmp_path, kind):
    name, make, what, then = FOREIGN[kind]
    path = make(tmp_path / name)
    for script, flags in FLAGS.items():
        if script == "convert --from" and kind in ("hf", "hf-bert", "hf-no-weights", "hf-tf"):
            continue  # it reads these, or says more about them
        said = said_by(*flags(path))
        assert what in said and then in said, f"{script}: {said}"
        assert "Traceback" not in said and not (tmp_path / "new.ckpt").exists()


@pytest.mark.parametrize("kind", sorted(FOREIGN.keys() - {"hf", "hf-bert", "hf-no-weights"}))
def test_a_model_file_given_as_a_tokenizer_is_refused(tmp_path, kind):
    """`prepare.py --tokenizer` reads a tokenizer.json, and refuses anything else."""
    name, make, _, _ = FOREIGN[kind]
    path = make(tmp_path / name)
    with pytest.raises((UserError, FileNotFoundError)):
        prepare.main(
            [
                "tokens",
                "--input",
                "data/tiny_corpus.txt",
                "--tokenizer",
                str(path),
                "--output",
                str(tmp_path / "made"),
            ]
        )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", ["hf", "hf-weights", "hf-config", "hf-cache", "hf-trainer"])
def test_the_convert_command_in_the_error_works(tmp_path, kind, monkeypatch):
    name, make, _, _ = FOREIGN[kind]
    path = make(tmp_path / name)
    [command] = re.findall(
        r"python3 convert\.py (--from .*)", said_by(infer.main, "--ckpt", path, "--prompt", "x")
    )
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(command)
    assert "verified: largest difference" in said_by(convert.main, *argv)
    assert torch.equal(load_model(argv[-1])[0].norm.weight, tiny_model().norm.weight)


def test_convert_tells_users_of_our_checkpoints_to_use_ckpt(tmp_path, monkeypatch):
    for name in ("step-0000004", "final"):
        write_model(tmp_path / "run" / f"{name}.ckpt", tiny_model(), ByteTokenizer(), {})
    for given in (tmp_path / "run", tmp_path / "run" / "final.ckpt"):
        said = said_by(convert.main, "--from", given, "--output", tmp_path / "new.ckpt")
        [command] = re.findall(r"python3 convert\.py (--ckpt .*)", said)
        assert shlex.split(command)[1] == str(tmp_path / "run" / "final.ckpt")
    monkeypatch.chdir(tmp_path)
    assert "written: export" in said_by(convert.main, *shlex.split(command))
    said = said_by(infer.main, "--ckpt", tmp_path / "run", "--prompt", "x")
    assert f"is a folder; name a file in it, e.g. {tmp_path / 'run' / 'final.ckpt'}" in said
    (tmp_path / "run" / "final.ckpt").unlink()
    assert "step-0000004.ckpt" in said_by(infer.main, "--ckpt", tmp_path / "run", "--prompt", "x")
    assert (
        own_checkpoint(tmp_path / "export") is None
        and what_is(tmp_path / "run" / "step-0000004.ckpt") is None
    )


@pytest.mark.parametrize("name", ["gpt2", "some/model"])
def test_the_error_for_a_hub_name_gives_the_convert_command(name):
    said = said_by(infer.main, "--ckpt", name, "--prompt", "x")
    assert (
        "does not exist; python3 list.py shows those there are; if it is a model of the Hugging Face hub: "
        f"python3 convert.py --from {name}" in said
    )
    assert "convert" not in said_by(infer.main, "--ckpt", "runs/final.ckpt", "--prompt", "x")
    assert f"convert.py --from {name}" in said_by(
        finetune.main, "--config", "configs/finetune_tiny.yaml", "--override", f"base_ckpt={name}"
    )


def test_the_error_for_a_folder_of_runs_gives_the_list_command(tmp_path):
    write_model(tmp_path / "runs" / "a" / "final.ckpt", tiny_model(), ByteTokenizer(), {})
    said = said_by(infer.main, "--ckpt", tmp_path / "runs", "--prompt", "x")
    assert (
        f"a folder of runs; name a checkpoint in it; python3 list.py {tmp_path / 'runs'} shows them" in said
    )
    assert "final.ckpt" in said_by(listing.main, tmp_path / "runs")


def test_incomplete_folders_are_refused_with_what_is_missing(tmp_path):
    for kind, said in (
        ("hf-no-weights", "holds no weights"),
        ("hf-tf", "cannot be read"),
        ("hf-bert", "'bert' cannot be read"),
    ):
        name, make, _, _ = FOREIGN[kind]
        assert said in said_by(
            convert.main, "--from", make(tmp_path / name), "--output", tmp_path / "new.ckpt"
        )
    said = said_by(
        convert.main, "--from", shards_missing(tmp_path / "shards"), "--output", tmp_path / "new.ckpt"
    )
    assert "1 of 2 weight files are missing, the first is model-00002-of-00002.safetensors" in said
    pointer = model_folder(tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a pointer of Git LFS" in said_by(
        convert.main, "--from", pointer, "--output", tmp_path / "new.ckpt"
    )
    (tmp_path / "empty").mkdir()
    for flags in FLAGS.values():
        said = said_by(*flags(tmp_path / "empty"))
        assert "a folder without" in said or "no checkpoint (.ckpt) there" in said


@pytest.mark.parametrize("content", [b"PK\x03\x04" + b"\x00" * 40, b"\x80\x02", b"\x80", b"{", b"\x00" * 600])
def test_damaged_files_are_refused_without_a_traceback(tmp_path, content):
    path = file_of(content)(tmp_path / "odd.ckpt")
    for flags in FLAGS.values():
        assert "Traceback" not in said_by(*flags(path))
