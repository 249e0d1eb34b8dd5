"""The configuration: YAML or JSON plus --override, checked, as one typed tree. Nothing else reads config
files.

The descriptions below are the reference: `python3 -m support.config.schema` prints docs/CONFIG_REFERENCE.md
from them.
"""

import re
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from model import GPTConfig
from support.config.values import NUMBER, section_of_keys
from support.text.chat_template import DEFAULT_TEMPLATE, TEMPLATES, Template
from support.text.hub import LOCAL_FORMATS


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TokenizerConfig(Section):
    kind: Literal["bpe", "gpt2", "char", "byte", "file"] = Field(
        "bpe",
        description="`bpe` is trained on the training documents, `gpt2` is the published one, `char`, `byte`, "
        "`file`: a tokenizer.json.",
    )
    vocab_size: int = Field(
        1024,
        ge=257,
        description="Vocabulary wanted from `bpe`; a small corpus may give fewer. The other kinds have their own "
        "size.",
    )
    path: str | None = Field(
        None,
        description="Of kind `file`: tokenizer.json, vocab.json with merges.txt beside it, or their folder.",
    )

    @model_validator(mode="after")
    def _check(self) -> "TokenizerConfig":
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("path goes with kind=file: give both or neither")
        return self


HUB_KEYS = {
    "path",
    "dataset",
    "config",
    "revision",
    "split",
    "val_split",
    "train_docs",
    "val_docs",
    "val_fraction",
}
SOURCE_KEYS = {  # what belongs to some sources only
    "text": {"path", "val_path", "text_field", "val_fraction", "errors", "stride", "document_mask"},
    "hf": HUB_KEYS | {"text_field", "streaming", "stride", "document_mask"},
    "tokens": {"path", "val_path", "val_fraction", "dtype", "stride", "document_mask"},
    "instructions": HUB_KEYS | {"val_path", "fields", "errors", "packing", "mask_prompt", "too_long"},
}
PATHS = (
    "base_ckpt",
    "tokenizer.path",
    "data.path",
    "data.val_path",
    "checkpoint.dir",
)  # where ~ is the home folder
ROW_FIELDS = ("instruction", "input", "output")


