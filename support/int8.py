"""int8 weights: a trained model's matrices in one byte a number instead of four, to decode faster.

Why fewer bytes are more speed. To write one token, a model reads every matrix once and does two operations
with each number of it. A processor can do hundreds of operations in the time it takes to fetch a few numbers
from memory, so it waits for the memory:

    tokens per second  <=  bytes of memory read per second  /  bytes of the matrices

With 124 million weights in float32 (494 MB) and memory of 29 GB/s, no program writes more than 58 tokens a
second. With one byte a weight the limit is four times as high. The tokens of a prompt are read together, so
there each weight that is fetched is used many times: the bytes matter little, and int8 gains little.

How a row becomes int8. Its largest number, without the sign, becomes 127, and the others in proportion; then
all are rounded to whole numbers. The row keeps one float, its scale:

    row     0.50  -1.00   0.26   0.00        scale = 1.00 / 127
    int8      64   -127     33      0        int8 * scale:  0.504  -1.000  0.260  0.000

Each number is wrong by half a scale at most. So one huge number makes its whole row coarse, which is why
each row has a scale of its own. This is done after loading, and never saved: a checkpoint keeps the exact
weights. docs/EVALUATION.md shows what it costs.

The activations x stay exact, nearly. Processors multiply int8 by int8 much faster than int8 by float, so x
is written with two digits, as 1.27 = 1 + 27 / 100 is, but in base 126 in place of 10:

    x  =  step * (high + low / 126)      high and low are whole numbers from -63 to 63

W @ high and W @ low are computed in one pass over W, so its bytes are read once. Both digits together hold x
to 1/16000 of its largest number. One digit would be coarser than the weights are.

Sources: Dettmers et al., "LLM.int8()" (2022), which has scales for the rows of x too; llama.cpp's format
Q8_0, which has a scale for each 32 weights and keeps x in one digit.

Shapes: ... any leading sizes (batch, positions), I in_features, O out_features.
"""

import functools
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPTMini
from support.messages import UserError

