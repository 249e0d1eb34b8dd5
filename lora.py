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
    """A Linear with an adapter. It takes over `weight` and `bias` from the layer that it replaces, and keeps
    their names."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)  # nn.Linear's own __init__ would draw a new weight
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.scale = alpha / rank  # divided by rank, so that one alpha suits every rank
        self.weight = linear.weight
        self.bias = linear.bias
        like_weight = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like_weight))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **like_weight))
        if not linear.weight.is_meta:  # meta: a shape without numbers; the loader fills it
            # Each number in A x is then about as large as one in x.
            nn.init.normal_(self.lora_A, std=self.in_features**-0.5)
            nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias + (alpha / rank) B A x: from (..., in) to (..., out)."""
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: list[str] | None = None) -> int:
    """In every block, replace the matrices named in `targets` by ones with an adapter, and freeze everything
    else. Returns the number of adapters.

    `targets` are names such as `q_proj`; None means all matrices. Raises UserError for a target that no block
    has.
    """
    matrices = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name.split(".")
    }
    matrix_names = {last_part(name) for name in matrices}
    unknown = sorted(set(targets or []) - matrix_names)
    if unknown:
        raise UserError(
            f"lora.targets: no block has a {unknown[0]}; this model has {', '.join(sorted(matrix_names))}"
        )
    chosen = [name for name in matrices if targets is None or last_part(name) in targets]
    model.requires_grad_(False)
    for name in chosen:
        # layers.0.self_attn.q_proj: in module layers.0.self_attn, set attribute q_proj.
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, LoRALinear(matrices[name], rank, alpha))
    return len(chosen)


def last_part(name: str) -> str:
    """The last part of a dotted name: `q_proj` for `layers.0.self_attn.q_proj`."""
    return name.rsplit(".", 1)[-1]


def merge_adapters(weights: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """A state dict without adapters. (alpha / rank) B A of each adapter is added to its matrix W: computed in
    float32, then rounded to W's dtype once.

    Raises ValueError for an adapter that does not fit its matrix, KeyError for one without a matrix.
    """
    merged = {name: weight for name, weight in weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name, A in weights.items():
        if not name.endswith(".lora_A"):
            continue
        prefix = name.removesuffix("lora_A")  # "layers.0.self_attn.q_proj."
        W = weights[prefix + "weight"]
        B = weights[prefix + "lora_B"]
        if A.shape != (rank, W.shape[1]) or B.shape != (W.shape[0], rank):
            raise ValueError(
                f"{prefix}lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)}, rank {rank}, weight "
                f"{tuple(W.shape)}"
            )
        merged[prefix + "weight"] = (W.float() + alpha / rank * (B.float() @ A.float())).to(W.dtype)
    return merged
