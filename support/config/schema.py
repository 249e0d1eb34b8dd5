"""The keys of a config: their types, defaults, limits and what they do. Nothing else reads config files.

The descriptions are the reference: `python3 -m support.config.reference` makes docs/CONFIG_REFERENCE.md of
them. How a file and --override values become a `Config` is in `support.config.read`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from model import GPTConfig
from support.config.values import NUMBER, no_number, section_of_keys
from support.text.chat_template import DEFAULT_TEMPLATE, TEMPLATES, Template
from support.text.hub import LOCAL_FORMATS
from support.text.sources import SOURCES, keys_of_other_sources

# Keys that are paths: ~ at their start is the home folder.
PATHS = ("base_ckpt", "tokenizer.path", "data.path", "data.val_path", "checkpoint.dir")


class Section(BaseModel):
    """A section of keys: unknown keys are refused, values are never converted, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TokenizerConfig(Section):
    kind: Literal["bpe", "gpt2", "char", "byte", "file"] = Field(
        "bpe",
        description="`bpe`: trained on the training documents. `gpt2`: the published one. `char`: one "
        "token a character. `byte`: one token a byte. `file`: a tokenizer.json.",
    )
    vocab_size: int = Field(
        1024,
        ge=257,
        description="Size of the vocabulary that `bpe` aims for; a small corpus may give a smaller one. The "
        "other kinds have their own size.",
    )
    path: str | None = Field(
        None,
        description="For kind `file`: a tokenizer.json, a vocab.json with merges.txt next to it, or their "
        "folder.",
    )

    @model_validator(mode="after")
    def _check(self) -> "TokenizerConfig":
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("path goes with kind=file: give both or neither")
        return self


ROW_FIELDS = ("instruction", "input", "output")


