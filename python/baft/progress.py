"""How far it is, while it runs: bars on a terminal, lines in a file."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from baft.runs.watcher import Watcher

__all__ = ["Lines", "ProgressWatcher", "bars"]

# Seconds between two lines of a stage: a log of days stays short enough to be read.
_BETWEEN_LINES = 60.0

# Seconds that pace and estimate are taken from: of a large model a single edit, or a settling round, takes minutes.
_PACE_OF = 3600.0


class ProgressWatcher(Watcher, ABC):
    """A ``Watcher`` that shows each stage to a person, and how a testbed's training goes."""

    def training(self, step: int, steps: int, loss: float, known: float) -> None:
        """Progress of the training of a testbed model (its ``OnProgress``)."""
        if step == 1:
            self.stage("training the testbed model (once)", steps)
        self.advance(f"loss {loss:.2f}, knows {known:.0%} of the facts")

    @abstractmethod
    def finish(self) -> None:
        """The last stage is over."""


@contextmanager
def bars(console: Console) -> Iterator[ProgressWatcher]:
    """Shows each stage as a bar, with the time it took, an estimate of what is left, and its pace."""
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(table_column=Column(min_width=7)),  # where it is narrow, bar and note make room
        TimeRemainingColumn(elapsed_when_finished=False, table_column=Column(min_width=7)),
        _PaceColumn(table_column=Column(min_width=13)),
        TextColumn("{task.fields[note]}", style="dim", markup=False, table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, speed_estimate_period=_PACE_OF) as progress:
        yield _Bars(progress)


class _Bars(ProgressWatcher):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.finish()
        self._task = self._progress.add_task(name, total=total, completed=done, note="")

    def advance(self, note: str = "", units: int = 1) -> None:
        self._progress.update(self._task, advance=units, note=note)

    def say(self, text: str) -> None:
        self._progress.console.print(text, style="yellow")

    def finish(self) -> None:
        if self._task is not None:
            done = self._progress.tasks[self._task].completed or 1
            self._progress.update(self._task, total=done, completed=done)


class _PaceColumn(ProgressColumn):
    """Seconds of a unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_pace(1 / speed) if speed else "", style="dim")


class Lines(ProgressWatcher):
    """Prints a line when a stage begins, one when it ends, and in between at most one a minute.

    A file can't be drawn over, and what is to be drawn only at the end shows nothing for days.

    Args:
        console: prints them, each as one line.
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._name: str | None = None
        self._total: int | None = None
        self._before = self._done = 0
        self._note = ""
        self._began = self._last = 0.0

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.finish()
        self._name, self._total, self._note = name, total, ""
        self._before = self._done = done
        self._began = self._last = self._clock()
        self.say(f"{name}: begins" + (f", {self._counted()}" if total is not None else ""))

    def advance(self, note: str = "", units: int = 1) -> None:
        self._done += units
        self._note = note
        if self._clock() - self._last >= _BETWEEN_LINES:
            self._last = self._clock()
            self._tell(ended=False)

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def finish(self) -> None:
        if self._name is not None:
            self._tell(ended=True)
            self._name = None

    def _tell(self, *, ended: bool) -> None:
        seconds, made = self._clock() - self._began, self._done - self._before
        figures = [f"{self._counted()} after {_time(seconds)}"]
        if made:
            figures.append(_pace(seconds / made))
            if self._total is not None and not ended:
                figures.append(f"{_time(seconds / made * (self._total - self._done))} left")
        note = f"; {self._note}" if self._note else ""
        self.say(f"{self._name}: {'ended, ' if ended else ''}{', '.join(figures)}{note}")

    def _counted(self) -> str:
        return f"{self._done}" if self._total is None else f"{self._done} of {self._total}"


def _pace(seconds: float) -> str:
    return f"{seconds:.3g} s each"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
