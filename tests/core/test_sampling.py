"""Each sampling control on logits made by hand, all of them together, and the loop that yields tokens."""

import math

import pytest
import torch
from pydantic import ValidationError
from test_model import build, tokens
from torch import Tensor, nn

import model
import sampling
from sampling import SamplingConfig, filter_logits, generate_tokens, sample_next

NOTHING_SEEN = torch.empty(1, 0, dtype=torch.long)
GREEDY = SamplingConfig(temperature=0)


def probs(logits: list[float] | Tensor, seen: list[int] | None = None, **controls) -> list[float]:
    """The probability of each token to be drawn."""
    logits = torch.as_tensor(logits)[None]
    seen = NOTHING_SEEN if seen is None else torch.tensor([seen])
    return filter_logits(logits, SamplingConfig(**controls), seen).softmax(dim=-1)[0].tolist()


def softmax(values: list[float]) -> list[float]:
    """Written out; -inf is a token that cannot be drawn."""
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


def log(*values: float) -> list[float]:
    return [math.log(value) for value in values]


INF = float("inf")


def test_without_controls_the_model_s_own_distribution_is_drawn_from():
    assert probs(log(0.5, 0.3, 0.2)) == pytest.approx([0.5, 0.3, 0.2])


# ---- temperature ---------------------------------------------------------------------------------


def test_temperature_zero_takes_the_largest_whatever_the_generator():
    logits = torch.tensor([[0.1, 2.0, 1.9], [5.0, -1.0, 4.9]])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        assert sample_next(logits, GREEDY, NOTHING_SEEN, generator).tolist() == [1, 0]


def test_temperature_two_takes_square_roots_of_the_odds():
    assert probs(log(0.64, 0.36), temperature=2.0) == pytest.approx([0.8 / 1.4, 0.6 / 1.4])


def test_temperature_one_half_squares_the_odds():
    assert probs(log(0.5, 0.3, 0.2), temperature=0.5) == pytest.approx(
        [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]
    )


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-40, 5e-324])
def test_temperature_towards_zero_becomes_greedy(temperature):
    logits = [3.0, 3.1, -1.0]
    assert probs(logits, temperature=temperature) == pytest.approx([0.0, 1.0, 0.0])
    drawn = sample_next(torch.tensor([logits]), SamplingConfig(temperature=temperature), NOTHING_SEEN)
    assert drawn.item() == 1


def test_a_high_temperature_becomes_uniform():
    assert probs([3.0, -2.0, 0.5, 1.0], temperature=1e6) == pytest.approx([0.25] * 4, abs=1e-5)


# ---- top-k ---------------------------------------------------------------------------------------


def test_top_k_keeps_the_k_likeliest_in_their_proportions():
    assert probs(log(0.1, 0.4, 0.2, 0.3), top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7])


def test_top_k_keeps_every_token_that_ties_with_the_kth():
    assert probs([1.0, 2.0, 1.0, 0.0, 1.0], top_k=2) == pytest.approx(softmax([1.0, 2.0, 1.0, -INF, 1.0]))


def test_top_k_of_one_is_greedy():
    assert probs([1.0, 2.0, 0.0], top_k=1) == [0, 1, 0]


@pytest.mark.parametrize("top_k", [3, 4, 1000])
def test_top_k_of_the_vocabulary_or_more_changes_nothing(top_k):
    assert probs(log(0.5, 0.3, 0.2), top_k=top_k) == pytest.approx([0.5, 0.3, 0.2])


# ---- top-p ---------------------------------------------------------------------------------------

# The likeliest tokens first: 0.4, then 0.7, 0.9, 1.0 together.
UNSORTED = log(0.1, 0.4, 0.2, 0.3)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.001, [0, 1, 0, 0]),  # one token always stays
        (0.39, [0, 1, 0, 0]),
        (0.41, [0, 4 / 7, 0, 3 / 7]),  # 0.4 does not reach 0.41, 0.7 does
        (0.69, [0, 4 / 7, 0, 3 / 7]),
        (0.71, [0, 4 / 9, 2 / 9, 3 / 9]),
        (0.91, [0.1, 0.4, 0.2, 0.3]),
        (1.0, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, kept):
    assert probs(UNSORTED, top_p=top_p) == pytest.approx(kept, abs=1e-6)


def test_top_p_that_is_reached_exactly_takes_no_further_token():
    """Equal logits: the probabilities 1/4 and their sums are exact in binary."""
    assert sum(p > 0 for p in probs([0.0] * 4, top_p=0.5)) == 2


def test_rows_are_filtered_independently():
    logits = torch.tensor([log(0.9, 0.05, 0.05), log(0.25, 0.35, 0.4)])
    kept = filter_logits(logits, SamplingConfig(top_p=0.6), torch.empty(2, 0, dtype=torch.long)) > -INF
    assert kept.tolist() == [[True, False, False], [False, True, True]]


