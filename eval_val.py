"""The validation loss of a checkpoint over its whole validation set, in numbers that compare.

python3 eval_val.py --ckpt checkpoints/best.ckpt                         # the text that its training validated on
python3 eval_val.py --ckpt checkpoints/best.ckpt --config config.yaml    # the validation text of another config
python3 eval_val.py --ckpt checkpoints/best.ckpt --data my_book.txt      # any text; for a fine-tuned model also instructions, rows.json
python3 eval_val.py --ckpt checkpoints/best.ckpt --json
"""

import argparse
import json
import sys
from dataclasses import asdict

from support.cli import (
    add_config_flags,
    add_tokenizer_flag,
    file_path,
    guarded,
    make_parser,
    warn_of_other_tokenizer,
)
from support.messages import UserError, warn


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--ckpt",
        type=file_path,
        metavar="FILE",
        required=True,
        help="checkpoint to score; it holds model, tokenizer and config",
    )
    add_tokenizer_flag(parser)
    add_config_flags(parser)
    parser.add_argument(
        "--data",
        type=file_path,
        metavar="PATH",
        help="score this instead of a validation set: a text (.txt, .jsonl, a folder, a quoted glob), or "
        "instructions (.json, .jsonl, .parquet)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="blocks scored at once (default training.micro_batch_size); the loss is the same",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(parse_args, sys.argv[1:])  # --help and wrong flags answer before torch is imported


from support.checkpoint import load_model
from support.config.read import flag_overrides
from support.config.schema import Config
from support.device import resolve_device, resolve_precision
from support.evaluation.validation import documents_of, scoring_config, validate
from support.text.hub import LOCAL_FORMATS, HubError


def without_hub(error: HubError, args: argparse.Namespace, metadata: dict) -> HubError:
    """The same, with what works in its place: the text of the checkpoint's own config, where that is on
    this machine, or any."""
    own = (metadata.get("config") or {}).get("data", {})
    local = own.get("dataset") in (None, *LOCAL_FORMATS) or bool(own.get("path"))
    leave_out = (
        "leave --config out, to score the text that the checkpoint validated on, or "
        if args.config and local and own
        else ""
    )
    return HubError(
        error.why,
        f"{leave_out}give a text:\n       python3 eval_val.py --ckpt {args.ckpt} --data my_book.txt",
    )


def which_set(args: argparse.Namespace, config: Config, own: Config | None) -> tuple[str, bool]:
    """(what is scored, in words; whether it is what the checkpoint's training validated on)."""
    if args.data:
        return args.data, False
    same = own is not None and (config.data, config.seed) == (own.data, own.seed)
    return (
        "its own validation set"
        if same
        else f"the validation set of {args.config or 'its config with the overrides'}",
        same,
    )


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
        warn(
            f"training.seq_len={config.seq_len}, and the model reads {model.config.max_seq_len} tokens, so "
            "blocks of as many are scored"
        )
    precision = resolve_precision(config.hardware.precision, device)
    found, metrics = (
        validate(model, tokenizer, texts, config, args.batch_size, precision),
        metadata["metrics"],
    )
    scored, own_set = which_set(
        args, config, scoring_config(model, metadata, args.ckpt, None) if metadata.get("config") else None
    )
    logged = metrics.get("val_loss") if own_set else None  # the loss on another set does not compare
    if args.json:
        about = {
            "ckpt": args.ckpt,
            "step": metrics["step"],
            "set": scored,
            "logged_val_loss": logged,
            "precision": precision,
        }
        print(json.dumps(about | asdict(found)))
        return 0
    print(
        f"{args.ckpt}: step {metrics['step']}, {model.n_params():,} parameters, tokenizer {tokenizer.kind} "
        f"{tokenizer.vocab_size:,}"
    )
    what, where = (
        ("document", f"in blocks of {found.seq_len}")
        if found.token_accuracy is None
        else ("instruction", "in their responses")
    )
    documents = f"{found.n_documents:,} {what}{'s' * (found.n_documents != 1)}"
    print(
        f"text: {documents} of {scored}, {found.n_tokens:,} tokens to predict {where}, {found.n_bytes:,} "
        "bytes"
    )
    print(
        f"val_loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, "
        f"{found.bits_per_byte:.4f} bits per byte"
    )
    if found.token_accuracy is not None:
        print(f"token_accuracy {found.token_accuracy:.4f}, response_accuracy {found.response_accuracy:.4f}")
    if logged is not None:
        print(f"its newest validation in training gave {logged:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