class DataConfig(Section):
    source: Literal["text", "hf", "tokens", "instructions"] = Field(
        "text",
        description="`text`: local .txt or .jsonl files, held in memory. `hf`: a Hugging Face dataset. "
        "`tokens`: token files of `prepare.py` or of other programs, of any size. "
        "`instructions`: rows for `finetune.py`, from a local file or the hub.",
    )
    path: str | None = Field(
        None,
        description="`text`: a file, a folder or a quoted glob of .txt and .jsonl files. "
        "`hf`: local data files, when `dataset` is `json`, `parquet` or `text`. "
        "`tokens`: a folder with train.npy and val.npy, or a .npy or .bin file. "
        "`instructions`: a .json, .jsonl or .parquet file, or a folder or a quoted glob of such files, in "
        "place of `dataset`.",
    )
    dtype: Literal["uint16", "uint32"] | None = Field(
        None,
        description="`tokens`: the type of the numbers in a .bin file, which does not say it itself; other "
        "programs write `uint16`. Leave it out for a .npy file.",
    )
    val_path: str | None = Field(
        None, description="A separate validation text, in place of a part of the training text."
    )
    dataset: str | None = Field(
        None,
        description="`hf`, `instructions`: a dataset's name on the hub. For `hf` also a local format: "
        "`json`, `parquet` or `text`.",
    )
    config: str | None = Field(
        None, description="`hf`, `instructions`: the dataset's configuration, e.g. `20231101.en`."
    )
    revision: str | None = Field(
        None, description="`hf`, `instructions`: a commit of the dataset, so that it cannot change later."
    )
    split: str = Field("train", description="`hf`, `instructions`: the split to train on.")
    val_split: str | None = Field(
        None,
        description="`hf`, `instructions`: the split to validate on. Default: documents taken from `split`.",
    )
    text_field: str = Field(
        "text", description="The field that holds the text, in .jsonl files and datasets."
    )
    streaming: bool = Field(
        False,
        description="`hf`: read while training, without keeping anything on disk. The first `val_docs` "
        "documents are the validation set.",
    )
    train_docs: int | None = Field(
        None, gt=0, description="`hf`, `instructions`: at most this many training documents or rows."
    )
    val_docs: int | None = Field(
        None,
        gt=0,
        description="`hf`, `instructions`: number of validation documents or rows. Default with "
        "`streaming`: 200.",
    )
    val_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the text held out for validation: whole documents drawn by `seed`, or the "
        "end of a document that is much larger than the share.",
    )
    stride: int | None = Field(
        None,
        gt=0,
        description="Distance between the starts of two blocks. Default: `seq_len`; smaller makes blocks "
        "overlap.",
    )
    shuffle: bool = Field(
        True,
        description="Train on the blocks in a new random order in each epoch. A stream shuffles its "
        "documents within groups of 1,000.",
    )
    document_mask: bool = Field(
        False,
        description="Attention stays inside each document of a block, and positions start again with each "
        "document.",
    )
    fields: dict[str, str] = Field(
        {},
        description="`instructions`: the file's own names for `instruction`, `input` and `output`, "
        "e.g. `{instruction: prompt, output: response}`.",
    )
    packing: bool = Field(
        False,
        description="`instructions`: several pairs in each block of `seq_len`, instead of one pair a row "
        "with padding. The loss is the same.",
    )
    mask_prompt: bool = Field(
        True,
        description="`instructions`: train on responses only. `false` trains on prompts too, to see what "
        "that changes.",
    )
    too_long: Literal["cut", "drop"] = Field(
        "cut",
        description="`instructions`: what to do with a row longer than `seq_len`. `cut` removes the start "
        "of its prompt, or drops the row if its response alone is too long. `drop` drops every such row. "
        "Both are counted.",
    )
    errors: Literal["strict", "replace"] = Field(
        "strict",
        description="Bytes that are not UTF-8: `strict` stops and says where, `replace` reads them as "
        "U+FFFD.",
    )

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.val_split and NUMBER.fullmatch(self.val_split):
            raise ValueError(
                f"val_split={self.val_split} would be the name of a split; a share of the text is "
                f"val_fraction: {self.val_split}"
            )
        for key in sorted(keys_of_other_sources(self.source)):
            if getattr(self, key) != DataConfig.model_fields[key].default:
                raise ValueError(
                    f"{key} does not belong to source={self.source}; remove it, or change source"
                )
        if odd := sorted(set(self.fields) - set(ROW_FIELDS)):
            raise ValueError(
                f"fields: {odd[0]} is not one of {', '.join(ROW_FIELDS)}; write e.g. {{instruction: prompt, "
                "output: response}"
            )
        self._check_text_is_named()
        self._check_val_split()
        return self

    def _check_text_is_named(self) -> None:
        source = SOURCES[self.source]
        if source.needs and not any(getattr(self, key) for key in source.needs):
            raise ValueError(f"source={self.source} needs {source.hint}")

    def _check_val_split(self) -> None:
        if self.source == "instructions" and self.val_split and (self.path or self.val_path):
            raise ValueError(
                f"val_split={self.val_split} belongs to a dataset on the hub; leave it out with path or "
                "val_path"
            )
        if self.val_split == self.split:
            raise ValueError(
                f"val_split={self.val_split} is the training split too; leave it out, and documents of that "
                "split are held out for validation"
            )
        if self.val_split and self.dataset in LOCAL_FORMATS:
            raise ValueError(
                f"val_split={self.val_split}: local files (dataset={self.dataset}) have no splits; use "
                "val_docs or val_fraction"
            )


