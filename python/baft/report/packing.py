"""A run's edits as JSON for the page: each text and each training curve once, and rows of numbers that refer to them.

``page/edits.js`` reads what is written here; the order of the columns is in ``_row`` and ``_probe``, and there.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from itertools import zip_longest
from typing import Any

from baft.evaluation.probes import MEASURES
from baft.report.digest import is_right
from baft.report.source import EditLine, ProbeLine

__all__ = ["pack"]


class _Once:
    """A list in which each value stands once."""

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}

    def place(self, value: Hashable) -> int:
        return self._places.setdefault(value, len(self._places))

    @property
    def values(self) -> list[Hashable]:
        return list(self._places)


def pack(edits: Iterable[EditLine], chosen: set[int], superseded: Collection[int] = ()) -> dict[str, Any]:
    """Those of ``edits`` whose places are ``chosen``, as ``{"texts", "curves", "edits"}``.

    Those numbered in ``superseded`` aren't judged at the end by what they should bring.
    """
    texts, curves = _Once(), _Once()
    chosen_edits = (edit for place, edit in enumerate(edits) if place in chosen)
    rows = [_row(edit, texts, curves, edit.index in superseded) for edit in chosen_edits]
    return {"texts": texts.values, "curves": curves.values, "edits": rows}


def _row(edit: EditLine, texts: _Once, curves: _Once, superseded: bool) -> list[Any]:
    training = edit.training
    return [
        edit.index,
        edit.id and texts.place(edit.id),
        texts.place(edit.prompt),
        texts.place(edit.target),
        training.steps,
        training.seconds,
        _ending(edit),
        curves.place(training.losses),
        is_right(edit.immediate),
        None if superseded else is_right(edit.final),
        [_probe(*moments, texts, superseded) for moments in zip_longest(edit.immediate, edit.final)],
        superseded,
    ]


def _ending(edit: EditLine) -> str:
    training = edit.training
    endings = {"diverged": training.diverged, "out of memory": training.out_of_memory, "converged": training.converged}
    return next((name for name, is_so in endings.items() if is_so), "stopped")


def _probe(immediate: ProbeLine | None, final: ProbeLine | None, texts: _Once, superseded: bool) -> list[Any]:
    """One question; a moment at which it wasn't asked (single edits have no end that holds them all) is null."""
    question = immediate or final
    assert question is not None  # zip_longest ends with the longer of the two
    judged = question.measure == "locality" or not superseded
    return [
        MEASURES.index(question.measure),
        texts.place(question.kind),
        texts.place(question.prompt),
        [texts.place(answer) for answer in question.answers],
        texts.place(question.before),
        immediate and texts.place(immediate.text),
        immediate and immediate.generation,
        final and texts.place(final.text),
        final.generation if final and judged else None,
    ]
