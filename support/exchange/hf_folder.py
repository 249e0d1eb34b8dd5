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
from support.exchange.tokenizer_json import gpt2_merges
from support.files.tokenizer_files import gpt2_files
from support.foreign.model_files import what_is
from support.messages import UserError, printable
from support.weights import load_weights, misfits, oversized
from tokenizer import EOS_TEXT, FileTokenizer, GPT2Tokenizer, Tokenizer

DEFAULT_CONTEXT = (
    4096  # published contexts reach a million tokens, for which the cache alone would fill the memory
)
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # as safetensors names them
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt", "tekken.json")


# ---- files ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
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
    """The files that hold the weights, safetensors before .bin. Raises UserError for a shard that is
    missing, or if there is none."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(name, str) and Path(name).name == name for name in shards.values()
            ):
                raise UserError(f"{index}: weight_map should name a file of this folder for each weight")
            files = [folder / name for name in sorted(set(shards.values()))]
            if missing := [file.name for file in files if not file.exists()]:
                raise UserError(
                    f"{folder}: {len(missing)} of {len(files)} weight files are missing, the first is "
                    f"{missing[0]}; download it again"
                )
            return files
        if single.exists():
            return [single]
    raise UserError(
        f"{folder} holds no weights; there should be a model.safetensors, its shards with an index, or a "
        "pytorch_model.bin"
    )


def tensors(folder: Path, header_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one by one: never more than one in memory besides what the caller keeps. With
    `header_only` they have a shape and a type, and no numbers (the meta device). Raises UserError."""
    from safetensors import SafetensorError, safe_open

    for file in tensor_files(folder):
        if file.suffix == ".bin":
            yield from (
                (name, tensor.to("meta") if header_only else tensor)
                for name, tensor in read_tensors(file).items()
            )
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no dict)
                    if header_only:
                        entry = opened.get_slice(name)
                        yield (
                            name,
                            torch.empty(
                                entry.get_shape(),
                                dtype=FLOATS.get(entry.get_dtype(), torch.int8),
                                device="meta",
                            ),
                        )
                    else:
                        yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            what = what_is(file)
            reason = (
                f"is {what}"
                if what and "safetensors" not in what
                else f"is truncated or damaged ({error}); download it again"
            )
            raise UserError(f"{file} {reason}") from None


# ---- the tokenizer -------------------------------------------------------------------------------


def is_published_gpt2(tokenizer: FileTokenizer) -> bool:
    """Whether a tokenizer.json is OpenAI's: the same tokens under the same ids, the same merges, words cut
    in the same way."""
    if gpt2_files() is None:
        return False
    tree, (vocabulary, merges) = json.loads(tokenizer.backend.to_str()), gpt2_merges()
    split, model = tree["pre_tokenizer"] or {}, tree["model"]
    same_rules = (split.get("type"), split.get("add_prefix_space"), split.get("use_regex", True)) == (
        "ByteLevel",
        False,
        True,
    )
    same_rules = (
        same_rules and tree["normalizer"] is None and (tree["decoder"] or {}).get("type") == "ByteLevel"
    )
    return (
        same_rules
        and tokenizer.backend.get_vocab(with_added_tokens=True) == vocabulary
        and [
            tuple(merge.split()) if isinstance(merge, str) else tuple(merge)
            for merge in model.get("merges", [])
        ]
        == merges
        and [token["content"] for token in tree["added_tokens"]] == [EOS_TEXT]
        and not tokenizer.bos_ids
    )


