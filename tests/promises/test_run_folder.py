"""The folder of a run: the files train.py writes there, and how it treats a folder that is already in use."""

import re
import sys

import filelock
import pytest
import torch
import yaml
from runs import BYTE, stop_before, stopped_run

import train
from support.checkpoint import load_model, weights_sha256
from support.config.read import load_config
from support.messages import UserError
from support.run.saving import CheckpointSaver

SHORT = (*BYTE, "training.max_steps=3", "training.val_every=100")


# ---- what a run writes ---------------------------------------------------------------------------


def test_last_best_and_final_are_names_of_step_files(tiny_run):
    names = sorted(path.name for path in tiny_run.folder.glob("*.ckpt"))
    assert names == ["best.ckpt", "final.ckpt", "last.ckpt", *(f"step-{step:07}.ckpt" for step in (4, 8, 12))]

    def inode(name: str) -> int:
        return (tiny_run.folder / f"{name}.ckpt").stat().st_ino

    best = min(tiny_run.val_rows, key=lambda row: row["val_loss"])
    assert inode("final") == inode("last") == inode("step-0000012") != inode("step-0000008")
    assert inode("best") == inode(f"step-{best['step']:07}")
    assert tiny_run.checkpoint("best")["tiny_transformer"]["metrics"]["best_val_loss"] == best["val_loss"]
    assert not list(tiny_run.folder.glob("*.tmp*"))


def test_keep_last_removes_older_step_files_and_keeps_best(run, tmp_path, monkeypatch):
    """Step 2 has the best validation loss; step 6 is better than step 4 only."""
    losses = {2: 1.0, 4: 3.0, 6: 2.0}
    monkeypatch.setattr(
        train.LitCausalLM,
        "on_validation_epoch_end",
        lambda self: setattr(self, "val_loss", losses[self.trainer.global_step]),
    )
    made = run(
        tmp_path / "run",
        "training.max_steps=6",
        "training.val_every=2",
        "checkpoint.save_every=1",
        "checkpoint.keep_last=2",
    )
    assert [path.name for path in sorted(made.folder.glob("step-*"))] == [
        "step-0000005.ckpt",
        "step-0000006.ckpt",
    ]
    steps = {
        name: made.checkpoint(name)["tiny_transformer"]["metrics"]["step"]
        for name in ("best", "last", "final")
    }
    assert steps == {"best": 2, "last": 6, "final": 6}


@pytest.mark.parametrize("keep", [1, 3, 5])
def test_keep_last_keeps_that_many_step_files(run, tmp_path, keep):
    made = run(
        tmp_path / "run",
        *SHORT,
        "training.max_steps=7",
        "checkpoint.save_every=1",
        f"checkpoint.keep_last={keep}",
    )
    assert [int(path.stem[5:]) for path in sorted(made.folder.glob("step-*"))] == list(range(8 - keep, 8))


def test_a_validating_step_is_saved_once_and_after_its_row(run, tmp_path, monkeypatch):
    """If it were saved before its row, a run killed in between would never validate this step."""
    saved = []
    save = CheckpointSaver.save

    def record_save(self, trainer, *args, **options):
        rows = (self.folder / "metrics.jsonl").read_text().splitlines()
        saved.append((trainer.global_step, '"val_loss"' in rows[-1]))
        save(self, trainer, *args, **options)

    monkeypatch.setattr(CheckpointSaver, "save", record_save)
    run(
        tmp_path / "run",
        "tokenizer.kind=byte",
        "training.max_steps=7",
        "training.val_every=4",
        "checkpoint.save_every=2",
    )
    assert saved == [(2, False), (4, True), (6, False), (7, True)]


def test_a_new_best_is_saved_even_between_saves(run, tmp_path):
    made = run(tmp_path / "run", "training.max_steps=7", "training.val_every=2", "checkpoint.save_every=100")
    best = min(made.val_rows, key=lambda row: row["val_loss"])
    assert made.checkpoint("best")["tiny_transformer"]["metrics"]["step"] == best["step"]
    assert {path.stem for path in made.folder.glob("step-*")} >= {
        "step-0000002",
        f"step-{best['step']:07}",
        "step-0000007",
    }


def test_run_config_yaml_holds_the_config_that_ran(tiny_run):
    path = tiny_run.folder / "run_config.yaml"
    config = load_config(path)
    assert (
        config.to_dict()
        == yaml.safe_load(path.read_text())
        == tiny_run.checkpoint()["tiny_transformer"]["config"]
    )
    assert (config.model.d_model, config.training.muon_lr, config.model.head_dim) == (32, 0.02, 8)
    for word in ("# torch: ", "# lightning: ", "# python: ", "# git_commit: ", "# command: "):
        assert word in path.read_text()


def test_the_header_says_what_will_run(tiny_run):
    n_params = load_model(tiny_run.folder / "final.ckpt")[0].n_params()
    assert f"{n_params:,} parameters" in tiny_run.out
    for pattern in (
        r"train: \d+ documents, [\d,]+ tokens",
        r"steps: 12 of 256 tokens",
        r"device: cpu.*precision 32-true, about \d+ MB needed of [\d,]+",
    ):
        assert re.search(pattern, tiny_run.out)


