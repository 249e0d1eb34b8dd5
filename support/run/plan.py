"""What a run needs before its first step: config, tokenizer, data, device, folder and, when it resumes, the
checkpoint.

Lightning is not imported here, since that takes seconds: `plan_run` reports a user's mistakes before.
"""

import importlib.metadata
import importlib.util
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import PackedData, load_corpus, pack_corpus, pack_token_files, step_shape, tokenizer_documents
from instruct import load_instructions
from model import GPTConfig
from optim import scheduled_factor
from support.checkpoint import read_metadata
from support.cli import end_with_parent
from support.config.read import config_tree, flag_overrides, validate_config
from support.config.schema import Config
from support.device import resolve_device, resolve_precision
from support.find_checkpoints import find_latest_checkpoint
from support.messages import UserError, is_main_process, warn
from support.run.compiling import choose_and_try, choose_to_compile
from support.run.folder import refuse_base_in_folder, refuse_unfinished, refuse_unwritable, run_record
from support.run.resuming import compare_configs, compare_data, in_folder, read_run
from support.run.starting_weights import net_on_meta, with_base, with_own_tokenizer
from support.text.token_files import open_token_files
from tokenizer import KINDS, Tokenizer, build_tokenizer, tokenizer_from_dict


@dataclass(kw_only=True)
class Plan:
    """Everything a run needs to start. All of it has been checked, and nothing has been written yet."""

    config: Config
    tokenizer: Tokenizer
    data: PackedData
    model_config: GPTConfig
    n_steps: int
    device: str
    precision: str
    resume_from: Path | None
    record: dict[str, Any]
    command: str  # how this run was started, for the message that says how to resume
    compiles: bool = False  # whether the network is compiled
    compile_reason: str = ""  # in a few words, why or why not

    @property
    def folder(self) -> Path:
        return Path(self.config.checkpoint.dir)

    @property
    def resumes_in_place(self) -> bool:
        """Whether this run continues the one in its folder."""
        return in_folder(self.resume_from, self.folder)

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.config.hardware.world

    @property
    def sequences_per_step(self) -> int:
        return step_shape(self.config, world=self.world).blocks

    @property
    def row_lengths(self) -> list[int]:
        """The length in tokens of each training row, if lengths differ (instructions that are not packed);
        otherwise a list of one, the length of every row."""
        if self.config.data.source == "instructions" and not self.config.data.packing:
            return [len(example) for example in self.data.train.examples]
        return [self.config.seq_len]

    @property
    def tokens_per_step(self) -> int:
        """The largest number of tokens that a step can have."""
        return self.sequences_per_step * max(self.row_lengths)


