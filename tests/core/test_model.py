"""The network does what its docstrings say.

A `check_...` function takes the module to check, so that test_mutations.py can give it a copy of model.py
with a mistake in it, and show that the check notices.
"""

import contextlib
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import model as real

V, B, T, H, K = 11, 2, 7, 4, 2
SMALL = {"vocab_size": V, "d_model": 24, "n_layers": 3, "n_heads": H, "n_kv_heads": K}
SMALL |= {"d_ff": 40, "max_seq_len": 16}
GPT2 = {"norm": "layernorm", "mlp": "gelu", "position": "learned", "bias": True, "n_kv_heads": H}
POSITIONS = ("rope", "learned", "sinusoidal")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


def build(m: ModuleType, **switches) -> nn.Module:
    """A small model in eval mode with large random weights. With the initial std of 0.02 attention is nearly
    uniform, and many mistakes would stay below the tolerance."""
    net = m.GPTMini(m.GPTConfig(**{**SMALL, **switches}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(std=0.3, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return net.eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def autocast(device: str, dtype: torch.dtype):
    return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()


# ---- the past does not see the future ------------------------------------------------------------


def check_causality(
    m: ModuleType, device: str = "cpu", dtype: torch.dtype = torch.float32, **switches
) -> None:
    net, ids = build(m, **switches).to(device), tokens(B, T).to(device)
    for cut in (1, 4, T - 1):
        shift = 1 + tokens(B, T - cut, seed=cut).to(device) % (V - 1)  # 1 to V - 1: every later token changes
        other = ids.clone()
        other[:, cut:] = (other[:, cut:] + shift) % V
        with torch.no_grad(), autocast(device, dtype):
            before, after = net(ids).float(), net(other).float()
        torch.testing.assert_close(
            before[:, :cut], after[:, :cut], rtol=0, atol=1e-4, msg=f"positions before {cut} see later tokens"
        )
        change = (before[:, cut:] - after[:, cut:]).abs().amax(dim=(0, 2))  # the largest at each position
        assert change.min() > 0.01, "the changed positions should change"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16-autocast"])
@pytest.mark.parametrize("device", DEVICES)
def test_changing_the_future_leaves_the_past_alone(device, dtype):
    check_causality(real, device, dtype)


@pytest.mark.parametrize(
    "switches",
    [GPT2, {"position": "sinusoidal", "n_kv_heads": H}, {"qk_norm": True, "n_kv_heads": 1}],
    ids=str,
)
def test_every_variant_is_causal(switches):
    check_causality(real, **switches)


def test_explicit_attention_is_causal(monkeypatch):
    monkeypatch.setattr(real, "fused_attention", real.explicit_attention)
    check_causality(real)


def test_no_gradient_flows_from_a_position_to_a_later_token():
    """The same promise by calculus: d logits[t] / d embedding[s] is zero for s > t, and not for s <= t."""
    net, ids = build(real), tokens(1, T)
    seen = []
    net.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad_()) or out)
    logits = net(ids)
    for t in range(T):
        [grad] = torch.autograd.grad(logits[0, t].square().sum(), seen[0], retain_graph=True)  # (1, T, D)
        size = grad[0].abs().sum(dim=-1)  # (T,)
        assert (size[: t + 1] > 0).all()
        assert (size[t + 1 :] == 0).all()


# ---- the cache -----------------------------------------------------------------------------------


def check_cached_equals_uncached(m: ModuleType, pieces: tuple[int, ...] = (3, 1, 1, 2), **switches) -> None:
    assert sum(pieces) == T
    net, ids = build(m, **switches), tokens(B, T)
    with torch.no_grad():
        whole = net(ids)
        cache = net.new_cache(batch_size=B)
        parts = [net(piece, cache=cache) for piece in ids.split(list(pieces), dim=1)]
    assert cache.length == T
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pieces", [(T,), (4, 3), (1, 4, 2), (1,) * T], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_cached_logits_equal_uncached(position, pieces):
    check_cached_equals_uncached(real, pieces, position=position)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, K, H])
def test_cached_logits_equal_uncached_for_any_number_of_kv_heads(n_kv_heads, qk_norm):
    check_cached_equals_uncached(real, n_kv_heads=n_kv_heads, qk_norm=qk_norm)


@pytest.mark.parametrize("pieces", [(T,), (3, 1, 1, 2)], ids=str)
def test_cached_logits_equal_uncached_on_the_explicit_path(monkeypatch, pieces):
    monkeypatch.setattr(real, "fused_attention", real.explicit_attention)
    check_cached_equals_uncached(real, pieces)


