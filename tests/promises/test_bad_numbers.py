"""NaNs, zero gradients and a lack of memory stop a run with an explanation, and never reach a checkpoint."""

import errno
import math
import os
from types import SimpleNamespace

import pytest
import torch
from runs import BYTE, STREAM, stopped_run

import train
from model import GPTMini
from support.checkpoint import load_model
from support.config.read import load_config
from support.messages import UserError
from support.run.guards import explain

STEP = train.LitCausalLM.training_step


def test_weights_that_overflow_in_a_step_are_not_saved(run, tmp_path, monkeypatch):
    """The loss and the gradient of step 3 are finite, but the updated weights are too large for float32."""

    def overflows(self, *args):
        STEP(self, *args)
        if self.trainer.global_step == 3:
            self.net.norm.weight.data *= 1e39

    monkeypatch.setattr(train.LitCausalLM, "training_step", overflows)
    with pytest.raises(
        UserError, match=r"step 3: weights\.norm\.weight is no longer finite.*\n.*step-0000002\.ckpt"
    ):
        run(tmp_path / "run", *BYTE, "checkpoint.save_every=1")
    assert load_model(tmp_path / "run" / "last.ckpt")[2]["metrics"]["step"] == 2


def test_a_nan_validation_loss_stops_the_run(run, tmp_path, monkeypatch):
    validate = train.LitCausalLM.validation_step

    def broken(self, *args):
        validate(self, *args)
        if self.trainer.global_step == 8:
            self.val_sums *= math.nan

    monkeypatch.setattr(train.LitCausalLM, "validation_step", broken)
    with pytest.raises(
        UserError, match=r"step 8: val_loss=nan.*\n.*last good checkpoint: .*step-0000004\.ckpt"
    ):
        run(tmp_path / "run", *BYTE)
    assert load_model(tmp_path / "run" / "last.ckpt")[2]["metrics"]["step"] == 4
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def without_gradient(net):
    """Break the network as a wrong compiler would: the loss is right, but every gradient is zero."""
    forward = net.forward
    net.forward = lambda **batch: [
        part + 0 * net.norm.weight.sum() for part in torch.no_grad()(forward)(**batch)
    ]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ((), "model.zero_init=false"),
        (("training.compile=true",), "training.compile=false"),
        (("training.freeze=[layers]",), "freeze less"),
    ],
    ids=["plain", "compiled", "frozen"],
)
def test_a_run_that_cannot_learn_stops_before_its_first_step(run, tmp_path, monkeypatch, words, advice):
    monkeypatch.setattr("support.run.compiling.try_compiler", lambda device: None)
    monkeypatch.setattr(GPTMini, "compile", lambda self: None)

    def without_any_gradient(self, *args):
        without_gradient(self.net)
        return STEP(self, *args)

    monkeypatch.setattr(train.LitCausalLM, "training_step", without_any_gradient)
    with pytest.raises(
        UserError, match=rf"step 1: every gradient is zero while the loss is 5\.\d+.*\n.*{advice}"
    ):
        run(tmp_path / "run", *BYTE, *words)
    assert not list((tmp_path / "run").glob("*.ckpt"))


def test_a_step_without_targets_has_no_gradient_and_training_continues(run, tmp_path, monkeypatch):
    def masked(self, step, index):
        if self.trainer.global_step in (0, 3):
            for batch in step.micro_batches:
                batch["labels"][:] = -100
        return STEP(self, step, index)

    monkeypatch.setattr(train.LitCausalLM, "training_step", masked)
    made = run(tmp_path / "run", *BYTE, "training.max_steps=5")
    assert [row["grad_norm"] == 0 for row in made.train_rows] == [True, False, False, True, False]


@pytest.mark.parametrize("source", ["text", "stream"])
def test_an_error_about_bad_numbers_names_the_samples(run, tmp_path, monkeypatch, source):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some words that are long enough to fill a block or two"}\n' * 30)
    words = (*BYTE, *STREAM, f"data.path={rows}")

    def third_is_bad(self, *args):
        if self.trainer.global_step == 2:
            monkeypatch.setattr(
                self.net,
                "forward",
                lambda **batch: (self.net.embed_tokens.weight.sum() * math.nan, torch.tensor(1)),
            )
        return STEP(self, *args)

    monkeypatch.setattr(train.LitCausalLM, "training_step", third_is_bad)
    expected = (
        r"on a stream, before document \d+ of group 0 in epoch \d+"
        if source == "stream"
        else r"on samples 16 to 23 \(blocks (\d+, ){7}\d+\)"
    )
    with pytest.raises(UserError, match=expected):
        run(tmp_path / "run", *(words if source == "stream" else BYTE))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 9 bytes"
            ),
            "halve training",
        ),
        (MemoryError(), "halve training"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "num_workers=0"),
    ],
    ids=["cpu", "python", "worker"],
)
def test_running_out_of_memory_is_explained(run, tmp_path, monkeypatch, error, advice):
    def full(self, *args):
        if self.trainer.global_step == 5:
            raise error
        return STEP(self, *args)

    monkeypatch.setattr(train.LitCausalLM, "training_step", full)
    with pytest.raises(UserError, match=advice) as said:
        run(tmp_path / "run", *BYTE)
    assert "step-0000004.ckpt" in str(said.value)


