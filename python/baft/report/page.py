"""The page: everything that it shows is in the one file, and it may load nothing.

Template, style and scripts are in ``page/``. What comes from a run is data, never markup: the template escapes it, the
scripts put it in as text, and the page's own content policy lets no script run but those whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from baft.evaluation.probes import MEASURES
from baft.report import compare, curves, words
from baft.report.digest import MOST_EDITS, Digest, choose, digest
from baft.report.gates import gates
from baft.report.packing import pack
from baft.report.picture import Picture, save_png, svg
from baft.report.source import RunSource, read_run
from baft.report.style import MEASURE_COLOURS, RIGHT, WRONG, panel_style
from baft.storage import atomic_write

__all__ = ["WrittenReport", "write_report"]

_STYLES = ("page.css", "edits.css")
_SCRIPTS = ("edits.js", "curve.js", "detail.js", "browser.js")


@dataclass(frozen=True)
class WrittenReport:
    """The files of a report."""

    page: Path
    pictures: list[Path]


@dataclass(frozen=True)
class _Run:
    """A run as the page shows it."""

    label: str
    source: RunSource
    digest: Digest
    pictures: list[Picture]
    packed: dict[str, Any]


def write_report(
    folders: Sequence[str | Path], out: str | Path | None = None, *, most_edits: int = MOST_EDITS
) -> WrittenReport:
    """Write the report of a run, or of several side by side.

    The same runs give the same bytes. Pictures are beside the page and named after it (``report-retention.png``).

    Args:
        folders: of runs; of one that isn't finished the page shows what there is by now.
        out: the page; by default ``report.html`` in the folder of a single run, or here for several.
        most_edits: of a run with more edits than these the page has a sample, failures first, and says so.

    Raises:
        ValueError: if one of the folders has no run, one without an edit, or one of another format, or is named twice.
    """
    sources = [read_run(folder) for folder in folders]
    if not sources:
        raise ValueError("report: expected the folder of at least one run, got none")
    if len({Path(source.name).resolve() for source in sources}) < len(sources):
        raise ValueError(f"report: expected different runs, got {', '.join(source.name for source in sources)}")
    page = Path(out) if out else Path(folders[0] if len(sources) == 1 else ".") / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    with panel_style():
        runs = [_prepared(label, s, most_edits) for label, s in zip(words.labels(sources), sources, strict=True)]
        together = _together(runs)
        html = _rendered(runs, together)
        atomic_write(page, lambda path: path.write_text(html, "utf-8"))
        return WrittenReport(page, _save_pictures(page, runs, together))


def _prepared(label: str, source: RunSource, most_edits: int) -> _Run:
    results, known = source.results, digest(source.edits(), source.results.superseded)
    pictures = [
        curves.retention(results),
        curves.general(results),
        curves.seconds(results, known.seconds),
        curves.memory(results),
        gates(results),
    ]
    packed = pack(source.edits(), choose(known.troubled, most_edits), results.superseded)
    return _Run(label, source, known, pictures, packed)


def _together(runs: Sequence[_Run]) -> list[Picture]:
    if len(runs) == 1:
        return []
    results = {run.label: run.source.results for run in runs}
    return [compare.trade_off(results), compare.held(results)]


def _save_pictures(page: Path, runs: Sequence[_Run], together: Sequence[Picture]) -> list[Path]:
    named = {picture.name: picture for picture in together}
    for number, run in enumerate(runs, 1):
        named |= {f"{number}-{p.name}" if len(runs) > 1 else p.name: p for p in run.pictures}
    written = []
    for name, picture in named.items():
        if picture.figure:
            path = page.with_name(f"{page.stem}-{name}.png")
            save_png(picture.figure, path, dpi=160, facecolor="white", metadata={"Software": None})
            written.append(path)
    return written


def _rendered(runs: Sequence[_Run], together: Sequence[Picture]) -> str:
    folder = files("baft.report") / "page"
    scripts = [(folder / name).read_text("utf-8") for name in _SCRIPTS]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = words.percent
    environment.filters["svg"] = lambda picture: Markup(svg(picture))
    return environment.from_string((folder / "report.html").read_text("utf-8")).render(
        runs=runs,
        together=together,
        title=_title(runs),
        measures=MEASURES,
        count=words.count,
        facts=words.facts,
        protocol=words.protocol,
        data=[_data(run) for run in runs],
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        styles=[Markup((folder / name).read_text("utf-8")) for name in _STYLES],
        colours={**MEASURE_COLOURS, "right": RIGHT, "wrong": WRONG},
    )


def _title(runs: Sequence[_Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs of editing, compared"
    results = runs[0].source.results
    return f"{words.count(results)} {results.mode} edits of {Path(results.dataset).name} with {runs[0].label}"


def _data(run: _Run) -> dict[str, Any]:
    """What the scripts read."""
    results = run.source.results
    return {
        "name": run.label,
        "mode": results.mode,
        "total": len(run.digest.seconds),
        "stop_below": results.config.get("stop_below"),
        **run.packed,
    }


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
