"""Made-up evaluations with any number of checkpoints and every kind of case, for tests of reports and
plots."""

import math
import random
from typing import Any

from support.evaluation.case_files import Case
from support.evaluation.results import CaseResult, CheckpointResult, Evaluation

CATEGORIES = ("geography", "spelling", "style")


def make_case(number: int, **changes: Any) -> Case:
    """A case that has in turn only a target, four choices, or a text that the answer should contain. It is
    not validated, so a test may put anything into it."""
    kinds = (
        {"target": " Paris"},
        {"target": " Sea", "choices": [" Sea", " Moon", " Sky", " House"]},
        {"contains": ["river"], "regex": "^ The", "category": "style"},
    )
    plain = {
        "target": None,
        "choices": None,
        "contains": [],
        "regex": None,
        "category": CATEGORIES[number % 2],
        "weight": 1.0,
        "max_new_tokens": 24,
    }
    return Case.model_construct(
        **plain
        | {"id": f"case-{number}", "file": "cases/made_up.yaml", "prompt": f"Sentence {number} is"}
        | kinds[number % 3]
        | changes
    )


def make_result(case: Case, draw: random.Random) -> CaseResult:
    logprobs = [-draw.uniform(0.1, 9) for _ in case.choices or [case.target] if case.target]
    chosen = logprobs.index(max(logprobs)) if case.choices else None
    parts = (
        {"target": math.exp(logprobs[0] / 2)}
        if case.target
        else {"contains": float(draw.random() < 0.5), "regex": 1.0}
    )
    if case.choices:
        parts = {"choices": float(case.choices[chosen] == case.target)}
    length = len((case.target or "").encode())
    greedy = draw.random() < 0.5 if case.target else None
    text = (
        " The river ran by the old house,\n\nand all who lived in it were asleep.  It was late in the year."
    )
    return CaseResult(
        sum(parts.values()) / len(parts), parts, text, logprobs, 2 if length else 0, length, greedy, chosen
    )


def make_evaluation(
    n_cases: int = 12, steps: tuple[int | None, ...] = (100, 200, 300), runs: tuple[str, ...] = ("runs/a",)
) -> Evaluation:
    draw = random.Random(1)
    cases = [make_case(number) for number in range(n_cases)]
    checkpoints = []
    for run in runs:
        for step in steps:
            results = [make_result(case, draw) for case in cases]
            made = CheckpointResult(
                f"{run}/step-{step or 0:08}.ckpt",
                [],
                run,
                step,
                step and step * 512,
                1_234_567,
                "bpe 1024",
                results,
            )
            made.score = sum(result.score for result in results) / n_cases
            made.low, made.high = made.score - 0.08, made.score + 0.1
            for category in dict.fromkeys(case.category for case in cases):
                scores = [
                    result.score
                    for case, result in zip(cases, results, strict=True)
                    if case.category == category
                ]
                made.categories[category] = sum(scores) / len(scores)
            checkpoints.append(made)
    checkpoints.sort(key=lambda c: -c.score)
    for i, made in enumerate(checkpoints):
        made.rank, made.same_as_first = i + 1, made.high > checkpoints[0].score
    chance = {case.category: 0.25 if case.category != "style" else None for case in cases}
    return Evaluation(
        cases,
        checkpoints,
        chance,
        42,
        "python3 evaluate_checkpoints.py --cases cases",
        {"torch": "2.5.1"},
        "2026-01-31 12:00",
    )
