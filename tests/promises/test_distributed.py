"""Several processes train like one that accumulates gradients. Killed, stopped and resumed, or resumed with
another number of processes, they end with the same result.

`launched` starts a command as a user would, and Lightning or torchrun starts the other processes. Each of
them then spends ten seconds on imports, so most runs are `forked` from this process, which has PyTorch and
Lightning loaded. They get the environment variables that a launcher sets; everything else is the same.
"""

import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Run
from processes import Group, free_port
from runs import BYTE, STREAM, assert_same_tree

import support.run.show
import train
from support.checkpoint import load_model
from support.cli import end_with_parent, guarded
from support.config.read import load_config
from support.find_checkpoints import find_latest_checkpoint
from support.messages import UserError
from support.run.plan import check_processes

WORDS = (
    *BYTE,
    "model.dropout=0.1",
    "training.max_steps=16",
    "training.schedule_steps=16",
    "training.val_every=6",
    "checkpoint.save_every=6",
)
ADAMW = "training.optimizer=adamw"
TWO = ("hardware.devices=2", "training.grad_accum_steps=1")
FSDP = (*TWO, "hardware.strategy=fsdp")
DDP = (*TWO, "hardware.strategy=ddp")


@pytest.fixture
def launched(argv_of) -> Iterator[Callable[..., Group]]:
    """launched(folder, words...) runs `python3 train.py` as a user would. `launchers` replaces the `python3`:
    one launcher's command for each machine."""
    groups: list[Group] = []

    def launch(
        folder: Path, *words: str, launchers: tuple[tuple[str, ...], ...] = ((sys.executable,),)
    ) -> Group:
        commands = [[*launcher, "train.py", *argv_of(folder, *words)] for launcher in launchers]
        groups.append(
            Group(folder, *(lambda command=command: os.execv(command[0], command) for command in commands))
        )
        return groups[-1]

    yield launch
    for group in groups:
        group.limit.cancel()
        group.kill()


@pytest.fixture
def forked(argv_of) -> Iterator[Callable[..., Group]]:
    """forked(folder, words...) forks one process for each rank, with the environment variables that Lightning
    sets for it; `env(rank)` replaces those."""
    groups: list[Group] = []

    def fork(folder: Path, *words: str, env: Callable[[int], dict] | None = None) -> Group:
        argv, port = argv_of(folder, *WORDS, *words), str(free_port())

        def rank(number: int) -> int:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= (
                env(number) if env else {"LOCAL_RANK": str(number), "NODE_RANK": "0", "WORLD_SIZE": "2"}
            )
            sys.argv = ["train.py", *argv]
            support.run.show.draw_loss = lambda folder: None  # the pictures take half the time
            return guarded(train.main, argv)

        groups.append(Group(folder, lambda: rank(0), lambda: rank(1)))
        return groups[-1]

    yield fork
    for group in groups:
        group.limit.cancel()
        group.kill()


# ---- the same training ---------------------------------------------------------------------------


def difference(one: Run, other: Run) -> float:
    """The distance between the weights of two runs, relative to their size."""
    a, b = (run.checkpoint()["state_dict"] for run in (one, other))
    assert a.keys() == b.keys()
    squared_distance = sum((a[name] - b[name]).square().sum() for name in a)
    squared_size = sum(weight.square().sum() for weight in b.values())
    return (squared_distance / squared_size).sqrt().item()


