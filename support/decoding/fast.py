"""Which way decodes fastest, and whether it may be used: for each new token a lean step on a CPU, a recorded
one on an NVIDIA GPU, and the network's own forward pass wherever these do not fit.

The steps know the parts of `GPTMini` by their names and repeat what they compute. If you change model.py, a
step may no longer compute the same. So the first token of every text is computed both ways, and a step that
gives other logits is not used.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from support.compilers import advice_on_compiling, is_of_compiler
from support.decoding.lean_step import LeanStep
from support.decoding.static_step import RecordedStep, StaticStep, logits_after
from support.messages import UserError, warn

# To prepare a step and to try it takes as long as a few tokens in the plain way, so it must save more.
WORTH_IT = 16
# How far the logits may be off, in proportion to the largest: rounding is far less, another formula far more.
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


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
        return partial(StaticStep if on_cpu else RecordedStep, function=torch.compile(logits_after))
    return LeanStep if on_cpu else RecordedStep


def is_known(model: nn.Module) -> bool:
    """Whether the steps compute what this model computes: it is a GPTMini with its own blocks and attention,
    in eval mode, in one known dtype on one known device, and nothing else takes part."""
    weights = list(model.parameters())
    kinds = {type(module).__name__ for block in model.layers for module in (block, block.self_attn)}
    return (
        type(model).__name__ == "GPTMini"
        and kinds == {"TransformerBlock", "GQAMultiheadAttention"}
        and weights[0].device.type in ("cpu", "cuda")
        and weights[0].dtype in MAX_DIFFERENCE
        and len({weight.device for weight in weights}) == 1
        and not any(module.training or has_hook(module) for module in model.modules())
        and not torch.is_autocast_enabled(weights[0].device.type)
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
        """The logits in the plain way, after the step was made and tried: it is used from now on if its
        logits are the same."""
        problem = None
        try:
            self.step = self.make_step()
            logits = self.step(ids[:, -1], position).clone()
        except Exception as error:  # of a compiler, of CUDA, of a part that is not what its name says
            if is_of_compiler(error):
                raise UserError(advice_on_compiling(error, "--compile", "or leave --compile out")) from None
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        # After the step, so that keys and values at this position are the model's own, whatever it wrote.
        expected = self.plain.next_logits(ids)
        if problem is None and not are_close(logits, expected):
            problem = "its logits are not those of the model's forward pass"
        if problem is not None:
            warn(f"the fast way of decoding is not used, but the plain one ({problem})")
            self.step, self.usable = None, False
        return expected


def are_close(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits (B, V) differ only by rounding."""
    tolerance = MAX_DIFFERENCE[expected.dtype] * expected.abs().max().item()
    return logits.shape == expected.shape and torch.allclose(
        logits.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True
    )
