"""int8 weights: how wrong a weight can become, the same numbers with and without PyTorch's kernel, and never
in a checkpoint."""

import copy
import json

import numpy as np
import pytest
import torch
from converting import GPT2, SHAPES, random_model, save_checkpoint
from finetuning import LORA
from torch import Tensor, nn

import convert
import eval_val
import infer
import support.int8
from model import GPTMini
from sampling import PlainDecoder, SamplingConfig
from support.checkpoint import load_model, read_checkpoint, write_model
from support.decoding.fast import fast_decoder
from support.decoding.lean_step import LeanStep
from support.int8 import DIGIT, LARGEST, Int8Linear, has_kernel, quantize_int8, quantize_rows
from support.messages import UserError
from tokenizer import ByteTokenizer

# Logits of a model whose weights are the floats that the int8 numbers stand for, with two digits for x.
CLOSE = {"rtol": 2e-3, "atol": 2e-3}


@pytest.fixture(params=["kernel", "no kernel"])
def kernel(request, monkeypatch) -> bool:
    """With PyTorch's kernel where it has one, and without."""
    if request.param == "no kernel":
        monkeypatch.setattr(support.int8, "has_kernel", lambda: False)
    return support.int8.has_kernel()


def random_rows(n_rows: int, n_columns: int, seed: int = 0) -> Tensor:
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed))


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def with_floats_of_int8(model: GPTMini) -> GPTMini:
    """A float copy of the model, whose matrices hold what int8 makes of them. Its head is no longer tied."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            numbers, scale = quantize_rows(module.weight.detach())
            module.weight = nn.Parameter(numbers.float() * scale[:, None])
    return model


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_no_weight_is_wrong_by_more_than_half_a_scale(size):
    weight = random_rows(7, 33) * size
    numbers, scale = quantize_rows(weight)
    wrong = (weight.double() - numbers.double() * scale[:, None].double()).abs()
    assert (wrong <= 0.5001 * scale[:, None].double()).all()
    assert numbers.dtype == torch.int8 and (numbers.abs().amax(dim=1) == LARGEST).all()
    torch.testing.assert_close(scale, weight.abs().amax(dim=1) / 127)


def test_a_row_of_zeros_stays_zero_and_a_huge_number_coarsens_only_its_own_row():
    weight = random_rows(3, 20)
    alone = quantize_rows(weight[2:])
    weight[0], weight[1, 5] = 0.0, 1e6
    numbers, scale = quantize_rows(weight)
    assert (numbers[0] == 0).all() and scale[0] > 0
    assert numbers[1].tolist() == [0] * 5 + [127] + [0] * 14, "all but the huge number are lost"
    assert torch.equal(numbers[2], alone[0][0]) and scale[2] == alone[1][0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    weight = random_rows(3, 4)
    weight[1, 2] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize_rows(weight)


def test_the_error_is_at_most_twice_that_of_llama_cpp_s_q8_0():
    """Q8_0 has a scale for each 32 weights, we have one a row. The witness is the gguf package."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    weight = random_rows(64, 768)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), q8_0), q8_0)
    numbers, scale = quantize_rows(weight)
    ours = (numbers * scale[:, None]).numpy()
    assert np.abs(ours - weight.numpy()).mean() < 2 * np.abs(theirs - weight.numpy()).mean()
    assert np.abs(ours - weight.numpy()).mean() / np.abs(weight.numpy()).mean() < 0.01


# ---- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (1, 1)])
def test_a_layer_multiplies_by_the_int8_weights(kernel, with_bias, shape):
    """The witness is NumPy, in float64. What a digit leaves of x is at most 1/126 of half a step."""
    weight, bias = random_rows(13, 37), torch.arange(13.0) if with_bias else None
    x = random_rows(int(np.prod(shape)), 37, seed=1).reshape(*shape, 37)
    numbers, scale = (tensor.numpy().astype(np.float64) for tensor in quantize_rows(weight))
    exact = x.numpy().astype(np.float64) @ (numbers * scale[:, None]).T + (bias.numpy() if with_bias else 0)
    with torch.no_grad():
        found = Int8Linear(linear(weight, bias))(x)
    rest = np.abs(x.numpy()).max(axis=-1, keepdims=True) / DIGIT / 126 / 2
    allowed = rest * np.abs(numbers * scale[:, None]).sum(axis=1) + 1e-5
    assert found.shape == (*shape, 13) and found.dtype == torch.float32
    assert (np.abs(found.numpy() - exact) <= allowed).all()


def test_the_sums_are_exact_at_the_largest_numbers():
    """Processors without int8 instructions add two products in 16 bits, and what does not fit is cut off."""
    if not has_kernel():
        return
    for sign in (1, -1):
        layer = Int8Linear(linear(torch.full((3, 2048), sign * 1.0)))
        assert layer(torch.full((1, 2048), 5.0))[0].tolist() == pytest.approx(
            [sign * 5.0 * 2048] * 3, rel=1e-6
        )


