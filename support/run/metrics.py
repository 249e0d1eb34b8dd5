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


def perplexity(loss: float) -> float:
    """exp(loss): among how many tokens the model might as well choose evenly."""
    return math.exp(min(loss, 700.0))


class Metrics(pl.Callback):
    """One row for step 1 and every `log_every` steps, one for each validation; each goes to every sink.

    step_ms and what follows from it cover the steps since the row before, without data loading, validation
    and saving.
    """

    def __init__(self, sinks: list[Any], log_every: int, n_steps: int, sequences_per_step: int, device: str):
        self.sinks = [(sink, OptionalPart(sink.name)) for sink in sinks]
        self.log_every, self.n_steps, self.sequences_per_step, self.device = (
            log_every,
            n_steps,
            sequences_per_step,
            device,
        )
        self.measuring = OptionalPart("measuring memory and speed")
        self.seconds, self.steps, self.tokens_before = 0.0, 0, None
        self.began = 0.0

    def write(self, row: dict[str, Any]) -> None:
        for sink, extra in self.sinks:
            with extra:
                sink.write(row)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
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
                row["mfu"] = round(
                    pl_module.flops_per_token * tokens_per_sec / (peak * trainer.world_size), 4
                )
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
    """metrics.jsonl or samples.jsonl, written through row by row. On resume, rows of steps that will be
    run again are dropped first (`dropped` holds them). Rows that a full disk does not take are kept and
    written with a later one."""

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
    """Hands rows to a Lightning logger (TensorBoard, Weights & Biases), but for those it has had before,
    from a run that was killed and is resumed. One that fails `TRIES` times in a row, each of which may
    have waited for a network, is given up."""

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
    """Where the rows of metrics go besides the console: metrics.jsonl, and the loggers that the config asks
    for.

    A resumed run begins at `start_step`; each logger has each step once all the same. TensorBoard hides the
    steps that are run again, and Weights & Biases, which goes on with the run whose id is kept in the folder,
    is not given them again.
    """
    file = JsonlFile(folder / "metrics.jsonl", start_step)
    sinks = [file]
    if config.tensorboard:
        with OptionalPart("TensorBoard"):
            purge = {"purge_step": start_step + 1} if start_step else {}
            sinks.append(
                LoggerSink(pl.loggers.TensorBoardLogger(folder, name="tensorboard", version="", **purge))
            )
    if config.wandb:
        with OptionalPart("Weights & Biases"):
            id_file = folder / "wandb_id.txt"
            if not id_file.exists():
                with atomic_write(id_file) as new:
                    new.write(uuid.uuid4().hex[:8].encode())
            same_run = {"id": id_file.read_text("ascii").strip(), "resume": "allow"}
            logger = pl.loggers.WandbLogger(
                project="tiny-transformer", name=folder.name, save_dir=folder, **same_run
            )
            sinks.append(LoggerSink(logger, file.dropped))
    return sinks


class Console:
    """The run on the screen: a live bar on a terminal, plain lines elsewhere (and in files)."""

    name = "the console"

    def __init__(self, n_steps: int, start_step: int):
        self.n_steps, self.bar = n_steps, None
        self.first: tuple[int, float] | None = (
            None  # step and time of the first row, from which the rest is estimated
        )
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
            more = "".join(
                f"  {name} {value:.4f}"
                for name, value in row.items()
                if name not in ("step", "tokens", "val_loss", "perplexity")
            )
            self.print(
                f"step {step:>6}/{self.n_steps}  val_loss {row['val_loss']:.4f}  perplexity "
                f"{row['perplexity']:,.1f}{more}"
            )
            return
        numbers = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['tokens_per_sec']:,.0f} tok/s"
        if self.bar:
            self.bar.update(self.task, completed=step, description=numbers)
            return
        now = time.monotonic()
        self.first = self.first or (step, now)
        eta = int((now - self.first[1]) / max(1, step - self.first[0]) * (self.n_steps - step))
        self.print(
            f"step {step:>6}/{self.n_steps}  {numbers}  eta "
            f"{f'{eta // 60}:{eta % 60:02}' if step > self.first[0] else '-'}"
        )

    def close(self) -> None:
        if self.bar:
            with contextlib.suppress(OSError):  # the terminal may have gone
                self.bar.stop()


class TextSamples(pl.Callback):
    """Every `every` steps, what the model makes of the prompts; drawn with a generator of its own, so that
    looking does not change the run."""

    NEW_TOKENS = 64

    def __init__(
        self,
        tokenizer: Any,
        prompts: list[str],
        every: int,
        temperature: float,
        seed: int,
        console: Console | None,
        rows: JsonlFile | None,
    ):
        self.tokenizer, self.prompts, self.every, self.seed, self.console = (
            tokenizer,
            prompts,
            every,
            seed,
            console,
        )
        self.sampling, self.rows, self.extra = (
            SamplingConfig(temperature=temperature),
            rows,
            OptionalPart("a text sample"),
        )

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
        if self.rows:
            self.rows.write({"step": step, "prompt": prompt, "text": text, "seed": seed})
