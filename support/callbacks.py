"""What happens around a training step: rows of metrics, the console, checkpoints, signals, text samples.

Lightning's own counterparts have traps for exact resume (best replaced by a worse one, metrics deleted, saves in the
middle of a step); these few are small and do one thing each. A step's row is written before its checkpoint, so a run
that is killed in between and resumed loses neither.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from model import SamplingConfig
from support.checkpoint import first_not_finite, read_checkpoint, read_metadata, save_archive, step_files, write_merged
from support.cli import Extra, UserError, is_main_process, warn
from support.config import LoggingConfig
from support.continuation import text_after
from support.disk import atomic_write, link_or_copy, temporary_folder
from support.hardware import bf16_peak_flops, memory_used_mb


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's hook for files: whole or not at all, and opened by weights_only alone.

    A file that cannot be written raises nothing here, where only one of several processes is; `failure` says why.
    """

    failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.failure = None
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            save_archive(checkpoint, Path(path))
        except OSError as error:
            self.failure = error.strerror or str(error)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = read_checkpoint(path, mmap=False)
        if bad := first_not_finite({"weights": checkpoint["state_dict"], "optimizer": checkpoint["optimizer_states"]}):
            raise UserError(f"{path}: {bad} holds a NaN or an infinity; go on from an earlier one by --resume CKPT")
        return checkpoint


class StopRun(SystemExit):
    """Ends a run after a signal; `code` is 128 + the signal's number."""


class StopOnSignal(pl.Callback):
    """Ctrl-C, SIGTERM and a closed terminal let the step finish and be saved (CheckpointSaver looks at `leaving`); the
    run ends before the next step begins. A second signal, or one before the first step, ends it at once. Used as
    `with stop: trainer.fit(...)`.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.signum: int | None = None
        self.stepping = self.leaving = False
        self.before: dict[int, Any] = {}
        self.pid = os.getpid()

    def __enter__(self) -> "StopOnSignal":
        heard = [signum for signum in self.SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]  # nohup ignores SIGHUP: so do we
        self.before = {signum: signal.signal(signum, self._answer) for signum in heard}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Of several processes, and of data workers in their first moments, one may fall to the signal before the step is
        done: what the others then raise is the same end."""
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
        self.leaving = trainer.strategy.reduce_boolean_decision(told, all=False) if trainer.world_size > 1 else told

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.stepping = True
        if self.leaving:
            raise StopRun(128 + (self.signum or signal.SIGTERM))


def name_checkpoint(path: Path, best: bool, final: bool) -> None:
    """Let `last.ckpt`, and `best.ckpt` and `final.ckpt` where asked, be further names of a step file. Of one with adapters,
    `final.ckpt` is a file of its own: the plain model that they make, for whoever wants nothing but to use it."""
    for name, wanted in (("last", True), ("best", best), ("final", final)):
        try:
            if wanted and name == "final" and read_metadata(path).get("lora"):
                write_merged(path, path.with_name("final.ckpt"))
            elif wanted:
                link_or_copy(path, path.with_name(f"{name}.ckpt"))
        except OSError as error:  # a copy on a full disk
            warn(f"{name}.ckpt could not be written beside {path} ({error.strerror})")


