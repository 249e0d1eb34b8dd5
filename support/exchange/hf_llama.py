"""Llama, Mistral and Qwen3 as Hugging Face has them: config.json and the names of the weights.

Our names are Llama's without `model.` in front, and our rotary positions pair the dimensions of a head as
theirs do, so the weights only change their names. Mistral is a Llama with a window, Qwen3 a Llama whose
queries and keys are normalized.
"""

from typing import Any

from torch import Tensor

from model import GPTConfig
from support.messages import UserError

# The settings of config.json that would change the network: the values that ours has, the default first.
LLAMA_SETTINGS = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0, None),
    "use_sliding_window": (False, None),
}


def llama_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of GPTConfig for a config.json. Raises UserError for what our blocks do not have."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise UserError(
            f"its rotary positions are scaled (rope_type={scaling!r}), so their angles differ from ours; "
            "that is not supported"
        )
    bias = bool(hf.get("attention_bias", False))
    if bias != bool(hf.get("mlp_bias", False)):
        raise UserError(
            "attention_bias and mlp_bias differ in config.json, but our `bias` is for all matrices or none"
        )
    n_heads, context = hf["num_attention_heads"], hf["max_position_embeddings"]
    return {
        "d_model": hf["hidden_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_heads": n_heads,
        "n_kv_heads": hf.get("num_key_value_heads") or n_heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // n_heads,
        "d_ff": hf["intermediate_size"],
        # Mistral's attention reaches back one window; in a context of that length it is plain attention.
        "max_seq_len": min(context, hf.get("sliding_window") or context),
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "rope_theta": float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "bias": bias,
        "qk_norm": hf["model_type"] == "qwen3",
    }


def llama_config(config: GPTConfig) -> dict[str, Any]:
    """The part of config.json that only these families have."""
    c = config
    return {
        "architectures": ["Qwen3ForCausalLM" if c.qk_norm else "LlamaForCausalLM"],
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},  # read by transformers 5
        "hidden_act": "silu",
        "attention_bias": c.bias,
        "mlp_bias": c.bias,
        "attention_dropout": c.dropout,
    }


def from_llama(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of their tensors under our name."""
    return {name.removeprefix("model."): tensor}


def to_llama(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under their names."""
    return {
        name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in weights.items()
    }
