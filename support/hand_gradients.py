"""Two small parts of the network with their gradients written by hand, because that is faster.

PyTorch's autograd records every operation and keeps what each needs for the backward pass. For RMSNorm and
the rotary positions that is about ten passes over large tensors. With the formula of the gradient at hand,
half of them are enough: on a CPU, training a small model is 1 to 4% faster (docs/PERFORMANCE.md), and on a
GPU fewer kernels are started (not measured).
model.py has the plain forms, whose results are the same, in float32 bit for bit; a test,
tests/core/test_hand_gradients.py, compares both. You may skip this file on a first reading.

Shapes: B batch, T positions, H heads, hd head_dim, D d_model.
"""

import torch
from torch import Tensor


def trains_eagerly(x: Tensor) -> bool:
    """Whether a gradient will flow to `x`, and torch.compile is not at work, which does better than these
    forms."""
    return x.requires_grad and not torch.compiler.is_compiling()


class HandRMSNorm(torch.autograd.Function):
    """RMSNorm of float32 rows: y = n * gain with n = x / r and r = sqrt(mean(x^2) + eps).

    Write g for dy * gain, the gradient of n. Dividing by r turns it into g / r. But r depends on
    x too, which takes away the part of g along n: dx = (g - n * mean(g * n)) / r. For the gain it is the sum
    of dy * n over all rows.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """x (..., D) and gain (D,) to (..., D)."""
        inverse_r = x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        normed = x * inverse_r
        ctx.save_for_backward(normed, inverse_r, gain)
        return normed * gain

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of x and gain."""
        normed, inverse_r, gain = ctx.saved_tensors
        products = dy * normed  # (..., D)
        along = (products @ gain).div_(len(gain))[..., None]  # (..., 1): the mean of g * n
        dx = (dy * gain).addcmul_(normed, along, value=-1).mul_(inverse_r)
        return dx, products.flatten(0, -2).sum(dim=0), None


class HandRope(torch.autograd.Function):
    """`apply_rope`. Its gradient is the same rotation backwards: by the negative angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, H, T, hd), cos and sin (..., T, hd/2) to (B, H, T, hd)."""
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, direction=1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, sin, direction=-1), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """(a, b) to (a cos - b sin, b cos + a sin), written into halves of one new tensor; direction -1 turns
    back."""
    out = torch.empty_like(x)
    (a, b), (new_a, new_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)  # each (B, H, T, hd/2)
    # Not addcmul: it rounds once where model.py rounds twice, and the results should be the same bit for bit.
    torch.mul(a, cos, out=new_a).sub_(b * sin, alpha=direction)
    torch.mul(b, cos, out=new_b).add_(a * sin, alpha=direction)
    return out
