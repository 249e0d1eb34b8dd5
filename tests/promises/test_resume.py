"""Resuming is exact: a stopped and resumed run ends with the same bits as one that never stopped."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from runs import BYTE, STREAM, assert_same_run, start_until_first_row, stop_before, stopped_run

import train
from support.checkpoint import load_model
from support.find_checkpoints import find_latest_checkpoint
from support.messages import UserError
from support.run.metrics import TextSamples
from support.run.saving import CheckpointSaver

NOTHING_LEFT = "nothing left to do"


@pytest.fixture
def small_text(tmp_path) -> str:
    """A text of about 28 blocks of 32 bytes: an epoch is a little more than two steps of 12 blocks."""
    path = tmp_path / "small.txt"
    path.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(1000)))
    return f"data.path={path}"


DROPOUT = ("model.dropout=0.1", "training.grad_accum_steps=3", *BYTE)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("at", [3, 8], ids=["between-validations", "in-a-validating-step"])
def test_resume_with_dropout_and_accumulation_is_exact(run, tmp_path, optimizer, at, small_text):
    """Across epochs too: 12 steps of 12 blocks read the small text five times."""
    words = (*DROPOUT, small_text, f"training.optimizer={optimizer}")
    straight = run(tmp_path / "straight", *words)
    folder = tmp_path / "stopped"
    stopped_run(run, folder, *words, at=at)
    resumed = run(folder, *words, "--resume")
    assert f"after step {at}" in resumed.out
    assert_same_run(resumed, straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "optimizer", "precision", "workers"),
    list(product([1, 2, 4, 5, 7, 11], ["adamw", "muon"], ["32-true", "bf16-mixed"], [0, 2])),
    ids=lambda value: str(value),
)
def test_resume_is_exact_after_a_stop_at_any_step(
    run, tmp_path, small_text, at, optimizer, precision, workers
):
    words = (*DROPOUT, small_text, f"training.optimizer={optimizer}", f"hardware.precision={precision}")
    straight = run(tmp_path / "straight", *words)
    stopped_run(run, tmp_path / "stopped", *words, at=at)
    assert_same_run(
        run(tmp_path / "stopped", *words, f"hardware.num_workers={workers}", "--resume"), straight
    )


def test_resuming_twice_with_another_number_of_workers_is_exact(run, tmp_path):
    words = ("model.dropout=0.1",)
    straight = run(tmp_path / "straight", *words)
    folder = tmp_path / "stopped"
    stopped_run(run, folder, *words, at=3)
    stopped_run(run, folder, *words, "hardware.num_workers=2", "--resume", at=7)
    assert_same_run(run(folder, *words, "--resume"), straight)


def test_resuming_a_stream_is_exact(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w") as file:
        for i in range(40):
            file.write(json.dumps({"text": " ".join(f"word{(i * j) % 17}" for j in range(1, 30))}) + "\n")
    words = (*BYTE, *STREAM, f"data.path={rows}")
    straight = run(tmp_path / "straight", *words, "model.dropout=0.1")
    stopped_run(run, tmp_path / "stopped", *words, "model.dropout=0.1", at=6)
    assert_same_run(
        run(tmp_path / "stopped", *words, "model.dropout=0.1", "hardware.num_workers=1", "--resume"), straight
    )


def test_an_extended_run_with_the_same_schedule_equals_a_straight_one(run, tmp_path):
    words = (*BYTE, "training.schedule_steps=20", "model.dropout=0.1")
    straight = run(tmp_path / "straight", *words, "training.max_steps=20")
    folder = tmp_path / "longer"
    run(folder, *words, "training.max_steps=8")
    longer = run(folder, *words, "training.max_steps=20", "--resume")
    assert longer.rows[0]["step"] == 1
    assert_same_run(longer, straight)


def test_a_new_val_every_on_resume_decides_which_steps_validate(run, tmp_path):
    folder = tmp_path / "run"
    stopped_run(run, folder, *BYTE, at=6)
    resumed = run(folder, *BYTE, "training.val_every=5", "--resume")
    assert [row["step"] for row in resumed.val_rows] == [4, 10, 12]


def test_splitting_a_step_differently_on_resume_changes_only_rounding(run, tmp_path):
    words = (*BYTE, "training.optimizer=adamw", "training.lr=0.003")
    straight = run(tmp_path / "straight", *words)
    folder = tmp_path / "resplit"
    stopped_run(run, folder, *words, at=5)
    resplit = run(folder, *words, "training.micro_batch_size=2", "training.grad_accum_steps=4", "--resume")
    assert [row["loss"] for row in resplit.train_rows] == pytest.approx(
        [row["loss"] for row in straight.train_rows], rel=1e-4
    )


# ---- signals -------------------------------------------------------------------------------------


def test_a_stopped_run_leaves_its_curves_and_the_command_to_resume(run, tmp_path):
    made = stopped_run(run, tmp_path / "run", *BYTE, at=3, pictures=True)
    assert re.match(
        rf"stopped; saved {made.folder}/\S+\.ckpt.*; resume with: python3 ", made.out.splitlines()[-1]
    )
    assert {"last.ckpt", "step-0000003.ckpt", "loss.svg", "loss.png"} <= {
        path.name for path in made.folder.iterdir()
    }
    assert not (made.folder / "final.ckpt").exists()


@pytest.fixture
def usual_handlers():
    """The signal handlers of a new Python process, set for this test."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield usual
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(
    "words", [(), ("training.max_steps=0", "training.warmup_steps=0")], ids=["trained", "nothing to train"]
)
def test_a_run_restores_the_signal_handlers(run, tmp_path, usual_handlers, words):
    run(tmp_path / "run", *BYTE, "training.max_steps=2", *words)
    assert {signum: signal.getsignal(signum) for signum in usual_handlers} == usual_handlers