class TrainingConfig(Section):
    max_steps: int | None = Field(
        None, ge=0, description="Optimizer steps of the run; 0 only writes the untrained checkpoint."
    )
    epochs: float | None = Field(
        None, gt=0, description="In place of `max_steps`: passes over the training text."
    )
    schedule_steps: int | None = Field(
        None,
        gt=0,
        description="Steps of the learning rate schedule. Default: `max_steps`. Set it if a run may be "
        "extended later.",
    )
    micro_batch_size: int = Field(
        8, gt=0, description="Sequences in one forward pass. Lower it first when memory runs out."
    )
    grad_accum_steps: int = Field(
        1,
        gt=0,
        description="Micro-batches whose gradients add up to one step: a large effective batch in little "
        "memory.",
    )
    seq_len: int | None = Field(
        None, gt=1, description="Tokens in one training sequence. Default: `model.max_seq_len`."
    )
    lr: float = Field(1e-3, gt=0, le=10, description="Peak learning rate of AdamW, at most 10.")
    min_lr: float = Field(
        0.0,
        ge=0,
        description="The learning rate that `cosine`, `linear` and `wsd` decay to, at most `lr`. Steps "
        "after the schedule have it; the last step of the schedule has a little more. The Muon part decays "
        "to the same share of `muon_lr`.",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps in which the learning rate rises to its peak: the first has `1 / warmup_steps` "
        "of it, the last all of it.",
    )
    schedule: Literal["cosine", "linear", "wsd", "step", "constant"] = Field(
        "cosine",
        description="After the warmup: `cosine` and `linear` decay to `min_lr`; `wsd` decays over the last "
        "fifth of those steps; `step` drops at 80% and 90% of them, to 31.6% and 10% of the way from "
        "`min_lr` to the peak; `constant` stays.",
    )
    optimizer: Literal["adamw", "muon", "adamw_from_scratch"] = Field(
        "adamw",
        description="`muon`: orthogonalized momentum for the hidden matrices, AdamW for the rest; reaches "
        "a loss in fewer steps. `adamw_from_scratch`: the AdamW written out in from_scratch.py.",
    )
    muon_lr: float = Field(
        0.02, gt=0, le=10, description="Peak learning rate of Muon, at most 10; `lr` is for the rest."
    )
    weight_decay: float = Field(
        0.1,
        ge=0,
        le=100,
        description="Decoupled decay of matrices and embeddings, not of norms and biases; at most 100.",
    )
    betas: list[float] = Field(
        [0.9, 0.95],
        min_length=2,
        max_length=2,
        description="How slowly AdamW's averages of the gradient and of its square change.",
    )
    eps: float = Field(
        1e-8, ge=1e-30, le=1, description="AdamW's protection from division by zero, 1e-30 to 1."
    )
    grad_clip: float | None = Field(
        1.0, gt=0, description="Largest norm of the whole gradient; a longer one is scaled down. `null`: off."
    )
    compile: Annotated[Literal["auto", True, False], BeforeValidator(no_number)] = Field(
        "auto",
        description="torch.compile the model: faster steps, after a minute of compiling. `auto`: on CUDA, if "
        "the run takes more than about 5 minutes; without a working compiler it runs uncompiled. `true`: "
        "everywhere (a CPU trains 1.3 to 1.4 times faster), and an error if compiling fails.",
    )
    val_every: int = Field(
        100, gt=0, description="Steps between validations; the last step always validates."
    )
    val_batches: int | None = Field(
        None, gt=0, description="Validate on only this many micro-batches. Default: the whole validation set."
    )
    train_eval_batches: int = Field(
        0,
        ge=0,
        description="At each validation also measure this many training micro-batches, always the first "
        "ones, without dropout (`train_eval_loss`). How far `val_loss` is above it shows overfitting.",
    )
    log_every: int = Field(
        10, gt=0, description="Steps between rows in metrics.jsonl and lines on the console."
    )
    freeze: list[str] = Field(
        [],
        description="Parameters that are not trained: names, beginnings of names or patterns, "
        "e.g. `[embed_tokens, layers.0]`, `['*norm*']`.",
    )
    sample_every: int | None = Field(
        None, gt=0, description="Steps between printed text samples. Default: no samples."
    )
    sample_prompts: list[str] = Field([], description="Prompts of those samples.")
    sample_temperature: float = Field(0.8, ge=0, description="Temperature of those samples; 0 is greedy.")

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give either max_steps or epochs")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is larger than lr={self.lr}")
        steps = self.schedule_steps or self.max_steps
        trains = self.max_steps != 0  # a run of 0 steps has no schedule and no warmup
        if trains and steps and self.warmup_steps > steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is longer than the schedule of {steps} steps; try "
                f"warmup_steps={max(1, steps // 10)}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must both be at least 0 and below 1")
        if self.sample_every and not self.sample_prompts:
            raise ValueError(
                f"sample_every={self.sample_every} needs sample_prompts, a list of texts to continue"
            )
        return self


class HardwareConfig(Section):
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="`auto`: cuda if present, else mps, else cpu."
    )
    devices: int = Field(1, gt=0, description="Processes on this machine, one for each GPU.")
    num_nodes: int = Field(1, gt=0, description="Machines.")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="With several devices: `ddp` (also `auto`) copies the model to each; `fsdp` splits it "
        "among them.",
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = Field(
        "auto",
        description="`auto`: bf16-mixed on a GPU that has bf16, else float32. fp16 is not offered: it "
        "overflows.",
    )
    num_workers: int = Field(
        0, ge=0, description="Processes that prepare batches ahead. A stream uses at most one."
    )
    deterministic: bool = Field(
        False,
        description="Use only operations with repeatable results: slower on a GPU, and an error where "
        "there is none.",
    )
    tf32: bool = Field(
        False,
        description="On an NVIDIA GPU, multiply float32 matrices in TF32: numbers with 10 bits after the "
        "leading one in place of 23, up to 8 times faster from the A100 and the RTX 30 series on. Products "
        "in bf16 stay as they are, so it matters with precision `32-true`.",
    )

    @property
    def world(self) -> int:
        """Processes of the run, over all machines."""
        return self.devices * self.num_nodes

    @model_validator(mode="before")
    @classmethod
    def _refuse_fp16(cls, data: Any) -> Any:
        if isinstance(data, dict) and re.match(r"(fp|float)?16(-|$)", str(data.get("precision"))):
            raise ValueError(
                f"precision={data['precision']} overflows without loss scaling; use bf16-mixed or 32-true"
            )
        return data