# ---- repetition penalty --------------------------------------------------------------------------


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    """Both get less likely; dividing a negative logit would make it likelier."""
    assert probs([2.0, -2.0, 1.0, 0.0], seen=[0, 1], repetition_penalty=2.0) == pytest.approx(
        softmax([1.0, -4.0, 1.0, 0.0])
    )


def test_repetition_penalty_counts_a_token_once_however_often_it_was_seen():
    assert probs([2.0, 1.0], seen=[0, 0, 0], repetition_penalty=2.0) == pytest.approx(softmax([1.0, 1.0]))


def test_repetition_penalty_below_one_makes_repetition_likelier():
    assert probs([1.0, 1.0], seen=[0], repetition_penalty=0.5) == pytest.approx(softmax([2.0, 1.0]))


def test_repetition_penalty_acts_on_greedy_too():
    config = SamplingConfig(temperature=0, repetition_penalty=2.0)
    assert sample_next(torch.tensor([[2.0, 1.5]]), config, torch.tensor([[0]])).item() == 1


def test_each_row_is_penalized_for_its_own_tokens():
    logits = torch.tensor([[2.0, 2.0, 0.0]] * 2)
    filtered = filter_logits(logits, SamplingConfig(repetition_penalty=2.0), torch.tensor([[0, 0], [1, 2]]))
    assert filtered.argmax(dim=-1).tolist() == [1, 0]


def test_generate_penalizes_prompt_and_generated_tokens(monkeypatch):
    """The logits are always the same, so after each penalty the next best token is taken."""
    net = model.GPTMini(model.GPTConfig(vocab_size=5, d_model=8, n_layers=1, n_heads=2)).eval()
    monkeypatch.setattr(net.lm_head, "forward", lambda x: torch.tensor([[4.0, 3.9, 3.8, 3.7, 3.6]]))
    out = net.generate(torch.tensor([[1]]), 4, SamplingConfig(temperature=0, repetition_penalty=2.0))
    assert out.tolist() == [[1, 0, 2, 3, 4]]


# ---- together ------------------------------------------------------------------------------------


def test_penalty_comes_before_top_k():
    """2 halved is 1, the smallest of three: the two best are then the others. Before the penalty token 0 was
    among them. (Penalty and temperature only multiply, so their order makes no difference.)"""
    assert probs([2.0, 1.5, 1.2], seen=[0], repetition_penalty=2.0, top_k=2) == pytest.approx(
        softmax([-INF, 1.5, 1.2])
    )


def test_temperature_comes_before_top_p():
    """0.5, 0.3, 0.2 at temperature 0.5 become 0.66, 0.24, 0.11. One token is then enough for top_p 0.6;
    without the temperature two are needed."""
    assert probs(log(0.5, 0.3, 0.2), temperature=0.5, top_p=0.6) == [1, 0, 0]
    assert probs(log(0.5, 0.3, 0.2), temperature=1.0, top_p=0.6) == pytest.approx([0.625, 0.375, 0])


