"""What a run needs before its first step: config, tokenizer, data, device, folder and, to resume, the
checkpoint.

No Lightning here. `plan_run` finds every mistake a user can make before the slow import of it begins.
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
from support.checkpoint import read_metadata
from support.cli import end_with_parent
from support.config.read import config_tree, flag_overrides, validate_config
from support.config.schema import Config
from support.device import resolve_device, resolve_precision
from support.find_checkpoints import find_latest_checkpoint
from support.messages import UserError, is_main_process, warn
from support.run.compiling import try_compiler
from support.run.folder import refuse_unfinished, refuse_unwritable, run_files, run_record
from support.run.resuming import compare_configs, compare_data, in_folder, read_run
from support.run.starting_weights import net_on_meta, with_base, with_own_tokenizer
from support.text.token_files import open_token_files
from tokenizer import KINDS, Tokenizer, build_tokenizer, tokenizer_from_dict


@dataclass
class Plan:
    """A run that can start: everything checked, nothing written yet."""

    config: Config
    tokenizer: Tokenizer
    data: PackedData
    model_config: GPTConfig
    n_steps: int
    device: str
    precision: str
    resume_from: Path | None
    record: dict[str, Any]
    command: str  # how this run was started, for the line that says how to go on

    @property
    def folder(self) -> Path:
        return Path(self.config.checkpoint.dir)

    @property
    def resumes_in_place(self) -> bool:
        """Whether this run continues the one in its folder."""
        return in_folder(self.resume_from, self.folder)

    @property
    def world(self) -> int:
        return self.config.hardware.world

    @property
    def sequences_per_step(self) -> int:
        return step_shape(self.config, world=self.world).blocks

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of every training row, where they differ (instructions that are not packed); else the one
        length of all."""
        if self.config.data.source == "instructions" and not self.config.data.packing:
            return [len(example) for example in self.data.train.examples]
        return [self.config.seq_len]

    @property
    def tokens_per_step(self) -> int:
        """At most."""
        return self.sequences_per_step * max(self.row_lengths)


def plan_run(args: Any, *, finetuning: bool, only_looks: bool) -> Plan:
    """Check the command line (`--config --override --seed --device --resume --fresh`) against files, data and
    hardware.

    `finetuning` says whether `finetune.py` asks. With `only_looks` nothing will be trained, so the folder may
    be in use and the compiler is not tried. Raises UserError; writes nothing.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        end_with_parent()
    metadata, resume_from = None, None
    if args.resume not in (None, "auto"):
        resume_from = Path(args.resume)
        metadata = read_run(resume_from)
    if args.config is None and metadata is None:
        example = "config_finetune.yaml" if finetuning else "config_smoke.yaml"
        raise UserError(
            f"no config given; try --config {example}, or --resume CHECKPOINT to go on with a run's own"
        )
    tree = config_tree(args.config, flag_overrides(args), base=metadata and metadata["config"])
    check_task(tree, finetuning)
    if args.config:  # a checkpoint's own config has everything, so its base may be gone
        tree = with_base(tree) if finetuning else with_own_tokenizer(tree)
    config = validate_config(tree, str(args.config or "config"))
    check_samples(tree, config)
    device = resolve_device(config.hardware.accelerator)
    check_loggers(config)
    check_strategy(config)
    check_processes(config, device)
    folder = Path(config.checkpoint.dir)
    if args.resume == "auto":
        resume_from = find_latest_checkpoint(folder)
        metadata = read_run(resume_from) if resume_from else None
        if resume_from is None and not (folder / "run_config.yaml").exists():
            raise UserError(f"nothing to resume: no run in {folder}; start one without --resume")
    if is_main_process() and not only_looks:
        refuse_unwritable(folder)
        if not args.fresh and not in_folder(resume_from, folder) and args.resume != "auto":
            refuse_unfinished(folder)
    if metadata:
        compare_configs(metadata["config"], config, resume_from)
    elif config.base_ckpt and Path(config.base_ckpt).resolve() in [
        file.resolve() for file in run_files(folder)
    ]:
        raise UserError(
            f"base_ckpt={config.base_ckpt} lies in checkpoint.dir, whose run this one would move aside; "
            "write elsewhere by "
            f"--override checkpoint.dir={folder}-2"
        )

    origin = metadata or (read_metadata(config.base_ckpt) if config.base_ckpt else None)
    tokenizer, data = load_data(config, tokenizer_from_dict(origin["tokenizer"]) if origin else None)
    check_sample_prompts(config, tokenizer)
    n_steps = resolve_steps(config, data, metadata)
    plan = Plan(
        config,
        tokenizer,
        data,
        config.model.model_copy(update={"vocab_size": tokenizer.vocab_size}),
        n_steps,
        device,
        resolve_precision(config.hardware.precision, device),
        resume_from,
        run_record(),
        f"python3 {shlex.join(sys.argv)}",
    )
    net_on_meta(plan.model_config, config)  # for mistakes in lora.targets and training.freeze
    if metadata:
        compare_data(metadata, plan.sequences_per_step, plan.data.fingerprint)
    if config.training.compile and not only_looks:
        try_compiler(device)
    return plan


def check_samples(tree: dict[str, Any], config: Config) -> None:
    """Say that prompts alone sample nothing; who writes `sample_every: null` knows."""
    if config.training.sample_prompts and "sample_every" not in tree["training"]:
        every = config.training.val_every
        warn(
            "nothing is sampled from training.sample_prompts: add --override "
            f"training.sample_every={every} to do so every {every} steps"
        )


def check_task(tree: dict[str, Any], finetuning: bool) -> None:
    """Raise UserError for a config of the other script."""
    data = tree.get("data")
    if not finetuning and (
        tree.get("base_ckpt") or (isinstance(data, dict) and data.get("source") == "instructions")
    ):
        raise UserError(
            "this config (base_ckpt, data.source=instructions) is for fine-tuning; run it by python3 "
            "finetune.py"
        )
    for key in ("lora", "template"):
        if not finetuning and tree.get(key):
            raise UserError(
                f"{key} belongs to fine-tuning, where there is a model to adapt; leave it out, or run "
                "python3 finetune.py with a base_ckpt"
            )
    if finetuning and not tree.get("base_ckpt"):
        raise UserError(
            "no checkpoint to start from; set base_ckpt, e.g. --override base_ckpt=checkpoints/final.ckpt "
            "(train.py makes one)"
        )


def load_data(config: Config, tokenizer: Tokenizer | None) -> tuple[Tokenizer, PackedData]:
    """The data the config names, and the tokenizer: the one given, or else one built on it. Raises UserError."""
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
    """Token files, with the tokenizer given, or else their own, or else (where no meta.json names it) the
    config's. Raises UserError."""
    data, spec = config.data, config.tokenizer
    files = open_token_files(data.path, data.val_path, data.dtype, data.val_fraction)
    tokenizer = tokenizer or files.tokenizer
    if tokenizer is None and KINDS[spec.kind].is_trained:
        raise UserError(
            f"data.path={data.path} has no meta.json that tells its tokenizer, and {spec.kind} would have "
            "to be trained on a text; set "
            "tokenizer.kind=gpt2, or kind=file with tokenizer.path, whichever made it"
        )
    tokenizer = tokenizer or build_tokenizer(spec.kind, [], path=spec.path)
    return tokenizer, pack_token_files(files, tokenizer, config)