class CheckpointConfig(Section):
    dir: str = Field(
        "checkpoints", description="Folder of the run: checkpoints, metrics.jsonl, loss.svg, run_config.yaml."
    )
    save_every: int = Field(
        500,
        gt=0,
        description="Steps between checkpoints. The last step and each new best validation loss are saved "
        "too.",
    )
    keep_last: int | None = Field(
        3, gt=0, description="Step files to keep, besides `best`, `last` and `final`. `null` keeps all."
    )


class LoggingConfig(Section):
    tensorboard: bool = Field(False, description="Also write TensorBoard files (pip install tensorboard).")
    wandb: bool = Field(False, description="Also log to Weights & Biases (pip install wandb).")


class LoraConfig(Section):
    rank: int = Field(
        8, gt=0, description="Rows of A and columns of B: more of them can express more, and cost more."
    )
    alpha: float = Field(16.0, gt=0, description="The product of B and A is multiplied by `alpha / rank`.")
    targets: list[str] | None = Field(
        None, min_length=1, description="Matrices, e.g. `[q_proj, v_proj]`. Default: all in the blocks."
    )


class Config(Section):
    base_ckpt: str | None = Field(
        None,
        description="`finetune.py`: the checkpoint to start from. It brings its architecture and "
        "tokenizer, so those sections are left out.",
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**63,
        description="Decides initial weights, data order, which documents validate, dropout and samples.",
    )
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    model: GPTConfig = Field(default_factory=GPTConfig)
    data: DataConfig
    training: TrainingConfig
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    lora: LoraConfig | None = Field(
        None,
        description="Train low-rank adapters of the matrices and nothing else; `lora.rank=8` is enough to "
        "ask for it.",
    )
    template: Template | None = Field(
        None,
        description="`finetune.py`: the layout of a conversation, by name (`chat`, `alpaca`) or written "
        "out. Default for instructions: `chat`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_template(cls, data: Any) -> Any:
        """`template: alpaca` stands for the texts of that name."""
        if not isinstance(data, dict):
            return data
        for_instructions = isinstance(data.get("data"), dict) and data["data"].get("source") == "instructions"
        name = data.get("template") or (DEFAULT_TEMPLATE if for_instructions else None)
        if not isinstance(name, str):
            return data
        if name not in TEMPLATES:
            raise ValueError(
                f"template={name} is not one of {', '.join(TEMPLATES)}; name one, or write out prompt and "
                "prompt_with_input"
            )
        return data | {"template": TEMPLATES[name]}

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.model.vocab_size:
            raise ValueError(
                "model.vocab_size is not set here: it comes from the tokenizer; set tokenizer.vocab_size "
                "for bpe"
            )
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"training.seq_len={self.seq_len} is longer than model.max_seq_len={self.model.max_seq_len}; "
                "lower the one or raise the other"
            )
        if self.stride > self.seq_len:
            raise ValueError(
                f"data.stride={self.stride} is longer than training.seq_len={self.seq_len} and would skip "
                "tokens; lower it"
            )
        if self.data.streaming and self.training.epochs is not None:
            raise ValueError(
                "training.epochs needs a corpus of known length, and a stream has none; use "
                "training.max_steps"
            )
        if self.data.streaming and self.tokenizer.kind == "char":
            raise ValueError(
                "tokenizer.kind=char needs the whole corpus to collect its characters; a stream takes bpe, "
                "gpt2, byte or file"
            )
        return self

    @property
    def seq_len(self) -> int:
        return self.training.seq_len or self.model.max_seq_len

    @property
    def stride(self) -> int:
        return self.data.stride or self.seq_len

    def to_dict(self) -> dict:
        """Plain Python types, every default shown, readable by `validate_config` again."""
        return self.model_dump(exclude={"model": {"vocab_size"}})


def sections() -> dict[str, type[BaseModel]]:
    """The sections of a config by name, also those that may be left out."""
    found = {name: section_of_keys(field.annotation) for name, field in Config.model_fields.items()}
    return {name: section for name, section in found.items() if section}
