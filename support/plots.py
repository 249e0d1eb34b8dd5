"""Pictures of a run, as SVG and PNG, drawn without a display."""

import json
import warnings
from pathlib import Path
from typing import Any

from support.files.atomic import atomic_write


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
    """loss.svg and loss.png in a run's folder: training and validation loss over steps, the learning rate
    below. Returns the SVG's path, or None if there is nothing to draw yet."""
    rows = read_metrics(folder / "metrics.jsonl")
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    if not train:
        return None
    pyplot = load_pyplot()
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    top.plot(
        [r["step"] for r in train], [r["loss"] for r in train], color="#7aa6c2", linewidth=1, label="train"
    )
    again = [r for r in val if "train_eval_loss" in r]
    if again:
        label = "train, measured as validation"
        top.plot(
            [r["step"] for r in again],
            [r["train_eval_loss"] for r in again],
            color="#2f6f9f",
            marker=".",
            linestyle="--",
            label=label,
        )
    if val:
        top.plot(
            [r["step"] for r in val],
            [r["val_loss"] for r in val],
            color="#b3452c",
            marker="o",
            markersize=3,
            label="validation",
        )
        best = min(val, key=lambda r: r["val_loss"])
        top.annotate(
            f"best {best['val_loss']:.3f}",
            (best["step"], best["val_loss"]),
            textcoords="offset points",
            xytext=(-4, 8),
            ha="right",
        )
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


def draw_mask(stem: Path, batches: dict[str, dict[str, Any]], decode: Any) -> Path:
    """`stem`.svg and .png: each named batch as a table of tokens, a row a sequence, coloured by what it is
    for."""
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
        figure, axes = pyplot.subplots(
            len(batches),
            1,
            figsize=(max(8, cell * width), 0.42 * height + 1.4),
            height_ratios=rows,
            squeeze=False,
        )
        for axis, (name, batch) in zip(axes[:, 0], batches.items(), strict=True):
            draw_mask_rows(axis, batch, decode if cell > 0.22 else None, list(kinds.values()), width)
            axis.set_title(name, loc="left", fontsize=9)
        handles = [
            pyplot.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="#999999") for color in kinds.values()
        ]
        figure.legend(handles, kinds, loc="lower center", ncols=len(kinds), fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0.5 / (0.42 * height + 1.4), 1, 1))
        save_figure(figure, stem)
    pyplot.close(figure)
    return stem.with_suffix(".svg")


def draw_mask_rows(axis: Any, batch: dict[str, Any], decode: Any, colors: list[str], width: int) -> None:
    """One batch: a cell for each token, input or label, with a bar for EOS, which is a label only, where a
    pair ends. Without `decode` the cells stay empty."""
    from matplotlib.patches import Rectangle

    for row, (ids, labels) in enumerate(
        zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ):
        segments = batch["segments"][row].tolist() if "segments" in batch else [0] * len(ids)
        begins = [j for j in range(len(ids)) if j == 0 or segments[j] != segments[j - 1]]
        used = max(j for j in range(len(ids)) if labels[j] != -100) + 1
        for j, id in enumerate(ids):
            before = None if j in begins else labels[j - 1]
            kind = 3 if j >= used else 1 if before == id else 0
            ends = j + 1 in begins or j + 1 == used
            axis.add_patch(
                Rectangle((j, row), 0.96, 0.96, facecolor=colors[kind], edgecolor="#cccccc", linewidth=0.3)
            )
            if decode and kind < 3:
                axis.text(
                    j + 0.48,
                    row + 0.5,
                    decode([id]).replace("\n", "\\n")[:7],
                    ha="center",
                    va="center",
                    fontsize=5,
                    clip_on=True,
                )
            if ends and j < used:
                axis.plot([j + 0.96, j + 0.96], [row, row + 0.96], color=colors[2], linewidth=3)
    axis.set(xlim=(0, width), ylim=(len(batch["input_ids"]), 0), xticks=[], yticks=[])
    axis.set_frame_on(False)
