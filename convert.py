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
    """The flags of the command line. Raises UserError if --output cannot be written."""
    parser = make_parser(__doc__)
    model_group = parser.add_mutually_exclusive_group(required=True)
    model_group.add_argument(
        "--from",
        dest="from_name",  # args.from is not valid Python: from is a keyword
        type=file_path,
        metavar="NAME",
        help="a model on the Hugging Face hub, or a local folder: GPT-2, Llama, Mistral, Qwen3",
    )
    model_group.add_argument(
        "--ckpt", type=file_path, metavar="FILE", help="a checkpoint made by this project"
    )
    parser.add_argument(
        "--to",
        choices=("hf", "gguf", "weights"),
        help="with --ckpt: hf is a folder with safetensors; weights is a checkpoint that cannot be resumed",
    )
    parser.add_argument(
        "--dtype",
        choices=("f32", "f16", "q8_0"),
        help="with --to gguf: f32 (default), f16 (half the size) or q8_0 (8-bit integers in groups with a "
        "common scale, about a quarter of the size)",
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
    if args.from_name is not None and args.to:
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
    """Raise UserError if something is there already (no file is overwritten), or if nothing can be written
    there. `folder`: a folder is to be written, and may be there if it is empty."""
    if output.is_dir() and not folder:
        raise UserError(f"--output {output} is a folder; name a file in it, e.g. {output / 'model'}")
    is_empty_folder = output.is_dir() and not any(output.iterdir())
    if output.exists() and not is_empty_folder:
        raise UserError(f"--output {output} is there already; remove it, or name another")
    # The nearest folder that is there: those between it and the output will be made in it.
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"--output {output} cannot be written: {parent} is a file; name another")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output {output} cannot be written: {parent} is not writable; name another")


