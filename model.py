"""The network: a decoder-only transformer and its key/value cache.

With the default switches this is a Llama-style model: RMSNorm, rotary positions, SwiGLU, no biases, and
grouped-query attention where `n_kv_heads` is smaller than `n_heads`. Five switches turn it into GPT-2:
`norm: layernorm, mlp: gelu, position: learned, bias: true`, and `n_kv_heads` equal to `n_heads`.

Shapes, here and in every file that moves tensors:
    B batch, T query positions, S key positions, D d_model, H query heads, K key/value heads, hd head_dim,
    F d_ff, V vocab_size
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sampling import SamplingConfig, generate_tokens
from support.chunked_loss import CHUNKED_FROM_VOCAB, IGNORE, chunked_cross_entropy_sum
from support.device import matmul_dtype
from support.hand_gradients import HandRMSNorm, HandRope, trains_eagerly

# ---- config --------------------------------------------------------------------------------------


class GPTConfig(BaseModel):
    """The settings of the network: the `model` section of a config, and a part of every checkpoint."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    vocab_size: int = Field(0, ge=0, description="Rows of the embedding table. The tokenizer sets it.")
    d_model: int = Field(
        128, gt=0, description="Width of the residual stream. Parameters and time grow with its square."
    )
    n_layers: int = Field(4, gt=0, description="Number of transformer blocks.")
    n_heads: int = Field(4, gt=0, description="Query heads. `d_model` must be a multiple, or set `head_dim`.")
    n_kv_heads: int | None = Field(
        None, gt=0, description="Key/value heads; fewer make the cache smaller (GQA). Default: `n_heads`."
    )
    head_dim: int | None = Field(None, gt=0, description="Width of one head. Default: `d_model / n_heads`.")
    d_ff: int | None = Field(
        None, gt=0, description="MLP width. Default: 8/3 `d_model`, in steps of 32 (`gelu`: 4 `d_model`)."
    )
    max_seq_len: int = Field(256, gt=1, description="Longest sequence the model can see, in tokens.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of activations dropped in training. Helps when data is repeated."
    )
    rope_theta: float = Field(
        10000.0, gt=0, description="Rotary base. A larger one turns pairs more slowly, for longer texts."
    )
    norm_eps: float = Field(1e-5, gt=0, description="Added inside the square root of the normalization.")
    tie_embeddings: bool = Field(
        True, description="The embedding table is the head too. Saves `vocab_size * d_model` parameters."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in backward: same gradients, less memory, 25% more time."
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="Normalization before attention, before the MLP and at the end."
    )
    mlp: Literal["swiglu", "gelu"] = Field(
        "swiglu", description="`swiglu`: gated, three matrices. `gelu`: GPT-2's, two matrices."
    )
    position: Literal["rope", "learned", "sinusoidal"] = Field(
        "rope", description="How token order enters: rotated q and k, a learned table, or sinusoids."
    )
    bias: bool = Field(
        False, description="Biases in the linear layers and in LayerNorm (GPT-2 has them, Llama does not)."
    )
    qk_norm: bool = Field(
        False, description="RMSNorm on query and key heads: bounds attention logits at high learning rates."
    )
    zero_init: bool = Field(
        False, description="Residual projections and an untied head start at zero: blocks begin as identity."
    )
    embed_scale: bool = Field(
        False, description="Multiply the token embeddings by sqrt(d_model), as the original transformer did."
    )

    @model_validator(mode="after")
    def _fill_defaults_and_check(self) -> "GPTConfig":
        D, H = self.d_model, self.n_heads
        if self.head_dim is None and D % H:
            nearest = (D // H + 1) * H
            raise ValueError(
                f"d_model={D} is not a multiple of n_heads={H}; try d_model={nearest}, or set head_dim"
            )
        hd = self.head_dim = self.head_dim or D // H
        K = self.n_kv_heads = self.n_kv_heads or H
        if H % K:
            divisors = [k for k in range(1, H + 1) if H % k == 0]
            nearest = min(divisors, key=lambda k: abs(k - K))
            raise ValueError(f"n_heads={H} is not a multiple of n_kv_heads={K}; try n_kv_heads={nearest}")
        if self.position == "rope" and hd % 2:
            raise ValueError(f"head_dim={hd} is odd, but rotary positions turn pairs; try head_dim={hd + 1}")
        if self.position == "sinusoidal" and D % 2:
            raise ValueError(f"d_model={D} is odd, but sinusoids come in pairs; try d_model={D + 1}")
        if self.d_ff is None and self.mlp == "swiglu":
            # Three matrices of D x 8/3 D have as many weights as two of D x 4 D. In steps of 32.
            self.d_ff = 32 * math.ceil(8 * D / (3 * 32))
        elif self.d_ff is None:
            self.d_ff = 4 * D
        return self


# ---- parts ---------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, then scale: x / sqrt(mean(x^2) + eps) * weight, in float32.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). Unlike LayerNorm it subtracts no mean
    and adds no bias: cheaper, and as good.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # float32 even where x is bf16, because a sum of squares loses too much in bf16.
        x32, gain = x.float(), self.weight.float()
        if trains_eagerly(x) and not x.is_cuda:  # CUDA has this as one kernel; elsewhere ours is faster
            return HandRMSNorm.apply(x32, gain, self.eps).to(matmul_dtype(x))
        return F.rms_norm(x32, gain.shape, gain, self.eps).to(matmul_dtype(x))


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm (Ba et al., 2016), computed in float32 whatever the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        bias = self.bias.float() if self.bias is not None else None
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(matmul_dtype(x))


def make_norm(config: GPTConfig) -> nn.Module:
    """A new norm of the kind that `config.norm` names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    if config.norm == "layernorm":
        return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    raise ValueError(f"norm={config.norm!r} is unknown; make_norm in model.py has rmsnorm and layernorm")


Rope = tuple[Tensor, Tensor]  # the cosines and the sines that `rope_tables` returns


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """Cosines and sines of the rotation at each position: two float32 tensors (..., T, hd/2).

    Su et al., "RoFormer" (2021). Pair i of a head turns by position * theta^(-2i/hd) radians, so the dot
    product of a query and a key depends only on their distance. The tables are computed in each forward
    pass: a stored buffer would lose precision in a bf16 model.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / theta**exponents  # (hd/2,)
    angles = positions[..., None].float() * inv_freq  # (..., T, hd/2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of each head: (a, b) becomes (a cos - b sin, b cos + a sin). x: (B, H, T, hd).

    Dimension i is paired with dimension i + hd/2, as in Hugging Face's code. The paper pairs neighbours, 2i
    with 2i + 1 (from_scratch.py has both).
    """
    if trains_eagerly(x):
        return HandRope.apply(x, cos, sin)  # the same in fewer passes
    a, b = x.chunk(2, dim=-1)  # each (B, H, T, hd/2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def sinusoidal_table(positions: Tensor, d_model: int) -> Tensor:
    """The fixed position code of Vaswani et al., "Attention Is All You Need" (2017): (..., T, D)."""
    exponents = torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32) / d_model
    angles = positions[..., None].float() * 10000.0**-exponents  # (..., T, D/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # sin, cos, sin, cos, ...


def segment_positions(segments: Tensor) -> Tensor:
    """Positions that start again with each document: segments 0 0 1 1 1 give 0 1 0 1 2. (B, T) to (B, T)."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start_of_mine = torch.where(is_start, index, 0).cummax(dim=1).values  # 0 0 2 0 0 -> 0 0 2 2 2
    return index - start_of_mine


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """True where a query may look, (T, S). With a cache, only the T new positions ask; all S answer.

    T=2, S=4:   1 1 1 0
                1 1 1 1
    """
    n_past = n_keys - n_queries  # query 0 sees these and itself; each later query sees one more
    everywhere = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return everywhere.tril(n_past)  # row i keeps True in columns 0 .. n_past + i


def segment_mask(segments: Tensor) -> Tensor:
    """(B, T) document numbers to (B, 1, T, T), True where a query may look: back, inside its own document.

    segments 0 0 1 1:   1 . . .
                        1 1 . .
                        . . 1 .
                        . . 1 1
    """
    T = segments.shape[1]
    same = segments[:, None, :, None] == segments[:, None, None, :]  # (B, 1, T, 1) == (B, 1, 1, T)
    return same & causal_mask(T, T, segments.device)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v, written out. q (B, H, T, hd); k, v (B, H, S, hd). For Apple's GPUs (mps),
    where the fused kernel has leaked future positions and mishandled strides (pytorch 195910, 181133)."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, H, T, S)
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v  # (B, H, T, hd)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The same with PyTorch's fused kernel, which never stores the (T, S) scores."""
    # is_causal lets query 0 see only key 0. That is wrong for a single query after a cache: it sees all keys.
    is_causal = mask is None and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)


