"""The validation loss of a checkpoint over its whole validation set, in numbers that compare.

python3 eval_val.py --ckpt checkpoints/best.ckpt                         # the text that its training validated on
python3 eval_val.py --ckpt checkpoints/best.ckpt --config config.yaml    # the validation text of another config
python3 eval_val.py --ckpt checkpoints/best.ckpt --data my_book.txt      # any text; for a fine-tuned model also instructions, rows.json
python3 eval_val.py --ckpt checkpoints/best.ckpt --json
"""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass

from support.cli import UserError, add_config_flags, add_tokenizer_flag, file_path, guarded, make_parser, progress, warn


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--ckpt", type=file_path, metavar="FILE", required=True, help="checkpoint to score; it holds model, tokenizer and config")
    add_tokenizer_flag(parser)
    add_config_flags(parser)
    parser.add_argument(
        "--data",
        type=file_path,
        metavar="PATH",
        help="score this instead of a validation set: a text (.txt, .jsonl, a folder, a quoted glob), or instructions (.json, .jsonl, .parquet)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="blocks scored at once (default training.micro_batch_size); the loss is the same")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(parse_args, sys.argv[1:])  # --help and wrong flags answer before torch is imported

import torch

from data import PackedLMDataset, ValBatches, load_corpus, tokenize
from instruct import KINDS, Pair, pairs_of, read_files, score_responses, split_pairs, validation_pairs
from model import GPTMini
from support.checkpoint import load_model, saved_config, saved_template, warn_of_other_tokenizer
from support.config import Config, flag_overrides, load_config
from support.documents import text_documents
from support.files import kind_of
from support.hardware import resolve_device, resolve_precision
from support.hub import LOCAL_FORMATS, HubError
from support.token_files import TokenFiles, n_first_bytes, open_token_files
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


def scoring_config(model: GPTMini, metadata: dict, source: str, path: str | None, overrides: list[str] = (), data: str | None = None) -> Config:
    """The config in the file `path`, or the checkpoint's own, for scoring `model`; the defaults, to score the text `data` by a
    model that was not trained here. Raises UserError."""
    if path:
        base = None
    elif data and metadata["config"] is None:
        base = {"model": {"max_seq_len": model.config.max_seq_len}, "data": {"source": "text", "path": data}, "training": {"max_steps": 1}}
    else:
        base = saved_config(metadata, source)
    config = load_config(path, overrides, base=base)
    if config.base_ckpt:  # a config for fine-tuning names no model: it takes that of its base
        config.model = model.config
    config.template = saved_template(metadata, source) or config.template  # a model is asked as it was taught
    return config


def documents_of(config: Config, data: str | None, fine_tuned: bool = False, ckpt: str = "X.ckpt") -> list[str] | list[Pair] | TokenFiles:
    """The validation documents (or instructions, or token files) of a config, or all documents under the path `data`: rows of
    instructions for a model that has been `fine_tuned` on such. Raises UserError."""
    if data and holds_instructions(data, config):
        if not fine_tuned:
            raise UserError(
                f"--data {data} holds instructions, and this model has not been taught to answer any; teach it:\n"
                f"       python3 finetune.py --config configs/finetune_tiny.yaml --override base_ckpt={ckpt} --override data.path={data} "
                "--override training.warmup_steps=0"
            )
        return pairs_of(read_files(data, "--data", config.data.errors), config.data.fields, data)
    if data:
        return text_documents(data, config.data, "--data")
    if config.data.source == "tokens":
        return open_token_files(config.data.path, config.data.val_path, config.data.dtype, config.data.val_fraction)
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


def without_hub(error: HubError, args: argparse.Namespace, metadata: dict) -> HubError:
    """The same, with what works in its place: the text of the checkpoint's own config, where that is on this machine, or any."""
    own = (metadata.get("config") or {}).get("data", {})
    local = own.get("dataset") in (None, *LOCAL_FORMATS) or bool(own.get("path"))
    leave_out = "leave --config out, to score the text that the checkpoint validated on, or " if args.config and local and own else ""
    return HubError(error.why, f"{leave_out}give a text:\n       python3 eval_val.py --ckpt {args.ckpt} --data my_book.txt")


def text_blocks(documents: list[str] | TokenFiles, tokenizer: Tokenizer, config: Config, seq_len: int) -> tuple[PackedLMDataset, int, int]:
    """(the documents as validation blocks, their number, their bytes without those of the first token, which nothing predicts)."""
    if isinstance(documents, TokenFiles):
        documents.check(tokenizer)
        tokens = documents.val
        n_documents, n_bytes = tokens.count(tokenizer)
    else:
        tokens = tokenize(documents, tokenizer)
        n_bytes = sum(len(document.encode()) for document in documents) - n_first_bytes(tokens[:4].tolist(), tokenizer)
        n_documents = len(documents)
    blocks = PackedLMDataset(tokens, seq_len, pad_last=True, mask_eos=tokenizer.eos_id if config.data.document_mask else None)
    if len(blocks) == 0:
        raise UserError(f"the text has {len(tokens)} tokens with its end, and two are needed to score one; give more text")
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
    """Loss of `model` (in eval mode) on documents, packed into blocks as in training, or on the responses of instructions.
    Raises UserError if they are too short."""
    device, seq_len = next(model.parameters()).device, min(config.seq_len, model.config.max_seq_len)
    answers = isinstance(documents, list) and isinstance(documents[0], Pair)
    if answers:
        blocks = validation_pairs(documents, tokenizer, config, seq_len)
        n_documents, n_bytes = len(documents), blocks.n_bytes
    else:
        blocks, n_documents, n_bytes = text_blocks(documents, tokenizer, config, seq_len)
    batches = ValBatches(blocks, batch_size or config.training.micro_batch_size, rank=0, world=1, limit=None)
    totals = torch.zeros(5 if answers else 2, dtype=torch.float64)  # loss, targets; right tokens, responses, right responses
    for i in progress(range(len(batches)), "scoring"):
        batch = {name: value.to(device) for name, value in batches[i].items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16")):
            sums = score_responses(model, batch) if answers else torch.stack(model(**batch))
        totals += sums.double().cpu()
    loss_sum, n_targets, *right = totals.tolist()
    loss = loss_sum / n_targets
    accuracy = {"token_accuracy": right[0] / n_targets, "response_accuracy": right[2] / right[1]} if answers else {}
    bits_per_byte = loss_sum / math.log(2) / max(1, n_bytes)
    return Validation(loss, math.exp(min(loss, 700)), bits_per_byte, n_documents, int(n_targets), n_bytes, seq_len, **accuracy)


def which_set(args: argparse.Namespace, config: Config, own: Config | None) -> tuple[str, bool]:
    """(what is scored, in words; whether it is what the checkpoint's training validated on)."""
    if args.data:
        return args.data, False
    same = own is not None and (config.data, config.seed) == (own.data, own.seed)
    return "its own validation set" if same else f"the validation set of {args.config or 'its config with the overrides'}", same


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be at least 1")
    device = resolve_device(args.device or "auto")
    model, tokenizer, metadata = load_model(args.ckpt, device)
    warn_of_other_tokenizer(args.tokenizer, tokenizer.kind, tokenizer.vocab_size)
    config = scoring_config(model, metadata, args.ckpt, args.config, flag_overrides(args), args.data)
    try:
        texts = documents_of(config, args.data, metadata.get("template") is not None, args.ckpt)
    except HubError as error:
        raise without_hub(error, args, metadata) from None
    if config.seq_len > model.config.max_seq_len:
        warn(f"training.seq_len={config.seq_len}, and the model reads {model.config.max_seq_len} tokens, so blocks of as many are scored")
    precision = resolve_precision(config.hardware.precision, device)
    found, metrics = validate(model, tokenizer, texts, config, args.batch_size, precision), metadata["metrics"]
    scored, own_set = which_set(args, config, scoring_config(model, metadata, args.ckpt, None) if metadata.get("config") else None)
    logged = metrics.get("val_loss") if own_set else None  # the loss on another set does not compare
    if args.json:
        about = {"ckpt": args.ckpt, "step": metrics["step"], "set": scored, "logged_val_loss": logged, "precision": precision}
        print(json.dumps(about | asdict(found)))
        return 0
    print(f"{args.ckpt}: step {metrics['step']}, {model.n_params():,} parameters, tokenizer {tokenizer.kind} {tokenizer.vocab_size:,}")
    what, where = ("document", f"in blocks of {found.seq_len}") if found.token_accuracy is None else ("instruction", "in their responses")
    documents = f"{found.n_documents:,} {what}{'s' * (found.n_documents != 1)}"
    print(f"text: {documents} of {scored}, {found.n_tokens:,} tokens to predict {where}, {found.n_bytes:,} bytes")
    print(f"val_loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, {found.bits_per_byte:.4f} bits per byte")
    if found.token_accuracy is not None:
        print(f"token_accuracy {found.token_accuracy:.4f}, response_accuracy {found.response_accuracy:.4f}")
    if logged is not None:
        print(f"its newest validation in training gave {logged:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
