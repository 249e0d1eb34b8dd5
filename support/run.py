"""What a run needs before its first step: config, tokenizer, data, device, folder and, to resume, the checkpoint.

No Lightning here. `plan_run` finds every mistake a user can make before the slow import of it begins.
"""

import errno
import importlib.metadata
import importlib.util
import math
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import PackedData, load_corpus, pack_corpus, pack_token_files, step_shape, tokenizer_documents
from instruct import load_instructions
from model import GPTConfig
from support.base import net_on_meta, with_base, with_own_tokenizer
from support.checkpoint import find_latest_checkpoint, read_metadata
from support.cli import UserError, is_main_process, warn
from support.compiling import advice_on_compiling, causes, is_of_compiler
from support.config import Config, config_tree, flag_overrides, validate_config
from support.disk import atomic_write
from support.hardware import resolve_device, resolve_precision
from support.safe_yaml import dump_yaml
from support.token_files import open_token_files
from tokenizer import Tokenizer, build_tokenizer, tokenizer_from_dict

RUN_FILES = ("step-*.ckpt", "last.ckpt", "best.ckpt", "metrics.jsonl", "samples.jsonl", "loss.svg", "loss.png", "tensorboard", "wandb")
RUN_FILES += ("wandb_id.txt", "run_config.yaml", "final.ckpt")

# What may differ between a run and its resumption: how long it goes on, what it shows, and where it runs. The size of
# the whole step is compared besides, and so is the text.
RESUMABLE = (
    "training.max_steps",
    "training.epochs",
    "training.schedule_steps",
    "training.micro_batch_size",
    "training.grad_accum_steps",
    "training.compile",
    "training.val_every",
    "training.val_batches",
    "training.train_eval_batches",
    "training.log_every",
    "training.sample_",
    "data.path",
    "data.val_path",
    "model.gradient_checkpointing",
    "hardware.",
    "checkpoint.",
    "logging.",
)


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
    def goes_on(self) -> bool:
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
        """Tokens of every training row, where they differ (instructions that are not packed); else the one length of all."""
        if self.config.data.source == "instructions" and not self.config.data.packing:
            return [len(example) for example in self.data.train.examples]
        return [self.config.seq_len]

    @property
    def tokens_per_step(self) -> int:
        """At most."""
        return self.sequences_per_step * max(self.row_lengths)


