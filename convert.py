"""Weights in, weights out: published models to checkpoints of ours, our checkpoints to what other programs
load.

python3 convert.py --from gpt2 --output checkpoints/gpt2.ckpt                  # a name on the hub, or a local folder
python3 convert.py --from path/to/hf_llama_folder --output checkpoints/llama.ckpt
python3 convert.py --ckpt checkpoints/final.ckpt --to hf --output export/      # for transformers, vLLM, lm-eval
python3 convert.py --ckpt checkpoints/final.ckpt --to gguf --output model.gguf    # for llama.cpp, Ollama, LM Studio
python3 convert.py --ckpt checkpoints/final.ckpt --to weights --output small.ckpt    # without the optimizer's state
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from support.cli import file_path, guarded, make_parser
from support.messages import UserError
from support.text.hub import find_model


def parse_args(argv: list[str] | None) -> argparse.Namespace:
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
        help="with --ckpt: hf is a folder of safetensors, weights a checkpoint to use, not to resume",
    )
    parser.add_argument(
        "--dtype",
        choices=("f32", "f16", "q8_0"),
        help="with --to gguf: f32 (default), half of its size, or a quarter",
    )
    parser.add_argument(
        "--output",
        type=file_path,
        metavar="PATH",
        required=True,
        help="the checkpoint, or the folder, to write",
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
    """Raise UserError where something is there already: a conversion replaces nothing."""
    if output.is_dir() and not folder:
        raise UserError(f"--output {output} is a folder; name a file in it, e.g. {output / 'model'}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {output} is there already; remove it, or name another")
    there = next(folder for folder in output.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"--output {output} cannot be written: {there} is "
            f"{'not writable' if there.is_dir() else 'a file'}; name another"
        )


def prepare(argv: list[str] | None) -> argparse.Namespace:
    """The checked flags, with the folder of `--from` in `folder`. Raises UserError."""
    args = parse_args(argv)
    args.folder = None if args.source is None else find_model(args.source, args.revision)
    return args


if __name__ == "__main__":
    ARGS = guarded(
        prepare, sys.argv[1:]
    )  # --help, wrong flags and a missing network answer before torch is imported

import torch

from model import GPTMini
from sampling import SamplingConfig
from support.checkpoint import load_model, saved_template, write_merged, write_model
from support.evaluation.likelihoods import encode
from support.exchange.compare_logits import (
    probe,
    verify,
    verify_exported_text,
    verify_gguf,
    verify_imported_text,
)
from support.exchange.hf_folder import read_pretrained
from support.exchange.hf_names import config_json, to_theirs
from support.exchange.tokenizer_json import tokenizer_config, tokenizer_json
from support.files.atomic import atomic_write
from support.run.folder import run_record
from support.text.chat_template import Template
from tokenizer import Tokenizer

PROMPT = "Once upon a time"  # what an imported model is seen to continue; no blank at the end, which is rare in texts
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A decoder-only transformer of {n_params:,} parameters, {origin}

{facts}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
inputs = {ids}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


@contextlib.contextmanager
def all_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary name beside `output`, which gets that name if all goes well; if not, nothing stays."""
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
        f"{c.n_heads} query and {c.n_kv_heads} "
        f"key/value heads, context {c.max_seq_len:,}, vocabulary {c.vocab_size:,} ({tokenizer.kind})"
    )
    print(verify_imported_text(tokenizer, args.folder))
    ids = torch.tensor([encode(tokenizer, PROMPT, begins=True) or [*tokenizer.bos_ids, tokenizer.eos_id]])
    written = model.generate(ids, 20, SamplingConfig(temperature=0), eos_id=tokenizer.eos_id)[0].tolist()
    print(f"greedily, it writes: {tokenizer.decode(written[len(tokenizer.bos_ids) :])!r}")
    with all_or_nothing(output) as temporary:
        ours = probe(model)
        write_model(
            temporary, model, tokenizer, run_record() | {"source": source_name(args.source, args.revision)}
        )
        del model
        print(verify(ours, args.folder))
    print(f"written: {output}; python3 infer.py --ckpt {output} --prompt ...")


# ---- out -----------------------------------------------------------------------------------------


def public(path: str) -> str:
    """A path as others may see it: of one that tells of this machine, its last part.

    >>> public("data/tiny_corpus.txt"), public("/home/ada/secret/plays.txt"), public("~/plays.txt")
    ('data/tiny_corpus.txt', 'plays.txt', 'plays.txt')
    """
    tells = (
        path.startswith("~")
        or PurePosixPath(path).is_absolute()
        or PureWindowsPath(path).drive
        or ".." in PureWindowsPath(path).parts
    )
    return PureWindowsPath(path).name if tells else path


def source_name(source: str, revision: str | None) -> str:
    """What a model was imported from: its name on the hub, or of a local folder the last part."""
    local = os.path.isdir(source)
    return Path(source).resolve().name if local else source + (f" (revision {revision})" if revision else "")


def model_name(metadata: dict, ckpt: str) -> str:
    """What an exported model is called: as what was imported, or as the folder of its run; the file's own
    name where there is neither."""
    config, record = metadata.get("config") or {}, metadata.get("run") or {}
    known = record.get("source") or (config.get("checkpoint") or {}).get("dir") or ""
    return PureWindowsPath(str(known)).name or Path(ckpt).stem


