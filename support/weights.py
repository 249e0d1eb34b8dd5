"""Checks weights before a model uses them: all of them are there, have the right shape, and are finite."""

import re
import reprlib
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch

from model import GPTMini
from support.files.safe_archive import named_tensors
from support.messages import UserError, printable

MAX_MISFITS_LISTED = 20
MAX_CONTEXT = 2**22  # the most tokens of max_seq_len; the sizes of the weights say nothing about it


def first_not_finite(tree: Any, name: str = "") -> str | None:
    """The name of the first tensor, in nested dicts and lists, that holds a NaN or an infinity; None if all
    are finite.

    It looks only at the smallest and the largest element of each tensor, since both are NaN if any element
    is. So each tensor is read once, and nothing is copied.

    >>> first_not_finite({"net": [torch.zeros(2), torch.tensor([1.0, float("nan")])]})
    'net.1'
    """
    for path, tensor in named_tensors(tree, name):
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        smallest, largest = tensor.detach().aminmax()
        if not (smallest.isfinite() and largest.isfinite()):
            return path
    return None


def oversized(sizes: dict[str, Any], weights: Collection[torch.Tensor]) -> str | None:
    """Says which size in a checkpoint's config is too large for its weights; None if all are possible.

    This is called before a model is built: a million layers would take hours and gigabytes, even without
    weights.
    """
    most_elements = max((weight.numel() for weight in weights), default=0)
    widths = ("vocab_size", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_dim")
    limits = dict.fromkeys(widths, most_elements) | {"n_layers": len(weights), "max_seq_len": MAX_CONTEXT}
    for name, limit in limits.items():
        if isinstance(sizes.get(name), int) and sizes[name] > limit:
            return f"{name}={reprlib.repr(sizes[name])}, but its weights allow {limit} at most"
    return None


def misfits(wanted: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> str | None:
    """Says how `weights` differ from the tensors that a model wants, in name or shape; None if they fit. A
    difference that many blocks share is listed once.

    >>> wanted = {"layers.0.a": torch.zeros(2), "layers.1.a": torch.zeros(2)}
    >>> misfits(wanted, {"layers.0.a": torch.zeros(3), "layers.1.a": torch.zeros(3)})
    'layers.*.a: expected (2,), provided (3,) (2 times)'
    """
    times: Counter[str] = Counter()
    last_of_kind: dict[str, str] = {}
    for name in [*wanted, *sorted(weights.keys() - wanted.keys())]:
        expected = tuple(wanted[name].shape) if name in wanted else "none"
        provided = tuple(weights[name].shape) if name in weights else "none"
        if expected == provided:
            continue
        shapes = f"expected {expected}, provided {provided}"
        name_in_any_block = re.sub(r"(?<=[.])[0-9]+(?=[.])", "*", name)
        kind = f"{name_in_any_block[:100]}: {shapes}"
        times[kind] += 1
        last_of_kind[kind] = f"{name[:100]}: {shapes}"
    if not times:
        return None
    listed = [last_of_kind[kind] if n == 1 else f"{kind} ({n} times)" for kind, n in times.items()]
    message = "; ".join(printable(item) for item in listed[:MAX_MISFITS_LISTED])
    if len(listed) > MAX_MISFITS_LISTED:
        message += f"; and {len(listed) - MAX_MISFITS_LISTED} more"
    return message


def load_weights(model: GPTMini, weights: dict[str, torch.Tensor], source: str) -> None:
    """Put `weights` into `model`. Raises a UserError that lists what does not fit: a name that is missing or
    left over, a wrong shape, a wrong type, or a number that is not finite."""
    if wrong := misfits(model.state_dict(), weights):
        raise UserError(f"{source}: weights do not fit the model: {wrong}")
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    if len(dtypes) > 1 or "float" not in dtypes[0]:
        raise UserError(
            f"{source}: weights have the types {', '.join(dtypes)}; all should have the same float type, so "
            "take another checkpoint"
        )
    if bad := first_not_finite(weights):
        raise UserError(
            f"{source}: {bad} holds a NaN or an infinity, so the model cannot be used; take an earlier "
            "checkpoint"
        )
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
