"""Our weights under the names and layouts of Hugging Face's models, and back: Llama, Mistral, Qwen3 and
GPT-2.

Our names are Llama's without `model.` in front, and rotary positions turn halves as there, so Llama's weights
only change their names. GPT-2 is older: q, k and v lie in one matrix `c_attn`, and every matrix of a block is
a `Conv1D`, which keeps it as (in, out), so those are cut and transposed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig
from support.foreign.model_files import FAMILIES, unfit
from support.messages import UserError

GPT2_NAMES = {  # ours, in a block, to GPT-2's
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
GPT2_TOP = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # tables that older files carry along


# ---- config.json ---------------------------------------------------------------------------------


def model_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of GPTConfig for a config.json. Raises UserError that names what our blocks cannot do."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise UserError(unfit(kind))
    try:
        fields = gpt2_fields(hf) if kind == "gpt2" else llama_fields(hf)
        if odd := [name for name in SIZES if name in fields and type(fields[name]) is not int]:
            raise TypeError(f"{odd[0]}: {fields[odd[0]]!r}"[:100])
        return fields
    except KeyError as error:
        raise UserError(
            f"config.json of model_type {kind} lacks {error}; it is damaged, or of another version"
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"config.json of model_type {kind} holds a value of the wrong type ({error}); download it again"
        ) from None


def refuse(hf: dict[str, Any], allowed: dict[str, tuple]) -> None:
    """Raise UserError for a setting that would change the network in a way ours cannot follow; the first
    value is the default."""
    for key, values in allowed.items():
        if hf.get(key, values[0]) not in values:
            raise UserError(
                f"{key}={hf[key]!r} in config.json is something our blocks do not have; they have "
                f"{values[0]!r}"
            )


def llama_fields(hf: dict[str, Any]) -> dict[str, Any]:
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise UserError(
            f"its rotary positions are scaled (rope_type={scaling!r}), which turns them at other speeds "
            "than ours; that is not supported"
        )
    refuse(
        hf,
        {
            "hidden_act": ("silu", "swish"),
            "partial_rotary_factor": (1.0, None),
            "use_sliding_window": (False, None),
        },
    )
    bias = bool(hf.get("attention_bias", False))
    if bias != bool(hf.get("mlp_bias", False)):
        raise UserError(
            "attention_bias and mlp_bias differ in config.json, and our `bias` is for all matrices or none"
        )
    heads, seen = hf["num_attention_heads"], hf["max_position_embeddings"]
    return {
        "d_model": hf["hidden_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "d_ff": hf["intermediate_size"],
        "max_seq_len": min(
            seen, hf.get("sliding_window") or seen
        ),  # within its window, Mistral's attention is plain
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "rope_theta": float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "bias": bias,
        "qk_norm": hf["model_type"] == "qwen3",
    }


def gpt2_fields(hf: dict[str, Any]) -> dict[str, Any]:
    refuse(
        hf,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    )
    return {
        "d_model": hf["n_embd"],
        "n_layers": hf["n_layer"],
        "n_heads": hf["n_head"],
        "d_ff": hf.get("n_inner") or 4 * hf["n_embd"],
        "max_seq_len": hf.get("n_positions", 1024),
        "norm_eps": float(hf.get("layer_norm_epsilon", 1e-5)),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", True)),
        **{"norm": "layernorm", "mlp": "gelu", "position": "learned", "bias": True},
    }


def turned(tensor: Tensor) -> Tensor:
    """(in, out) to (out, in) and back; a vector stays."""
    return tensor.T if tensor.dim() == 2 else tensor


def fused_qkv(weights: dict[str, Tensor], q_name: str) -> Tensor:
    """q, k and v of a block below each other, (3 D, D), or (3 D,) for a bias; `q_name` is q's."""
    return torch.cat([weights[q_name.replace("q_proj", f"{part}_proj")] for part in "qkv"])


# ---- weights in ----------------------------------------------------------------------------------


