"""GPTConfig: its defaults, the switches that make other networks, and the shapes that it refuses."""

import pytest
from pydantic import ValidationError
from test_model import GPT2, SMALL, B, T, V, build, check_cached_equals_uncached, tokens

import model as real


def test_gpt2_switches_build_gpt2():
    net = build(real, **GPT2)
    names = {name for name, _ in net.named_parameters()}
    biases = {"layers.0.self_attn.q_proj.bias", "layers.0.mlp.down_proj.bias", "norm.bias"}
    assert biases | {"embed_positions.weight"} <= names
    assert not any("gate_proj" in name for name in names)
    assert "lm_head.bias" not in net.state_dict()
    assert net(tokens(B, T)).shape == (B, T, V)
    loss, _ = net(tokens(B, T), tokens(B, T, seed=1))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.generate(tokens(B, 3), 4).shape == (B, 7)


def test_defaults_follow_d_model_and_n_heads():
    swiglu, gelu = real.GPTConfig(d_model=128, n_heads=4), real.GPTConfig(d_model=128, n_heads=4, mlp="gelu")
    assert (swiglu.head_dim, swiglu.n_kv_heads) == (32, 4)
    assert swiglu.d_ff == 352  # 8/3 * 128 = 341.3, up to a multiple of 32
    assert gelu.d_ff == 512


def test_head_dim_may_differ_from_d_model_over_n_heads():
    net = build(real, d_model=22, head_dim=10)
    assert net.layers[0].self_attn.q_proj.weight.shape == (40, 22)
    assert net(tokens(B, T)).shape == (B, T, V)
    check_cached_equals_uncached(real, d_model=22, head_dim=10)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        (
            {"d_model": 130, "n_heads": 4},
            "d_model=130 is not a multiple of n_heads=4; try d_model=132, or set head_dim",
        ),
        (
            {"n_heads": 6, "d_model": 96, "n_kv_heads": 4},
            "n_heads=6 is not a multiple of n_kv_heads=4; try n_kv_heads=3",
        ),
        ({"d_model": 12, "n_heads": 4}, "head_dim=3 is odd, but rotary positions turn pairs; try head_dim=4"),
        ({"d_model": 15, "head_dim": 4, "position": "sinusoidal"}, "d_model=15 is odd"),
        ({"d_modle": 16}, "d_modle"),
        ({"dropout": 1.0}, "less than 1"),
        ({"n_layers": 0}, "greater than 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_impossible_shapes_are_refused_with_value_and_rule(switches, message):
    with pytest.raises(ValidationError) as error:
        real.GPTConfig(**switches)
    assert message in str(error.value)


@pytest.mark.parametrize("switch", ["norm", "mlp", "position"])
def test_a_kind_that_only_the_config_knows_is_refused_and_not_taken_for_llamas(switch):
    """What an extender meets who adds a name to GPTConfig and forgets the code that builds it."""
    config = real.GPTConfig(**SMALL)
    setattr(config, switch, "brand_new")
    with pytest.raises(ValueError, match=f"{switch}='brand_new' is unknown"):
        real.GPTMini(config)(tokens(B, T))


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=0"):
        real.GPTMini(real.GPTConfig())
