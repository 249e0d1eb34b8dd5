"""The summed cross-entropy, plain and chunked, against PyTorch's own in float64."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import support.chunked_loss
from model import GPTConfig, GPTMini
from support.chunked_loss import ChunkedCrossEntropy, cross_entropy_sum

B, T, D, V = 3, 7, 5, 13  # 21 rows
ALL, NONE = [], list(range(B * T))
FORMS = pytest.mark.parametrize(
    "chunk_rows", [None, 4, 7, 1000], ids=["plain", "chunks-of-4", "chunks-of-7", "one-chunk"]
)


def use_form(monkeypatch, chunk_rows: int | None) -> None:
    """Plain (None), or chunked whatever the vocabulary; 4 does not divide the 21 rows, 7 does."""
    monkeypatch.setattr(support.chunked_loss, "CHUNKED_FROM_VOCAB", 10**9 if chunk_rows is None else 1)
    monkeypatch.setattr(support.chunked_loss, "CHUNK_ROWS", chunk_rows or 1024)


def example(ignored: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    labels = torch.randint(V, (B * T,), generator=generator)
    labels[ignored] = -100
    return hidden, weight, labels.view(B, T)


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(value, gradient for hidden, gradient for weight) by PyTorch, in float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    loss = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@FORMS
@pytest.mark.parametrize(
    "ignored",
    [ALL, [0, 5, 20], [4, 5, 6, 7], list(range(20))],
    ids=["all-scored", "some", "a-whole-chunk", "all-but-one"],
)
def test_value_and_gradients_equal_torch_s(monkeypatch, chunk_rows, ignored):
    use_form(monkeypatch, chunk_rows)
    hidden, weight, labels = example(ignored)
    loss, n_targets = cross_entropy_sum(hidden, weight, labels)
    assert n_targets.item() == B * T - len(ignored)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(
        3 * loss, (hidden, weight)
    )  # 3: the gradient from above must be passed on
    value, *expected = reference(hidden, weight, labels)
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=1e-6)
    for gradient, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), 3 * exact, rtol=1e-5, atol=1e-5)


@FORMS
def test_no_target_at_all_gives_zero_and_zero_gradients(monkeypatch, chunk_rows):
    """The mean of nothing would be NaN; a sum of nothing is 0."""
    use_form(monkeypatch, chunk_rows)
    hidden, weight, labels = example(NONE)
    loss, n_targets = cross_entropy_sum(hidden, weight, labels)
    loss.backward()
    assert (loss.item(), n_targets.item()) == (0.0, 0)
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(
        weight.grad, torch.zeros_like(weight)
    )


@FORMS
def test_gradients_pass_gradcheck(monkeypatch, chunk_rows):
    """Against finite differences. The sum is float32 inside, so they need a wide step and a loose bound."""
    use_form(monkeypatch, chunk_rows)
    hidden, weight, labels = example([2, 11])
    inputs = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: cross_entropy_sum(h, w, labels)[0], inputs, eps=1e-2, atol=5e-3, rtol=1e-2
    )


@FORMS
@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_gradient_alone_is_right_too(monkeypatch, chunk_rows, wanted):
    """A frozen head, or frozen blocks below it, in fine-tuning."""
    use_form(monkeypatch, chunk_rows)
    tensors = dict(zip(("hidden", "weight"), example([3])[:2], strict=True))
    labels = example([3])[2]
    expected = dict(zip(tensors, reference(*tensors.values(), labels)[1:], strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    cross_entropy_sum(*tensors.values(), labels)[0].backward()
    torch.testing.assert_close(tensors[wanted].grad.double(), expected[wanted], rtol=1e-5, atol=1e-5)
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != wanted)


@FORMS
def test_without_gradients_the_value_is_the_same(monkeypatch, chunk_rows):
    use_form(monkeypatch, chunk_rows)
    hidden, weight, labels = example([3])
    with torch.no_grad():
        loss, _ = cross_entropy_sum(hidden, weight, labels)
    torch.testing.assert_close(loss.double(), reference(hidden, weight, labels)[0], rtol=1e-6, atol=1e-6)


@FORMS
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=["bf16-autocast", "bf16-model"])
def test_in_bf16_the_sum_is_float32_and_gradients_have_their_tensor_s_dtype(
    monkeypatch, chunk_rows, model_dtype
):
    """Witness: the same bf16 logits, summed in float64. A sum in bf16 would be off by 1e-3."""
    use_form(monkeypatch, chunk_rows)
    hidden, weight, labels = example([3, 9])
    hidden, weight = (tensor.detach().to(model_dtype).requires_grad_() for tensor in (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16) if model_dtype == torch.float32 else contextlib.nullcontext():
        loss, _ = cross_entropy_sum(hidden, weight, labels)
    loss.backward()
    logits = F.linear(hidden.detach().bfloat16(), weight.detach().bfloat16())
    exact = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for tensor, gradient in zip((hidden, weight), reference(hidden, weight, labels)[1:], strict=True):
        assert tensor.grad.dtype == model_dtype
        torch.testing.assert_close(tensor.grad.double(), gradient, rtol=0.05, atol=0.05)


def gradients(function, autocast: bool) -> list[Tensor]:
    hidden, weight, labels = example([3, 9])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, n_targets = function(hidden * 1.0, weight * 1.0, labels)  # as in a model, neither is a leaf
    (loss / n_targets).backward()
    return [hidden.grad, weight.grad]


AUTOCAST = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


@pytest.mark.parametrize("chunk_rows", [None, 7], ids=["plain", "chunks"])
@AUTOCAST
def test_traced_by_the_compiler_the_gradients_are_the_same(monkeypatch, chunk_rows, autocast):
    """What the compiler makes of the Python code, run without generating any. With PyTorch 2.11 all of
    them were zero."""
    use_form(monkeypatch, chunk_rows)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(cross_entropy_sum, backend="aot_eager"), autocast)
    for one, other in zip(compiled, gradients(cross_entropy_sum, autocast), strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(
            one, other, rtol=1e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("chunk_rows", [None, 7], ids=["plain", "chunks"])
@AUTOCAST
def test_compiled_gradients_of_a_model_equal_eager_ones(monkeypatch, chunk_rows, autocast):
    """The whole way, through the C++ compiler."""
    use_form(monkeypatch, chunk_rows)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = GPTMini(GPTConfig(vocab_size=61, d_model=32, n_layers=1, n_heads=2, max_seq_len=16))
        if compiled:
            torch._dynamo.reset()
            net.compile()
        ids = torch.randint(61, (2, 17))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, n_targets = net(ids[:, :-1], ids[:, 1:])
        (loss / n_targets).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (found[0] - found[1]).norm() < (2e-2 if autocast else 1e-5) * found[0].norm()


def test_large_logits_do_not_overflow(monkeypatch):
    for chunk_rows in (None, 4):
        use_form(monkeypatch, chunk_rows)
        hidden, weight, labels = example(ALL)
        loss, _ = cross_entropy_sum(hidden * 1e3, weight, labels)
        torch.testing.assert_close(
            loss.double(), reference(hidden * 1e3, weight, labels)[0], rtol=1e-5, atol=1e-3
        )


@pytest.mark.parametrize(
    "vocab_size", [support.chunked_loss.CHUNKED_FROM_VOCAB - 1, support.chunked_loss.CHUNKED_FROM_VOCAB]
)
def test_a_large_vocabulary_takes_the_chunked_form(monkeypatch, vocab_size):
    chunked, apply = [], ChunkedCrossEntropy.apply
    monkeypatch.setattr(ChunkedCrossEntropy, "apply", lambda *args: chunked.append(True) or apply(*args))
    cross_entropy_sum(torch.zeros(1, 2, 3), torch.zeros(vocab_size, 3), torch.zeros(1, 2, dtype=torch.long))
    assert bool(chunked) == (vocab_size >= support.chunked_loss.CHUNKED_FROM_VOCAB)


class Largest(TorchFunctionMode):
    """The numbers in the largest tensor that any torch function returns."""

    numbers = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_the_chunked_form_never_holds_all_logits(monkeypatch):
    """What it is for: with 4 of the 21 rows in a chunk, no tensor of 21 x V numbers is ever made."""
    sizes = []
    for chunk_rows in (None, 4):
        use_form(monkeypatch, chunk_rows)
        hidden, weight, labels = example(ALL)
        with Largest() as largest:
            cross_entropy_sum(hidden, weight, labels)[0].backward()
        sizes.append(largest.numbers)
    assert sizes == [B * T * V, B * T * D]  # the larger of hidden (105) and weight (65)