def plan_run(args: Any, *, finetuning: bool, only_looks: bool) -> Plan:
    """Read the command line and everything it names (config, checkpoint, data), check it, and return the plan
    of the run. Raises UserError; writes nothing.

    `args` holds the flags `--config --override --seed --device --resume --fresh`. `finetuning` is True for
    `finetune.py` and False for `train.py`. `only_looks` is True if nothing will be trained (`--check`,
    `--show-step`): then the folder may be in use, and the compiler is not tried.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":  # not the first process of a distributed run
        end_with_parent()
    resume_from, saved = None, None
    if args.resume not in (None, "auto"):
        resume_from = Path(args.resume)
        saved = read_run(resume_from)
    config = read_run_config(args, saved, finetuning)
    device = resolve_device(config.hardware.accelerator)
    check_loggers(config)
    check_strategy(config)
    check_processes(config, device)
    warn_of_unused_tf32(config, device)
    folder = Path(config.checkpoint.dir)
    if args.resume == "auto":
        resume_from, saved = find_run(folder)
    if is_main_process() and not only_looks:
        refuse_unwritable(folder)
        if args.resume != "auto" and not args.fresh and not in_folder(resume_from, folder):
            refuse_unfinished(folder)
    if saved:
        compare_configs(saved["config"], config, resume_from)
    elif config.base_ckpt:
        refuse_base_in_folder(config.base_ckpt, folder)
    tokenizer, data = load_data(config, saved_tokenizer(config, saved))
    check_sample_prompts(config, tokenizer)
    config.training.schedule_steps, n_steps = resolve_steps(config, data, saved)
    plan = Plan(
        config=config,
        tokenizer=tokenizer,
        data=data,
        model_config=config.model.model_copy(update={"vocab_size": tokenizer.vocab_size}),
        n_steps=n_steps,
        device=device,
        precision=resolve_precision(config.hardware.precision, device),
        resume_from=resume_from,
        record=run_record(),
        command=f"python3 {shlex.join(sys.argv)}",
    )
    net = net_on_meta(plan.model_config, config)  # finds mistakes in lora.targets and training.freeze
    if saved:
        compare_data(saved, plan.sequences_per_step, plan.data.fingerprint)
    steps_left = n_steps - (saved["metrics"]["step"] if saved else 0)
    flops = net.flops_per_token(max(plan.row_lengths)) * plan.tokens_per_step * steps_left / plan.world
    choose = choose_to_compile if only_looks else choose_and_try
    plan.compiles, plan.compile_reason = choose(config.training.compile, device, flops)
    return plan


# ---- the config ----------------------------------------------------------------------------------


def read_run_config(args: Any, saved: dict[str, Any] | None, finetuning: bool) -> Config:
    """The config of a run, made from its file and the overrides. `saved` is the metadata of the checkpoint
    that --resume names; without --config, the config in it is used. Raises UserError."""
    if args.config is None and saved is None:
        example = "config_finetune.yaml" if finetuning else "config_smoke.yaml"
        raise UserError(
            f"no config given; try --config {example}, or --resume CHECKPOINT to use the config of that run"
        )
    tree = config_tree(args.config, flag_overrides(args), base=saved["config"] if saved else None)
    check_task(tree, finetuning)
    if args.config:  # the config in a checkpoint is complete, and its base may be gone
        tree = with_base(tree) if finetuning else with_own_tokenizer(tree)
    config = validate_config(tree, str(args.config or "config"))
    warn_of_unused_prompts(tree, config)
    return config


def warn_of_unused_prompts(tree: dict[str, Any], config: Config) -> None:
    """Warn if there are sample_prompts but no sample_every: then nothing is sampled. A user who writes
    `sample_every: null` wants that and gets no warning."""
    if config.training.sample_prompts and "sample_every" not in tree["training"]:
        every = config.training.val_every
        warn(
            "nothing is sampled from training.sample_prompts: add --override "
            f"training.sample_every={every} to do so every {every} steps"
        )


def check_task(tree: dict[str, Any], finetuning: bool) -> None:
    """Raise UserError for a config that belongs to the other script."""
    if finetuning:
        if not tree.get("base_ckpt"):
            raise UserError(
                "no checkpoint to start from; set base_ckpt, e.g. --override "
                "base_ckpt=checkpoints/final.ckpt (train.py makes one)"
            )
        return
    data = tree.get("data")
    has_instructions = isinstance(data, dict) and data.get("source") == "instructions"
    if tree.get("base_ckpt") or has_instructions:
        raise UserError(
            "this config (base_ckpt, data.source=instructions) is for fine-tuning; run it with python3 "
            "finetune.py"
        )
    for key in ("lora", "template"):
        if tree.get(key):
            raise UserError(
                f"{key} belongs to fine-tuning, where there is a model to adapt; leave it out, or run "
                "python3 finetune.py with a base_ckpt"
            )


# ---- tokenizer and data --------------------------------------------------------------------------


def find_run(folder: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """(newest checkpoint of the run in `folder`, its metadata), or (None, None) if the run has saved nothing
    yet. Raises UserError if there is no run."""
    newest = find_latest_checkpoint(folder)
    if newest:
        return newest, read_run(newest)
    if not (folder / "run_config.yaml").exists():
        raise UserError(f"nothing to resume: no run in {folder}; start one without --resume")
    return None, None


def saved_tokenizer(config: Config, saved: dict[str, Any] | None) -> Tokenizer | None:
    """The tokenizer of the checkpoint to resume from, or of the base; None if there is neither."""
    if saved:
        return tokenizer_from_dict(saved["tokenizer"])
    if config.base_ckpt:
        return tokenizer_from_dict(read_metadata(config.base_ckpt)["tokenizer"])
    return None


def load_data(config: Config, tokenizer: Tokenizer | None) -> tuple[Tokenizer, PackedData]:
    """(tokenizer, the data that the config names). The tokenizer is the one given, or one built from that
    data. Raises UserError."""
    if config.data.source == "instructions":
        return tokenizer, load_instructions(config, tokenizer)
    if config.data.source == "tokens":
        return load_token_files(config, tokenizer)
    corpus, spec = load_corpus(config), config.tokenizer
    if tokenizer is None:
        tokenizer = build_tokenizer(
            spec.kind, tokenizer_documents(corpus, spec.kind), spec.vocab_size, spec.path
        )
    return tokenizer, pack_corpus(corpus, tokenizer, config)


def load_token_files(config: Config, tokenizer: Tokenizer | None) -> tuple[Tokenizer, PackedData]:
    """(tokenizer, data of token files). The tokenizer is the one given; else the one in the files' meta.json;
    else, if they have no meta.json, the one that the config names. Raises UserError."""
    data, spec = config.data, config.tokenizer
    files = open_token_files(
        data.path, val_path=data.val_path, dtype=data.dtype, val_fraction=data.val_fraction
    )
    tokenizer = tokenizer or files.tokenizer
    if tokenizer is None and KINDS[spec.kind].is_trained:
        raise UserError(
            f"data.path={data.path} has no meta.json that names its tokenizer, and {spec.kind} would have to "
            "be trained on a text; set tokenizer.kind=gpt2, or kind=file with tokenizer.path, whichever made "
            "these files"
        )
    tokenizer = tokenizer or build_tokenizer(spec.kind, [], path=spec.path)
    return tokenizer, pack_token_files(files, tokenizer, config)


def check_sample_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError for a prompt that cannot be encoded. Without this check, the run would fail hours
    later, at its first sample."""
    for prompt in config.training.sample_prompts:
        try:
            if not tokenizer.encode(prompt):
                raise UserError("it is empty")
        except UserError as error:
            raise UserError(f"training.sample_prompts: {prompt!r} cannot be continued: {error}") from None