def test_a_row_does_not_depend_on_the_rows_beside_it(kernel):
    layer = Int8Linear(linear(random_rows(11, 24), torch.ones(11))).requires_grad_(False)
    x = random_rows(4, 24, seed=2)
    x[1], x[2] = x[1] * 1e6, 0.0
    together = layer(x)
    for i in range(4):
        torch.testing.assert_close(together[i], layer(x[i : i + 1])[0], rtol=1e-6, atol=1e-6)
    assert (together[2] == 1).all(), "of zeros the bias is left"


def test_a_nan_in_a_row_stays_in_that_row(kernel):
    layer = Int8Linear(linear(random_rows(11, 24))).requires_grad_(False)
    x = random_rows(3, 24, seed=2)
    x[1, 5] = float("nan")
    assert layer(x).isnan().all(dim=1).tolist() == [False, True, False]


def test_a_number_a_thousand_times_the_others_does_not_drown_them():
    """With one digit, as llama.cpp's, all but the outlier would be 0."""
    weight, x = random_rows(11, 24), random_rows(1, 24, seed=2)
    weight[:, 7] = 0.0
    x[0, 7] = 1000.0
    layer = Int8Linear(linear(weight)).requires_grad_(False)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_input(kernel, dtype):
    layer = Int8Linear(linear(random_rows(11, 24), torch.ones(11)).to(dtype)).requires_grad_(False)
    x = random_rows(3, 24, seed=2).to(dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).float(), x.float() @ layer.weight.T + 1, rtol=0.02, atol=0.05)


def test_large_matrices_without_a_kernel_are_multiplied_in_parts(monkeypatch):
    monkeypatch.setattr(support.int8, "has_kernel", lambda: False)
    monkeypatch.setattr(support.int8, "CHUNK", 100)  # 4 rows of 24
    layer = Int8Linear(linear(random_rows(11, 24))).requires_grad_(False)
    x = random_rows(3, 24, seed=2)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-5, atol=1e-5)


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SHAPES.values(), ids=SHAPES)
def test_logits_loss_and_cache_are_those_of_the_int8_weights(kernel, switches):
    """The witness is the float model with the same int8 numbers as floats: any shape, tied or not."""
    model = random_model(**switches)
    expected, n_linear = with_floats_of_int8(model), sum(isinstance(m, nn.Linear) for m in model.modules())
    quantize_int8(model)
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == n_linear
    assert not any(type(m) is nn.Linear for m in model.modules())
    ids = torch.randint(257, (3, 21), generator=torch.Generator().manual_seed(0))
    logits = model(ids)
    assert not logits.requires_grad
    scale = logits.std()
    with torch.no_grad():
        torch.testing.assert_close(logits / scale, expected(ids) / scale, **CLOSE)
        loss, _ = model(ids, labels=ids)
        torch.testing.assert_close(loss, expected(ids, labels=ids)[0], rtol=1e-3, atol=1e-3)
    cache = model.new_cache(3)
    first, second = model(ids[:, :20], cache=cache), model(ids[:, 20:], cache=cache)
    torch.testing.assert_close(torch.cat([first, second], dim=1) / scale, logits / scale, **CLOSE)


def test_the_embedding_table_of_a_tied_model_stays_exact():
    model = random_model()
    table = model.embed_tokens.weight.detach().clone()
    sizes = quantize_int8(model)
    assert torch.equal(model.embed_tokens.weight, table)
    V, D, K, hd, F = 257, 32, 2, 8, 64  # and 4 heads, 2 layers
    outputs = 2 * (2 * D + 2 * K * hd + 2 * F + D) + V  # rows of all matrices, each with a scale
    n_weights = 2 * (2 * D * D + 2 * K * hd * D + 3 * F * D) + V * D
    assert sizes.read_before == 4 * n_weights and sizes.read_after == n_weights + 4 * outputs
    norms = 5 * D
    assert sizes.held_before == 4 * (n_weights + norms)
    assert sizes.held_after == sizes.read_after + 4 * (V * D + norms)


def test_biases_count_as_weights_in_memory():
    model = random_model(**GPT2)
    before = 4 * model.n_params()
    assert quantize_int8(model).held_before == before


