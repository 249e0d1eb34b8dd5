"""A compiled network learns what the ordinary (*eager*) one learns: same gradients, same weights after three
steps, whichever switches are on.

`make test-torch TORCH=2.11.0` runs this file, and all other tests marked `compiler`, with another PyTorch.
"""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from model import GPTConfig, GPTMini
from optim import build_optimizer
from support.chunked_loss import chunked_cross_entropy_sum
from support.config.schema import TrainingConfig
from support.messages import UserError
from support.run.compiling import try_compiler

GPT2 = {"norm": "layernorm", "mlp": "gelu", "position": "learned", "bias": True}
SWITCHES = (
    "chunked loss",
    "autocast",
    "gradient checkpointing",
    "document mask",
    "GQA",
    "untied head",
    "GPT-2",
    "Muon",
    "qk_norm",
    "embed_scale",
)
# All are off in case 0. Each is on in three of the cases 1 to 5, no two in the same three. So any two
# switches meet in all four ways: neither, one, the other, both.
CASES_OF_SWITCH = dict(zip(SWITCHES, itertools.combinations(range(1, 6), 3), strict=True))
CASES = [frozenset(name for name, cases in CASES_OF_SWITCH.items() if case in cases) for case in range(6)]
ROWS, T, V = 3, 14, 61


def test_any_two_switches_meet_in_all_four_ways():
    for one, other in itertools.combinations(SWITCHES, 2):
        assert len({(one in case, other in case) for case in CASES}) == 4, (one, other)


def network(on: frozenset[str]) -> GPTMini:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=V,
        d_model=32,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2 if "GQA" in on else 4,
        max_seq_len=T,
        tie_embeddings="untied head" not in on,
        gradient_checkpointing="gradient checkpointing" in on,
        qk_norm="qk_norm" in on,
        embed_scale="embed_scale" in on,
        **(GPT2 if "GPT-2" in on else {}),
    )
    net = GPTMini(config)
    if "chunked loss" in on:
        net.loss_sum = functools.partial(chunked_cross_entropy_sum, chunk_rows=16)  # 42 rows: 16, 16, 10
    return net.train()


def batches(on: frozenset[str]) -> list[dict[str, Tensor]]:
    """The batches of three steps. Tokens repeat, and some positions are not scored."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(3):
        ids = torch.randint(V // 2, (ROWS, T + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[0, :5] = -100
        batch = {"input_ids": ids[:, :-1], "labels": labels}
        if "document mask" in on:
            batch["segments"] = torch.tensor([0] * 6 + [1] * 3 + [2] * 5).expand(ROWS, T).contiguous()
        made.append(batch)
    return made


def train(on: frozenset[str], backend: str | None) -> tuple[dict[str, Tensor], Tensor]:
    """({name: gradient of the first step}, how far each weight has moved after three steps)."""
    net = network(on)
    start = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    if backend:
        torch._dynamo.reset()
        net.compile(backend=backend)
    optimizer = build_optimizer(
        net, TrainingConfig(max_steps=3, optimizer="muon" if "Muon" in on else "adamw")
    )
    first = {}
    for batch in batches(on):
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in on):
            loss, n_targets = net(**batch)
        (loss / n_targets).backward()
        first = first or {name: p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return first, torch.nn.utils.parameters_to_vector(net.parameters()).detach() - start


def difference(one: Tensor, other: Tensor, least: float = 0.0) -> float:
    """The length of the difference, in proportion to the length of `other`, or to `least` if that is more."""
    return ((one - other).norm() / other.norm().clamp(min=least)).item()


def check_compiled_equals_eager(on: frozenset[str], backend: str) -> None:
    gradients, moved = train(on, backend)
    eager_gradients, eager_moved = train(on, None)
    largest = max(gradient.norm().item() for gradient in eager_gradients.values())
    rounding = 3e-2 if "autocast" in on else 1e-4
    for name, eager in eager_gradients.items():
        # Some gradients are nothing but rounding: a bias of the keys moves no attention weight.
        assert difference(gradients[name], eager, least=largest / 100) < rounding, name
    assert difference(moved, eager_moved) < (0.1 if "autocast" in on else 1e-3)


EACH_CASE = pytest.mark.parametrize("on", CASES, ids=[f"case-{number}" for number in range(len(CASES))])


@pytest.mark.compiler
@EACH_CASE
def test_traced_by_the_compiler_a_model_learns_the_same(on):
    """The compiler's graphs, run without generating code. With PyTorch 2.11 and a loss that was added up with
    += in the chunked form, every gradient was zero here."""
    check_compiled_equals_eager(on, "aot_eager")


@pytest.mark.slow
@pytest.mark.compiler
@EACH_CASE
def test_compiled_to_machine_code_a_model_learns_the_same(on):
    try:
        try_compiler("cpu")
    except UserError as error:
        pytest.skip(f"this PyTorch cannot compile here, and a run says so: {error}")
    check_compiled_equals_eager(on, "inductor")