class DataConfig(Section):
    source: Literal["text", "hf", "tokens", "instructions"] = Field(
        "text",
        description="`text`: local .txt or .jsonl files, held in memory. `hf`: a Hugging Face dataset. `tokens`: "
        "token files of `prepare.py`, or "
        "of other programs, of any size. `instructions`: rows for `finetune.py`, from a local file or the "
        "hub.",
    )
    path: str | None = Field(
        None,
        description="`text`: a file, a folder or a quoted glob of .txt and .jsonl files. `hf`: local data files, "
        "when `dataset` is `json`, "
        "`parquet` or `text`. `tokens`: a folder with train.npy and val.npy, or a .npy or .bin file. "
        "`instructions`: a .json, .jsonl or .parquet "
        "file, or a folder or a quoted glob of such, used in place of `dataset`.",
    )
    dtype: Literal["uint16", "uint32"] | None = Field(
        None,
        description="`tokens`: what a raw .bin file holds, which does not say so itself; others write `uint16`. Of "
        "a .npy file leave it out.",
    )
    val_path: str | None = Field(
        None, description="Validation text of its own, in place of a cut from the training text."
    )
    dataset: str | None = Field(
        None,
        description="`hf`, `instructions`: a dataset's name on the hub; `hf` also the local format `json`, "
        "`parquet` or `text`.",
    )
    config: str | None = Field(
        None, description="`hf`, `instructions`: the dataset's configuration, e.g. `20231101.en`."
    )
    revision: str | None = Field(
        None, description="`hf`, `instructions`: a commit of the dataset, so that it cannot change under you."
    )
    split: str = Field("train", description="`hf`, `instructions`: the split to train on.")
    val_split: str | None = Field(
        None,
        description="`hf`, `instructions`: the split to validate on. Default: documents cut from `split`.",
    )
    text_field: str = Field(
        "text", description="The field that holds the text, in .jsonl files and datasets."
    )
    streaming: bool = Field(
        False,
        description="`hf`: read while training, nothing kept on disk. The first `val_docs` documents are then the "
        "validation set.",
    )
    train_docs: int | None = Field(
        None, gt=0, description="`hf`, `instructions`: at most this many training documents or rows."
    )
    val_docs: int | None = Field(
        None,
        gt=0,
        description="`hf`, `instructions`: number of validation documents or rows; with `streaming` the default is "
        "200.",
    )
    val_fraction: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the text held out for validation: whole documents drawn by `seed`, and of one that "
        "is much larger than the share "
        "its end.",
    )
    stride: int | None = Field(
        None,
        gt=0,
        description="Distance between the starts of two blocks. Default: `seq_len`; smaller makes blocks overlap.",
    )
    shuffle: bool = Field(
        True,
        description="Train on the blocks in an order drawn anew for each epoch. A stream shuffles its documents "
        "within groups of 1,000.",
    )
    document_mask: bool = Field(
        False, description="Attention stays inside each document of a block, and positions restart with it."
    )
    fields: dict[str, str] = Field(
        {},
        description="`instructions`: what the file calls `instruction`, `input` and `output`, e.g. `{instruction: "
        "prompt, output: response}`.",
    )
    packing: bool = Field(
        False,
        description="`instructions`: several pairs in each block of `seq_len`, instead of one a row with padding; "
        "same loss.",
    )
    mask_prompt: bool = Field(
        True,
        description="`instructions`: train on responses alone. `false` trains on prompts too, to see what that "
        "changes.",
    )
    too_long: Literal["cut", "drop"] = Field(
        "cut",
        description="`instructions`: of a row longer than `seq_len`, `cut` takes away the prompt's start, or drops "
        "it where the response alone is "
        "too long; `drop` drops each such row. They are counted.",
    )
    errors: Literal["strict", "replace"] = Field(
        "strict",
        description="Bytes that are not UTF-8: `strict` stops and says where, `replace` reads them as U+FFFD.",
    )

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.val_split and NUMBER.fullmatch(self.val_split):
            raise ValueError(
                f"val_split={self.val_split} would be the name of a split; a share of the text is "
                f"val_fraction: {self.val_split}"
            )
        for key in sorted(set().union(*SOURCE_KEYS.values()) - SOURCE_KEYS[self.source]):
            if getattr(self, key) != DataConfig.model_fields[key].default:
                raise ValueError(
                    f"{key} does not belong to source={self.source}; remove it, or change source"
                )
        if odd := sorted(set(self.fields) - set(ROW_FIELDS)):
            raise ValueError(
                f"fields: {odd[0]} is none of {', '.join(ROW_FIELDS)}; write e.g. {{instruction: prompt, "
                f"output: response}}"
            )
        if self.source == "instructions" and not (self.path or self.dataset):
            raise ValueError(
                "source=instructions needs path: a .json, .jsonl or .parquet file, or dataset: a name on "
                "the hub"
            )
        if self.source == "text" and not self.path:
            raise ValueError("source=text needs path: a .txt or .jsonl file, a folder or a glob")
        if self.source == "tokens" and not self.path:
            raise ValueError(
                "source=tokens needs path: a folder that prepare.py made, or a .npy or .bin file"
            )
        if self.source == "hf" and not self.dataset:
            raise ValueError("source=hf needs dataset: a name on the hub, or json, parquet or text with path")
        if self.source == "instructions" and self.val_split and (self.path or self.val_path):
            raise ValueError(
                f"val_split={self.val_split} is of a dataset on the hub; with path or val_path leave it out"
            )
        if self.val_split == self.split:
            raise ValueError(
                f"val_split={self.val_split} is the training split too; leave it out, and documents are "
                "cut off for validation"
            )
        if self.val_split and self.dataset in LOCAL_FORMATS:
            raise ValueError(
                f"val_split={self.val_split}: local files (dataset={self.dataset}) have no splits; use "
                "val_docs or val_fraction"
            )
        return self


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
        description="Steps over which the learning rate runs its course. Default: `max_steps`. Fix it to be able "
        "to extend a run later.",
    )
    micro_batch_size: int = Field(
        8, gt=0, description="Sequences in one forward pass. Lower it first when memory runs out."
    )
    grad_accum_steps: int = Field(
        1,
        gt=0,
        description="Micro-batches whose gradients add up to one step: a large effective batch in little memory.",
    )
    seq_len: int | None = Field(
        None, gt=1, description="Tokens of one training sequence. Default: `model.max_seq_len`."
    )
    lr: float = Field(1e-3, gt=0, le=10, description="Peak learning rate of AdamW, at most 10.")
    min_lr: float = Field(
        0.0,
        ge=0,
        description="What `cosine`, `linear` and `wsd` decay to: steps after the schedule have it, its last step a "
        "little more. At most `lr`. "
        "Muon's part decays to the same share of `muon_lr`.",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps over which the learning rate rises to its peak: the first step has `1 / warmup_steps` "
        "of it, the last all of it.",
    )
    schedule: Literal["cosine", "linear", "wsd", "step", "constant"] = Field(
        "cosine",
        description="After the warmup: decay to `min_lr` by `cosine` or `linear`; `wsd` decays over the last fifth "
        "of those steps; `step` drops at "
        "80% and 90% of them, to 31.6% and 10% of the way from `min_lr` to the peak; `constant`.",
    )
    optimizer: Literal["adamw", "muon", "adamw_from_scratch"] = Field(
        "adamw",
        description="`muon`: orthogonalized momentum for the hidden matrices, AdamW for the rest; reaches a loss "
        "in fewer steps. "
        "`adamw_from_scratch`: the AdamW that from_scratch.py writes out.",
    )
    muon_lr: float = Field(
        0.02,
        gt=0,
        le=10,
        description="Peak learning rate of the Muon part, at most 10; `lr` is that of the AdamW part.",
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
        description="AdamW's averaging of gradient and squared gradient.",
    )
    eps: float = Field(
        1e-8, ge=1e-30, le=1, description="AdamW's guard against division by zero, 1e-30 to 1."
    )
    grad_clip: float | None = Field(
        1.0, gt=0, description="Largest norm of the whole gradient; longer ones are scaled down. `null`: off."
    )
    compile: bool = Field(
        False,
        description="torch.compile the model: 1.3 to 1.4 times faster on a CPU, after 15 to 40 seconds of "
        "compiling.",
    )
    val_every: int = Field(
        100, gt=0, description="Steps between validations; the last step always validates."
    )
    val_batches: int | None = Field(
        None, gt=0, description="Validate on this many micro-batches only. Default: the whole validation set."
    )
    train_eval_batches: int = Field(
        0,
        ge=0,
        description="At each validation also measure this many training micro-batches, always the first ones, as "
        "validation does, without "
        "dropout (`train_eval_loss`): how far `val_loss` lies above it is overfitting.",
    )
    log_every: int = Field(10, gt=0, description="Steps between rows of metrics.jsonl and of the console.")
    freeze: list[str] = Field(
        [],
        description="Parameters that are not trained: names, beginnings of names or patterns, e.g. `[embed_tokens, "
        "layers.0]`, `['*norm*']`.",
    )
    sample_every: int | None = Field(
        None, gt=0, description="Steps between printed text samples. Default: none."
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
        if (
            steps and self.warmup_steps > steps and self.max_steps != 0
        ):  # a run of 0 steps has no schedule, and no warmup
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is longer than the schedule of {steps} steps; try "
                f"warmup_steps={max(1, steps // 10)}"
            )
        if not all(0 <= b < 1 for b in self.betas):
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
    devices: int = Field(1, gt=0, description="Processes on this machine, one a GPU.")
    num_nodes: int = Field(1, gt=0, description="Machines.")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="With several devices: `ddp` (also `auto`) copies the model to each; `fsdp` shards it over "
        "them.",
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true"] = Field(
        "auto",
        description="`auto`: bf16-mixed on a GPU that has bf16, else float32. fp16 is not offered: it overflows.",
    )
    num_workers: int = Field(
        0, ge=0, description="Processes that prepare batches ahead. A stream uses at most one."
    )
    deterministic: bool = Field(
        False,
        description="Only operations with repeatable results; slower on a GPU, an error where there is none.",
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
        description="Steps between checkpoints. The last step, and each new best validation loss, is saved too.",
    )
    keep_last: int | None = Field(
        3,
        gt=0,
        description="Keep this many step files; `best`, `last` and `final` stay besides. `null` keeps all.",
    )


