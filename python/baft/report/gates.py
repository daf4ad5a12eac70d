"""How much each basis is used over a run: a heat map of bases and moments for each edited block."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.ticker import PercentFormatter

from baft.report.picture import Picture, missing, new_figure
from baft.report.source import Results
from baft.report.words import percent

__all__ = ["gates"]

_PANELS_ABREAST = 4

# Moments that are named below a panel, at most.
_LABELS = 12


def gates(results: Results) -> Picture:
    name, title = "gates", "Use of the bases"
    points = [p for p in results.retention if p.gates]
    if not points:
        return missing(name, title, "No data: this run has no gates, or didn't record how far they open.")
    layers = sorted({layer for p in points for layer in p.gates or {}}, key=_in_order)
    shares = {layer: _table([(p.gates or {}).get(layer, []) for p in points]) for layer in layers}
    highest = max(float(np.nanmax(table)) for table in shares.values())
    rows, columns = math.ceil(len(layers) / _PANELS_ABREAST), min(len(layers), _PANELS_ABREAST)
    figure = new_figure(wide=True, height=0.9 * rows + 0.1)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, (layer, table) in zip(panels, shares.items(), strict=False):
        axes.set_axis_on()
        axes.grid(False)
        # Without smoothing, so that the picture in the page is one pixel for each basis and moment.
        image = axes.imshow(
            table, aspect="auto", interpolation="none", cmap="cividis", vmin=0, vmax=highest, origin="lower"
        )
        axes.set_title(f"block {layer}")
        shown = range(0, len(points), math.ceil(len(points) / _LABELS))
        names = [f"{points[k].edits:,}" + ("\nsettled" if points[k].settled else "") for k in shown]
        axes.set_xticks(shown, names, rotation=0 if len(shown) < 6 else 60)
    figure.supxlabel("edits made", fontsize=9)
    figure.supylabel("basis", fontsize=9)
    percents = PercentFormatter(1, symbol=" %")
    bar = figure.colorbar(image, ax=figure.axes, format=percents, fraction=0.02, pad=0.01)
    bar.outline.set_visible(False)
    rank = max(len(share) for p in points for share in (p.gates or {}).values())
    words = f"Each basis's share of its block's use; shared evenly by {rank} it would be {percent(1 / rank)}."
    return Picture(name, title, words, figure, wide=True)


def _table(moments: list[list[float]]) -> np.ndarray:
    """Bases by moments; a basis that wasn't there yet, as ranks may grow, is NaN, which stays blank."""
    table = np.full((max(map(len, moments)), len(moments)), np.nan)
    for column, share in enumerate(moments):
        table[: len(share), column] = share
    return table


def _in_order(layer: str) -> tuple[int, str]:
    return (int(layer), "") if layer.isdigit() else (10**9, layer)
