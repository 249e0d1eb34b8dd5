"""Full disks, kills between two writes, signals: what was saved stays whole, and what could not be saved is
rescued or reported."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO
from runs import BYTE, assert_same_run, stop_before, stopped_run

import prepare
import support.checkpoint
import support.run.saving
import train
from data import leave_signals_alone
from support.checkpoint import weights_sha256
from support.files.atomic import claim_folder
from support.messages import UserError
from support.run.metrics import Console
from support.run.saving import StopOnSignal, StopRun

STEP = train.LitCausalLM.training_step


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """A run of 12 steps without any disturbance."""
    return run(tmp_path_factory.mktemp("straight") / "run", *BYTE)


def during_steps(monkeypatch, steps: range, begin, end) -> None:
    """Call `begin()` before the first of these steps (counted from 1) and `end()` before the first step after
    them."""

    def step(self, *args):
        if self.trainer.global_step + 1 == steps.start:
            begin()
        if self.trainer.global_step + 1 == steps.stop:
            end()
        return STEP(self, *args)

    monkeypatch.setattr(train.LitCausalLM, "training_step", step)


@pytest.fixture
def file_limit():
    """file_limit(n): from now on no file can grow beyond n bytes, as on a full disk. None lifts the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if n is None else n, before[1]))

    yield limit
    limit(None)


# ---- the disk ------------------------------------------------------------------------------------


def test_a_disk_full_for_a_while_costs_only_a_warning(run, tmp_path, monkeypatch, file_limit, straight):
    """In steps 4 to 7 there is no room for the checkpoint of step 4 or the rows. From step 8 there is."""
    during_steps(monkeypatch, range(4, 8), lambda: file_limit(700), lambda: file_limit(None))
    made = run(tmp_path / "run", *BYTE)
    assert_same_run(made, straight)
    assert sorted(path.name for path in made.folder.glob("step-*")) == [
        "step-0000008.ckpt",
        "step-0000012.ckpt",
    ]
    assert not list(made.folder.glob("*.tmp-*"))
    about_rows, about_checkpoint = made.err.splitlines()
    not_written = "step-0000004.ckpt could not be written (File too large)"
    assert "metrics.jsonl" in about_rows and not_written not in about_rows
    assert not_written in about_checkpoint and "metrics.jsonl" not in about_checkpoint


def test_a_disk_that_stays_full_ends_the_run_and_keeps_what_was_saved(
    run, tmp_path, monkeypatch, file_limit, straight
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    during_steps(monkeypatch, range(6, 99), lambda: file_limit(20_000), lambda: None)
    with pytest.raises(
        UserError, match=r"cannot be written \(File too large\), nor can .*\n.*make room"
    ) as error:
        run(tmp_path / "run", *BYTE)
    assert len(str(error.value).splitlines()) <= 3
    file_limit(None)
    monkeypatch.setattr(train.LitCausalLM, "training_step", STEP)
    resumed = run(tmp_path / "run", *BYTE, "--resume")
    assert "after step 4" in resumed.out
    assert_same_run(resumed, straight)


def read_only(monkeypatch, folder: Path) -> None:
    """Let no more files be written to `folder`. It is simulated, since root may write everywhere."""
    write = support.checkpoint.atomic_write

    def refused(path):
        if Path(path).parent == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return write(path)

    monkeypatch.setattr(support.checkpoint, "atomic_write", refused)


@pytest.mark.parametrize("signum", [None, signal.SIGTERM], ids=["at the end", "at a signal"])
def test_the_state_of_a_run_with_an_unwritable_folder_is_saved_elsewhere(
    run, tmp_path, monkeypatch, straight, signum
):
    folder, rescue = tmp_path / "run", tmp_path / "rescue"
    rescue.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(rescue))
    with monkeypatch.context() as patch:

        def begin():
            read_only(patch, folder)
            if signum:
                os.kill(os.getpid(), signum)

        during_steps(patch, range(6, 99), begin, lambda: None)
        with pytest.raises(UserError, match="Permission denied") as error:
            run(folder, *BYTE)
    (saved,) = rescue.rglob("*.ckpt")
    assert saved.name == ("step-0000006.ckpt" if signum else "step-0000012.ckpt")
    assert f"has been saved to {saved}" in str(error.value)
    saved.rename(folder / saved.name)  # what the message advises
    assert_same_run(run(folder, *BYTE, "--resume"), straight)


