"""Pictures of an evaluation: scores of checkpoints as lines or bars."""

import math
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import Any

from support.evaluation.results import CheckpointResult, Evaluation
from support.messages import printable
from support.plots import load_pyplot, save_figure

COLORS = [
    "#2f6f9f",
    "#c2572b",
    "#3c8a4e",
    "#8258a8",
    "#a3803a",
    "#b5527f",
    "#4a9a9c",
    "#666666",
]  # of runs; used again from the start


def draw_scores(stem: Path, evaluation: Evaluation) -> Path:
    """scores.svg and scores.png for a stem that ends in `scores`; returns the SVG's path.

    Score over step, a line for each run, with 95% intervals; below it, for 2 to 8 categories, the same for
    each category. Without cases, the bits per byte of the validation text in place of the score. Where a step
    is missing or all are equal, a bar for each checkpoint.
    """
    pyplot = load_pyplot()
    steps = [checkpoint.step for checkpoint in evaluation.checkpoints]
    with pyplot.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from", UserWarning
        )  # a name in letters that the font lacks shows boxes
        figure = (
            draw_bars(pyplot, evaluation)
            if None in steps or len(set(steps)) < 2
            else draw_lines(pyplot, evaluation)
        )
        save_figure(figure, stem)
    pyplot.close(figure)
    return stem.with_suffix(".svg")


def whiskers(checkpoints: list[CheckpointResult]) -> list[list[float]]:
    """How far each interval reaches below and above the score, as matplotlib wants it; nowhere without a
    score."""
    if any(c.score is None for c in checkpoints):
        return [[0.0] * len(checkpoints)] * 2
    return [
        [max(0.0, c.score - c.low) for c in checkpoints],
        [max(0.0, c.high - c.score) for c in checkpoints],
    ]


def measure(evaluation: Evaluation) -> str:
    """What an axis shows."""
    return "score, with 95% interval" if evaluation.cases else "bits per byte of the validation text"


def shorten(text: str, length: int) -> str:
    """The end of a long text, where file names differ."""
    text = printable(text)
    return text if len(text) <= length else "…" + text[1 - length :]


Line = tuple[str, list[CheckpointResult], str]  # a run, its checkpoints by step, a color


def draw_bars(pyplot: Any, evaluation: Evaluation) -> Any:
    shown = evaluation.checkpoints[::-1]  # bars are drawn from below: the first comes last
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.4 * len(shown)), layout="constrained")
    places = range(len(shown))
    axes.barh(places, [c.value for c in shown], height=0.6, color=COLORS[0], alpha=0.55)
    axes.errorbar(
        [c.value for c in shown],
        places,
        xerr=whiskers(shown),
        fmt="none",
        ecolor="#333333",
        capsize=3,
        linewidth=1,
    )
    axes.set_yticks(places, [shorten(name, 48) for name in evaluation.short_names()[::-1]])
    axes.set_xlabel(measure(evaluation))
    axes.set_xlim(0, 1 if evaluation.cases else None)
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_lines(pyplot: Any, evaluation: Evaluation) -> Any:
    runs: dict[str, list[CheckpointResult]] = {}
    for run, checkpoint in zip(evaluation.short_runs(), evaluation.checkpoints, strict=True):
        runs.setdefault(run, []).append(checkpoint)
    lines: list[Line] = [
        (run, sorted(runs[run], key=lambda c: c.step), COLORS[i % len(COLORS)])
        for i, run in enumerate(sorted(runs))
    ]

    categories = list(evaluation.chance) if 2 <= len(evaluation.chance) <= 8 else []
    rows = math.ceil(len(categories) / 4)
    figure = pyplot.figure(figsize=(8, 3.8 + 1.9 * rows), layout="constrained")
    above, *below = figure.subfigures(
        1 + bool(rows), 1, height_ratios=[3.8, 1.9 * rows] if rows else None, squeeze=False
    )[:, 0]
    draw_total(above, lines, measure(evaluation))
    if rows:
        draw_categories(
            below[0], lines, {category: evaluation.chance[category] for category in categories}, rows
        )
    return figure


def draw_total(figure: Any, lines: list[Line], label: str) -> None:
    from matplotlib.transforms import ScaledTranslation

    axes = figure.subplots()
    for i, (run, checkpoints, color) in enumerate(lines):
        # Runs stand a few points beside each other, or those of equal steps would hide each other's
        # intervals.
        aside = ScaledTranslation(
            (i - (len(lines) - 1) / 2) * min(5, 30 / len(lines)) / 72, 0, axes.figure.dpi_scale_trans
        )
        steps, values = [c.step for c in checkpoints], [c.value for c in checkpoints]
        style = {"color": color, "marker": "o", "markersize": 4, "capsize": 3, "elinewidth": 1}
        drawn = axes.errorbar(
            steps, values, yerr=whiskers(checkpoints), label=shorten(run or "(this folder)", 40), **style
        )
        for artist in drawn.get_children():
            artist.set_transform(artist.get_transform() + aside)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=9, frameon=False
        )


def draw_categories(figure: Any, lines: list[Line], chance: dict[str, float | None], rows: int) -> None:
    columns = math.ceil(len(chance) / rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for i, (axes, category) in enumerate(zip_longest(panels, chance)):
        if category is None:  # a place of the last row that is left over
            axes.set_axis_off()
            continue
        for _, checkpoints, color in lines:
            scores = [c.categories.get(category, math.nan) for c in checkpoints]
            axes.plot([c.step for c in checkpoints], scores, color=color, marker=".", linewidth=1)
        if chance[category] is not None:
            axes.axhline(chance[category], color="#777777", linewidth=1, linestyle=":")
        axes.set_title(shorten(category, 30), fontsize=9)
        axes.set_ylim(-0.04, 1.04)
        axes.tick_params(labelsize=8, labelbottom=i + columns >= len(chance))
        axes.grid(alpha=0.3)
    guessing = any(value is not None for value in chance.values())
    figure.supxlabel("step (dotted: what guessing among choices wins)" if guessing else "step", fontsize=9)
