"""Pictures of one run over its edits: how they hold, what else the model forgets, what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from baft.evaluation.probes import MEASURES
from baft.report.picture import Picture, missing, new_figure
from baft.report.source import Results, RetentionPoint
from baft.report.style import INK, MEASURE_COLOURS, MEASURE_STYLES, edits_axis
from baft.report.words import after, duration, last_two, percent, size, when

__all__ = ["general", "memory", "retention", "seconds", "share_axis"]

# So many edits are one point of the curve of time, at least, and so many points has the curve, at most.
_SMOOTHED, _MOST_POINTS = 10, 100


def retention(results: Results) -> Picture:
    name, title = "retention", "Retention"
    if not results.retention:
        return missing(name, title, f"No data: a {results.mode} run has no moments between its edits.")
    figure = new_figure()
    axes = figure.add_subplot()
    points = results.retention
    for measure in MEASURES:
        known = [(p.edits, value) for p in points if (value := p.generation(measure)) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), **MEASURE_STYLES[measure], label=measure)
    edits_axis(axes, [point.edits for point in points])
    share_axis(axes)
    figure.legend(loc="outside upper left", ncols=4, handlelength=1.6, columnspacing=1.2)
    last = ", ".join(f"{measure} {percent(points[-1].generation(measure))}" for measure in MEASURES)
    words = f"All edits so far (or a sample), asked again by generation. {last_two(points)}{when(points[-1])}: {last}."
    return Picture(name, title, words, figure)


def share_axis(axes: Axes) -> None:
    """Shares from nothing to all, with as many decimals as the ticks need."""
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def general(results: Results) -> Picture:
    """Perplexity on held-out text, as a multiple of the unedited model's."""
    name, title = "general", "General ability"
    finite = [(p, ratio) for p in results.retention if p.general and (ratio := p.general.ratio)]
    if not finite:
        measured = any(p.general for p in results.retention)
        why = "no value of this run is finite" if measured else "this run didn't measure perplexity on held-out text"
        return missing(name, title, f"No data: {why}.")
    points, ratios = zip(*finite, strict=True)
    edits = [point.edits for point in points]
    figure = new_figure()
    axes = figure.add_subplot()
    axes.plot(edits, ratios, color=INK, marker="o", linewidth=1.6)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    edits_axis(axes, edits)
    low, high = min(1.0, *ratios), max(1.0, *ratios)
    if high > 5 * low:
        axes.set_yscale("log")
    else:
        axes.set_ylim(low - 0.1 * max(high - low, 0.5), high + 0.1 * max(high - low, 0.5))
    axes.set_ylabel("times the unedited model's")
    words = "Perplexity on held-out text, times the unedited model's: 1 is unharmed, more is worse. "
    return Picture(name, title, f"{words}{last_two(points)}{when(points[-1])}: {ratios[-1]:.3g}.", figure)


def seconds(results: Results, trained: Sequence[float]) -> Picture:
    """How long edits train, smoothed, and the time of all editing so far.

    Args:
        trained: of each edit, its seconds of training.
    """
    name, title = "seconds", "Time"
    if results.mode == "batch" or not trained:
        return missing(name, title, "No data for each edit: a batch trains all of them together.")
    together = max(_SMOOTHED, math.ceil(len(trained) / _MOST_POINTS)) if len(trained) >= 4 * _SMOOTHED else 1
    groups = [trained[k : k + together] for k in range(0, len(trained), together)]
    middle = [k * together + (len(group) + 1) / 2 for k, group in enumerate(groups)]
    low, median, high = (np.array([np.quantile(group, q) for group in groups]) for q in (0.1, 0.5, 0.9))
    totals = [(p.edits, p.seconds) for p in results.retention if p.seconds is not None]
    figure = new_figure()
    axes = figure.add_subplot()
    if together > 1:
        axes.fill_between(middle, low, high, color=MEASURE_COLOURS["reliability"], alpha=0.25, linewidth=0)
    axes.plot(middle, median, color=MEASURE_COLOURS["reliability"], linewidth=1.6)
    axes.set_ylim(bottom=0, top=1.25 * float(np.max(high if together > 1 else median)) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("edit")
    axes.set_ylabel("seconds of training")
    words = "Seconds that each edit trained. "
    if together > 1:
        words = f"Seconds of training, of {together} edits at a time: their median, and the middle 80 %. "
    if totals:
        words += f"{after(totals[-1][0]).capitalize()} editing had taken {duration(totals[-1][1])} in all. "
    return Picture(name, title, words.strip(), figure)


def memory(results: Results) -> Picture:
    name, title = "memory", "Memory"
    points = [p for p in results.retention if p.memory]
    if not points:
        return missing(name, title, "No data: this run didn't measure its memory on the way.")
    figure = new_figure()
    axes = figure.add_subplot()
    said = []
    for where, colour, marker in _MEMORIES:
        known = [(p.edits, value / 2**20) for p in points if (value := getattr(p.memory, where)) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker=marker, linewidth=1.6, label=_WHERE[where])
            said.append(f"{_WHERE[where]} {_change(points, where)}")
    edits_axis(axes, [point.edits for point in points])
    axes.set_ylim(0, 1.1 * axes.dataLim.y1)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("MiB")
    figure.legend(loc="outside upper left", ncols=2)
    return Picture(name, title, f"Memory in use: {'; '.join(said)}.", figure)


_WHERE = {"process": "process, at most", "gpu": "GPU, at most", "remembered": "the engine's memory of texts"}
_MEMORIES = (
    ("process", INK, "o"),
    ("gpu", MEASURE_COLOURS["generality"], "s"),
    ("remembered", MEASURE_COLOURS["locality"], "^"),
)


def _change(points: Sequence[RetentionPoint], where: str) -> str:
    known = [(p.edits, value) for p in points if (value := getattr(p.memory, where)) is not None]
    (first, little), (last, much) = known[0], known[-1]
    return f"{size(little)} {after(first)}" + (f", {size(much)} {after(last)}" if first != last else "")