def assert_equal_except_for_rounding(one: Run, other: Run) -> None:
    assert (one.code, other.code) == (0, 0), one.err
    assert difference(one, other) < 1e-5
    assert [(row["step"], row["tokens"]) for row in one.rows] == [
        (row["step"], row["tokens"]) for row in other.rows
    ]
    for name in ("loss", "lr", "grad_norm", "val_loss"):
        ours, theirs = ([row[name] for row in run.rows if name in row] for run in (one, other))
        assert ours == pytest.approx(theirs, rel=1e-5), name
        assert len(ours) > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "words", "same_bits"),
    [
        (DDP, (ADAMW, "training.val_batches=3"), True),
        (DDP, (), True),
        (FSDP, (ADAMW, "training.val_batches=3"), False),
        (FSDP, (), False),
        (FSDP, ("training.grad_clip=null",), True),  # FSDP sums the norm of the gradient in another order
    ],
    ids=["ddp, adamw", "ddp, muon", "fsdp, adamw", "fsdp, muon", "fsdp, muon, no clipping"],
)
def test_two_processes_end_like_one_that_accumulates(run, forked, tmp_path, layout, words, same_bits):
    """Also with an odd number of validation batches: 25 of them, or 3 with a limit."""
    one = run(tmp_path / "one", *WORDS, *words)
    assert "97 blocks" in one.out
    two = forked(tmp_path / "two", *layout, *words).end()
    assert_equal_except_for_rounding(two, one)
    assert (two.sha256 == one.sha256) == same_bits
    assert two.err == ""


def test_a_saved_optimizer_numbers_parameters_in_the_order_of_the_module(tiny_run):
    """FSDP gives the n-th state to the module's n-th parameter. PyTorch numbers them by groups, which would
    give one parameter the momentum of another."""
    saved = tiny_run.checkpoint()["optimizer_states"][0]
    model = load_model(tiny_run.folder / "final.ckpt")[0]
    shapes = {i: parameter.shape for i, parameter in enumerate(model.parameters())}
    moments = {
        i: state.get("exp_avg", state.get("momentum_buffer")).shape for i, state in saved["state"].items()
    }
    assert moments == shapes
    assert sorted(i for group in saved["param_groups"] for i in group["params"]) == list(shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [(DDP, ()), (FSDP, ()), ((), DDP), ((), FSDP), (DDP, FSDP)],
    ids=["ddp, one", "fsdp, one", "one, ddp", "one, fsdp", "ddp, fsdp"],
)
def test_a_run_resumes_with_another_number_of_processes(run, forked, tmp_path, first, second):
    """The change comes in the middle, and the checkpoint there is like any other."""

    def part(folder: Path, layout: tuple[str, ...], *words: str) -> Run:
        return forked(folder, *layout, *words, ADAMW).end() if layout else run(folder, *WORDS, *words, ADAMW)

    half = part(tmp_path / "run", first, "training.max_steps=8")
    model, tokenizer, metadata = load_model(half.folder / "last.ckpt")
    assert (metadata["metrics"]["step"], tokenizer.vocab_size) == (8, 257)
    assert model(torch.tensor([[65, 66, 67]])).isfinite().all()
    whole = part(tmp_path / "run", second, "--resume")
    assert (whole.code, "after step 8" in whole.out) == (0, True), whole.err
    straight = run(tmp_path / "straight", *WORDS, ADAMW)
    assert whole.rows[-1]["step"] == 16
    rows = [
        row for row in whole.rows if "loss" in row or row["step"] != 8
    ]  # the first half validated at its end
    assert [row["step"] for row in rows] == [row["step"] for row in straight.rows]
    assert difference(whole, straight) < 1e-5


def assert_same_end(resumed: Run, straight: Run) -> None:
    """Like assert_same_run, but without the optimizer's groups, where FSDP turns tuples into lists."""
    assert (resumed.code, straight.code) == (0, 0), resumed.err + straight.err
    assert resumed.sha256 == straight.sha256
    one, other = resumed.checkpoint(), straight.checkpoint()
    assert_same_tree(one["optimizer_states"][0]["state"], other["optimizer_states"][0]["state"])
    assert one["tiny_transformer"]["metrics"] == other["tiny_transformer"]["metrics"]
    assert resumed.timeless_rows == straight.timeless_rows


# ---- killed --------------------------------------------------------------------------------------


