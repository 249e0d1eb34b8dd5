"""The summed cross-entropy, plain and in chunks, against PyTorch's own in float64."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model import GPTConfig, GPTMini, cross_entropy_sum
from support.chunked_loss import CHUNKED_FROM_VOCAB, align_head, chunked_cross_entropy_sum

B, T, D, V = 3, 7, 5, 13  # 21 rows
ALL_IGNORED = list(range(B * T))


def chunks_of(n_rows: int):
    return functools.partial(chunked_cross_entropy_sum, chunk_rows=n_rows)


FORMS = {
    "plain": cross_entropy_sum,
    "chunks-of-4": chunks_of(4),  # 4 does not divide the 21 rows
    "chunks-of-7": chunks_of(7),  # 7 does
    "one-chunk": chunks_of(1000),
}
EACH_FORM = pytest.mark.parametrize("loss_sum", FORMS.values(), ids=FORMS.keys())
PLAIN_AND_CHUNKS = pytest.mark.parametrize(
    "loss_sum", [cross_entropy_sum, chunks_of(7)], ids=["plain", "chunks"]
)


def example(ignored: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random (hidden, weight, labels); the labels of the rows in `ignored` are not scored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    labels = torch.randint(V, (B * T,), generator=generator)
    labels[ignored] = -100
    return hidden, weight, labels.view(B, T)


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(value, gradient for hidden, gradient for weight) from PyTorch, in float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    loss = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@EACH_FORM
@pytest.mark.parametrize(
    "ignored",
    [[], [0, 5, 20], [4, 5, 6, 7], list(range(20))],
    ids=["all-scored", "some", "a-whole-chunk", "all-but-one"],
)
def test_value_and_gradients_equal_torch_s(loss_sum, ignored):
    hidden, weight, labels = example(ignored)
    loss = loss_sum(hidden, weight, labels)
    assert loss.dtype == torch.float32
    # times 3, so that the gradient from above has to be passed on
    gradients = torch.autograd.grad(3 * loss, (hidden, weight))
    value, *expected = reference(hidden, weight, labels)
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=1e-6)
    for gradient, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), 3 * exact, rtol=1e-5, atol=1e-5)


def test_the_head_is_padded_with_zeros_for_bf16_only():
    weight = torch.ones(V, D)
    assert align_head(weight, torch.float32) is weight  # on a CPU nothing is gained
    padded = align_head(weight, torch.bfloat16)
    assert padded.dtype == torch.bfloat16 and padded.shape == (64, D)
    assert padded.sum() == V * D and padded[:V].all()
    assert align_head(torch.ones(128, D), torch.bfloat16).shape == (128, D)


@EACH_FORM
def test_no_target_at_all_gives_zero_and_zero_gradients(loss_sum):
    """The mean of nothing would be NaN; a sum of nothing is 0."""
    hidden, weight, labels = example(ALL_IGNORED)
    loss = loss_sum(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@EACH_FORM
def test_gradients_pass_gradcheck(loss_sum):
    """Against finite differences. The sum is float32 inside, so they need a wide step and a loose bound."""
    hidden, weight, labels = example([2, 11])
    inputs = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda h, w: loss_sum(h, w, labels), inputs, eps=1e-2, atol=5e-3, rtol=1e-2
    )


@EACH_FORM
@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_gradient_alone_is_right_too(loss_sum, wanted):
    """A frozen head, or frozen blocks below it, in fine-tuning."""
    hidden, weight, labels = example([3])
    _, hidden_grad, weight_grad = reference(hidden, weight, labels)
    tensors = {"hidden": hidden, "weight": weight}
    expected = {"hidden": hidden_grad, "weight": weight_grad}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    loss_sum(hidden, weight, labels).backward()
    torch.testing.assert_close(tensors[wanted].grad.double(), expected[wanted], rtol=1e-5, atol=1e-5)
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != wanted)


@EACH_FORM
def test_without_gradients_the_value_is_the_same(loss_sum):
    hidden, weight, labels = example([3])
    with torch.no_grad():
        loss = loss_sum(hidden, weight, labels)
    torch.testing.assert_close(loss.double(), reference(hidden, weight, labels)[0], rtol=1e-6, atol=1e-6)


@EACH_FORM
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=["bf16-autocast", "bf16-model"])
def test_in_bf16_the_sum_is_float32_and_gradients_have_their_tensor_s_dtype(loss_sum, model_dtype):
    """Witness: the same bf16 logits, summed in float64. A sum in bf16 would be off by 1e-3."""
    hidden, weight, labels = example([3, 9])
    hidden, weight = (tensor.detach().to(model_dtype).requires_grad_() for tensor in (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16) if model_dtype == torch.float32 else contextlib.nullcontext():
        loss = loss_sum(hidden, weight, labels)
    loss.backward()
    logits = F.linear(hidden.detach().bfloat16(), weight.detach().bfloat16())
    exact = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    for tensor, gradient in zip((hidden, weight), reference(hidden, weight, labels)[1:], strict=True):
        assert tensor.grad.dtype == model_dtype
        torch.testing.assert_close(tensor.grad.double(), gradient, rtol=0.05, atol=0.05)


def gradients_of_the_mean(loss_sum, autocast: bool) -> list[Tensor]:
    hidden, weight, labels = example([3, 9])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_sum(hidden * 1.0, weight * 1.0, labels)  # as in a model, neither is a leaf
    (loss / (labels != -100).sum()).backward()
    return [hidden.grad, weight.grad]


AUTOCAST = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])


@pytest.mark.compiler
@PLAIN_AND_CHUNKS
@AUTOCAST
def test_traced_by_the_compiler_the_gradients_are_the_same(loss_sum, autocast):
    """The compiler's graph of the Python code, run without generating code. With PyTorch 2.11 all gradients
    were zero."""
    torch._dynamo.reset()
    compiled = gradients_of_the_mean(torch.compile(loss_sum, backend="aot_eager"), autocast)
    rtol, atol = (1e-2, 1e-3) if autocast else (1e-5, 1e-6)
    for one, other in zip(compiled, gradients_of_the_mean(loss_sum, autocast), strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@EACH_FORM
def test_large_logits_do_not_overflow(loss_sum):
    hidden, weight, labels = example([])
    loss = loss_sum(hidden * 1e3, weight, labels)
    expected, _, _ = reference(hidden * 1e3, weight, labels)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("vocab_size", "expected"),
    [(CHUNKED_FROM_VOCAB - 1, cross_entropy_sum), (CHUNKED_FROM_VOCAB, chunked_cross_entropy_sum)],
    ids=["small", "large"],
)
def test_a_model_with_a_large_vocabulary_takes_the_chunked_form(vocab_size, expected):
    net = GPTMini(GPTConfig(vocab_size=vocab_size, d_model=2, n_layers=1, n_heads=1))
    assert net.loss_sum is expected


class LargestTensor(TorchFunctionMode):
    """Counts the numbers in the largest tensor that any torch function returns."""

    n_numbers = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.n_numbers = max(self.n_numbers, out.numel())
        return out


@pytest.mark.parametrize(
    ("loss_sum", "expected"),
    [(cross_entropy_sum, B * T * V), (chunks_of(4), B * T * D)],
    ids=["plain", "chunks-of-4"],
)
def test_the_chunked_form_never_holds_all_logits(loss_sum, expected):
    """This is its purpose: with 4 of the 21 rows in a chunk, no tensor of 21 x V numbers is ever made. The
    largest is then `hidden` (105 numbers; the weight has 65)."""
    hidden, weight, labels = example([])
    with LargestTensor() as largest:
        loss_sum(hidden, weight, labels).backward()
    assert largest.n_numbers == expected
