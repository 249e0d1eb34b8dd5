"""The order of checkpoints: ranks, intervals, ties, and what guessing would score."""

import math

import numpy as np
import pytest

from support.evaluation.case_files import Case
from support.evaluation.ranking import chance_of, rank
from support.evaluation.results import CaseResult, CheckpointResult


def results_of(*scores: float) -> list[CaseResult]:
    return [CaseResult(score, {}, None, [], 0, 0, None, None) for score in scores]


def checkpoint_of(file: str, *scores: float) -> CheckpointResult:
    return CheckpointResult(file, [], "", 0, 0, 1, "byte 257", results_of(*scores))


def cases_of(n: int, **fields) -> list[Case]:
    return [Case(prompt="p", target="t", **fields) for _ in range(n)]


def test_ranks_with_ties():
    cases = cases_of(4)
    ranked = rank(
        [
            checkpoint_of("c", 0, 0, 1, 1),
            checkpoint_of("a", 1, 1, 0, 0),
            checkpoint_of("b", 0, 0, 0, 0),
            checkpoint_of("d", 1, 1, 1, 1),
        ],
        cases,
        seed=1,
    )
    assert [(c.file, c.rank, c.tied, c.score) for c in ranked] == [
        ("d", 1, False, 1),
        ("a", 2, True, 0.5),
        ("c", 2, True, 0.5),
        ("b", 4, False, 0),
    ]


def test_weights_and_categories():
    cases = [*cases_of(2, category="x"), *cases_of(1, category="y", weight=6)]
    [found] = rank([checkpoint_of("a", 1, 0, 0.5)], cases, seed=1)
    assert found.score == pytest.approx((1 + 0 + 6 * 0.5) / 8)
    assert found.categories == {"x": 0.5, "y": 0.5}


def test_the_interval_is_that_of_the_normal_approximation():
    """For n draws of 0 or 1 with mean p, it is p -+ 1.96 sqrt(p (1 - p) / n)."""
    n, wins = 400, 120
    [found] = rank([checkpoint_of("a", *[1] * wins, *[0] * (n - wins))], cases_of(n), seed=3)
    half = 1.96 * math.sqrt(0.3 * 0.7 / n)
    assert (found.low, found.high) == (
        pytest.approx(0.3 - half, abs=0.006),
        pytest.approx(0.3 + half, abs=0.006),
    )


def test_checkpoints_are_told_apart_by_their_differences_case_by_case():
    """Both differ from the first by 0.1. One is always a little worse, the other sometimes much better,
    sometimes worse."""
    dice = np.random.default_rng(5)
    first = dice.uniform(0.3, 0.7, 60)
    steady, noisy = first - 0.1, first - 0.1 + np.where(np.arange(60) % 2, 0.6, -0.6)
    found = {
        c.file: c
        for c in rank(
            [
                checkpoint_of("first", *first),
                checkpoint_of("steady", *steady),
                checkpoint_of("noisy", *noisy),
            ],
            cases_of(60),
            0,
        )
    }
    assert found["steady"].score == pytest.approx(found["noisy"].score, abs=1e-5)
    assert (found["first"].same_as_first, found["steady"].same_as_first, found["noisy"].same_as_first) == (
        True,
        False,
        True,
    )


def test_the_bootstrap_is_a_function_of_the_seed():
    made = [
        rank([checkpoint_of("a", *np.linspace(0, 1, 30) ** 2)], cases_of(30), seed)[0] for seed in (1, 1, 2)
    ]
    assert made[0] == made[1]
    assert (made[0].low, made[0].high) != (made[2].low, made[2].high)


def test_the_score_of_guessing():
    four = Case(prompt="p", choices=["a", "b", "c", "d"], target="a", category="x")
    two = Case(prompt="p", choices=["a", "b"], target="a", category="x", weight=3)
    assert chance_of(
        [
            four,
            two,
            *cases_of(1, category="y"),
            *cases_of(1, category="z"),
            four.model_copy(update={"category": "z"}),
        ]
    ) == {"x": pytest.approx((0.25 + 3 * 0.5) / 4), "y": None, "z": pytest.approx(0.125)}


def test_losses_are_ranked_in_bits_per_byte_and_equal_ones_share_a_rank():
    """A byte tokenizer has a lower loss on more tokens; a model that predicts nothing well is last, also
    where its loss is not a number."""
    plain = {"names": [], "run": "", "step": 1, "tokens": 1, "n_params": 1, "results": []}
    losses = {"bpe": (3.0, 2.0), "byte": (1.5, 2.2), "same": (3.0, 2.0), "broken": (math.nan, math.nan)}
    made = [
        CheckpointResult(name, tokenizer=name, val_loss=loss, bits_per_byte=bits, **plain)
        for name, (loss, bits) in losses.items()
    ]
    ranked = rank(made, [], 42)
    assert [(c.file, c.rank, c.tied) for c in ranked] == [
        ("bpe", 1, True),
        ("same", 1, True),
        ("byte", 3, False),
        ("broken", 4, False),
    ]
