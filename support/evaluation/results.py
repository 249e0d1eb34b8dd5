"""What an evaluation of checkpoints found, on cases or on a validation text, as plain values.

evaluate_checkpoints.py makes them; result_files.py, report.py and pictures.py show them.
"""

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

    A case can ask for several scores; `parts` holds each, as in {"target": 0.41, "contains": 1.0}.
    """

    score: float  # 0 to 1: the mean of the parts
    parts: dict[str, float]
    continuation: str | None  # greedy output after the prompt; None if none was made
    logprobs: list[float]  # natural logarithm, for each choice, or for the target alone; [] without a target
    n_tokens: int  # of the target, in this checkpoint's tokenizer; 0 without a target
    n_bytes: int  # of the target, in UTF-8; 0 without a target
    greedy_match: bool | None  # whether greedy decoding gives the target; None without a target
    chosen: int | None  # index of the likeliest choice; None without choices


@dataclass
class CheckpointResult:
    """One checkpoint on all cases, and its rank among the others."""

    file: str
    names: list[str]  # other names of the same content: "best", "last", "final"
    run: str  # the folder the file is in
    step: int | None
    tokens: int | None  # seen in training
    n_params: int
    tokenizer: str  # in words: "bpe 1024"
    results: list[CaseResult]  # in the order of Evaluation.cases
    score: float | None = None  # weighted mean over the cases; like low and high, None without cases
    low: float | None = None  # the 95% bootstrap interval of the score: from low to high
    high: float | None = None
    rank: int = 0  # from 1; equal scores share a rank
    tied: bool = False  # another checkpoint has the same rank
    same_as_first: bool | None = None  # whether these cases cannot tell it from the first; None without cases
    categories: dict[str, float] = field(default_factory=dict)  # the score on the cases of each category
    val_loss: float | None = None
    bits_per_byte: float | None = None

    @property
    def ranked_by(self) -> float:
        """The number that decides the rank: the score, or without cases the bits per byte."""
        return self.bits_per_byte if self.score is None else self.score


@dataclass
class Evaluation:
    """Checkpoints ranked on cases, or without cases by their loss in bits per byte."""

    cases: list[Case]  # empty if only --val was asked for
    checkpoints: list[CheckpointResult]  # sorted by rank
    chance: dict[str, float | None]  # the score of guessing in each category, see `chance_of`
    seed: int
    command: str
    versions: dict[str, str]
    date: str

    def short_runs(self) -> list[str]:
        """Each checkpoint's folder without the part that all share: runs/small and runs/large are small and
        large; a single folder is ""."""
        runs = [os.path.normpath(checkpoint.run or ".") for checkpoint in self.checkpoints]
        try:
            common = os.path.commonpath(set(runs))
        except ValueError:  # no runs, or absolute paths among relative ones
            return runs
        if not common:
            return runs
        return [PurePath(run).relative_to(common).as_posix().removeprefix(".") for run in runs]

    def short_names(self) -> list[str]:
        """A short name for each checkpoint: small/step-00000100.ckpt, or the file's name alone."""
        return [
            (PurePath(run) / PurePath(c.file).name).as_posix()
            for run, c in zip(self.short_runs(), self.checkpoints, strict=True)
        ]
