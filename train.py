"""Train a language model from a config file.

python3 train.py --config config_smoke.yaml
python3 train.py --config config_smoke.yaml --override data.path=book.txt --override training.max_steps=1000
python3 train.py --config config.yaml --resume                  # continue where this config's run stopped
python3 train.py --config config.yaml --check                   # test everything, change nothing
python3 train.py --config config_smoke.yaml --show-step 3       # the exact text that step 3 trains on
"""

import argparse
import contextlib
import functools
import itertools
import math
import sys
from typing import Any

from support.cli import add_run_flags, guarded, make_parser
from support.messages import OptionalPart, UserError, is_main_process, warn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
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
    # A user's mistake is answered here, before the slow imports below; Lightning is the slowest to import.
    plan = guarded(plan_or_answer, results=False)
    from train import LitCausalLM, run  # this file again, as a module

    sys.exit(guarded(run, plan, LitCausalLM))

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from data import Batch, Step, make_dataloaders, step_shape
from model import GPTMini
from optim import build_optimizer, scheduled_factor, set_learning_rate
from support.checkpoint import KEY, build_metadata, read_metadata
from support.chunked_loss import IGNORE
from support.files.atomic import claim_folder
from support.run.compiling import eagerly_if_compiling_fails
from support.run.folder import move_aside, write_run_config
from support.run.guards import explain, how_to_resume, refuse_bad_step, refuse_bad_val_loss
from support.run.metrics import Console, make_sinks, perplexity
from support.run.plan import Plan
from support.run.saving import CheckpointSaver, StopOnSignal, StopRun, name_checkpoint, number_parameters
from support.run.show import draw_curves, print_end, print_header
from support.run.starting_weights import starting_net
from support.run.trainer import build_trainer, make_callbacks, quiet_lightning


