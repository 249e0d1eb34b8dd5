"""Low-rank adapters: fine-tune a small correction to each matrix, and leave the matrix alone.

    W x   becomes   W x + (alpha / rank) B A x        W (out, in) stays;  A (rank, in) and B (out, rank) are trained

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021). Gradients and optimizer states are
needed for A and B alone: with rank 8 about a hundredth of a matrix of 2,048 x 2,048. B begins at zero, so the
adapted model begins as the base. When training is over, (alpha / rank) B A is added to W, and what remains is
a plain model again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.messages import UserError


class LoRALinear(nn.Linear):
    """A Linear with an adapter. `weight` and `bias` are those of the layer it replaces, and keep their names."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)  # nn.Linear's own would draw a new weight
        self.in_features, self.out_features, self.scale = (
            linear.in_features,
            linear.out_features,
            alpha / rank,
        )
        self.weight, self.bias = linear.weight, linear.bias
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **place))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **place))
        if not linear.weight.is_meta:
            nn.init.normal_(self.lora_A, std=self.in_features**-0.5)  # A x is then about as large as x
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: list[str] | None = None) -> int:
    """Give the matrices in the blocks whose name is among `targets` (`q_proj`, ...; all of them by
    default) an adapter, freeze everything else, and return how many there are. Raises UserError for a
    target that no block has."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }
    kinds = {name.rsplit(".", 1)[-1] for name in found}
    if unknown := sorted(set(targets or []) - kinds):
        raise UserError(
            f"lora.targets: no block has a {unknown[0]}; this model has {', '.join(sorted(kinds))}"
        )
    model.requires_grad_(False)
    chosen = {
        name: module
        for name, module in found.items()
        if targets is None or name.rsplit(".", 1)[-1] in targets
    }
    for name, module in chosen.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoRALinear(module, rank, alpha))
    return len(chosen)


def merge_adapters(weights: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """A state dict without adapters: each one's product is added to its matrix, in float32, and rounded
    once to the matrix's dtype. Raises ValueError (KeyError) for an adapter that does not fit its matrix
    (that has none)."""
    merged = {name: weight for name, weight in weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name, A in weights.items():
        if name.endswith(".lora_A"):
            layer = name.removesuffix("lora_A")
            W, B = weights[layer + "weight"], weights[layer + "lora_B"]
            if (A.shape, B.shape) != ((rank, W.shape[1]), (W.shape[0], rank)):
                raise ValueError(
                    f"{layer}lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}, rank {rank}, weight "
                    f"{tuple(W.shape)}"
                )
            merged[layer + "weight"] = (W.float() + alpha / rank * (B.float() @ A.float())).to(W.dtype)
    return merged
