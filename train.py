"""Train a language model from a config file.

python3 train.py --config config_smoke.yaml
python3 train.py --config config_smoke.yaml --override data.path=my_book.txt --override training.max_steps=1000
python3 train.py --config config.yaml --resume                  # go on where this config's run stopped
python3 train.py --config config.yaml --check                   # test everything, change nothing
python3 train.py --config config_smoke.yaml --show-step 3       # the exact text that step 3 trains on
"""

import argparse
import contextlib
import functools
import itertools
import json
import logging
import math
import sys
import warnings
from pathlib import Path

from support.cli import add_run_flags, guarded, make_parser
from support.messages import OptionalPart, UserError, is_main_process, warn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_run_flags(parser)
    return parser.parse_args(argv)


def plan_or_answer(argv: list[str] | None = None) -> "Plan":
    """The checked plan of a run. With --check or --show-step: print the answer and exit. Raises UserError."""
    args = parse_args(argv)
    from support.run.checklist import run_checks
    from support.run.plan import plan_run
    from support.run.show import show_step

    if args.check:
        sys.exit(run_checks(args, finetuning=False))
    plan = plan_run(args, finetuning=False, only_looks=args.show_step is not None)
    if args.show_step is not None:
        print(show_step(plan, args.show_step))
        sys.exit(0)
    return plan


if __name__ == "__main__":
    # A user's mistake is answered here, before the slow imports below; Lightning's is slower than all others.
    plan = guarded(plan_or_answer, results=False)
    from train import LitCausalLM, run  # this file again, as a module

    sys.exit(guarded(run, plan, LitCausalLM))

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from data import Batch, Step, make_dataloaders, step_shape
from model import GPTMini
from optim import build_optimizer, lr_factor, set_learning_rate
from support.checkpoint import FORMAT_VERSION, KEY, read_metadata, weights_sha256
from support.chunked_loss import IGNORE
from support.files.atomic import claim_folder
from support.find_checkpoints import find_latest_checkpoint
from support.plots import draw_loss
from support.run.folder import move_aside, write_run_config
from support.run.guards import explain, how_to_resume, why_no_gradient
from support.run.metrics import Console, JsonlFile, Metrics, TextSamples, make_sinks, perplexity
from support.run.plan import Plan
from support.run.saving import AtomicCheckpointIO, CheckpointSaver, StopOnSignal, StopRun, name_checkpoint
from support.run.show import print_header
from support.run.starting_weights import starting_net
from support.weights import first_not_finite

LEARNED = 1e-3  # nats: below such a loss a gradient may round to zero, because there is nothing left to learn


