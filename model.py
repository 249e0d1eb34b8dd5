"""The network: a decoder-only transformer, its key/value cache, and sampling.

With the default switches this is a Llama-style model: RMSNorm, rotary positions, SwiGLU, no biases, and
grouped-query attention where `n_kv_heads` is smaller than `n_heads`. Five switches turn it into GPT-2:
`norm: layernorm, mlp: gelu, position: learned, bias: true`, and `n_kv_heads` equal to `n_heads`.

Shapes, here and in every file that moves tensors:
    B batch, T query positions, S key positions, D d_model, H query heads, K key/value heads, hd head_dim,
    F d_ff, V vocab_size
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from sampling import SamplingConfig, sample_next
from support.chunked_loss import cross_entropy_sum


class GPTConfig(BaseModel):
    """Everything that decides the shape of the network: the contract between config, model and checkpoint."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    vocab_size: int = Field(
        0,
        ge=0,
        description="Rows of the embedding table. Comes from the tokenizer, never from a config file.",
    )
    d_model: int = Field(
        128, gt=0, description="Width of the residual stream. Parameters and time grow with its square."
    )
    n_layers: int = Field(4, gt=0, description="Number of transformer blocks.")
    n_heads: int = Field(
        4,
        gt=0,
        description="Query heads per block. `d_model` must be a multiple, unless `head_dim` is given.",
    )
    n_kv_heads: int | None = Field(
        None,
        gt=0,
        description="Key/value heads; fewer shrink the cache (grouped-query attention). Default: `n_heads`.",
    )
    head_dim: int | None = Field(None, gt=0, description="Width of one head. Default: `d_model / n_heads`.")
    d_ff: int | None = Field(
        None,
        gt=0,
        description="Width of the MLP. Default: 8/3 `d_model` in steps of 32 (`swiglu`), 4 `d_model` (`gelu`).",
    )
    max_seq_len: int = Field(
        256, gt=1, description="The longest sequence the model can see at once, in tokens."
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of dropping an activation in training. Helps when data is repeated often.",
    )
    rope_theta: float = Field(
        10000.0,
        gt=0,
        description="Base of the rotary frequencies. Larger: slower rotation, for longer contexts.",
    )
    norm_eps: float = Field(1e-5, gt=0, description="Added inside the square root of the normalization.")
    tie_embeddings: bool = Field(
        True,
        description="Use the embedding table as the output head too. Saves `vocab_size * d_model` parameters.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: same gradients, less memory, 25% more time.",
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="Normalization before attention, before the MLP and at the end."
    )
    mlp: Literal["swiglu", "gelu"] = Field(
        "swiglu", description="`swiglu`: gated, three matrices. `gelu`: GPT-2's, two matrices."
    )
    position: Literal["rope", "learned", "sinusoidal"] = Field(
        "rope", description="How order enters: rotated q and k, a learned table, or sinusoids."
    )
    bias: bool = Field(
        False, description="Biases in the linear layers and in LayerNorm (GPT-2 has them, Llama does not)."
    )
    qk_norm: bool = Field(
        False,
        description="RMSNorm on each query and key head: bounds attention logits at high learning rates.",
    )
    zero_init: bool = Field(
        False,
        description="Residual projections, and an untied head, start at zero: each block begins as the identity.",
    )
    embed_scale: bool = Field(
        False, description="Multiply the token embeddings by sqrt(d_model), as the original transformer did."
    )

    @model_validator(mode="after")
    def _fill_defaults_and_check(self) -> "GPTConfig":
        if self.head_dim is None and self.d_model % self.n_heads:
            nearest = (self.d_model // self.n_heads + 1) * self.n_heads
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; try "
                f"d_model={nearest}, or set head_dim"
            )
        self.head_dim = self.head_dim or self.d_model // self.n_heads
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if self.n_heads % self.n_kv_heads:
            divisors = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            nearest = min(divisors, key=lambda k: abs(k - self.n_kv_heads))
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}; try "
                f"n_kv_heads={nearest}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, but rotary positions turn pairs; try "
                f"head_dim={self.head_dim + 1}"
            )
        if self.position == "sinusoidal" and self.d_model % 2:
            raise ValueError(
                f"d_model={self.d_model} is odd, but sinusoidal positions come in pairs; try "
                f"d_model={self.d_model + 1}"
            )
        if self.d_ff is None:
            self.d_ff = -(-8 * self.d_model // 3 // 32) * 32 if self.mlp == "swiglu" else 4 * self.d_model
        return self


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, then scale: x / sqrt(mean(x^2) + eps) * weight, in float32.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). Without a mean to subtract and a bias
    to add it is LayerNorm's cheaper half, and works as well.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(
            x.float(), x.shape[-1:], eps=self.eps
        )  # float32 even where x is bf16: a sum of squares
        return (normed * self.weight).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm (Ba et al., 2016), computed in float32 whatever the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the rotation at each position: two float32 tensors (..., T, hd).

    Su et al., "RoFormer" (2021). Pair i of a head turns by position * theta^(-2i/hd) radians, so the dot
    product of a query and a key depends only on their distance. Ours is the "halves" convention (Hugging
    Face's): dimension i is paired with i + hd/2. They are computed for each forward pass, so no buffer can
    lose precision in a bf16 model.
    """
    inv_freq = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
    angles = positions[..., None].float() * inv_freq  # (..., T, hd/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate (B, H, T, hd): (a, b) becomes (a cos - b sin, b cos + a sin); the minus sits in `signed_sin`."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin).to(x.dtype)


def sinusoidal_table(positions: Tensor, d_model: int) -> Tensor:
    """The fixed position code of Vaswani et al., "Attention Is All You Need" (2017): (..., T, D)."""
    freq = 10000.0 ** (-torch.arange(0, d_model, 2, device=positions.device, dtype=torch.float32) / d_model)
    angles = positions[..., None].float() * freq
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class KVCache:
    """Keys and values of the positions already seen, so that generating a token costs one position, not all.

    One pair of buffers a layer, allocated once, written in place; K heads, not H, is what grouped-query
    attention saves. `length` counts the positions filled."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device | str, dtype: torch.dtype):
        shape = (batch_size, config.n_kv_heads, config.max_seq_len, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, hd) behind what is there; return everything so far, (B, K, S, hd). `length`
        moves later, once every layer has appended."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """True where a query may look, (T, S). The queries are the last T of the S positions.

    With T=2, S=4:   1 1 1 0
                     1 1 1 1
    """
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v, written out; all (B, H, ., hd). Also the path on MPS, where the fused
    kernel has leaked future positions and mishandled strides (pytorch issues 195910 and 181133)."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, H, T, S)
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return F.dropout(weights, dropout).to(v.dtype) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The same, by PyTorch's fused kernel, which never stores the (T, S) scores."""
    # is_causal aligns its triangle to the top left: a single query behind a cache would see only key 0.
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and q.shape[2] > 1
    )


