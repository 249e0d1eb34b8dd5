"""Pictures of a run, as SVG and PNG, drawn without a display."""

import json
import math
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import Any

from support.cli import printable
from support.disk import atomic_write
from support.evaluation import CheckpointResult, Evaluation

COLORS = ["#2f6f9f", "#c2572b", "#3c8a4e", "#8258a8", "#a3803a", "#b5527f", "#4a9a9c", "#666666"]  # of runs; used again from the start


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def save_figure(figure: Any, stem: Path) -> None:
    """`stem`.svg and `stem`.png, each whole or not at all; the SVG is the same bytes for the same data."""
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        with atomic_write(stem.with_suffix(suffix)) as file:
            figure.savefig(file, format=suffix[1:], metadata=metadata, dpi=150)


def load_pyplot() -> Any:
    """matplotlib.pyplot, set up to draw into files and to give the SVG's parts the same names each time."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "tiny-transformer"
    from matplotlib import pyplot

    return pyplot


def draw_loss(folder: Path) -> Path | None:
    """loss.svg and loss.png in a run's folder: training and validation loss over steps, the learning rate below.
    Returns the SVG's path, or None if there is nothing to draw yet."""
    rows = read_metrics(folder / "metrics.jsonl")
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    if not train:
        return None
    pyplot = load_pyplot()
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained")
    top.plot([r["step"] for r in train], [r["loss"] for r in train], color="#7aa6c2", linewidth=1, label="train")
    again = [r for r in val if "train_eval_loss" in r]
    if again:
        label = "train, measured as validation"
        top.plot([r["step"] for r in again], [r["train_eval_loss"] for r in again], color="#2f6f9f", marker=".", linestyle="--", label=label)
    if val:
        top.plot([r["step"] for r in val], [r["val_loss"] for r in val], color="#b3452c", marker="o", markersize=3, label="validation")
        best = min(val, key=lambda r: r["val_loss"])
        top.annotate(f"best {best['val_loss']:.3f}", (best["step"], best["val_loss"]), textcoords="offset points", xytext=(-4, 8), ha="right")
    top.set_ylabel("loss (nats per token)")
    top.grid(alpha=0.3)
    top.legend()
    bottom.plot([r["step"] for r in train], [r["lr"] for r in train], color="#555555", linewidth=1)
    bottom.set_xlabel("step")
    bottom.set_ylabel("learning rate")
    bottom.grid(alpha=0.3)
    save_figure(figure, folder / "loss")
    pyplot.close(figure)
    return folder / "loss.svg"


def draw_scores(stem: Path, evaluation: Evaluation) -> Path:
    """scores.svg and scores.png for a stem that ends in `scores`; returns the SVG's path.

    Score over step, a line for each run, with 95% intervals; below it, for 2 to 8 categories, the same for each category.
    Without cases, the bits per byte of the validation text in place of the score.
    Where a step is missing or all are equal, a bar for each checkpoint.
    """
    pyplot = load_pyplot()
    steps = [checkpoint.step for checkpoint in evaluation.checkpoints]
    with pyplot.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a name in letters that the font lacks shows boxes
        figure = draw_bars(pyplot, evaluation) if None in steps or len(set(steps)) < 2 else draw_lines(pyplot, evaluation)
        save_figure(figure, stem)
    pyplot.close(figure)
    return stem.with_suffix(".svg")


def whiskers(checkpoints: list[CheckpointResult]) -> list[list[float]]:
    """How far each interval reaches below and above the score, as matplotlib wants it; nowhere without a score."""
    if any(c.score is None for c in checkpoints):
        return [[0.0] * len(checkpoints)] * 2
    return [[max(0.0, c.score - c.low) for c in checkpoints], [max(0.0, c.high - c.score) for c in checkpoints]]


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
    axes.errorbar([c.value for c in shown], places, xerr=whiskers(shown), fmt="none", ecolor="#333333", capsize=3, linewidth=1)
    axes.set_yticks(places, [shorten(name, 48) for name in evaluation.short_names()[::-1]])
    axes.set_xlabel(measure(evaluation))
    axes.set_xlim(0, 1 if evaluation.cases else None)
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_lines(pyplot: Any, evaluation: Evaluation) -> Any:
    runs: dict[str, list[CheckpointResult]] = {}
    for run, checkpoint in zip(evaluation.short_runs(), evaluation.checkpoints, strict=True):
        runs.setdefault(run, []).append(checkpoint)
    lines: list[Line] = [(run, sorted(runs[run], key=lambda c: c.step), COLORS[i % len(COLORS)]) for i, run in enumerate(sorted(runs))]

    categories = list(evaluation.chance) if 2 <= len(evaluation.chance) <= 8 else []
    rows = math.ceil(len(categories) / 4)
    figure = pyplot.figure(figsize=(8, 3.8 + 1.9 * rows), layout="constrained")
    above, *below = figure.subfigures(1 + bool(rows), 1, height_ratios=[3.8, 1.9 * rows] if rows else None, squeeze=False)[:, 0]
    draw_total(above, lines, measure(evaluation))
    if rows:
        draw_categories(below[0], lines, {category: evaluation.chance[category] for category in categories}, rows)
    return figure