class CheckpointSaver(pl.Callback):
    """step-*.ckpt every `save_every` steps, at each new best validation loss, at a signal and at the end; `last`,
    `best` and `final` are further names of such files. A step that validates is saved after its validation."""

    def __init__(self, plan: Any, stop: StopOnSignal):
        training, checkpoint = plan.config.training, plan.config.checkpoint
        self.folder, self.save_every, self.keep_last = plan.folder, checkpoint.save_every, checkpoint.keep_last
        self.val_every, self.n_steps, self.stop = training.val_every, plan.n_steps, stop
        self.goes_on_from = plan.resume_from if plan.goes_on else None
        self.tidying = Extra("removing older checkpoints")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Going on in a folder: its names as they should be, also where a kill came between a file and its names, and
        best.ckpt as the one to beat, also if the run goes on from an older file than that."""
        if trainer.is_global_zero and self.goes_on_from:
            (self.folder / "final.ckpt").unlink(missing_ok=True)  # a run that is extended is not finished any more
            with contextlib.suppress(UserError):  # there may be none yet, or a damaged one
                metrics = read_metadata(self.folder / "best.ckpt")["metrics"]
                if metrics["best_val_loss"] is not None and metrics["best_val_loss"] < pl_module.best_val_loss:
                    pl_module.best_val_loss, pl_module.best_step = metrics["best_val_loss"], metrics["step"]
            if self.goes_on_from.name.startswith("step-"):
                name_checkpoint(self.goes_on_from, best=pl_module.best_step == trainer.global_step, final=False)
        pl_module.best_val_loss, pl_module.best_step = trainer.strategy.broadcast((pl_module.best_val_loss, pl_module.best_step))

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
        """Write the step's file and its names; False if the disk refuses. Called in every process: each has its part of
        the state. Raises UserError where the state must not be saved (NaN), or cannot be and the run is at its end."""
        pl_module.refuse_bad_weights()
        path = self.folder / f"step-{trainer.global_step:07d}.ckpt"
        failure = self._write(trainer, path)
        if failure and self._last_chance(trainer):
            raise self._rescue(trainer, path.name, failure)
        if failure or not trainer.is_global_zero:
            if trainer.is_global_zero:
                warn(f"{path} could not be written ({failure}); older checkpoints are untouched, and training goes on to the next save")
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
                f"{self.folder} cannot be written ({failure}); the state at step {trainer.global_step} has been saved to {path}\n"
                f"       make room, move that file to {self.folder}, and go on with --resume"
            )
        return UserError(
            f"{self.folder} cannot be written ({failure}), nor can {path.parent} ({again}); the steps since the last checkpoint are lost\n"
            "       make room, and go on with --resume"
        )


def perplexity(loss: float) -> float:
    """exp(loss): among how many tokens the model might as well choose evenly."""
    return math.exp(min(loss, 700.0))


class Metrics(pl.Callback):
    """One row for step 1 and every `log_every` steps, one for each validation; each goes to every sink.

    step_ms and what follows from it cover the steps since the row before, without data loading, validation and saving.
    """

    def __init__(self, sinks: list[Any], log_every: int, n_steps: int, sequences_per_step: int, device: str):
        self.sinks = [(sink, Extra(sink.name)) for sink in sinks]
        self.log_every, self.n_steps, self.sequences_per_step, self.device = log_every, n_steps, sequences_per_step, device
        self.measuring = Extra("measuring memory and speed")
        self.seconds, self.steps, self.tokens_before = 0.0, 0, None
        self.began = 0.0

    def write(self, row: dict[str, Any]) -> None:
        for sink, extra in self.sinks:
            with extra:
                sink.write(row)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.tokens_before is None:
            self.tokens_before = pl_module.tokens_seen
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.began
        self.steps += 1
        step = trainer.global_step
        if step > 1 and step % self.log_every and step != self.n_steps:
            return
        self.seconds = max(self.seconds, 1e-9)  # a coarse clock may have seen nothing
        tokens_per_sec = (pl_module.tokens_seen - self.tokens_before) / self.seconds
        row = {
            "step": step,
            "tokens": pl_module.tokens_seen,
            **pl_module.step_metrics,
            "tokens_per_sec": round(tokens_per_sec, 1),
            "examples_per_sec": round(self.sequences_per_step * self.steps / self.seconds, 2),
            "step_ms": round(1000 * self.seconds / self.steps, 3),
        }
        with self.measuring:
            row["memory_mb"] = round(memory_used_mb(self.device), 1)
            if peak := bf16_peak_flops(self.device):
                row["mfu"] = round(pl_module.flops_per_token * tokens_per_sec / (peak * trainer.world_size), 4)
        self.seconds, self.steps, self.tokens_before = 0.0, 0, pl_module.tokens_seen
        self.write(row)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write(
            {
                "step": trainer.global_step,
                "tokens": pl_module.tokens_seen,
                "val_loss": pl_module.val_loss,
                "perplexity": perplexity(pl_module.val_loss),
                **pl_module.val_metrics,
            }
        )


class JsonlFile:
    """metrics.jsonl or samples.jsonl, written through row by row. On resume, rows of steps that will be run again are dropped
    first (`dropped` holds them). Rows that a full disk does not take are kept and written with a later one."""

    def __init__(self, path: Path, resume_step: int):
        self.name, self.dropped = path.name, []
        kept = []
        for line in path.read_text("utf-8", "replace").splitlines() if path.exists() and resume_step else []:
            try:
                if (row := json.loads(line))["step"] <= resume_step:
                    kept.append(line)
                else:
                    self.dropped.append(row)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line cut off by a kill
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self.waiting = b""

    def write(self, row: dict[str, Any]) -> None:
        told = bool(self.waiting)
        self.waiting += (json.dumps(row) + "\n").encode()
        size = os.fstat(self.file.fileno()).st_size
        try:
            rest = self.waiting
            while rest:
                rest = rest[self.file.write(rest) :]
            self.waiting = b""
        except OSError as error:
            self.file.truncate(size)  # no half row
            if not told:
                warn(f"{self.file.name} could not be written ({error.strerror}); its rows are kept for later")

    def close(self) -> None:
        self.file.close()


class LoggerSink:
    """Hands rows to a Lightning logger (TensorBoard, Weights & Biases), but for those it has had before, from a run that was
    killed and is resumed. One that fails `TRIES` times in a row, each of which may have waited for a network, is given up."""

    TRIES = 3

    def __init__(self, logger: Any, had: list[dict[str, Any]] = ()):
        self.logger, self.name, self.failures = logger, type(logger).__name__, 0
        self.had = {(row["step"], "val_loss" in row) for row in had}

    def write(self, row: dict[str, Any]) -> None:
        if self.failures == self.TRIES or (row["step"], "val_loss" in row) in self.had:
            return
        self.failures += 1
        self.logger.log_metrics({key: value for key, value in row.items() if key != "step"}, step=row["step"])
        self.logger.save()
        self.failures = 0

    def close(self) -> None:
        self.logger.finalize("finished")


def make_sinks(config: LoggingConfig, folder: Path, start_step: int) -> list[Any]:
    """Where the rows of metrics go besides the console: metrics.jsonl, and the loggers that the config asks for.

    A resumed run begins at `start_step`; each logger has each step once all the same. TensorBoard hides the steps that are
    run again, and Weights & Biases, which goes on with the run whose id is kept in the folder, is not given them again.
    """
    file = JsonlFile(folder / "metrics.jsonl", start_step)
    sinks = [file]
    if config.tensorboard:
        with Extra("TensorBoard"):
            purge = {"purge_step": start_step + 1} if start_step else {}
            sinks.append(LoggerSink(pl.loggers.TensorBoardLogger(folder, name="tensorboard", version="", **purge)))
    if config.wandb:
        with Extra("Weights & Biases"):
            id_file = folder / "wandb_id.txt"
            if not id_file.exists():
                with atomic_write(id_file) as new:
                    new.write(uuid.uuid4().hex[:8].encode())
            same_run = {"id": id_file.read_text("ascii").strip(), "resume": "allow"}
            logger = pl.loggers.WandbLogger(project="tiny-transformer", name=folder.name, save_dir=folder, **same_run)
            sinks.append(LoggerSink(logger, file.dropped))
    return sinks


class Console:
    """The run on the screen: a live bar on a terminal, plain lines elsewhere (and in files)."""

    name = "the console"

    def __init__(self, n_steps: int, start_step: int):
        self.n_steps, self.bar = n_steps, None
        self.first: tuple[int, float] | None = None  # step and time of the first row, from which the rest is estimated
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TextColumn("eta"),
                TimeRemainingColumn(),
            )
            self.task = self.bar.add_task("", total=n_steps, completed=start_step)
            self.bar.start()

    def print(self, text: str) -> None:
        """A line that stays; above the bar, if there is one."""
        try:
            if self.bar:
                self.bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # whoever read this has gone: stop as if asked to
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
            signal.raise_signal(signal.SIGTERM)

    def write(self, row: dict[str, Any]) -> None:
        step = row["step"]
        if "val_loss" in row:
            more = "".join(f"  {name} {value:.4f}" for name, value in row.items() if name not in ("step", "tokens", "val_loss", "perplexity"))
            self.print(f"step {step:>6}/{self.n_steps}  val_loss {row['val_loss']:.4f}  perplexity {row['perplexity']:,.1f}{more}")
            return
        numbers = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_sec']:,.0f} tok/s"
        if self.bar:
            self.bar.update(self.task, completed=step, description=numbers)
            return
        now = time.monotonic()
        self.first = self.first or (step, now)
        eta = int((now - self.first[1]) / max(1, step - self.first[0]) * (self.n_steps - step))
        self.print(f"step {step:>6}/{self.n_steps}  {numbers}  eta {f'{eta // 60}:{eta % 60:02}' if step > self.first[0] else '-'}")

    def close(self) -> None:
        if self.bar:
            with contextlib.suppress(OSError):  # the terminal may have gone
                self.bar.stop()


class TextSamples(pl.Callback):
    """Every `every` steps, what the model makes of the prompts; drawn with a generator of its own, so that looking does
    not change the run."""

    NEW_TOKENS = 64

    def __init__(
        self, tokenizer: Any, prompts: list[str], every: int, temperature: float, seed: int, console: Console | None, rows: JsonlFile | None
    ):
        self.tokenizer, self.prompts, self.every, self.seed, self.console = tokenizer, prompts, every, seed, console
        self.sampling, self.rows, self.extra = SamplingConfig(temperature=temperature), rows, Extra("a text sample")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every:
            return
        pl_module.net.eval()
        for n, prompt in enumerate(self.prompts):
            with self.extra:
                self.sample(n, prompt, trainer.global_step, pl_module)
        pl_module.net.train()

    def sample(self, n: int, prompt: str, step: int, pl_module: pl.LightningModule) -> None:
        seed = int(np.random.SeedSequence([self.seed, step, n]).generate_state(1)[0])  # one for each prompt
        ids = self.tokenizer.begin(prompt)
        out = pl_module.net.generate(
            torch.tensor([ids], device=pl_module.device),
            self.NEW_TOKENS,
            self.sampling,
            eos_id=self.tokenizer.eos_id,
            generator=torch.Generator(pl_module.device).manual_seed(seed),
        )
        text = prompt + text_after(self.tokenizer, ids, out[0, len(ids) :].tolist())
        if self.console:
            self.console.print(f"step {step:>6} sample: {text!r}")
        if self.rows:
            self.rows.write({"step": step, "prompt": prompt, "text": text, "seed": seed})
