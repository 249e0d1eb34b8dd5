"""Which way of decoding is used: for each new token a lean step on a CPU, a recorded step on an NVIDIA GPU,
and the network's own forward pass wherever neither fits.

The steps know the parts of `GPTMini` by name and repeat what they compute. After a change in model.py, a step
may no longer compute the same. So in every text the first step is computed both ways, and a step that gives
other logits is not used.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from support.compilers import advice_on_compiling, is_of_compiler
from support.decoding.lean_step import LeanStep
from support.decoding.static_step import RecordedStep, StaticStep, logits_after
from support.messages import UserError, warn

# To make a step and try it takes as long as a few tokens in the plain way.
WORTH_IT = 16
# How far the logits may be off, in proportion to the largest: rounding is far less, another formula far more.
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


def fast_decoder(plain, prompt_len: int, max_new_tokens: int):
    """An object with the method `next_logits` of `plain`, a `PlainDecoder`: a faster one where there is one,
    else `plain` itself."""
    if max_new_tokens < WORTH_IT or not is_known(plain.model):
        return plain
    longest = min(prompt_len + max_new_tokens, plain.model.config.max_seq_len)
    return FastDecoder(plain, partial(step_class(plain.model), plain.model, plain.cache, longest))


def step_class(model: nn.Module) -> Callable:
    """What makes a step for this model, from the model, its cache and the longest text."""
    on_cpu = model.embed_tokens.weight.device.type == "cpu"
    if model.compile_decoding:
        return partial(
            StaticStep if on_cpu else RecordedStep, function=torch.compile(logits_after, dynamic=False)
        )
    return LeanStep if on_cpu else RecordedStep


def is_known(model: nn.Module) -> bool:
    """Whether the steps fit this model: it is a GPTMini with its own blocks and attention, in eval mode, and
    nothing else takes part."""
    if type(model).__name__ != "GPTMini":
        return False
    kinds = {type(module).__name__ for block in model.layers for module in (block, block.self_attn)}
    weight = model.embed_tokens.weight
    return (
        kinds == {"TransformerBlock", "GQAMultiheadAttention"}
        and weight.device.type in ("cpu", "cuda")
        and weight.dtype in MAX_DIFFERENCE
        and all(other.device == weight.device for other in model.parameters())
        and not any(module.training or has_hook(module) for module in model.modules())
        and not torch.is_autocast_enabled(weight.device.type)
    )


def has_hook(module: nn.Module) -> bool:
    """Whether calling the module also calls other code, such as that of FSDP, which fetches weights."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class FastDecoder:
    """The plain way for the prompt, the first new token and a text beyond the window, a step otherwise."""

    def __init__(self, plain, make_step: Callable):
        self.plain, self.make_step = plain, make_step
        self.step = None  # made when the first token after the prompt is asked for
        self.usable = True

    def next_logits(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after the text so far, `ids` (B, S). They hold until the next call."""
        cache, window = self.plain.cache, self.plain.model.config.max_seq_len
        position = ids.shape[1] - 1
        is_next = 0 < cache.length == position < window
        if not is_next or not self.usable:
            return self.plain.next_logits(ids)
        if self.step is None:
            return self.first_logits(ids, position)
        cache.length += 1
        return self.step(ids[:, -1], position)

    def first_logits(self, ids: Tensor, position: int) -> Tensor:
        """The logits in the plain way, after a step was made and tried. It is used from now on if it gives
        the same. Raises UserError if the user asked for a compiled step and the compiler fails."""
        model, problem = self.plain.model, None
        try:
            self.step = self.make_step()
            logits = self.step(ids[:, -1], position).clone()
        except Exception as error:  # of CUDA, of a compiler, of a part that is not what its name says
            if model.compile_decoding and is_of_compiler(error):
                raise UserError(advice_on_compiling(error, "--compile", "or leave out --compile")) from None
            problem = f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        # After the step: so keys and values at this position are the model's own, whatever the step wrote.
        expected = self.plain.next_logits(ids)
        if problem is None and not are_close(logits, expected):
            problem = "gives other logits than the model's forward pass"
        if problem is not None:
            warn(f"the fast step of decoding {problem}; the forward pass is used, which is slower")
            self.step, self.usable = None, False
        return expected


def are_close(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits (B, V) differ only by rounding."""
    tolerance = MAX_DIFFERENCE[expected.dtype] * expected.abs().max().item()
    return logits.shape == expected.shape and torch.allclose(
        logits.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True
    )
