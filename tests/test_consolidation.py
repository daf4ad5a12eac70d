"""What goes through earlier edits once more: consolidation between edits, settling after the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from looks import assert_same_state, trained_batches
from tiny import REQUESTS, tiny_editor

from baft.engine.step import Lesson, StepInputs, TrainingStep

TWO, THREE = REQUESTS[:2], REQUESTS[:3]


def test_consolidation_goes_over_all_edits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(
        consolidate_every=2, consolidation_steps=3, rehearsal=0, locality_weight=0.0, max_steps=1, stop_below=0.0
    )
    with trained_batches(editor, monkeypatch) as batches:
        editor.edit(REQUESTS[:3])
    assert [len(batch) for batch in batches] == [1, 1, 2, 2, 2, 1]


def test_consolidation_costs_the_same_however_long_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(
        consolidate_every=1,
        consolidation_steps=3,
        batch_size=1,
        rehearsal=0,
        locality_weight=0.0,
        max_steps=1,
        stop_below=0.0,
    )
    texts = [f"{request.prompt} {request.target}" for request in REQUESTS]
    with trained_batches(editor, monkeypatch) as batches:
        editor.edit(REQUESTS)
    visited = [text for (text,) in batches]
    for number, text in enumerate(texts):
        edit, *consolidation = visited[4 * number : 4 * number + 4]
        assert edit == consolidation[0] == text  # what is new comes first
        assert set(consolidation) <= set(texts[: number + 1])
    # A round goes on from one consolidation to the next: it began with the fourth one's last step.
    assert len({visited[15], *visited[18:20]}) == 3


def test_consolidation_ends_with_a_round_that_finds_every_loss_low(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(
        consolidate_every=4, consolidation_steps=9, batch_size=2, rehearsal=0, max_steps=1, stop_below=1e9
    )
    with trained_batches(editor, monkeypatch) as batches:
        editor.edit(REQUESTS[:4])
    assert len(batches) == 4 + 2


def test_settling_visits_each_edit_once_a_round_at_rates_that_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(
        consolidate_every=5,  # once, which ends in the middle of a round
        consolidation_steps=2,
        settling_rounds=3,
        batch_size=2,
        rehearsal=0,
        locality_weight=0.0,
        max_steps=1,
        stop_below=0.0,
    )
    editor.edit(REQUESTS)
    rates: list[float] = []
    arrange = TrainingStep.arrange

    def watch(step: TrainingStep, lessons: Sequence[Lesson], *, rate: float = 1.0, **options: Any) -> StepInputs:
        rates.append(rate)
        return arrange(step, lessons, rate=rate, **options)

    monkeypatch.setattr(TrainingStep, "arrange", watch)
    rounds: list[Any] = []
    with trained_batches(editor, monkeypatch) as batches:
        curves = editor.settle(on_round=rounds.append)
    texts = sorted(f"{request.prompt} {request.target}" for request in REQUESTS)
    visited = [text for batch in batches for text in batch]
    assert [len(batch) for batch in batches] == [2, 2, 1] * 3
    assert [sorted(visited[k : k + 5]) for k in (0, 5, 10)] == [texts] * 3
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 9)) for step in range(9)])
    assert rounds == curves and [(curve.steps, len(curve.losses)) for curve in curves] == [(3, 1)] * 3


def test_settling_ends_with_a_round_that_finds_every_loss_low() -> None:
    editor = tiny_editor(settling_rounds=5, stop_below=1e9, max_steps=1)
    assert editor.settle() == []  # of nothing
    editor.edit(TWO)
    assert [curve.converged for curve in editor.settle()] == [True]


def test_settling_goes_on_in_a_new_editor_bit_for_bit() -> None:
    changes: dict[str, Any] = {"settling_rounds": 3, "batch_size": 2, "max_steps": 2, "stop_below": 0.0}
    whole = tiny_editor(**changes)
    whole.edit(THREE)
    states = []
    whole.settle(on_round=lambda _: states.append(whole.state()))
    for done, state in enumerate(states, 1):
        other = tiny_editor(**changes)
        other.load_state(state)
        other.edits = whole.edits
        assert len(other.settle(done=done)) == 3 - done
        assert_same_state(other.state(), whole.state())
