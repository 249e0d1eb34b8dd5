"""Low-rank adapters change nothing at the start; only they are trained; merging them keeps the logits."""

import pytest
import torch
from torch import nn

from lora import LoRALinear, add_adapters, merge_adapters
from model import GPTConfig, GPTMini
from support.messages import UserError

SIZES = {
    "vocab_size": 37,
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 40,
    "max_seq_len": 16,
}
RANK, ALPHA = 3, 6.0


def build(adapted: bool = True, targets: list[str] | None = None, **changes) -> GPTMini:
    torch.manual_seed(5)
    model = GPTMini(GPTConfig(**(SIZES | changes)))
    if adapted:
        add_adapters(model, RANK, ALPHA, targets)
    return model.eval()


def move_adapters(model: nn.Module) -> None:
    """Change the adapters as training would, so that B is no longer zero."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))


def test_an_adapted_model_starts_bit_equal_to_its_base(ids):
    assert torch.equal(build()(ids), build(adapted=False)(ids))


def test_an_adapter_computes_the_formula():
    """W x + (alpha / rank) B A x. The witness multiplies the matrices in double precision."""
    torch.manual_seed(0)
    plain = nn.Linear(7, 5)
    layer = LoRALinear(plain, rank=2, alpha=3.0)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(4, 7)
    W, A, B = (p.detach().double() for p in (layer.weight, layer.lora_A, layer.lora_B))
    expected = x.double() @ (W + 1.5 * B @ A).T + layer.bias.detach().double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert layer.weight is plain.weight and layer.bias is plain.bias


def test_adapter_gradients_follow_from_the_gradient_of_the_full_matrix():
    """If G is the gradient of W + s B A, those of B and A are s G A^T and s B^T G. W itself gets none."""
    torch.manual_seed(0)
    plain = nn.Linear(7, 5, bias=False).requires_grad_(False)
    layer = LoRALinear(plain, rank=2, alpha=3.0)
    with torch.no_grad():
        layer.lora_B.normal_()
    x, upstream = torch.randn(4, 7), torch.randn(4, 5)
    (layer(x) * upstream).sum().backward()
    G = upstream.T @ x
    torch.testing.assert_close(layer.lora_B.grad, 1.5 * G @ layer.lora_A.T)
    torch.testing.assert_close(layer.lora_A.grad, 1.5 * layer.lora_B.T @ G)
    assert layer.weight.grad is None


def test_only_adapters_are_trained_and_the_other_names_stay():
    base, adapted = build(adapted=False), build()
    new = adapted.state_dict().keys() - base.state_dict().keys()
    assert base.state_dict().keys() <= adapted.state_dict().keys()
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == new
    assert all(name.endswith(("_proj.lora_A", "_proj.lora_B")) for name in new)
    D, F, K = SIZES["d_model"], SIZES["d_ff"], 12  # K: width of the key and value heads
    each_block = (
        2 * (D + D) + 2 * (D + K) + 2 * (D + F) + (F + D)
    )  # inputs + outputs of q, o; k, v; gate, up; down
    n_trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert n_trained == SIZES["n_layers"] * RANK * each_block


def test_targets_match_the_last_part_of_a_name():
    torch.manual_seed(5)
    model = GPTMini(GPTConfig(**SIZES))
    assert add_adapters(model, RANK, ALPHA, ["q_proj", "v_proj"]) == 2 * SIZES["n_layers"]
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("targets", "changes"),
    [(["c_attn"], {}), (["gate_proj"], {"mlp": "gelu"}), (["lm_head"], {"tie_embeddings": False})],
)
def test_a_target_that_no_block_has_is_refused(targets, changes):
    """The head too: its weight is used without calling the layer, so its adapter would have no effect."""
    with pytest.raises(UserError, match=f"no block has a {targets[0]}; this model has .*q_proj"):
        build(targets=targets, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True, "mlp": "gelu", "norm": "layernorm", "position": "learned"},
        {"tie_embeddings": False},
    ],
)
def test_merged_weights_make_a_plain_model_with_the_same_logits(ids, changes):
    adapted = build(**changes)
    move_adapters(adapted)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    merged = merge_adapters(adapted.state_dict(), RANK, ALPHA)
    plain = build(adapted=False, **changes)
    base_logits = plain(ids)
    plain.load_state_dict(merged, strict=True)
    torch.testing.assert_close(plain(ids), adapted(ids), rtol=1e-5, atol=1e-5)
    assert (base_logits - adapted(ids)).abs().max() > 0.01, "the adapters did nothing, so this shows nothing"
    assert all(torch.equal(weight, before[name]) for name, weight in adapted.state_dict().items()), (
        "merging changed its input"
    )


def test_a_merge_in_bf16_is_rounded_once():
    weights = {"p.weight": torch.full((1, 1), 256.0, dtype=torch.bfloat16)}  # the next number up is 258
    weights |= {
        "p.lora_A": torch.full((2, 1), 0.75, dtype=torch.bfloat16),
        "p.lora_B": torch.ones(1, 2, dtype=torch.bfloat16),
    }
    # 256 + 2 * 0.75 = 257.5 is rounded to 258. Adding 0.75 twice in bf16 would stay at 256.
    merged = merge_adapters(weights, rank=2, alpha=2.0)
    assert merged["p.weight"].dtype == torch.bfloat16 and merged["p.weight"].item() == 258.0


@pytest.mark.parametrize(
    "changed",
    [
        {"p.lora_A": torch.zeros(2, 4)},
        {"p.lora_A": torch.zeros(1, 5), "p.lora_B": torch.zeros(3, 1)},
        {"p.lora_B": torch.zeros(4, 2)},
        {"p.weight": torch.zeros(5, 3)},
    ],
)
def test_adapters_that_do_not_fit_are_refused(changed):
    weights = {"p.weight": torch.zeros(3, 5), "p.lora_A": torch.zeros(2, 5), "p.lora_B": torch.zeros(3, 2)}
    merge_adapters(weights, 2, 4.0)
    with pytest.raises(ValueError, match=r"p\.lora_A"):
        merge_adapters(weights | changed, 2, 4.0)
    with pytest.raises(KeyError):
        merge_adapters({name: weight for name, weight in weights.items() if name != "p.lora_B"}, 2, 4.0)