def test_ctrl_c_in_this_process_exits_130_and_restores_the_signal_handlers(run, tmp_path, usual_handlers):
    stopped_run(run, tmp_path / "run", *BYTE, at=3, signum=signal.SIGINT)
    assert {signum: signal.getsignal(signum) for signum in usual_handlers} == usual_handlers


def test_a_signal_between_two_steps_loses_nothing(run, tmp_path, monkeypatch):
    """It arrives after the checkpoint saver has seen step 5, here while text samples are written."""
    show = TextSamples.on_train_batch_end

    def stop(self, trainer, *args):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return show(self, trainer, *args)

    monkeypatch.setattr(TextSamples, "on_train_batch_end", stop)
    samples = (*BYTE, "training.sample_every=100", "training.sample_prompts=[A]")
    made = run(tmp_path / "run", *samples)
    assert made.code == 143
    saved = made.checkpoint("last")["tiny_transformer"]["metrics"]["step"]
    assert saved == made.train_rows[-1]["step"] >= 5


def test_after_a_signal_before_the_first_step_no_missing_checkpoint_is_named(run, tmp_path, monkeypatch):
    start = CheckpointSaver.on_train_start

    def stop(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(self, *args)

    monkeypatch.setattr(CheckpointSaver, "on_train_start", stop)
    made = run(tmp_path / "run", *BYTE)
    assert made.code == 143
    assert ("resume with" in made.out) == (made.folder / "last.ckpt").exists()


def test_a_signal_in_the_last_step_lets_the_run_finish(run, tmp_path, monkeypatch):
    stop_before(monkeypatch, 12)
    made = run(tmp_path / "run", *BYTE)
    assert made.code == 0
    assert made.out.splitlines()[-1].startswith("weights sha256")


COMMANDS_TO_START = {
    "plain": lambda argv, last: argv,
    "fresh": lambda argv, last: ["--fresh", *argv],
    "resumed from a file": lambda argv, last: [*argv[:2], "--resume", last, *argv[2:]],
    "resumed from a file alone": lambda argv, last: ["--resume", last],
}


@pytest.mark.parametrize("how", COMMANDS_TO_START)
def test_the_command_to_resume_works_when_pasted(run, tmp_path, argv_of, monkeypatch, capsys, how):
    """However the stopped run was started; its folder's name has a space in it."""
    folder = tmp_path / "my run"
    if how != "plain":
        stopped_run(run, folder, *BYTE, at=2)
    argv = COMMANDS_TO_START[how](argv_of(folder, *BYTE), str(folder / "last.ckpt"))
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    monkeypatch.setattr("support.run.show.draw_loss", lambda folder: None)
    with monkeypatch.context() as patch:
        stop_before(patch, 5)
        assert train.main(argv) == 143
    said = capsys.readouterr().out.splitlines()[-1]
    python, script, *words = shlex.split(said.split("resume with: ")[1])
    assert (python, script) == ("python3", "train.py")
    assert train.main(words) == 0
    assert "after step 5" in capsys.readouterr().out
    rows = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(rows) == 12


def test_ctrl_c_in_a_real_process_exits_130_and_the_run_can_be_resumed(run, tmp_path, argv_of):
    """The signal is sent to train.py, started as a user does, once it has shown its first row."""
    words = (*BYTE, "training.schedule_steps=1000000", "training.max_steps=1000000")
    process = start_until_first_row(argv_of(tmp_path / "run", *words))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "resume with: python3 train.py " in out.splitlines()[-1]
    stopped_at = load_model(tmp_path / "run" / "last.ckpt")[2]["metrics"]["step"]
    resumed = run(
        tmp_path / "run",
        *BYTE,
        "training.schedule_steps=1000000",
        f"training.max_steps={stopped_at + 1}",
        "--resume",
    )
    assert [row["step"] for row in resumed.train_rows] == list(range(1, stopped_at + 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "status"),
    [([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)],
    ids=["SIGTERM", "Ctrl-C twice"],
)
def test_signals_to_a_real_process_give_its_exit_status_without_a_traceback(
    tmp_path, argv_of, signals, status
):
    words = (*BYTE, "training.schedule_steps=1000000", "training.max_steps=1000000")
    process = start_until_first_row(argv_of(tmp_path / "run", *words))
    for signum in signals:
        process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in err) == (status, False)


# This process is killed while it writes the checkpoint of step 8: half of the file is on disk, under its
# temporary name.
KILLED_WHILE_SAVING = """
import os, signal, sys, torch
import support.checkpoint, train

def half(checkpoint, file, save=torch.save):
    if checkpoint["global_step"] < 8:
        return save(checkpoint, file)
    file.write(b"PK" + bytes(1000))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

support.checkpoint.torch.save = half
train.main(sys.argv[1:])
"""


def test_resume_after_a_kill_in_the_middle_of_a_checkpoint_is_exact(run, tmp_path, argv_of):
    folder = tmp_path / "killed"
    words = ("model.dropout=0.1",)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, *argv_of(folder, *words)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with open(folder / "metrics.jsonl") as file:
        assert [line for line in file if '"step": 8' in line]  # the row was written before its checkpoint
    kept = sorted(path.name for path in folder.glob("*.ckpt"))
    assert kept == ["best.ckpt", "last.ckpt", "step-0000004.ckpt"]
    with pytest.raises(UserError, match="unfinished run"):
        run(folder, *words)
    resumed = run(folder, *words, "--resume")
    assert "after step 4" in resumed.out
    assert_same_run(resumed, run(tmp_path / "straight", *words))


def test_resume_drops_rows_after_the_checkpoint_and_a_line_cut_off(run, tmp_path):
    straight = run(tmp_path / "straight", *BYTE)
    folder = tmp_path / "run"
    stopped_run(run, folder, *BYTE, at=6)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert run(folder, *BYTE, "--resume").timeless_rows == straight.timeless_rows


# ---- what may change, and what is refused --------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(run, tmp_path_factory) -> Path:
    """The folder of a run stopped after step 3; copy it before writing."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    return stopped_run(run, folder, *BYTE, at=3).folder


@pytest.mark.parametrize(
    ("override", "key", "before", "now"),
    [
        ("training.lr=0.5", "training.lr", "0.01", "0.5"),
        ("training.optimizer=adamw", "training.optimizer", "'muon'", "'adamw'"),
        ("model.dropout=0.3", "model.dropout", "0.0", "0.3"),
        ("model.d_model=64", "model.d_model", "32", "64"),
        ("data.stride=16", "data.stride", "None", "16"),
        ("data.shuffle=false", "data.shuffle", "True", "False"),
        ("tokenizer.kind=char", "tokenizer.kind", "'byte'", "'char'"),
        ("seed=7", "seed", "42", "7"),
        ("training.grad_clip=null", "training.grad_clip", "1.0", "None"),
    ],
)
def test_resume_with_another_config_is_refused_naming_the_key_and_both_values(
    run, stopped, override, key, before, now
):
    contents = {path: path.stat().st_mtime_ns for path in stopped.iterdir()}
    with pytest.raises(UserError, match="cannot resume") as error:
        run(stopped, *BYTE, override, "--resume")
    assert f"{key} was {before} and is now {now}" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert {path: path.stat().st_mtime_ns for path in stopped.iterdir()} == contents


def test_keys_for_length_places_and_display_may_change_on_resume(run, stopped, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    moved_text = tmp_path / "text.txt"
    shutil.copyfile("data/tiny_corpus.txt", moved_text)
    changed = (
        f"data.path={moved_text}",
        "training.max_steps=5",
        "training.val_every=2",
        "training.val_batches=1",
        "training.log_every=2",
        "training.sample_every=4",
        "training.sample_prompts=[A]",
        "training.micro_batch_size=8",
        "training.grad_accum_steps=1",
        "model.gradient_checkpointing=true",
        "hardware.num_workers=1",
        "checkpoint.save_every=1",
        "checkpoint.keep_last=1",
    )
    resumed = run(folder, *BYTE, *changed, "--resume")
    assert resumed.checkpoint()["tiny_transformer"]["metrics"]["step"] == 5


def test_resume_with_another_step_size_is_refused(run, stopped):
    with pytest.raises(UserError, match=r"8 sequences and would now have 12.*keep the product"):
        run(stopped, *BYTE, "training.grad_accum_steps=3", "--resume")


def test_resume_with_a_changed_text_is_refused(run, stopped, tmp_path):
    text = Path("data/tiny_corpus.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("computer", "compuper", 1))
    with pytest.raises(UserError, match="training text has changed"):
        run(stopped, *BYTE, f"data.path={tmp_path / 'text.txt'}", "--resume")


def test_resume_without_a_run_is_an_error(run, tmp_path):
    with pytest.raises(UserError, match="nothing to resume: no run in"):
        run(tmp_path / "nowhere", *BYTE, "--resume")
    assert not (tmp_path / "nowhere").exists()


def test_resuming_a_finished_run_says_that_nothing_is_left(run, tiny_run):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.folder.iterdir()}
    made = run(tiny_run.folder, "--resume")
    assert (made.code, NOTHING_LEFT in made.out, len(made.out.splitlines())) == (0, True, 1)
    assert {path: path.stat().st_mtime_ns for path in tiny_run.folder.iterdir()} == before


def test_resume_and_fresh_together_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--resume", "--fresh")
    assert stop.value.code == 2


def test_a_checkpoint_file_alone_is_enough_to_resume(run, tmp_path, monkeypatch, capsys):
    """The config stored in it is used, and the run continues in the folder named there."""
    folder = tmp_path / "run"
    straight = run(tmp_path / "straight", *BYTE)
    stopped_run(run, folder, *BYTE, at=6)
    monkeypatch.setattr("support.run.show.draw_loss", lambda folder: None)
    assert train.main(["--resume", str(folder / "step-0000004.ckpt")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"weights sha256 {straight.sha256}"


def test_resume_from_a_file_never_writes_into_another_unfinished_run(run, stopped, tmp_path):
    """The config names a folder with another run than the one the file belongs to."""
    other = tmp_path / "other"
    stopped_run(run, other, *BYTE, "seed=7", at=2)
    metrics = (other / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"checkpoint\.dir="):
        run(other, *BYTE, f"--resume={stopped / 'last.ckpt'}")
    assert (other / "metrics.jsonl").read_text() == metrics


def test_the_latest_checkpoint_is_found_and_damaged_ones_give_a_warning(tiny_run, tmp_path, capsys):
    assert find_latest_checkpoint(tmp_path) is None
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.folder, folder)
    assert find_latest_checkpoint(folder).name == "step-0000012.ckpt"
    for name in ("step-0000012", "last", "final", "best"):
        (folder / f"{name}.ckpt").write_bytes((folder / f"{name}.ckpt").read_bytes()[:-1000])
    (folder / "step-0000100.ckpt").write_bytes(b"")
    (folder / "step-newest.ckpt").write_bytes(b"not one of ours")
    assert find_latest_checkpoint(folder).name == "step-0000008.ckpt"
    warnings = capsys.readouterr().err.splitlines()
    assert [line.startswith("warning: ") and "skipped" in line for line in warnings] == [True, True]
    assert "step-0000100.ckpt" in warnings[0]
    assert "step-0000012.ckpt" in warnings[1]


def test_a_run_resumes_from_the_newest_whole_checkpoint(run, tmp_path):
    straight = run(tmp_path / "straight", *BYTE)
    folder = tmp_path / "run"
    stopped_run(run, folder, *BYTE, at=7)
    damaged = folder / "step-0000007.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:5000])  # last.ckpt is the same file, and damaged too
    resumed = run(folder, *BYTE, "--resume")
    assert "after step 4" in resumed.out
    assert "step-0000007.ckpt" in resumed.err
    assert_same_run(resumed, straight)
