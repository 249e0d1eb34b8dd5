"""finetune.py --show-mask and --check, and the config with rows from the hub."""

import io
import os
import re
import subprocess
import sys

import pytest
from conftest import Run
from finetuning import LORA, PLAIN_TEMPLATE, rows
from loopback_hub import LoopbackHub, dataset_card

import finetune
from support.messages import UserError

# ---- --show-mask and --check ---------------------------------------------------------------------


def test_show_mask_marks_what_is_trained_on_and_writes_nothing(sft, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        finetune.main(sft.argv(tmp_path / "sft", "--show-mask=2"))
    assert not end.value.code and not (tmp_path / "sft").exists()
    out = capsys.readouterr().out
    first, second = out.split("--- example ")[1:]
    assert ">>>" in first and first.count("Ask ") == 1
    asked = [row for row in rows(24) if f"Ask {row['instruction']}" in first + second]
    assert len(asked) == 2
    for row, shown in zip(asked, (first, second), strict=True):
        assert f" Say >>>{row['output']}<|endoftext|><<<\n" in shown
    assert "18 instructions" in out


def test_show_mask_draws_a_picture(sft, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune.main(sft.argv(tmp_path / "sft", "--show-mask=4", f"--picture={tmp_path / 'mask.svg'}"))
    svg = (tmp_path / "mask.svg").read_text()
    assert "</svg>" in svg and (tmp_path / "mask.png").stat().st_size > 5000
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--show-mask", "0"], "must be at least 1"),
        (["--picture", "a.svg"], "goes with --show-mask"),
        (["--show-mask", "1", "--picture", "docs"], r"ending in \.svg"),
        (["--show-mask", "1", "--picture", "v1.2"], r"ending in \.svg"),
    ],
)
def test_wrong_flags_of_show_mask_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        finetune.main(["--config", "config_finetune.yaml", *flags])


def test_check_passes_for_fine_tuning_and_adapters(sft, tmp_path, capsys):
    words = "one two three four five"
    long_prompt = (
        f"template={{prompt: '{words} {{instruction}} Say ', prompt_with_input: '{words} {{instruction}} "
        f"{{input}} Say '}}"
    )
    for words in ((), LORA, ("data.packing=true",), (long_prompt,)):
        with pytest.raises(SystemExit) as end:
            finetune.main(sft.argv(tmp_path / "sft", "--check", *words))
        assert end.value.code == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "everything passed" in out and not (tmp_path / "sft").exists()


# ---- the hub -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_config_finetune_yaml_downloads_its_rows_from_the_hub(tiny_run, tmp_path):
    """Only the base, the template and the number of steps are changed, and the process is started as a user
    does. The second run reads the cache, with no hub to ask."""
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"text": "-"} for row in rows(60)]), file)
    files = {
        "README.md": dataset_card({"default": {"train": "data/train-*"}}),
        "data/train-00000-of-00001.parquet": file.getvalue(),
    }
    overrides = (
        f"base_ckpt={tiny_run.folder / 'final.ckpt'}",
        PLAIN_TEMPLATE,
        "training.epochs=null",
        "training.max_steps=2",
        "training.warmup_steps=1",
    )

    def by_command(name: str, environment: dict[str, str]) -> Run:
        argv = [f"--override={override}" for override in (*overrides, f"checkpoint.dir={tmp_path / name}")]
        process = subprocess.run(
            [sys.executable, "finetune.py", "--config", "config_finetune.yaml", "--device", "cpu", *argv],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Run(tmp_path / name, process.returncode, process.stdout, process.stderr)

    with LoopbackHub("tatsu-lab/alpaca", files) as hub:
        online = by_command("online", hub.environment(tmp_path / "cache"))
    assert online.code == 0 and "57 instructions" in online.out and "val:   3 instructions" in online.out, (
        online.err
    )
    assert [row["step"] for row in online.val_rows] == [0, 2]
    cached = by_command("cached", {**hub.environment(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"})
    assert cached.code == 0 and cached.sha256 == online.sha256, cached.err
    nowhere = by_command("nowhere", hub.environment(tmp_path / "empty"))
    assert nowhere.code == 2 and re.match(
        r"(?s)error: data.dataset=tatsu-lab/alpaca: .* cannot be reached.*data.path=my_rows.json", nowhere.err
    ), nowhere.err
