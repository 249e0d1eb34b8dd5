"""Pictures of a run, as SVG and PNG, drawn without a display: its curves, and what its masks train on."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.files.atomic import atomic_write

TOKEN_COLORS = {  # what a token of a batch is there for, and its color
    "prompt: given, not trained on": "#d5dde3",
    "response: trained on": "#f2b880",
    "its end (EOS): trained on": "#c2572b",
    "padding": "white",
}
PROMPT, RESPONSE, END, PADDING = TOKEN_COLORS.values()
ROW_HEIGHT, MAX_CELL_WIDTH = 0.42, 0.42  # inches
MIN_CELL_WIDTH_FOR_TEXT = 0.22  # inches: in narrower cells no text can be read


# ---- reading and saving --------------------------------------------------------------------------


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that was cut off by a kill; [] if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def load_pyplot() -> Any:
    """matplotlib.pyplot, set up to draw into files and to give the SVG's parts the same names each time."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "tiny-transformer"
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, stem: Path) -> None:
    """Write `stem`.svg and `stem`.png, each whole or not at all; the same data gives the same SVG bytes."""
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        with atomic_write(stem.with_suffix(suffix)) as file:
            figure.savefig(file, format=suffix[1:], metadata=metadata, dpi=150)


# ---- curves --------------------------------------------------------------------------------------


def draw_loss(folder: Path) -> Path | None:
    """Draw loss.svg and loss.png in a run's folder: training and validation loss over the steps, below them
    the learning rate. Returns the SVG's path, or None if there is nothing to draw yet."""
    rows = read_metrics(folder / "metrics.jsonl")
    train = [row for row in rows if "loss" in row]
    if not train:
        return None
    pyplot = load_pyplot()
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    draw_losses(top, train, [row for row in rows if "val_loss" in row])
    draw_curve(bottom, train, "lr", color="#555555", linewidth=1)
    bottom.set_xlabel("step")
    bottom.set_ylabel("learning rate")
    bottom.grid(alpha=0.3)
    save_figure(figure, folder / "loss")
    pyplot.close(figure)
    return folder / "loss.svg"


def draw_curve(axes: Any, rows: list[dict[str, Any]], key: str, **style: Any) -> None:
    """A line through the values of `key` over the steps."""
    axes.plot([row["step"] for row in rows], [row[key] for row in rows], **style)


def draw_losses(axes: Any, train: list[dict[str, Any]], val: list[dict[str, Any]]) -> None:
    """The training loss, the validation loss with its best value marked, and the loss on training text
    measured as in validation, if there are any."""
    draw_curve(axes, train, "loss", color="#7aa6c2", linewidth=1, label="train")
    train_eval = [row for row in val if "train_eval_loss" in row]
    if train_eval:
        style = {"color": "#2f6f9f", "marker": ".", "linestyle": "--"}
        draw_curve(axes, train_eval, "train_eval_loss", label="train, measured as validation", **style)
    if val:
        style = {"color": "#b3452c", "marker": "o", "markersize": 3}
        draw_curve(axes, val, "val_loss", label="validation", **style)
        best = min(val, key=lambda row: row["val_loss"])
        axes.annotate(
            f"best {best['val_loss']:.3f}",
            (best["step"], best["val_loss"]),
            textcoords="offset points",
            xytext=(-4, 8),
            ha="right",
        )
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()


# ---- masks ---------------------------------------------------------------------------------------


def draw_mask(stem: Path, batches: dict[str, dict[str, Any]], decode: Callable[[list[int]], str]) -> Path:
    """Draw `stem`.svg and .png: each named batch as a table of tokens, one row per sequence, colored by what
    the tokens are there for. Returns the SVG's path."""
    pyplot = load_pyplot()
    n_rows = [batch["labels"].shape[0] for batch in batches.values()]
    n_columns = max(batch["labels"].shape[1] for batch in batches.values()) + 1
    cell_width = min(MAX_CELL_WIDTH, 18 / n_columns)  # inches
    width = max(8, cell_width * n_columns)
    height = ROW_HEIGHT * sum(n_rows) + 1.4
    with pyplot.rc_context({"text.parse_math": False, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure, axes = pyplot.subplots(
            len(batches), 1, figsize=(width, height), height_ratios=n_rows, squeeze=False
        )
        for panel, (name, batch) in zip(axes[:, 0], batches.items(), strict=True):
            draw_mask_rows(panel, batch, decode if cell_width > MIN_CELL_WIDTH_FOR_TEXT else None, n_columns)
            panel.set_title(name, loc="left", fontsize=9)
        boxes = [
            pyplot.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="#999999")
            for color in TOKEN_COLORS.values()
        ]
        style = {"loc": "lower center", "ncols": len(boxes), "fontsize": 8, "frameon": False}
        figure.legend(boxes, TOKEN_COLORS, **style)
        figure.tight_layout(rect=(0, 0.5 / height, 1, 1))
        save_figure(figure, stem)
    pyplot.close(figure)
    return stem.with_suffix(".svg")


def draw_mask_rows(
    axes: Any, batch: dict[str, Any], decode: Callable[[list[int]], str] | None, n_columns: int
) -> None:
    """One batch. Where a pair ends, a bar stands for EOS, which is only a label. Without `decode` the cells
    stay empty."""
    n_rows = len(batch["input_ids"])
    segments = batch.get("segments")
    for row in range(n_rows):
        ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
        pairs = [0] * len(ids) if segments is None else segments[row].tolist()
        begins = {j for j in range(len(ids)) if j == 0 or pairs[j] != pairs[j - 1]}
        n_used = max(j for j in range(len(ids)) if labels[j] != -100) + 1  # what follows is padding
        for j, id in enumerate(ids):
            if j >= n_used:
                color = PADDING
            elif j not in begins and labels[j - 1] == id:  # a label of the position before
                color = RESPONSE
            else:
                color = PROMPT
            draw_cell(axes, row, j, color)
            if decode and color != PADDING:
                draw_token(axes, row, j, decode([id]))
            is_last = j + 1 in begins or j + 1 == n_used
            if is_last and j < n_used:
                axes.plot([j + 0.96, j + 0.96], [row, row + 0.96], color=END, linewidth=3)
    axes.set(xlim=(0, n_columns), ylim=(n_rows, 0), xticks=[], yticks=[])
    axes.set_frame_on(False)


def draw_cell(axes: Any, row: int, column: int, color: str) -> None:
    from matplotlib.patches import Rectangle

    style = {"facecolor": color, "edgecolor": "#cccccc", "linewidth": 0.3}
    axes.add_patch(Rectangle((column, row), 0.96, 0.96, **style))


def draw_token(axes: Any, row: int, column: int, text: str) -> None:
    shown = text.replace("\n", "\\n")[:7]
    style = {"ha": "center", "va": "center", "fontsize": 5, "clip_on": True}
    axes.text(column + 0.48, row + 0.5, shown, **style)