@pytest.mark.parametrize("n_kv_heads", [1, K, H])
def test_fewer_kv_heads_shrink_the_cache(n_kv_heads):
    config = real.GPTConfig(**{**SMALL, "n_kv_heads": n_kv_heads})
    cache = real.KVCache(config, B, "cpu", torch.bfloat16)
    assert len(cache.keys) == len(cache.values) == config.n_layers
    n_bytes = sum(buffer.untyped_storage().nbytes() for buffer in [*cache.keys, *cache.values])
    assert n_bytes == 2 * config.n_layers * B * n_kv_heads * config.max_seq_len * config.head_dim * 2


@pytest.mark.parametrize("cached", [0, 10], ids=["uncached", "after-a-cache"])
def test_a_sequence_beyond_max_seq_len_is_refused_with_value_and_rule(cached):
    net = build(real)
    cache = net.new_cache(batch_size=1) if cached else None
    if cached:
        net(tokens(1, cached), cache=cache)
    net(tokens(1, 6), cache=cache)  # 16 with the cache: the last that fits
    with pytest.raises(ValueError, match=r"17 tokens is longer than max_seq_len=16"):
        net(tokens(1, 1 if cached else 17), cache=cache)


# ---- attention -----------------------------------------------------------------------------------


def naive_attention(attn: nn.Module, x: Tensor) -> Tensor:
    """Attention without positions, one number at a time, in float64: query head h reads key/value head h
    // (H / K)."""
    x, hd = x.double(), attn.head_dim
    q, k, v = (x @ w.weight.double().T for w in (attn.q_proj, attn.k_proj, attn.v_proj))
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(attn.n_heads):
            kv = h // (attn.n_heads // attn.n_kv_heads)
            mine, theirs = slice(h * hd, (h + 1) * hd), slice(kv * hd, (kv + 1) * hd)
            for t in range(x.shape[1]):
                scores = [(q[b, t, mine] @ k[b, s, theirs]).item() / math.sqrt(hd) for s in range(t + 1)]
                total = sum(math.exp(score) for score in scores)
                for s, score in enumerate(scores):
                    out[b, t, mine] += math.exp(score) / total * v[b, s, theirs]
    return out @ attn.o_proj.weight.double().T


def check_gqa_equals_naive_attention(m: ModuleType, n_kv_heads: int = K) -> None:
    attn = build(m, n_kv_heads=n_kv_heads).layers[0].self_attn
    x = torch.randn(B, T, SMALL["d_model"], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(
            attn(x, None, None, None).double(), naive_attention(attn, x), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("n_kv_heads", [1, K])
def test_gqa_equals_naive_per_head_attention(n_kv_heads):
    check_gqa_equals_naive_attention(real, n_kv_heads)


def test_as_many_kv_heads_as_query_heads_is_plain_attention():
    check_gqa_equals_naive_attention(real, H)


@pytest.mark.parametrize(
    ("n_keys", "masked"), [(T, False), (T, True), (10, True)], ids=["causal", "mask", "mask-after-a-cache"]
)
def test_fused_attention_equals_explicit_attention_in_values_and_gradients(n_keys, masked):
    mask = None
    if masked:
        mask = real.causal_mask(T, n_keys, torch.device("cpu"))
        without_first_keys = mask & (torch.arange(n_keys) >= n_keys - T)
        mask = torch.stack([mask, without_first_keys])[:, None]  # (B, 1, T, S): another one for each row
    results = []
    for attend in (real.fused_attention, real.explicit_attention):
        generator = torch.Generator().manual_seed(3)
        q, k, v = (
            torch.randn(B, H, n, 6, generator=generator, requires_grad=True) for n in (T, n_keys, n_keys)
        )
        out = attend(q, k, v, mask, 0.0)
        weights = torch.randn(out.shape, generator=generator)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segmented", [False, True])
def test_the_whole_model_is_the_same_on_both_attention_paths(monkeypatch, segmented):
    ids = tokens(B, T)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]]) if segmented else None
    results = []
    for attend in (real.fused_attention, real.explicit_attention):
        monkeypatch.setattr(real, "fused_attention", attend)
        net = build(real, qk_norm=True)
        loss, _ = net(ids, labels=tokens(B, T, seed=1), segments=segments)
        loss.backward()
        results.append([loss, *(p.grad for p in net.parameters())])
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-3, atol=1e-4)


def test_attention_dropout_acts_in_training_only():
    net, ids = build(real, dropout=0.5), tokens(B, T)
    for block in net.layers:
        block.dropout.p = 0.0  # leaves the dropout inside attention
    net.dropout.p = 0.0
    assert torch.equal(net(ids), net(ids))
    net.train()
    assert not torch.equal(net(ids), net(ids))


# ---- positions -----------------------------------------------------------------------------------


def rotated(m: ModuleType, x: Tensor, positions: list[int], theta: float = 100.0) -> Tensor:
    return m.apply_rope(x, *m.rope_tables(torch.tensor(positions), x.shape[-1], theta))


