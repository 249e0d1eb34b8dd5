"""One new token through the network with the position as a tensor, for a GPU and for torch.compile.

Every shape is the same at each position: attention reads the whole buffer of keys, and a mask hides the
positions that are not filled. So the GPU can record the kernels of one step (a *CUDA graph*) and run them
again for each token. Otherwise Python starts some hundred small kernels for each token, and the GPU waits
for Python most of the time.

Shapes: B batch, S positions of the buffers, D d_model, H query heads, K key/value heads, hd head_dim,
V vocab_size
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.decoding.positions import Angles, position_tables

SHORTEST = 64  # positions of the shortest buffer


class Inputs(NamedTuple):
    """What a step reads, besides the weights. A recorded step reads the same tensors each time."""

    token: Tensor  # (B,)
    position: Tensor  # (1,): where the token is in the text
    keys: list[Tensor]  # of each layer, (B, K, S, hd)
    values: list[Tensor]
    tables: tuple[Tensor | None, Angles | None]  # what `position_tables` returns, for S positions


def logits_after(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits (B, V) after the token. Its keys and values are written at its position."""
    position = inputs.position
    x = model.embed_tokens(inputs.token)  # (B, D)
    if model.config.embed_scale:
        x = x * model.config.d_model**0.5
    added, angles = inputs.tables
    if added is not None:
        x = x + added.index_select(0, position)
    if angles is not None:
        cos, sin = (table.index_select(0, position) for table in angles)  # each (1, hd/2)
        angles = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)  # each (1, hd)
    is_empty = torch.arange(inputs.keys[0].shape[2], device=x.device) > position
    mask = x.new_zeros(1, len(is_empty)).masked_fill(is_empty, float("-inf"))  # (1, S), added to the scores
    for block, keys, values in zip(model.layers, inputs.keys, inputs.values, strict=True):
        normed = block.input_layernorm(x)
        x = x + attention(block.self_attn, normed, position, angles, keys, values, mask)
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.lm_head(model.norm(x))


def attention(
    attn: nn.Module,
    x: Tensor,
    position: Tensor,
    angles: Angles | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
) -> Tensor:
    """GQAMultiheadAttention for one position: x (B, D) to (B, D)."""
    B, H, K, hd = len(x), attn.n_heads, attn.n_kv_heads, attn.head_dim
    q = attn.q_norm(attn.q_proj(x).view(B, H, hd))
    k = attn.k_norm(attn.k_proj(x).view(B, K, hd))
    v = attn.v_proj(x).view(B, K, hd)
    if angles is not None:
        cos, signed_sin = angles
        pairs = torch.cat([q, k], dim=1)  # (B, H+K, hd): a pair is (a, b) = dimensions i and i + hd/2
        swapped = pairs.roll(hd // 2, dims=-1)  # b, a
        # (a cos - b sin, b cos + a sin), as in apply_rope, but in three kernels and not in seven.
        turned = torch.addcmul(pairs * cos, swapped, signed_sin).to(x.dtype)
        q, k = turned.split([H, K], dim=1)
    keys.index_copy_(2, position, k[:, :, None].to(keys.dtype))
    values.index_copy_(2, position, v[:, :, None].to(values.dtype))
    # The H/K query heads of a key/value head count as H/K queries of that head: so nothing is repeated.
    grouped = q.reshape(B, K, H // K, hd)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return attn.o_proj(out.flatten(1))  # (B, K, H/K, hd) to (B, D)


def buffer_length(longest: int, window: int) -> int:
    """A power of two that is at least `longest`, or the window: so that texts of many lengths share a few
    shapes, and a compiled step is compiled only a few times."""
    length = SHORTEST
    while length < longest:
        length *= 2
    return min(length, window)


class StaticStep:
    """Logits (B, V) after one more token: `step(token, position)`."""

    def __init__(self, model: nn.Module, cache, longest: int, function: Callable = logits_after):
        """`longest` is the number of positions that the cache will hold at most. `function` is `logits_after`
        or a compiled form of it."""
        self.model, self.function = model, function
        device = model.embed_tokens.weight.device
        S, filled = buffer_length(longest, model.config.max_seq_len), cache.length
        self.inputs = Inputs(
            token=torch.zeros(len(cache.keys[0]), dtype=torch.long, device=device),
            position=torch.zeros(1, dtype=torch.long, device=device),
            keys=[keys[:, :, :S] for keys in cache.keys],
            values=[values[:, :, :S] for values in cache.values],
            tables=position_tables(model, S),
        )
        for buffer in (*self.inputs.keys, *self.inputs.values):
            # Attention gives these positions the weight 0. But new memory can hold NaN, and 0 * NaN is NaN.
            buffer[:, :, filled:] = 0

    def __call__(self, token: Tensor, position: int) -> Tensor:
        """token (B,) is the one at `position`."""
        self.inputs.token.copy_(token)
        self.inputs.position.fill_(position)
        return self.run()

    def run(self) -> Tensor:
        """The step, for the token and the position that are in `inputs`."""
        return self.function(self.model, self.inputs)


class RecordedStep(StaticStep):
    """The same on an NVIDIA GPU, recorded as a CUDA graph in the first step and run again in each. The logits
    are in one buffer, so they hold until the next call."""

    def __init__(self, model: nn.Module, *args, **options):
        super().__init__(model, *args, **options)
        self.graph = None
        # The graph reads the weights where they are now: that memory must not be given to anything else.
        self.weights = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]

    def run(self) -> Tensor:
        """Run the recorded step; the first time, record it before."""
        if self.graph is None:
            self.graph, self.logits = self.record()
        self.graph.replay()
        return self.logits

    def record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph, and the tensor in which its logits are after each run. "CUDA Graphs" in PyTorch's notes
        on CUDA explains the order of these lines."""
        device = self.inputs.token.device
        stream, graph = recording_stream(device), torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                super().run()  # not recorded: in the first run, libraries choose kernels and take memory
            torch.cuda.current_stream().wait_stream(stream)
            # thread_local: another thread, such as one that loads training data, may use CUDA meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                logits = super().run()
        return graph, logits


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are recorded: not on the default stream, where nothing can be, and always on the same one,
    because cuBLAS keeps memory for each stream that it has been used on."""
    return torch.cuda.Stream(device)
