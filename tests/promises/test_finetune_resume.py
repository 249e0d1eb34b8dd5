"""Fine-tuning resumes exactly, and on two processes it trains like on one."""

import contextlib
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from finetuning import LORA, rows, same_weights, weights_of

import finetune
from support.checkpoint import KEY
from support.messages import UserError

KINDS = pytest.mark.parametrize(
    "words",
    [
        (),
        LORA,
        ("training.freeze=[embed_tokens]",),
        (*LORA, "data.packing=true"),
        ("training.optimizer=muon",),
    ],
    ids=["full", "lora", "frozen", "lora, packed", "muon"],
)


@KINDS
def test_a_resumed_run_ends_with_the_same_bits(sft, tmp_path, words):
    words = (*words, "model.dropout=0.1")
    whole = sft(tmp_path / "whole", *words)
    stopped = sft(tmp_path / "cut", *words, "training.max_steps=3")
    assert stopped.sha256 != whole.sha256
    resumed = sft(tmp_path / "cut", *words, "--resume")
    assert resumed.sha256 == whole.sha256
    assert resumed.timeless_rows == whole.timeless_rows
    assert same_weights(
        weights_of(tmp_path / "cut" / "final.ckpt"), weights_of(tmp_path / "whole" / "final.ckpt")
    )
    best = [run.checkpoint("best")[KEY]["metrics"] for run in (whole, resumed)]
    assert best[0] == best[1]


def test_a_run_resumes_without_its_base(sft, tiny_run, tmp_path):
    """The checkpoint holds everything, so the config stored in it is enough."""
    shutil.copy(tiny_run.folder / "final.ckpt", tmp_path / "base.ckpt")
    words = (*LORA, f"base_ckpt={tmp_path / 'base.ckpt'}")
    whole = sft(tmp_path / "whole", *words)
    sft(tmp_path / "cut", *words, "training.max_steps=3")
    (tmp_path / "base.ckpt").unlink()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        resume = ["--resume", str(tmp_path / "cut" / "last.ckpt"), "--device", "cpu"]
        assert finetune.main([*resume, "--override", "training.max_steps=6"]) == 0
    assert out.getvalue().splitlines()[-1] == whole.out.splitlines()[-1]


def test_a_base_that_would_be_moved_aside_is_refused(sft, tmp_path):
    """Fine-tuning writes into the folder that holds its base."""
    first = sft(tmp_path / "sft", "training.max_steps=1")
    files = sorted(path.name for path in first.folder.iterdir())
    for name in ("final", "step-0000001"):
        with pytest.raises(
            UserError,
            match=r"is in checkpoint.dir, whose run this one would move aside; write elsewhere with .*sft-2",
        ):
            sft(tmp_path / "sft", f"base_ckpt={first.folder / name}.ckpt")
    assert sorted(path.name for path in first.folder.iterdir()) == files


def test_a_disk_that_is_full_during_the_merge_loses_nothing(sft, tmp_path, monkeypatch):
    """The step file is saved, but the plain model does not fit. That is a warning, and --resume writes the
    model once there is room."""
    whole = sft(tmp_path / "whole", *LORA)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("support.run.saving.write_merged", full)
        made = sft(tmp_path / "full", *LORA)
    assert made.code == 0
    assert "final.ckpt could not be written" in made.err
    assert "run the same command with --resume" in made.out
    assert not (made.folder / "final.ckpt").exists() and (made.folder / "last.ckpt").exists()
    assert sft(tmp_path / "full", *LORA, "--resume").sha256 == whole.sha256


def test_resuming_from_the_merged_file_is_refused(sft, tmp_path):
    sft(tmp_path, *LORA)
    with pytest.raises(UserError, match="holds a model but no run to resume"):
        sft(tmp_path, *LORA, "training.max_steps=9", f"--resume={tmp_path / 'final.ckpt'}")
    assert "nothing left to do" in sft(tmp_path, *LORA, "--resume").out


def test_resume_with_other_adapters_template_or_freeze_is_refused(sft, tmp_path):
    sft(tmp_path, *LORA, "training.max_steps=3")
    for change, key in (
        ("lora.rank=3", "lora.rank"),
        ("template=chat", "template.prompt"),
        ("training.freeze=[norm]", "training.freeze"),
    ):
        with pytest.raises(UserError, match=f"cannot resume .* {key} was"):
            sft(tmp_path, *LORA, change, "--resume")


def test_resume_with_other_rows_is_refused(sft, tmp_path):
    sft(tmp_path / "sft", "training.max_steps=3")
    (tmp_path / "rows.json").write_text(json.dumps(rows(23)))
    with pytest.raises(UserError, match="the training text has changed"):
        sft(tmp_path / "sft", f"data.path={tmp_path / 'rows.json'}", "--resume")


@pytest.mark.slow
def test_two_processes_fine_tune_like_one(sft, tmp_path):
    """Adapters and padded rows on two processes, started as a user does. Copies of the model (DDP) give the
    same bits; pieces of it (FSDP), stopped and resumed, differ only by rounding."""
    words = (
        *LORA,
        "data.shuffle=false",
        "training.micro_batch_size=3",
        "training.val_every=6",
        "checkpoint.save_every=6",
    )

    def by_command(name: str, *more: str) -> str:
        argv = sft.argv(tmp_path / name, *words, "training.grad_accum_steps=1", "hardware.devices=2", *more)
        process = subprocess.run(
            [sys.executable, "finetune.py", *argv], capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.splitlines()[-1]

    one = sft(tmp_path / "one", *words, "training.grad_accum_steps=2")
    assert by_command("ddp") == one.out.splitlines()[-1]
    fsdp = ("hardware.strategy=fsdp",)
    by_command("fsdp", *fsdp, "training.max_steps=3")
    by_command("fsdp", *fsdp, "--resume")
    ours, theirs = weights_of(tmp_path / "fsdp" / "final.ckpt"), weights_of(tmp_path / "one" / "final.ckpt")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6, msg=name)