def checked_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The checked flags. `args.folder` is the folder of the model that --from names, which is downloaded if
    needed; None with --ckpt. Raises UserError."""
    args = parse_args(argv)
    args.folder = None
    if args.from_name is not None:
        args.folder = find_model(args.from_name, args.revision)
    return args


if __name__ == "__main__":
    # --help, wrong flags and a missing network are answered before the slow imports below
    checked = guarded(checked_args)
    from convert import main

    sys.exit(guarded(main, args=checked))

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

# What an imported model continues, to show that it works. No space at the end: a token that is one space
# alone is rare in texts.
SAMPLE_PROMPT = "Once upon a time"
SAMPLE_TOKENS = 20


@contextlib.contextmanager
def all_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary path next to `output`, to write a file or folder to. It is renamed to `output` at the end;
    after an error it is removed, so that nothing is left."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        if output.is_dir():  # an empty one: `check_output` lets no other through
            output.rmdir()
        temporary.rename(output)
    finally:  # one of these removes what an error has left; after the renaming both do nothing
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


# ---- in ------------------------------------------------------------------------------------------


def import_model(args: argparse.Namespace) -> None:
    """Write a checkpoint of a published model, after comparing its tokenizer and its logits with those of
    transformers. Raises UserError, and then writes nothing."""
    output = Path(args.output)
    model, tokenizer = read_pretrained(args.folder, args.from_name, args.max_seq_len, say=print)
    c = model.config
    print(
        f"{args.from_name}: {model.n_params():,} parameters, {c.n_layers} layers, d_model {c.d_model}, "
        f"{c.n_heads} query and {c.n_kv_heads} key/value heads, context {c.max_seq_len:,}, "
        f"vocabulary {c.vocab_size:,} ({tokenizer.kind})"
    )
    print(check_imported_text(tokenizer, args.folder))
    print(f"greedily, it writes: {greedy_sample(model, tokenizer)!r}")
    with all_or_nothing(output) as temporary:
        ours = logits_to_compare(model)
        record = run_record() | {"source": source_name(args.from_name, args.revision)}
        write_model(temporary, model, tokenizer, record)
        del model  # transformers now loads its own: two would need twice the memory
        print(check_logits(ours, args.folder))
    print(f"written: {output}; python3 infer.py --ckpt {output} --prompt ...")


def greedy_sample(model: GPTMini, tokenizer: Tokenizer) -> str:
    """SAMPLE_PROMPT and what the model writes after it, always taking the likeliest token; up to
    SAMPLE_TOKENS tokens."""
    ids = encode(tokenizer, SAMPLE_PROMPT, begins=True)
    if ids is None:  # a character tokenizer that lacks a letter of SAMPLE_PROMPT
        ids = [*tokenizer.bos_ids, tokenizer.eos_id]  # EOS: after it a new text begins
    always_likeliest = SamplingConfig(temperature=0)
    rows = model.generate(
        torch.tensor([ids]), SAMPLE_TOKENS, sampling=always_likeliest, eos_id=tokenizer.eos_id
    )
    without_bos = rows[0].tolist()[len(tokenizer.bos_ids) :]
    return tokenizer.decode(without_bos)


# ---- out -----------------------------------------------------------------------------------------


def export_hf(args: argparse.Namespace) -> None:
    """Write the folder that transformers, vLLM and lm-eval open: config, tokenizer, weights and a page that
    describes the model. It is complete, and was compared with transformers; or nothing is written. Raises
    UserError."""
    output = Path(args.output)
    model, tokenizer, metadata = load_model(args.ckpt)
    template = saved_template(metadata, args.ckpt)
    dtype = model.embed_tokens.weight.dtype
    # Before anything is written: an error if no architecture of transformers (GPT-2, Llama, Qwen3) is like
    # this model.
    config = config_json(model.config, tokenizer.eos_id, tokenizer.bos_ids, dtype)
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    generation["pad_token_id"] = tokenizer.eos_id  # padding is never read; transformers wants an id for it
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
        # safetensors makes a file that only its owner can read: give it the rights of the other files.
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        ours = logits_to_compare(model)
        del model  # transformers now loads its own: two would need twice the memory
        # written_by_us: a folder that transformers cannot open is an error too
        print(check_logits(ours, temporary, written_by_us=True))
        print(check_exported_text(tokenizer, temporary))
    names = ", ".join(sorted(path.name for path in output.iterdir()))
    print(f"written: {output} ({config['architectures'][0]}), {names}")


def save_weights(model: GPTMini, path: Path, output: Path) -> None:
    """Write the weights to `path`, a temporary file, under Hugging Face's names. If the disk is full, the
    UserError names `output`, the path that the user gave."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(to_theirs(model.config, model.state_dict()), path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library wraps errors of the disk in its own
        what = " ".join(str(error).split())[:200]  # on one line
        raise UserError(f"--output {output} cannot be written: {what}; make room, or name another") from None


def export_gguf(args: argparse.Namespace) -> None:
    """Write a GGUF file (the format of llama.cpp and of the programs built on it), complete and checked as
    far as the installed programs can; or nothing. Raises UserError."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--to gguf needs a package that is not installed; pip install gguf")
    output = Path(args.output)
    dtype = args.dtype or "f32"
    model, tokenizer, metadata = load_model(args.ckpt)
    template = saved_template(metadata, args.ckpt)
    with all_or_nothing(output) as temporary:
        name = model_name(metadata, args.ckpt)
        # GGUF's name for the rule that splits text into words; the check needs it.
        splitter_name = write_gguf(temporary, model, tokenizer, template, dtype, name)
        print(check_gguf(temporary, model, tokenizer, dtype, splitter_name))
    print(f"written: {output} ({dtype}), {output.stat().st_size / 2**20:,.1f} MB")


def export_weights(args: argparse.Namespace) -> None:
    """Write a checkpoint without the optimizer's state and with adapters merged. Its run cannot be resumed.
    Raises UserError."""
    with all_or_nothing(Path(args.output)) as temporary:
        write_merged(Path(args.ckpt), temporary)
    print(f"written: {args.output}, {Path(args.output).stat().st_size / 2**20:,.1f} MB")


def main(argv: list[str] | None = None, args: argparse.Namespace | None = None) -> int:
    """The whole script as one call. `args` are the flags if `checked_args` has checked them already. Returns
    the exit status; raises UserError."""
    args = args or checked_args(argv)
    if args.from_name is not None:
        import_model(args)
    elif args.to == "hf":
        export_hf(args)
    elif args.to == "gguf":
        export_gguf(args)
    else:
        export_weights(args)
    return 0