@pytest.fixture
def uneven_stream(tmp_path) -> tuple[str, ...]:
    """Three files of 3, 14 and 41 documents."""
    import datasets  # noqa: F401 (loaded once here, not in every process)

    (tmp_path / "rows").mkdir()
    for n, size in enumerate((3, 14, 41)):
        texts = (" ".join(f"word{(i * j) % 17}" for j in range(1, 9 + i % 5)) for i in range(size))
        (tmp_path / "rows" / f"{n}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return (*STREAM, f"data.path={tmp_path}/rows/*.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "source"), [(DDP, "stream"), (FSDP, "text")], ids=["ddp, stream", "fsdp, text"]
)
def test_killed_processes_resume_to_the_same_bytes(forked, tmp_path, layout, source, uneven_stream):
    words = (*layout, *(uneven_stream if source == "stream" else ()))
    straight = forked(tmp_path / "straight", *words).end()
    group = forked(tmp_path / "run", *words).until(r"step +9/")
    assert group.signal(signal.SIGKILL).end().code == -signal.SIGKILL
    assert not (tmp_path / "run" / "final.ckpt").exists()
    resumed = forked(tmp_path / "run", *words, "--resume").end()
    assert "after step 6" in resumed.out
    assert_same_end(resumed, straight)


LONG_SCHEDULE = "training.schedule_steps=100000"
ENDLESS = (LONG_SCHEDULE, "training.max_steps=100000")  # so that the run cannot end before the signal


def assert_resumes(forked: Callable, group: Group, layout: tuple[str, ...] = DDP) -> None:
    """Two steps after a resume, the run is where an undisturbed one is."""
    path = find_latest_checkpoint(group.folder)
    words = (*layout, LONG_SCHEDULE, f"training.max_steps={load_model(path)[2]['metrics']['step'] + 2}")
    resumed = forked(group.folder, *words, "--resume").end()
    assert_same_end(resumed, forked(group.folder.with_name("straight"), *words).end())


def assert_stopped(group: Group, ended: Run, signum: int) -> None:
    """The main process reports the stop once, and its exit status names the signal."""
    assert ended.code == 128 + signum, ended.err
    assert len(re.findall(r"^stopped; saved .*; resume with: python3 train.py ", ended.out, re.M)) == 1
    assert " ".join(ended.err.split()) == "stopping after this step; once more to stop at once"
    assert not (group.folder / "final.ckpt").exists()


@pytest.mark.slow
def test_processes_started_by_lightning_can_be_killed_resumed_and_stopped(launched, forked, tmp_path):
    """Started as a user does. Only the main process gets the signal."""
    group = launched(tmp_path / "run", *WORDS, *DDP, *ENDLESS).until(r"step +8/")
    assert len(group.children()) == 1
    ended = group.signal(signal.SIGKILL).end()
    assert (ended.code, ended.err) == (-signal.SIGKILL, "")
    group = launched(tmp_path / "run", *WORDS, *DDP, *ENDLESS, "--resume").until(r"step +\d+/")
    assert "after step" in group.said
    assert_stopped(group, group.signal(signal.SIGTERM, *group.pids).end(), signal.SIGTERM)
    assert_resumes(forked, group)


def assert_reports_a_lost_process(err: str, beginning: str) -> None:
    lines = err.splitlines()
    assert lines[0].startswith(f"{beginning}: the connection to another process of this run is lost"), err
    assert re.search(r"resume with: python3 \S*train\.py", lines[-1])
    assert len(lines) == 3


@pytest.mark.slow
def test_the_main_process_reports_a_lost_process_and_ends(launched, forked, tmp_path):
    group = launched(tmp_path / "run", *WORDS, *DDP, *ENDLESS).until(r"step +8/")
    ended = group.signal(signal.SIGKILL, *group.children()).end()
    assert ended.code in (2, -signal.SIGKILL), (
        "Lightning checks every five seconds and kills processes that have not ended by then"
    )
    assert_reports_a_lost_process(ended.err, "error")
    assert_resumes(forked, group)


@pytest.mark.slow
def test_a_process_reports_a_lost_main_process_and_ends(forked, tmp_path):
    group = forked(tmp_path / "run", *DDP, *ENDLESS).until(r"step +8/")
    ended = group.signal(signal.SIGKILL, group.pids[0]).end()
    assert group.codes == [-signal.SIGKILL, 2]
    assert_reports_a_lost_process(ended.err, "warning: from another process")
    assert_resumes(forked, group)


def test_a_process_ends_when_its_parent_is_gone(tmp_path):
    """Otherwise it would wait half an hour for a main process that was killed."""
    read, write = os.pipe()
    starter = os.fork()
    if not starter:
        if not os.fork():
            os.dup2(write, 2)
            end_with_parent(grace=0.0)
            os.write(write, b"started\n")
            signal.pause()
        signal.pause()
    os.close(write)
    with open(read) as said:
        assert said.readline() == "started\n"
        os.kill(starter, signal.SIGKILL)
        os.waitpid(starter, 0)
        assert said.read() == "error: the process that started this one is gone; it ends too\n"


# ---- stopped -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "signum"), [(DDP, signal.SIGINT), (FSDP, signal.SIGTERM)], ids=["ddp, Ctrl-C", "fsdp, SIGTERM"]
)
def test_a_signal_to_all_processes_stops_them_after_the_same_step(forked, tmp_path, layout, signum):
    group = forked(tmp_path / "run", *layout, *ENDLESS).until(r"step +8/").signal(signum)
    assert_stopped(group, group.end(), signum)
    assert group.codes == [128 + signum, 0], (
        "Lightning kills the main process when another process ends with a status other than 0"
    )
    assert_resumes(forked, group, layout)


@pytest.mark.slow
def test_an_error_in_all_processes_is_reported_once(forked, tmp_path, monkeypatch):
    """Each process finds it, in the middle of training."""
    step = train.LitCausalLM.training_step

    def third_is_bad(self, *args):
        if self.trainer.global_step == 2:
            self.net.norm.weight.data *= math.nan
        return step(self, *args)

    monkeypatch.setattr(train.LitCausalLM, "training_step", third_is_bad)
    group = forked(tmp_path / "run", *DDP)
    ended = group.end()
    assert "step      2/16" in ended.out
    assert group.codes == [2, 2]
    assert ended.err.startswith("error: step 3: loss=nan")
    assert len(ended.err.splitlines()) == 3


# ---- other launchers -----------------------------------------------------------------------------


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_gives_the_same_run(launched, forked, tmp_path, machines):
    """With the commands of the README. Two machines are two agents on this one."""
    straight = forked(tmp_path / "straight", *DDP).end()
    devices, place = 2 // machines, ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    commands = tuple(
        (*TORCHRUN, "--nnodes", str(machines), "--nproc-per-node", str(devices), *place)
        for _ in range(machines)
    )
    words = (*DDP, f"hardware.devices={devices}", f"hardware.num_nodes={machines}")
    group = launched(tmp_path / "run", *WORDS, *words, launchers=commands)
    ended = group.end()
    assert set(group.codes) == {0}, ended.err
    assert re.findall("weights sha256 (.*)", ended.out) == [straight.sha256]
    assert ended.timeless_rows == straight.timeless_rows


@pytest.mark.slow
def test_slurm_gives_the_same_run_and_resuming_a_finished_one_says_so_once(forked, tmp_path):
    def task(rank: int) -> dict[str, str]:
        job = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NODELIST": "127.0.0.1",
        }
        return {**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}

    straight = forked(tmp_path / "straight", *DDP).end()
    made = forked(tmp_path / "run", *DDP, env=task).end()
    assert (made.code, made.sha256, made.timeless_rows) == (0, straight.sha256, straight.timeless_rows), (
        made.err
    )
    again = forked(tmp_path / "run", *DDP, "--resume", env=task).end()
    assert (again.code, len(again.out.splitlines()), "nothing left to do" in again.out) == (0, 1, True)


def test_starting_another_number_of_processes_than_configured_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("support.run.plan.is_main_process", lambda: True)
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError,
        match=r"4 processes have been started, and the config asks for 2 \(hardware.devices=2 x "
        r"hardware.num_nodes=1\)",
    ):
        run(tmp_path / "run", *WORDS, *DDP)
    assert not (tmp_path / "run").exists()


def test_more_devices_than_the_machine_has_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = load_config("config_smoke.yaml", ["hardware.devices=8"])
    with pytest.raises(UserError, match=r"hardware.devices=8, and this machine has 1 \(cuda\)"):
        check_processes(config, "cuda")
    check_processes(config, "cpu")