# ---- the machine ---------------------------------------------------------------------------------


def check_strategy(config: Config) -> None:
    """Raise UserError if strategy=fsdp is asked for (each process holds only a shard of the weights) and the
    installed PyTorch cannot do it."""
    if config.hardware.strategy == "fsdp":
        from torch.distributed import fsdp

        if not hasattr(fsdp, "fully_shard"):
            raise UserError(
                f"hardware.strategy=fsdp needs PyTorch 2.6 or newer (this is {torch.__version__}); use "
                "ddp, or upgrade"
            )


def check_processes(config: Config, device: str) -> None:
    """Raise UserError if the machine has fewer devices than the config asks for, or if a launcher (torchrun)
    has started another number of processes."""
    hardware = config.hardware
    started = os.environ.get("WORLD_SIZE", "")
    present = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, hardware.devices)
    if hardware.devices > present:
        raise UserError(
            f"hardware.devices={hardware.devices}, and this machine has {present} ({device}); lower it, "
            "and raise grad_accum_steps instead"
        )
    if "LOCAL_RANK" in os.environ and started.isdecimal() and int(started) != hardware.world:
        raise UserError(
            f"{started} processes have been started, and the config asks for {hardware.world} "
            f"(hardware.devices={hardware.devices} x hardware.num_nodes={hardware.num_nodes});\n"
            "       torchrun's --nproc-per-node is hardware.devices, its --nnodes hardware.num_nodes"
        )


def warn_of_unused_tf32(config: Config, device: str) -> None:
    """Warn if the config allows TF32 on a device that has none. It is no error: the same config may go to a
    GPU later."""
    if config.hardware.tf32 and device != "cuda":
        warn(f"hardware.tf32=true changes nothing here: only NVIDIA GPUs have TF32, and this is {device}")


def check_loggers(config: Config) -> None:
    """Raise UserError if the config switches on a logger that is not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(config.logging, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"logging.{name}=true needs a package that is not installed; pip install {name}")


# ---- the length of the run -----------------------------------------------------------------------


def resolve_steps(config: Config, data: PackedData, saved: dict[str, Any] | None) -> tuple[int, int]:
    """(steps of the schedule, steps of the run). A run that is resumed and made longer keeps the schedule
    that it began with. Raises UserError."""
    training = config.training
    n_steps = training.max_steps
    if n_steps is None:
        blocks_per_step = step_shape(config, world=config.hardware.world).blocks
        n_steps = math.ceil(training.epochs * len(data.train) / blocks_per_step)
    schedule_steps = training.schedule_steps
    if schedule_steps is None:
        schedule_steps = saved["config"]["training"]["schedule_steps"] if saved else max(1, n_steps)
    if n_steps and training.warmup_steps > schedule_steps:
        raise UserError(
            f"training.warmup_steps={training.warmup_steps} is longer than the schedule of {schedule_steps} "
            "steps; lower it"
        )
    scheduled = training.model_copy(update={"schedule_steps": schedule_steps})
    if scheduled_factor(schedule_steps + 1, scheduled) == 0 and schedule_steps < n_steps:
        raise UserError(
            f"the schedule ends at step {schedule_steps} with min_lr=0, so the steps after it, up to "
            f"{n_steps}, would change nothing; set training.schedule_steps={n_steps}, or a training.min_lr"
        )
    return schedule_steps, n_steps
