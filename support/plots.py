"""Pictures of a run, as SVG and PNG, drawn without a display."""

import json
from pathlib import Path
from typing import Any

from support.checkpoint import atomic_write


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
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


def draw_loss(folder: Path) -> Path | None:
    """loss.svg and loss.png in a run's folder: training and validation loss over steps, the learning rate below.
    Returns the SVG's path, or None if there is nothing to draw yet."""
    rows = read_metrics(folder / "metrics.jsonl")
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    if not train:
        return None
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "tiny-transformer"
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained")
    top.plot([r["step"] for r in train], [r["loss"] for r in train], color="#7aa6c2", linewidth=1, label="train")
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
