"""A run in one picture: the four measures right after each edit and at the end, and how edits held over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from baft.evaluation.probes import MEASURES
from baft.report.picture import save_png
from baft.report.style import MEASURE_COLOURS, MEASURE_STYLES, edits_axis

__all__ = ["draw_run"]


def draw_run(results: dict[str, Any], path: Path) -> None:
    """Draw ``results`` (the content of ``results.json``) as a PNG."""
    retention = results["retention"]
    figure = Figure(figsize=(11 if len(retention) > 1 else 6.5, 4.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2 if len(retention) > 1 else 1, squeeze=False)[0]
    _draw_measures(panels[0], results["metrics"])
    if len(retention) > 1:
        _draw_retention(panels[1], retention)
    figure.suptitle(_title(results), fontsize=11)
    save_png(figure, path)


def _title(results: dict[str, Any]) -> str:
    config = results["config"]
    method = results.get("method", "BaFT")
    rank = f", rank {config['rank']}" if method in ("BaFT", "LoReFT") else ""
    blocks = f", blocks {', '.join(map(str, config['layers']))}" if config["layers"] else ""
    what = f"{results['edits']} {results['protocol']['mode']} edits of {results.get('dataset', 'a data set')}"
    return f"{what} with {method}{rank}{blocks}"


def _draw_measures(axes: Axes, metrics: dict[str, Any]) -> None:
    moments = [(name, metrics[name]) for name in ("immediate", "final") if metrics[name]]
    if len(moments) == 2 and moments[0][1] == moments[1][1]:  # a batch: there is no moment in between
        moments = moments[1:]
    width = 0.8 / len(moments)
    for column, (name, values) in enumerate(moments):
        for place, measure in enumerate(MEASURES):
            x = place + (column - (len(moments) - 1) / 2) * width
            value = values[measure] and values[measure]["generation"]
            if value is None:
                axes.text(x, 0.02, "no data", ha="center", va="bottom", fontsize=8, rotation=90, color="grey")
                continue
            faint = 0.5 if name == "immediate" and len(moments) == 2 else 1.0
            axes.bar(x, value, width * 0.94, color=MEASURE_COLOURS[measure], alpha=faint)
            axes.text(x, value + 0.01, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(MEASURES)), MEASURES)
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_ylabel("share right, by generation")
    legend = (
        "pale: right after each edit, full: at the end"
        if len(moments) == 2
        else "measured "
        + {
            "immediate": "right after each edit",
            "final": "at the end",
        }[moments[0][0]]
    )
    axes.set_title(legend, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_retention(axes: Axes, retention: list[dict[str, Any]]) -> None:
    edits = [point["edits"] for point in retention]
    for measure in MEASURES:
        points = [
            (n, point[measure]["generation"]) for n, point in zip(edits, retention, strict=True) if point[measure]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), **MEASURE_STYLES[measure], label=measure)
    edits_axis(axes, edits)
    axes.set_ylim(0, 1.05)
    axes.set_title("retention: all edits so far, measured again", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