@pytest.mark.parametrize("workers", [2, 0])
def test_running_out_of_shared_memory_is_explained(tiny_run, workers):
    """If data workers cannot be started, the system only says that no space is left. Without workers the
    same error has another cause."""
    config = load_config(tiny_run.folder / "run_config.yaml", [f"hardware.num_workers={workers}"])
    plan = SimpleNamespace(
        compiles=False,
        config=config,
        folder=tiny_run.folder,
        world=1,
        device="cpu",
        command="python3 train.py",
    )
    error = RuntimeError("cannot start")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = explain(error, plan)
    assert (said is not None and "hardware.num_workers=0" in str(said) and "--shm-size" in str(said)) == bool(
        workers
    )


@pytest.mark.parametrize("part", ["state_dict", "optimizer_states"])
def test_resuming_from_a_checkpoint_with_nan_is_refused(run, tmp_path, part):
    made = stopped_run(run, tmp_path / "run", *BYTE, at=6)
    checkpoint, path = made.checkpoint("last"), made.folder / "step-0000006.ckpt"
    if part == "state_dict":
        tensors, said = checkpoint["state_dict"], "weights"
    else:
        tensors, said = checkpoint["optimizer_states"][0]["state"][0], "optimizer"
    first = next(tensor for tensor in tensors.values() if tensor.is_floating_point() and tensor.dim())
    first.view(-1)[3] = math.nan
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=rf"step-0000006\.ckpt: {said}.* holds a NaN.*--resume CKPT"):
        run(tmp_path / "run", *BYTE, "--resume")
    assert run(tmp_path / "run", *BYTE, f"--resume={made.folder / 'step-0000004.ckpt'}").code == 0


def nan_loss(forward):
    def broken(self, input_ids, labels=None, **kwargs):
        loss_sum, n_targets = forward(self, input_ids, labels, **kwargs)
        return loss_sum * float("nan"), n_targets

    return broken


def infinite_gradient(forward):
    def broken(self, input_ids, labels=None, **kwargs):
        loss_sum, n_targets = forward(self, input_ids, labels, **kwargs)
        loss_sum.register_hook(lambda gradient: gradient * float("inf"))
        return loss_sum, n_targets

    return broken


@pytest.mark.parametrize("damage", [nan_loss, infinite_gradient])
def test_bad_numbers_stop_the_run_and_never_reach_a_checkpoint(run, tmp_path, monkeypatch, damage):
    forward = GPTMini.forward
    step = train.LitCausalLM.training_step

    def third_is_bad(self, *args):
        monkeypatch.setattr(GPTMini, "forward", damage(forward) if self.trainer.global_step == 2 else forward)
        return step(self, *args)

    monkeypatch.setattr(train.LitCausalLM, "training_step", third_is_bad)
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", "tokenizer.kind=byte", "checkpoint.save_every=1")
    message = str(error.value)
    assert message.startswith("step 3: ")
    for advice in (
        "training.lr",
        "training.warmup_steps",
        "grad_clip",
        "hardware.precision",
        "--show-step 3",
        "step-0000002.ckpt",
    ):
        assert advice in message
    assert len(message.splitlines()) <= 3
    model, _, metadata = load_model(tmp_path / "run" / "last.ckpt")
    assert metadata["metrics"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert '"step": 3' not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_out_of_memory_says_what_to_lower(run, tmp_path, monkeypatch):
    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")

    monkeypatch.setattr(train.LitCausalLM, "training_step", full)
    with pytest.raises(
        UserError,
        match=r"micro_batch_size \(now 4\)(.|\n)*grad_accum_steps \(now 2\)(.|\n)*gradient_checkpointing",
    ):
        run(tmp_path / "run", *BYTE)
