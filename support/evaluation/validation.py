"""The loss of a model on a whole validation text, in numbers that compare across tokenizers."""

import math
import os
from dataclasses import dataclass

import torch

from data import PackedLMDataset, ValBatches, load_corpus, tokenize
from instruct import Pair, pairs_of, score_responses, split_pairs, validation_pairs
from model import GPTMini
from support.checkpoint import saved_config, saved_template
from support.cli import progress
from support.config.read import load_config
from support.config.schema import Config
from support.files.find_files import kind_of
from support.messages import UserError
from support.text.documents import text_documents
from support.text.instruction_files import KINDS, read_files
from support.text.token_files import TokenFiles, n_first_bytes, open_token_files
from tokenizer import Tokenizer


@dataclass
class Validation:
    """How well a model predicts a text, or the responses of instructions."""

    loss: float  # nats per token; the first token of a text is not predicted
    perplexity: float  # exp(loss): as if the model chose evenly among that many tokens
    bits_per_byte: float  # total loss in bits per byte of the text: compares models with any tokenizers
    n_documents: int
    n_tokens: int
    n_bytes: int
    seq_len: int
    token_accuracy: float | None = None  # share of response tokens that were the likeliest; None for a text
    response_accuracy: float | None = None  # share of responses in which every token was the likeliest


def scoring_config(
    model: GPTMini,
    metadata: dict,
    source: str,
    path: str | None,
    overrides: list[str] = (),
    data: str | None = None,
) -> Config:
    """The config to score `model` with: of the file `path`, or the checkpoint's own. For a model that was not
    trained here, the defaults are enough to score the text `data`. Raises UserError."""
    if path:
        base = None
    elif data and metadata["config"] is None:
        base = {
            "model": {"max_seq_len": model.config.max_seq_len},
            "data": {"source": "text", "path": data},
            "training": {"max_steps": 1},
        }
    else:
        base = saved_config(metadata, source)
    config = load_config(path, overrides, base=base)
    if config.base_ckpt:  # a config for fine-tuning names no model: it takes the one of its base
        config.model = model.config
    # A model is asked in the layout that it was trained on.
    config.template = saved_template(metadata, source) or config.template
    return config


def documents_of(
    config: Config, data: str | None, fine_tuned: bool = False, ckpt: str = "X.ckpt"
) -> list[str] | list[Pair] | TokenFiles:
    """The validation documents (or instructions, or token files) of a config; or all documents at the path
    `data`, which may be rows of instructions if the model was `fine_tuned` on such. Raises UserError."""
    if data and holds_instructions(data, config):
        if not fine_tuned:
            raise UserError(
                f"--data {data} holds instructions, and this model has not been taught to answer any; "
                "teach it:\n"
                "       python3 finetune.py --config configs/finetune_tiny.yaml "
                f"--override base_ckpt={ckpt} --override data.path={data} "
                "--override training.warmup_steps=0"
            )
        return pairs_of(read_files(data, "--data", config.data.errors), config.data.fields, data)
    if data:
        return text_documents(data, config.data, "--data")
    if config.data.source == "tokens":
        return open_token_files(
            config.data.path,
            val_path=config.data.val_path,
            dtype=config.data.dtype,
            val_fraction=config.data.val_fraction,
        )
    if config.data.source == "instructions":
        return split_pairs(config)[1]
    return load_corpus(config).val


def holds_instructions(data: str, config: Config) -> bool:
    """Whether the first row of the file `data` has an instruction or an output, and no text."""
    if not os.path.isfile(data) or kind_of(data) not in KINDS:
        return False
    try:
        row, _ = next(read_files(data, "--data", "replace"))
    except (UserError, StopIteration):  # the error is raised later, when all of the file is read
        return kind_of(data) == ".json"
    names = {config.data.fields.get(name, name) for name in ("instruction", "output")}
    return bool(names & row.keys()) and config.data.text_field not in row


def text_blocks(
    documents: list[str] | TokenFiles, tokenizer: Tokenizer, config: Config, seq_len: int
) -> tuple[PackedLMDataset, int, int]:
    """(the documents as validation blocks, their number, their bytes without those of the first token, which
    nothing predicts)."""
    if isinstance(documents, TokenFiles):
        documents.check(tokenizer)
        tokens = documents.val
        n_documents, n_bytes = tokens.count(tokenizer)
    else:
        tokens = tokenize(documents, tokenizer)
        n_documents = len(documents)
        n_bytes = sum(len(document.encode()) for document in documents)
        n_bytes -= n_first_bytes(tokens[:4].tolist(), tokenizer)
    segment_end_id = tokenizer.eos_id if config.data.document_mask else None
    blocks = PackedLMDataset(tokens, seq_len, pad_last=True, segment_end_id=segment_end_id)
    if len(blocks) == 0:
        raise UserError(
            f"the text has {len(tokens)} tokens with its end, and at least two are needed; give more text"
        )
    return blocks, n_documents, n_bytes


@torch.no_grad()
def validate(
    model: GPTMini,
    tokenizer: Tokenizer,
    documents: list[str] | list[Pair] | TokenFiles,
    config: Config,
    batch_size: int | None = None,
    precision: str = "32-true",
) -> Validation:
    """How well `model` (in eval mode) predicts documents, packed into blocks as in training, or the responses
    of instructions. Raises UserError if they are too short."""
    device = next(model.parameters()).device
    seq_len = min(config.seq_len, model.config.max_seq_len)
    has_responses = isinstance(documents, list) and isinstance(documents[0], Pair)
    if has_responses:
        blocks = validation_pairs(documents, tokenizer, config, seq_len)
        n_documents, n_bytes = len(documents), blocks.n_bytes
    else:
        blocks, n_documents, n_bytes = text_blocks(documents, tokenizer, config, seq_len)
    batches = ValBatches(blocks, batch_size or config.training.micro_batch_size, rank=0, world=1, limit=None)
    # loss, targets; for responses also: right tokens, responses, right responses
    totals = torch.zeros(5 if has_responses else 2, dtype=torch.float64)
    for i in progress(range(len(batches)), "scoring"):
        batch = {name: value.to(device) for name, value in batches[i].items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16")):
            sums = score_responses(model, batch) if has_responses else torch.stack(model(**batch))
        totals += sums.double().cpu()
    loss_sum, n_targets, *accuracy_sums = totals.tolist()
    loss = loss_sum / n_targets
    found = Validation(
        loss=loss,
        perplexity=math.exp(min(loss, 700)),  # exp(710) is too large for a float
        bits_per_byte=loss_sum / math.log(2) / max(1, n_bytes),
        n_documents=n_documents,
        n_tokens=int(n_targets),
        n_bytes=n_bytes,
        seq_len=seq_len,
    )
    if has_responses:
        n_right_tokens, n_responses, n_right_responses = accuracy_sums
        found.token_accuracy = n_right_tokens / n_targets
        found.response_accuracy = n_right_responses / n_responses
    return found
