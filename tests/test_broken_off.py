"""Edits that are broken off, by an interrupt or an error: they leave no trace, in the editor or in what comes next."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from looks import assert_same_state, logits
from tiny import REQUESTS, UNRELATED, tiny_editor, tiny_model, tiny_tokenizer
from tiny import one_thread as one_thread

from baft.baselines.methods import make_editor
from baft.editing import Editor
from baft.editor import EditOutcome
from baft.engine.learner import DivergedError
from baft.engine.sets import ParameterSets

EDITED, NEXT = REQUESTS[:1], REQUESTS[1:3]
METHODS = ("baft", "lora", "ft")
# Rehearsal and consolidation draw, growth changes the rank: all of that is to be taken back.
CHANGES: dict[str, Any] = {
    "max_steps": 4,
    "stop_below": 0.0,
    "batch_passes": 4,
    "balance_weight": 0.1,
    "rehearsal_buffer": 1,
    "consolidate_every": 2,
    "consolidation_steps": 3,
    "settling_rounds": 2,
}
GROWS: dict[str, Any] = {"grow_every": 2, "grow_by": 3}


def editor_of(method: str, **changes: Any) -> Editor:
    """An editor that has an edit."""
    config = tiny_editor(**{**CHANGES, **changes}).config
    editor = make_editor(method, tiny_model(), tiny_tokenizer(), config, unrelated=UNRELATED)
    editor.edit(EDITED)
    return editor


class Interrupting:
    """Interrupts at its call with a number from 1."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, *_: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("mode", "step"), [("sequential", 1), ("sequential", 3), ("sequential", 6), ("batch", 3), ("single", 2)]
)
def test_an_edit_that_is_interrupted_leaves_no_trace(method: str, mode: Any, step: int) -> None:
    changes = GROWS if method == "baft" else {}
    editor, undisturbed = (editor_of(method, **changes) for _ in range(2))
    before, base = editor.state(), logits(editor)
    with pytest.raises(KeyboardInterrupt):  # of a sequence the sixth step is the first edit's consolidation
        editor.edit(NEXT, mode, on_step=Interrupting(step))
    assert_same_state(editor.state(), before)
    assert torch.equal(logits(editor), base)
    assert editor.edits == EDITED
    for one in (editor, undisturbed):
        one.edit(NEXT)
    assert_same_state(editor.state(), undisturbed.state())


def test_of_a_sequence_the_edits_before_stay() -> None:
    editor, undisturbed = (editor_of("baft", consolidate_every=0) for _ in range(2))
    undisturbed.edit(NEXT[:1])
    with pytest.raises(KeyboardInterrupt):
        editor.edit(NEXT, on_step=Interrupting(6))
    assert editor.edits == [*EDITED, NEXT[0]]
    assert_same_state(editor.state(), undisturbed.state())


def test_a_settling_round_that_is_interrupted_leaves_no_trace() -> None:
    editor = tiny_editor(**{**CHANGES, "batch_size": 2})
    editor.edit(REQUESTS[:3])
    states = [editor.state()]
    with pytest.raises(KeyboardInterrupt):
        editor.settle(on_round=lambda _: states.append(editor.state()), on_step=Interrupting(3))
    assert len(states) == 2
    assert_same_state(editor.state(), states[-1])


@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_an_edit_that_learns_what_is_no_number_leaves_no_trace(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, update = editor_of("baft"), ParameterSets.update
    before = editor.state()

    def spoil(sets: ParameterSets, *given: Any) -> torch.Tensor:
        distances = update(sets, *given)
        sets._values["layers.1.source"].fill_(math.nan)
        return distances

    monkeypatch.setattr(ParameterSets, "update", spoil)
    with pytest.raises(DivergedError):
        editor.edit(NEXT, mode)
    assert_same_state(editor.state(), before)
    assert editor.edits == EDITED


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_interrupted_leaves_no_gradients(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    editor, undisturbed = (editor_of(method) for _ in range(2))
    with monkeypatch.context() as patched:
        whose = ParameterSets if method == "baft" else torch.optim.AdamW
        patched.setattr(whose, "update" if method == "baft" else "step", Interrupting(1))
        with pytest.raises(KeyboardInterrupt):
            editor.edit(NEXT)
    for one in (editor, undisturbed):
        one.edit(NEXT)
    assert_same_state(editor.state(), undisturbed.state())


@pytest.mark.parametrize("method", ["baft", "in-context"])
def test_looking_at_a_single_edit_may_fail(method: str) -> None:
    editor = editor_of(method)
    before = editor.state()

    def fail(_: EditOutcome) -> None:
        raise KeyError("looked at")

    with pytest.raises(KeyError, match="looked at"):
        editor.edit(NEXT, "single", on_edit=fail)
    assert editor.edits == EDITED
    assert_same_state(editor.state(), before)
