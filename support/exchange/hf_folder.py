"""A model folder as Hugging Face lays it out: its config, its tensors one by one, its tokenizer."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig, GPTMini
from support.checkpoint import read_tensors
from support.exchange.hf_names import model_fields, to_ours
from support.exchange.hf_tokenizer import read_tokenizer
from support.foreign.model_files import what_is
from support.messages import UserError, printable
from support.weights import load_weights, misfits, oversized
from tokenizer import Tokenizer

# Published contexts reach a million tokens, for which the cache alone would fill the memory.
LONGEST_DEFAULT_CONTEXT = 4096
# The types of numbers that we read, by their names in safetensors.
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"  # our names


# ---- files ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; a model folder has config.json, model.safetensors and tokenizer.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)[:150]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def tensor_files(folder: Path) -> list[Path]:
    """The files that hold the weights, safetensors rather than .bin. Raises UserError if there is none, or if
    a shard is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{name}.index.json").exists():
            return shard_files(folder, folder / f"{name}.index.json")
        if (folder / name).exists():
            return [folder / name]
    raise UserError(
        f"{folder} holds no weights; there should be a model.safetensors, its shards with an index, or a "
        "pytorch_model.bin"
    )


def shard_files(folder: Path, index: Path) -> list[Path]:
    """The files that an index names. Raises UserError if one is missing, or is not a name in this folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise UserError(f"{index}: weight_map should name a file of this folder for each weight")
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} weight files are missing, the first is {missing[0]}; "
            "download it again"
        )
    return files


def read_safetensors(file: Path, header_only: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one; see `tensors`. Raises UserError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if header_only:
                    entry = opened.get_slice(name)
                    dtype = FLOAT_TYPES.get(entry.get_dtype(), torch.int8)  # int8: any type we do not read
                    yield name, torch.empty(entry.get_shape(), dtype=dtype, device="meta")
                else:
                    yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        what = what_is(file)
        if what and "safetensors" not in what:
            raise UserError(f"{file} is {what}") from None
        raise UserError(f"{file} is truncated or damaged ({error}); download it again") from None


def tensors(folder: Path, header_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one: besides what the caller keeps, only one tensor (of a .bin, one file) is in
    memory. With `header_only` they have a shape and a type but no numbers (the meta device). Raises
    UserError."""
    for file in tensor_files(folder):
        if file.suffix == ".bin":
            for name, tensor in read_tensors(file).items():
                yield name, tensor.to("meta") if header_only else tensor
        else:
            yield from read_safetensors(file, header_only)


# ---- the model -----------------------------------------------------------------------------------


def quantization(hf: dict[str, Any]) -> str | None:
    """How config.json says the weights are quantized: `gptq`, `awq`, ...; None if it does not say so."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if hf.get(key):
            method = hf[key].get("quant_method") if isinstance(hf[key], dict) else None
            return printable(method or key)[:50]
    return None


def check_weights(
    headers: dict[str, Tensor], wanted: dict[str, Tensor], hf: dict[str, Any], source: str
) -> None:
    """Raise UserError for weights that do not fit the model, before any is read. It names all of them, or
    the quantization that is the cause."""
    packed = sorted(name for name, tensor in headers.items() if tensor.dtype not in FLOAT_TYPES.values())
    wrong, method = misfits(wanted, headers), quantization(hf)
    advice = "weights are read as float32, float16 or bfloat16 only: take the model it was made from"
    if method and (packed or wrong):
        raise UserError(f"{source} is quantized ({method}, by its config.json); {advice}")
    if packed:
        raise UserError(
            f"{source} holds {packed[0][:100]} in packed numbers, as quantized models do; {advice}"
        )
    if wrong:
        has_no_head = HEAD in wanted and HEAD not in headers
        hint = "; if its head is its embedding, write tie_word_embeddings: true into config.json"
        raise UserError(
            f"{source}: the weights do not fit its config.json: {wrong}{hint if has_no_head else ''}"
        )


def has_own_head(folder: Path, kind: str, headers: list[tuple[str, Tensor]]) -> bool:
    """Whether the weights hold a head that differs from the embedding, no matter what config.json says."""
    if not any(HEAD in to_ours(kind, name, tensor) for name, tensor in headers):
        return False
    found = {}
    for name, tensor in tensors(folder):
        for our_name, part in to_ours(kind, name, tensor).items():
            if our_name in (HEAD, EMBEDDING):
                found[our_name] = part
    return len(found) == 2 and not torch.equal(found[HEAD], found[EMBEDDING])


def our_tensors(
    kind: str, theirs: Iterable[tuple[str, Tensor]], rows_kept: dict[str, int], tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Their tensors under our names, cut to the rows that the model keeps, without a tied head, which is the
    embedding."""
    for their_name, tensor in theirs:
        for name, part in to_ours(kind, their_name, tensor).items():
            if tied and name == HEAD:
                continue
            if name in rows_kept and part.dim():
                part = part[: rows_kept[name]]
            yield name, part