LARGEST = 127  # of the int8 numbers that we use: -128 has no positive partner
# The largest digit of an activation. Older processors add two products of digit and weight in 16 bits, and
# digits are stored as 1 to 127: 2 * 127 * 127 = 32258 fits, below 32768.
DIGIT = 63
TINY = 1e-37  # stands in for the largest number of a row of zeros, by which nothing can be divided
# How many weights become floats at a time where PyTorch has no int8 kernel: 4 MB, so that they are still in
# the processor's cache when they are multiplied.
CHUNK = 2**20
# Tensors, because PyTorch makes one of each Python number, which takes as long as multiplying a row by it.
SMALLEST, PER_DIGIT = torch.tensor(TINY), torch.tensor(1 / DIGIT)
BASE, PER_BASE = torch.tensor(2.0 * DIGIT), torch.tensor(1 / (2 * DIGIT))


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 numbers (O, I), a float32 scale for each row (O,)): `weight` is about numbers * scale[:, None].
    Raises UserError if a weight is not a number, or infinite.

    >>> quantize_rows(torch.tensor([[0.5, -1.0, 0.26, 0.0]]))[0]
    tensor([[  64, -127,   33,    0]], dtype=torch.int8)
    """
    weight = weight.float()
    largest = weight.abs().amax(dim=1)  # (O,)
    if not largest.isfinite().all():
        raise UserError("a weight is NaN or infinite, so it has no int8 number; take an earlier checkpoint")
    scale = largest.clamp(min=TINY) / LARGEST
    return (weight / scale[:, None]).round().to(torch.int8), scale


# ---- PyTorch's int8 kernel -----------------------------------------------------------------------


def pack(numbers: Tensor, scale: Tensor) -> Any:
    """The matrix in the order in which PyTorch's CPU kernel (fbgemm) reads it. A copy: the int8 tensor is no
    longer needed."""
    zero_points = torch.zeros(len(scale), dtype=torch.long)  # symmetric: 0 is 0
    with warnings.catch_warnings():
        # The kernel takes its weights as a `qint8` tensor, which PyTorch plans to remove (pytorch 184982).
        # In such a version `has_kernel` is False.
        warnings.simplefilter("ignore")
        matrix = torch._make_per_channel_quantized_tensor(numbers, scale, zero_points, 0)
        return torch.ops.quantized.linear_prepack(matrix, None)


def multiply(digits: Tensor, packed: Any) -> Tensor:
    """Digits (..., I), float32 with whole numbers from -63 to 63, times a packed matrix: (..., O). The sums
    are whole numbers of 32 bits, so they are exact."""
    # 1.0 and DIGIT + 1: what a digit counts, and the number that stands for the digit 0.
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(digits, 1.0, DIGIT + 1, packed)


@functools.cache
def has_kernel() -> bool:
    """Whether this PyTorch has the kernel for this CPU, found by trying it on the largest numbers."""
    try:
        packed = pack(torch.full((2, 64), LARGEST, dtype=torch.int8), torch.ones(2))
        product = multiply(torch.full((1, 64), float(DIGIT)), packed)
    except (AttributeError, RuntimeError):  # no such function, or none for this CPU
        return False
    return product.tolist() == [[64 * LARGEST * DIGIT] * 2]


# ---- the layer -----------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """An nn.Linear with its weight in int8: x (..., I) to (..., O). Only for inference."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.train(linear.training)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        numbers, scale = quantize_rows(linear.weight.detach())
        fast = numbers.device.type == "cpu" and has_kernel()
        self.packed = pack(numbers, scale) if fast else None
        # Plain tensors of the module that training would not change. The packed matrix holds the numbers too.
        self.register_buffer("numbers", None if fast else numbers)  # (O, I)
        self.register_buffer("scale", scale)  # (O,)

    def forward(self, x: Tensor) -> Tensor:
        product = self._float_product(x) if self.packed is None else self._digit_product(x.float())
        if self.bias is not None:
            product = product + self.bias
        return product.to(x.dtype)

    def _digit_product(self, x: Tensor) -> Tensor:
        """x @ W.T with x as two digits a number. Each row of x has its own step, so that a row's result does
        not depend on the others."""
        largest = x.abs().amax(dim=-1, keepdim=True)  # (..., 1)
        step = torch.addcmul(SMALLEST, largest, PER_DIGIT)  # tiny + largest / 63
        x = x / step  # from -63 to 63
        high = x.round()
        low = x.sub_(high).mul_(BASE)  # the rest, from -1/2 to 1/2, times 126; the kernel rounds it
        of_high, of_low = multiply(torch.stack((high, low)), self.packed).unbind()  # each (..., O)
        return torch.addcmul(of_high, of_low, PER_BASE).mul_(step)

    def _float_product(self, x: Tensor) -> Tensor:
        """x @ W.T without the kernel: a few rows of W at a time become floats."""
        rows = max(1, CHUNK // self.in_features)
        products = [F.linear(x, numbers.to(x.dtype)) for numbers in self.numbers.split(rows)]
        return torch.cat(products, dim=-1) * self.scale

    @property
    def weight(self) -> Tensor:
        """The floats that the int8 numbers stand for (O, I), made anew at each call. The loss needs those of
        the head."""
        numbers = self.numbers
        if numbers is None:
            numbers = torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()
        return numbers * self.scale[:, None]

    def _save_to_state_dict(self, *args: Any) -> None:
        """PyTorch calls this when a model is saved."""
        raise UserError(
            "a model with int8 weights is not saved, since its exact weights are lost; save it before "
            "quantize_int8, and quantize after loading"
        )


# ---- the model -----------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What int8 changed, in bytes."""

    read_before: int  # of the matrices, which a token reads once each
    read_after: int
    held_before: int  # of all weights in memory
    held_after: int


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """How many bytes the tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantize_int8(model: GPTMini) -> Sizes:
    """Replace every nn.Linear of the model, the head included, by an Int8Linear. The model is then only for
    inference, and stays on its device.

    The embedding table stays as it is, since a token reads only one of its rows. A head that was tied to it
    gets int8 numbers of its own, so memory then holds both.
    """
    held_before = n_bytes(model.parameters())
    read_before = read_after = 0
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                setattr(parent, name, Int8Linear(linear))
                read_before += n_bytes([linear.weight])
                read_after += linear.weight.numel() + 4 * linear.out_features  # a byte each, and the scales
    model.requires_grad_(False)
    return Sizes(read_before, read_after, held_before, n_bytes(model.parameters()) + read_after)


def sizes_line(sizes: Sizes, device: str) -> str:
    """What `quantize_int8` did, in words."""
    before, after, held_before, held_after = (f"{n / 1e6:,.1f} MB" for n in sizes)
    slow = (
        ""
        if device == "cpu" and has_kernel()
        else "; PyTorch has no int8 kernel here, so it may not be faster"
    )
    return (
        f"int8: a token reads {after} of weights instead of {before}; memory holds {held_after} instead of "
        f"{held_before}{slow}"
    )
