"""Weights in, weights out: imports published models, and exports checkpoints for other programs.

python3 convert.py --from gpt2 --output checkpoints/gpt2.ckpt       # a name on the hub, or a local folder
python3 convert.py --from path/to/hf_llama_folder --output checkpoints/llama.ckpt
python3 convert.py --ckpt checkpoints/final.ckpt --to hf --output export/    # for transformers, vLLM, lm-eval
python3 convert.py --ckpt checkpoints/final.ckpt --to gguf --output m.gguf  # for llama.cpp, Ollama, LM Studio
python3 convert.py --ckpt checkpoints/final.ckpt --to weights --output small.ckpt    # without the optimizer
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from support.cli import file_path, guarded, make_parser
from support.messages import UserError
from support.text.hub import find_model


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from",
        dest="source",
        type=file_path,
        metavar="NAME",
        help="a model on the Hugging Face hub, or a local folder: GPT-2, Llama, Mistral, Qwen3",
    )
    source.add_argument("--ckpt", type=file_path, metavar="FILE", help="a checkpoint of ours")
    parser.add_argument(
        "--to",
        choices=("hf", "gguf", "weights"),
        help="with --ckpt: hf is a folder with safetensors; weights is a checkpoint that cannot be resumed",
    )
    parser.add_argument(
        "--dtype",
        choices=("f32", "f16", "q8_0"),
        help="with --to gguf: f32 (default), f16 (half the size) or q8_0 (about a quarter)",
    )
    parser.add_argument(
        "--output", type=file_path, metavar="PATH", required=True, help="the file or folder to write"
    )
    parser.add_argument("--revision", metavar="COMMIT", help="with --from: a commit of the hub's repository")
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="with --from: the context to keep (default: all, at most 4096)",
    )
    args = parser.parse_args(argv)
    if args.source is not None and args.to:
        parser.error("--to goes with --ckpt")
    if args.ckpt and not args.to:
        parser.error("--ckpt needs --to hf, gguf or weights")
    if args.ckpt and (args.revision or args.max_seq_len is not None):
        parser.error("--revision and --max-seq-len go with --from")
    if args.dtype and args.to != "gguf":
        parser.error("--dtype goes with --to gguf")
    if args.max_seq_len is not None and args.max_seq_len < 2:
        raise UserError(f"--max-seq-len {args.max_seq_len} must be at least 2")
    check_output(Path(args.output), folder=args.to == "hf")
    return args


def check_output(output: Path, folder: bool) -> None:
    """Raise UserError if something is there already: a conversion replaces nothing."""
    if output.is_dir() and not folder:
        raise UserError(f"--output {output} is a folder; name a file in it, e.g. {output / 'model'}")
    is_empty_folder = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_empty_folder:
        raise UserError(f"--output {output} is there already; remove it, or name another")
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"--output {output} cannot be written: {parent} is a file; name another")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output {output} cannot be written: {parent} is not writable; name another")


def prepare(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked flags, with the folder of the model that --from names in `folder`, downloaded if needed.
    Raises UserError."""
    args = parse_args(argv)
    args.folder = None if args.source is None else find_model(args.source, args.revision)
    return args


if __name__ == "__main__":
    # --help, wrong flags and a missing network are answered before the slow imports below
    prepared = guarded(prepare)
    from convert import main

    sys.exit(guarded(main, args=prepared))

import torch

from model import GPTMini
from sampling import SamplingConfig
from support.checkpoint import load_model, saved_template, write_merged, write_model
from support.evaluation.likelihoods import encode
from support.exchange.compare_gguf import check_gguf
from support.exchange.compare_logits import check_logits, logits_to_compare
from support.exchange.compare_texts import check_exported_text, check_imported_text
from support.exchange.gguf_file import write_gguf
from support.exchange.hf_folder import read_pretrained
from support.exchange.hf_names import config_json, to_theirs
from support.exchange.model_card import model_card, model_name, source_name
from support.exchange.tokenizer_json import tokenizer_config, tokenizer_json
from support.files.atomic import atomic_write
from support.run.folder import run_record
from tokenizer import Tokenizer

# What an imported model continues, to show that it works. No blank at the end, which is rare in texts.
SAMPLE_PROMPT = "Once upon a time"


@contextlib.contextmanager
def all_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary name next to `output`, renamed to it if all goes well; otherwise nothing is left."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        if output.is_dir():  # an empty one
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


# ---- in ------------------------------------------------------------------------------------------


