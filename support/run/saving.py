"""When and how a run is saved: checkpoint files, their other names, and the signals that stop a run.

Lightning's own callbacks have traps for exact resume (best replaced by a worse one, metrics deleted, saves in
the middle of a step). The few here are small and do one thing each. A step's row of metrics is written before
its checkpoint, so a run that is killed between the two and resumed loses neither.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from support.checkpoint import read_checkpoint, read_metadata, save_archive, write_merged
from support.files.atomic import link_or_copy, temporary_folder
from support.find_checkpoints import step_files
from support.messages import OptionalPart, UserError, is_main_process, warn
from support.run.guards import refuse_bad_weights
from support.run.plan import Plan
from support.weights import first_not_finite


class AtomicCheckpointIO(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints: whole or not at all, and without running code from a file.

    Only the main process writes. If that fails, nothing is raised here; `failure` gives the reason.
    """

    failure: str | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the file. On failure keep the reason: the other processes must hear of it too."""
        self.failure = None
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            save_archive(checkpoint, Path(path))
        except OSError as error:
            self.failure = error.strerror or str(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checked checkpoint to resume from. Raises UserError if a NaN or an infinity is in it."""
        checkpoint = read_checkpoint(path, mmap=False)
        tensors = {"weights": checkpoint["state_dict"], "optimizer": checkpoint["optimizer_states"]}
        if bad := first_not_finite(tensors):
            raise UserError(
                f"{path}: {bad} holds a NaN or an infinity; resume from an earlier checkpoint with --resume "
                "CKPT"
            )
        return checkpoint


class StopRun(SystemExit):
    """Ends a run after a signal; `code` is 128 + the signal's number."""


