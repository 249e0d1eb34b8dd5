"""What happens around a training step: rows of metrics, the console, checkpoints, signals, text samples.

Lightning's own counterparts have traps for exact resume (best replaced by a worse one, metrics deleted, saves
in the middle of a step); these few are small and do one thing each. A step's row is written before its
checkpoint, so a run that is killed in between and resumed loses neither.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import TorchCheckpointIO

from support.checkpoint import read_checkpoint, read_metadata, save_archive, write_merged
from support.files.atomic import link_or_copy, temporary_folder
from support.find_checkpoints import step_files
from support.messages import OptionalPart, UserError, is_main_process, warn
from support.weights import first_not_finite


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's hook for files: whole or not at all, and opened by weights_only alone.

    A file that cannot be written raises nothing here, where only one of several processes is; `failure` says
    why.
    """

    failure: str | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        self.failure = None
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            save_archive(checkpoint, Path(path))
        except OSError as error:
            self.failure = error.strerror or str(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = read_checkpoint(path, mmap=False)
        if bad := first_not_finite(
            {"weights": checkpoint["state_dict"], "optimizer": checkpoint["optimizer_states"]}
        ):
            raise UserError(
                f"{path}: {bad} holds a NaN or an infinity; go on from an earlier one by --resume CKPT"
            )
        return checkpoint


class StopRun(SystemExit):
    """Ends a run after a signal; `code` is 128 + the signal's number."""


class StopOnSignal(pl.Callback):
    """Ctrl-C, SIGTERM and a closed terminal let the step finish and be saved (CheckpointSaver looks at
    `leaving`); the run ends before the next step begins. A second signal, or one before the first step, ends
    it at once. Used as `with stop: trainer.fit(...)`.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.signum: int | None = None
        self.stepping = self.leaving = False
        self.before: dict[int, Any] = {}
        self.pid = os.getpid()

    def __enter__(self) -> "StopOnSignal":
        heard = [
            signum for signum in self.SIGNALS if signal.getsignal(signum) != signal.SIG_IGN
        ]  # nohup ignores SIGHUP: so do we
        self.before = {signum: signal.signal(signum, self._answer) for signum in heard}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Of several processes, and of data workers in their first moments, one may fall to the signal
        before the step is done: what the others then raise is the same end."""
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        if self.signum is not None and isinstance(error, RuntimeError):
            raise StopRun(128 + self.signum) from error

    def _answer(self, signum: int, frame: Any) -> None:
        if os.getpid() != self.pid:
            return  # Ctrl-C reaches the data workers too, which have inherited this: the main process ends them
        if self.signum is not None or not self.stepping:
            raise StopRun(128 + signum)
        self.signum = signum
        if is_main_process():
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for signum in self.before:  # again, since Lightning has put its own handlers in between
            signal.signal(signum, self._answer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        told = self.signum is not None  # any process that has been told stops all, behind the same step
        self.leaving = (
            trainer.strategy.reduce_boolean_decision(told, all=False) if trainer.world_size > 1 else told
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.stepping = True
        if self.leaving:
            raise StopRun(128 + (self.signum or signal.SIGTERM))


def name_checkpoint(path: Path, best: bool, final: bool) -> None:
    """Let `last.ckpt`, and `best.ckpt` and `final.ckpt` where asked, be further names of a step file. Of
    one with adapters, `final.ckpt` is a file of its own: the plain model that they make, for whoever wants
    nothing but to use it."""
    for name, wanted in (("last", True), ("best", best), ("final", final)):
        try:
            if wanted and name == "final" and read_metadata(path).get("lora"):
                write_merged(path, path.with_name("final.ckpt"))
            elif wanted:
                link_or_copy(path, path.with_name(f"{name}.ckpt"))
        except OSError as error:  # a copy on a full disk
            warn(f"{name}.ckpt could not be written beside {path} ({error.strerror})")


class CheckpointSaver(pl.Callback):
    """step-*.ckpt every `save_every` steps, at each new best validation loss, at a signal and at the end;
    `last`, `best` and `final` are further names of such files. A step that validates is saved after its
    validation."""

    def __init__(self, plan: Any, stop: StopOnSignal):
        training, checkpoint = plan.config.training, plan.config.checkpoint
        self.folder, self.save_every, self.keep_last = (
            plan.folder,
            checkpoint.save_every,
            checkpoint.keep_last,
        )
        self.val_every, self.n_steps, self.stop = training.val_every, plan.n_steps, stop
        self.resumed_from = plan.resume_from if plan.resumes_in_place else None
        self.tidying = OptionalPart("removing older checkpoints")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Going on in a folder: its names as they should be, also where a kill came between a file and its
        names, and best.ckpt as the one to beat, also if the run goes on from an older file than that."""
        if trainer.is_global_zero and self.resumed_from:
            (self.folder / "final.ckpt").unlink(
                missing_ok=True
            )  # a run that is extended is not finished any more
            with contextlib.suppress(UserError):  # there may be none yet, or a damaged one
                metrics = read_metadata(self.folder / "best.ckpt")["metrics"]
                if (
                    metrics["best_val_loss"] is not None
                    and metrics["best_val_loss"] < pl_module.best_val_loss
                ):
                    pl_module.best_val_loss, pl_module.best_step = metrics["best_val_loss"], metrics["step"]
            if self.resumed_from.name.startswith("step-"):
                name_checkpoint(
                    self.resumed_from, best=pl_module.best_step == trainer.global_step, final=False
                )
        pl_module.best_val_loss, pl_module.best_step = trainer.strategy.broadcast(
            (pl_module.best_val_loss, pl_module.best_step)
        )

    def _due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step % self.save_every == 0 or self._last_chance(trainer)

    def _last_chance(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step == self.n_steps or self.stop.leaving

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self.n_steps:
            trainer.should_stop = True  # lets the last step validate, whatever `val_every` is
        if self._due(trainer) and step % self.val_every and step != self.n_steps:
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:  # the look at the base before fine-tuning
            return
        before = pl_module.best_val_loss, pl_module.best_step
        improved = pl_module.val_loss < pl_module.best_val_loss
        if improved:
            pl_module.best_val_loss, pl_module.best_step = pl_module.val_loss, trainer.global_step
        if (improved or self._due(trainer)) and not self.save(trainer, pl_module, best=improved):
            pl_module.best_val_loss, pl_module.best_step = before  # best.ckpt is still the one before

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, best: bool = False) -> bool:
        """Write the step's file and its names; False if the disk refuses. Called in every process: each
        has its part of the state. Raises UserError where the state must not be saved (NaN), or cannot be
        and the run is at its end."""
        pl_module.refuse_bad_weights()
        path = self.folder / f"step-{trainer.global_step:07d}.ckpt"
        failure = self._write(trainer, path)
        if failure and self._last_chance(trainer):
            raise self._rescue(trainer, path.name, failure)
        if failure or not trainer.is_global_zero:
            if trainer.is_global_zero:
                warn(
                    f"{path} could not be written ({failure}); older checkpoints are untouched, and "
                    "training goes on to the next save"
                )
            return not failure
        name_checkpoint(path, best, final=trainer.global_step == self.n_steps)
        older = [p for p in step_files(self.folder) if p != path]
        n_old = max(0, len(older) + 1 - self.keep_last) if self.keep_last else 0
        for old in older[:n_old]:
            with self.tidying:
                old.unlink(missing_ok=True)
        return True

    def _write(self, trainer: pl.Trainer, path: Path) -> str | None:
        """Why `path` could not be written, in every process; None if it was."""
        trainer.save_checkpoint(path)
        return trainer.strategy.broadcast(trainer.strategy.checkpoint_io.failure)

    def _rescue(self, trainer: pl.Trainer, name: str, failure: str) -> UserError:
        """The run ends and its folder takes no file: leave the state where temporary files go, and say so."""
        path = Path(trainer.strategy.broadcast(str(temporary_folder()))) / name
        if (again := self._write(trainer, path)) is None:
            return UserError(
                f"{self.folder} cannot be written ({failure}); the state at step {trainer.global_step} has "
                f"been saved to {path}\n"
                f"       make room, move that file to {self.folder}, and go on with --resume"
            )
        return UserError(
            f"{self.folder} cannot be written ({failure}), nor can {path.parent} ({again}); the steps "
            "since the last checkpoint are lost\n"
            "       make room, and go on with --resume"
        )
