"""How the weights move: parameter groups, the Muon optimizer, and the learning rate of each step."""

import math

import torch
from torch import Tensor, nn

from support.config.schema import TrainingConfig


def decay_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two AdamW groups. Matrices and embedding tables decay; vectors (norm gains, biases) do not:
    shrinking a gain towards zero would shrink the signal, not the complexity."""
    return [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict]:
    """The groups of the configured optimizer. `peak_lr` is what the schedule multiplies; empty groups are
    left out."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = []
    if (
        config.optimizer == "muon"
    ):  # matrices inside the blocks; embeddings and head are lookup tables, left to AdamW
        hidden = [p for name, p in named if p.dim() == 2 and ".layers." in f".{name}"]
        in_hidden = {id(p) for p in hidden}
        named = [(name, p) for name, p in named if id(p) not in in_hidden]
    groups = [
        {**group, "muon": False, "peak_lr": config.lr} for group in decay_groups(named, config.weight_decay)
    ]
    groups.append(
        {"params": hidden, "weight_decay": config.weight_decay, "muon": True, "peak_lr": config.muon_lr}
    )
    return [{**group, "lr": group["peak_lr"]} for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), PyTorch's or the one written out; or Muon for the hidden
    matrices with AdamW for the rest."""
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw_from_scratch":
        from from_scratch import AdamW

        return AdamW(groups, betas=tuple(config.betas), eps=config.eps)
    kind = Muon if config.optimizer == "muon" else torch.optim.AdamW
    fused = groups[0]["params"][0].device.type == "cuda" or None  # one kernel for all tensors
    return kind(groups, betas=tuple(config.betas), eps=config.eps, fused=fused)


class Muon(torch.optim.AdamW):
    """Momentum, orthogonalized: groups with `muon=True` step along the nearest (semi-)orthogonal matrix to
    their momentum, so that every direction of a weight matrix moves, not only the few large ones; the others
    are AdamW's.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Matrices of one shape are
    orthogonalized together, which on a CPU is several times faster than one by one (docs/EXPERIMENTS.md).
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["muon"]:
                continue
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for params in by_shape.values():
                self._step_same_shape(params, group["lr"], group["weight_decay"])
        return super().step(closure)  # skips Muon's parameters: their gradient is None by now

    def _step_same_shape(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        directions = []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["momentum_buffer"] = torch.zeros_like(p)
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(p.grad, 1 - self.MOMENTUM)
            directions.append(full(p.grad.lerp(momentum, self.MOMENTUM)))  # Nesterov: look one step ahead
            p.grad = None
        updates = newton_schulz(torch.stack(directions))
        rows, columns = params[0].shape
        for p, update in zip(params, updates, strict=True):
            p.mul_(1 - lr * weight_decay)
            p.add_(shard_like(update, p), alpha=-lr * max(1.0, rows / columns) ** 0.5)


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Approximately U V^T for each G = U S V^T of a batch (n, rows, columns): all singular values pushed
    towards 1.

    Each step applies the odd polynomial a x + b x^3 + c x^5 to the singular values; these coefficients lift
    small ones fast and leave all between about 0.7 and 1.2. bf16 where the hardware has it, float32 on a CPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(torch.bfloat16 if G.is_cuda else torch.float32)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT  # work with the smaller square
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, also where FSDP keeps only a shard of it here."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, p: Tensor) -> Tensor:
    """`tensor`, cut as `p` is."""
    if not hasattr(p, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements)


def lr_factor(step: int, schedule: str, warmup_steps: int, schedule_steps: int, floor: float = 0.0) -> float:
    """The share of the peak learning rate in step 0, 1, ... (which are printed as 1, 2, ...).

    Warmup does not start from zero: of W steps the first has 1/W of the peak and the last all of it. The step
    after the warmup has the peak too. A decay by `cosine`, `linear` or `wsd` gets as low as `floor` in the
    step after the schedule, so its last step still has a little more, and all later steps have `floor`.

    >>> [lr_factor(s, "linear", warmup_steps=2, schedule_steps=6) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, schedule_steps - warmup_steps))
    if schedule == "constant":
        shape = 1.0
    elif schedule == "linear":
        shape = 1 - progress
    elif schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "wsd":  # warmup, stable, decay (Hu et al., "MiniCPM", 2024)
        shape = min(1.0, 5 * (1 - progress))
    elif schedule == "step":  # DeepSeek LLM (2024): 31.6% of the peak from 80% on, 10% from 90% on
        shape = 1.0 if progress < 0.8 else 0.316 if progress < 0.9 else 0.1
    else:
        raise ValueError(f"schedule={schedule!r} is none of cosine, linear, wsd, step, constant")
    return floor + (1 - floor) * shape


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
