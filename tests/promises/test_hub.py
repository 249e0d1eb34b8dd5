"""Datasets of the Hugging Face hub: streamed from a hub on the loopback device, and a clear error where there
is no hub."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub, dataset_card, parquet

import convert
import eval_val
import evaluate_checkpoints
import finetune
import infer
import prepare
import train as train_script
from support.config.read import load_config
from support.messages import UserError
from support.text.hub import hub_reachable, open_dataset
from tokenizer import GPT2Tokenizer

ROOT = Path(__file__).parents[2]
NAME = "wikimedia/wikipedia"
ARTICLES = [
    f"Article {i}\n\n" + f"The town of Number {i} lies by the river. " * (1 + i * 7 % 11) for i in range(90)
]

# Overrides of config.yaml for a model and steps of toy size.
TOY_OVERRIDES = (
    "model.d_model=32",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.max_seq_len=32",
    "data.val_docs=9",
    "training.max_steps=4",
    "training.warmup_steps=1",
    "training.micro_batch_size=2",
    "training.grad_accum_steps=2",
    "training.val_every=2",
    "training.log_every=1",
    "hardware.accelerator=cpu",
)

# A program that runs train.py once for each command line on its standard input, all in one process, and
# prints what each answered. A long pause would be a retry, and there is nothing to retry.
RUN_EACH = """
import contextlib, io, json, runpy, sys, time

def sleep(seconds, really=time.sleep):
    assert seconds < 0.5, "waits for network"
    really(seconds)

time.sleep, answers = sleep, {}
for name, argv in json.load(sys.stdin).items():
    sys.argv, out, err = ["train.py", *argv], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path("train.py", run_name="__main__")
        except SystemExit as stop:
            answers[name] = {"code": stop.code, "out": out.getvalue(), "err": err.getvalue()}
            answers[name]["datasets"] = "datasets" in sys.modules
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    """A small Wikipedia: English in two files, and a German part of three articles."""
    splits = {f"20231101.{code}": {"train": f"20231101.{code}/train-*"} for code in ("en", "de")}
    files = {
        "README.md": dataset_card(splits),
        "20231101.en/train-00000-of-00002.parquet": parquet(ARTICLES[:50]),
        "20231101.en/train-00001-of-00002.parquet": parquet(ARTICLES[50:]),
        "20231101.de/train-00000-of-00001.parquet": parquet(ARTICLES[:3]),
    }
    with LoopbackHub(NAME, files) as hub:
        yield hub


def argv_of(folder: Path, *words: str) -> list[str]:
    """The arguments for config.yaml with the toy overrides. Words that begin with -- are flags, the others
    are further overrides."""
    argv = ["--config", "config.yaml"]
    for override in [*TOY_OVERRIDES, f"checkpoint.dir={folder}"]:
        argv += ["--override", override]
    for word in words:
        argv += word.split("=") if word.startswith("--") else ["--override", word]
    return argv


