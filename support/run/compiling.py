"""training.compile: whether a run compiles its network, whether the machine can, and whether compiled
gradients equal those of the ordinary (*eager*) network, which PyTorch runs one operation at a time.

torch.compile translates the network into C++ (on a CPU) or Triton (on a GPU) when it is first called. Without
these checks, a missing compiler would show only in the first step of a run, and a bug in a PyTorch version
might never show.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch
from model import GPTMini
from support.compilers import OR_WITHOUT, is_of_compiler, why_it_failed
from support.device import autocast_of, bf16_peak_flops
from support.messages import UserError, warn

# With training.compile=auto a run is compiled if its steps take longer than this. Compiling takes about a
# minute and saves a quarter of the time or more.
WORTH_SECONDS = 300
# That time is estimated: small models reach about this share of a GPU's peak, and a GPU that
# `support.device` does not know is taken to have this peak.
USUAL_SHARE_OF_PEAK = 0.2
UNKNOWN_PEAK = 100e12
# How far a compiled gradient may be off, in proportion to its size. A wrong one is off by about 1, a rounded
# one by far less.
MAX_DIFFERENCE = {"32-true": 1e-2, "bf16-mixed": 0.1, "bf16-true": 0.1}


class CannotCompile(UserError):
    """Compiling is not possible here. `reason` says why, and what to do about it."""

    def __init__(self, reason: str):
        super().__init__(f"training.compile=true {reason}, {OR_WITHOUT}")
        self.reason = reason


# ---- to compile or not ---------------------------------------------------------------------------


def choose_to_compile(wanted: str | bool, device: str, flops: float) -> tuple[bool, str]:
    """(whether a run compiles its network, the reason in a few words). `wanted` is training.compile; `flops`
    are the floating-point operations of the steps that are still to do, on each device."""
    if wanted != "auto":
        return wanted, f"training.compile={str(wanted).lower()}"
    if device != "cuda":
        return False, "auto: only on CUDA"
    seconds = flops / (USUAL_SHARE_OF_PEAK * (bf16_peak_flops(device) or UNKNOWN_PEAK))
    if seconds < WORTH_SECONDS:
        return False, "auto: the run is too short to pay for compiling"
    return True, "auto: a long run on CUDA"


def choose_and_try(wanted: str | bool, device: str, flops: float) -> tuple[bool, str]:
    """`choose_to_compile`, and a try of the compiler if it is to be used. If that fails: with `auto` a
    warning, and the run does not compile; with `true`, raises UserError."""
    compiles, reason = choose_to_compile(wanted, device, flops)
    try:
        if compiles:
            try_compiler(device)
    except CannotCompile as error:
        if wanted != "auto":
            raise
        warn_of_eager_run(error)
        return False, "auto: it does not work here"
    return compiles, reason


def warn_of_eager_run(error: CannotCompile) -> None:
    """One line for a run that would have been compiled, and is not."""
    warn(f"training.compile=auto {' '.join(error.reason.split())}; the run goes on without compiling")


def eagerly_if_compiling_fails(method: Callable) -> Callable:
    """Decorates a method of a training module that calls its network. If the compiler fails in it and
    training.compile is `auto`, there is a warning, and the method runs again without compiling, as it does
    from then on. So the method may add to the gradients, which are zero before it, but to nothing else."""

    @functools.wraps(method)
    def with_second_try(self, *args: Any) -> Any:
        try:
            return method(self, *args)
        except Exception as error:
            plan = self.plan
            if plan.config.training.compile != "auto" or not plan.compiles or not is_of_compiler(error):
                raise
            warn_of_eager_run(CannotCompile(why_it_failed(error)))
        plan.compiles = False
        self.net._compiled_call_impl = None  # takes back net.compile(); PyTorch has no public way
        self.net.zero_grad()
        return method(self, *args)

    return with_second_try


# ---- the compiler --------------------------------------------------------------------------------


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """A number that depends on the rows of an embedding table that the ids name."""
    return (F.embedding(ids, table) ** 2).sum()


def try_compiler(device: str) -> None:
    """Compile a small function with a gradient, a look-up in an embedding table, and run it.

    Raises CannotCompile if that fails for any reason, or if the gradient is wrong: PyTorch 2.5 loses a part
    of the gradient of a token that occurs several times.
    """
    ids = torch.arange(4 * 64, device=device).view(4, 64) % 7
    gradients = []
    try:
        for function in (look_up, torch.compile(look_up)):
            table = torch.ones(7, 32, device=device, requires_grad=True)
            function(table, ids).backward()
            gradients.append(table.grad)
    except Exception as error:  # compilers raise many kinds
        raise CannotCompile(why_it_failed(error)) from None
    if not torch.allclose(*gradients):
        raise CannotCompile(
            f"fails: PyTorch {torch.__version__} compiles the gradient of an embedding table wrongly here; "
            "install a newer one"
        )


def gradients_of(net: GPTMini, batch: Batch, precision: str, device: str) -> dict[str, Tensor]:
    """{name of a trained parameter: its gradient in float32}, for the mean loss over the batch."""
    with autocast_of(precision, device):
        loss_sum, n_targets = net(**batch)
    (loss_sum / n_targets.clamp(min=1)).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.float()
        for name, p in net.named_parameters()
        if p.requires_grad
    }


def compare_gradients(build: Callable[[], GPTMini], batch: Batch, precision: str, device: str) -> str:
    """Says how far compiled gradients differ from eager ones, for one batch. Raises UserError if the
    difference is more than rounding, CannotCompile if there are no compiled ones.

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
        raise CannotCompile(why_it_failed(error)) from None
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
