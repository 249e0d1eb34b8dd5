"""Which parameters decay, what Muon does to a matrix, and the learning rate of every step."""

import math

import pytest
import torch
from torch import Tensor, nn

import optim
from model import GPTConfig, GPTMini
from optim import Muon, build_optimizer, lr_factor, newton_schulz, parameter_groups, set_learning_rate
from support.config.schema import TrainingConfig

# With biases and a position table, so that the model has every kind of parameter.
ALL_KINDS_OF_PARAMETERS = {
    "norm": "layernorm",
    "mlp": "gelu",
    "position": "learned",
    "bias": True,
    "n_kv_heads": 4,
}
SHAPES = {
    "vocab_size": 13,
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 40,
    "max_seq_len": 16,
}
MODELS = pytest.mark.parametrize(
    "switches",
    [{}, {"qk_norm": True, "tie_embeddings": False}, ALL_KINDS_OF_PARAMETERS],
    ids=["default", "untied", "gpt2"],
)


def network(**switches) -> GPTMini:
    torch.manual_seed(0)
    return GPTMini(GPTConfig(**{**SHAPES, **switches}))


def training(**keys) -> TrainingConfig:
    return TrainingConfig(**{"max_steps": 10, **keys})


def names(net: nn.Module, params: list[nn.Parameter]) -> set[str]:
    of = {id(p): name for name, p in net.named_parameters()}
    return {of[id(p)] for p in params}


def backward(net: GPTMini, step: int) -> None:
    """Compute the gradients of one batch, which depends on the step."""
    ids = torch.randint(13, (2, 8), generator=torch.Generator().manual_seed(step))
    loss, n_targets = net(ids[:, :-1], labels=ids[:, 1:])
    (loss / n_targets).backward()


# ---- groups --------------------------------------------------------------------------------------


@MODELS
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay_and_each_parameter_is_in_one_group(switches, optimizer):
    net = network(**switches)
    groups = parameter_groups(net, training(optimizer=optimizer, weight_decay=0.3))
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in net.parameters())  # a tied head is one parameter
    assert len(members) == len(set(members))
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] == 0.3) for p in group["params"]), names(
            net, group["params"]
        )
        assert group["weight_decay"] in (0.0, 0.3)


def test_the_names_of_the_decaying_parameters():
    net = network(**ALL_KINDS_OF_PARAMETERS)
    decaying = [
        p for group in parameter_groups(net, training()) if group["weight_decay"] for p in group["params"]
    ]
    decays = {name.split(".")[-2] for name in names(net, decaying)}
    assert decays == {
        "embed_tokens",
        "embed_positions",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "up_proj",
        "down_proj",
    }


@MODELS
def test_muon_takes_only_the_matrices_inside_the_blocks(switches):
    net = network(**switches)
    groups = parameter_groups(net, training(optimizer="muon", lr=0.01, muon_lr=0.05))
    taken = [group for group in groups if group["muon"]]
    assert len(taken) == 1
    assert names(net, taken[0]["params"]) == {
        name
        for name, p in net.named_parameters()
        if name.startswith("layers.") and name.endswith("proj.weight")
    }
    assert {(group["muon"], group["peak_lr"], group["lr"]) for group in groups} == {
        (True, 0.05, 0.05),
        (False, 0.01, 0.01),
    }


def test_adamw_alone_has_no_muon_group():
    net = network()
    assert not any(group["muon"] for group in parameter_groups(net, training(optimizer="adamw")))
    assert type(build_optimizer(net, training(optimizer="adamw"))) is torch.optim.AdamW
    assert type(build_optimizer(net, training(optimizer="muon"))) is Muon


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_and_empty_groups_are_left_out(optimizer):
    net = network()
    for name, p in net.named_parameters():
        p.requires_grad_(name == "norm.weight")
    groups = parameter_groups(net, training(optimizer=optimizer))
    assert [names(net, group["params"]) for group in groups] == [{"norm.weight"}]


# ---- AdamW ---------------------------------------------------------------------------------------


