"""Our model as one GGUF file, the format of llama.cpp, Ollama and LM Studio: tensors, sizes and tokenizer
together.

llama.cpp's Llama turns neighbouring pairs of dimensions where ours turns halves, so the rows of q and k are
put in its order: the same rotation, other names for the dimensions. Its Qwen3 turns halves, as we do.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from model import GPTConfig, GPTMini
from support.exchange.hf_names import family_of, fused_qkv
from support.exchange.tokenizer_json import chat_template, tokenizer_json
from support.messages import UserError
from support.text.chat_template import Template
from tokenizer import Tokenizer

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    _QWEN: "qwen2",
    _QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
}  # published, and what llama.cpp calls them
BLOCK = 32  # numbers that share a scale in q8_0
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def interleave(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k (n_heads * hd, ...) from halves to neighbours: within a head, 0 1 2 3 | 4 5 6 7
    becomes 0 4 1 5 2 6 3 7."""
    return rows.view(n_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def gguf_tensors(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under GGUF's names, a tied head left out."""
    kind, found = family_of(config), {}
    for name, tensor in weights.items():
        module, _, end = name.rpartition(".")
        if module in TOP:
            if module != "lm_head" or not config.tie_embeddings:
                found[f"{TOP[module]}.{end}"] = tensor
            continue
        _, block, inner = module.split(".", 2)
        if kind == "gpt2" and inner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            if inner == "self_attn.q_proj":
                found[f"blk.{block}.attn_qkv.{end}"] = fused_qkv(weights, name)
            continue
        if kind == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = interleave(tensor, config.n_heads if inner.endswith("q_proj") else config.n_kv_heads)
        found[f"blk.{block}.{NAMES[inner]}.{end}"] = tensor
    return found


def pre_tokenizer_name(tree: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way a byte-level BPE of tokenizer.json cuts text into words; None for one
    that is not among those we know."""
    split = tree.get("pre_tokenizer") or {}
    *before, last = split.get("pretokenizers") or [split]
    if (
        tree["model"].get("type", "BPE") != "BPE"
        or not tree["model"].get("merges")
        or last.get("type") != "ByteLevel"
        or last.get("add_prefix_space")
    ):
        return None
    if last.get("use_regex", True):
        return {"[]": "gpt-2", '[["Digits", true]]': "smollm"}.get(
            json.dumps([[step.get("type"), step.get("individual_digits")] for step in before])
        )
    patterns = [
        step.get("pattern", {}).get("Regex")
        for step in before
        if step.get("behavior") == "Isolated" and not step.get("invert")
    ]
    return PATTERNS.get(patterns[0]) if len(patterns) == len(before) == 1 else None


def refuse_what_does_not_fit(config: GPTConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """tokenizer.json as a tree. Raises UserError, before anything is written, for what the format cannot
    hold."""
    family_of(config)
    tree = json.loads(tokenizer_json(tokenizer))
    if pre_tokenizer_name(tree) is None:
        raise UserError(
            f"a tokenizer of kind {tokenizer.kind} does not fit into GGUF as we write it: it takes "
            "byte-level BPE that cuts text into words as GPT-2 "
            "does (bpe, gpt2), or as SmolLM, Qwen or Llama 3 do (file)"
        )
    if dtype == "q8_0" and (
        config.d_model % BLOCK or config.d_ff % BLOCK or (config.n_heads * config.head_dim) % BLOCK
    ):
        raise UserError(
            f"q8_0 keeps {BLOCK} numbers to a scale, and d_model={config.d_model}, d_ff={config.d_ff}, "
            "n_heads x head_dim="
            f"{config.n_heads * config.head_dim} must be multiples of it; take --dtype f16"
        )
    return tree


def write_gguf(
    path: Path, model: GPTMini, tokenizer: Tokenizer, template: Template | None, dtype: str, name: str
) -> str:
    """Write the file; returns what it calls the way to cut text into words. Raises UserError for what it
    cannot hold."""
    import gguf

    tree = refuse_what_does_not_fit(model.config, tokenizer, dtype)
    writer = gguf.GGUFWriter(path, family_of(model.config))
    writer.add_name(name)
    add_sizes(writer, model.config)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[dtype]
    )
    add_tokenizer(writer, tree, tokenizer, template)
    for tensor_name, tensor in gguf_tensors(model.config, model.state_dict()).items():
        array = tensor.detach().float().contiguous().numpy()
        if dtype == "f32" or array.ndim == 1:  # vectors are small, and norms want their precision
            writer.add_tensor(tensor_name, array)
        elif dtype == "f16":
            writer.add_tensor(tensor_name, array.astype(np.float16))
        else:
            quantized = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor_name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return pre_tokenizer_name(tree)


def add_sizes(writer: Any, c: GPTConfig) -> None:
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_vocab_size(c.vocab_size)
    if c.norm == "layernorm":
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)


def add_tokenizer(writer: Any, tree: dict[str, Any], tokenizer: Tokenizer, template: Template | None) -> None:
    import gguf

    added = {token["id"]: token for token in tree["added_tokens"]}
    names = {id: token for token, id in tree["model"]["vocab"].items()} | {
        id: token["content"] for id, token in added.items()
    }
    kinds = [
        gguf.TokenType.NORMAL if id in names else gguf.TokenType.UNUSED for id in range(tokenizer.vocab_size)
    ]
    for id, token in added.items():  # no text can spell a special one
        kinds[id] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tree))
    writer.add_token_list([names.get(id, f"[unused {id}]") for id in range(tokenizer.vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]
    )
    for add in (writer.add_eos_token_id, writer.add_pad_token_id):
        add(tokenizer.eos_id)
    writer.add_bos_token_id(tokenizer.bos_ids[0] if tokenizer.bos_ids else tokenizer.eos_id)
    writer.add_add_bos_token(bool(tokenizer.bos_ids))
    if template:
        writer.add_chat_template(chat_template(template, tokenizer))
