"""How the weights change: parameter groups, the optimizers, and the learning rate of each step."""

import math

import torch
from torch import Tensor, nn

from support.config.schema import TrainingConfig


def decay_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two AdamW groups: matrices and embedding tables decay, vectors (norm gains, biases) do not. A smaller
    gain would only make the signal weaker."""
    return [
        {"params": [p for _, p in named if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether this is a matrix inside a block. The embedding table and the head have one row per token, so
    Muon leaves them to AdamW."""
    return parameter.dim() == 2 and "layers" in name.split(".")  # layers.0.mlp.up_proj.weight


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict]:
    """The parameter groups of the optimizer that the config names; empty groups are left out.

    Each step sets a group's `lr` to a share of its `peak_lr`, 0 to 1, given by the schedule. `muon` is True
    for groups that Muon updates. Frozen parameters are in no group.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for_muon = []
    if config.optimizer == "muon":
        for_muon = [p for name, p in named if is_hidden_matrix(name, p)]
        named = [(name, p) for name, p in named if not is_hidden_matrix(name, p)]
    groups = []
    for group in decay_groups(named, config.weight_decay):
        groups.append({**group, "muon": False, "peak_lr": config.lr})
    muon_group = {"params": for_muon, "weight_decay": config.weight_decay}
    groups.append({**muon_group, "muon": True, "peak_lr": config.muon_lr})
    return [{**group, "lr": group["peak_lr"]} for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the config names: AdamW (Loshchilov and Hutter, 2019), PyTorch's or the one written
    out in from_scratch.py; or Muon for the hidden matrices and AdamW for the rest."""
    groups = parameter_groups(model, config)
    options = {"betas": tuple(config.betas), "eps": config.eps}
    on_gpu = groups[0]["params"][0].device.type == "cuda"
    fused = True if on_gpu else None  # one kernel for all tensors
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=fused)
    if config.optimizer == "muon":
        return Muon(groups, **options, fused=fused)
    if config.optimizer == "adamw_from_scratch":
        from from_scratch import AdamW  # here, since no other run needs that file

        return AdamW(groups, **options)
    raise ValueError(
        f"optimizer={config.optimizer!r} is not one of adamw, muon, adamw_from_scratch; build_optimizer in "
        "optim.py needs a branch for it"
    )


class Muon(torch.optim.AdamW):
    """In groups with `muon=True`, each matrix moves along the (semi-)orthogonal matrix nearest to its
    momentum, the mean of its recent gradients. So every direction of the matrix moves about equally, not only
    the few that dominate the gradient. AdamW updates the other groups.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Matrices of one shape are
    orthogonalized together, which on a CPU is several times faster than one by one (docs/EXPERIMENTS.md).
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        """Update all groups. Returns what `closure` returned, as every optimizer of PyTorch does."""
        for group in self.param_groups:
            if group["muon"]:
                self._step_group(group)
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if not group["muon"]]
        try:
            return super().step(closure)  # AdamW's step, which sees only the groups left to it
        finally:
            self.param_groups = all_groups

    def _step_group(self, group: dict) -> None:
        """Update the matrices of one group, those of one shape together."""
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        for params in by_shape.values():
            self._step_same_shape(params, group["lr"], group["weight_decay"])

    def _step_same_shape(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Update matrices of one shape; all of them have a gradient."""
        for p in params:
            if not self.state[p]:
                self.state[p] = {"step": torch.tensor(0.0), "momentum_buffer": torch.zeros_like(p)}
            self.state[p]["step"] += 1
        # The functions that begin with _foreach do the same to each tensor of a list, on a GPU in one kernel.
        # 0.95 of the old momentum and 0.05 of the gradient: a.lerp(b, share) is (1 - share) a + share b.
        grads = [p.grad for p in params]
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - self.MOMENTUM)
        # Nesterov: the gradient counts once more
        directions = torch._foreach_lerp(grads, momenta, self.MOMENTUM)
        for p in params:
            p.grad = None  # it has been used; free its memory
        updates = newton_schulz(torch.stack([full(d) for d in directions]))  # (n, rows, columns)
        rows, columns = params[0].shape
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        updates = [shard_like(update, p) for update, p in zip(updates, params, strict=True)]
        # Larger for a tall matrix: then one rate changes the outputs of layers of all shapes alike.
        torch._foreach_add_(params, updates, alpha=-lr * max(1.0, rows / columns) ** 0.5)


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Approximately U V^T for each G = U S V^T (its singular value decomposition) of a batch (n, rows,
    columns): all singular values are pushed towards 1.

    X X^T X is U S^3 V^T: such products change only the singular values. So a step applies a s + b s^3 + c s^5
    to each; these coefficients lift small ones fast and leave all of them between about 0.7 and 1.2. In bf16
    on a GPU, in float32 on a CPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(torch.bfloat16 if G.is_cuda else torch.float32)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT  # so that X X^T below is the smaller of the two possible squares
    # The norm is at least the largest singular value, so after this none is above 1.
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        # baddbmm(M, P, Q, beta=m, alpha=f) is m M + f P Q for a batch of matrices, in one pass.
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b X X^T + c (X X^T)^2
        X = torch.baddbmm(X, B, X, beta=a)  # a X + b X X^T X + c (X X^T)^2 X
    return (X.mT if tall else X).to(G.dtype)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor. With FSDP each process keeps only a part of every weight; this collects the parts."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Tensor, p: Tensor) -> Tensor:
    """Cut `tensor` as FSDP has cut `p`, and keep this process's part. Without FSDP `p` is whole, and `tensor`
    is returned as it is."""
    if not hasattr(p, "device_mesh"):  # an ordinary tensor
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # device_mesh: the processes; placements: along which dimension they cut
    return distribute_tensor(tensor, p.device_mesh, p.placements)