def check_sample_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """A prompt that cannot be encoded would end the run hours later, at the first sample."""
    for prompt in config.training.sample_prompts:
        try:
            if not tokenizer.encode(prompt):
                raise UserError("it is empty")
        except UserError as error:
            raise UserError(f"training.sample_prompts: {prompt!r} cannot be continued: {error}") from None


def check_strategy(config: Config) -> None:
    """Raise UserError where the installed PyTorch cannot shard."""
    if config.hardware.strategy == "fsdp":
        from torch.distributed import fsdp

        if not hasattr(fsdp, "fully_shard"):
            raise UserError(
                f"hardware.strategy=fsdp needs PyTorch 2.6 or newer (this is {torch.__version__}); use "
                "ddp, or upgrade"
            )


def check_processes(config: Config, device: str) -> None:
    """Raise UserError if the machine lacks the devices, or a launcher (torchrun) has started another
    number of processes."""
    hardware, started = config.hardware, os.environ.get("WORLD_SIZE", "")
    present = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, hardware.devices)
    if hardware.devices > present:
        raise UserError(
            f"hardware.devices={hardware.devices}, and this machine has {present} ({device}); lower it, "
            "and raise grad_accum_steps instead"
        )
    if "LOCAL_RANK" in os.environ and started.isdecimal() and int(started) != hardware.world:
        raise UserError(
            f"{started} processes have been started, and the config asks for {hardware.world} "
            f"(hardware.devices={hardware.devices} x "
            f"hardware.num_nodes={hardware.num_nodes});\n       torchrun's --nproc-per-node is "
            "hardware.devices, its --nnodes hardware.num_nodes"
        )


def check_loggers(config: Config) -> None:
    """Raise UserError for a logger that is asked for and not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(config.logging, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"logging.{name}=true needs a package that is not installed; pip install {name}")


def resolve_steps(config: Config, data: PackedData, metadata: dict | None) -> int:
    """The number of steps of the run; also fixes the schedule's length in the config, at first to the
    run's, on resume to what it was."""
    training = config.training
    n_steps = training.max_steps
    if n_steps is None:
        n_steps = math.ceil(
            training.epochs * len(data.train) / step_shape(config, world=config.hardware.world).blocks
        )
    if training.schedule_steps is None:
        training.schedule_steps = (
            metadata["config"]["training"]["schedule_steps"] if metadata else max(1, n_steps)
        )
    if n_steps and training.warmup_steps > training.schedule_steps:
        raise UserError(
            f"training.warmup_steps={training.warmup_steps} is longer than the schedule of "
            f"{training.schedule_steps} steps; lower it"
        )
    if (
        training.schedule in ("cosine", "linear", "wsd")
        and training.min_lr == 0
        and training.schedule_steps < n_steps
    ):
        raise UserError(
            f"the schedule ends at step {training.schedule_steps} with min_lr=0, so the steps after it, up "
            f"to {n_steps}, would change nothing; "
            f"set training.schedule_steps={n_steps}, or a training.min_lr"
        )
    return n_steps