def test_the_fast_way_of_decoding_is_used_and_gives_the_same_logits():
    model = random_model(**GPT2)
    quantize_int8(model)
    plain = PlainDecoder(model, batch_size=2)
    decoder = fast_decoder(plain, prompt_len=5, max_new_tokens=20)
    ids = torch.randint(257, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for n in range(5, 9):
            logits = decoder.next_logits(ids[:, :n])
        expected = PlainDecoder(model, batch_size=2).next_logits(ids)
    assert decoder.usable and isinstance(decoder.step, LeanStep)
    torch.testing.assert_close(logits / expected.std(), expected / expected.std(), **CLOSE)


def test_the_text_of_a_batch_is_that_of_each_prompt_alone(kernel):
    model = random_model()
    quantize_int8(model)
    ids = torch.randint(257, (3, 5), generator=torch.Generator().manual_seed(0))
    greedy = SamplingConfig(temperature=0)
    batch = model.generate(ids, 20, greedy)
    for i in range(3):
        assert torch.equal(batch[i], model.generate(ids[i : i + 1], 20, greedy)[0])


# ---- trained checkpoints -------------------------------------------------------------------------


def test_a_trained_model_keeps_its_loss_and_its_text(tiny_run, kernel, capsys):
    """eval_val.py prints both losses. int8 changes the third decimal at most."""
    ckpt = str(tiny_run.folder / "final.ckpt")
    assert eval_val.main(["--ckpt", ckpt, "--device", "cpu", "--quantize", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < abs(found["int8"]["loss_change"]) < 0.005
    assert found["int8"]["loss"] - found["loss"] == found["int8"]["loss_change"]
    # a byte a weight, and 4 for the scale of each row: of 32 columns or more here
    assert 1 / 4 < found["int8"]["bytes_per_token"] / found["int8"]["bytes_per_token_before"] <= 9 / 32
    model, tokenizer, _ = load_model(ckpt)
    ids = torch.tensor([tokenizer.encode("Attention is a weighted sum of")])
    exact = model(ids).argmax(dim=-1)
    quantize_int8(model)
    assert (model(ids).argmax(dim=-1) == exact).float().mean() > 0.8


def test_eval_val_prints_the_loss_before_and_after_and_the_bytes(tiny_run, capsys):
    ckpt = str(tiny_run.folder / "final.ckpt")
    eval_val.main(["--ckpt", ckpt, "--device", "cpu"])
    plain = capsys.readouterr().out.splitlines()
    eval_val.main(["--ckpt", ckpt, "--device", "cpu", "--quantize", "int8"])
    *lines, loss, sizes = capsys.readouterr().out.splitlines()
    assert lines == plain, "what it prints about the checkpoint itself does not change"
    assert loss.startswith("val_loss with int8 weights ") and "bits per byte" in loss
    assert sizes.startswith("int8: a token reads 0.0 MB of weights instead of 0.1 MB; memory holds ")


def test_infer_says_what_it_did_and_writes_the_same_text_with_and_without_a_kernel(
    tiny_run, capsys, monkeypatch
):
    argv = ["--ckpt", str(tiny_run.folder / "final.ckpt"), "--device", "cpu", "--quantize", "int8"]
    argv += ["--prompt", "Attention is", "--temperature", "0", "--max-new-tokens", "20"]
    assert infer.main(argv) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Attention is")
    assert said.err.count("\n") == 1 and said.err.startswith("int8: a token reads ")
    monkeypatch.setattr(support.int8, "has_kernel", lambda: False)
    assert infer.main(argv) == 0
    slow = capsys.readouterr()
    assert slow.out == said.out
    assert slow.err.rstrip().endswith("PyTorch has no int8 kernel here, so it may not be faster")


def test_other_kinds_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        infer.main(["--ckpt", "x.ckpt", "--prompt", "a", "--quantize", "int4"])
    assert caught.value.code == 2 and "--quantize" in capsys.readouterr().err


def test_int8_and_compile_are_refused_together_on_a_cpu():
    with pytest.raises(UserError, match="leave one out"):
        infer.main(
            ["--ckpt", "x.ckpt", "--prompt", "a", "--device", "cpu", "--quantize", "int8", "--compile"]
        )


def test_an_adapter_is_merged_before_its_weights_are_rounded(sft, tmp_path):
    made = sft(tmp_path / "lora", *LORA, "training.max_steps=3")
    results = []
    for name in ("step-0000003", "final"):  # with its adapters apart, and merged
        model, _, _ = load_model(made.folder / f"{name}.ckpt")
        quantize_int8(model)
        results.append(model(torch.arange(20)[None]))
    assert torch.equal(*results)


# ---- never saved ---------------------------------------------------------------------------------


def test_a_model_with_int8_weights_cannot_be_saved(kernel, tmp_path):
    model = random_model()
    quantize_int8(model)
    with pytest.raises(UserError, match="int8 weights is not saved"):
        write_model(tmp_path / "x.ckpt", model, ByteTokenizer(), {})
    with pytest.raises(UserError, match="int8 weights is not saved"):
        torch.save(model.state_dict(), tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_no_checkpoint_holds_int8_weights(tiny_run, tmp_path):
    """Neither those of a run, nor one that int8 was used with, nor one that convert.py writes."""
    imported = save_checkpoint(tmp_path, "imported", random_model())
    before = imported.read_bytes()
    infer.main(["--ckpt", str(imported), "--quantize", "int8", "--prompt", "a", "--max-new-tokens", "2"])
    assert imported.read_bytes() == before
    for path in (*tiny_run.folder.glob("*.ckpt"), imported):
        weights = read_checkpoint(path)["state_dict"]
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
    with pytest.raises(SystemExit):
        convert.parse_args(["--ckpt", str(imported), "--quantize", "int8", "--to", "hf"])