# ---- schedules -----------------------------------------------------------------------------------
#
# Each is a function of progress, which goes from 0 after the warmup to 1 at the end of the schedule, and
# returns a share of the peak learning rate. A new one needs a row in SCHEDULES, and its name in
# support/config/schema.py.


def constant(progress: float) -> float:
    """Stays at the peak."""
    return 1.0


def linear(progress: float) -> float:
    """Falls in a straight line to zero."""
    return 1 - progress


def cosine(progress: float) -> float:
    """Falls to zero along half a cosine: slowly, faster, slowly (Loshchilov and Hutter, "SGDR", 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(progress: float) -> float:
    """Stays at the peak, then falls in a straight line to zero over the last fifth. (Its warmup is in
    lr_factor, as for all schedules.) The idea is from Hu et al., "MiniCPM" (2024); there the fall is
    exponential and shorter."""
    return min(1.0, 5 * (1 - progress))


def two_steps_down(progress: float) -> float:
    """Stays at the peak, drops to 31.6% of it after 80% of the schedule, and to 10% after 90% (DeepSeek LLM,
    2024)."""
    if progress < 0.8:
        return 1.0
    return 0.316 if progress < 0.9 else 0.1


SCHEDULES = {
    "cosine": cosine,
    "linear": linear,
    "wsd": warmup_stable_decay,
    "step": two_steps_down,
    "constant": constant,
}


def lr_factor(step: int, schedule: str, warmup_steps: int, schedule_steps: int, floor: float = 0.0) -> float:
    """The share of the peak learning rate in step 0, 1, ... (which are printed as 1, 2, ...).

    Warmup does not start from zero: with W steps, the first has 1/W of the peak and the last all of it. The
    step after the warmup has the peak too. `schedule_steps` counts the warmup too; `floor` is a share of the
    peak. With schedule_steps=6 the steps 0 to 5 belong to the schedule. From step 6 on `cosine`, `linear` and
    `wsd` give exactly `floor`; step 5 is still a little above it.

    >>> [lr_factor(s, "linear", warmup_steps=2, schedule_steps=6) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, schedule_steps - warmup_steps))
    # The schedule goes from 1 to 0; squeeze it so that it goes from 1 to floor.
    return floor + (1 - floor) * SCHEDULES[schedule](progress)


def scheduled_factor(step: int, training: TrainingConfig) -> float:
    """`lr_factor` in this step, with the schedule that the config's `training` section describes."""
    return lr_factor(
        step,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        schedule_steps=training.schedule_steps,
        floor=training.min_lr / training.lr,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group the learning rate `factor` times its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