def split_c_attn(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """GPT-2's fused projection to q, k and v: (D, 3 D) as Conv1D keeps it, cut along its outputs, each
    then (out, in)."""
    return {
        name.replace("attn.c_attn", f"self_attn.{part}_proj"): turned(cut)
        for part, cut in zip("qkv", tensor.chunk(3, dim=-1), strict=True)
    }


def to_ours(kind: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of their tensors under our name, or names; {} for a table that we compute ourselves."""
    if name.endswith(IGNORED):
        return {}
    if kind != "gpt2":
        return {name.removeprefix("model."): tensor}
    name = name.removeprefix("transformer.")
    for ours, theirs in GPT2_TOP.items():
        if name.startswith(f"{theirs}."):
            return {name.replace(theirs, ours, 1): tensor}
    name = name.replace("h.", "layers.", 1) if name.startswith("h.") else name
    if ".attn.c_attn." in name:
        return split_c_attn(name, tensor)
    for ours, theirs in GPT2_NAMES.items():
        if f".{theirs}." in name:
            return {name.replace(f".{theirs}.", f".{ours}."): turned(tensor)}
    return {name: tensor}


# ---- weights and config out ----------------------------------------------------------------------


def family_of(config: GPTConfig) -> str:
    """`llama`, `qwen3` or `gpt2`: whose config.json can describe our model. Raises UserError, naming the
    switch that none has."""
    c = config
    older = {"norm": "layernorm", "mlp": "gelu", "position": "learned"}
    if c.embed_scale:
        raise UserError("model.embed_scale=true has no counterpart in Llama, Qwen3 or GPT-2")
    odd = [f"model.{key}={getattr(c, key)}" for key, value in older.items() if getattr(c, key) == value]
    if odd and not (
        len(odd) == 3
        and c.bias
        and not c.qk_norm
        and c.n_kv_heads == c.n_heads
        and c.head_dim * c.n_heads == c.d_model
    ):
        raise UserError(
            f"{', '.join(odd)} with the other switches as they are is neither Llama nor GPT-2; GPT-2 is "
            "norm=layernorm, mlp=gelu, position=learned, "
            "bias=true, without qk_norm, with as many key/value heads as heads"
        )
    if c.position == "sinusoidal":
        raise UserError("model.position=sinusoidal has no counterpart in Llama, Qwen3 or GPT-2")
    if c.qk_norm and c.bias:
        raise UserError(
            "model.qk_norm=true with model.bias=true has no counterpart: Qwen3 has no biases in its MLP"
        )
    return "gpt2" if odd else "qwen3" if c.qk_norm else "llama"


def config_json(
    config: GPTConfig, eos_id: int, bos_ids: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """config.json for transformers 4 and 5, vLLM, llama.cpp's converter; `dtype` is that of the weights.
    Raises UserError."""
    c, kind = config, family_of(config)
    common = {"model_type": kind, "vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_embeddings}
    named = str(dtype).removeprefix("torch.")
    common |= {"bos_token_id": bos_ids[0] if bos_ids else eos_id, "eos_token_id": eos_id, "use_cache": True}
    common |= {"dtype": named, "torch_dtype": named}  # the newer name of transformers, and the older
    if kind == "gpt2":
        own = {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": c.d_model,
            "n_layer": c.n_layers,
            "n_head": c.n_heads,
            "n_inner": c.d_ff,
        }
        own |= {
            "n_positions": c.max_seq_len,
            "n_ctx": c.max_seq_len,
            "layer_norm_epsilon": c.norm_eps,
            "activation_function": "gelu_new",
        }
        return common | own | {"resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout}
    return common | {
        "architectures": ["Qwen3ForCausalLM" if kind == "qwen3" else "LlamaForCausalLM"],
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # where transformers 4 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},  # where transformers 5 does
        "hidden_act": "silu",
        "attention_bias": c.bias,
        "mlp_bias": c.bias,
        "attention_dropout": c.dropout,
    }


def to_theirs(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under their names, contiguous, a tied head left out. The inverse of `to_ours`."""
    kind = family_of(config)
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if not (config.tie_embeddings and name == "lm_head.weight")
    }
    if kind != "gpt2":
        return {
            name if name.startswith("lm_head.") else f"model.{name}": tensor.contiguous()
            for name, tensor in weights.items()
        }
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        top, _, kind_of = name.rpartition(".")
        if name.startswith("lm_head."):
            out[name] = tensor
        elif top in GPT2_TOP:
            out[f"transformer.{GPT2_TOP[top]}.{kind_of}"] = tensor
        elif ".self_attn.q_proj." in name:
            out[f"transformer.h.{name.split('.')[1]}.attn.c_attn.{kind_of}"] = turned(
                fused_qkv(weights, name)
            )
        elif ".k_proj." not in name and ".v_proj." not in name:
            _, block, ours = top.split(".", 2)
            out[f"transformer.h.{block}.{GPT2_NAMES[ours]}.{kind_of}"] = turned(tensor)
    return {name: tensor.contiguous() for name, tensor in out.items()}