def draw_total(figure: Any, lines: list[Line], label: str) -> None:
    from matplotlib.transforms import ScaledTranslation

    axes = figure.subplots()
    for i, (run, checkpoints, color) in enumerate(lines):
        # Runs stand a few points beside each other, or those of equal steps would hide each other's intervals.
        aside = ScaledTranslation((i - (len(lines) - 1) / 2) * min(5, 30 / len(lines)) / 72, 0, axes.figure.dpi_scale_trans)
        steps, values = [c.step for c in checkpoints], [c.value for c in checkpoints]
        style = {"color": color, "marker": "o", "markersize": 4, "capsize": 3, "elinewidth": 1}
        drawn = axes.errorbar(steps, values, yerr=whiskers(checkpoints), label=shorten(run or "(this folder)", 40), **style)
        for artist in drawn.get_children():
            artist.set_transform(artist.get_transform() + aside)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=9, frameon=False)


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


def draw_mask(stem: Path, batches: dict[str, dict[str, Any]], decode: Any) -> Path:
    """`stem`.svg and .png: each named batch as a table of tokens, a row a sequence, coloured by what it is for."""
    pyplot = load_pyplot()
    kinds = {
        "prompt: given, not trained on": "#d5dde3",
        "response: trained on": "#f2b880",
        "its end (EOS): trained on": "#c2572b",
        "padding": "white",
    }
    sizes = {name: batch["labels"].shape for name, batch in batches.items()}
    width, height = max(T for _, T in sizes.values()) + 1, sum(B for B, _ in sizes.values())
    cell = min(0.42, 18 / width)  # inches
    with pyplot.rc_context({"text.parse_math": False, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        rows = [B for B, _ in sizes.values()]
        figure, axes = pyplot.subplots(len(batches), 1, figsize=(max(8, cell * width), 0.42 * height + 1.4), height_ratios=rows, squeeze=False)
        for axis, (name, batch) in zip(axes[:, 0], batches.items(), strict=True):
            draw_mask_rows(axis, batch, decode if cell > 0.22 else None, list(kinds.values()), width)
            axis.set_title(name, loc="left", fontsize=9)
        handles = [pyplot.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="#999999") for color in kinds.values()]
        figure.legend(handles, kinds, loc="lower center", ncols=len(kinds), fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0.5 / (0.42 * height + 1.4), 1, 1))
        save_figure(figure, stem)
    pyplot.close(figure)
    return stem.with_suffix(".svg")


def draw_mask_rows(axis: Any, batch: dict[str, Any], decode: Any, colors: list[str], width: int) -> None:
    """One batch: a cell for each token, input or label, with a bar for EOS, which is a label only, where a pair ends.
    Without `decode` the cells stay empty."""
    from matplotlib.patches import Rectangle

    for row, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        segments = batch["segments"][row].tolist() if "segments" in batch else [0] * len(ids)
        begins = [j for j in range(len(ids)) if j == 0 or segments[j] != segments[j - 1]]
        used = max(j for j in range(len(ids)) if labels[j] != -100) + 1
        for j, id in enumerate(ids):
            before = None if j in begins else labels[j - 1]
            kind = 3 if j >= used else 1 if before == id else 0
            ends = j + 1 in begins or j + 1 == used
            axis.add_patch(Rectangle((j, row), 0.96, 0.96, facecolor=colors[kind], edgecolor="#cccccc", linewidth=0.3))
            if decode and kind < 3:
                axis.text(j + 0.48, row + 0.5, decode([id]).replace("\n", "\\n")[:7], ha="center", va="center", fontsize=5, clip_on=True)
            if ends and j < used:
                axis.plot([j + 0.96, j + 0.96], [row, row + 0.96], color=colors[2], linewidth=3)
    axis.set(xlim=(0, width), ylim=(len(batch["input_ids"]), 0), xticks=[], yticks=[])
    axis.set_frame_on(False)
