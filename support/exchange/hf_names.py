"""Our configs and weights under the names of Hugging Face's models, and back.

To add an architecture: a file such as hf_llama.py, a row in ARCHITECTURES, the name in `FAMILIES`
(support/foreign/model_files.py), and, if our models can go out as it, a case in `family_of`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model import GPTConfig
from support.exchange.hf_gpt2 import GPT2_SETTINGS, from_gpt2, gpt2_config, gpt2_fields, to_gpt2
from support.exchange.hf_llama import LLAMA_SETTINGS, from_llama, llama_config, llama_fields, to_llama
from support.foreign.model_files import FAMILIES, unfit
from support.messages import UserError


@dataclass(frozen=True)
class Architecture:
    """How models of one `model_type` in config.json become ours, and ours become theirs."""

    settings: dict[str, tuple]  # of config.json: the values that our blocks can follow, the default first
    fields: Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> fields of GPTConfig
    config: Callable[[GPTConfig], dict[str, Any]]  # GPTConfig -> the architecture's own keys of config.json
    from_theirs: Callable[[str, Tensor], dict[str, Tensor]]  # one tensor -> it under our name, or names
    to_theirs: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # our weights -> theirs


LLAMA = Architecture(LLAMA_SETTINGS, llama_fields, llama_config, from_llama, to_llama)
GPT2 = Architecture(GPT2_SETTINGS, gpt2_fields, gpt2_config, from_gpt2, to_gpt2)
ARCHITECTURES = {"llama": LLAMA, "mistral": LLAMA, "qwen3": LLAMA, "gpt2": GPT2}

WHOLE_NUMBERS = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
# Tables in older files, which we compute ourselves.
IGNORED_TENSORS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


# ---- in ------------------------------------------------------------------------------------------


def model_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of GPTConfig for a config.json. Raises UserError that names what our blocks cannot do."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise UserError(unfit(kind))
    architecture = ARCHITECTURES[kind]
    try:
        refuse_other_settings(hf, architecture.settings)
        fields = architecture.fields(hf)
        for name in WHOLE_NUMBERS:
            if name in fields and type(fields[name]) is not int:
                raise TypeError(f"{name}: {fields[name]!r}"[:100])
        return fields
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"config.json of model_type {kind} lacks {error}; it is damaged, or of another version"
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"config.json of model_type {kind} holds a value of the wrong type ({error}); download it again"
        ) from None


def refuse_other_settings(hf: dict[str, Any], settings: dict[str, tuple]) -> None:
    """Raise UserError for a setting that would change the network in a way that ours cannot follow."""
    for key, values in settings.items():
        if hf.get(key, values[0]) not in values:
            raise UserError(
                f"{key}={hf[key]!r} in config.json is something our blocks do not have; they have "
                f"{values[0]!r}"
            )


def to_ours(kind: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a model of this kind under our name, or names; {} for a table we compute ourselves."""
    if name.endswith(IGNORED_TENSORS):
        return {}
    return ARCHITECTURES[kind].from_theirs(name, tensor)


# ---- out -----------------------------------------------------------------------------------------


def is_gpt2(config: GPTConfig) -> bool:
    """Whether all switches are GPT-2's."""
    c = config
    return (
        (c.norm, c.mlp, c.position) == ("layernorm", "gelu", "learned")
        and c.bias
        and not c.qk_norm
        and c.n_kv_heads == c.n_heads
        and c.head_dim * c.n_heads == c.d_model
    )


def family_of(config: GPTConfig) -> str:
    """`llama`, `qwen3` or `gpt2`: the architecture that our model can go out as. Raises UserError that names
    the switch which none of them has."""
    c = config
    if c.embed_scale:
        raise UserError("model.embed_scale=true has no counterpart in Llama, Qwen3 or GPT-2")
    if c.position == "sinusoidal":
        raise UserError("model.position=sinusoidal has no counterpart in Llama, Qwen3 or GPT-2")
    if is_gpt2(c):
        return "gpt2"
    llama_switches = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope"}
    others = [
        f"model.{key}={getattr(c, key)}" for key, value in llama_switches.items() if getattr(c, key) != value
    ]
    if others:
        raise UserError(
            f"{', '.join(others)} together with the other switches is neither Llama nor GPT-2; GPT-2 is "
            "norm=layernorm, mlp=gelu, position=learned, bias=true, without qk_norm, with as many key/value "
            "heads as heads"
        )
    if c.qk_norm and c.bias:
        raise UserError(
            "model.qk_norm=true with model.bias=true has no counterpart: Qwen3 has no biases in its MLP"
        )
    return "qwen3" if c.qk_norm else "llama"


def config_json(
    config: GPTConfig, eos_id: int, bos_ids: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """config.json for transformers 4 and 5, vLLM and llama.cpp's converter; `dtype` is that of the weights.
    Raises UserError for a model that no architecture can describe."""
    kind = family_of(config)
    dtype_name = str(dtype).removeprefix("torch.")
    common = {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_ids[0] if bos_ids else eos_id,
        "eos_token_id": eos_id,
        "use_cache": True,
        "dtype": dtype_name,  # the newer name in transformers
        "torch_dtype": dtype_name,  # the older one
    }
    return common | ARCHITECTURES[kind].config(config)


def to_theirs(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under their names, contiguous, without a tied head. The inverse of `to_ours`."""
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if not (config.tie_embeddings and name == "lm_head.weight")
    }
    found = ARCHITECTURES[family_of(config)].to_theirs(kept)
    return {name: tensor.contiguous() for name, tensor in found.items()}
