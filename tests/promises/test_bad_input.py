"""A user's mistake ends in one to three lines on stderr that name the value, and exit status 2, with nothing
written.

Most of it in this process, through `guarded` as the scripts do; a few as real processes, for the traceback
that must not be there and for what has been imported by then.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import infer
import train
from support.cli import guarded
from support.messages import UserError

GOOD = """
model: {d_model: 32, n_layers: 1, n_heads: 4, max_seq_len: 16}
tokenizer: {kind: byte}
data: {path: text.txt}
training: {max_steps: 2}
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder with a good config and a text."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(train.__file__).parent / "data", "data")
    Path("good.yaml").write_text(GOOD)
    Path("text.txt").write_text("A text that is long enough to train on. " * 40)
    return tmp_path


@pytest.fixture
def refusal(here, capsys, monkeypatch):
    """refusal(argv) is what train.py says of it; the folder must be as it was, and no run's folder have
    come into being."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # `guarded` sets it

    def call(argv: list[str], lines: int = 3) -> str:
        before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
        with pytest.raises(SystemExit) as stop:
            guarded(train.main, argv)
        assert stop.value.code == 2
        out, message = capsys.readouterr()
        assert out == ""
        assert message.startswith("error: ")
        assert 1 <= len(message.splitlines()) <= lines, message
        assert all(len(line) < 400 for line in message.splitlines()), message
        assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
        return message

    return call


def overridden(*overrides: str) -> list[str]:
    return ["--config", "good.yaml", *(word for override in overrides for word in ("--override", override))]


# ---- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["bad.yaml", "does not exist"]),
        ("", ["bad.yaml", "is empty"]),
        ("# only a comment\n", ["bad.yaml", "is empty"]),
        ("- a\n- list\n", ["bad.yaml", "not a mapping"]),
        ("just words", ["bad.yaml", "not a mapping"]),
        (GOOD + "seed: [1, 2\n", ["bad.yaml, line "]),
        (GOOD + "seed:\t1: 2\n", ["bad.yaml, line 6"]),
        (GOOD + "seed: 1\nseed: 2\n", ["bad.yaml, line 7", "'seed' is given twice"]),
        (GOOD + "seed: !!python/object/apply:os.system [touch owned]\n", ["bad.yaml, line 6"]),
        (GOOD.replace("d_model", "d_modle"), ["model.d_modle", "model.d_model"]),
        (GOOD.replace("model:", "modell:"), ["modell"]),
        (GOOD.replace("d_model", "n_embd"), ["model.n_embd", "model.d_model"]),
        ("model: 5\n" + GOOD.split("\n", 2)[2], ["model", "5"]),
        ("model:\n" + GOOD.split("\n", 2)[2] + "data:\n", ["bad.yaml"]),
        (b"seed: 1 \xff\xfe", ["bad.yaml", "not text"]),
        (b"\x00\x01\x02", ["bad.yaml"]),
    ],
    ids=lambda value: repr(value)[-40:] if not isinstance(value, list) else "",
)
def test_a_config_file_that_is_none(refusal, content, words):
    if content is not None:
        Path("bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(
        ["--config", "bad.yaml"], lines=5 if "modell" in words else 3
    )  # each key of an unknown section is listed
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # wrong types
        (["model.d_model=wide"], ["model.d_model='wide'"]),
        (["model.d_model=32.5"], ["model.d_model=32.5"]),
        (["model.n_layers=true"], ["model.n_layers=True"]),
        (["model.tie_embeddings=maybe"], ["model.tie_embeddings='maybe'"]),
        (["training.max_steps=many"], ["training.max_steps='many'"]),
        (["training.max_steps=2.5"], ["training.max_steps=2.5"]),
        (["training.lr=fast"], ["training.lr='fast'"]),
        (["training.betas=0.9"], ["training.betas=0.9"]),
        (["training.betas=[0.9, 0.95, 0.99]"], ["training.betas="]),
        (["seed=null"], ["seed=None"]),
        (["data.path=5"], ["data.path=5"]),
        (["training=5"], ["training"]),
        # out of range
        (["model.dropout=1.5"], ["model.dropout=1.5"]),
        (["model.n_layers=0"], ["model.n_layers=0"]),
        (["training.lr=-1"], ["training.lr=-1"]),
        (["training.lr=.nan"], ["training.lr=nan"]),
        (["training.lr=.inf"], ["training.lr=inf"]),
        (["training.min_lr=1.0"], ["min_lr=1.0", "lr="]),
        (["training.warmup_steps=100"], ["warmup_steps=100", "2 steps"]),
        (["training.betas=[0.9, 1.0]"], ["betas=[0.9, 1.0]"]),
        (["training.micro_batch_size=0"], ["training.micro_batch_size=0"]),
        (["data.val_fraction=1.0"], ["data.val_fraction=1.0"]),
        (["data.stride=17"], ["data.stride=17", "16"]),
        (["training.seq_len=17"], ["training.seq_len=17", "max_seq_len=16"]),
        (["seed=-1"], ["seed=-1"]),
        (["seed=1180591620717411303424"], ["seed=1180591620717411303424"]),
        (["hardware.precision=16-mixed"], ["16-mixed", "bf16-mixed"]),
        (["training.schedule=exponential"], ["training.schedule='exponential'", "cosine"]),
        # shapes that do not divide
        (["model.d_model=30"], ["d_model=30", "n_heads=4", "d_model=32"]),
        (["model.n_kv_heads=3"], ["n_heads=4", "n_kv_heads=3", "try n_kv_heads="]),
        (["model.d_model=12"], ["head_dim=3", "head_dim=4"]),
        # keys and values that do not go together
        (
            ["training.epochs=2", "training.max_steps=3"],
            ["training.max_steps", "training.epochs", "exclude each other"],
        ),
        (["training.max_steps=null"], ["max_steps", "epochs"]),
        (["training.sample_every=1"], ["sample_every=1", "sample_prompts"]),
        (["model.vocab_size=100"], ["model.vocab_size", "tokenizer"]),
        (["data.dataset=wikimedia/wikipedia"], ["dataset", "source"]),
        (["data.source=hf"], ["data"]),
        (["tokenizer.kind=file"], ["tokenizer", "path"]),
        (["tokenizer.kind=file", "tokenizer.path=nowhere.json"], ["nowhere.json"]),
        (["tokenizer.kind=bpe", "tokenizer.vocab_size=100"], ["tokenizer.vocab_size=100"]),
        # unknown keys, and what is no override
        (["training.learning_rate=0.1"], ["training.learning_rate", "training.lr"]),
        (["optim.lr=0.1"], ["optim.lr", "training.lr"]),
        (["batch_size=4"], ["batch_size", "training.micro_batch_size"]),
        (["nonsense=1"], ["nonsense"]),
        (["training.max_steps"], ["training.max_steps", "KEY=VALUE"]),
        (["=5"], ["=5", "KEY=VALUE"]),
        (["seed.deep=5"], ["seed="]),
        (["data.path=[unclosed"], ["data.path=[unclosed"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_a_config_that_cannot_be(refusal, overrides, words):
    message = refusal(overridden(*overrides))
    assert all(word in message for word in words), message


def test_all_mistakes_in_a_config_are_listed_at_once(refusal):
    message = refusal(overridden("model.d_modle=3", "training.lr=-1", "seed=x"))
    assert all(word in message for word in ("model.d_modle", "training.lr=-1", "seed='x'"))


def test_no_config_is_an_error_that_names_one(refusal):
    assert "--config config_smoke.yaml" in refusal([])


# ---- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.txt", None, ["data.path=nowhere.txt"]),
        ("nowhere/*.txt", None, ["data.path=nowhere/*.txt"]),
        ("empty.txt", b"", ["empty.txt", "no text", "0 bytes"]),
        ("blank.txt", b"\n  \n\t\n", ["blank.txt", "no text"]),
        ("marks.txt", b"<|endoftext|>\n<|endoftext|>\n", ["marks.txt", "no text"]),
        ("binary.txt", b"text\x00\x01\x02", ["binary.txt", "offset 4"]),
        ("utf16.txt", "some text".encode("utf-16"), ["utf16.txt", "UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        ("latin1.txt", "naïve".encode("latin-1"), ["latin1.txt", "0xef", "offset 2"]),
        ("short.txt", b"abc", ["fewer than one block", "17"]),
        ("broken.jsonl", b'{"text": "one"}\n{"text": \n', ["broken.jsonl, line 2", "not JSON"]),
        ("fields.jsonl", b'{"body": "one"}\n', ["fields.jsonl, line 1", "'text'", "body", "data.text_field"]),
        ("list.jsonl", b"[1, 2]\n", ["list.jsonl, line 1"]),
        ("number.jsonl", b'{"text": 5}\n', ["number.jsonl, line 1", "'text'"]),
        ("table.parquet", b"PAR1", ["table.parquet", "data.source=hf"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_text_that_is_none(refusal, name, content, words):
    if content is not None:
        Path(name).write_bytes(content)
    message = refusal(overridden(f"data.path={name}"))
    assert all(word in message for word in words), message


def test_a_folder_without_texts(refusal):
    Path("folder").mkdir()
    Path("folder/picture.png").write_bytes(b"\x89PNG")
    assert "data.path=folder" in refusal(overridden("data.path=folder"))


def test_a_validation_text_that_is_none(refusal):
    assert "data.val_path=nowhere.txt" in refusal(overridden("data.val_path=nowhere.txt"))


def test_a_corpus_of_one_character_leaves_no_validation_text(refusal):
    Path("one.txt").write_text("a")
    refusal(overridden("data.path=one.txt"))


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_hub_dataset_without_network(refusal, monkeypatch, streaming):
    """The hub is a port of this machine at which nobody answers."""
    if streaming == "true":
        monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    overrides = (
        "data.path=null",
        "data.source=hf",
        "data.dataset=wikimedia/wikipedia",
        "data.config=20231101.en",
        f"data.streaming={streaming}",
    )
    message = refusal(overridden(*overrides))
    assert "data.dataset=wikimedia/wikipedia" in message


@pytest.mark.parametrize("name", ["json", "parquet", "text"])
def test_local_data_files_that_are_not_there(refusal, name):
    overrides = ("data.path=nowhere.*", "data.source=hf", f"data.dataset={name}")
    message = refusal(overridden(*overrides))
    assert "data.path=nowhere.*" in message


# ---- the device, the folder, the command line ----------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "cuda", "gpu", ""])
@pytest.mark.parametrize("flag", ["--device", "--override"])
def test_a_device_that_is_not_there(refusal, monkeypatch, name, flag):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    value = name if flag == "--device" else f"hardware.accelerator={name}"
    message = refusal(["--config", "good.yaml", flag, value])
    assert "accelerator" in message or "device" in message
    assert name in message


@pytest.mark.parametrize("folder", ["text.txt", "text.txt/run"])
def test_a_checkpoint_folder_that_cannot_be(refusal, folder):
    assert folder in refusal(overridden(f"checkpoint.dir={folder}"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--resume", "nowhere.ckpt"], ["nowhere.ckpt does not exist"]),
        (["--resume", "text.txt"], ["text.txt is not a checkpoint"]),
        (["--resume", "data"], ["data is a folder"]),
        (["--config", "good.yaml", "--resume"], ["nothing to resume"]),
        (["--resume"], ["no config given"]),
        (["--config", "data"], ["data"]),
        (["--config", "good.yaml", "--show-step", "3"], ["--show-step 3", "1 to 2"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_flags_that_name_nothing(refusal, argv, words):
    message = refusal(argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed", "many"],
        ["--show-step", "first"],
        ["--confg", "good.yaml"],
        ["--config"],
        ["good.yaml"],
        ["--conf", "good.yaml"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_shows_the_usage_and_exits_2(here, capsys, argv):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    assert "usage: " in capsys.readouterr().err


# ---- real processes ------------------------------------------------------------------------------

REPO = Path(train.__file__).parent


def script(name: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script as a user does, from another folder, with a list of its imports on stderr."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", str(REPO / name), *argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def imported(done: subprocess.CompletedProcess) -> set[str]:
    return {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }


def said(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        (
            "train.py",
            ["--config", "good.yaml", "--override", "model.d_modle=64"],
            ["model.d_modle", "model.d_model"],
        ),
        ("infer.py", ["--ckpt", "text.txt", "--prompt", "a"], ["text.txt is not a checkpoint"]),
        ("list.py", ["nowhere"], ["nowhere: no checkpoint"]),
    ],
    ids=["unknown key", "no checkpoint", "nothing to list"],
)
def test_a_mistake_exits_2_without_traceback_and_without_lightning(here, name, argv, words):
    before = sorted(here.rglob("*"))
    done = script(name, *argv, cwd=here)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = said(done)
    assert lines[0].startswith("error: ")
    assert 1 <= len(lines) <= 3
    assert "Traceback" not in done.stderr
    assert all(word in lines[0] for word in words)
    assert not imported(done) & {"lightning", "transformers", "datasets", "matplotlib"}
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("name", ["train.py", "infer.py", "list.py"])
@pytest.mark.parametrize(
    ("argv", "status"), [(["--help"], 0), (["--nonsense"], 2)], ids=["help", "wrong flag"]
)
def test_help_and_wrong_flags_answer_before_torch_is_imported(here, name, argv, status):
    done = script(name, *argv, cwd=here)
    assert done.returncode == status
    assert not imported(done) & {"torch", "lightning", "numpy", "pydantic"}
    assert f"python3 {name}" in done.stdout if argv == ["--help"] else "usage: " in done.stderr


@pytest.mark.slow
def test_a_malicious_checkpoint_as_a_process(here):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {here / 'touched'}",)

    torch.save({"state_dict": {}, "tiny_transformer": Evil()}, "evil.ckpt")
    for name, argv in (
        ("infer.py", ["--ckpt", "evil.ckpt", "--prompt", "a"]),
        ("train.py", ["--resume", "evil.ckpt"]),
    ):
        done = script(name, *argv, cwd=here)
        assert (done.returncode, "Traceback" in done.stderr, len(said(done))) == (2, False, 1)
        assert "would run code" in done.stderr
    done = script("list.py", "evil.ckpt", cwd=here)
    assert (done.returncode, "would run code" in done.stdout) == (0, True)
    assert not (here / "touched").exists()
    with pytest.raises(UserError):
        infer.main(["--ckpt", "evil.ckpt", "--prompt", "a", "--device", "cpu"])
