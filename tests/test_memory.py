"""What a long sequence of edits leaves in memory: little of each, however many steps and texts it took."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import capture_on_tape
from tiny import one_thread as one_thread
from tiny import tiny_editor
from torch import Tensor

from baft import BaftEditor, EditRequest
from baft.engine import continuations, graphs
from baft.engine.options import EngineOptions
from baft.runs.journal import Journal

# Bytes of Python's that an edit may leave: its own tokens, and a little of what was found out about them. It takes
# eight steps, whose shapes hardly ever come again, and six texts of twenty tokens: all of either would be more.
AT_MOST = 6000

EDITS, WARM = 44, 12


def requests(count: int) -> Iterator[EditRequest]:
    """About one subject each, of different lengths."""
    for number in range(count):
        subject = f"Bob Stone {number}{', king' * (number % 4)}"
        yield EditRequest(prompt=f"{subject} was born in", target="Ebor", subject=subject)


def bytes_an_edit(editor: BaftEditor) -> float:
    """How much more of Python's memory is taken for each edit, when the first ones are made."""
    taken = []
    tracemalloc.start()
    try:
        for number, request in enumerate(requests(EDITS), 1):
            editor.edit([request])
            if number in (WARM, EDITS):
                gc.collect()
                taken.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    return (taken[1] - taken[0]) / (EDITS - WARM)


def test_an_edit_leaves_little_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run keeps the texts in its journal; of those in front of it there are soon as many as there may be."""
    monkeypatch.setattr(continuations, "_RECENT", 8)
    editor = tiny_editor(
        subject_texts=6,
        retellings=2,
        rehearsal=2,
        unrelated_per_step=4,
        max_steps=8,
        stop_below=0.0,
        learning_rate=1e-3,
        options=EngineOptions(memory=1 << 16),
    )
    with closing(Journal(tmp_path / "journal.sqlite")) as journal:
        editor.keep_written_in(journal)
        assert bytes_an_edit(editor) < AT_MOST


@dataclass
class Given:
    """Inputs of a step, as far as their shape goes."""

    tokens: Tensor
    sets: tuple[int, ...] = (0,)


@pytest.mark.parametrize(("why_not", "at_most"), [(None, 3), ("no GPU", 0)])
def test_shapes_that_never_come_again_are_forgotten(
    monkeypatch: pytest.MonkeyPatch, why_not: str | None, at_most: int
) -> None:
    """There may be another one at each step of a run of days."""
    monkeypatch.setattr(graphs, "_SEEN", 3)
    step: Any = SimpleNamespace(compute=lambda inputs: inputs)
    computed: Any = graphs.Graphs(step, capture_on_tape, why_not, at_first=False)
    for size in range(1, 9):
        computed(Given(torch.zeros(size)))
        assert len(computed._seen) <= at_most