def model_config(
    fields: dict[str, Any],
    n_rows: object,
    tokenizer: Tokenizer,
    source: str,
    max_seq_len: int | None,
    say: Callable[[str], None],
) -> GPTConfig:
    """The config of our model for an embedding with that many rows. Raises UserError."""
    if not isinstance(n_rows, int) or n_rows < tokenizer.vocab_size:
        raise UserError(
            f"{source}: its embedding has {n_rows} rows, and its tokenizer {tokenizer.vocab_size} tokens; "
            "they do not belong together"
        )
    longest = fields["max_seq_len"]
    context = max_seq_len or min(longest, LONGEST_DEFAULT_CONTEXT)
    if context > longest:
        raise UserError(
            f"--max-seq-len {context} is more than the {longest} tokens that {source} can see; leave it out"
        )
    if context < longest:
        say(f"context: {context:,} of its {longest:,} tokens (--max-seq-len); the cache grows with it")
    if n_rows > tokenizer.vocab_size:
        say(
            f"vocabulary: {tokenizer.vocab_size:,} of {n_rows:,} rows; the others belong to no token of its "
            "tokenizer"
        )
    try:
        return GPTConfig(**fields | {"max_seq_len": context, "vocab_size": tokenizer.vocab_size})
    except (TypeError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: config.json describes no model ({what})") from None


def read_pretrained(
    folder: Path, source: str, max_seq_len: int | None, say: Callable[[str], None]
) -> tuple[GPTMini, Tokenizer]:
    """(model in eval mode, tokenizer) of a folder, which messages call `source`. `say` is called with what is
    changed on the way. Raises UserError."""
    hf = read_json(folder / "config.json")
    fields = model_fields(hf)
    kind = hf["model_type"]
    tokenizer = read_tokenizer(folder, hf, say)
    config = model_config(fields, hf.get("vocab_size"), tokenizer, source, max_seq_len, say)
    headers = list(tensors(folder, header_only=True))
    if config.tie_embeddings and has_own_head(folder, kind, headers):
        say("head: config.json says it is the embedding, but the weights hold another one, which is kept")
        config = config.model_copy(update={"tie_embeddings": False})
    too_large = oversized(config.model_dump(), [tensor for _, tensor in headers])
    if too_large:
        raise UserError(f"{source}: config.json describes another model than the weights: {too_large}")
    with torch.device("meta"):
        model = GPTMini(config)
    tied = config.tie_embeddings
    wanted = model.state_dict()
    if tied:
        del wanted[HEAD]
    rows_kept = {
        EMBEDDING: tokenizer.vocab_size,
        HEAD: tokenizer.vocab_size,
        "embed_positions.weight": config.max_seq_len,
    }
    check_weights(dict(our_tensors(kind, headers, rows_kept, tied)), wanted, hf, source)
    method = quantization(hf)
    if method:
        say(f"weights: config.json says {method}, but they are plain floats of the right shapes")
    weights = {
        name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in our_tensors(kind, tensors(folder), rows_kept, tied)
    }
    if tied:
        weights[HEAD] = weights[EMBEDDING]
    load_weights(model, weights, source)
    return model.eval(), tokenizer