def check_rope_depends_on_distance_only(m: ModuleType) -> None:
    q, k = torch.randn(2, 1, 1, 1, 6, generator=torch.Generator().manual_seed(4))
    dots = [
        (rotated(m, q, [17 + shift]) * rotated(m, k, [13 + shift])).sum().item() for shift in (0, 1, 50, 1000)
    ]
    assert dots == pytest.approx([dots[0]] * 4, abs=1e-3)
    further = (rotated(m, q, [17]) * rotated(m, k, [10])).sum().item()
    assert abs(further - dots[0]) > 0.05, "another distance should give another product"
    torch.testing.assert_close(rotated(m, q, [1000]).norm(), q.norm())


def check_rope_is_complex_rotation(m: ModuleType) -> None:
    """The witness: dimensions i and i + hd/2 are one complex number, turned by position * theta^(-2i/hd)."""
    x = torch.randn(B, H, 4, 6, generator=torch.Generator().manual_seed(4))
    positions, theta = [0, 1, 5, 40], 100.0
    numbers = torch.complex(x[..., :3].double(), x[..., 3:].double())
    angles = torch.tensor(
        [[p * theta ** (-2 * i / 6) for i in range(3)] for p in positions], dtype=torch.float64
    )
    turned = numbers * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(
        rotated(m, x, positions).double(), torch.cat([turned.real, turned.imag], dim=-1), rtol=0, atol=1e-4
    )


def check_order_matters(m: ModuleType, position: str = "rope") -> None:
    """Without positions one layer sees earlier tokens as a set; with positions, their order shows."""
    net, ids = build(m, n_layers=1, position=position), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        change = (net(ids)[0, -1] - net(ids[:, [1, 0, 2, 3]])[0, -1]).abs().max()
    assert change > 0.01, "the order of earlier tokens makes no difference"


def test_rope_depends_on_distance_only():
    check_rope_depends_on_distance_only(real)


def test_rope_equals_complex_rotation():
    check_rope_is_complex_rotation(real)


@pytest.mark.parametrize("position", POSITIONS)
def test_order_matters(position):
    check_order_matters(real, position)


def test_a_larger_rope_theta_turns_slower():
    """But for the first pair, which turns by one radian a position whatever theta is."""
    (_, fast), (_, slow) = (real.rope_tables(torch.tensor([1]), 6, theta) for theta in (100.0, 10000.0))
    assert fast[0, 0].item() == pytest.approx(slow[0, 0].item())
    assert (slow[0, 1:] < 0.5 * fast[0, 1:]).all()


