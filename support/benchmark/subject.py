"""What is timed: the model, the shape of a step and the data that a config, a checkpoint or a named shape
give."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import Batch, PackedData, Step, make_dataloaders
from model import GPTConfig, GPTMini
from support.checkpoint import load_model
from support.config.read import config_tree, flag_overrides, load_config, validate_config
from support.config.schema import Config
from support.device import autocast_of, resolve_device, resolve_precision
from support.messages import UserError
from support.run.plan import load_data
from tokenizer import BPETokenizer, GPT2Tokenizer, Tokenizer

REPO = Path(__file__).resolve().parents[2]
BUNDLED_TEXT = REPO / "data" / "tiny_corpus.txt"
GPT2_VOCAB = 50257

# Small, middle and large shapes of a training step (s), shapes for decoding (m), and GPT-2's of 124 million
# parameters: (vocabulary, sequences in a micro-batch, the `model` section of a config).
SHAPES: dict[str, tuple[int, int, dict[str, int]]] = {
    "s1": (512, 32, {"d_model": 128, "n_layers": 4, "n_heads": 4, "max_seq_len": 128}),
    "s2": (65, 16, {"d_model": 384, "n_layers": 6, "n_heads": 6, "max_seq_len": 256}),
    "s3": (GPT2_VOCAB, 8, {"d_model": 256, "n_layers": 6, "n_heads": 8, "max_seq_len": 256}),
    "m1": (1024, 4, {"d_model": 384, "n_layers": 6, "n_heads": 6, "max_seq_len": 1024}),
    "m2": (GPT2_VOCAB, 1, {"d_model": 768, "n_layers": 12, "n_heads": 12, "d_ff": 2048, "max_seq_len": 1024}),
    "gpt2": (
        GPT2_VOCAB,
        16,
        {"d_model": 768, "n_layers": 12, "n_heads": 12, "d_ff": 2048, "max_seq_len": 1024},
    ),
}


@dataclass
class Subject:
    """A model, how it is trained, and where it runs. `tokenizer` and `data` are None for a named shape:
    random ids take as long as real ones. `trained` is the model of a checkpoint."""

    name: str
    config: Config
    model_config: GPTConfig
    device: str
    tokenizer: Tokenizer | None = None
    data: PackedData | None = None
    trained: GPTMini | None = None

    @property
    def precision(self) -> str:
        return resolve_precision(self.config.hardware.precision, self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which matrices are multiplied."""
        return torch.float32 if self.precision == "32-true" else torch.bfloat16

    @property
    def label(self) -> str:
        """The name, and the type if it is not float32."""
        return self.name if self.dtype == torch.float32 else f"{self.name} bf16"

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which its steps run."""
        return autocast_of(self.precision, self.device)

    @property
    def tokens_per_step(self) -> int:
        training = self.config.training
        return training.micro_batch_size * training.grad_accum_steps * self.config.seq_len

    def new_model(self) -> GPTMini:
        """A new model of this shape on the device; its random weights depend on the seed alone."""
        torch.manual_seed(self.config.seed)
        return GPTMini(self.model_config).to(self.device)

    def some_tokenizer(self) -> Tokenizer:
        """The tokenizer; for a named shape, one with as many tokens. Raises UserError if there is none."""
        size = self.model_config.vocab_size
        if self.tokenizer is None and size == GPT2_VOCAB:
            return GPT2Tokenizer()
        if self.tokenizer is None and size >= 257:
            self.tokenizer = BPETokenizer.train([BUNDLED_TEXT.read_text(encoding="utf-8")], size)
        if self.tokenizer is None or self.tokenizer.vocab_size != size:
            raise UserError(
                f"no byte-pair tokenizer has the {size} tokens of shape {self.name}; take s1, s3 or m1"
            )
        return self.tokenizer

    def steps(self, n_steps: int) -> list[Step]:
        """The first steps of the run, in the memory of the device; for a named shape, of random ids."""
        if self.data is None:
            steps = random_steps(self.model_config.vocab_size, self.config, n_steps)
        else:
            steps = make_dataloaders(self.config, self.data, self.tokenizer, n_steps)[0]
        return [Step([on_device(batch, self.device) for batch in step.micro_batches]) for step in steps]


def on_device(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def random_steps(vocab_size: int, config: Config, n_steps: int) -> Iterator[Step]:
    """Steps of random ids in the shape that the config gives."""
    generator = torch.Generator().manual_seed(config.seed)
    training = config.training
    for _ in range(n_steps):
        micro_batches = []
        for _ in range(training.grad_accum_steps):
            shape = (training.micro_batch_size, config.seq_len + 1)
            rows = torch.randint(vocab_size, shape, generator=generator)
            micro_batches.append({"input_ids": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous()})
        yield Step(micro_batches)


# ---- from the command line -----------------------------------------------------------------------


def read_subject(args: argparse.Namespace, shape: str) -> Subject:
    """The subject that --ckpt, --config or --shape names; without any of them, the named shape `shape`.
    Raises UserError."""
    if args.ckpt:
        return subject_of_checkpoint(args)
    if args.config:
        config = load_config(args.config, overrides_of(args))
        if config.data.source == "instructions" or config.base_ckpt:
            raise UserError(
                f"{args.config} is for fine-tuning, and only training from scratch is measured; take another "
                "config, e.g. --config config_smoke.yaml"
            )
        config.training.schedule_steps = config.training.schedule_steps or config.training.max_steps or 1
        tokenizer, data = load_data(config, None)
        model_config = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
        device = resolve_device(config.hardware.accelerator)
        return Subject(args.config, config, model_config, device, tokenizer, data)
    return subject_of_shape(args.shape or shape, overrides_of(args))


def overrides_of(args: argparse.Namespace) -> list[str]:
    """--override, and the flags that are short for one."""
    overrides = flag_overrides(args)
    if args.optimizer:
        overrides.append(f"training.optimizer={args.optimizer}")
    return overrides


def shape_tree(name: str) -> dict[str, Any]:
    """The config of a named shape, but for the size of its vocabulary, which a config cannot set."""
    _, micro_batch_size, model = SHAPES[name]
    training = {"micro_batch_size": micro_batch_size, "max_steps": 1000, "schedule_steps": 1000}
    return {"model": dict(model), "data": {"path": str(BUNDLED_TEXT)}, "training": training}


def subject_of_shape(name: str, overrides: list[str]) -> Subject:
    """The subject of a named shape. Raises UserError for a wrong override."""
    config = validate_config(config_tree(None, overrides, base=shape_tree(name)), name)
    model_config = config.model.model_copy(update={"vocab_size": SHAPES[name][0]})
    return Subject(name, config, model_config, resolve_device(config.hardware.accelerator))


def subject_of_checkpoint(args: argparse.Namespace) -> Subject:
    """The subject of --ckpt: its weights, and its tokenizer. Raises UserError if it cannot be opened."""
    device = resolve_device(args.device or "auto")
    model, tokenizer, _ = load_model(args.ckpt, device)
    subject = subject_of_shape("m1", overrides_of(args))  # for what the model does not say, such as the seed
    subject.config.model = subject.model_config = model.config
    subject.name, subject.tokenizer, subject.trained = args.ckpt, tokenizer, model
    return subject
