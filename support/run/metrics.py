"""What a run reports: rows of metrics, the console, loggers, text samples."""

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

from sampling import SamplingConfig
from support.config.schema import LoggingConfig
from support.device import bf16_peak_flops, memory_used_mb
from support.files.atomic import atomic_write
from support.messages import OptionalPart, warn
from support.text.mid_document import text_after
from tokenizer import Tokenizer


def perplexity(loss: float) -> float:
    """exp(loss): guessing the next token is as hard as guessing among this many equally likely ones."""
    return math.exp(min(loss, 700.0))  # exp(710) is too large for a float


class Metrics(pl.Callback):
    """Makes the rows of metrics: one for step 1, one every `log_every` steps, and one for each validation.
    Each row goes to every sink (a file, a logger, the console).

    A new row or column belongs here. step_ms and the speeds cover the steps since the row before, without the
    time for data loading, validation and saving.
    """

    def __init__(
        self, *, sinks: list[Any], log_every: int, n_steps: int, sequences_per_step: int, device: str
    ):
        self.sinks = [(sink, OptionalPart(sink.name)) for sink in sinks]
        self.log_every = log_every
        self.n_steps = n_steps
        self.sequences_per_step = sequences_per_step
        self.device = device
        self.measuring = OptionalPart("measuring memory and speed")
        # Since the last row:
        self.seconds = 0.0
        self.steps = 0
        self.tokens_at_last_row: int | None = None
        self.step_started_at = 0.0

    def write(self, row: dict[str, Any]) -> None:
        """Give the row to every sink. If one fails, there is a warning, and the run continues."""
        for sink, optional in self.sinks:
            with optional:
                sink.write(row)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.tokens_at_last_row is None:
            self.tokens_at_last_row = pl_module.tokens_seen
        self.step_started_at = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.step_started_at
        self.steps += 1
        step = trainer.global_step
        if step == 1 or step % self.log_every == 0 or step == self.n_steps:
            self.write(self.train_row(trainer, pl_module))
            self.seconds = 0.0
            self.steps = 0
            self.tokens_at_last_row = pl_module.tokens_seen

    def train_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The row of a training step."""
        seconds = max(self.seconds, 1e-9)  # a coarse clock may show no time at all
        tokens_per_sec = (pl_module.tokens_seen - self.tokens_at_last_row) / seconds
        row = {
            "step": trainer.global_step,
            "tokens": pl_module.tokens_seen,
            **pl_module.step_metrics,
            "tokens_per_sec": round(tokens_per_sec, 1),
            "examples_per_sec": round(self.sequences_per_step * self.steps / seconds, 2),
            "step_ms": round(1000 * seconds / self.steps, 3),
        }
        with self.measuring:
            row["memory_mb"] = round(memory_used_mb(self.device), 1)
            peak = bf16_peak_flops(self.device)
            if peak:
                # "model FLOPs utilization": the share of the device's possible speed that the model uses
                mfu = pl_module.flops_per_token * tokens_per_sec / (peak * trainer.world_size)
                row["mfu"] = round(mfu, 4)
        return row

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
    """metrics.jsonl or samples.jsonl: each row is on disk as soon as it is written.

    On resume, the rows of steps that will run again are first removed from the file (`dropped` holds them).
    Rows that do not fit on a full disk are kept, and written together with a later one.
    """

    def __init__(self, path: Path, resume_step: int):
        self.name = path.name
        self.dropped: list[dict[str, Any]] = []
        kept = []
        if path.exists() and resume_step:
            for line in path.read_text("utf-8", "replace").splitlines():
                try:
                    row = json.loads(line)
                    is_kept = row["step"] <= resume_step
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # a line cut off by a kill
                if is_kept:
                    kept.append(line)
                else:
                    self.dropped.append(row)
        with atomic_write(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open until the run ends)
        self.waiting = b""

    def write(self, row: dict[str, Any]) -> None:
        """Add a row to the file, after any rows that could not be written before."""
        has_warned = bool(self.waiting)
        self.waiting += (json.dumps(row) + "\n").encode()
        size = os.fstat(self.file.fileno()).st_size
        try:
            rest = self.waiting
            while rest:  # one write may take only a part
                rest = rest[self.file.write(rest) :]
            self.waiting = b""
        except OSError as error:
            self.file.truncate(size)  # no half row
            if not has_warned:
                warn(f"{self.file.name} could not be written ({error.strerror}); its rows are kept for later")

    def close(self) -> None:
        self.file.close()


class LoggerSink:
    """Gives rows to a Lightning logger (TensorBoard, Weights & Biases), except those that it already got
    before the run was killed and resumed.

    After `MAX_FAILURES` failures in a row the logger gets no more rows, because each failure may take long
    (it may wait for a network).
    """

    MAX_FAILURES = 3

    def __init__(self, logger: Any, already_logged: list[dict[str, Any]] = ()):
        self.logger = logger
        self.name = type(logger).__name__
        self.failures = 0
        self.already_logged = {self.key_of(row) for row in already_logged}

    @staticmethod
    def key_of(row: dict[str, Any]) -> tuple[int, bool]:
        """(step, whether it is a row of a validation). No two rows of a run have the same key."""
        return row["step"], "val_loss" in row

    def write(self, row: dict[str, Any]) -> None:
        if self.failures == self.MAX_FAILURES or self.key_of(row) in self.already_logged:
            return
        self.failures += 1  # taken back below, unless the logger raises an error
        self.logger.log_metrics({key: value for key, value in row.items() if key != "step"}, step=row["step"])
        self.logger.save()
        self.failures = 0

    def close(self) -> None:
        self.logger.finalize("finished")


def make_sinks(config: LoggingConfig, folder: Path, start_step: int) -> list[Any]:
    """Where the rows of metrics go besides the console: metrics.jsonl, and the loggers that the config names.

    Every logger shows each step once, also after a run resumes at `start_step`: for steps that run again,
    TensorBoard hides the old rows, and Weights & Biases does not get the new ones.
    """
    file = JsonlFile(folder / "metrics.jsonl", start_step)
    sinks = [file]
    if config.tensorboard:
        with OptionalPart("TensorBoard"):
            sinks.append(LoggerSink(tensorboard_logger(folder, start_step)))
    if config.wandb:
        with OptionalPart("Weights & Biases"):
            sinks.append(LoggerSink(wandb_logger(folder), already_logged=file.dropped))
    return sinks


def tensorboard_logger(folder: Path, start_step: int) -> Any:
    """A logger that writes to the folder "tensorboard", and hides what is there from `start_step` + 1 on."""
    purge = {"purge_step": start_step + 1} if start_step else {}
    return pl.loggers.TensorBoardLogger(folder, name="tensorboard", version="", **purge)


def wandb_logger(folder: Path) -> Any:
    """A logger for Weights & Biases. It continues the run whose id is in the folder, or starts one."""
    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        with atomic_write(id_file) as file:
            file.write(uuid.uuid4().hex[:8].encode())
    return pl.loggers.WandbLogger(
        project="tiny-transformer",
        name=folder.name,
        save_dir=folder,
        id=id_file.read_text("ascii").strip(),
        resume="allow",
    )


class Console:
    """The run on the screen: a live bar on a terminal, plain lines elsewhere (and in files)."""

    name = "the console"

    def __init__(self, n_steps: int, start_step: int):
        self.n_steps = n_steps
        self.first_row: tuple[int, float] | None = None  # its step and time, to estimate the time left
        self.bar = None
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
        """Print a line that stays; it is above the bar, if there is one."""
        try:
            if self.bar:
                self.bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)
        except BrokenPipeError:  # nobody reads our output any more (`| head`): stop, as after a SIGTERM
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
            signal.raise_signal(signal.SIGTERM)

    def write(self, row: dict[str, Any]) -> None:
        if "val_loss" in row:
            self._write_validation(row)
        else:
            self._write_step(row)

    def _write_validation(self, row: dict[str, Any]) -> None:
        shown_first = ("step", "tokens", "val_loss", "perplexity")
        more = "".join(f"  {name} {value:.4f}" for name, value in row.items() if name not in shown_first)
        self.print(
            f"step {row['step']:>6}/{self.n_steps}  val_loss {row['val_loss']:.4f}  perplexity "
            f"{row['perplexity']:,.1f}{more}"
        )

    def _write_step(self, row: dict[str, Any]) -> None:
        step = row["step"]
        numbers = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_sec']:,.0f} tok/s"
        if self.bar:
            self.bar.update(self.task, completed=step, description=numbers)
        else:
            self.print(f"step {step:>6}/{self.n_steps}  {numbers}  eta {self._time_left(step)}")

    def _time_left(self, step: int) -> str:
        """Minutes and seconds until the last step, at the speed since the first row; "-" in the first row."""
        time_now = time.monotonic()
        if self.first_row is None:
            self.first_row = (step, time_now)
            return "-"
        first_step, first_time = self.first_row
        seconds = int((time_now - first_time) / max(1, step - first_step) * (self.n_steps - step))
        return f"{seconds // 60}:{seconds % 60:02}"

    def close(self) -> None:
        if self.bar:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self.bar.stop()


class TextSamples(pl.Callback):
    """Shows how the model continues each of the prompts, every `every` steps. The texts are drawn with a
    random generator of their own, so that they do not change the run."""

    NEW_TOKENS = 64

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        prompts: list[str],
        every: int,
        temperature: float,
        seed: int,
        console: Console | None,
        file: JsonlFile | None,
    ):
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.every = every
        self.sampling = SamplingConfig(temperature=temperature)
        self.seed = seed
        self.console = console
        self.file = file
        self.optional = OptionalPart("a text sample")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % self.every:
            return
        pl_module.net.eval()
        for number, prompt in enumerate(self.prompts):
            with self.optional:
                self.sample(number, prompt, step, pl_module)
        pl_module.net.train()

    def sample(self, number: int, prompt: str, step: int, pl_module: pl.LightningModule) -> None:
        """Print and write one continuation."""
        sequence = np.random.SeedSequence([self.seed, step, number])
        seed = int(sequence.generate_state(1)[0])  # each prompt has its own
        ids = self.tokenizer.encode_prompt(prompt)
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
        if self.file:
            self.file.write({"step": step, "prompt": prompt, "text": text, "seed": seed})
