"""Five classic mistakes, made on purpose: none of them raises an error, but each shows in the numbers.

docs/TROUBLESHOOTING.md explains them. `python3 -m pytest tests/promises/test_classic_mistakes.py -s` prints
what is measured.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from torch import Tensor

import model as model_module
from model import GPTConfig, GPTMini
from support.run.checklist import leak_probe

T = 48
BYTES = torch.tensor(list((REPO / "data" / "tiny_corpus.txt").read_bytes()))
CONFIG = GPTConfig(
    vocab_size=256, d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, max_seq_len=T, dropout=0.2
)


def batch(seed: int, rows: int = 16) -> Tensor:
    """(rows, T + 1) bytes of the bundled text, from places that the seed chooses."""
    starts = torch.randint(len(BYTES) - T - 1, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([BYTES[start : start + T + 1] for start in starts.tolist()])


def loss_on(model: GPTMini, ids: Tensor) -> Tensor:
    loss_sum, n_targets = model(ids[:, :-1], ids[:, 1:])
    return loss_sum / n_targets


def validate(model: GPTMini) -> float:
    """The validation loss, measured correctly: in eval mode without gradients, then back to train mode."""
    model.eval()
    with torch.no_grad():
        loss = loss_on(model, batch(seed=-1, rows=64)).item()
    model.train()
    return loss


def new_optimizer(model: GPTMini) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))


def train(model: GPTMini, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """The loss of the last step. Randomness depends only on the step, so that training can be continued."""
    model.train()
    for step in steps:
        torch.manual_seed(step)  # dropout
        loss = loss_on(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.fixture(scope="module")
def trained() -> tuple[GPTMini, torch.optim.Optimizer]:
    """A small byte model after 200 steps, with its optimizer. A test that changes them works on a copy."""
    torch.manual_seed(0)
    model = GPTMini(CONFIG)
    optimizer = new_optimizer(model)
    train(model, optimizer, range(200))
    print(f"\ntrained: val_loss {validate(model):.2f}, a uniform guess has {torch.tensor(256.0).log():.2f}")
    return model, optimizer


def test_without_eval_the_same_text_has_a_different_loss_each_time(trained):
    model, ids = trained[0], batch(seed=-1, rows=64)
    with torch.no_grad():
        model.train()  # what a script does that forgets model.eval(): dropout stays on
        forgotten = [loss_on(model, ids).item() for _ in range(3)]
        model.eval()
        right = [loss_on(model, ids).item() for _ in range(3)]
    print(
        f"\nwithout eval(): {forgotten[0]:.4f}, {forgotten[1]:.4f}, {forgotten[2]:.4f}; with it "
        f"{right[0]:.4f} each time"
    )
    assert len(set(forgotten)) == 3 and len(set(right)) == 1
    assert min(forgotten) > right[0] + 0.05


def test_without_no_grad_each_loss_keeps_its_activations_in_memory(trained):
    model, kept = trained[0].eval(), 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        # The losses are kept as tensors, so their graphs stay alive.
        losses = [loss_on(model, batch(seed)) for seed in range(5)]
        with_graph, kept = kept, 0
        with torch.no_grad():
            same = [loss_on(model, batch(seed)) for seed in range(5)]
    size = 4 * model.n_params()
    print(
        f"\nwithout no_grad(): 5 losses keep {with_graph / 2**20:.0f} MB, the model has {size / 2**20:.1f} "
        f"MB; with it {kept} bytes"
    )
    assert all(loss.requires_grad for loss in losses) and not any(loss.requires_grad for loss in same)
    assert with_graph > 20 * size and kept == 0
    assert torch.equal(torch.stack(losses), torch.stack(same)), (
        "the numbers are the same, so nothing gives the mistake away"
    )


def reversed_mask_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention with a reversed mask: each position sees itself and everything after it."""
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def test_with_a_reversed_mask_training_looks_too_good(trained, monkeypatch):
    torch.manual_seed(0)
    model = GPTMini(CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "fused_attention", reversed_mask_attention)
        training = train(model, new_optimizer(model), range(200))
        leak = leak_probe(model.eval(), "cpu")
    sampling = validate(model)  # when sampling, nothing comes after the last position yet
    print(
        f"\nmask reversed: training loss {training:.2f}, but {sampling:.2f} where the next byte cannot be "
        f"seen; logits leak by {leak:.1f}"
    )
    assert training < 0.5 and sampling > 2 * validate(trained[0])
    assert leak > 0.1 and leak_probe(trained[0].eval(), "cpu") == 0


@pytest.mark.parametrize("pair", ["qk", "qv", "kv"])
def test_swapped_projections_load_without_error_and_ruin_the_model(trained, pair):
    """All three matrices have the same shape, so load_state_dict does not notice."""
    right, swapped = trained[0], GPTMini(CONFIG)
    a, b = f".{pair[0]}_proj.", f".{pair[1]}_proj."
    exchange = {a: b, b: a}
    state = {}
    for name, tensor in right.state_dict().items():
        part = next((part for part in exchange if part in name), None)
        state[name.replace(part, exchange[part]) if part else name] = tensor
    swapped.load_state_dict(state)  # strict, and still no error
    print(
        f"\n{pair[0]} and {pair[1]} swapped: val_loss {validate(swapped):.2f} in place of "
        f"{validate(right):.2f}"
    )
    assert validate(swapped) > validate(right) + 0.3


def test_resuming_without_the_optimizer_state_changes_the_run(trained):
    losses = {}
    for name in ("not interrupted", "resumed", "state lost"):
        model, optimizer = copy.deepcopy(trained)
        if name != "not interrupted":
            saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
            model = GPTMini(CONFIG)
            model.load_state_dict(weights)
            optimizer = new_optimizer(model)
            if name == "resumed":
                optimizer.load_state_dict(saved)
        train(model, optimizer, range(200, 201))
        losses[name] = validate(model)
    print("\nval_loss one step later: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    assert losses["resumed"] == losses["not interrupted"]
    assert losses["state lost"] > losses["resumed"] + 0.02