def model_card(
    model: GPTMini, tokenizer: Tokenizer, metadata: dict, ckpt: str, template: Template | None
) -> str:
    """README.md: what the run's config and metrics say of the model. No path of this machine gets into it."""
    c, metrics, config = model.config, metadata["metrics"], metadata.get("config")
    source = (metadata.get("run") or {}).get("source")
    origin = "trained with Tiny Transformer."
    if not config:
        origin = (
            f"imported{f' from `{source}`' if source else ''} with Tiny Transformer; nothing was trained "
            "here."
        )
    lines = [
        f"- {c.n_layers} layers, width {c.d_model}, {c.n_heads} query and {c.n_kv_heads} key/value heads, "
        f"context {c.max_seq_len}",
        f"- norm {c.norm}, mlp {c.mlp}, positions {c.position}, {'tied' if c.tie_embeddings else 'untied'} "
        "embeddings",
        f"- tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens",
    ]
    if config:
        t, data = config["training"], config["data"]
        start = f", from `{public(config['base_ckpt'])}`" if config.get("base_ckpt") else ""
        text = public(str(data.get("path") or data.get("dataset")))
        lines += [
            f"- trained for {metrics['step']:,} steps on {metrics['tokens']:,} target tokens of "
            f"`{text}`{start}",
            f"- {t['optimizer']}, lr {t['lr']:g}, schedule {t['schedule']}, {t['micro_batch_size']} x "
            f"{t['grad_accum_steps']} sequences a step, "
            f"seed {config['seed']}",
        ]
        results = [
            name for name in ("train_loss", "val_loss", "token_accuracy") if metrics.get(name) is not None
        ]
        lines += [f"- {name}: {metrics[name]:.4f}" for name in results]
        if metrics.get("val_loss") is not None:
            lines.append(f"- validation perplexity: {math.exp(min(metrics['val_loss'], 700)):.2f}")
    ids = 'tokenizer("Once", return_tensors="pt")'
    if template:
        ids = (
            'tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], '
            'return_tensors="pt", return_dict=True)'
        )
    return CARD.format(
        name=model_name(metadata, ckpt),
        origin=origin,
        n_params=model.n_params(),
        facts="\n".join(lines),
        ids=ids,
    )


def export_hf(args: argparse.Namespace) -> None:
    """The folder, complete and compared, or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    output = Path(args.output)
    model, tokenizer, metadata = load_model(args.ckpt)
    template = saved_template(metadata, args.ckpt)
    dtype = model.embed_tokens.weight.dtype
    config = config_json(
        model.config, tokenizer.eos_id, tokenizer.bos_ids, dtype
    )  # refuses before anything is written
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    texts = {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(ids | {"pad_token_id": tokenizer.eos_id}),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": json.dumps(
            tokenizer_config(tokenizer, template, model.config.max_seq_len), indent=2
        ),
        "README.md": model_card(model, tokenizer, metadata, args.ckpt, template),
    }
    with all_or_nothing(output) as temporary:
        temporary.mkdir()
        for name, text in texts.items():
            with atomic_write(temporary / name) as file:
                file.write(text.encode())
        try:
            save_file(
                to_theirs(model.config, model.state_dict()),
                temporary / "model.safetensors",
                metadata={"format": "pt"},
            )
        except (
            SafetensorError
        ) as error:  # a full disk, say, which the library hides behind an error of its own
            raise UserError(
                f"--output {output} cannot be written: {' '.join(str(error).split())[:200]}; make room, or "
                "name another"
            ) from None
        shutil.copymode(
            temporary / "config.json", temporary / "model.safetensors"
        )  # the library's is for its owner alone
        text = verify_exported_text(tokenizer, temporary)
        ours = probe(model)
        del model
        print(verify(ours, temporary, written=True), text, sep="\n")
    print(
        f"written: {output} ({config['architectures'][0]}), "
        f"{', '.join(sorted(path.name for path in output.iterdir()))}"
    )


def export_gguf(args: argparse.Namespace) -> None:
    """The file, complete and compared where that is possible, or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--to gguf needs a package that is not installed; pip install gguf")
    from support.exchange.gguf_file import write_gguf

    output, dtype = Path(args.output), args.dtype or "f32"
    model, tokenizer, metadata = load_model(args.ckpt)
    with all_or_nothing(output) as temporary:
        words = write_gguf(
            temporary,
            model,
            tokenizer,
            saved_template(metadata, args.ckpt),
            dtype,
            model_name(metadata, args.ckpt),
        )
        print(verify_gguf(temporary, model, tokenizer, dtype, words))
    print(f"written: {output} ({dtype}), {output.stat().st_size / 2**20:,.1f} MB")


def main(argv: list[str] | None = None, args: argparse.Namespace | None = None) -> int:
    args = args or prepare(argv)
    if args.source is not None:
        import_model(args)
    elif args.to == "hf":
        export_hf(args)
    elif args.to == "gguf":
        export_gguf(args)
    else:
        with all_or_nothing(Path(args.output)) as temporary:
            write_merged(Path(args.ckpt), temporary)
        print(f"written: {args.output}, of {Path(args.output).stat().st_size / 2**20:,.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, args=ARGS))
