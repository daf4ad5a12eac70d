"""Who is told how a run goes on."""

from __future__ import annotations

from typing import Protocol

from baft.engine.generation import OnBatch

__all__ = ["Nobody", "Watcher", "watched"]


class Watcher(Protocol):
    """Is told how a run goes on."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        """A stage of ``total`` units begins, ``done`` of which were done by an earlier process."""

    def advance(self, note: str = "", units: int = 1) -> None:
        """One more unit of the stage is done, or several."""

    def say(self, text: str) -> None:
        """Something that a person should know of."""


class Nobody:
    """A ``Watcher`` that doesn't listen."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...
    def advance(self, note: str = "", units: int = 1) -> None: ...
    def say(self, text: str) -> None: ...


def watched(watcher: Watcher, stage: str) -> OnBatch:
    """Shows batches of a generation as a stage; it begins with the first one, when their number is known."""
    begun = False

    def on_batch(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            watcher.stage(stage, total)
            begun = True
        watcher.advance(units=done)

    return on_batch
