"""Low-rank adapters: fine-tune a small correction to each matrix, and leave the matrix alone.

W x   becomes   W x + (alpha / rank) B A x     W (out, in) stays; A (rank, in), B (out, rank) are trained

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021). Only A and B need gradients and
optimizer states: with rank 8 these are about a hundredth of a matrix of 2,048 x 2,048. B starts at zero, so
the adapted model starts as the base. After training, (alpha / rank) B A is added to W, and what remains is a
plain model again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.messages import UserError


class LoRALinear(nn.Linear):
    """A Linear with an adapter. `weight` and `bias` are those of the layer it replaces, under the same
    names."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)  # nn.Linear's own __init__ would draw a new weight
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.scale = alpha / rank
        self.weight = linear.weight
        self.bias = linear.bias
        like_weight = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like_weight))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **like_weight))
        if not linear.weight.is_meta:
            nn.init.normal_(self.lora_A, std=self.in_features**-0.5)  # A x is then about as large as x
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: list[str] | None = None) -> int:
    """Give an adapter to the matrices in the blocks whose name is in `targets` (`q_proj`, ...; by default all
    matrices), and freeze everything else. Returns the number of adapters.

    Raises UserError for a target that no block has.
    """
    matrices = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }
    kinds = {last_part(name) for name in matrices}
    unknown = sorted(set(targets or []) - kinds)
    if unknown:
        raise UserError(
            f"lora.targets: no block has a {unknown[0]}; this model has {', '.join(sorted(kinds))}"
        )
    chosen = [name for name in matrices if targets is None or last_part(name) in targets]
    model.requires_grad_(False)
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoRALinear(matrices[name], rank, alpha))
    return len(chosen)


def last_part(name: str) -> str:
    """`layers.0.attention.q_proj` is a `q_proj`."""
    return name.rsplit(".", 1)[-1]


def merge_adapters(weights: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """A state dict without adapters: the product of each is added to its matrix, in float32, and rounded once
    to the dtype of the matrix.

    Raises ValueError for an adapter that does not fit its matrix, KeyError for one without a matrix.
    """
    merged = {name: weight for name, weight in weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name, A in weights.items():
        if not name.endswith(".lora_A"):
            continue
        layer = name.removesuffix("lora_A")
        W = weights[layer + "weight"]
        B = weights[layer + "lora_B"]
        if A.shape != (rank, W.shape[1]) or B.shape != (W.shape[0], rank):
            raise ValueError(
                f"{layer}lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}, rank {rank}, weight "
                f"{tuple(W.shape)}"
            )
        merged[layer + "weight"] = (W.float() + alpha / rank * (B.float() @ A.float())).to(W.dtype)
    return merged