class KVCache:
    """Keys and values of the positions seen so far: for a new token only its own position is computed.

    Each layer has two buffers, allocated once and filled in place. They have K heads, not H: this is where
    grouped-query attention saves memory. `length` is the number of positions filled.
    """

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device | str, dtype: torch.dtype):
        shape = (batch_size, config.n_kv_heads, config.max_seq_len, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, hd) after what is there; return all so far, (B, K, S, hd). The network
        raises `length` at the end, when every layer has appended."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class GQAMultiheadAttention(nn.Module):
    """Causal self-attention in which H query heads share K key/value heads (Ainslie et al., "GQA", 2023).

    H=4, K=2:   query heads   0 1 | 2 3
                kv heads       0  |  1      each kv head serves H/K neighbouring query heads
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        D, H, K, hd = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        self.n_heads, self.n_kv_heads, self.head_dim = H, K, hd
        self.layer = layer  # which buffers of the cache are ours
        self.dropout = config.dropout
        # Three projections, not one fused: on a CPU the views of a fused one cost 10% (docs/EXPERIMENTS.md).
        self.q_proj = nn.Linear(D, H * hd, bias=config.bias)
        self.k_proj = nn.Linear(D, K * hd, bias=config.bias)
        self.v_proj = nn.Linear(D, K * hd, bias=config.bias)
        self.o_proj = nn.Linear(H * hd, D, bias=config.bias)
        self.q_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, D) to (B, T, D). `mask` is True where a query may look; None means causal."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim)
        q = self.q_norm(q).transpose(1, 2)  # (B, H, T, hd)
        k = self.k_norm(k).transpose(1, 2)  # (B, K, T, hd)
        v = v.transpose(1, 2)  # (B, K, T, hd)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, hd)
        if self.n_kv_heads != self.n_heads:
            # [kv0 kv1] -> [kv0 kv0 kv1 kv1]; `repeat` would give [kv0 kv1 kv0 kv1] and pair the wrong heads.
            group = self.n_heads // self.n_kv_heads
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, S, hd)
        attend = explicit_attention if x.device.type == "mps" else fused_attention
        out = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, hd)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): one branch decides how much of the other passes (Shazeer, "GLU Variants
    Improve Transformer", 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, F) inside, (B, T, D) out


class GeluMLP(nn.Module):
    """GPT-2's MLP: widen to d_ff, bend, narrow again. GELU is a smooth ReLU (Hendrycks and Gimpel, 2016);
    GPT-2 computes it with a formula that uses tanh, so we do too."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))  # (B, T, F) inside, (B, T, D) out