class StopOnSignal(pl.Callback):
    """Ctrl-C, SIGTERM and a closed terminal let the current step finish and be saved; the run ends before the
    next step. A second signal, or one before the first step, ends it at once.

    Used as `with stop: trainer.fit(...)`. CheckpointSaver reads `leaving`.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.signum: int | None = None  # the signal that this process got
        self.stepping = False  # whether the first step has begun
        self.leaving = False  # whether the run ends after this step
        self.earlier_handlers: dict[int, Any] = {}
        self.pid = os.getpid()

    def __enter__(self) -> "StopOnSignal":
        for signum in self.SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP: so do we
                self.earlier_handlers[signum] = signal.signal(signum, self._answer)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Set the earlier handlers again. The signal may also have ended another process, or a data worker
        that just started, before the step was done. The error that this causes here is then a StopRun too."""
        for signum, handler in self.earlier_handlers.items():
            signal.signal(signum, handler)
        if self.signum is not None and isinstance(error, RuntimeError):
            raise StopRun(128 + self.signum) from error

    def _answer(self, signum: int, frame: Any) -> None:
        """Called when a signal arrives: remember it, or end the run at once."""
        if os.getpid() != self.pid:
            return  # a data worker, which has inherited this handler; the main process ends it
        if self.signum is not None or not self.stepping:
            raise StopRun(128 + signum)
        self.signum = signum
        if is_main_process():
            with contextlib.suppress(OSError):  # the terminal itself may be gone
                print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for signum in self.earlier_handlers:  # again, since Lightning has set its own handlers in between
            signal.signal(signum, self._answer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # A signal to any of the processes stops all of them, after the same step.
        self.leaving = trainer.strategy.reduce_boolean_decision(self.signum is not None, all=False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.stepping = True
        if self.leaving:
            raise StopRun(128 + (self.signum or signal.SIGTERM))


def number_parameters(
    saved: dict[str, Any], live: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]
) -> None:
    """Change a saved optimizer so that its parameters are numbered in the module's order, not in the order of
    the optimizer's groups.

    FSDP (weights divided among processes) expects that order on loading. With another one, it would give a
    parameter the momentum of a different parameter.
    """
    number_in_module = {parameter: i for i, parameter in enumerate(parameters)}
    new_number: dict[int, int] = {}
    for saved_group, live_group in zip(saved["param_groups"], live.param_groups, strict=True):
        for old, parameter in zip(saved_group["params"], live_group["params"], strict=True):
            new_number[old] = number_in_module[parameter]
        saved_group["params"] = [new_number[old] for old in saved_group["params"]]
    saved["state"] = {new_number[old]: state for old, state in saved["state"].items()}


def name_checkpoint(path: Path, *, best: bool, final: bool) -> None:
    """Make `last.ckpt` another name of a step file, and also `best.ckpt` and `final.ckpt` if asked.

    After a run with adapters, final.ckpt is a file of its own: the plain model in which the adapters are
    merged into the weights, for everyone who only wants to use it.
    """
    wanted = ["last"]
    if best:
        wanted.append("best")
    if final:
        wanted.append("final")
    for name in wanted:
        target = path.with_name(f"{name}.ckpt")
        try:
            if name == "final" and read_metadata(path).get("lora"):
                write_merged(path, target)
            else:
                link_or_copy(path, target)
        except OSError as error:  # the name may need a copy of the file, and the disk may be full
            warn(f"{target.name} could not be written next to {path} ({error.strerror})")


class CheckpointSaver(pl.Callback):
    """Saves step-*.ckpt every `save_every` steps, at each new best validation loss, after a signal and at the
    end. `last`, `best` and `final` are other names of such files. A step that validates is saved after its
    validation."""

    def __init__(self, *, plan: Plan, stop: StopOnSignal):
        self.plan = plan
        self.stop = stop
        self.folder = plan.folder
        self.n_steps = plan.n_steps
        self.val_every = plan.config.training.val_every
        self.save_every = plan.config.checkpoint.save_every
        self.keep_last = plan.config.checkpoint.keep_last
        self.removing = OptionalPart("removing older checkpoints")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self.plan.resumes_in_place:
            self._restore_names(trainer, pl_module)
        best = (pl_module.best_val_loss, pl_module.best_step)  # as the main process knows it
        pl_module.best_val_loss, pl_module.best_step = trainer.strategy.broadcast(best)

    def _restore_names(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before a run resumes in its folder, give its files their names, in case a kill came before that was
        done. The loss to beat is the one in best.ckpt, even if the run resumes from an older file."""
        # A run that is extended is no longer finished.
        (self.folder / "final.ckpt").unlink(missing_ok=True)
        with contextlib.suppress(UserError):  # best.ckpt may be missing or damaged
            metrics = read_metadata(self.folder / "best.ckpt")["metrics"]
            best_val_loss = metrics["best_val_loss"]
            if best_val_loss is not None and best_val_loss < pl_module.best_val_loss:
                pl_module.best_val_loss = best_val_loss
                pl_module.best_step = metrics["step"]
        resumed_from = self.plan.resume_from
        if resumed_from.name.startswith("step-"):
            name_checkpoint(resumed_from, best=pl_module.best_step == trainer.global_step, final=False)

    def _due(self, trainer: pl.Trainer) -> bool:
        """Whether this step is to be saved, whatever its validation loss."""
        return trainer.global_step % self.save_every == 0 or self._last_chance(trainer)

    def _last_chance(self, trainer: pl.Trainer) -> bool:
        """Whether the run ends after this step, so that no later save can make up for a failed one."""
        return trainer.global_step == self.n_steps or self.stop.leaving

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self.n_steps:
            trainer.should_stop = True  # lets the last step validate, whatever `val_every` is
        validates = step % self.val_every == 0 or step == self.n_steps
        if self._due(trainer) and not validates:
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:  # before the first step there is nothing to save (see validates_first)
            return
        earlier_best = (pl_module.best_val_loss, pl_module.best_step)
        improved = pl_module.val_loss < pl_module.best_val_loss
        if improved:
            pl_module.best_val_loss = pl_module.val_loss
            pl_module.best_step = trainer.global_step
        if improved or self._due(trainer):
            saved = self.save(trainer, pl_module, best=improved)
            if not saved:  # best.ckpt is still the earlier one
                pl_module.best_val_loss, pl_module.best_step = earlier_best

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, best: bool = False) -> bool:
        """Write the step's file and its names. Returns False if the file could not be written.

        Called in every process, since each may hold a part of the state. Raises UserError if the state must
        not be saved (a NaN), or if it could not be saved and the run ends here.
        """
        optimizer = pl_module.optimizers().state_dict()["state"]
        refuse_bad_weights(
            self.plan,
            step=trainer.global_step,
            tensors={"weights": pl_module.net.state_dict(), "optimizer": optimizer},
            strategy=trainer.strategy,
        )
        path = self.folder / f"step-{trainer.global_step:07d}.ckpt"
        failure = self._write(trainer, path)
        if failure and self._last_chance(trainer):
            raise self._rescue(trainer, path.name, failure)
        if not trainer.is_global_zero:
            return not failure
        if failure:
            warn(
                f"{path} could not be written ({failure}); older checkpoints are untouched, and training "
                "continues to the next save"
            )
            return False
        name_checkpoint(path, best=best, final=trainer.global_step == self.n_steps)
        self._remove_older(path)
        return True

    def _remove_older(self, newest: Path) -> None:
        """Keep the newest `keep_last` step files; None keeps all."""
        older = [path for path in step_files(self.folder) if path != newest]
        n_to_remove = max(0, len(older) + 1 - self.keep_last) if self.keep_last else 0
        for path in older[:n_to_remove]:
            with self.removing:
                path.unlink(missing_ok=True)

    def _write(self, trainer: pl.Trainer, path: Path) -> str | None:
        """The reason why `path` could not be written, in every process; None if it was."""
        trainer.save_checkpoint(path)
        return trainer.strategy.broadcast(trainer.strategy.checkpoint_io.failure)

    def _rescue(self, trainer: pl.Trainer, name: str, failure: str) -> UserError:
        """The run ends and its folder cannot be written: save to the folder for temporary files instead.
        Returns an error that says where, or that this failed too."""
        path = Path(trainer.strategy.broadcast(str(temporary_folder()))) / name
        second_failure = self._write(trainer, path)
        if second_failure is None:
            return UserError(
                f"{self.folder} cannot be written ({failure}); the state at step {trainer.global_step} has "
                f"been saved to {path}\n"
                f"       make room, move that file to {self.folder}, and resume with --resume"
            )
        return UserError(
            f"{self.folder} cannot be written ({failure}), nor can {path.parent} ({second_failure}); the "
            "steps since the last checkpoint are lost\n"
            "       make room, and resume with --resume"
        )
