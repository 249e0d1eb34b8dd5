"""Pictures of an evaluation: the scores (or losses) of checkpoints as lines or bars."""

import math
import warnings
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from support.evaluation.results import CheckpointResult, Evaluation
from support.messages import printable
from support.plots import load_pyplot, save_figure

RUN_COLORS = [  # used again from the start if there are more runs
    "#2f6f9f",
    "#c2572b",
    "#3c8a4e",
    "#8258a8",
    "#a3803a",
    "#b5527f",
    "#4a9a9c",
    "#666666",
]


def draw_scores(stem: Path, evaluation: Evaluation) -> Path:
    """scores.svg and scores.png for a stem that ends in `scores`; returns the SVG's path.

    The score over the step, a line for each run, with 95% intervals; below it, for 2 to 8 categories, the
    same for each category. Without cases, the bits per byte of the validation text instead of the score. If a
    step is missing or all are equal, a bar for each checkpoint.
    """
    pyplot = load_pyplot()
    steps = {checkpoint.step for checkpoint in evaluation.checkpoints}
    with pyplot.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        draw = draw_bars if None in steps or len(steps) < 2 else draw_lines
        figure = draw(pyplot, evaluation)
        save_figure(figure, stem)
    pyplot.close(figure)
    return stem.with_suffix(".svg")


def error_bars(checkpoints: list[CheckpointResult]) -> list[list[float]]:
    """How far each interval reaches below and above the score, as matplotlib wants it; zeros without a
    score."""
    if any(c.score is None for c in checkpoints):
        return [[0.0] * len(checkpoints)] * 2
    below = [max(0.0, c.score - c.low) for c in checkpoints]
    above = [max(0.0, c.high - c.score) for c in checkpoints]
    return [below, above]


def value_label(evaluation: Evaluation) -> str:
    """The label of the axis with the values."""
    return "score, with 95% interval" if evaluation.cases else "bits per byte of the validation text"


def shorten(text: str, length: int) -> str:
    """A text of at most `length` characters: the end of a long one, where file names differ."""
    text = printable(text)
    return text if len(text) <= length else "…" + text[1 - length :]


@dataclass
class RunLine:
    """The checkpoints of one run, by step, and the color they are drawn in."""

    run: str
    checkpoints: list[CheckpointResult]
    color: str


def draw_bars(pyplot: Any, evaluation: Evaluation) -> Any:
    """A figure with a bar for each checkpoint."""
    checkpoints = evaluation.checkpoints[::-1]  # bars are drawn from the bottom up
    names = [shorten(name, 48) for name in evaluation.short_names()[::-1]]
    values = [c.ranked_by for c in checkpoints]
    heights = range(len(checkpoints))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.4 * len(checkpoints)), layout="constrained")
    axes.barh(heights, values, height=0.6, color=RUN_COLORS[0], alpha=0.55)
    style = {"fmt": "none", "ecolor": "#333333", "capsize": 3, "linewidth": 1}
    axes.errorbar(values, heights, xerr=error_bars(checkpoints), **style)
    axes.set_yticks(heights, names)
    axes.set_xlabel(value_label(evaluation))
    axes.set_xlim(0, 1 if evaluation.cases else None)
    axes.grid(axis="x", alpha=0.3)
    return figure


def run_lines(evaluation: Evaluation) -> list[RunLine]:
    """One line for each run, by name."""
    runs: dict[str, list[CheckpointResult]] = {}
    for run, checkpoint in zip(evaluation.short_runs(), evaluation.checkpoints, strict=True):
        runs.setdefault(run, []).append(checkpoint)
    return [
        RunLine(run, sorted(runs[run], key=lambda c: c.step), RUN_COLORS[i % len(RUN_COLORS)])
        for i, run in enumerate(sorted(runs))
    ]


def draw_lines(pyplot: Any, evaluation: Evaluation) -> Any:
    """A figure with a line for each run, and a panel for each of 2 to 8 categories."""
    lines = run_lines(evaluation)
    n_categories = len(evaluation.chance)
    if not 2 <= n_categories <= 8:
        figure = pyplot.figure(figsize=(8, 3.8), layout="constrained")
        draw_total(figure.subfigures(1, 1, squeeze=False)[0, 0], lines, value_label(evaluation))
        return figure
    rows = math.ceil(n_categories / 4)
    heights = [3.8, 1.9 * rows]
    figure = pyplot.figure(figsize=(8, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    draw_total(above, lines, value_label(evaluation))
    draw_categories(below, lines, evaluation.chance, rows)
    return figure


def draw_total(figure: Any, lines: list[RunLine], label: str) -> None:
    """The score (or loss) over the step."""
    from matplotlib.transforms import ScaledTranslation

    axes = figure.subplots()
    points_apart = min(5, 30 / len(lines))
    for i, line in enumerate(lines):
        # Lines are drawn a few points apart, or runs with equal steps would hide each other's intervals.
        points_aside = (i - (len(lines) - 1) / 2) * points_apart
        aside = ScaledTranslation(points_aside / 72, 0, axes.figure.dpi_scale_trans)
        drawn = axes.errorbar(
            [c.step for c in line.checkpoints],
            [c.ranked_by for c in line.checkpoints],
            yerr=error_bars(line.checkpoints),
            label=shorten(line.run or "(this folder)", 40),
            color=line.color,
            marker="o",
            markersize=4,
            capsize=3,
            elinewidth=1,
        )
        for artist in drawn.get_children():
            artist.set_transform(artist.get_transform() + aside)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        handles_and_labels = axes.get_legend_handles_labels()
        figure.legend(*handles_and_labels, loc="outside upper left", ncols=2, fontsize=9, frameon=False)


def draw_categories(figure: Any, lines: list[RunLine], chance: dict[str, float | None], rows: int) -> None:
    """A panel for each category: its score over the step, and what guessing would score."""
    columns = math.ceil(len(chance) / rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for i, (axes, category) in enumerate(zip_longest(panels, chance)):
        if category is None:  # a panel left over in the last row
            axes.set_axis_off()
            continue
        for line in lines:
            scores = [c.categories.get(category, math.nan) for c in line.checkpoints]
            axes.plot([c.step for c in line.checkpoints], scores, color=line.color, marker=".", linewidth=1)
        if chance[category] is not None:
            axes.axhline(chance[category], color="#777777", linewidth=1, linestyle=":")
        axes.set_title(shorten(category, 30), fontsize=9)
        axes.set_ylim(-0.04, 1.04)
        axes.tick_params(labelsize=8, labelbottom=i + columns >= len(chance))
        axes.grid(alpha=0.3)
    has_chance = any(value is not None for value in chance.values())
    figure.supxlabel("step (dotted: the score of guessing)" if has_chance else "step", fontsize=9)