def test_the_last_line_is_the_sha256_of_the_weights(run, tiny_run, tmp_path):
    assert re.fullmatch(r"weights sha256 [0-9a-f]{64}", tiny_run.out.splitlines()[-1])
    assert run(tmp_path / "same").sha256 == tiny_run.sha256
    assert run(tmp_path / "other", "seed=43").sha256 != tiny_run.sha256


def test_the_sha256_depends_on_every_weight(tiny_run, tmp_path):
    before = weights_sha256(tiny_run.folder / "final.ckpt")
    assert before == tiny_run.sha256
    for name in ("net.norm.weight", "net.layers.1.mlp.down_proj.weight"):
        checkpoint = tiny_run.checkpoint()
        checkpoint["state_dict"][name].view(-1)[-1] *= 1 + 2**-20
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        assert weights_sha256(tmp_path / "changed.ckpt") != before


# ---- a folder with a run in it -------------------------------------------------------------------


def file_names(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


FILES_OF_A_RUN = {
    "step-0000003.ckpt",
    "last.ckpt",
    "best.ckpt",
    "final.ckpt",
    "metrics.jsonl",
    "run_config.yaml",
    "loss.svg",
    "loss.png",
}


def test_a_finished_run_is_moved_aside_and_the_users_files_stay(run, tmp_path):
    folder = tmp_path / "run"
    shas = [run(folder, *SHORT, "seed=1", pictures=True).sha256]
    (folder / "notes.txt").write_text("mine")
    (folder / "tensorboard").mkdir()
    second = run(folder, *SHORT, "seed=2", pictures=True)
    assert f"the earlier run in {folder} has been moved to {folder / 'old-1'}" in second.out
    shas.append(second.sha256)
    shas.append(run(folder, *SHORT, "seed=3", pictures=True).sha256)
    assert file_names(folder) == FILES_OF_A_RUN | {"notes.txt", "old-1", "old-2"}
    assert file_names(folder / "old-1") == FILES_OF_A_RUN | {"tensorboard"}
    assert file_names(folder / "old-2") == FILES_OF_A_RUN
    assert [weights_sha256(folder / part / "final.ckpt") for part in ("old-1", "old-2", ".")] == shas
    assert len(set(shas)) == 3


def test_an_unfinished_run_is_refused_and_three_ways_out_are_named(run, tmp_path):
    made = stopped_run(run, tmp_path / "run", *BYTE, at=2)
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    with pytest.raises(UserError) as error:
        run(made.folder, "tokenizer.kind=byte")
    for word in (str(made.folder), "--resume", "--fresh", "--override checkpoint.dir="):
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert {path: path.stat().st_mtime_ns for path in made.folder.iterdir()} == before


def test_fresh_moves_an_unfinished_run_aside(run, tmp_path):
    made = stopped_run(run, tmp_path / "run", *BYTE, at=2)
    kept = weights_sha256(made.folder / "last.ckpt")
    again = run(made.folder, *SHORT, "--fresh")
    assert (again.code, again.train_rows[0]["step"]) == (0, 1)
    assert weights_sha256(made.folder / "old-1" / "last.ckpt") == kept
    assert file_names(made.folder) == FILES_OF_A_RUN - {"loss.svg", "loss.png"} | {"old-1"}


def test_an_extended_run_that_is_unfinished_is_refused_although_the_shorter_one_finished(
    run, tmp_path, monkeypatch
):
    """Once extended past final.ckpt, a run is unfinished again."""
    made = run(tmp_path / "run", *SHORT)
    stop_before(monkeypatch, 5)
    assert run(made.folder, *SHORT, "training.max_steps=9", "--resume").code == 143
    with pytest.raises(UserError, match="unfinished run"):
        run(made.folder, *SHORT, "training.max_steps=9")


def test_a_folder_that_another_run_uses_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with filelock.FileLock(folder / ".lock"):
        with pytest.raises(UserError, match=r"another run is writing to .*--override checkpoint\.dir="):
            run(folder, *SHORT)
        assert file_names(folder) == set()
    assert run(folder, *SHORT).code == 0


def test_a_failed_run_frees_its_folder(run, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise UserError("as if")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train", broken)
        with pytest.raises(UserError, match="as if"):
            run(tmp_path / "run", *SHORT)
    assert run(tmp_path / "run", *SHORT).code == 0


def test_a_logger_that_is_not_installed_is_one_clear_error(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    folder = tmp_path / "run"
    run(folder, *SHORT)
    before = file_names(folder)
    with pytest.raises(UserError, match=r"^logging\.tensorboard=true needs .*pip install tensorboard$"):
        run(folder, *SHORT, "logging.tensorboard=true")
    assert file_names(folder) == before  # a run that cannot start moves nothing aside


def test_a_file_in_place_of_the_checkpoint_folder_is_a_clear_error(run, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"checkpoint\.dir"):
        run(tmp_path / "file", *SHORT)
