"""A picture of a report: in the page as SVG and beside it as PNG, or the word why there is none."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from baft.report.style import INK
from baft.storage import atomic_write

__all__ = ["Picture", "missing", "new_figure", "save_png", "svg"]

# Points to an inch, so that a picture is as wide as a phone, and its text readable there without zooming.
_WIDTH, _HEIGHT, _WIDE = 370 / 72, 235 / 72, 780 / 72


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: of its PNG.
        title: stands above it on the page.
        words: what it shows, for all readers and for those who can't see it; or why it isn't there.
        figure: None if there is nothing to draw.
        wide: takes the page's whole width; a phone scrolls it sideways.
    """

    name: str
    title: str
    words: str
    figure: Figure | None = None
    wide: bool = False


def missing(name: str, title: str, why: str) -> Picture:
    return Picture(name, title, why)


def new_figure(*, wide: bool = False, height: float = 1.0) -> Figure:
    """An empty figure of a common width; ``height`` is relative to the usual one."""
    return Figure(figsize=(_WIDE if wide else _WIDTH, _HEIGHT * height))


def save_png(figure: Figure, path: Path, **options: Any) -> None:
    """Write the figure, whole or not at all; ``options`` are those of ``savefig``."""
    content = io.BytesIO()
    figure.savefig(content, format="png", **options)
    atomic_write(path, lambda beside: beside.write_bytes(content.getvalue()))


def svg(picture: Picture) -> str:
    """The figure as an ``<svg>`` element that takes the colour of the text around it; the same bytes each time."""
    assert picture.figure is not None
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    picture.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration, which has no place within HTML
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nobody refers to them, and each is in every picture
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = html.escape(f"{picture.title}. {picture.words}")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).replace(INK, "currentColor")