def test_top_k_comes_before_top_p():
    """0.4, 0.3, 0.2, 0.1 cut to two are 0.57, 0.43. The first alone then reaches top_p 0.5; without the cut
    two are needed."""
    assert probs(log(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.5) == [1, 0, 0, 0]
    assert probs(log(0.4, 0.3, 0.2, 0.1), top_p=0.5) == pytest.approx([4 / 7, 3 / 7, 0, 0])


def test_all_controls_combined_by_hand():
    """Penalty 2 on tokens 0 and 3: [4, 3, 2, -1, 1] becomes [2, 3, 2, -2, 1]. Temperature 0.5: [4, 6, 4,
    -4, 2]. Top-k 4 drops token 3. Their softmax is about [.105, .777, .105, 0, .014]; top-p 0.9 needs
    three: .777 + .105 is below 0.9."""
    left = probs(
        [4.0, 3.0, 2.0, -1.0, 1.0], seen=[0, 3], repetition_penalty=2.0, temperature=0.5, top_k=4, top_p=0.9
    )
    assert left == pytest.approx(softmax([4.0, 6.0, 4.0, -INF, -INF]))


def test_logits_are_not_changed_in_place():
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    config = SamplingConfig(temperature=0.5, top_k=2, top_p=0.9, repetition_penalty=2.0)
    sample_next(logits, config, torch.tensor([[0]]))
    assert logits.tolist() == [[2.0, 1.0, -1.0]]


def test_filters_work_in_float32_on_bf16_logits():
    logits = torch.tensor([[2.0, 1.0]], dtype=torch.bfloat16)
    filtered = filter_logits(logits, SamplingConfig(temperature=3.0), NOTHING_SEEN)
    assert filtered.dtype == torch.float32
    assert filtered.softmax(dim=-1)[0].tolist() == pytest.approx(softmax([2 / 3, 1 / 3]))


# ---- drawing -------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    logits = torch.zeros(20, 50)
    draws = [
        sample_next(logits, SamplingConfig(), NOTHING_SEEN, torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_generator_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    sample_next(torch.zeros(1, 5), SamplingConfig(), NOTHING_SEEN, torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "controls",
    [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 4, "top_p": 0.9}],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(controls):
    """Chi-square of 20,000 draws. With at most 4 degrees of freedom, chance gives 20 or more less than once
    in a thousand runs."""
    logits, n = torch.tensor([log(0.35, 0.05, 0.3, 0.1, 0.2)]), 20_000
    expected = torch.tensor(probs(logits[0], **controls))
    rows, nothing_seen = logits.expand(n, -1), NOTHING_SEEN.expand(n, 0)
    generator = torch.Generator().manual_seed(3)
    drawn = sample_next(rows, SamplingConfig(**controls), nothing_seen, generator)
    counts = drawn.bincount(minlength=5)
    assert counts[expected == 0].sum() == 0, "a token was drawn that the filters had excluded"
    possible = expected > 0
    chi_square = ((counts - n * expected).square() / (n * expected))[possible].sum().item()
    assert chi_square < 20


@pytest.mark.parametrize(
    "impossible",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_k": -5},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": math.inf},
        {"temprature": 1.0},
    ],
    ids=str,
)
def test_impossible_sampling_values_are_refused_by_name(impossible):
    with pytest.raises(ValidationError) as error:
        SamplingConfig(**impossible)
    assert str(error.value.errors()[0]["loc"][0]) == next(iter(impossible))


# ---- the loop: prompt in, tokens out -------------------------------------------------------------

B = 2


def naive_generate(net: nn.Module, ids: Tensor, n: int, config: SamplingConfig, seed: int) -> Tensor:
    """Without a cache: the whole window goes through the model for every token."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        with torch.no_grad():
            logits = net(ids[:, -net.config.max_seq_len :])[:, -1]
        token = sample_next(logits, config, ids, generator)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids


@pytest.mark.parametrize("prompt_len", [1, 5, 8, 13], ids=lambda n: f"prompt{n}of8")
@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
def test_cached_generation_equals_uncached_also_past_the_window(position, prompt_len):
    net, ids = build(model, max_seq_len=8, position=position), tokens(B, prompt_len)
    for config in (GREEDY, SamplingConfig(temperature=1.5, top_k=9, repetition_penalty=1.2)):
        generated = net.generate(ids, 14, config, generator=torch.Generator().manual_seed(5))
        assert generated.tolist() == naive_generate(net, ids, 14, config, seed=5).tolist()


def test_generation_is_the_same_for_a_row_alone_and_in_a_batch():
    net, ids = build(model), tokens(3, 5)
    together = net.generate(ids, 6, GREEDY)
    assert together.tolist() == [net.generate(ids[i : i + 1], 6, GREEDY)[0].tolist() for i in range(3)]


def test_generate_is_what_generate_tokens_yields_after_the_prompt():
    net, ids = build(model), tokens(B, 5)
    yielded = torch.stack(list(generate_tokens(net, ids, 6, GREEDY)), dim=1)  # (B, 6)
    assert net.generate(ids, 6, GREEDY).tolist() == torch.cat([ids, yielded], dim=1).tolist()


def test_generate_applies_the_head_to_last_positions_only():
    net, shapes = build(model), []
    net.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    net.generate(tokens(B, 5), 3)
    assert shapes == [(B, net.config.d_model)] * 3


def test_generating_nothing_returns_the_prompt():
    ids = tokens(B, 5)
    assert torch.equal(build(model).generate(ids, 0), ids)


def test_each_row_stops_at_its_own_eos_and_the_loop_when_all_have(monkeypatch):
    """Row 0 ends with the first token, row 1 with the third. What is drawn for row 0 in between does not
    count."""
    eos, script = 9, iter([[9, 1], [2, 3], [4, 9], [5, 5]])
    monkeypatch.setattr(sampling, "sample_next", lambda *args: torch.tensor(next(script)))
    assert build(model).generate(tokens(B, 4), 8, eos_id=eos)[:, 4:].tolist() == [[9, 9, 9], [1, 3, 9]]


def test_without_an_eos_id_generation_uses_all_its_tokens(monkeypatch):
    monkeypatch.setattr(sampling, "sample_next", lambda *args: torch.tensor([9, 9]))
    assert build(model).generate(tokens(B, 4), 5).shape == (B, 9)