class LitCausalLM(pl.LightningModule):
    """The training of a GPTMini: loss, gradients, clipping, learning rate and optimizer step, written out
    here instead of hidden in a trainer. Lightning calls the methods whose names it knows (`training_step`,
    `configure_...`, `on_...`) when their time comes."""

    validates_first = False  # whether to validate before the first step too

    def __init__(self, plan: Plan, net: GPTMini):
        super().__init__()
        self.automatic_optimization = False  # `training_step` does it all, in the order a textbook gives
        self.plan = plan
        self.config = plan.config
        self.net = net
        self.flops_per_token = net.flops_per_token(max(plan.row_lengths))
        self.tokens_seen = 0
        self.val_loss = math.inf
        self.best_val_loss = math.inf
        self.best_step: int | None = None
        self.stream_state: str | None = None
        self.step_metrics: dict[str, float] = {}
        self.val_metrics: dict[str, float] = {}  # what a validation measures besides the loss

    def configure_model(self) -> None:
        """FSDP: each process keeps only a part of each weight, and collects the rest while a block runs.
        Lightning calls this in each process."""
        if self.config.hardware.strategy == "fsdp" and self.plan.world > 1:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]  # the processes that share the weights
            # Each block is collected on its own. The last call takes what is left: embeddings, norm, head.
            for part in (*self.net.layers, self.net):
                fully_shard(part, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or Muon with their parameter groups. `training_step` sets the learning rate of each step."""
        return build_optimizer(self.net, self.config.training)

    # ---- a training step -------------------------------------------------------------------------

    def training_step(self, step: Step, batch_idx: int) -> None:
        """One optimizer step.

        All micro-batches in all processes count as one big batch: the loss is the mean over all its targets
        (labels that are scored). So splitting a step differently changes only rounding.
        """
        step_index = self.trainer.global_step  # the number of this step: 0, 1, ...
        training = self.config.training
        optimizer = self.optimizers()
        self.stream_state = step.stream_state

        n_targets = sum((batch["labels"] != IGNORE).sum() for batch in step.micro_batches)
        n_targets = self.sum_over_processes(n_targets).clamp(min=1)  # not 0: we divide by it
        loss_total = self.forward_and_backward(step, n_targets)
        loss = self.sum_over_processes(loss_total) / n_targets
        # Without a limit the norm is still measured, and nothing is clipped.
        grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), training.grad_clip or math.inf)

        # Python runs ahead of a GPU, and waits for it where it asks for a number. So ask at one place, where
        # the GPU has computed all of them.
        loss, grad_norm, n_targets = loss.item(), float(grad_norm), int(n_targets)
        self.refuse_bad_step(step_index, loss, grad_norm)

        factor = scheduled_factor(step_index, training)
        set_learning_rate(optimizer, factor)
        optimizer.step()
        optimizer.zero_grad()

        self.tokens_seen += n_targets
        self.step_metrics = {"loss": loss, "lr": training.lr * factor, "grad_norm": grad_norm}

    @eagerly_if_compiling_fails
    def forward_and_backward(self, step: Step, n_targets: Tensor) -> Tensor:
        """Add up the gradient of the mean loss over all micro-batches; returns their summed loss."""
        loss_total = torch.zeros((), device=self.device)
        for micro, batch in enumerate(step.micro_batches):
            self.seed_dropout(self.trainer.global_step, micro)
            is_last = micro + 1 == len(step.micro_batches)
            with contextlib.nullcontext() if is_last else self.gradients_stay_local():
                loss_sum, _ = self.net(**batch)
                # DDP and FSDP average gradients over processes; times world_size this is their sum.
                self.manual_backward(loss_sum * self.trainer.world_size / n_targets)
            loss_total += loss_sum.detach()
        return loss_total

    def seed_dropout(self, step: int, micro: int) -> None:
        """Seed the random numbers of a micro-batch with (seed, its number in the whole run), whatever was
        drawn before. So a resume needs no saved state of a random generator."""
        index = step_shape(self.config, self.global_rank, self.trainer.world_size).micro_index(step, micro)
        # SeedSequence mixes both into one seed: micro-batches n and n + 1 get unrelated random numbers.
        seed = int(np.random.SeedSequence([self.config.seed, index]).generate_state(1)[0])
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # the line below seeds GPUs too, and takes 0.5 ms
        else:
            torch.manual_seed(seed)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, in each of them; with one process, `value` itself."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def gradients_stay_local(self) -> contextlib.AbstractContextManager:
        """A context in which gradients are not sent to the other processes (DDP's no_sync). It is enough to
        send them with the last micro-batch."""
        if self.trainer.world_size == 1:
            return contextlib.nullcontext()
        return self.trainer.strategy.block_backward_sync()

    def refuse_bad_step(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise UserError if the loss or the gradient is a NaN or an infinity, before it gets into the
        weights."""
        refuse_bad_step(
            self.plan,
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            dataset=self.trainer.train_dataloader.dataset,
            stream_state=self.stream_state,
        )

    # ---- validation ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.val_sums = torch.zeros((), device=self.device)  # the first batch makes it as long as its sums

    @eagerly_if_compiling_fails
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the sums of a batch. With the first one, measure the `train_eval_batches` too."""
        if batch_idx == 0:
            self.train_eval_sums = torch.zeros(2, device=self.device)
            for seen in self.train_eval_batches:
                on_device = {name: tensor.to(self.device) for name, tensor in seen.items()}
                self.train_eval_sums += self.loss_sums(on_device)
        self.val_sums = self.val_sums + self.validation_sums(batch)

    @functools.cached_property
    def train_eval_batches(self) -> list[Batch]:
        """The first micro-batches of the run. Their loss is measured in the same way as the validation
        loss."""
        hardware = self.config.hardware.model_copy(update={"num_workers": 0})  # too few to start a worker
        n_batches = self.config.training.train_eval_batches
        steps, _ = make_dataloaders(
            self.config.model_copy(update={"hardware": hardware}),
            self.plan.data,
            self.plan.tokenizer,
            n_steps=n_batches,
            rank=self.global_rank,
            world=self.trainer.world_size,
        )
        micro_batches = (batch for step in steps for batch in step.micro_batches)
        return list(itertools.islice(micro_batches, n_batches))

    def loss_sums(self, batch: Batch) -> Tensor:
        """The summed loss of a batch, and the number of its targets: one tensor (2,), so that one sum over
        processes adds both."""
        loss_sum, n_targets = self.net(**batch)
        return torch.stack([loss_sum, n_targets.to(loss_sum.dtype)])

    def validation_sums(self, batch: Batch) -> Tensor:
        """What a validation adds up: summed loss and number of targets; a subclass may add more."""
        return self.loss_sums(batch)

    def on_validation_epoch_end(self) -> None:
        """Set `val_loss` to the mean over all validation targets, whatever the size of their batches."""
        loss_sum, n_targets, *more = self.sum_over_processes(self.val_sums).tolist()
        self.val_loss = loss_sum / max(1.0, n_targets)
        refuse_bad_val_loss(self.plan, step=self.trainer.global_step, val_loss=self.val_loss)
        self.val_metrics = self.metrics_of(n_targets, more)
        if self.config.training.train_eval_batches:
            loss_sum, n_targets = self.sum_over_processes(self.train_eval_sums).tolist()
            self.val_metrics["train_eval_loss"] = loss_sum / max(1.0, n_targets)

    def metrics_of(self, n_targets: float, sums: list[float]) -> dict[str, float]:
        """`val_metrics` from `sums`, which a subclass adds in `validation_sums`. Here there are none."""
        return {}

    # ---- data ------------------------------------------------------------------------------------

    # Lightning calls these two when training starts. Making both and keeping one is cheap: it reads nothing.

    def train_dataloader(self):
        if self.plan.data.streaming:
            _ = self.train_eval_batches  # a stream has one reader at a time: read these before training
        return self._dataloaders()[0]

    def val_dataloader(self):
        return self._dataloaders()[1]

    def _dataloaders(self):
        """(train, val), made only now: the rank of the process and the first step were not known before."""
        return make_dataloaders(
            self.config,
            self.plan.data,
            self.plan.tokenizer,
            n_steps=self.plan.n_steps,
            start_step=self.trainer.global_step,
            rank=self.global_rank,
            world=self.trainer.world_size,
            stream_state=self.stream_state,
        )

    # ---- checkpoints -----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Make the file complete: it alone is enough to sample, evaluate or resume. Only plain types, so that
        nobody has to run code to read it."""
        if self.trainer.is_global_zero:
            saved, live = checkpoint["optimizer_states"][0], self.trainer.optimizers[0]
            number_parameters(saved, live, self.parameters())
        checkpoint[KEY] = build_metadata(
            model=self.plan.model_config,
            tokenizer=self.plan.tokenizer,
            config=self.config.to_dict(),
            template=self.config.template,
            lora=self.config.lora,
            metrics=self.checkpoint_metrics(),
            run=self.plan.record,
            stream_state=self.stream_state,
            data_fingerprint=self.plan.data.fingerprint,
            sequences_per_step=self.plan.sequences_per_step,
        )

    def checkpoint_metrics(self) -> dict[str, Any]:
        """The numbers that a checkpoint holds; None for those not known yet."""
        step = self.trainer.global_step
        epoch = None
        if not self.plan.data.streaming:
            epoch = step * self.plan.sequences_per_step / len(self.plan.data.train)
        validated = math.isfinite(self.val_loss)
        return {
            "step": step,
            "epoch": epoch,
            "tokens": self.tokens_seen,
            "train_loss": self.step_metrics.get("loss"),
            "lr": self.step_metrics.get("lr"),
            "val_loss": self.val_loss if validated else None,
            "best_val_loss": self.best_val_loss if math.isfinite(self.best_val_loss) else None,
            "perplexity": perplexity(self.val_loss) if validated else None,
            "best_step": self.best_step,
            **self.val_metrics,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Take back what `on_save_checkpoint` stored; Lightning does the same for weights and optimizer."""
        metrics = checkpoint[KEY]["metrics"]
        self.tokens_seen = metrics["tokens"]
        self.stream_state = checkpoint[KEY]["stream_state"]
        self.val_loss = math.inf if metrics["val_loss"] is None else metrics["val_loss"]
        self.best_val_loss = math.inf if metrics["best_val_loss"] is None else metrics["best_val_loss"]
        self.best_step = metrics.get("best_step")


def train(plan: Plan, start_step: int, console: Console | None, module_class: type[LitCausalLM]) -> None:
    """Build network, module and trainer, and train. Raises StopRun after a signal."""
    quiet_lightning()
    net = starting_net(plan.model_config, plan.config, from_base=plan.resume_from is None)
    module = module_class(plan, net)
    if console:
        with OptionalPart("the summary of the run"):
            print_header(plan, net, start_step)
    if plan.compiles:
        net.compile()  # in place: torch.compile(net) would rename every weight in the checkpoint
    sinks = [*make_sinks(plan.config.logging, plan.folder, start_step), console] if console else []
    stop = StopOnSignal()
    saver = CheckpointSaver(plan=plan, stop=stop)
    callbacks = make_callbacks(plan, start_step, sinks=sinks, console=console, stop=stop, saver=saver)
    trainer = build_trainer(plan, callbacks, validates_first=module.validates_first)
    try:
        with stop:
            trainer.fit(module, ckpt_path=plan.resume_from, weights_only=True)
    finally:
        for sink in sinks:
            with OptionalPart(f"closing {sink.name}"):
                sink.close()
    if plan.n_steps == 0:
        # Nothing was trained, so nothing was saved. Save the untrained model, to compare others with it.
        saver.save(trainer, module)


def prepare_folder(plan: Plan, resumed: dict[str, Any] | None) -> None:
    """Move an earlier run aside and write run_config.yaml. `resumed` is the metadata of the checkpoint that
    this run resumes from."""
    moved = None if plan.resumes_in_place else move_aside(plan.folder)
    if moved:
        print(f"the earlier run in {plan.folder} has been moved to {moved}")
    write_run_config(plan.folder, plan.config, plan.record)
    if resumed and plan.record["threads"] != resumed["run"]["threads"]:
        warn(
            "the number of CPU threads is not the one this run had before; sums round differently, so the "
            "resume is not bit for bit"
        )


def finish_without_training(plan: Plan, metrics: dict[str, Any]) -> None:
    """The checkpoint is at the end of the run. If a kill came right after it, its names are still missing."""
    if plan.resumes_in_place and not (plan.folder / "final.ckpt").exists():
        lock = claim_folder(plan.folder)
        is_best = metrics.get("best_step") == metrics["step"]
        name_checkpoint(plan.resume_from, best=is_best, final=True)
        print_end(plan)
        lock.release()
        return
    print(
        f"{plan.resume_from} is at step {metrics['step']} of {plan.n_steps}: nothing left to do; to train "
        "longer, raise training.max_steps"
    )


def run(plan: Plan, module_class: type[LitCausalLM]) -> int:
    """Train as planned, with all that belongs to it: the folder, what is printed, advice if something fails.
    Returns the exit status."""
    resumed = read_metadata(plan.resume_from) if plan.resume_from else None
    start_step = resumed["metrics"]["step"] if resumed else 0
    if start_step and start_step >= plan.n_steps:
        if is_main_process():
            finish_without_training(plan, resumed["metrics"])
        return 0
    lock = console = None
    if is_main_process():
        lock = claim_folder(plan.folder)
        prepare_folder(plan, resumed)
        console = Console(plan.n_steps, start_step)
    try:
        train(plan, start_step, console, module_class)
    except StopRun as stop:
        if not console:
            return 0  # Lightning kills the main process where another one ends with a status of its own
        console.close()
        draw_curves(plan.folder)
        print(f"stopped; {how_to_resume(plan)}")
        return stop.code
    except Exception as error:
        advice = None if isinstance(error, UserError) else explain(error, plan)
        if advice is None:
            raise
        if not is_main_process():  # the main process may not have met this error
            print(f"warning: from another process: {advice}", file=sys.stderr)
        raise advice from None
    finally:
        if console:
            console.close()
        if lock:
            lock.release()
    if console:
        print_end(plan)
    return 0


def main(argv: list[str] | None = None) -> int:
    """What the command line does, for tests and other programs. Returns the exit status."""
    return run(plan_or_answer(argv), LitCausalLM)