class LitCausalLM(pl.LightningModule):
    """The training of a GPTMini: loss, gradients, clipping, learning rate, step; in the open, not inside a
    trainer."""

    validates_first = False  # whether the network is validated before its first step too

    def __init__(self, plan: Plan, net: GPTMini):
        super().__init__()
        self.automatic_optimization = False  # `training_step` does it all, in the order a textbook gives
        self.plan, self.config, self.net = plan, plan.config, net
        self.tokens_seen = 0
        self.best_val_loss = self.val_loss = math.inf
        self.best_step: int | None = None
        self.stream_state: str | None = None
        self.step_metrics: dict[str, float] = {}
        self.val_metrics: dict[str, float] = {}  # what a validation gives beside the loss
        self.flops_per_token = net.flops_per_token(max(plan.row_lengths))

    def configure_model(self) -> None:
        """Under FSDP, cut every block's weights over the processes (called by Lightning on each of them)."""
        if self.config.hardware.strategy == "fsdp" and self.plan.world > 1:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for part in (*self.net.layers, self.net):
                fully_shard(part, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or Muon with their parameter groups. The learning rate is set at each step, from the step."""
        return build_optimizer(self.net, self.config.training)

    def training_step(self, step: Step, batch_idx: int) -> None:
        """One optimizer step. The gradient is that of the mean loss over all targets of the step, over
        micro-batches and processes, so how the step is cut up changes nothing but rounding."""
        training, number = self.config.training, self.trainer.global_step
        self.stream_state = step.stream_state
        optimizer = self.optimizers()
        n_targets = self.sum_over_processes(
            sum((batch["labels"] != IGNORE).sum() for batch in step.micro_batches)
        ).clamp(min=1)
        loss_total = torch.zeros((), device=self.device)
        for micro, batch in enumerate(step.micro_batches):
            self.seed_dropout(number, micro)
            is_last = micro + 1 == len(step.micro_batches)
            with contextlib.nullcontext() if is_last else self.gradients_stay_local():
                loss_sum, _ = self.net(**batch)
                # DDP and FSDP average gradients over processes; times world_size that is their sum.
                self.manual_backward(loss_sum * self.trainer.world_size / n_targets)
            loss_total += loss_sum.detach()
        loss = (self.sum_over_processes(loss_total) / n_targets).item()
        grad_norm = float(
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), training.grad_clip or math.inf)
        )
        self.refuse_bad_numbers(number, loss, grad_norm)
        factor = lr_factor(
            number,
            training.schedule,
            training.warmup_steps,
            training.schedule_steps,
            floor=training.min_lr / training.lr,
        )
        set_learning_rate(optimizer, factor)
        optimizer.step()
        optimizer.zero_grad()
        self.tokens_seen += int(n_targets)
        self.step_metrics = {"loss": loss, "lr": training.lr * factor, "grad_norm": grad_norm}

    def seed_dropout(self, step: int, micro: int) -> None:
        """Random numbers are a function of (seed, step), not of what was drawn before: a resume needs no
        state."""
        index = step_shape(self.config, self.global_rank, self.trainer.world_size).micro_index(step, micro)
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, index]).generate_state(1)[0]))

    def sum_over_processes(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value, reduce_op="sum") if self.trainer.world_size > 1 else value

    def gradients_stay_local(self) -> contextlib.AbstractContextManager:
        """Until the last micro-batch there is nothing to send to the other processes (DDP's no_sync)."""
        return (
            self.trainer.strategy.block_backward_sync()
            if self.trainer.world_size > 1
            else contextlib.nullcontext()
        )

    def refuse_bad_numbers(self, step: int, loss: float, grad_norm: float) -> None:
        """Stop before weights are touched by a NaN or an infinity, and so before a checkpoint could hold
        one; and where no weight would be touched at all."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"loss={loss}, gradient norm={grad_norm} on {self.samples_of(step)}"
            raise self.bad_numbers(f"step {step + 1}: {what}; the weights are as before this step", step)
        if grad_norm == 0 and loss > LEARNED:
            raise UserError(
                f"step {step + 1}: every gradient is zero while the loss is {loss:.4f}, so nothing would "
                "be learned; the weights are as "
                f"before this step\n       try {why_no_gradient(self.config)}"
            )

    def refuse_bad_weights(self) -> None:
        """A step can also throw the weights out of range by its size, with a gradient that was finite.
        None is saved."""
        tensors = {"weights": self.net.state_dict(), "optimizer": self.optimizers().state_dict()["state"]}
        bad = first_not_finite(tensors)
        if self.trainer.world_size > 1:
            bad = (
                (bad or "a shard of them")
                if self.trainer.strategy.reduce_boolean_decision(bad is not None, all=False)
                else None
            )
        if bad:
            step = self.trainer.global_step
            raise self.bad_numbers(
                f"step {step}: {bad} is not finite any more; nothing of it has been saved", step - 1
            )

    def bad_numbers(self, what: str, step: int) -> UserError:
        last = find_latest_checkpoint(self.plan.folder)
        return UserError(
            f"{what}\n       last good checkpoint: {last or 'none yet'}; look at the text by --show-step "
            f"{step + 1}\n"
            "       try a lower training.lr, a longer training.warmup_steps, grad_clip=1.0 or "
            "hardware.precision=32-true"
        )

    def samples_of(self, step: int) -> str:
        """Which text a step trains on, in words: `samples 16 to 23 (blocks 4, 91, ...)`, or a stream's
        position."""
        if self.plan.data.streaming:
            position = json.loads(self.stream_state)
            return (
                f"a stream, before document {position['used']} of group {position['group']} in epoch "
                f"{position['epoch']}"
            )
        size = self.plan.sequences_per_step
        blocks = [
            self.trainer.train_dataloader.dataset.block_of(k) for k in range(step * size, (step + 1) * size)
        ]
        shown = ", ".join(map(str, blocks[:8])) + (", ..." if size > 8 else "")
        return f"samples {step * size} to {(step + 1) * size - 1} (blocks {shown})"

    def on_validation_epoch_start(self) -> None:
        self.val_sums, self.train_eval_sums = (
            torch.zeros((), device=self.device),
            torch.zeros(2, device=self.device),
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_sums = self.val_sums + self.validation_sums(batch)
        if batch_idx == 0:
            for seen in self.train_eval_batches:
                self.train_eval_sums += self.loss_sums(
                    {name: tensor.to(self.device) for name, tensor in seen.items()}
                )

    @functools.cached_property
    def train_eval_batches(self) -> list[Batch]:
        """The first micro-batches of the run, to measure the loss on training text as that on validation
        text is measured."""
        n, hardware = (
            self.config.training.train_eval_batches,
            self.config.hardware.model_copy(update={"num_workers": 0}),
        )
        config, plan = self.config.model_copy(update={"hardware": hardware}), self.plan
        steps, _ = make_dataloaders(
            config, plan.data, plan.tokenizer, n, 0, self.global_rank, self.trainer.world_size
        )
        if n == 0:
            return []
        return list(itertools.islice((batch for step in steps for batch in step.micro_batches), n))

    def loss_sums(self, batch: Batch) -> Tensor:
        """(2,): the summed loss of a batch, and the number of its targets."""
        loss_sum, n_targets = self.net(**batch)
        return torch.stack([loss_sum, n_targets.to(loss_sum.dtype)])

    def validation_sums(self, batch: Batch) -> Tensor:
        """What is added up over the validation set: the summed loss, the number of targets, and what a
        subclass adds."""
        return self.loss_sums(batch)

    def on_validation_epoch_end(self) -> None:
        """The loss over all validation targets, however they were batched."""
        loss_sum, n_targets, *more = self.sum_over_processes(self.val_sums).tolist()
        self.val_loss, step = loss_sum / max(1.0, n_targets), self.trainer.global_step
        if not math.isfinite(self.val_loss):
            raise self.bad_numbers(f"step {step}: val_loss={self.val_loss} on the validation text", step - 1)
        self.val_metrics = self.metrics_of(n_targets, more)
        if self.config.training.train_eval_batches:
            loss_sum, n_targets = self.sum_over_processes(self.train_eval_sums).tolist()
            self.val_metrics["train_eval_loss"] = loss_sum / max(1.0, n_targets)

    def metrics_of(self, n_targets: float, sums: list[float]) -> dict[str, float]:
        """`val_metrics` from the sums that a subclass adds."""
        return {}

    def train_dataloader(self):
        return self._dataloaders()[0]

    def val_dataloader(self):
        return self._dataloaders()[1]

    def _dataloaders(self):
        """Made here because only now the process's rank, and the step to begin with, are known."""
        return make_dataloaders(
            self.config,
            self.plan.data,
            self.plan.tokenizer,
            self.plan.n_steps,
            self.trainer.global_step,
            self.global_rank,
            self.trainer.world_size,
            self.stream_state,
        )

    def number_parameters(self, saved: dict) -> None:
        """Let the saved optimizer number its parameters as the module does, not as its groups do: FSDP
        takes that for granted, and would else give a parameter the momentum of another."""
        place = {parameter: i for i, parameter in enumerate(self.parameters())}
        number = {}
        for group, live in zip(saved["param_groups"], self.trainer.optimizers[0].param_groups, strict=True):
            number |= {
                old: place[parameter] for old, parameter in zip(group["params"], live["params"], strict=True)
            }
            group["params"] = [number[old] for old in group["params"]]
        saved["state"] = {number[old]: state for old, state in saved["state"].items()}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Make the file complete: whoever has it needs nothing else to sample, evaluate or go on. Plain
        types only."""
        if self.trainer.is_global_zero:
            self.number_parameters(checkpoint["optimizer_states"][0])
        step = self.trainer.global_step
        epoch = (
            None
            if self.plan.data.streaming
            else step * self.plan.sequences_per_step / len(self.plan.data.train)
        )
        finite = {
            name: value if math.isfinite(value) else None
            for name, value in (("val_loss", self.val_loss), ("best_val_loss", self.best_val_loss))
        }
        checkpoint[KEY] = {
            "format_version": FORMAT_VERSION,
            "model": self.plan.model_config.model_dump(),
            "tokenizer": self.plan.tokenizer.to_dict(),
            "config": self.config.to_dict(),
            "template": self.config.template and self.config.template.model_dump(),
            "lora": self.config.lora and self.config.lora.model_dump(),
            "metrics": {
                "step": step,
                "epoch": epoch,
                "tokens": self.tokens_seen,
                "train_loss": self.step_metrics.get("loss"),
                "lr": self.step_metrics.get("lr"),
                **finite,
                "perplexity": perplexity(self.val_loss) if finite["val_loss"] is not None else None,
                "best_step": self.best_step,
                **self.val_metrics,
            },
            "stream_state": self.stream_state,
            "data_fingerprint": self.plan.data.fingerprint,
            "sequences_per_step": self.plan.sequences_per_step,
            "run": self.plan.record,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        metrics = checkpoint[KEY]["metrics"]
        self.tokens_seen, self.stream_state = metrics["tokens"], checkpoint[KEY]["stream_state"]
        self.val_loss, self.best_val_loss = (
            math.inf if metrics[name] is None else metrics[name] for name in ("val_loss", "best_val_loss")
        )
        self.best_step = metrics.get("best_step")


def make_callbacks(
    plan: Plan, start_step: int, sinks: list, console: Console | None, stop: StopOnSignal
) -> list[pl.Callback]:
    """Metrics before checkpoints, so that no row is lost between the two; files and console in the main
    process only."""
    training = plan.config.training
    callbacks = [
        Metrics(sinks, training.log_every, plan.n_steps, plan.sequences_per_step, plan.device),
        stop,
        CheckpointSaver(plan, stop),
    ]
    if training.sample_every:
        sampling = (
            training.sample_prompts,
            training.sample_every,
            training.sample_temperature,
            plan.config.seed,
        )
        rows = JsonlFile(plan.folder / "samples.jsonl", start_step) if console else None
        callbacks.append(TextSamples(plan.tokenizer, *sampling, console, rows))
    return callbacks


def build_trainer(plan: Plan, callbacks: list[pl.Callback], validates_first: bool) -> pl.Trainer:
    """Lightning's engine: devices, processes, precision, the loop over steps. The rest of its offers is
    switched off."""
    hardware = plan.config.hardware
    strategy = "auto"
    if plan.world > 1 and hardware.strategy == "fsdp":
        strategy = ModelParallelStrategy(
            data_parallel_size=plan.world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    elif plan.world > 1:
        strategy = DDPStrategy()
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(plan.device, plan.device),
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=strategy,
        precision=plan.precision,
        deterministic=hardware.deterministic,
        max_steps=plan.n_steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=plan.config.training.val_every,
        num_sanity_val_steps=-1
        if validates_first
        else 0,  # Lightning's check before the first step; -1 is all of it
        use_distributed_sampler=False,
        logger=False,  # ours are given rows and nothing else, and their failures end nothing
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quiet_lightning() -> None:
    """Its notices about loggers, devices and dataloaders do not help a reader of ours; errors still show."""
    for name in (
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


def train(plan: Plan, start_step: int, console: Console | None, module_class: type[LitCausalLM]) -> None:
    """Build network, module and trainer, and run. Raises StopRun after a signal."""
    quiet_lightning()
    net = starting_net(plan.model_config, plan.config, from_base=plan.resume_from is None)
    module = module_class(plan, net)
    if console:
        with OptionalPart("the summary of the run"):
            print_header(plan, net, start_step)
    if plan.config.training.compile:
        net.compile()  # in place: torch.compile(net) would rename every weight in the checkpoint
    stop, sinks = (
        StopOnSignal(),
        [*make_sinks(plan.config.logging, plan.folder, start_step), console] if console else [],
    )
    trainer = build_trainer(
        plan, make_callbacks(plan, start_step, sinks, console, stop), module.validates_first
    )
    try:
        with stop:
            trainer.fit(module, ckpt_path=plan.resume_from, weights_only=True)
    finally:
        for sink in sinks:
            with OptionalPart(f"closing {sink.name}"):
                sink.close()
    if (
        plan.n_steps == 0
    ):  # nothing was trained, so nothing was saved: keep the untrained model, to compare with
        next(c for c in trainer.callbacks if isinstance(c, CheckpointSaver)).save(trainer, module)


def draw(folder: Path) -> Path | None:
    """The curves. Whatever goes wrong with them must not hide what has been saved."""
    with OptionalPart(f"drawing the curves in {folder}"):
        return draw_loss(folder)
    return None


def finish(plan: Plan) -> None:
    """Draw the curves; say where things are."""
    drawn = draw(plan.folder)
    final = plan.folder / "final.ckpt"
    if not final.exists():  # a full disk: the warning has said so
        print(
            f"done, but {final} could not be written; make room, and the same command with --resume writes it"
        )
        return
    metrics = read_metadata(final)["metrics"]
    best = f", best val_loss {metrics['best_val_loss']:.4f}" if metrics["best_val_loss"] is not None else ""
    print(f"done: {final} at step {metrics['step']}{best}" + (f"; curves in {drawn}" if drawn else ""))
    print(f"weights sha256 {weights_sha256(final)}")


def nothing_left(plan: Plan, metrics: dict) -> None:
    """The checkpoint is at the run's end already; if a kill came right behind it, its names are still
    missing."""
    if plan.resumes_in_place and not (plan.folder / "final.ckpt").exists():
        lock = claim_folder(plan.folder)
        name_checkpoint(plan.resume_from, best=metrics.get("best_step") == metrics["step"], final=True)
        finish(plan)
        lock.release()
        return
    print(
        f"{plan.resume_from} is at step {metrics['step']} of {plan.n_steps}: nothing left to do; raise "
        "training.max_steps to go on"
    )


def run(plan: Plan, module_class: type[LitCausalLM]) -> int:
    """Train as planned, with everything around it: the folder, what is said, what a user can do about what
    goes wrong."""
    resumed = read_metadata(plan.resume_from) if plan.resume_from else None
    start_step = resumed["metrics"]["step"] if resumed else 0
    if start_step and start_step >= plan.n_steps:
        if is_main_process():
            nothing_left(plan, resumed["metrics"])
        return 0
    lock = console = None
    if is_main_process():
        lock = claim_folder(plan.folder)
        if not plan.resumes_in_place and (moved := move_aside(plan.folder)):
            print(f"the earlier run in {plan.folder} has been moved to {moved}")
        write_run_config(plan.folder, plan.config, plan.record)
        if resumed and plan.record["threads"] != resumed["run"]["threads"]:
            warn(
                "the number of CPU threads differs from the run's before; sums round differently, so the "
                "resume is not bit for bit"
            )
        console = Console(plan.n_steps, start_step)
    try:
        train(plan, start_step, console, module_class)
    except StopRun as stop:
        if console:
            console.close()
            draw(plan.folder)
            print(f"stopped; {how_to_resume(plan)}")
        return (
            stop.code if console else 0
        )  # Lightning kills the main process where a further one ends with another status
    except Exception as error:
        if isinstance(error, UserError) or (advice := explain(error, plan)) is None:
            raise
        if not is_main_process():  # the others may not have met it
            print(f"warning: a further process: {advice}", file=sys.stderr)
        raise advice from None
    finally:
        if console:
            console.close()
        if lock:
            lock.release()
    if console:
        finish(plan)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run(plan_or_answer(argv), LitCausalLM)