def test_a_run_ends_normally_when_its_curves_cannot_be_written(run, tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("support.run.show.draw_loss", full)
    made = run(tmp_path / "run", *BYTE, "training.max_steps=2", pictures=True)
    assert (made.code, made.out.splitlines()[-1][:14]) == (0, "weights sha256")
    assert "No space left on device" in made.err


def test_the_next_run_removes_files_that_a_kill_left_half_written(run, tmp_path):
    folder = tmp_path / "run"
    stopped_run(run, folder, *BYTE, at=3)
    (folder / "step-0000004.ckpt.tmp-123").write_bytes(b"half")
    run(folder, *BYTE, "--resume")
    assert not list(folder.glob("*.tmp-*"))


# ---- between two writes --------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [4, 12], ids=["a best checkpoint", "the last checkpoint"])
def test_a_kill_between_writing_a_checkpoint_and_naming_it_loses_neither(
    run, tmp_path, monkeypatch, straight, at
):
    def die(path, best, final, name=support.run.saving.name_checkpoint):
        if path.name == f"step-{at:07}.ckpt":
            raise Killed
        name(path, best=best, final=final)

    with monkeypatch.context() as patch:
        patch.setattr(support.run.saving, "name_checkpoint", die)
        with pytest.raises(Killed):
            run(tmp_path / "run", *BYTE)
    resumed = run(tmp_path / "run", *BYTE, "--resume")
    assert_same_run(resumed, straight)
    if at == 12:
        assert "after step" not in resumed.out
        assert (resumed.folder / "final.ckpt").samefile(resumed.folder / "step-0000012.ckpt")


def test_going_back_to_an_earlier_checkpoint_does_not_replace_best_by_a_worse_one(run, tmp_path, monkeypatch):
    """Step 8 was the best. The run resumes from step 4, in another folder, and validates at other steps."""
    losses = {4: 3.0, 8: 1.0, 12: 2.0, 5: 2.5, 10: 1.5}
    monkeypatch.setattr(
        train.LitCausalLM,
        "on_validation_epoch_end",
        lambda self: setattr(self, "val_loss", losses[self.trainer.global_step]),
    )
    stopped_run(run, tmp_path / "run", *BYTE, at=9)
    (tmp_path / "run").rename(tmp_path / "moved")
    made = run(
        tmp_path / "moved",
        *BYTE,
        "training.val_every=5",
        f"--resume={tmp_path / 'moved' / 'step-0000004.ckpt'}",
    )
    assert [row["step"] for row in made.val_rows] == [4, 5, 10, 12]
    assert made.checkpoint("best")["tiny_transformer"]["metrics"]["step"] == 8
    assert made.checkpoint("final")["tiny_transformer"]["metrics"]["best_val_loss"] == 1.0


def test_a_checkpoint_between_validations_has_the_same_metrics_after_a_resume(run, tmp_path):
    words = (*BYTE, "checkpoint.save_every=1")
    straight = run(tmp_path / "straight", *words)
    stopped_run(run, tmp_path / "stopped", *words, at=6)
    resumed = run(tmp_path / "stopped", *words, "--resume")
    for name in ("step-0000007", "step-0000010"):
        assert (
            resumed.checkpoint(name)["tiny_transformer"]["metrics"]
            == straight.checkpoint(name)["tiny_transformer"]["metrics"]
        )


# ---- signals -------------------------------------------------------------------------------------


def test_a_second_ctrl_c_during_a_save_keeps_the_checkpoint_before(run, tmp_path, monkeypatch, straight):
    def interrupted_save(checkpoint, file, save=torch.save):
        if checkpoint["global_step"] == 6:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGINT)
        save(checkpoint, file)

    with monkeypatch.context() as patch:
        patch.setattr(support.checkpoint.torch, "save", interrupted_save)
        stop_before(patch, 6, signum=signal.SIGINT)
        made = run(tmp_path / "run", *BYTE)
    assert made.code == 130
    assert "step-0000004.ckpt at step 4; resume with" in made.out
    assert sorted(path.name for path in made.folder.glob("step-*")) == ["step-0000004.ckpt"]
    assert_same_run(run(tmp_path / "run", *BYTE, "--resume"), straight)


