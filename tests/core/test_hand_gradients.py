"""The gradients written by hand, against finite differences and against autograd on the plain forms."""

import pytest
import torch
from torch import Tensor

import model
from model import RMSNorm, apply_rope, rope_tables
from support.hand_gradients import HandRMSNorm, HandRope

B, T, H, hd, D = 2, 5, 3, 8, 7


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def test_rmsnorm_passes_gradcheck():
    assert torch.autograd.gradcheck(HandRMSNorm.apply, (random(B, T, D), random(D), 1e-5))


def test_rope_passes_gradcheck():
    cos, sin = rope_tables(torch.arange(T), hd, 10000.0)
    heads_first = random(B, T, H, hd).transpose(1, 2)  # not contiguous, as in the network
    assert torch.autograd.gradcheck(HandRope.apply, (heads_first, cos.double(), sin.double()))


def test_large_tensors_have_the_same_bits_too():
    """Where the processor computes eight numbers at once."""
    x, (cos, sin) = random(8, 64, 4, 32).float().transpose(1, 2), rope_tables(torch.arange(64), 32, 10000.0)
    assert torch.equal(HandRope.apply(x, cos, sin), apply_rope(x.detach(), cos, sin))
    rows, gain = random(16, 64, 96).float(), random(96).float()
    norm = RMSNorm(96, 1e-5)
    norm.weight.data = gain.detach()
    assert torch.equal(HandRMSNorm.apply(rows, gain, 1e-5), norm(rows.detach()))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-autocast"])
def test_the_network_gives_the_same_with_and_without_them(monkeypatch, autocast):
    config = model.GPTConfig(
        vocab_size=23, d_model=24, n_layers=2, n_heads=3, n_kv_heads=1, max_seq_len=T, qk_norm=True
    )
    ids = torch.arange(B * T).view(B, T) % 23
    results = []
    for by_hand in (True, False):
        monkeypatch.setattr(model, "trains_eagerly", lambda x, by_hand=by_hand: by_hand and x.requires_grad)
        torch.manual_seed(0)
        net = model.GPTMini(config)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = net(ids, ids)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
    if not autocast:
        assert torch.equal(results[0][0], results[1][0]), "the loss, bit for bit"
    for with_hand, plain in zip(*results, strict=True):
        bound = (0.03 if autocast else 1e-5) * plain.abs().max()
        assert (with_hand - plain).abs().max() <= bound


def test_they_are_used_exactly_when_gradients_are_recorded():
    x, (cos, sin) = torch.ones(1, 1, 2, 4, requires_grad=True), rope_tables(torch.arange(2), 4, 10000.0)
    assert type(apply_rope(x, cos, sin).grad_fn).__name__ == "HandRopeBackward"
    assert type(RMSNorm(4, 1e-5)(x).grad_fn).__name__ == "HandRMSNormBackward"
    assert "Hand" not in type(RMSNorm(4, 1e-5)(x.detach()).grad_fn).__name__
