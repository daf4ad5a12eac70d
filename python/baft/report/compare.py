"""Pictures of several runs together: what each gains against what it disturbs, and how their edits hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.lines import Line2D

from baft.evaluation.probes import MEASURES, Measure
from baft.report.curves import share_axis
from baft.report.picture import Picture, missing, new_figure
from baft.report.source import Metrics, Results
from baft.report.style import INK, edits_axis, run_style
from baft.report.words import last_two

__all__ = ["held", "trade_off"]

_MARKS: dict[Measure, dict[str, Any]] = {
    "reliability": {},
    "generality": {"markerfacecolor": "none", "markeredgewidth": 1.6},
}


def trade_off(runs: Mapping[str, Results]) -> Picture:
    """The plane of locality and of reliability and generality, with a full and a hollow mark for each run."""
    name, title = "trade-off", "What is gained, and what is disturbed"
    points = {label: _point(results.together) for label, results in runs.items()}
    if not any(points.values()):
        return missing(name, title, "No data: none of these runs has locality probes.")
    figure = new_figure(height=1.25)
    axes = figure.add_subplot()
    handles = []
    for number, (label, point) in enumerate(points.items()):
        # Later marks are smaller, so that equal ones stay visible.
        style = run_style(number) | {"linestyle": "none", "markersize": max(5, 10 - number), "clip_on": False}
        handles.append(Line2D([], [], **style, label=label))
        if point:
            locality, gained = point
            axes.plot([locality] * len(gained), list(gained.values()), color=style["color"], linewidth=1, alpha=0.6)
            for measure, value in gained.items():
                axes.plot([locality], [value], **style, **_MARKS[measure])
    share_axis(axes)
    axes.xaxis.set_major_formatter(axes.yaxis.get_major_formatter())
    # Both axes alike, and never so near that the noise of a few probes looks like a difference.
    lowest = min(axes.dataLim.x0, axes.dataLim.y0)
    bottom = max(0.0, min(lowest - 0.05, 0.8))
    axes.set(xlim=(bottom, 1.01), ylim=(bottom, 1.01))
    axes.locator_params(nbins=5, steps=[1, 2, 5, 10])  # labels of one axis have room, and
    axes.tick_params(axis="x", pad=7)  # those of both in the corner
    axes.set_xlabel("locality: what shall stay, stays")
    axes.set_ylabel("reliability (full), generality (hollow)")
    figure.legend(handles=handles, loc="outside upper left", ncols=_columns(runs, 2, 45), handlelength=1)
    words = "By generation, at the end; the nearer to the upper right, the better. The table has the numbers."
    return Picture(name, title, words, figure)


def _columns(labels: Iterable[str], most: int, characters: int) -> int:
    """Columns of a legend in a figure as wide as so many characters."""
    return max(1, min(most, characters // (max(map(len, labels)) + 4)))


def _point(metrics: Metrics) -> tuple[float, dict[Measure, float]] | None:
    """Locality, and what there is of the measures that an edit shall bring."""
    locality = metrics.generation("locality")
    gained = {measure: value for measure in _MARKS if (value := metrics.generation(measure)) is not None}
    return None if locality is None or not gained else (locality, gained)


def held(runs: Mapping[str, Results]) -> Picture:
    """Retention, one panel for each measure, one curve for each run."""
    name, title = "retention", "Retention, side by side"
    if not any(results.retention for results in runs.values()):
        return missing(name, title, "No data: none of these runs was measured between its edits.")
    figure = new_figure(wide=True, height=1.9)
    edits = sorted({point.edits for results in runs.values() for point in results.retention})
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, measure in zip(panels, MEASURES, strict=True):
        for number, results in enumerate(runs.values()):
            known = [(p.edits, v) for p in results.retention if (v := p.generation(measure)) is not None]
            if known:
                axes.plot(*zip(*known, strict=True), **run_style(number), linewidth=1.6, markersize=5)
        if not axes.lines:
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=INK, alpha=0.6)
        axes.set_title(measure)
        edits_axis(axes, edits)
        axes.set_xlabel("")
        share_axis(axes)
    figure.supxlabel("edits made", fontsize=9)
    handles = [Line2D([], [], **run_style(number), label=label) for number, label in enumerate(runs)]
    figure.legend(handles=handles, loc="outside upper left", ncols=_columns(runs, 3, 100))
    words = "All edits so far of each run (or a sample), asked again by generation. "
    words += next((said for results in runs.values() if (said := last_two(results.retention))), "")
    return Picture(name, title, words.strip(), figure, wide=True)