def test_adamw_is_torch_adamw_with_the_settings_of_the_config():
    """Bit for bit, over five steps with a changing learning rate."""
    config = training(lr=0.02, weight_decay=0.2, betas=[0.8, 0.9], eps=1e-5)
    ours, theirs = network(), network()
    mine = build_optimizer(ours, config)
    decay, rest = [[p for p in theirs.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False)]
    reference = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}],
        lr=0.02,
        betas=(0.8, 0.9),
        eps=1e-5,
    )
    for step in range(5):
        factor = 1 - step / 5
        set_learning_rate(mine, factor)
        for group in reference.param_groups:
            group["lr"] = 0.02 * factor
        for net, optimizer in ((ours, mine), (theirs, reference)):
            backward(net, step)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_parameters_that_muon_leaves_to_adamw_end_as_with_adamw():
    """Given the same gradients, embeddings and norms end bit-equal under both optimizers; matrices do not."""
    nets = {"adamw": network(), "muon": network()}
    optimizers = {kind: build_optimizer(net, training(optimizer=kind, lr=0.01)) for kind, net in nets.items()}
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for p, q in zip(nets["adamw"].parameters(), nets["muon"].parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers.values():
            optimizer.step()
    equal = {
        name: torch.equal(p, q)
        for (name, p), q in zip(nets["adamw"].named_parameters(), nets["muon"].parameters(), strict=True)
    }
    assert equal == {name: not name.endswith("proj.weight") for name in equal}


# ---- Muon ----------------------------------------------------------------------------------------


def with_singular_values(
    rows: int, columns: int, values: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(U S V^T, U, V) with random directions U, V and the given S."""
    n = min(rows, columns)
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(rows, n, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(columns, n, generator=generator))
    return U @ torch.diag(values) @ V.T, U, V


SIZES = pytest.mark.parametrize(
    ("rows", "columns"), [(12, 12), (20, 7), (7, 20)], ids=["square", "tall", "wide"]
)


@SIZES
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_their_directions(rows, columns, scale):
    """In the basis of U and V the result is diagonal, so the directions are unchanged. The diagonal holds
    the new singular values."""
    G, U, V = with_singular_values(rows, columns, scale * torch.linspace(0.05, 1.0, min(rows, columns)))
    inside = U.T @ newton_schulz(G[None])[0] @ V
    diagonal = inside.diagonal()
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    assert (inside - torch.diag(diagonal)).abs().max() < 1e-4


def test_newton_schulz_of_a_stack_equals_that_of_each_matrix():
    stack = (
        torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    )
    torch.testing.assert_close(
        newton_schulz(stack), torch.cat([newton_schulz(G[None]) for G in stack]), rtol=1e-4, atol=1e-5
    )


def test_newton_schulz_of_zeros_is_zeros():
    assert torch.equal(newton_schulz(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def muon(params: list[nn.Parameter], lr: float = 0.1, weight_decay: float = 0.0) -> Muon:
    return Muon([{"params": params, "muon": True, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}])


def test_a_first_muon_step_by_hand():
    """The gradient has a single singular value, so U V^T is known, and Newton-Schulz applies
    3.4445 x - 4.775 x^3 + 2.0315 x^5 five times to 1. The step of a tall matrix is larger by the square root
    of rows / columns."""
    x = 1.0
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    u, v = torch.tensor([0.6, 0.0, 0.8, 0.0]), torch.tensor([0.8, -0.6])
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = 7.0 * u[:, None] * v
    muon([p], lr=0.1, weight_decay=0.5).step()
    expected = torch.ones(4, 2) * (1 - 0.1 * 0.5) - 0.1 * math.sqrt(4 / 2) * x * u[:, None] * v
    torch.testing.assert_close(p.data, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon to compare with")
@SIZES
def test_muon_agrees_with_torch_muon(rows, columns):
    """The witness computes Newton-Schulz in bf16, so the two drift by percents; a wrong momentum, scale or
    transpose would show at once. Weight decay is separate and exact, so it is subtracted first."""
    generator = torch.Generator().manual_seed(5)
    mine = nn.Parameter(torch.randn(rows, columns, generator=generator))
    theirs = nn.Parameter(mine.detach().clone())
    ours = muon([mine], weight_decay=0.3)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, momentum=0.95, nesterov=True)
    for step in range(6):
        before = mine.detach().clone()
        with torch.no_grad():
            theirs.copy_(mine)
        gradient = with_singular_values(
            rows, columns, torch.linspace(0.3, 1.0, min(rows, columns)), seed=step
        )[0]
        updates = []
        for p, optimizer in ((mine, ours), (theirs, reference)):
            p.grad = gradient.clone()
            optimizer.step()
            updates.append(p.detach() - before * (1 - 0.1 * 0.3))
        assert torch.cosine_similarity(*(update.flatten() for update in updates), dim=0) > 0.99
        assert (updates[0].norm() / updates[1].norm()).item() == pytest.approx(1, abs=0.03)


def test_matrices_of_the_same_shape_are_updated_as_if_alone():
    generator = torch.Generator().manual_seed(6)
    start = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    gradients = [torch.randn(4, 6, generator=generator) for _ in range(3)]
    results = []
    for split in (False, True):
        params = [nn.Parameter(tensor.clone()) for tensor in start]
        optimizers = [muon([p]) for p in params] if split else [muon(params)]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        results.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_parameter_without_a_gradient_does_not_change():
    moved, still = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    moved.grad = torch.randn(3, 4)
    optimizer = muon([moved, still], weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still, torch.ones(3, 4)) and not torch.equal(moved, torch.ones(3, 4))
    assert moved.grad is None  # otherwise AdamW, the parent class, would update it again


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_optimizer_continues_identically(optimizer, tmp_path):
    """Three steps, then saved and loaded as a checkpoint is, then three more: bit-equal to six in a row."""
    config = training(optimizer=optimizer)
    straight = network()
    stepper = build_optimizer(straight, config)
    resumed = None
    for step in range(6):
        if step == 3:
            torch.save(
                {"net": straight.state_dict(), "optimizer": stepper.state_dict()}, tmp_path / "state.pt"
            )
            saved = torch.load(tmp_path / "state.pt", weights_only=True)
            resumed = network()
            resumed.load_state_dict(saved["net"])
            again = build_optimizer(resumed, config)
            again.load_state_dict(saved["optimizer"])
        for net, current in [(straight, stepper)] + ([(resumed, again)] if resumed else []):
            backward(net, step)
            set_learning_rate(current, 1 - step / 6)
            current.step()
            current.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls_with_each_optimizer(optimizer):
    net = network(qk_norm=True)
    current, losses = build_optimizer(net, training(optimizer=optimizer, lr=0.01)), []
    ids = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(15):
        loss, n_targets = net(ids[:, :-1], labels=ids[:, 1:])
        losses.append((loss / n_targets).item())
        (loss / n_targets).backward()
        current.step()
        current.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


# ---- the learning rate ---------------------------------------------------------------------------

SCHEDULES = ("cosine", "linear", "wsd", "step", "constant")


def factors(
    schedule: str, warmup_steps: int = 10, schedule_steps: int = 110, floor: float = 0.0, beyond: int = 5
) -> list[float]:
    return [
        lr_factor(step, schedule, warmup_steps, schedule_steps, floor)
        for step in range(schedule_steps + beyond)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_in_equal_parts_to_the_peak(schedule):
    assert factors(schedule)[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_step_has_the_peak_rate(schedule):
    assert factors(schedule, warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize(
    ("schedule", "quarter", "half", "at_80", "at_90", "last", "beyond"),
    [
        ("linear", 0.75, 0.5, 0.2, 0.1, 0.01, 0.0),
        ("cosine", 0.5 + math.sqrt(0.125), 0.5, 0.0954915, 0.0244717, 0.000246720, 0.0),
        ("wsd", 1.0, 1.0, 1.0, 0.5, 0.05, 0.0),
        ("step", 1.0, 1.0, 0.316, 0.1, 0.1, 0.1),
        ("constant", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    ],
)
def test_each_schedule_by_hand(schedule, quarter, half, at_80, at_90, last, beyond):
    """10 steps of warmup, then 100 of the schedule: step 35 is a quarter of the way, 109 is the last step,
    and steps from 110 come after the end."""
    at = factors(schedule)
    assert [at[35], at[60], at[90], at[100], at[109], at[110], at[114]] == pytest.approx(
        [quarter, half, at_80, at_90, last, beyond, beyond], rel=1e-5
    )


def test_a_drop_begins_exactly_at_its_step():
    at = factors("step")
    assert [at[89], at[90], at[99], at[100]] == [1.0, 0.316, 0.316, 0.1]
    assert factors("wsd")[89] == 1.0 and factors("wsd")[91] == pytest.approx(0.95)


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_warmup_the_rate_never_rises_or_falls_below_the_floor(schedule, floor):
    at = factors(schedule, floor=floor)
    assert at[:10] == sorted(at[:10])
    assert at[9:] == sorted(at[9:], reverse=True)
    assert max(at) == 1.0
    assert min(at[9:]) >= floor
    if schedule in ("cosine", "linear", "wsd"):
        assert at[-1] == pytest.approx(floor)


def test_the_decay_ends_at_the_floor_and_is_not_cut_off_there():
    """Halfway from 1 down to 0.2 is 0.6."""
    assert factors("linear", floor=0.2)[60] == pytest.approx(0.6)
    assert factors("cosine", floor=0.2)[60] == pytest.approx(0.6)


# left_to_fall: how far the rate is above the floor when the given share of the steps after warmup is left
@pytest.mark.parametrize(
    ("schedule", "left_to_fall"),
    [
        ("linear", lambda left: left),
        ("wsd", lambda left: min(1, 5 * left)),
        ("cosine", lambda left: math.sin(math.pi * left / 2) ** 2),
    ],
)
@pytest.mark.parametrize(
    ("warmup", "total", "floor"), [(1, 4, 0.0), (3, 10, 0.0), (7, 40, 0.25), (20, 300, 0.1)]
)
def test_the_rates_of_the_first_and_last_steps_are_what_the_pages_say(
    schedule, left_to_fall, warmup, total, floor
):
    """The rate does not start at zero: the first step has 1/warmup. It does not end at the floor: the last
    step is still above it, and the step after the last would be at the floor."""
    at = factors(schedule, warmup, total, floor)
    assert at[0] == 1 / warmup > 0
    assert at[warmup - 1] == at[warmup] == 1
    assert at[total - 1] == pytest.approx(floor + (1 - floor) * left_to_fall(1 / (total - warmup)))
    assert at[total - 1] > floor
    assert at[total:] == pytest.approx([floor] * 5, abs=1e-12)


def test_a_run_logs_the_rates_that_the_pages_say(tiny_run):
    """12 steps, 2 of warmup, linear from a peak of 0.01 towards 0."""
    rates = [row["lr"] for row in tiny_run.train_rows]
    assert [rates[0], rates[1], rates[2], rates[-1]] == pytest.approx([0.01 / 2, 0.01, 0.01, 0.01 / 10])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_of_only_warmup_does_not_divide_by_zero(schedule):
    assert factors(schedule, warmup_steps=4, schedule_steps=4, beyond=0) == [0.25, 0.5, 0.75, 1.0]


def test_the_example_in_the_docstring():
    assert [lr_factor(s, "linear", warmup_steps=2, schedule_steps=6) for s in range(6)] == [
        0.5,
        1.0,
        1.0,
        0.75,
        0.5,
        0.25,
    ]


def test_an_unknown_schedule_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'cosin'.*cosine, linear"):
        lr_factor(5, "cosin", 0, 10)


def test_the_factor_scales_the_peak_rate_of_every_group():
    net = network()
    optimizer = build_optimizer(net, training(optimizer="muon", lr=0.01, muon_lr=0.04))
    for factor in (0.5, 0.25):  # always relative to the peak, not to the rate of the last step
        set_learning_rate(optimizer, factor)
        assert {(group["muon"], group["lr"]) for group in optimizer.param_groups} == {
            (False, 0.01 * factor),
            (True, 0.04 * factor),
        }


def test_every_schedule_of_the_config_is_known_to_the_optimizer():
    for schedule in TrainingConfig.model_fields["schedule"].annotation.__args__:
        assert 0 <= optim.lr_factor(7, schedule, 2, 10) <= 1
