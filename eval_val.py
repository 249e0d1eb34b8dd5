"""The loss of a checkpoint on its whole validation set, in numbers that can be compared between models.

python3 eval_val.py --ckpt checkpoints/best.ckpt                       # the text its training validated on
python3 eval_val.py --ckpt checkpoints/best.ckpt --config config.yaml  # the validation text of another config
python3 eval_val.py --ckpt checkpoints/best.ckpt --data my_book.txt    # any text
python3 eval_val.py --ckpt checkpoints_sft/best.ckpt --data rows.json  # instructions, for a fine-tuned model
python3 eval_val.py --ckpt checkpoints/best.ckpt --quantize int8       # what int8 weights cost
python3 eval_val.py --ckpt checkpoints/best.ckpt --json
"""

import argparse
import json
import sys
from dataclasses import asdict

from support.cli import (
    add_config_flags,
    add_quantize_flag,
    add_tokenizer_flag,
    file_path,
    guarded,
    make_parser,
    warn_of_other_tokenizer,
)
from support.messages import UserError, warn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--ckpt",
        type=file_path,
        metavar="FILE",
        required=True,
        help="checkpoint to score; it holds model, tokenizer and config",
    )
    add_tokenizer_flag(parser)
    add_quantize_flag(parser)
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
        help="blocks scored at once (default training.micro_batch_size); does not change the loss",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(parse_args)  # --help and wrong flags are answered before the slow imports below
    from eval_val import main

    sys.exit(guarded(main))

from support.checkpoint import load_model
from support.config.read import flag_overrides
from support.device import resolve_device, resolve_precision
from support.evaluation.validation import Validation, documents_of, scoring_config, validate
from support.int8 import Sizes, quantize_int8, sizes_line
from support.text.hub import LOCAL_FORMATS, HubError


def suggest_local_text(error: HubError, args: argparse.Namespace, metadata: dict) -> HubError:
    """The same error with other advice: score a text with --data, or leave --config out if the text that the
    checkpoint validated on is on this machine."""
    own_data = (metadata.get("config") or {}).get("data", {})
    # No dataset, or the name of a file format ("text", "json", "parquet"), means files on this machine.
    is_local = own_data.get("dataset") in (None, *LOCAL_FORMATS) or bool(own_data.get("path"))
    advice = f"give a text:\n       python3 eval_val.py --ckpt {args.ckpt} --data my_book.txt"
    if args.config and own_data and is_local:
        advice = f"leave --config out, to score the text that the checkpoint validated on, or {advice}"
    return HubError(error.why, advice)


def name_of_set(args: argparse.Namespace, is_own_set: bool) -> str:
    """What is scored, in words. `is_own_set`: it is the text that the checkpoint's run validated on."""
    if args.data:
        return args.data
    if is_own_set:
        return "its own validation set"
    return f"the validation set of {args.config or 'its config with the overrides'}"


def report_lines(found: Validation, name: str) -> list[str]:
    """The lines to print; `name` says what was scored.

    A nat is the unit of a loss in natural logarithms. Perplexity is e to the power of the loss: the model is
    as unsure as if it chose evenly among that many tokens. Bits per byte can be compared between tokenizers;
    nats per token cannot, because tokens differ in length.
    """
    scored_instructions = found.token_accuracy is not None  # only instructions have this accuracy
    unit, where = "document", f"in blocks of {found.seq_len}"
    if scored_instructions:
        unit, where = "instruction", "in their responses"
    plural = "" if found.n_documents == 1 else "s"
    lines = [
        f"text: {found.n_documents:,} {unit}{plural} of {name}, "
        f"{found.n_tokens:,} tokens to predict {where}, {found.n_bytes:,} bytes",
        f"val_loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, "
        f"{found.bits_per_byte:.4f} bits per byte",
    ]
    if scored_instructions:
        lines.append(
            f"token_accuracy {found.token_accuracy:.4f}, response_accuracy {found.response_accuracy:.4f}"
        )
    return lines


def int8_lines(exact: Validation, found: Validation, sizes: Sizes, device: str) -> list[str]:
    """What int8 weights change: the loss, next to that of the checkpoint's own weights, and the bytes."""
    return [
        f"val_loss with int8 weights {found.loss:.4f} ({found.loss - exact.loss:+.5f}), "
        f"{found.bits_per_byte:.4f} bits per byte",
        sizes_line(sizes, device),
    ]


def int8_fields(exact: Validation, found: Validation, sizes: Sizes) -> dict:
    """The same for --json."""
    return {
        "loss": found.loss,
        "loss_change": found.loss - exact.loss,
        "bits_per_byte": found.bits_per_byte,
        "bytes_per_token": sizes.read_after,
        "bytes_per_token_before": sizes.read_before,
    }


def main(argv: list[str] | None = None) -> int:
    """The whole script as one call. Returns the exit status; raises UserError."""
    args = parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be at least 1")
    device = resolve_device(args.device or "auto")
    model, tokenizer, metadata = load_model(args.ckpt, device)
    warn_of_other_tokenizer(args.tokenizer, tokenizer.kind, tokenizer.vocab_size)
    config = scoring_config(model, metadata, args.ckpt, args.config, flag_overrides(args), args.data)
    is_own_set = False
    if metadata.get("config") and not args.data:
        own_config = scoring_config(model, metadata, args.ckpt, path=None)
        # The seed too: it draws which documents are held out.
        is_own_set = (config.data, config.seed) == (own_config.data, own_config.seed)
    # Only fine-tuning on instructions stores the layout of a conversation.
    is_fine_tuned = metadata.get("template") is not None
    try:
        documents = documents_of(config, args.data, fine_tuned=is_fine_tuned, ckpt=args.ckpt)
    except HubError as error:
        raise suggest_local_text(error, args, metadata) from None
    if config.seq_len > model.config.max_seq_len:
        warn(
            f"training.seq_len={config.seq_len}, but the model reads at most {model.config.max_seq_len} "
            f"tokens, so the blocks that are scored have {model.config.max_seq_len} tokens"
        )
    precision = resolve_precision(config.hardware.precision, device)
    n_params = model.n_params()
    found = validate(model, tokenizer, documents, config, args.batch_size, precision)
    if args.quantize:
        sizes = quantize_int8(model)
        found_int8 = validate(model, tokenizer, documents, config, args.batch_size, precision)
    metrics = metadata["metrics"]
    name = name_of_set(args, is_own_set)
    # The loss that training logged is that of the run's own set; next to another set it would mislead.
    logged = metrics.get("val_loss") if is_own_set else None
    if args.json:
        about = {
            "ckpt": args.ckpt,
            "step": metrics["step"],
            "set": name,
            "logged_val_loss": logged,
            "precision": precision,
        }
        if args.quantize:
            about["int8"] = int8_fields(found, found_int8, sizes)
        print(json.dumps(about | asdict(found)))
        return 0
    print(
        f"{args.ckpt}: step {metrics['step']}, {n_params:,} parameters, "
        f"tokenizer {tokenizer.kind} {tokenizer.vocab_size:,}"
    )
    for line in report_lines(found, name):
        print(line)
    if logged is not None:
        print(f"its newest validation in training gave {logged:.4f}")
    if args.quantize:
        print("\n".join(int8_lines(found, found_int8, sizes, device)))
    return 0