def import_model(args: argparse.Namespace) -> None:
    output = Path(args.output)
    model, tokenizer = read_pretrained(args.folder, args.source, args.max_seq_len, print)
    c = model.config
    print(
        f"{args.source}: {model.n_params():,} parameters, {c.n_layers} layers, d_model {c.d_model}, "
        f"{c.n_heads} query and {c.n_kv_heads} key/value heads, context {c.max_seq_len:,}, "
        f"vocabulary {c.vocab_size:,} ({tokenizer.kind})"
    )
    print(check_imported_text(tokenizer, args.folder))
    print(f"greedily, it writes: {greedy_sample(model, tokenizer)!r}")
    with all_or_nothing(output) as temporary:
        ours = logits_to_compare(model)
        record = run_record() | {"source": source_name(args.source, args.revision)}
        write_model(temporary, model, tokenizer, record)
        del model  # transformers now loads its own: two would need twice the memory
        print(check_logits(ours, args.folder))
    print(f"written: {output}; python3 infer.py --ckpt {output} --prompt ...")


def greedy_sample(model: GPTMini, tokenizer: Tokenizer) -> str:
    """SAMPLE_PROMPT and what the model writes after it; if the vocabulary lacks its letters, what it writes
    after EOS."""
    ids = encode(tokenizer, SAMPLE_PROMPT, begins=True) or [*tokenizer.bos_ids, tokenizer.eos_id]
    sampling = SamplingConfig(temperature=0)
    written = model.generate(torch.tensor([ids]), 20, sampling, eos_id=tokenizer.eos_id)[0].tolist()
    return tokenizer.decode(written[len(tokenizer.bos_ids) :])


# ---- out -----------------------------------------------------------------------------------------


def export_hf(args: argparse.Namespace) -> None:
    """Write the folder, complete and checked, or nothing."""
    output = Path(args.output)
    model, tokenizer, metadata = load_model(args.ckpt)
    template = saved_template(metadata, args.ckpt)
    dtype = model.embed_tokens.weight.dtype
    # raises an error for a model that no family can describe, before anything is written
    config = config_json(model.config, tokenizer.eos_id, tokenizer.bos_ids, dtype)
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    generation["pad_token_id"] = tokenizer.eos_id
    tokenizer_settings = tokenizer_config(tokenizer, template, model.config.max_seq_len)
    texts = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(generation),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": json.dumps(tokenizer_settings, indent=2),
        "README.md": model_card(model, tokenizer, metadata, args.ckpt, template),
    }
    with all_or_nothing(output) as temporary:
        temporary.mkdir()
        for name, text in texts.items():
            with atomic_write(temporary / name) as file:
                file.write(text.encode())
        save_weights(model, temporary / "model.safetensors", output)
        # the library makes a file that only its owner can read
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        text_result = check_exported_text(tokenizer, temporary)
        ours = logits_to_compare(model)
        del model  # transformers now loads its own: two would need twice the memory
        print(check_logits(ours, temporary, written_by_us=True))
        print(text_result)
    names = ", ".join(sorted(path.name for path in output.iterdir()))
    print(f"written: {output} ({config['architectures'][0]}), {names}")


def save_weights(model: GPTMini, path: Path, output: Path) -> None:
    """Write the weights under Hugging Face's names. Raises UserError on a full disk, which names `output`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(to_theirs(model.config, model.state_dict()), path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library wraps errors of the disk in its own
        what = " ".join(str(error).split())[:200]
        raise UserError(f"--output {output} cannot be written: {what}; make room, or name another") from None


def export_gguf(args: argparse.Namespace) -> None:
    """Write the file, complete and checked as far as possible, or nothing."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--to gguf needs a package that is not installed; pip install gguf")
    output, dtype = Path(args.output), args.dtype or "f32"
    model, tokenizer, metadata = load_model(args.ckpt)
    template = saved_template(metadata, args.ckpt)
    with all_or_nothing(output) as temporary:
        name = model_name(metadata, args.ckpt)
        word_splitter = write_gguf(temporary, model, tokenizer, template, dtype, name)
        print(check_gguf(temporary, model, tokenizer, dtype, word_splitter))
    print(f"written: {output} ({dtype}), {output.stat().st_size / 2**20:,.1f} MB")


def export_weights(args: argparse.Namespace) -> None:
    with all_or_nothing(Path(args.output)) as temporary:
        write_merged(Path(args.ckpt), temporary)
    print(f"written: {args.output}, {Path(args.output).stat().st_size / 2**20:,.1f} MB")


def main(argv: list[str] | None = None, args: argparse.Namespace | None = None) -> int:
    """`args` are the flags if they have already been checked by `prepare`."""
    args = args or prepare(argv)
    if args.source is not None:
        import_model(args)
    elif args.to == "hf":
        export_hf(args)
    elif args.to == "gguf":
        export_gguf(args)
    else:
        export_weights(args)
    return 0