def plan_run(args: Any) -> Plan:
    """Check the command line (`--config --override --seed --device --resume --fresh`) against files, data and hardware.

    `args.finetuning` says whether `finetune.py` asks. Raises UserError; writes nothing.
    """
    metadata, resume_from = None, None
    if args.resume not in (None, "auto"):
        resume_from = Path(args.resume)
        metadata = read_run(resume_from)
    if args.config is None and metadata is None:
        example = "config_finetune.yaml" if args.finetuning else "config_smoke.yaml"
        raise UserError(f"no config given; try --config {example}, or --resume CHECKPOINT to go on with a run's own")
    tree = config_tree(args.config, flag_overrides(args), base=metadata and metadata["config"])
    check_task(tree, args.finetuning)
    if args.config:  # a checkpoint's own config has everything, so its base may be gone
        tree = with_base(tree) if args.finetuning else with_own_tokenizer(tree)
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
    if is_main_process() and not args.only_looks:
        refuse_unwritable(folder)
        if not args.fresh and not in_folder(resume_from, folder) and args.resume != "auto":
            refuse_unfinished(folder)
    if metadata:
        compare_configs(metadata["config"], config, resume_from)
    elif config.base_ckpt and Path(config.base_ckpt).resolve() in [file.resolve() for file in run_files(folder)]:
        raise UserError(
            f"base_ckpt={config.base_ckpt} lies in checkpoint.dir, whose run this one would move aside; write elsewhere by "
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
        compare_data(metadata, plan)
    return plan


def check_samples(tree: dict[str, Any], config: Config) -> None:
    """Say that prompts alone sample nothing; who writes `sample_every: null` knows."""
    if config.training.sample_prompts and "sample_every" not in tree["training"]:
        every = config.training.val_every
        warn(f"nothing is sampled from training.sample_prompts: add --override training.sample_every={every} to do so every {every} steps")


def check_task(tree: dict[str, Any], finetuning: bool) -> None:
    """Raise UserError for a config of the other script."""
    data = tree.get("data")
    if not finetuning and (tree.get("base_ckpt") or (isinstance(data, dict) and data.get("source") == "instructions")):
        raise UserError("this config (base_ckpt, data.source=instructions) is for fine-tuning; run it by python3 finetune.py")
    for key in ("lora", "template"):
        if not finetuning and tree.get(key):
            raise UserError(
                f"{key} belongs to fine-tuning, where there is a model to adapt; leave it out, or run python3 finetune.py with a base_ckpt"
            )
    if finetuning and not tree.get("base_ckpt"):
        raise UserError("no checkpoint to start from; set base_ckpt, e.g. --override base_ckpt=checkpoints/final.ckpt (train.py makes one)")


def load_data(config: Config, tokenizer: Tokenizer | None) -> tuple[Tokenizer, PackedData]:
    """The data the config names, and the tokenizer: the one given, or else one built on it. Raises UserError."""
    if config.data.source == "instructions":
        return tokenizer, load_instructions(config, tokenizer)
    if config.data.source == "tokens":
        return load_token_files(config, tokenizer)
    corpus, spec = load_corpus(config), config.tokenizer
    if tokenizer is None:
        tokenizer = build_tokenizer(spec.kind, tokenizer_documents(corpus, spec.kind), spec.vocab_size, spec.path)
    return tokenizer, pack_corpus(corpus, tokenizer, config)


def load_token_files(config: Config, tokenizer: Tokenizer | None) -> tuple[Tokenizer, PackedData]:
    """Token files, with the tokenizer given, or else their own, or else (where no meta.json names it) the config's. Raises UserError."""
    data, spec = config.data, config.tokenizer
    files = open_token_files(data.path, data.val_path, data.dtype, data.val_fraction)
    tokenizer = tokenizer or files.tokenizer
    if tokenizer is None and spec.kind in ("bpe", "char"):
        raise UserError(
            f"data.path={data.path} has no meta.json that tells its tokenizer, and {spec.kind} would have to be trained on a text; set "
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
            raise UserError(f"hardware.strategy=fsdp needs PyTorch 2.6 or newer (this is {torch.__version__}); use ddp, or upgrade")


def check_processes(config: Config, device: str) -> None:
    """Raise UserError if the machine lacks the devices, or a launcher (torchrun) has started another number of processes."""
    hardware, started = config.hardware, os.environ.get("WORLD_SIZE", "")
    present = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, hardware.devices)
    if hardware.devices > present:
        raise UserError(
            f"hardware.devices={hardware.devices}, and this machine has {present} ({device}); lower it, and raise grad_accum_steps instead"
        )
    if "LOCAL_RANK" in os.environ and started.isdecimal() and int(started) != hardware.world:
        raise UserError(
            f"{started} processes have been started, and the config asks for {hardware.world} (hardware.devices={hardware.devices} x "
            f"hardware.num_nodes={hardware.num_nodes});\n       torchrun's --nproc-per-node is hardware.devices, its --nnodes hardware.num_nodes"
        )


def check_loggers(config: Config) -> None:
    """Raise UserError for a logger that is asked for and not installed."""
    for name in ("tensorboard", "wandb"):
        if getattr(config.logging, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"logging.{name}=true needs a package that is not installed; pip install {name}")


def resolve_steps(config: Config, data: PackedData, metadata: dict | None) -> int:
    """The number of steps of the run; also fixes the schedule's length in the config, at first to the run's, on resume
    to what it was."""
    training = config.training
    n_steps = training.max_steps
    if n_steps is None:
        n_steps = math.ceil(training.epochs * len(data.train) / step_shape(config, world=config.hardware.world).blocks)
    if training.schedule_steps is None:
        training.schedule_steps = metadata["config"]["training"]["schedule_steps"] if metadata else max(1, n_steps)
    if n_steps and training.warmup_steps > training.schedule_steps:
        raise UserError(f"training.warmup_steps={training.warmup_steps} is longer than the schedule of {training.schedule_steps} steps; lower it")
    if training.schedule in ("cosine", "linear", "wsd") and training.min_lr == 0 and training.schedule_steps < n_steps:
        raise UserError(
            f"the schedule ends at step {training.schedule_steps} with min_lr=0, so the steps after it, up to {n_steps}, would change nothing; "
            f"set training.schedule_steps={n_steps}, or a training.min_lr"
        )
    return n_steps


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_run(path: Path) -> dict[str, Any]:
    """Our fields of a checkpoint that a run can go on from. Raises UserError if it does not hold the run's config."""
    metadata = read_metadata(path)
    missing = {"config", "sequences_per_step", "data_fingerprint", "run"} - metadata.keys()
    if missing or not isinstance(metadata["config"], dict):
        what = ", ".join(sorted(missing)) or "config"
        raise UserError(
            f"checkpoint {path} holds a model but no run to go on with ({what} missing); it can be the base of a new one: python3 finetune.py "
            f"--config config_finetune.yaml --override base_ckpt={path}"
        )
    return metadata


def in_folder(checkpoint: Path | None, folder: Path) -> bool:
    """Whether a run that resumes from `checkpoint` and writes to `folder` goes on with the run that is there."""
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def compare_configs(saved: dict, config: Config, source: Path) -> None:
    """Refuse to resume under a config that would have made another run; names the key and both values."""
    before, now = flatten(validate_config(saved, str(source)).to_dict()), flatten(config.to_dict())
    changed = [key for key in now if now[key] != before.get(key) and not key.startswith(RESUMABLE)]
    if changed:
        listed = "; ".join(f"{key} was {before.get(key)!r} and is now {now[key]!r}" for key in changed[:5])
        raise UserError(f"cannot resume {source} under another config: {listed}; change it back, or start a new run with --fresh")


def compare_data(metadata: dict, plan: Plan) -> None:
    """Refuse to resume with another text, or with steps of another size."""
    if metadata["sequences_per_step"] != plan.sequences_per_step:
        raise UserError(
            f"cannot resume: a step had {metadata['sequences_per_step']} sequences and would now have {plan.sequences_per_step} "
            "(micro_batch_size x grad_accum_steps x devices x num_nodes); keep the product"
        )
    if metadata["data_fingerprint"] != plan.data.fingerprint:
        raise UserError("cannot resume: the training text has changed since this run began; restore it, or start a new run with --fresh")


# ---- the folder ---------------------------------------------------------------------------------------------------


def run_files(folder: Path) -> list[Path]:
    """What a run has written into its folder, `final.ckpt` last."""
    return [path for pattern in RUN_FILES for path in sorted(folder.glob(pattern))]


def refuse_unwritable(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists; UserError if no run could write there."""
    nearest = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"checkpoint.dir={folder}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"checkpoint.dir={folder}: {nearest} cannot be written; choose another by --override checkpoint.dir=PATH")
    return nearest


def refuse_unfinished(folder: Path) -> None:
    """Raise UserError if `folder` holds a run that did not reach its end: it is never overwritten."""
    if (folder / "final.ckpt").exists() or not any(path.suffix == ".ckpt" for path in run_files(folder)):
        return
    raise UserError(
        f"{folder} holds an unfinished run; go on with it by --resume, move it aside by --fresh,\n"
        f"       or write elsewhere by --override checkpoint.dir={folder}-2"
    )


def move_aside(folder: Path) -> Path | None:
    """Move an earlier run's files to the first free `old-<n>` in the same folder; returns that, or None if there are none."""
    files = run_files(folder)
    if not any(path.suffix == ".ckpt" for path in files):
        return None
    number = 1
    while (folder / f"old-{number}").exists():
        number += 1
    target = folder / f"old-{number}"
    target.mkdir()
    for path in files:
        path.rename(target / path.name)
    return target


# ---- what is said -------------------------------------------------------------------------------------------------


def explain(error: Exception, plan: Plan) -> UserError | None:
    """What a user can do about an error that is not ours: memory that ran out, a data worker or another process that is gone."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        training = plan.config.training
        return UserError(
            f"out of memory on {plan.device}: {text[:160]}\n       halve training.micro_batch_size (now "
            f"{training.micro_batch_size}) and double training.grad_accum_steps (now {training.grad_accum_steps}); "
            f"or model.gradient_checkpointing=true\n       {how_to_go_on(plan)}"
        )
    no_room = any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC and cause.filename is None for cause in causes(error))
    if plan.config.hardware.num_workers and no_room:  # no file is full, so it is where processes share their memory
        return UserError(
            "data workers need shared memory (/dev/shm), and there is no room in it\n       try hardware.num_workers=0, or give the container "
            f"more: docker run --shm-size=1g\n       {how_to_go_on(plan)}"
        )
    if "DataLoader worker" in text:
        return UserError(f"a data worker has ended: {text[:160]}\n       try hardware.num_workers=0\n       {how_to_go_on(plan)}")
    if plan.world > 1 and ("gloo/" in text or isinstance(error, torch.distributed.DistError)):
        return UserError(
            f"the connection to another process of this run is lost: {text[-160:]}\n       it may have been killed, for want of memory "
            f"too: see what it said, and the system's log\n       {how_to_go_on(plan)}"
        )
    if plan.config.training.compile and is_of_compiler(error):
        return UserError(f"{advice_on_compiling(error)}\n       {how_to_go_on(plan)}")
    return None


def why_no_gradient(config: Config) -> str:
    """What to try where every gradient is zero, the likeliest reason alone."""
    if config.training.compile:
        return f"--override training.compile=false: PyTorch {torch.__version__} seems to compile this model wrongly; or another version of it"
    if config.training.freeze:
        return f"to freeze less: of training.freeze={config.training.freeze} nothing is left that this model can learn with"
    if config.base_ckpt:
        return f"another base_ckpt: the weights in {config.base_ckpt} pass nothing on (are they all zero?)"
    return "model.zero_init=false, or hardware.accelerator=cpu: by the way it begins, or on this device, the network passes nothing on"


def how_to_go_on(plan: Plan) -> str:
    """The newest checkpoint of the run, and the command that goes on from it."""
    last = find_latest_checkpoint(plan.folder)
    if last is None:
        return "nothing had been saved yet"
    command = plan.command.replace(" --fresh", "")
    if "--resume" not in command:
        command += " --resume"
    return f"saved {last} at step {read_metadata(last)['metrics']['step']}; go on with: {command}"


def run_record() -> dict[str, Any]:
    """What is needed to repeat a run besides its config: versions, git commit, command line."""
    names = ("torch", "lightning", "numpy", "tokenizers", "tiktoken", "datasets")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    here = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5)
        commit = answer.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {"versions": versions, "git_commit": commit, "command": shlex.join(sys.argv), "threads": torch.get_num_threads()}


def write_run_config(plan: Plan) -> None:
    """run_config.yaml: the whole config as it was understood, with the run's record as comments on top."""
    header = [
        f"# {key}: {value}".replace("\n", " ")
        for key, value in (plan.record["versions"] | {k: plan.record[k] for k in ("git_commit", "command")}).items()
    ]
    with atomic_write(plan.folder / "run_config.yaml") as file:
        file.write(("\n".join(header) + "\n" + dump_yaml(plan.config.to_dict())).encode())
