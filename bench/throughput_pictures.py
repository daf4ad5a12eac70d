"""The pictures of bench/edit_throughput.py. A machine without matplotlib has its figures before they are drawn."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

__all__ = ["draw_curve", "draw_parts"]


def draw_parts(raw: list[dict[str, Any]], path: Path, title: str) -> None:
    """Bars: how many times as fast as plain editing each variant is."""
    from matplotlib.figure import Figure

    lines = [line for line in raw if "times_plain" in line and line["variant"] != "plain"]
    modes, tasks = (list(dict.fromkeys(line[name] for line in lines)) for name in ("mode", "task"))
    figure = Figure(figsize=(4.5 * len(tasks), 2.2 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(tasks), squeeze=False)
    for axes, panel in zip(panels.flat, itertools.product(modes, tasks), strict=True):
        shown = [line for line in lines if (line["mode"], line["task"]) == panel][::-1]
        bars = axes.barh([line["variant"] for line in shown], [line["times_plain"] for line in shown])
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.margins(x=0.25)
        axes.axvline(1.0, color="0.7", linewidth=0.8, zorder=0)
        axes.set(title=", ".join(panel), xlabel="times as fast as plain editing")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def draw_curve(raw: list[dict[str, Any]], path: Path, title: str) -> None:
    """Edits a second over how many single edits share a pass."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for task in dict.fromkeys(line["task"] for line in raw):
        lines = [line for line in raw if line["task"] == task]
        axes.plot([line["slots"] for line in lines], [1 / line["seconds_per_edit"] for line in lines], "o-", label=task)
    axes.set(xscale="log", xlabel="single edits abreast", ylabel="edits a second", title=title)
    axes.set_xticks([line["slots"] for line in raw], [str(line["slots"]) for line in raw])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