def test_sinusoidal_positions_are_those_of_the_paper():
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i + 1) = cos of the same."""
    expected = torch.zeros(4, 6)
    for row, pos in enumerate([0, 1, 2, 30]):
        for i in range(3):
            angle = pos / 10000 ** (2 * i / 6)
            expected[row, 2 * i] = math.sin(angle)
            expected[row, 2 * i + 1] = math.cos(angle)
    torch.testing.assert_close(
        real.sinusoidal_table(torch.tensor([0, 1, 2, 30]), 6), expected, rtol=0, atol=1e-5
    )


# ---- documents in one row ------------------------------------------------------------------------


SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5, 5, 6, 6, 6, 9, 9]])


def check_segments_isolate(m: ModuleType, position: str = "rope") -> None:
    net, ids = build(m, position=position), tokens(B, T)
    with torch.no_grad():
        packed = net(ids, segments=SEGMENTS)
        for row, numbers in enumerate(SEGMENTS):
            for number in numbers.unique():
                mine = numbers == number
                alone = net(ids[row : row + 1, mine])[0]
                torch.testing.assert_close(
                    packed[row, mine],
                    alone,
                    rtol=1e-4,
                    atol=1e-4,
                    msg="a document in a row differs from the document alone",
                )
        other = ids.clone()
        other[0, :3] = (other[0, :3] + 1) % V
        changed = net(other, segments=SEGMENTS)
    torch.testing.assert_close(changed[0, 3:], packed[0, 3:], rtol=0, atol=1e-5)
    assert (changed[0, :3] - packed[0, :3]).abs().max() > 0.01


@pytest.mark.parametrize("position", POSITIONS)
def test_a_document_in_a_packed_row_equals_the_document_alone(position):
    check_segments_isolate(real, position)


def test_without_segments_a_document_does_see_the_one_before():
    net, ids = build(real), tokens(1, T)
    with torch.no_grad():
        assert (net(ids)[:, 3:] - net(ids, segments=SEGMENTS[:1])[:, 3:]).abs().max() > 0.01


def test_segment_mask_and_positions_by_hand():
    segments = torch.tensor([[0, 0, 1, 1, 1], [3, 4, 4, 3, 3]])
    assert real.segment_positions(segments).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]]
    mask = real.segment_mask(segments[:1])
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


# ---- training: loss, checkpointing, initialization -----------------------------------------------


def test_with_labels_forward_gives_the_summed_loss_and_the_number_of_targets():
    net, ids, labels = build(real), tokens(B, T), tokens(B, T, seed=1)
    labels[0, :2] = labels[1, 5] = -100
    loss, n_targets = net(ids, labels)
    assert n_targets.item() == B * T - 3
    expected = -sum(
        net(ids).double().log_softmax(dim=-1)[b, t, labels[b, t]].item()
        for b in range(B)
        for t in range(T)
        if labels[b, t] != -100
    )  # labels are not shifted here: label t belongs to position t
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_identical_gradients(dropout):
    ids, labels = tokens(B, T), tokens(B, T, seed=1)
    results, calls = [], []
    for switch in (False, True):
        net = build(real, gradient_checkpointing=switch, dropout=dropout).train()
        net.layers[1].register_forward_pre_hook(lambda module, args, switch=switch: calls.append(switch))
        torch.manual_seed(7)
        loss, _ = net(ids, labels)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters())])
    assert calls.count(False) == 1 and calls.count(True) == 2, (
        "the checkpointed block should have run again in the backward pass"
    )
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def check_initial_std(m: ModuleType, **switches) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 96, "d_ff": 128, "vocab_size": 200}
    net = m.GPTMini(m.GPTConfig(**{**SMALL, **sizes, "tie_embeddings": False, "bias": True, **switches}))
    n_layers, zero = net.config.n_layers, net.config.zero_init
    seen = set()
    for name, p in net.named_parameters():
        kind = name.split(".")[-2]
        if "norm" in kind:
            expected_mean, expected_std = (1.0 if name.endswith("weight") else 0.0), 0.0
        elif name.endswith("bias"):
            expected_mean, expected_std = 0.0, 0.0
        elif kind in ("o_proj", "down_proj"):
            expected_mean, expected_std = 0.0, 0.0 if zero else 0.02 / math.sqrt(2 * n_layers)
        else:
            expected_mean, expected_std = 0.0, 0.0 if zero and kind == "lm_head" else 0.02
        assert p.std().item() == pytest.approx(expected_std, rel=0.1), name
        assert p.mean().item() == pytest.approx(expected_mean, abs=1e-3), name
        seen.add(kind)
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    assert projections | {"embed_tokens", "lm_head", "norm"} <= seen


@pytest.mark.parametrize(
    "switches", [{}, {"n_layers": 5}, {"mlp": "gelu", "position": "learned"}, {"zero_init": True}], ids=str
)
def test_initial_std_of_every_parameter_by_name(switches):
    check_initial_std(real, **switches)


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_zero_init_makes_every_block_the_identity(mlp):
    net = real.GPTMini(real.GPTConfig(**SMALL, zero_init=True, mlp=mlp, tie_embeddings=True))
    x = torch.randn(B, T, SMALL["d_model"])
    assert torch.equal(net.layers[1](x, None, None, None), x)
    assert net.lm_head.weight.std() > 0.01  # tied: the embedding's tensor, not zeros


def test_a_tied_head_is_one_tensor_and_counted_once():
    tied, untied = (real.GPTMini(real.GPTConfig(**SMALL, tie_embeddings=tie)) for tie in (True, False))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    D, hd, d_ff = 24, 6, 40
    block = D * H * hd + 2 * D * K * hd + H * hd * D + 3 * D * d_ff + 2 * D
    assert tied.n_params() == V * D + 3 * block + D
    assert untied.n_params() == tied.n_params() + V * D


def test_embed_scale_multiplies_token_embeddings_by_the_root_of_d_model():
    """Without it, an embedding table that is larger by that factor does the same; learned positions are
    not scaled."""
    scaled, plain = (
        build(real, embed_scale=switch, tie_embeddings=False, position="learned") for switch in (True, False)
    )
    with torch.no_grad():
        plain.embed_tokens.weight.mul_(24**0.5)
        torch.testing.assert_close(scaled(tokens(B, T)), plain(tokens(B, T)), rtol=1e-4, atol=1e-5)


def test_flops_per_token_by_hand():
    """2 for multiply and add, times 3 for forward and two backward products, for each weight. Causal
    attention: a query meets seq_len / 2 keys on average, in two products (scores, values), over H heads of
    hd."""
    D, hd, d_ff, seq_len = 24, 6, 40, 16
    block = D * H * hd + 2 * D * K * hd + H * hd * D + 3 * D * d_ff
    attention = 2 * 3 * 2 * (seq_len // 2) * H * hd
    for tie in (True, False):  # the head multiplies in both, the lookup in neither
        net = real.GPTMini(real.GPTConfig(**SMALL, tie_embeddings=tie))
        assert net.flops_per_token(seq_len) == 6 * (3 * block + V * D) + 3 * attention