class LoggingConfig(Section):
    tensorboard: bool = Field(False, description="Also write TensorBoard files (pip install tensorboard).")
    wandb: bool = Field(False, description="Also log to Weights & Biases (pip install wandb).")


class LoraConfig(Section):
    rank: int = Field(
        8,
        gt=0,
        description="Rows of A and columns of B: what the adapter of a matrix can express, and what it costs.",
    )
    alpha: float = Field(16.0, gt=0, description="The product of B and A is multiplied by `alpha / rank`.")
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Names of the matrices, e.g. `[q_proj, v_proj]`. Default: all in the blocks.",
    )


class Config(Section):
    base_ckpt: str | None = Field(
        None,
        description="`finetune.py`: the checkpoint to start from. Architecture and tokenizer are its own, so those "
        "sections are left out.",
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**63,
        description="Decides initial weights, data order, validation cut, dropout and samples.",
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
        description="Train low-rank adapters of the matrices, and nothing else; `lora.rank=8` is enough to say so.",
    )
    template: Template | None = Field(
        None,
        description="`finetune.py`: the layout of a conversation, by name (`chat`, `alpaca`) or written out. "
        "Default for instructions: `chat`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_template(cls, data: Any) -> Any:
        """`template: alpaca` stands for the texts of that name."""
        if not isinstance(data, dict):
            return data
        for_instructions = isinstance(data.get("data"), dict) and data["data"].get("source") == "instructions"
        name = data.get("template") or (DEFAULT_TEMPLATE if for_instructions else None)
        if isinstance(name, str):
            if name not in TEMPLATES:
                raise ValueError(
                    f"template={name} is none of {', '.join(TEMPLATES)}; name one, or write out prompt and "
                    "prompt_with_input"
                )
            data = data | {"template": TEMPLATES[name]}
        return data

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.model.vocab_size:
            raise ValueError(
                "model.vocab_size is not set here: it comes from the tokenizer; set tokenizer.vocab_size "
                "for bpe"
            )
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"training.seq_len={self.seq_len} is longer than "
                f"model.max_seq_len={self.model.max_seq_len}; lower the one or raise the other"
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
    """The sections of a config by name, those that may be left out too."""
    found = {name: section_of_keys(field.annotation) for name, field in Config.model_fields.items()}
    return {name: section for name, section in found.items() if section}


def reference_markdown() -> str:
    """docs/CONFIG_REFERENCE.md, from the schema."""
    lines = [
        "# Config reference",
        "",
        "Made from the schema by `python3 -m support.config.schema`; every key, its default and its effect.",
        "Any of them can be set on the command line: `--override training.lr=3e-4`. What a file or an "
        "override says is read as the",
        "key's type: a text as written (the text `null` in quotes), a number in decimal (`010` is 10, "
        "`1_000` is 1000; `0x1F`, `1:30` and",
        "infinity are refused), a switch as `true` or `false` (also `yes`, `no`, `on`, `off`), `null` as "
        "none where a key may be left out.",
        "A file that ends in `.json` is JSON (`configs/sample_custom.json` is one), every other one YAML. "
        "In paths `~` is the home folder.",
        "",
    ]
    parts = [
        ("Top level", "", Config),
        *((f"`{name}`", name + ".", model) for name, model in sections().items()),
    ]
    for title, prefix, model in parts:
        lines += [f"## {title}", "", "| key | default | effect |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            if field.description and (prefix + name) != "model.vocab_size":
                default = (
                    "required"
                    if field.is_required()
                    else yaml.safe_dump(field.default, default_flow_style=True)
                    .removesuffix("\n...\n")
                    .strip()
                )
                lines.append(f"| `{prefix}{name}` | `{default}` | {field.description} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference_markdown(), end="")