def test_a_closed_terminal_stops_the_run_but_not_under_nohup(run, tmp_path, monkeypatch, straight):
    stopped_run(run, tmp_path / "run", *BYTE, at=5, signum=signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stop_before(monkeypatch, 7, signum=signal.SIGHUP)
        assert_same_run(run(tmp_path / "run", *BYTE, "--resume"), straight)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_output_nobody_reads_any_more_is_saved_and_stopped(run, tmp_path, monkeypatch, straight):
    """As with `train.py ... | head`: no trained step is lost."""
    show, stdout = Console.print, sys.stdout

    class ClosedPipe:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

        def flush(self):
            pass

    def closed(self, text):
        if text.startswith("step      5/"):
            sys.stdout = ClosedPipe()
        show(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "print", closed)
        made = run(tmp_path / "run", *BYTE)
    assert made.code == 143
    assert made.checkpoint("last")["tiny_transformer"]["metrics"]["step"] == 5
    assert sys.stdout is stdout
    assert_same_run(run(tmp_path / "run", *BYTE, "--resume"), straight)


def test_a_worker_killed_by_the_same_signal_is_not_an_error():
    """A data worker that has just started, and has not run our code yet, dies of a SIGTERM sent to all."""
    with pytest.raises(StopRun) as stopped, StopOnSignal() as stop:
        stop.stepping = True
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")
    assert stopped.value.code == 143
    with pytest.raises(RuntimeError, match="no signal"), StopOnSignal():
        raise RuntimeError("no signal")


def test_data_workers_survive_a_first_signal_but_not_a_second():
    """The first lets a worker finish its step. The second keeps one that waits for the network from delaying
    the end of the run."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        leave_signals_alone(0)
        os.write(writer, b"1")
        while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            time.sleep(0.001)
        os.write(writer, b"2")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(pid, signum)
    assert os.read(reader, 1) == b"2", "the worker should survive one signal of each kind"
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_a_killed_run_leaves_no_lock_even_if_its_data_workers_live_on(tmp_path):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        lock = claim_folder(tmp_path)
        worker = os.fork()  # data workers are forked like this
        if worker and lock:
            os.write(writer, str(worker).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(reader, 20))
    try:
        with pytest.raises(UserError, match="another run is writing"):
            claim_folder(tmp_path)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        claim_folder(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


# ---- file systems without locks ------------------------------------------------------------------


def refuse_locks(monkeypatch, number: int) -> None:
    def refused(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)


NO_SECOND_RUN = "so do not start a second run there"
LOCK_ERRORS = pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.EPERM], ids=errno.errorcode.get
)


@LOCK_ERRORS
def test_a_file_system_without_locks_gives_a_warning(run, tmp_path, monkeypatch, number):
    refuse_locks(monkeypatch, number)
    made = run(tmp_path / "run", *BYTE, "training.max_steps=1", "training.warmup_steps=0")
    assert made.code == 0
    assert (
        made.err
        == f"warning: {tmp_path / 'run'} cannot be locked ({os.strerror(number)}): its file system has no "
        f"locks, {NO_SECOND_RUN}\n"
    )


def test_prepare_writes_without_locks_too(tmp_path, monkeypatch, capsys):
    refuse_locks(monkeypatch, errno.ENOLCK)
    (tmp_path / "text.txt").write_text("some words\n\n" * 40)
    files = ["--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    assert prepare.main(["tokens", *files, "--tokenizer", "byte"]) == 0
    assert capsys.readouterr().err.count("cannot be locked") == 1
    assert (tmp_path / "out" / "meta.json").exists()


def test_check_reports_missing_locks_and_writes_nothing(argv_of, tmp_path, monkeypatch, capsys):
    for number in (0, errno.ENOLCK):
        if number:
            refuse_locks(monkeypatch, number)
        with pytest.raises(SystemExit):
            train.main([*argv_of(tmp_path / "run", *BYTE), "--check"])
        warning = "no locks (No locks available), so nothing stops a second run"
        assert (warning in capsys.readouterr().out) == bool(number)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_new_folder_that_cannot_be_written_is_refused_and_removed(tmp_path, monkeypatch, number):
    def refused(path, *args, **options):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(
        UserError,
        match=rf"a/b/run cannot be written \({os.strerror(number)}\); name another folder with --output PATH",
    ):
        claim_folder(tmp_path / "a" / "b" / "run", "--output ")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_continues_when_its_output_is_closed_or_on_a_full_disk(tmp_path, argv_of, straight):
    """Each run is started as a user does, in a process of its own."""
    for number, redirect in enumerate([">/dev/full 2>&1", ">&- 2>&-"]):
        folder = tmp_path / str(number)
        command = [
            "sh",
            "-c",
            f'exec "$0" "$@" {redirect}',
            sys.executable,
            "train.py",
            *argv_of(folder, *BYTE),
        ]
        env = os.environ | {"PYTHONIOENCODING": "ascii"}
        assert subprocess.run(command, cwd=REPO, env=env, capture_output=True).returncode == 0
        assert weights_sha256(folder / "final.ckpt") == straight.sha256