def own_tokenizer(folder: Path, kind: str) -> FileTokenizer | None:
    """The tokenizer that a folder holds; None if it holds none. Raises UserError, also where the
    `tokenizers` library panics."""
    try:
        merges = (
            kind == "gpt2" and (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
        )  # others cut words otherwise
        if merges or (folder / "tokenizer.json").exists():
            return FileTokenizer.from_file(folder)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise UserError(
            f"{folder / 'tokenizer.json'} is damaged: {printable(' '.join(str(error).split())[:200])}; "
            "download it again"
        ) from None
    return None


def read_tokenizer(folder: Path, hf: dict[str, Any], say: Callable[[str], None]) -> Tokenizer:
    """The folder's own tokenizer. OpenAI's where it is that, and where a GPT-2 folder has none but as many
    rows. Raises UserError."""
    own = own_tokenizer(folder, hf["model_type"])
    if own is not None:
        return (
            GPT2Tokenizer() if own.vocab_size == GPT2Tokenizer.vocab_size and is_published_gpt2(own) else own
        )
    others = [name for name in OTHER_TOKENIZERS if (folder / name).exists()]
    if hf["model_type"] == "gpt2" and hf.get("vocab_size") == GPT2Tokenizer.vocab_size and not others:
        say(
            f"tokenizer: {folder} has none; OpenAI's of GPT-2 is taken, whose {GPT2Tokenizer.vocab_size:,} "
            "tokens its embedding has rows for"
        )
        return GPT2Tokenizer()
    instead = f" (only {', '.join(others)})" if others else ""
    raise UserError(
        f"{folder} has no tokenizer.json{instead}, and without its tokenizer the model's ids mean nothing; "
        "save one there, by transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


# ---- the model -----------------------------------------------------------------------------------


def quantization(hf: dict[str, Any]) -> str | None:
    """How config.json says that the weights are quantized: `gptq`, `awq`, ...; None if it does not."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if hf.get(key):
            method = hf[key].get("quant_method") if isinstance(hf[key], dict) else None
            return printable(method or key)[:50]
    return None


def check_weights(
    headers: dict[str, Tensor], wanted: dict[str, Tensor], hf: dict[str, Any], source: str
) -> None:
    """Raise UserError for weights that are not the model's, before any is read: it names all of them, and
    their quantization if that is why."""
    packed = sorted(name for name, tensor in headers.items() if tensor.dtype not in FLOATS.values())
    wrong, method = misfits(wanted, headers), quantization(hf)
    if (packed or wrong) and (method or packed):
        named = (
            f"is quantized ({method}, by its config.json)"
            if method
            else f"holds {packed[0][:100]} in packed numbers, as quantized models do"
        )
        raise UserError(
            f"{source} {named}; weights are read as float32, float16 or bfloat16 only: take the model it "
            "was made from"
        )
    if wrong:
        headless = "lm_head.weight" in wanted.keys() - headers.keys()
        hint = (
            "; if its head is its embedding, write tie_word_embeddings: true into config.json"
            if headless
            else ""
        )
        raise UserError(f"{source}: the weights do not fit its config.json: {wrong}{hint}")


def has_own_head(folder: Path, kind: str, headers: list[tuple[str, Tensor]]) -> bool:
    """Whether the weights hold a head that is not the embedding, whatever config.json says: a copy of the
    embedding is none."""
    if not any("lm_head.weight" in to_ours(kind, theirs, tensor) for theirs, tensor in headers):
        return False
    both = (to_ours(kind, theirs, tensor) for theirs, tensor in tensors(folder))
    found = {
        name: part
        for parts in both
        for name, part in parts.items()
        if name in ("embed_tokens.weight", "lm_head.weight")
    }
    return len(found) == 2 and not torch.equal(*found.values())


def our_names(
    kind: str, pairs: Iterable[tuple[str, Tensor]], lengths: dict[str, int], tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Their tensors under our names, cut to the rows that the model keeps; a tied head, which is the
    embedding, left out."""
    for theirs, tensor in pairs:
        for name, part in to_ours(kind, theirs, tensor).items():
            if not (tied and name == "lm_head.weight"):
                yield name, part[: lengths[name]] if name in lengths and part.dim() else part


def model_config(
    fields: dict[str, Any],
    rows: object,
    tokenizer: Tokenizer,
    source: str,
    max_seq_len: int | None,
    say: Callable[[str], None],
) -> GPTConfig:
    """What our model has to be like, of an embedding with so many rows. Raises UserError."""
    if not isinstance(rows, int) or rows < tokenizer.vocab_size:
        raise UserError(
            f"{source}: its embedding has {rows} rows, and its tokenizer {tokenizer.vocab_size} tokens; "
            "they do not belong together"
        )
    context = max_seq_len or min(fields["max_seq_len"], DEFAULT_CONTEXT)
    if context > fields["max_seq_len"]:
        raise UserError(
            f"--max-seq-len {context} is more than the {fields['max_seq_len']} tokens that {source} can "
            "see; leave it out"
        )
    if context < fields["max_seq_len"]:
        say(
            f"context: {context:,} of its {fields['max_seq_len']:,} tokens (--max-seq-len); the cache "
            "grows with it"
        )
    if rows > tokenizer.vocab_size:
        say(
            f"vocabulary: {tokenizer.vocab_size:,} of {rows:,} rows; the others belong to no token of its "
            "tokenizer"
        )
    try:
        return GPTConfig(**fields | {"max_seq_len": context, "vocab_size": tokenizer.vocab_size})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: config.json describes no model ({' '.join(str(error).split())[:200]})"
        ) from None


def read_pretrained(
    folder: Path, source: str, max_seq_len: int | None, say: Callable[[str], None]
) -> tuple[GPTMini, Tokenizer]:
    """(model in eval mode, tokenizer) of a folder, called `source` in messages. `say` is told what is
    changed on the way. Raises UserError."""
    hf = read_json(folder / "config.json")
    fields, tokenizer = model_fields(hf), read_tokenizer(folder, hf, say)
    config = model_config(fields, hf.get("vocab_size"), tokenizer, source, max_seq_len, say)
    headers = list(tensors(folder, header_only=True))
    if config.tie_embeddings and has_own_head(folder, hf["model_type"], headers):
        say(
            "head: config.json says that it is the embedding, and the weights hold another one, which is kept"
        )
        config = config.model_copy(update={"tie_embeddings": False})
    if wrong := oversized(config.model_dump(), [tensor for _, tensor in headers]):
        raise UserError(f"{source}: config.json describes another model than the weights: {wrong}")
    with torch.device("meta"):
        model = GPTMini(config)
    lengths = {
        "embed_tokens.weight": tokenizer.vocab_size,
        "lm_head.weight": tokenizer.vocab_size,
        "embed_positions.weight": config.max_seq_len,
    }
    kind, tied = hf["model_type"], config.tie_embeddings
    wanted = {
        name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    check_weights(dict(our_names(kind, headers, lengths, tied)), wanted, hf, source)
    if method := quantization(hf):
        say(
            f"weights: config.json says {method}, and they are plain floats of the right shapes; they are "
            "read as they are"
        )
    filled = {
        name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in our_names(kind, tensors(folder), lengths, tied)
    }
    if tied:
        filled["lm_head.weight"] = filled["embed_tokens.weight"]
    load_weights(model, filled, source)
    return model.eval(), tokenizer
