"""What is computed in float32 even where the model, or autocast, is bf16: norms, softmax, loss, positions."""

import pytest
import torch
import torch.nn.functional as F
from test_model import SMALL, B, T, autocast, build, tokens
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import model as real


def exact_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm or LayerNorm written out in float64."""
    x, weight, bias = x.double(), norm.weight.double(), getattr(norm, "bias", None)
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(dim=-1, keepdim=True)
    out = x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * weight
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=["bf16-autocast", "bf16-model"])
def test_norms_are_computed_in_float32(kind, model_dtype):
    """Every norm inside a running model against float64: its result is rounded once, at the end, to the dtype
    of the matrix products that read it."""
    net = build(real, norm=kind, bias=True, qk_norm=True).to(model_dtype)
    calls = []
    for name, module in net.named_modules():
        if isinstance(module, real.RMSNorm | real.LayerNorm):
            module.register_forward_hook(
                lambda module, args, out, name=name: calls.append((name, module, args[0], out))
            )
    with torch.no_grad(), autocast("cpu", torch.bfloat16 if model_dtype == torch.float32 else torch.float32):
        net(tokens(B, T))
    assert len(calls) == 3 * 4 + 1
    for name, module, x, out in calls:
        assert out.dtype == torch.bfloat16, name
        assert x.dtype == (
            torch.bfloat16
            if model_dtype == torch.bfloat16 or name.endswith(("q_norm", "k_norm"))
            else torch.float32
        ), name
        exact = exact_norm(module, x)
        torch.testing.assert_close(
            out.double(), exact, rtol=2**-8 * 1.01, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


class DtypesOf(TorchFunctionMode):
    """Collects the input dtypes of one torch function, called as a method or not."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.seen = name, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == self.name:
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_explicit_softmax_is_float32_under_autocast(monkeypatch):
    monkeypatch.setattr(real, "fused_attention", real.explicit_attention)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), DtypesOf("softmax") as softmax:
        build(real)(tokens(B, T))
    assert softmax.seen == [torch.float32] * SMALL["n_layers"]


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=["bf16-autocast", "bf16-model"])
def test_loss_is_float32(model_dtype):
    net, ids, labels = build(real).to(model_dtype), tokens(B, T), tokens(B, T, seed=1)
    with (
        torch.no_grad(),
        autocast("cpu", torch.bfloat16 if model_dtype == torch.float32 else torch.float32),
        DtypesOf("cross_entropy") as cross_entropy,
    ):
        loss, _ = net(ids, labels)
        logits = net(ids)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert cross_entropy.seen == [torch.float32]
    exact = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)  # a sum in bf16 would be off by 1e-3


def test_positions_keep_float32_precision_in_a_bf16_model():
    net = build(real).bfloat16()
    assert not list(net.buffers())  # a buffer would have been rounded by .bfloat16()
    assert all(table.dtype == torch.float32 for table in real.rope_tables(torch.arange(T), 6, 10000.0))
