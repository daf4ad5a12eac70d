"""Metrics for those who watch a run from elsewhere: a CSV file that grows, or TensorBoard's event files.

Both can be opened again by a run that goes on: what it logs replaces what was logged of the same edits before, so that
the log ends as that of a run that was never interrupted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from baft.storage import atomic_write, naming

__all__ = ["LOGS", "MetricsLog", "open_log"]

LOGS = ("csv", "tensorboard")
CSV, EVENTS = "metrics.csv", "tensorboard"

# TensorBoard's writer keeps events to itself for so many seconds.
_FLUSHED_EVERY = 10


class MetricsLog(Protocol):
    """Is told how a run does."""

    def log(self, edits: int, values: Mapping[str, float | None]) -> None:
        """Note ``values`` after so many edits, which never decrease; None is one without data."""

    def close(self) -> None: ...


def open_log(kind: str, folder: str | Path) -> MetricsLog:
    """Open the log of a run: a new one, or the one that its folder has already.

    Args:
        kind: ``csv`` writes ``metrics.csv``, ``tensorboard`` event files in the folder ``tensorboard``.

    Raises:
        ValueError: for another kind, if TensorBoard isn't installed, or if ``metrics.csv`` isn't such a log.
    """
    if kind == "csv":
        return _CsvLog(Path(folder) / CSV)
    if kind == "tensorboard":
        return _TensorBoardLog(Path(folder) / EVENTS)
    raise ValueError(f"log: expected {' or '.join(LOGS)}, got {kind!r}")


class _CsvLog:
    """A line for each call. It goes to the file in one write, so it is whole or not there.

    Some values come with each edit and others at milestones only. A name that comes for the first time adds a column,
    for which the file is written anew; later lines are appended. A cell without data is empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns = _columns(path)
        self._continues = path.exists()

    def log(self, edits: int, values: Mapping[str, float | None]) -> None:
        new = [name for name in values if name not in self._columns]
        if new or self._continues:
            self._columns += new
            self._rewrite(before=edits if self._continues else None)
            self._continues = False
        with naming(self._path), self._path.open("ab") as file:
            file.write(_line([edits, *(values.get(name) for name in self._columns[1:])]))

    def _rewrite(self, before: int | None) -> None:
        """With all of ``self._columns``; of an earlier attempt's lines only whole ones ``before`` so many edits."""
        rows = _rows(self._path)[1:]
        kept = [row for row in rows if before is None or int(row[0]) < before]
        width = len(self._columns)
        lines = [_line(self._columns), *(_line([*row, *[None] * (width - len(row))]) for row in kept)]
        atomic_write(self._path, lambda path: path.write_bytes(b"".join(lines)))

    def close(self) -> None:
        """Nothing is held open between two lines."""


def _columns(path: Path) -> list[str]:
    header = next(iter(_rows(path)), ["edits"])
    if header[0] != "edits":
        raise ValueError(f"log: expected a log with the column 'edits' first in {path}, got {header[0]!r}")
    return header


def _rows(path: Path) -> list[list[str]]:
    """The lines that are whole: a machine that died may have left a part of the last one."""
    text = path.read_text("utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    return list(csv.reader(io.StringIO(whole, newline="")))


def _line(cells: Sequence[object]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


class _TensorBoardLog:
    """Scalars of torch's own writer, which hides older events from the first one's edits on."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "log: expected TensorBoard to be installed, got none; pip install 'baft-kernels[tensorboard]'"
            ) from error
        self._folder = folder
        self._open: Any = lambda edits: SummaryWriter(str(folder), purge_step=edits, flush_secs=_FLUSHED_EVERY)
        self._writer: Any = None

    def log(self, edits: int, values: Mapping[str, float | None]) -> None:
        with naming(self._folder):
            self._writer = self._writer or self._open(edits)
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, edits)

    def close(self) -> None:
        if self._writer:
            with naming(self._folder):
                self._writer.close()
