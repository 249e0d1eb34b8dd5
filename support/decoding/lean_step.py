"""One new token through the network on a CPU, with little work besides the matrix products.

The network's own forward pass makes some twenty small tensors a layer, and Python calls some thirty
modules. With one token at a time, that takes longer than the arithmetic of a small model. Here the same
numbers are computed into buffers that are made once, and the linear layers add their result to the
residual stream directly. The weights are the network's own tensors, not copies.

Shapes: B batch, S positions so far, D d_model, H query heads, K key/value heads, hd head_dim, F d_ff,
V vocab_size
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.decoding.positions import Angles, position_tables
from support.device import has_amd_cpu

Function = Callable[[Tensor], Tensor]

# ---- parts: a module becomes a function that writes into a buffer --------------------------------


def own_product(linear: nn.Module, batch_size: int) -> Function | None:
    """How to compute the layer where a plain product of matrices is not the way: the module itself with an
    adapter or int8 weights, or `row_as_pair`. None for a plain product."""
    if type(linear) is not nn.Linear:
        return linear
    return row_as_pair(linear) if is_faster_as_pair(linear, batch_size) else None


def linear_into(linear: nn.Module, out: Tensor) -> Function:
    """The layer as a function whose result is written into `out` (B, out_features)."""
    product = own_product(linear, len(out))
    if product is not None:
        return lambda x: out.copy_(product(x))
    weight, bias = linear.weight.t(), linear.bias  # .t() is a view
    if bias is None:
        return lambda x: torch.mm(x, weight, out=out)
    return lambda x: torch.addmm(bias, x, weight, out=out)


def linear_added(linear: nn.Module, stream: Tensor) -> Function:
    """The layer as a function whose result is added to the residual stream (B, D)."""
    product = own_product(linear, len(stream))
    if product is not None:
        return lambda x: stream.add_(product(x))
    weight, bias = linear.weight.t(), linear.bias
    if bias is None:
        return lambda x: stream.addmm_(x, weight)
    return lambda x: stream.add_(bias).addmm_(x, weight)


def is_faster_as_pair(linear: nn.Linear, batch_size: int) -> bool:
    """Whether `row_as_pair` is the faster way here: for one float32 row, a matrix that is not narrower than
    high, and an AMD processor, where MKL (PyTorch's library) multiplies a matrix with one vector slowly."""
    rows, columns = linear.weight.shape
    return batch_size == 1 and rows >= columns and linear.weight.dtype == torch.float32 and has_amd_cpu()


def row_as_pair(linear: nn.Linear) -> Function:
    """The layer for one row x (1, in), computed as W [x x], a product with two equal columns.

    That is twice the arithmetic, and the same reading of W, which is what takes the time. On an AMD EPYC, two
    threads read W at 16 to 27 GB/s this way, and at 10 to 13 as a matrix with a vector.
    """
    weight, bias = linear.weight, linear.bias
    pair, products = weight.new_empty(2, weight.shape[1]), weight.new_empty(len(weight), 2)
    columns, first = pair.t(), products.t()[:1]  # views: (in, 2) and (1, out)

    def product(x: Tensor) -> Tensor:
        pair.copy_(x)
        torch.mm(weight, columns, out=products)
        return first if bias is None else first + bias

    return product


def mlp_added(mlp: nn.Module, stream: Tensor, wide: Tensor, gate: Tensor) -> Function:
    """The MLP as a function whose result is added to the residual stream. `wide` and `gate` are buffers
    (B, F)."""
    kind = type(mlp).__name__
    if kind not in ("SwiGLU", "GeluMLP"):
        return lambda x: stream.add_(mlp(x))
    up, down = linear_into(mlp.up_proj, wide), linear_added(mlp.down_proj, stream)
    if kind == "GeluMLP":
        return lambda x: down(F.gelu(up(x), approximate="tanh"))
    opened = linear_into(mlp.gate_proj, gate)
    return lambda x: down(F.silu(opened(x), inplace=True).mul_(up(x)))


def norm_into(norm: nn.Module, padded_stream: Tensor, out: Tensor) -> Callable[[], Tensor]:
    """The norm of the residual stream as a function without arguments that writes into `out` (B, D).

    padded_stream (B, D+1) is the stream, and in its last column sqrt(D * eps). The length of such a row is
    sqrt(sum(x^2) + D * eps), which is sqrt(D) times the root that RMSNorm divides by. So one call finds the
    root, in place of five: 3 microseconds a norm, not 9.
    """
    stream, D = padded_stream[:, :-1], out.shape[1]
    if type(norm).__name__ != "RMSNorm" or out.dtype != torch.float32:
        return lambda: norm(stream)
    zero, length = torch.zeros(1), torch.empty(len(out), 1)

    def rms_norm() -> Tensor:
        torch.linalg.vector_norm(padded_stream, dim=1, keepdim=True, out=length)
        return torch.addcdiv(zero, stream, length, value=D**0.5, out=out).mul_(norm.weight)

    return rms_norm


class Heads:
    """Where one token's queries, keys and values are written and rotated; all layers share it."""

    def __init__(self, batch_size: int, n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype):
        B, H, K, hd = batch_size, n_heads, n_kv_heads, head_dim
        qkv = torch.empty(B, H + 2 * K, hd, dtype=dtype)
        self.q, self.k, self.v = qkv[:, :H], qkv[:, H : H + K], qkv[:, H + K :]
        # Rotation is in float32, as in apply_rope. Queries and keys are neighbours, so one call turns both.
        turned = torch.empty(B, H + K, hd)
        self.turned_q, self.turned_k = turned[:, :H], turned[:, H:]
        if hd % 2 == 0:
            self.pairs = qkv[:, : H + K].view(B, H + K, 2, hd // 2)
            self.turned_pairs = turned.view(B, H + K, 2, hd // 2)
            self.a, self.b = self.pairs.unbind(2)  # dimensions i and i + hd/2 are a pair, as in model.py
            self.turned_a, self.turned_b = self.turned_pairs.unbind(2)
        # The H/K query heads of a key/value head count as H/K queries of that head: so nothing is repeated.
        self.grouped = (B, K, H // K, hd)

    def rotate(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, hd) and keys (B, K, hd), turned by angles whose cosines and sines are (hd/2,)."""
        torch.mul(self.pairs, cos, out=self.turned_pairs)
        self.turned_a.addcmul_(self.b, sin, value=-1)  # a cos - b sin
        self.turned_b.addcmul_(self.a, sin)  # b cos + a sin
        return self.turned_q.to(self.q.dtype), self.turned_k


class LeanLayer:
    """One block of the network: it changes the token's row of the residual stream."""

    def __init__(self, block: nn.Module, padded_stream: Tensor, normed: Tensor, mlp_buffers, heads: Heads):
        attn, stream = block.self_attn, padded_stream[:, :-1]
        self.heads = heads
        self.input_norm = norm_into(block.input_layernorm, padded_stream, normed)
        self.q_proj = linear_into(attn.q_proj, heads.q.flatten(1))
        self.k_proj = linear_into(attn.k_proj, heads.k.flatten(1))
        self.v_proj = linear_into(attn.v_proj, heads.v.flatten(1))
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.normalizes_heads = not isinstance(attn.q_norm, nn.Identity)
        self.o_proj = linear_added(attn.o_proj, stream)
        self.mlp_norm = norm_into(block.post_attention_layernorm, padded_stream, normed)
        self.mlp = mlp_added(block.mlp, stream, *mlp_buffers)

    def __call__(self, keys: Tensor, values: Tensor, position: int, angles: Angles | None) -> None:
        """keys, values (B, K, S, hd) are the layer's buffers. The token's own are written at `position`."""
        normed, heads = self.input_norm(), self.heads
        self.q_proj(normed)
        self.k_proj(normed)
        self.v_proj(normed)
        q, k = heads.q, heads.k
        if self.normalizes_heads:
            q.copy_(self.q_norm(q))
            k.copy_(self.k_norm(k))
        if angles is not None:
            q, k = heads.rotate(*angles)
        keys.select(2, position).copy_(k)
        values.select(2, position).copy_(heads.v)
        end = position + 1
        out = F.scaled_dot_product_attention(
            q.view(heads.grouped), keys.narrow(2, 0, end), values.narrow(2, 0, end)
        )
        self.o_proj(out.flatten(1))  # from (B, K, H/K, hd)
        self.mlp(self.mlp_norm())


# ---- the whole -----------------------------------------------------------------------------------


class LeanStep:
    """Logits (B, V) after one more token, `step(token, position)`. They are written into a buffer, so they
    hold until the next call. The keys and values of earlier positions are in `cache`, those of the token are
    added there."""

    def __init__(self, model: nn.Module, cache, longest: int):
        """`longest` is the number of positions that the cache will hold at most."""
        c, dtype = model.config, model.embed_tokens.weight.dtype
        B, D = len(cache.keys[0]), c.d_model
        self.cache = cache
        self.embed_tokens = model.embed_tokens
        self.embed_scale = D**0.5 if c.embed_scale else None
        self.added, self.rope = position_tables(model, longest)
        padded_stream = torch.full((B, D + 1), (D * c.norm_eps) ** 0.5, dtype=dtype)
        self.stream = padded_stream[:, :D]
        normed = torch.empty(B, D, dtype=dtype)
        heads = Heads(B, c.n_heads, c.n_kv_heads, c.head_dim, dtype)
        mlp_buffers = [torch.empty(B, c.d_ff, dtype=dtype) for _ in range(2)]
        self.layers = [LeanLayer(b, padded_stream, normed, mlp_buffers, heads) for b in model.layers]
        self.norm = norm_into(model.norm, padded_stream, normed)
        self.lm_head = linear_into(model.lm_head, torch.empty(B, c.vocab_size, dtype=dtype))

    @torch.inference_mode()
    def __call__(self, token: Tensor, position: int) -> Tensor:
        """token (B,) is the one at `position`."""
        self.stream.copy_(self.embed_tokens(token))
        if self.embed_scale is not None:
            self.stream.mul_(self.embed_scale)
        if self.added is not None:
            self.stream.add_(self.added[position])
        angles = None
        if self.rope is not None:
            angles = self.rope[0][position], self.rope[1][position]  # each (hd/2,)
        for layer, keys, values in zip(self.layers, self.cache.keys, self.cache.values, strict=True):
            layer(keys, values, position, angles)
        return self.lm_head(self.norm())
