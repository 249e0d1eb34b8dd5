"""What an evaluation of checkpoints found, on cases or on a validation text, as plain values: made by
evaluate_checkpoints.py, shown by support/evaluation/report.py and support/plots.py."""

from __future__ import annotations

import os.path
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.evaluation.case_files import Case


@dataclass
class CaseResult:
    """One checkpoint on one case.

    A case can ask for several things; `parts` has the score of each, as in {"target": 0.41, "contains": 1.0}.
    """

    score: float  # 0 to 1: the mean of the parts
    parts: dict[str, float]
    continuation: str | None  # greedy output behind the prompt; None where none was made
    logprobs: list[
        float
    ]  # natural log of the probability of each choice, or of the target alone (a list of one); [] if neither
    n_tokens: int  # of the target, in this checkpoint's tokenizer; 0 without a target
    n_bytes: int  # of the target, in UTF-8; 0 without a target
    greedy_match: bool | None  # the target is what greedy decoding gives; None without a target
    chosen: int | None  # index of the likeliest choice; None without choices


@dataclass
class CheckpointResult:
    """One checkpoint on all cases, and its place among the others."""

    file: str
    names: list[str]  # further names of the same content: "best", "last", "final"
    run: str  # the folder the file is in
    step: int | None
    tokens: int | None  # seen in training
    n_params: int
    tokenizer: str  # in words: "bpe 1024"
    results: list[CaseResult]  # in the order of Evaluation.cases
    score: float | None = None  # weighted mean over the cases; None without cases, and so are low and high
    low: float | None = None  # its 95% bootstrap interval
    high: float | None = None
    rank: int = 0  # from 1; equal scores share a rank
    tied: bool = False  # another one has the same rank
    same_as_first: bool | None = None  # cannot be told from the first with these cases; None without cases
    categories: dict[str, float] = field(default_factory=dict)  # the score on each category's cases alone
    val_loss: float | None = None
    bits_per_byte: float | None = None

    @property
    def value(self) -> float:
        """What its rank comes from: the score, or without cases the bits per byte."""
        return self.bits_per_byte if self.score is None else self.score


@dataclass
class Evaluation:
    """Checkpoints ranked on cases, or without cases by their loss in bits per byte."""

    cases: list[Case]  # none where --val alone was asked for
    checkpoints: list[CheckpointResult]  # sorted by rank
    chance: dict[
        str, float | None
    ]  # per category what guessing wins: 1/len(choices) of a case with choices, else 0; None without any choices
    seed: int
    command: str
    versions: dict[str, str]
    date: str

    def short_runs(self) -> list[str]:
        """Each checkpoint's folder without what all have in common: runs/small and runs/large are small
        and large; one alone is ""."""
        runs = [os.path.normpath(checkpoint.run or ".") for checkpoint in self.checkpoints]
        try:
            common = os.path.commonpath(set(runs))
        except ValueError:  # none at all, or an absolute path beside a relative one
            return runs
        return [
            PurePath(run).relative_to(common).as_posix().removeprefix(".") if common else run for run in runs
        ]

    def short_names(self) -> list[str]:
        """What to call each checkpoint where there is little room: small/step-00000100.ckpt, or the file's
        name alone."""
        return [
            (PurePath(run) / PurePath(c.file).name).as_posix()
            for run, c in zip(self.short_runs(), self.checkpoints, strict=True)
        ]
