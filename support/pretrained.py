"""A model folder as Hugging Face lays it out: its config, its tensors one by one, its tokenizer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig, GPTMini
from support.checkpoint import read_tensors
from support.cli import UserError
from support.exchange import model_fields, to_ours
from tokenizer import FileTokenizer, GPT2Tokenizer, Tokenizer

DEFAULT_CONTEXT = 4096  # published contexts reach a million tokens, for which the cache alone would fill the memory
GPT2_VOCABULARY = 50257


# ---- files --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a model folder has config.json, model.safetensors and tokenizer.json") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)[:150]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold the weights, safetensors before .bin. Raises UserError for a shard that is missing, or if there is none."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
                raise UserError(f"{index}: weight_map should name a file of this folder for each weight")
            files = [folder / name for name in sorted(set(shards.values()))]
            if missing := [file.name for file in files if not file.exists()]:
                raise UserError(f"{folder}: {len(missing)} of {len(files)} weight files are missing, the first is {missing[0]}; download it again")
            return files
        if single.exists():
            return [single]
    raise UserError(f"{folder} holds no weights; there should be a model.safetensors, its shards with an index, or a pytorch_model.bin")


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one: never more than one in memory besides what the caller keeps."""
    from safetensors import SafetensorError, safe_open

    for file in tensor_files(folder):
        if file.suffix == ".bin":
            yield from read_tensors(file).items()
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no dict)
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or damaged ({error}); download it again") from None


# ---- the model ----------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path, hf: dict[str, Any]) -> Tokenizer:
    """GPT-2's own vocabulary by tiktoken; any other from tokenizer.json. Raises UserError."""
    if hf["model_type"] == "gpt2" and hf.get("vocab_size") == GPT2_VOCABULARY:
        return GPT2Tokenizer()
    try:
        return FileTokenizer.from_file(folder)
    except FileNotFoundError:
        raise UserError(f"{folder} has no tokenizer.json, and without its tokenizer the model's ids mean nothing; save one there") from None


def assign(filled: dict[str, Tensor], wanted: dict[str, torch.Size], name: str, tensor: Tensor, source: str) -> None:
    """Put one tensor where the model wants it, in float32. Raises UserError with name, expected and given shape."""
    if name not in wanted:
        raise UserError(f"{source}: the weights hold {name} {tuple(tensor.shape)}, which the model does not have")
    if tensor.shape != wanted[name]:
        raise UserError(f"{source}: {name} should have shape {tuple(wanted[name])}, and has {tuple(tensor.shape)}")
    filled[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def read_pretrained(folder: Path, source: str, max_seq_len: int | None, say: Callable[[str], None]) -> tuple[GPTMini, Tokenizer]:
    """(model in eval mode, tokenizer) of a folder, called `source` in messages. `say` is told what is changed on the way. Raises UserError."""
    hf = read_json(folder / "config.json")
    fields, tokenizer = model_fields(hf), read_tokenizer(folder, hf)
    if not isinstance(rows := hf.get("vocab_size"), int) or rows < tokenizer.vocab_size:
        raise UserError(f"{source}: its embedding has {rows} rows, and its tokenizer {tokenizer.vocab_size} tokens; they do not belong together")
    context = max_seq_len or min(fields["max_seq_len"], DEFAULT_CONTEXT)
    if context > fields["max_seq_len"]:
        raise UserError(f"--max-seq-len {context} is more than the {fields['max_seq_len']} tokens that {source} can see; leave it out")
    if context < fields["max_seq_len"]:
        say(f"context: {context:,} of its {fields['max_seq_len']:,} tokens (--max-seq-len); the cache grows with it")
    if rows > tokenizer.vocab_size:
        say(f"vocabulary: {tokenizer.vocab_size:,} of {rows:,} rows; the others belong to no token of its tokenizer")
    try:
        config = GPTConfig(**fields | {"max_seq_len": context, "vocab_size": tokenizer.vocab_size})
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: config.json describes no model ({' '.join(str(error).split())[:200]})") from None
    with torch.device("meta"):
        model = GPTMini(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    lengths = {"embed_tokens.weight": tokenizer.vocab_size, "lm_head.weight": tokenizer.vocab_size, "embed_positions.weight": context}
    filled: dict[str, Tensor] = {}
    for theirs, tensor in tensors(folder):
        for name, part in to_ours(hf["model_type"], theirs, tensor).items():
            if name == "lm_head.weight" and config.tie_embeddings:
                continue  # it is the embedding
            assign(filled, wanted, name, part[: lengths[name]] if name in lengths else part, source)
    if config.tie_embeddings and "embed_tokens.weight" in filled:
        filled["lm_head.weight"] = filled["embed_tokens.weight"]
    if missing := sorted(wanted.keys() - filled.keys()):
        raise UserError(f"{source}: {len(missing)} weights are missing, the first is {missing[0]}")
    model.load_state_dict(filled, strict=True, assign=True)
    model.tie_weights()
    return model.eval(), tokenizer