def answers_of(environment: dict[str, str], command_lines: dict[str, list[str]]) -> dict[str, dict]:
    """What train.py answers to each command line: {name: its exit code, output and errors}."""
    child = subprocess.run(
        [sys.executable, "-c", RUN_EACH],
        input=json.dumps(command_lines),
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def assert_one_clear_error(answer: dict) -> None:
    """At most three lines, after the progress bar of a download if there was one."""
    said = re.sub(r"\r[^\n]*\n?", "", answer["err"])
    assert answer["code"] == 2
    assert said.startswith("error: ")
    assert 1 <= len(said.splitlines()) <= 3
    assert "Traceback" not in said
    assert answer["out"] == ""


# ---- training ------------------------------------------------------------------------------------


def train(hub: LoopbackHub, folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", *argv_of(folder, *words)]
    environment = os.environ | hub.environment(folder.parent / "cache")
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)


def stream_state(folder: Path) -> dict:
    return json.loads(
        torch.load(folder / "final.ckpt", weights_only=True)["tiny_transformer"]["stream_state"]
    )


@pytest.mark.slow
def test_config_yaml_streams_from_the_hub_trains_and_samples(hub, tmp_path, capsys):
    """The README's Wikipedia run, from the first request to a sample, in a process as a user starts it."""
    hub.requests.clear()
    run = train(hub, tmp_path / "run")
    assert run.returncode == 0, run.stderr
    complaint = re.search("Traceback|Exception|Error", run.stderr)
    assert not complaint, "streams that are not read to their end must not complain at the exit either"
    assert "val:   9 documents" in run.stdout
    paths = [request.removeprefix("GET ") for request in hub.requests if request.startswith("GET")]
    names = {path.rpartition("/")[2] for path in paths if path.endswith(".parquet")}
    assert names == {"train-00000-of-00002.parquet", "train-00001-of-00002.parquet"}

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4]
    assert [row["tokens"] for row in rows if "loss" in row] == [128 * step for step in (1, 2, 3, 4)]
    assert abs(rows[0]["loss"] - torch.tensor(50257.0).log().item()) < 0.5

    state = stream_state(tmp_path / "run")
    assert (state["epoch"], state["group"]) == (0, 0)
    assert state["used"] > 0
    capsys.readouterr()
    argv = ["--ckpt", str(tmp_path / "run" / "final.ckpt"), "--prompt", "Attention is"]
    infer.main([*argv, "--max-new-tokens", "5", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("Attention is")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_streamed_from_the_hub_resumes_exactly(hub, tmp_path, workers):
    """A run that was resumed, in a later epoch, ends with the same weights as one that was not. The tokenizer
    is trained on the stream, too."""
    words = (
        "tokenizer.kind=bpe",
        "tokenizer.vocab_size=300",
        "data.train_docs=9",
        "training.schedule_steps=40",
        f"hardware.num_workers={workers}",
    )
    whole = train(hub, tmp_path / "whole", *words, "training.max_steps=40")
    first = train(hub, tmp_path / "parts", *words, "training.max_steps=15")
    epoch = stream_state(tmp_path / "parts")["epoch"]
    rest = train(hub, tmp_path / "parts", *words, "training.max_steps=40", "--resume")
    for run in (whole, first, rest):
        assert run.returncode == 0, run.stderr
    assert stream_state(tmp_path / "parts")["epoch"] > epoch
    last_line = whole.stdout.splitlines()[-1]
    assert last_line.startswith("weights sha256 ")
    assert rest.stdout.splitlines()[-1] == last_line
    assert first.stdout.splitlines()[-1] != last_line


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "dataset": (["data.dataset=no/such"], "no/such"),
    "dataset, not streamed": (["data.dataset=no/such", "data.streaming=false"], "no/such"),
    "dataset without owner": (["data.dataset=nosuch"], "nosuch"),
    "configuration": (["data.config=20231101.xx"], "20231101.de"),
    "configuration not given": (["data.config=null"], "20231101.de"),
    "split": (["data.split=test"], "test"),
    "validation split": (["data.val_split=validation"], "validation"),
    "revision": (["data.revision=abcdef0"], "abcdef0"),
    "text field": (["data.text_field=body"], "fields: id, url, title, text"),
    "text field, not streamed": (
        ["data.text_field=body", "data.streaming=false"],
        "fields: id, url, title, text",
    ),
    "nothing left to train on": (["data.val_docs=90"], "data.val_docs"),
    "a path with a hub dataset": (["data.path=x.jsonl"], "data.path=x.jsonl"),
}


@pytest.fixture(scope="module")
def answers(hub, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("mistakes")
    lines = {name: argv_of(folder / "run", *words) for name, (words, _) in MISTAKES.items()}
    lines["show-step"] = argv_of(folder / "run", "--show-step=2", "data.shuffle=false")
    answers = answers_of(hub.environment(folder / "cache"), lines)
    assert not (folder / "run").exists(), "nothing is written"
    return answers


@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_hub_does_not_have_is_one_clear_error(answers, name):
    assert_one_clear_error(answers[name])
    assert MISTAKES[name][1] in answers[name]["err"]


def test_show_step_reads_the_stream_up_to_that_step(answers):
    """By hand: the articles in order from the tenth on, each ended by EOS; 128 tokens of GPT-2 a step."""
    gpt2 = GPT2Tokenizer()
    row = [i for article in ARTICLES[9:] for i in [*gpt2.encode(article), gpt2.eos_id]]
    assert answers["show-step"]["code"] == 0
    for start in range(128, 256, 32):
        assert gpt2.decode(row[start : start + 32]) in answers["show-step"]["out"]


# ---- no network ----------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_without_network_the_answer_comes_before_anything_is_tried(tmp_path):
    """The libraries retry for half a minute, so they are not even imported. A dataset that is not streamed
    may be in the cache, which is searched without network."""
    environment = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
    environment["HF_HOME"] = str(tmp_path / "cache")
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{closed_port()}"
    lines = {
        "streamed": argv_of(tmp_path / "run"),
        "not streamed": argv_of(tmp_path / "run", "data.streaming=false"),
    }
    answers = answers_of(environment, lines)
    for answer in answers.values():
        assert_one_clear_error(answer)
        assert NAME in answer["err"]
        assert "cannot be reached" in answer["err"]
        small_model = "python3 train.py --config config_smoke.yaml --override data.path=my_book.txt"
        assert small_model in answer["err"]
        assert "OfflineMode" not in answer["err"], "the user has not chosen to be offline"
    assert not answers["streamed"]["datasets"]
    assert not (tmp_path / "run").exists()


def test_with_the_offline_setting_the_hub_is_not_asked(monkeypatch):
    """With HF_HUB_OFFLINE=1 (the setting of all tests) only the cache is searched, and it lacks this
    dataset."""
    monkeypatch.setattr("support.text.hub.hub_reachable", lambda: pytest.fail("the hub was probed"))
    for streaming in (True, False):
        message = r"no/such: HF_HUB_OFFLINE=1 keeps the Hugging Face hub away, .*; unset it"
        with pytest.raises(UserError, match=message) as caught:
            open_dataset("no/such", None, "train", None, None, streaming)
        assert len(str(caught.value).splitlines()) <= 3


@pytest.fixture
def no_hub(monkeypatch):
    """There is no offline setting, and the hub does not answer."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("support.text.hub.hub_reachable", lambda: False)


def command_of(error: UserError, script: str) -> list[str]:
    """The words after `python3 SCRIPT` in the last line of a message."""
    words = shlex.split(str(error).splitlines()[-1])
    assert words[:2] == ["python3", script]
    return words[2:]


def with_file(argv: list[str], name: str, folder: Path) -> list[str]:
    """The same arguments, with this file in the folder."""
    return [word.replace(name, f"{folder}/{name}") for word in argv]


def refused(main, argv: list[str]) -> UserError:
    with pytest.raises(UserError, match="hub cannot be reached") as caught:
        main(argv)
    assert "docs/TROUBLESHOOTING.md#no-network" in str(caught.value)
    assert "HF_HUB_OFFLINE" not in os.environ, "the setting is the user's"
    return caught.value


@pytest.mark.parametrize("config", ["config.yaml", "configs/tinystories.yaml"])
def test_training_without_network_names_a_command_that_trains(no_hub, tmp_path, monkeypatch, config):
    error = refused(train_script.main, ["--config", config, "--override", f"checkpoint.dir={tmp_path}"])
    argv = command_of(error, "train.py")
    loaded = load_config(argv[1], argv[3::2])
    assert (loaded.data.source, loaded.data.path) == ("text", "my_book.txt")
    assert loaded.model.d_model <= 128, "a small model, since this may be a laptop"
    shutil.copyfile(ROOT / "data/tiny_corpus.txt", tmp_path / "my_book.txt")
    argv = with_file(argv, "my_book.txt", tmp_path)
    with pytest.raises(SystemExit) as end:
        train_script.main([*argv, "--show-step", "1"])
    assert end.value.code == 0


def test_fine_tuning_without_network_names_a_command_that_fine_tunes(no_hub, tmp_path, tiny_run):
    base = ["--override", f"base_ckpt={tiny_run.folder}/final.ckpt"]
    base += ["--override", f"checkpoint.dir={tmp_path / 'sft'}"]
    argv = command_of(refused(finetune.main, ["--config", "config_finetune.yaml", *base]), "finetune.py")
    rows = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(3)]
    (tmp_path / "my_rows.json").write_text(json.dumps(rows))
    assert finetune.main(with_file(argv, "my_rows.json", tmp_path) + base) == 0


def test_scoring_without_network_names_the_text_of_the_checkpoint_or_another(no_hub, tmp_path, tiny_run):
    ckpt = str(tiny_run.folder / "final.ckpt")
    error = refused(eval_val.main, ["--ckpt", ckpt, "--config", "config.yaml"])
    assert "leave --config out, to score the text that the checkpoint validated on" in str(error)
    assert "train" not in str(error).replace(ckpt, "").replace("trained", "")
    assert eval_val.main(["--ckpt", ckpt]) == 0
    shutil.copyfile(ROOT / "data/tiny_corpus.txt", tmp_path / "my_book.txt")
    argv = with_file(command_of(error, "eval_val.py"), "my_book.txt", tmp_path)
    assert eval_val.main(argv) == 0
    assert eval_val.main([*argv, "--config", "config.yaml"]) == 0
    checkpoint = tiny_run.checkpoint()
    checkpoint["tiny_transformer"]["config"]["data"] = {"source": "hf", "dataset": "a/b"}
    torch.save(checkpoint, tmp_path / "streamed.ckpt")
    for words in ([], ["--config", "config.yaml"]):
        error = refused(eval_val.main, ["--ckpt", str(tmp_path / "streamed.ckpt"), *words])
        assert "leave --config out" not in str(error), "the text of this checkpoint is on the hub too"
    cases = ["--cases", "cases/tiny_corpus.yaml", "--checkpoints", ckpt, "--val"]
    error = refused(evaluate_checkpoints.main, [*cases, "--config", "config.yaml"])
    assert "--val --config config_smoke.yaml" in str(error)
    assert evaluate_checkpoints.main([*cases, "--config", "config_smoke.yaml"]) == 0


def test_other_scripts_without_network_name_what_they_take_instead(no_hub, tmp_path):
    flags = ["--dataset", "a/b", "--tokenizer", "byte", "--num-proc", "1"]
    error = refused(prepare.main, ["tokens", *flags, "--output", str(tmp_path / "t")])
    assert str(error).endswith("read local files: --input my_book.txt in place of --dataset")
    error = refused(convert.main, ["--from", "some/model", "--output", str(tmp_path / "m.ckpt")])
    assert str(error).endswith("hf download some/model --local-dir model")


def test_local_files_of_a_dataset_may_be_a_folder(tmp_path):
    for name in ("a.jsonl", "deep/b.JSONL", ".hidden.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    rows = open_dataset("json", None, "train", str(tmp_path), None, True)
    assert [row["text"] for row in rows] == ["a.jsonl", "deep/b.JSONL"]


@pytest.mark.parametrize("path", ["/", "/api/datasets/no/such"])
def test_a_hub_that_answers_with_an_error_is_reachable(hub, monkeypatch, path):
    """Also with a 404 or a 500: the probe does not ask whether the dataset is there."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + path)
    assert hub_reachable()


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:{port}",
        "https://127.0.0.1:{port}",
        "127.0.0.1:{port}",
        "nonsense",
        "http://",
        "ftp://127.0.0.1:{port}/",
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_not_reachable(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint.format(port=closed_port()))
    assert not hub_reachable()


NOT_HTTP = {
    "nothing": b"",
    "half a word": b"HTTP",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "noise": b"\x00\xff" * 40 + b"\r\n",
}


@pytest.mark.parametrize("name", NOT_HTTP)
def test_a_server_that_is_not_a_hub_raises_nothing(monkeypatch, name):
    """A captive portal, or another service on the port. It may count as reachable or not; a traceback would
    be wrong."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(NOT_HTTP[name])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_reachable() in (True, False)
        thread.join()
