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
    """What a model makes of a text."""

    loss: float  # nats per token, over all tokens but the first
    perplexity: float  # exp(loss): as if it chose among so many tokens evenly
    bits_per_byte: float  # loss of the whole text per byte of it: compares models whatever their tokenizers
    n_documents: int
    n_tokens: int
    n_bytes: int
    seq_len: int
    token_accuracy: float | None = None  # of responses, the share of tokens found likeliest; None for a text
    response_accuracy: float | None = None  # the share of responses of which each token is


def scoring_config(
    model: GPTMini,
    metadata: dict,
    source: str,
    path: str | None,
    overrides: list[str] = (),
    data: str | None = None,
) -> Config:
    """The config in the file `path`, or the checkpoint's own, for scoring `model`; the defaults, to score
    the text `data` by a model that was not trained here. Raises UserError."""
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
    if config.base_ckpt:  # a config for fine-tuning names no model: it takes that of its base
        config.model = model.config
    config.template = saved_template(metadata, source) or config.template  # a model is asked as it was taught
    return config


def documents_of(
    config: Config, data: str | None, fine_tuned: bool = False, ckpt: str = "X.ckpt"
) -> list[str] | list[Pair] | TokenFiles:
    """The validation documents (or instructions, or token files) of a config, or all documents under the
    path `data`: rows of instructions for a model that has been `fine_tuned` on such. Raises UserError."""
    if data and holds_instructions(data, config):
        if not fine_tuned:
            raise UserError(
                f"--data {data} holds instructions, and this model has not been taught to answer any; "
                "teach it:\n"
                "       python3 finetune.py --config configs/finetune_tiny.yaml --override "
                f"base_ckpt={ckpt} --override data.path={data} "
                "--override training.warmup_steps=0"
            )
        return pairs_of(read_files(data, "--data", config.data.errors), config.data.fields, data)
    if data:
        return text_documents(data, config.data, "--data")
    if config.data.source == "tokens":
        return open_token_files(
            config.data.path, config.data.val_path, config.data.dtype, config.data.val_fraction
        )
    return split_pairs(config)[1] if config.data.source == "instructions" else load_corpus(config).val


def holds_instructions(data: str, config: Config) -> bool:
    """Whether the first row of the file `data` has an instruction or an output, and no text."""
    if not os.path.isfile(data) or kind_of(data) not in KINDS:
        return False
    try:
        row, _ = next(read_files(data, "--data", "replace"))
    except (UserError, StopIteration):  # whoever reads all of it says what is wrong
        return kind_of(data) == ".json"
    names = {config.data.fields.get(name, name) for name in ("instruction", "output")}
    return bool(names & row.keys()) and config.data.text_field not in row


def text_blocks(
    documents: list[str] | TokenFiles, tokenizer: Tokenizer, config: Config, seq_len: int
) -> tuple[PackedLMDataset, int, int]:
    """(the documents as validation blocks, their number, their bytes without those of the first token,
    which nothing predicts)."""
    if isinstance(documents, TokenFiles):
        documents.check(tokenizer)
        tokens = documents.val
        n_documents, n_bytes = tokens.count(tokenizer)
    else:
        tokens = tokenize(documents, tokenizer)
        n_bytes = sum(len(document.encode()) for document in documents) - n_first_bytes(
            tokens[:4].tolist(), tokenizer
        )
        n_documents = len(documents)
    blocks = PackedLMDataset(
        tokens, seq_len, pad_last=True, mask_eos=tokenizer.eos_id if config.data.document_mask else None
    )
    if len(blocks) == 0:
        raise UserError(
            f"the text has {len(tokens)} tokens with its end, and two are needed to score one; give more text"
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
    """Loss of `model` (in eval mode) on documents, packed into blocks as in training, or on the responses
    of instructions. Raises UserError if they are too short."""
    device, seq_len = next(model.parameters()).device, min(config.seq_len, model.config.max_seq_len)
    answers = isinstance(documents, list) and isinstance(documents[0], Pair)
    if answers:
        blocks = validation_pairs(documents, tokenizer, config, seq_len)
        n_documents, n_bytes = len(documents), blocks.n_bytes
    else:
        blocks, n_documents, n_bytes = text_blocks(documents, tokenizer, config, seq_len)
    batches = ValBatches(blocks, batch_size or config.training.micro_batch_size, rank=0, world=1, limit=None)
    totals = torch.zeros(
        5 if answers else 2, dtype=torch.float64
    )  # loss, targets; right tokens, responses, right responses
    for i in progress(range(len(batches)), "scoring"):
        batch = {name: value.to(device) for name, value in batches[i].items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16")):
            sums = score_responses(model, batch) if answers else torch.stack(model(**batch))
        totals += sums.double().cpu()
    loss_sum, n_targets, *right = totals.tolist()
    loss = loss_sum / n_targets
    accuracy = (
        {"token_accuracy": right[0] / n_targets, "response_accuracy": right[2] / right[1]} if answers else {}
    )
    bits_per_byte = loss_sum / math.log(2) / max(1, n_bytes)
    return Validation(
        loss,
        math.exp(min(loss, 700)),
        bits_per_byte,
        n_documents,
        int(n_targets),
        n_bytes,
        seq_len,
        **accuracy,
    )
