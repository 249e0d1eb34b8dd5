"""GPT-2 as Hugging Face has it: config.json, and the names and layouts of the weights.

GPT-2 is older than Llama: q, k and v are one matrix `c_attn`, and every matrix of a block is a `Conv1D`,
which keeps it as (in, out). So these are cut and transposed.
"""

from typing import Any

import torch
from torch import Tensor

from model import GPTConfig

NAMES_IN_BLOCK = {  # ours to GPT-2's
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
NAMES_OUTSIDE = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}  # ours to GPT-2's
# The settings of config.json that would change the network: the values that ours has, the default first.
GPT2_SETTINGS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def gpt2_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of GPTConfig for a config.json."""
    return {
        "d_model": hf["n_embd"],
        "n_layers": hf["n_layer"],
        "n_heads": hf["n_head"],
        "d_ff": hf.get("n_inner") or 4 * hf["n_embd"],
        "max_seq_len": hf.get("n_positions", 1024),
        "norm_eps": float(hf.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", True)),
        "norm": "layernorm",
        "mlp": "gelu",
        "position": "learned",
        "bias": True,
    }


def gpt2_config(config: GPTConfig) -> dict[str, Any]:
    """The part of config.json that only GPT-2 has."""
    c = config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": c.d_model,
        "n_layer": c.n_layers,
        "n_head": c.n_heads,
        "n_inner": c.d_ff,
        "n_positions": c.max_seq_len,
        "n_ctx": c.max_seq_len,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": "gelu_new",
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout,
    }


def transposed(tensor: Tensor) -> Tensor:
    """(in, out) to (out, in) and back; a vector stays as it is."""
    return tensor.T if tensor.dim() == 2 else tensor


def split_c_attn(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """GPT-2's fused projection as q, k and v: (D, 3 D), as Conv1D keeps it, cut along its outputs, each then
    (out, in)."""
    return {
        name.replace("attn.c_attn", f"self_attn.{letter}_proj"): transposed(part)
        for letter, part in zip("qkv", tensor.chunk(3, dim=-1), strict=True)
    }


def fused_qkv(weights: dict[str, Tensor], q_name: str) -> Tensor:
    """q, k and v of a block, one below the other, (3 D, D), or (3 D,) for a bias; `q_name` is the name of
    q's."""
    return torch.cat([weights[q_name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])


def from_gpt2(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of their tensors under our name, or under three for the fused q, k and v."""
    name = name.removeprefix("transformer.")
    for ours, theirs in NAMES_OUTSIDE.items():
        if name.startswith(f"{theirs}."):
            return {name.replace(theirs, ours, 1): tensor}
    if name.startswith("h."):
        name = name.replace("h.", "layers.", 1)
    if ".attn.c_attn." in name:
        return split_c_attn(name, tensor)
    for ours, theirs in NAMES_IN_BLOCK.items():
        if f".{theirs}." in name:
            return {name.replace(f".{theirs}.", f".{ours}."): transposed(tensor)}
    return {name: tensor}


def to_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under their names and in their layout."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, end = name.rpartition(".")  # end: weight or bias
        if name.startswith("lm_head."):
            found[name] = tensor
            continue
        if module in NAMES_OUTSIDE:
            found[f"transformer.{NAMES_OUTSIDE[module]}.{end}"] = tensor
            continue
        _, block, inner = module.split(".", 2)  # layers.3.mlp.up_proj
        if inner == "self_attn.q_proj":
            found[f"transformer.h.{block}.attn.c_attn.{end}"] = transposed(fused_qkv(weights, name))
        elif inner not in ("self_attn.k_proj", "self_attn.v_proj"):  # these are in c_attn
            found[f"transformer.h.{block}.{NAMES_IN_BLOCK[inner]}.{end}"] = transposed(tensor)
    return found
