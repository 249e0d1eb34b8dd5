"""What training.compile needs: a machine that can compile, and compiled gradients that equal those of the
ordinary (*eager*) network, which PyTorch runs one operation at a time.

torch.compile translates the network into C++ (on a CPU) or Triton (on a GPU) when it is first called. Without
these checks, a missing compiler would show only in the first step of a run, and a bug in a PyTorch version
might never show.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch
from model import GPTMini
from support.compilers import OR_WITHOUT, advice_on_compiling
from support.messages import UserError

# How far a compiled gradient may be off, in proportion to its size. A wrong one is off by about 1, a rounded
# one by far less.
MAX_DIFFERENCE = {"32-true": 1e-2, "bf16-mixed": 0.1, "bf16-true": 0.1}


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """A number that depends on the rows of an embedding table that the ids name."""
    return (F.embedding(ids, table) ** 2).sum()


def try_compiler(device: str) -> None:
    """Compile a small function with a gradient, a look-up in an embedding table, and run it.

    Raises UserError if that fails for any reason, or if the gradient is wrong: PyTorch 2.5 loses a part of
    the gradient of a token that occurs several times.
    """
    ids = torch.arange(4 * 64, device=device).view(4, 64) % 7
    gradients = []
    try:
        for function in (look_up, torch.compile(look_up)):
            table = torch.ones(7, 32, device=device, requires_grad=True)
            function(table, ids).backward()
            gradients.append(table.grad)
    except Exception as error:  # compilers raise many kinds
        raise UserError(advice_on_compiling(error)) from None
    if not torch.allclose(*gradients):
        raise UserError(
            f"PyTorch {torch.__version__} compiles the gradient of an embedding table wrongly here; "
            f"install a newer one, {OR_WITHOUT}"
        )


def gradients_of(net: GPTMini, batch: Batch, precision: str, device: str) -> dict[str, Tensor]:
    """{name of a trained parameter: its gradient in float32}, for the mean loss over the batch."""
    autocast = (
        torch.autocast(device, torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    )
    with autocast:
        loss_sum, n_targets = net(**batch)
    (loss_sum / n_targets.clamp(min=1)).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.float()
        for name, p in net.named_parameters()
        if p.requires_grad
    }


def compare_gradients(build: Callable[[], GPTMini], batch: Batch, precision: str, device: str) -> str:
    """Says how far compiled gradients differ from eager ones, for one batch. Raises UserError if the
    difference is more than rounding.

    `build` makes the same network each time. The difference is divided by the norm of the parameter's own
    gradient, or by a hundredth of the norm of all gradients together if that is larger: tiny gradients are
    mostly rounding.
    """
    eager = gradients_of(build(), batch, precision, device)
    net = build()
    net.compile()
    try:
        compiled = gradients_of(net, batch, precision, device)
    except Exception as error:
        raise UserError(advice_on_compiling(error)) from None
    least = torch.stack([gradient.norm() for gradient in eager.values()]).norm() / 100
    off = {
        name: ((compiled[name] - eager[name]).norm() / eager[name].norm().clamp(min=least)).item()
        for name in eager
    }
    worst = max(off, key=off.get)
    text = (
        f"compiled gradients differ from eager ones by at most {off[worst]:.1e} of their size (for {worst})"
    )
    if not off[worst] <= MAX_DIFFERENCE[precision]:
        raise UserError(
            f"{text}: PyTorch {torch.__version__} compiles this model wrongly; use another version, "
            f"{OR_WITHOUT}"
        )
    return text