def make_mlp(config: GPTConfig) -> nn.Module:
    """A new MLP of the kind that `config.mlp` names."""
    if config.mlp == "swiglu":
        return SwiGLU(config)
    if config.mlp == "gelu":
        return GeluMLP(config)
    raise ValueError(f"mlp={config.mlp!r} is unknown; make_mlp in model.py has swiglu and gelu")


# ---- block ---------------------------------------------------------------------------------------


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The residual stream x itself is never normalized, only
    the copy that attention or the MLP reads."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = GQAMultiheadAttention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = make_mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


# ---- network -------------------------------------------------------------------------------------


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss: the sum of -log p(label) over the labels that are not IGNORE, in float32.

    hidden (B, T, D) are the final states, weight (V, D) is the head, labels (B, T) are the tokens to predict.
    """
    logits = F.linear(hidden.flatten(0, 1), weight)  # (B*T, V)
    return F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


class GPTMini(nn.Module):
    """Token embedding, blocks, final norm, head. The modules are named as in Hugging Face's Llama, so
    weights can be exchanged name by name."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1; take it from the tokenizer")
        self.config = config
        V, D = config.vocab_size, config.d_model
        # An empty table; reset_parameters fills it. nn.Embedding(V, D) would fill it here already, and that
        # starts slowly on the "meta" device (tensors with a shape but no numbers, which a loader replaces).
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(V, D), freeze=False)
        if config.position == "learned":
            table = torch.empty(config.max_seq_len, D)
            self.embed_positions = nn.Embedding.from_pretrained(table, freeze=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(D, V, bias=False)  # no bias, whatever config.bias says
        self.compile_decoding = False  # `infer.py --compile` sets it
        # Two ways to compute one loss; the chunked one needs less memory.
        self.loss_sum = chunked_cross_entropy_sum if V >= CHUNKED_FROM_VOCAB else cross_entropy_sum
        if not self.embed_tokens.weight.is_meta:  # a meta model has no numbers to set
            self.reset_parameters()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight and the embedding table one tensor, if the config says so. Loading into a
        meta model replaces both, so a loader calls this again."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def reset_parameters(self) -> None:
        """GPT-2's initialization (Radford et al., 2019): normal with std 0.02; the matrices that write into
        the residual stream start smaller by 1/sqrt(2 n_layers), so that it does not grow with depth."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            std = 0.02
            writes_to_stream = name.endswith(("o_proj", "down_proj"))
            if writes_to_stream:
                std /= (2 * self.config.n_layers) ** 0.5
            if self.config.zero_init and (writes_to_stream or name == "lm_head"):
                std = 0.0  # without effect on a tied head: tie_weights gives it the embedding's tensor
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def n_params(self) -> int:
        """How many numbers the weights hold; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations to train on one token. Each weight of a matrix costs 2 forward and 4
        backward; causal attention costs 6 n_layers seq_len (H hd). Norms, softmax and the optimizer are not
        counted."""
        c = self.config
        matrix_weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matrix_weights + 6 * c.n_layers * seq_len * c.n_heads * c.head_dim

    def hidden_states(
        self, input_ids: Tensor, segments: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Everything but the head: token ids (B, T) to (B, T, D). Raises ValueError beyond `max_seq_len`."""
        c, T, device = self.config, input_ids.shape[1], input_ids.device
        past = cache.length if cache is not None else 0  # the positions before input_ids
        if past + T > c.max_seq_len:
            raise ValueError(
                f"sequence of {past + T} tokens is longer than max_seq_len={c.max_seq_len}; cut it, or "
                "train with a larger one"
            )
        positions = torch.arange(past, past + T, device=device)[None]  # (1, T)
        mask = None  # None means causal and nothing else
        if segments is not None:
            positions, mask = segment_positions(segments), segment_mask(segments)  # (B, T), (B, 1, T, T)
        elif past and T > 1:
            mask = causal_mask(T, past + T, device)  # (T, S)

        x = self.embed_tokens(input_ids)  # (B, T, D)
        if c.embed_scale:
            x = x * c.d_model**0.5
        rope = None
        if c.position == "rope":
            rope = rope_tables(positions[:, None], c.head_dim, c.rope_theta)  # (B or 1, 1, T, hd/2), twice
        elif c.position == "learned":
            x = x + self.embed_positions(positions)
        elif c.position == "sinusoidal":
            x = x + sinusoidal_table(positions, c.d_model).to(x.dtype)
        else:
            raise ValueError(f"position={c.position!r} is unknown; GPTMini.hidden_states does not add it")
        x = self.dropout(x)
        for block in self.layers:
            if c.gradient_checkpointing and self.training:
                # Only the block's input is kept; backward computes the rest again.
                x = checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V); with `labels`, (summed loss, number of targets) instead.

        labels (B, T): `labels[b, t]` is the token that follows `input_ids[b, t]` (the data shifts them, not
        this function); -100 is not scored. segments (B, T): the number of each token's document; attention
        stays inside a document, and positions start again in each. cache: keys and values of earlier
        positions; those of `input_ids` are added.
        """
        x = self.hidden_states(input_ids, segments, cache)  # (B, T, D)
        if labels is None:
            return self.lm_head(x)
        return self.loss_sum(x, self.lm_head.weight, labels), (labels != IGNORE).sum()

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache that fits this network, on its device and in its dtype."""
        weight = self.embed_tokens.weight
        return KVCache(self.config, batch_size, weight.device, weight.dtype)

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, sampling: SamplingConfig | None = None, **options
    ) -> Tensor:
        """The prompts (B, T) with up to `max_new_tokens` new tokens after each. `options` are `eos_id` and
        `generator`, as in `generate_tokens`. Call `eval()` first."""
        tokens = generate_tokens(self, input_ids, max_new_tokens, sampling, **options)
        return torch.cat([input_ids, *(token[:, None] for token in tokens)], dim=1)
