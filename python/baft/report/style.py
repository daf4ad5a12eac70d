"""How pictures and pages look: one colour for each measure everywhere, and one for each of several runs.

The colours are Okabe and Ito's, which colour-blind people can tell apart; marks and widths differ as well.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes

from baft.evaluation.probes import MEASURES, Measure

__all__ = ["INK", "MEASURE_COLOURS", "MEASURE_STYLES", "RIGHT", "WRONG", "edits_axis", "panel_style", "run_style"]

# Of text and axes; on the page it stands for the colour of the text around the picture, light or dark.
INK = "#1b1d22"

_BLUE, _ORANGE, _GREEN, _PURPLE, _VERMILLION, _SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"

RIGHT, WRONG = _GREEN, _VERMILLION

MEASURE_COLOURS: dict[Measure, str] = dict(zip(MEASURES, (_BLUE, _ORANGE, _GREEN, _PURPLE), strict=True))

# Wide lines below narrow ones, so that equal curves stay visible.
MEASURE_STYLES: dict[Measure, dict[str, Any]] = {
    measure: {"color": MEASURE_COLOURS[measure], "linewidth": width, "marker": marker, "markersize": width + 3}
    for measure, width, marker in zip(MEASURES, (5, 3.5, 2, 1), "os^D", strict=True)
}

_RUN_COLOURS = (_BLUE, _VERMILLION, _GREEN, _ORANGE, _PURPLE, _SKY, INK)
_RUN_MARKERS = "osD^vPX"
_RUN_LINES = ("-", "--", ":", "-.")


def run_style(number: int) -> dict[str, Any]:
    """Of the ``number``-th of several runs; after all colours come the same ones with another line."""
    turn, place = divmod(number, len(_RUN_COLOURS))
    return {
        "color": _RUN_COLOURS[place],
        "marker": _RUN_MARKERS[place],
        "linestyle": _RUN_LINES[turn % len(_RUN_LINES)],
    }


def panel_style() -> AbstractContextManager[None]:
    """What figures are drawn and saved with, whatever the user's own matplotlib settings are."""
    return style.context(
        {
            **{name: INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": INK,
            "grid.alpha": 0.13,
            "grid.linewidth": 0.6,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "svg.fonttype": "none",  # text stays text, in the page's own font
            "svg.hashsalt": "baft",  # else the ids within are drawn anew each time
        },
        after_reset=True,
    )


def edits_axis(axes: Axes, edits: list[int]) -> None:
    """The horizontal axis of curves over a run: edits made, in powers of ten, and the last number."""
    first, last = max(min(edits), 1), max(edits)
    powers = [10**k for k in range(len(str(last))) if first <= 10**k and 10**k * 2 <= last]
    axes.set_xscale("log")
    axes.set_xlim(first * 0.85, last * 1.18)
    axes.set_xticks([*powers, last], [f"{edits:,}" for edits in [*powers, last]])
    axes.minorticks_off()
    axes.set_xlabel("edits made")
