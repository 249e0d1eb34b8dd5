"""Our model as one GGUF file, the format of llama.cpp, Ollama and LM Studio: tensors, sizes and tokenizer
together.

In llama.cpp's Llama, rotary positions pair neighbouring dimensions; ours pair the halves of a head. So the
rows of q and k are put in its order: the same rotation with the dimensions renamed. Its Qwen3 pairs halves,
as ours does.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from model import GPTConfig, GPTMini
from support.exchange.hf_gpt2 import fused_qkv
from support.exchange.hf_names import family_of
from support.exchange.tokenizer_json import chat_template, tokenizer_json
from support.messages import UserError
from support.text.chat_template import Template
from tokenizer import Tokenizer

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The published patterns that cut text into words, and what llama.cpp calls them.
WORD_PATTERNS = {QWEN_WORDS: "qwen2", QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe"}
NUMBERS_PER_SCALE = 32  # in q8_0
NAMES_IN_BLOCK = {  # ours to GGUF's
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
NAMES_OUTSIDE = {  # ours to GGUF's
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


# ---- what the file holds -------------------------------------------------------------------------


def interleave(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k, (n_heads * hd, ...), from halves to neighbours: within a head, 0 1 2 3 | 4 5 6 7
    becomes 0 4 1 5 2 6 3 7."""
    return rows.view(n_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def gguf_tensors(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under GGUF's names, without a tied head."""
    family = family_of(config)
    found = {}
    for name, tensor in weights.items():
        module, _, end = name.rpartition(".")  # end: weight or bias
        if module in NAMES_OUTSIDE:
            if module != "lm_head" or not config.tie_embeddings:
                found[f"{NAMES_OUTSIDE[module]}.{end}"] = tensor
            continue
        _, block, inner = module.split(".", 2)  # layers.3.mlp.up_proj
        if family == "gpt2" and inner == "self_attn.q_proj":
            found[f"blk.{block}.attn_qkv.{end}"] = fused_qkv(weights, name)
            continue
        if family == "gpt2" and inner in ("self_attn.k_proj", "self_attn.v_proj"):
            continue  # in attn_qkv
        if family == "llama" and inner == "self_attn.q_proj":
            tensor = interleave(tensor, config.n_heads)
        if family == "llama" and inner == "self_attn.k_proj":
            tensor = interleave(tensor, config.n_kv_heads)
        found[f"blk.{block}.{NAMES_IN_BLOCK[inner]}.{end}"] = tensor
    return found


def word_splitter_name(tree: dict[str, Any]) -> str | None:
    """llama.cpp's name for the rule by which the byte-level BPE of a tokenizer.json cuts text into words;
    None for a rule that is not among those we know."""
    splitter = tree.get("pre_tokenizer") or {}
    *before, last = splitter.get("pretokenizers") or [splitter]
    is_byte_level_bpe = (
        tree["model"].get("type", "BPE") == "BPE"
        and tree["model"].get("merges")
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
    )
    if not is_byte_level_bpe:
        return None
    if last.get("use_regex", True):  # GPT-2's own pattern, perhaps after a step that cuts digits apart
        steps = [(step.get("type"), step.get("individual_digits")) for step in before]
        if steps == []:
            return "gpt-2"
        return "smollm" if steps == [("Digits", True)] else None
    if len(before) != 1 or before[0].get("behavior") != "Isolated" or before[0].get("invert"):
        return None
    return WORD_PATTERNS.get(before[0].get("pattern", {}).get("Regex"))


def refuse_what_does_not_fit(config: GPTConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The tokenizer.json of the tokenizer, as a tree. Raises UserError, before anything is written, for what
    the format cannot hold."""
    family_of(config)  # raises UserError for a model that no family can describe
    tree = json.loads(tokenizer_json(tokenizer))
    if word_splitter_name(tree) is None:
        raise UserError(
            f"a tokenizer of kind {tokenizer.kind} does not fit into GGUF as we write it: it takes "
            "byte-level BPE that cuts text into words as GPT-2 does (bpe, gpt2), or as SmolLM, Qwen or "
            "Llama 3 do (file)"
        )
    widths = (config.d_model, config.d_ff, config.n_heads * config.head_dim)
    if dtype == "q8_0" and any(width % NUMBERS_PER_SCALE for width in widths):
        raise UserError(
            f"q8_0 keeps {NUMBERS_PER_SCALE} numbers to a scale, so d_model={config.d_model}, "
            f"d_ff={config.d_ff} and n_heads x head_dim={config.n_heads * config.head_dim} must be multiples "
            "of it; take --dtype f16"
        )
    return tree


# ---- the file ------------------------------------------------------------------------------------


def write_gguf(
    path: Path, model: GPTMini, tokenizer: Tokenizer, template: Template | None, dtype: str, name: str
) -> str:
    """Write the file, and return its name for the rule that cuts text into words. Raises UserError for what
    the format cannot hold."""
    import gguf

    tree = refuse_what_does_not_fit(model.config, tokenizer, dtype)
    file_types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer = gguf.GGUFWriter(path, family_of(model.config))
    writer.add_name(name)
    add_sizes(writer, model.config)
    writer.add_file_type(file_types[dtype])
    add_tokenizer(writer, tree, tokenizer, template)
    for tensor_name, tensor in gguf_tensors(model.config, model.state_dict()).items():
        add_tensor(writer, tensor_name, tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return word_splitter_name(tree)


def add_tensor(writer: Any, name: str, tensor: Tensor, dtype: str) -> None:
    import gguf

    array = tensor.detach().float().contiguous().numpy()
    if dtype == "f32" or array.ndim == 1:  # vectors are small, and norms need their precision
        writer.add_tensor(name, array)
    elif dtype == "f16":
        writer.add_tensor(name, array.astype(np.float16))
    else:
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(array, q8_0), raw_dtype=q8_0)


def add_sizes(writer: Any, config: GPTConfig) -> None:
    c = config
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_vocab_size(c.vocab_size)
    if c.norm == "layernorm":  # GPT-2
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)


def add_tokenizer(writer: Any, tree: dict[str, Any], tokenizer: Tokenizer, template: Template | None) -> None:
    """`tree` is the tokenizer's tokenizer.json."""
    import gguf

    texts = {id: text for text, id in tree["model"]["vocab"].items()}
    kinds = [
        gguf.TokenType.NORMAL if id in texts else gguf.TokenType.UNUSED for id in range(tokenizer.vocab_size)
    ]
    for token in tree["added_tokens"]:
        texts[token["id"]] = token["content"]
        # no text can spell a control token
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(word_splitter_name(tree))
    writer.add_token_list([texts.get(id, f"[unused {id}]") for id in range(tokenizer.vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.eos_id)
    writer.add_bos_token_id(tokenizer.bos_ids[0] if tokenizer.bos_ids else tokenizer.eos_id)
    writer.add_add_bos_token(bool(tokenizer.bos_ids))
    if template:
        writer.add_chat_template(chat_template(template, tokenizer))
