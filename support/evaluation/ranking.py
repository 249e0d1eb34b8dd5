"""Checkpoints in order: by their scores on cases, with bootstrap intervals, or by their validation loss."""

import math
from dataclasses import replace

import numpy as np

from support.evaluation.case_files import Case
from support.evaluation.results import CheckpointResult

RESAMPLES = 2000  # draws of the bootstrap


def rank(checkpoints: list[CheckpointResult], cases: list[Case], seed: int) -> list[CheckpointResult]:
    """The checkpoints with scores, 95% intervals and ranks, the best first; without cases, ranked by loss.

    The bootstrap (Efron, 1979) draws as many cases as there are, with replacement, RESAMPLES times: how much
    would the score vary with other cases of this kind? All checkpoints see the same draws, so differences are
    paired: a checkpoint that beats the first in more than 2.5% of the draws cannot be told from it.
    """
    if not cases:
        return rank_by_loss(checkpoints)
    weights = np.array([case.weight for case in cases])  # (cases,)
    scores = np.array([[result.score for result in c.results] for c in checkpoints])  # (checkpoints, cases)
    means = np.round(scores @ weights / weights.sum(), 6)
    resampled = resampled_means(scores, weights, seed)  # (draws, checkpoints)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    lead_of_first = np.percentile(resampled[:, [means.argmax()]] - resampled, 2.5, axis=0)
    categories = categories_of(cases)
    ranked = []
    for i, checkpoint in enumerate(checkpoints):
        category_scores = {
            name: float(np.average(scores[i][numbers], weights=weights[numbers]))
            for name, numbers in categories.items()
        }
        ranked.append(
            replace(
                checkpoint,
                score=float(means[i]),
                low=float(low[i]),
                high=float(high[i]),
                rank=1 + int((means > means[i]).sum()),
                tied=int((means == means[i]).sum()) > 1,
                same_as_first=bool(lead_of_first[i] <= 0),
                categories=category_scores,
            )
        )
    return sorted(ranked, key=lambda c: (c.rank, c.file))


def resampled_means(scores: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """(RESAMPLES, checkpoints): each checkpoint's weighted mean score on each draw of cases."""
    n = len(weights)
    times_drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)  # (draws, cases)
    drawn_weights = times_drawn * weights
    return drawn_weights @ scores.T / drawn_weights.sum(axis=1, keepdims=True)


def rank_by_loss(checkpoints: list[CheckpointResult]) -> list[CheckpointResult]:
    """The checkpoints with ranks, the lowest loss first. The loss is taken in bits per byte, so that models
    with different tokenizers compare."""
    bits = [round(c.bits_per_byte, 6) if math.isfinite(c.bits_per_byte) else math.inf for c in checkpoints]
    ranked = [
        replace(c, rank=1 + sum(other < own for other in bits), tied=bits.count(own) > 1)
        for c, own in zip(checkpoints, bits, strict=True)
    ]
    return sorted(ranked, key=lambda c: (c.rank, c.file))


def categories_of(cases: list[Case]) -> dict[str, list[int]]:
    """The numbers of the cases in each category."""
    categories: dict[str, list[int]] = {}
    for n, case in enumerate(cases):
        categories.setdefault(case.category, []).append(n)
    return categories


def chance_of(cases: list[Case]) -> dict[str, float | None]:
    """The score of guessing in each category: 1/4 for a case with 4 choices, 0 for a case without choices.
    None for a category in which no case has choices."""
    levels: dict[str, float | None] = {}
    for name, numbers in categories_of(cases).items():
        chances = [1 / len(cases[n].choices) if cases[n].choices else 0.0 for n in numbers]
        weights = [cases[n].weight for n in numbers]
        levels[name] = float(np.average(chances, weights=weights)) if any(chances) else None
    return levels
