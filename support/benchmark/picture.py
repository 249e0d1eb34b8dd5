"""The roofline: what the machine can do at most, and what was reached under that roof.

A program that does few operations for each byte it reads waits for the memory: the roof rises with the number
of operations a byte. From some number on the processor is the limit: the roof is flat. How far a point is
below the roof is what a better program could still gain.
"""

from pathlib import Path

from support.benchmark.contest import Row
from support.benchmark.machine import Machine
from support.plots import load_pyplot, save_figure

COLORS = {"train": "#2f6f9f", "prefill": "#7a4fa0", "decode": "#b3452c"}


def draw_roofline(stem: Path, machine: Machine, rows: list[Row]) -> Path:
    """Draw `stem`.svg and .png: a roof for each dtype, and a point for each row that counts operations and
    bytes (weights that are read); ours filled, opponents as rings. Returns the SVG's path."""
    points = [row for row in rows if row["flops_per_unit"] and row["bytes_per_unit"]]
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensities = [row["flops_per_unit"] / row["bytes_per_unit"] for row in points]
    ridge = max(machine.matmul.values()) / machine.bandwidth  # where the two limits meet
    ends = min([0.25, *intensities]) / 2, max([8 * ridge, *intensities]) * 2
    for (name, peak), style in zip(machine.matmul.items(), ("-", "--"), strict=True):
        x = [ends[0], peak / machine.bandwidth, ends[1]]
        y = [ends[0] * machine.bandwidth, peak, peak]
        axes.plot(x, [flops / 1e9 for flops in y], style, color="#555555", label=f"limit in {name}")
    for row, intensity in zip(points, intensities, strict=True):
        reached = row["flops_per_unit"] * row["units_per_second"] / 1e9
        color = COLORS.get(row["task"], "#555555")
        face = color if row["ours_as_fast"] is None else "none"
        axes.plot(intensity, reached, "o", color=color, markerfacecolor=face)
        axes.annotate(
            f"{row['task']} {row['side']}",
            (intensity, reached),
            textcoords="offset points",
            xytext=(6, -3),
            fontsize=7,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte of weights", ylabel="GFLOP/s")
    axes.set_title(f"{machine.label}: {machine.bandwidth / 1e9:.1f} GB/s", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    save_figure(figure, stem)
    pyplot.close(figure)
    return stem.with_suffix(".svg")
