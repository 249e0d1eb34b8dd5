"""A user's mistake ends in one to three lines on stderr that name the value, and exit status 2, with nothing
written.

Most run in this process, through `guarded` as in the scripts; a few as real processes, to see that there is
no traceback and what has been imported by then.
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
    """refusal(argv) is the error of train.py, which must leave the folder as it was, without a run folder."""
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


# A few of each kind; the rules of the schema are in test_config.py, how values are read in test_values.py.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["bad.yaml", "does not exist"]),
        (b"", ["bad.yaml", "is empty"]),
        (GOOD.encode() + b"seed: [1, 2\n", ["bad.yaml, line "]),
        (GOOD.replace("d_model", "d_modle").encode(), ["model.d_modle", "model.d_model"]),
        (b"seed: 1 \xff\xfe", ["bad.yaml", "not text"]),
        (b"\x00\x01\x02", ["bad.yaml"]),
    ],
    ids=["missing", "empty", "syntax", "unknown key", "not UTF-8", "binary"],
)
def test_a_file_that_is_not_a_config_is_refused(refusal, content, words):
    if content is not None:
        Path("bad.yaml").write_bytes(content)
    message = refusal(["--config", "bad.yaml"])
    assert all(word in message for word in words), message


def test_each_key_of_an_unknown_section_is_listed(refusal):
    Path("bad.yaml").write_text(GOOD.replace("model:", "modell:"))
    message = refusal(["--config", "bad.yaml"], lines=5)
    assert all(f"modell.{key}" in message for key in ("d_model", "n_layers", "n_heads", "max_seq_len"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.lr=fast"], ["training.lr='fast'"]),
        (["model.n_layers=0"], ["model.n_layers=0"]),
        (["model.d_model=30"], ["d_model=30", "n_heads=4", "d_model=32"]),
        (["training.epochs=2", "training.max_steps=3"], ["training.max_steps", "exclude each other"]),
        (["training.learning_rate=0.1"], ["training.learning_rate", "training.lr"]),
        (["training.max_steps"], ["training.max_steps", "KEY=VALUE"]),
        (["tokenizer.kind=file", "tokenizer.path=nowhere.json"], ["nowhere.json"]),
        (["data.path=[unclosed"], ["data.path=[unclosed"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_a_wrong_override_is_refused(refusal, overrides, words):
    message = refusal(overridden(*overrides))
    assert all(word in message for word in words), message


def test_all_mistakes_in_a_config_are_listed_at_once(refusal):
    message = refusal(overridden("model.d_modle=3", "training.lr=-1", "seed=x"))
    assert all(word in message for word in ("model.d_modle", "training.lr=-1", "seed='x'"))


def test_the_error_without_a_config_names_one(refusal):
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
def test_a_file_that_is_not_a_text_is_refused(refusal, name, content, words):
    if content is not None:
        Path(name).write_bytes(content)
    message = refusal(overridden(f"data.path={name}"))
    assert all(word in message for word in words), message


def test_a_folder_without_texts_is_refused(refusal):
    Path("folder").mkdir()
    Path("folder/picture.png").write_bytes(b"\x89PNG")
    assert "data.path=folder" in refusal(overridden("data.path=folder"))


def test_a_missing_validation_text_is_refused(refusal):
    assert "data.val_path=nowhere.txt" in refusal(overridden("data.val_path=nowhere.txt"))


def test_a_corpus_of_one_character_is_refused(refusal):
    Path("one.txt").write_text("a")
    refusal(overridden("data.path=one.txt"))


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_hub_dataset_without_network_is_refused(refusal, monkeypatch, streaming):
    """The hub is a port of this machine where nothing answers."""
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
def test_missing_local_data_files_are_refused(refusal, name):
    overrides = ("data.path=nowhere.*", "data.source=hf", f"data.dataset={name}")
    message = refusal(overridden(*overrides))
    assert "data.path=nowhere.*" in message


# ---- the device, the folder, the command line ----------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "cuda", "gpu", ""])
@pytest.mark.parametrize("flag", ["--device", "--override"])
def test_a_missing_device_is_refused(refusal, monkeypatch, name, flag):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    value = name if flag == "--device" else f"hardware.accelerator={name}"
    message = refusal(["--config", "good.yaml", flag, value])
    assert "accelerator" in message or "device" in message
    assert name in message


@pytest.mark.parametrize("folder", ["text.txt", "text.txt/run"])
def test_a_checkpoint_folder_that_is_a_file_is_refused(refusal, folder):
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
def test_flags_that_name_something_missing_are_refused(refusal, argv, words):
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
def test_no_script_runs_the_code_in_a_malicious_checkpoint(here):
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