class GQAMultiheadAttention(nn.Module):
    """Causal self-attention in which H query heads share K key/value heads (Ainslie et al., "GQA", 2023).

    H=4, K=2:   query heads   0 1 | 2 3
                kv heads       0  |  1      each kv head serves H/K neighbouring query heads
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        D, H, K, hd = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        self.n_heads, self.n_kv_heads, self.head_dim = H, K, hd
        self.layer, self.dropout = layer, config.dropout
        # Three projections, not one fused: on a CPU the views of a fused one cost 10% (docs/EXPERIMENTS.md).
        self.q_proj = nn.Linear(D, H * hd, bias=config.bias)
        self.k_proj = nn.Linear(D, K * hd, bias=config.bias)
        self.v_proj = nn.Linear(D, K * hd, bias=config.bias)
        self.o_proj = nn.Linear(H * hd, D, bias=config.bias)
        self.q_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hd, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.n_heads, self.head_dim)).transpose(
            1, 2
        )  # (B, H, T, hd)
        k = self.k_norm(self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim)).transpose(
            1, 2
        )  # (B, K, T, hd)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, hd)
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
    """down(silu(gate(x)) * up(x)): one branch decides how much of the other passes (Shazeer, "GLU
    Variants", 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, F) inside, (B, T, D) out


class GeluMLP(nn.Module):
    """GPT-2's MLP: up, GELU (its tanh approximation), down."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The stream itself is never normalized, only what
    branches off."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = GQAMultiheadAttention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GeluMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


def segment_mask(segments: Tensor) -> Tensor:
    """(B, T) document numbers to (B, 1, T, T), True where a query may look: backwards, inside its own
    document.

    segments 0 0 1 1:   1 . . .
                        1 1 . .
                        . . 1 .
                        . . 1 1
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & causal_mask(segments.shape[1], segments.shape[1], segments.device)


def segment_positions(segments: Tensor) -> Tensor:
    """Positions that restart with every document: segments 0 0 1 1 1 give 0 1 0 1 2. (B, T) to (B, T)."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


class GPTMini(nn.Module):
    """Token embedding, blocks, final norm, head. Module names are Hugging Face Llama's, so weights
    exchange by prefix."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size={config.vocab_size} must be at least 1; take it from the tokenizer")
        self.config = config
        # Tables start empty: nn.Embedding's own drawing of numbers, on the meta device, imports half of
        # torch's compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.d_model), freeze=False
        )
        if config.position == "learned":
            self.embed_positions = nn.Embedding.from_pretrained(
                torch.empty(config.max_seq_len, config.d_model), freeze=False
            )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layers))
        self.norm = make_norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if not self.embed_tokens.weight.is_meta:
            self.reset_parameters()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let head and embedding be one tensor, if the config says so. Loading into a meta-device model
        breaks the tie, so a loader calls this again."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def reset_parameters(self) -> None:
        """GPT-2's initialization: normal with std 0.02; what writes into the residual stream is smaller by
        1/sqrt(2 n_layers), so that the stream does not grow with depth (Radford et al., 2019)."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            std, residual = 0.02, name.endswith(("o_proj", "down_proj"))
            if self.config.zero_init and (
                residual or name == "lm_head"
            ):  # a tied head takes the embedding's tensor later
                std = 0.0
            elif residual:
                std /= (2 * self.config.n_layers) ** 0.5
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def n_params(self) -> int:
        """Trainable numbers, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations to train on one token, forward and backward: 6 for each weight of a
        matrix that multiplies, and 6 n_layers seq_len (H hd) for causal attention. Norms, softmax and the
        optimizer are not counted."""
        c = self.config
        matrix_weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matrix_weights + 6 * c.n_layers * seq_len * c.n_heads * c.head_dim

    def hidden_states(
        self, input_ids: Tensor, segments: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T) token ids to (B, T, D), everything but the head. Raises ValueError beyond `max_seq_len`."""
        c, T, device = self.config, input_ids.shape[1], input_ids.device
        past = cache.length if cache is not None else 0
        if past + T > c.max_seq_len:
            raise ValueError(
                f"sequence of {past + T} tokens is longer than max_seq_len={c.max_seq_len}; cut it, or "
                "train with a larger one"
            )
        positions, mask = (
            torch.arange(past, past + T, device=device),
            None,
        )  # (T,); mask None means plainly causal
        if segments is not None:
            positions, mask = segment_positions(segments), segment_mask(segments)  # (B, T), (B, 1, T, T)
        elif past and T > 1:
            mask = causal_mask(T, past + T, device)

        x = self.embed_tokens(input_ids)  # (B, T, D)
        if c.embed_scale:
            x = x * c.d_model**0.5
        rope = None
        if c.position == "rope":
            rope = rope_tables(
                positions[:, None] if positions.dim() == 2 else positions, c.head_dim, c.rope_theta
            )
        elif c.position == "learned":
            x = x + self.embed_positions(positions)
        else:
            x = x + sinusoidal_table(positions, c.d_model).to(x.dtype)
        x = self.dropout(x)
        for block in self.layers:
            if c.gradient_checkpointing and self.training:
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

        labels (B, T): `labels[b, t]` is the token that follows `input_ids[b, t]` (shifted by the data, not
        here);
        -100 is not scored. segments (B, T): the document each position belongs to; attention stays inside it and
        positions restart with it. cache: keys and values of earlier positions, extended in place.
        """
        x = self.hidden_states(input_ids, segments, cache)
        if labels is None:
            return self.lm_head(x)
        return cross_entropy_sum(x, self.lm_head.weight, labels)

    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        sampling: SamplingConfig | None = None,
        eos_id: int | None = None,
        generator: Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next token of every row, (B,), up to `max_new_tokens` times; a row that has met `eos_id`
        goes on with `eos_id`, and the stream ends when every row has.

        Beyond `max_seq_len` the model sees the last `max_seq_len` tokens. Their positions shift by one at
        each step, so from there on nothing cached is valid, and each token costs a whole window.
        """
        sampling = sampling or SamplingConfig()
        ids, window = input_ids, self.config.max_seq_len
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        cache = KVCache(self.config, len(ids), ids.device, self.embed_tokens.weight.dtype)
        for _ in range(max_new_tokens):
            if ids.shape[1] <= window:
                x = self.hidden_states(ids[:, cache.length :], cache=cache)
            else:
                x = self.hidden_states(ids[:, -window:])
            token = sample_next(self.lm_head(x[:, -1]), sampling, ids, generator)  # (B,)
            if eos_id is not None:
                token = token.masked_fill(finished, eos_id)
                finished = finished | (token == eos_id)
            yield token
            if finished.all():
                return
            ids = torch.cat([ids, token[:, None]], dim=1)

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, sampling: SamplingConfig | None = None, **options
    ) -> Tensor:
        """The prompt (B, T) with up to `max_new_tokens` tokens behind it: what `stream` yields, collected,
        with its further options. Call `eval()` first."""
        new = list(self.stream(input_ids, max_new_tokens, sampling, **options))
        return torch.cat([input_ids, torch.stack(new, dim=1)], dim=1) if new else input_ids
