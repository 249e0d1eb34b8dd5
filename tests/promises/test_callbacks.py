"""What is written around a training step: rows for loggers, text samples, losses on training text. A failure
there does not end the run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import BYTE, STREAM, stop_before

import data
import support.run.metrics
import support.run.show
import train
from model import GPTMini
from support.checkpoint import read_metadata
from support.run.saving import pl

SAMPLES = ("training.sample_every=2", "training.sample_prompts=[The loss, A head]")


class RecordingLogger:
    """A stand-in for a Lightning logger. It keeps what it receives in a list shared by all instances."""

    received: list = []

    def __init__(self, *args, **options):
        self.options = options
        RecordingLogger.received.append(options)

    def log_metrics(self, row, step):
        RecordingLogger.received.append((step, "val_loss" in row, row.get("loss", row.get("val_loss"))))

    def save(self):
        pass

    def finalize(self, status):
        RecordingLogger.received.append(status)


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Stands in for the package, which is not installed: the class that records what loggers receive."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(pl.loggers, "WandbLogger", RecordingLogger)
    monkeypatch.setattr(RecordingLogger, "received", [])
    return RecordingLogger


def killed_run(run, monkeypatch, folder: Path, *words: str) -> None:
    """A run that dies before step 7; its last checkpoint is that of step 4."""
    step = train.LitCausalLM.training_step

    def dies(self, *args):
        if self.trainer.global_step == 6:
            raise ZeroDivisionError
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train.LitCausalLM, "training_step", dies)
        run(folder, *BYTE, *words)


def test_a_resumed_run_continues_in_wandb_and_sends_each_row_once(run, tmp_path, monkeypatch, wandb):
    folder, words = tmp_path / "run", ("logging.wandb=true", "training.val_every=3")
    killed_run(run, monkeypatch, folder, *words)
    run(folder, *BYTE, *words, "--resume")
    first, second = (entry for entry in wandb.received if isinstance(entry, dict))
    assert first == second
    assert (first["resume"], first["id"]) == ("allow", (folder / "wandb_id.txt").read_text())
    given = [entry for entry in wandb.received if isinstance(entry, tuple)]
    rows = [
        (row["step"], "val_loss" in row, row.get("loss", row.get("val_loss")))
        for row in map(json.loads, (folder / "metrics.jsonl").open())
    ]
    assert given == rows
    assert wandb.received.count("finished") == 2


def test_a_new_run_in_the_same_folder_is_a_new_wandb_run(run, tmp_path, wandb):
    for _ in range(2):
        run(tmp_path / "run", *BYTE, "training.max_steps=1", "training.warmup_steps=0", "logging.wandb=true")
    first, second = (entry["id"] for entry in wandb.received if isinstance(entry, dict))
    assert first != second
    assert (tmp_path / "run" / "old-1" / "wandb_id.txt").read_text() == first


def test_tensorboard_has_each_step_once_after_a_kill(run, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, words = tmp_path / "run", ("logging.tensorboard=true", "training.val_every=3")
    killed_run(run, monkeypatch, folder, *words)
    run(folder, *BYTE, *words, "--resume")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("val_loss")] == [3, 6, 9, 12]


@pytest.mark.parametrize("where", ["__init__", "log_metrics", "save", "finalize"])
def test_a_logger_that_fails_gives_one_warning(run, tmp_path, monkeypatch, wandb, where):
    calls = []

    def unreachable(self, *args, **options):
        calls.append(where)
        raise ConnectionError("the host is not reachable\nretry")

    monkeypatch.setattr(RecordingLogger, where, unreachable)
    made = run(tmp_path / "run", *BYTE, "logging.wandb=true")
    assert (made.code, len(made.train_rows)) == (0, 12)
    [warning] = made.err.splitlines()
    assert "the host is not reachable retry" in warning
    assert len(calls) == (3 if where in ("log_metrics", "save") else 1), (
        "each call may wait for the network, so three attempts are enough"
    )


FAILURES = {
    "sampling": (GPTMini, "generate", "a text sample failed"),
    "memory": (support.run.metrics, "memory_used_mb", "measuring memory and speed failed"),
    "peak": (support.run.metrics, "bf16_peak_flops", "measuring memory and speed failed"),
    "console": (support.run.metrics.Console, "write", "the console failed"),
    "curves": (support.run.show, "draw_loss", "drawing the curves"),
    "header": (train, "print_header", "the summary of the run failed"),
    "removing": (Path, "unlink", "removing older checkpoints failed"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_outside_training_is_only_a_warning(run, tmp_path, monkeypatch, what):
    target, name, said = FAILURES[what]
    original = getattr(target, name)

    def breaks(self=None, *args, **options):
        if what == "removing" and self.suffix != ".ckpt":
            return original(self, *args, **options)
        raise RuntimeError("this is broken")

    straight = run(tmp_path / "straight", *BYTE, *SAMPLES)
    monkeypatch.setattr(target, name, breaks)
    made = run(tmp_path / "run", *BYTE, *SAMPLES, "checkpoint.keep_last=1", pictures=True)
    assert (made.code, made.sha256) == (0, straight.sha256)
    [warning] = made.err.splitlines()
    assert said in warning and "this is broken" in warning
    assert [row["loss"] for row in made.train_rows] == [row["loss"] for row in straight.train_rows]


def test_a_broken_git_does_not_keep_a_run_from_starting(run, tmp_path, monkeypatch):
    real = subprocess.run

    def broken(command, **options):
        if command[0] == "git":
            return real(
                [sys.executable, "-c", r"import sys; sys.stdout.buffer.write(b'\xff\xfe')"], **options
            )
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", broken)
    assert run(tmp_path / "run", *BYTE, "training.max_steps=1", "training.warmup_steps=0").code == 0


def test_text_samples_are_rows_of_a_file_with_each_step_once(run, tmp_path, monkeypatch):
    folder, words = tmp_path / "run", (*SAMPLES, "training.sample_every=3")
    killed_run(run, monkeypatch, folder, *words)
    assert [json.loads(line)["step"] for line in (folder / "samples.jsonl").open()] == [3, 3, 6, 6]
    resumed = run(folder, *BYTE, *words, "--resume")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (3, 6, 9, 12) for prompt in ("The loss", "A head")
    ]
    straight = run(tmp_path / "straight", *BYTE, *words)
    assert rows == [json.loads(line) for line in (straight.folder / "samples.jsonl").open()]
    assert all(row["text"].startswith(row["prompt"]) and isinstance(row["seed"], int) for row in rows)
    assert f"sample: {rows[-1]['text']!r}" in resumed.out
    run(folder, *BYTE, "training.max_steps=1", "training.warmup_steps=0")
    assert (folder / "old-1" / "samples.jsonl").exists() and not (folder / "samples.jsonl").exists()


def test_a_damaged_metrics_file_does_not_keep_a_run_from_resuming(run, tmp_path, monkeypatch):
    killed_run(run, monkeypatch, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe{"step": 1')
    assert [row["step"] for row in run(tmp_path / "run", *BYTE, "--resume").train_rows] == list(range(1, 13))


# ---- the loss on training text -------------------------------------------------------------------


def test_train_eval_loss_is_the_plain_loss_on_training_text(run, tmp_path):
    """It is measured without dropout, always on the same micro-batches, and does not change the run. The
    witness is the cross-entropy computed here."""
    words = (*BYTE, "model.dropout=0.3")
    plain = run(tmp_path / "plain", *words)
    made = run(tmp_path / "run", *words, "training.train_eval_batches=3")
    assert made.sha256 == plain.sha256
    measured = [row["train_eval_loss"] for row in made.val_rows]
    assert len(measured) == 3 and measured == sorted(measured, reverse=True)
    assert made.val_rows[0]["train_eval_loss"] != made.train_rows[3]["loss"]
    assert read_metadata(made.folder / "final.ckpt")["metrics"]["train_eval_loss"] == measured[-1]
    assert "train_eval_loss" not in plain.val_rows[0]
    assert f"train_eval_loss {measured[-1]:.4f}" in made.out

    from data import load_corpus, make_dataloaders, pack_corpus
    from support.checkpoint import load_model
    from support.config.read import load_config

    config = load_config(made.folder / "run_config.yaml")
    net, tokenizer, _ = load_model(made.folder / "final.ckpt")
    steps = iter(
        make_dataloaders(config, pack_corpus(load_corpus(config), tokenizer, config), tokenizer, 2)[0]
    )
    batches = [batch for step in steps for batch in step.micro_batches][:3]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                net(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()
            )
            for batch in batches
        ]
    assert measured[-1] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_train_eval_loss_is_the_same_after_a_resume(run, tmp_path, monkeypatch):
    words = (*BYTE, "training.train_eval_batches=2")
    straight = run(tmp_path / "straight", *words)
    with monkeypatch.context() as patch:
        stop_before(patch, 6)
        run(tmp_path / "run", *words)
    assert run(tmp_path / "run", *words, "--resume").timeless_rows == straight.timeless_rows


def test_train_eval_loss_is_measured_on_streams_too(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some words that are long enough to fill a block or two"}\n' * 30)
    words = (*STREAM, f"data.path={rows}")
    made = run(tmp_path / "run", *BYTE, *words, "training.max_steps=4", "training.train_eval_batches=3")
    assert [math.isfinite(row["train_eval_loss"]) for row in made.val_rows] == [True]


def test_measuring_training_text_of_a_stream_does_not_move_the_stream(run, tmp_path, monkeypatch):
    """The first validation comes after the first group of documents. Training must continue from there, not
    from the start of the stream."""
    monkeypatch.setattr(data, "SHUFFLE_GROUP", 8)
    rows = tmp_path / "rows.jsonl"
    texts = [f"Document {n}: " + f"token {n % 7}, loss {n % 5}. " * 8 for n in range(60)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    words = (*BYTE, *STREAM, f"data.path={rows}", "training.max_steps=12", "training.val_every=5")
    measured = run(tmp_path / "measured", *words, "training.train_eval_batches=2")
    plain = run(tmp_path / "plain", *words)
    assert measured.sha256 == plain.sha256


def test_a_checkpoint_holds_its_perplexity(tiny_run):
    metrics = read_metadata(tiny_run.folder / "final.ckpt")["metrics"]
    assert (
        metrics["perplexity"]
        == pytest.approx(math.exp(metrics["val_loss"]))
        == tiny_run.val_rows[-1]["perplexity"]
    )
