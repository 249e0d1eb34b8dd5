"""The scores a case can ask for, each from 0 to 1.

To add one: a key of `Case` in case_files.py, and here a function with its row in CASE_SCORES. The result
files and the report then show it under the name of the key.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from support.evaluation.case_files import Case
from support.evaluation.results import CaseResult


def score_choices(case: Case, logprobs: list[float], output: str | None) -> float | None:
    """1 if the target is the likeliest choice, its share if several are equally likely, else 0."""
    if not case.choices:
        return None
    highest = max(logprobs)
    if highest == -math.inf or logprobs[case.right] < highest:
        return 0.0
    return 1 / logprobs.count(highest)


def score_target(case: Case, logprobs: list[float], output: str | None) -> float | None:
    """The target's probability per byte, exp(log-probability / bytes), which compares across tokenizers."""
    if case.target is None or case.choices:
        return None
    return math.exp(logprobs[0] / len(case.target.encode()))


def score_contains(case: Case, logprobs: list[float], output: str | None) -> float | None:
    """1 if the output contains all the texts, else 0."""
    if not case.contains:
        return None
    return float(all(text in (output or "") for text in case.contains))


def score_regex(case: Case, logprobs: list[float], output: str | None) -> float | None:
    """1 if the output matches, else 0."""
    if case.regex is None:
        return None
    return float(output is not None and re.search(case.regex, output) is not None)


@dataclass
class CaseScore:
    """`score` takes a case, the log-probabilities of its choices (or of its target alone) and the greedy
    output; it returns None for a case that does not ask for this score."""

    score: Callable[[Case, list[float], str | None], float | None]
    meaning: str  # as the report explains it


CASE_SCORES = {  # by the key of a case that asks for the score
    "choices": CaseScore(
        score_choices,
        "1 if the model finds the right choice the most likely of all, else 0. Guessing would score what the "
        "category shows as chance; a score near it says that the model does not know.",
    ),
    "target": CaseScore(
        score_target,
        "the probability that the model gives to the expected text, per byte (the geometric mean), so it "
        "compares across tokenizers. 1 would be certainty.",
    ),
    "contains": CaseScore(
        score_contains,
        "1 if the greedy output (always the most likely token) contains all the given texts, else 0.",
    ),
    "regex": CaseScore(score_regex, "1 if the greedy output matches the regular expression, else 0."),
}


def score_case(
    case: Case, likelihoods: list[tuple[float, bool]], option_ids: list[list[int] | None], output: str | None
) -> CaseResult:
    """The result of one case; its score is the mean of the scores it asks for.

    For each choice (or for the target alone), `likelihoods` has its log-probability and whether it is what
    greedy decoding gives; `option_ids` has its ids, or None if the tokenizer lacks a character of it.
    """
    logprobs = [logprob for logprob, _ in likelihoods]
    parts = {}
    for name, kind in CASE_SCORES.items():
        value = kind.score(case, logprobs, output)
        if value is not None:
            parts[name] = value
    chosen = None
    if case.choices and max(logprobs) > -math.inf:
        chosen = logprobs.index(max(logprobs))
    result = CaseResult(
        score=sum(parts.values()) / len(parts),
        parts=parts,
        continuation=output,
        logprobs=logprobs,
        n_tokens=0,
        n_bytes=0,
        greedy_match=None,
        chosen=chosen,
    )
    if case.target is not None:
        result.n_tokens = len(option_ids[case.right] or [])
        result.n_bytes = len(case.target.encode())
        result.greedy_match = likelihoods[case.right][1]
    return result
