"""A long settling round is made in parts: the result is that of one made at once, and no more is lost than a part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from looks import assert_same_state
from small_runs import ASKED, PLAN, run_in, small_editor
from tiny import REQUESTS, tiny_editor
from tiny import one_thread as one_thread
from torch import Tensor

import baft.trained
from baft import BaftEditor
from baft.engine import schedule
from baft.runs.checkpoints import Checkpoints
from baft.runs.folder import RunFolder
from baft.runs.outcome import outcome
from baft.runs.run import open_context
from baft.runs.sequential import SequentialRun
from baft.runs.undo import drop

# Five edits take five steps a round: three parts of two.
PART = 2


def edited(**changes: Any) -> BaftEditor:
    editor = tiny_editor(**{"settling_rounds": 2, "batch_size": 1, "max_steps": 2, "stop_below": 0.0, **changes})
    editor.edit(REQUESTS)
    return editor


def told(curves: list[schedule.Curve]) -> list[tuple[list[float], int, bool]]:
    return [(curve.losses, curve.steps, curve.converged) for curve in curves]


@pytest.mark.parametrize("stop_below", [0.0, 1e9])
def test_a_round_in_parts_is_one_at_once(stop_below: float, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = edited(), edited()
    for editor in (whole, parts):
        editor.config = editor._trainer.config = editor.config.model_copy(update={"stop_below": stop_below})
    curves = whole.settle()
    monkeypatch.setattr(schedule, "_PART", PART)
    states: list[dict[str, Tensor]] = []
    assert told(parts.settle(on_part=lambda: states.append(parts.state()))) == told(curves)
    assert_same_state(parts.state(), whole.state())
    assert len(curves) == (1 if stop_below else 2) and len(states) == 2 * len(curves)
    assert not any(name.startswith("round.") for name in whole.state())


def test_it_goes_on_in_a_new_editor_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_PART", PART)
    whole = edited()
    states: list[dict[str, Tensor]] = []
    curves = whole.settle(on_part=lambda: states.append(whole.state()))
    for number, state in enumerate(states):
        done, parts = divmod(number, 2)
        other = tiny_editor(**whole.config.model_dump())
        other.load_state(state)
        other.edits = whole.edits
        steps: list[tuple[int, int]] = []
        found = other.settle(done=done, on_step=lambda *step, into=steps: into.append(step[:2]))
        assert told(found) == told(curves[done:])
        assert steps == [(step, 5) for step in [*range(1, 6)] * (2 - done)][PART * (parts + 1) :]
        assert_same_state(other.state(), whole.state())


def test_with_other_edits_a_round_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_PART", PART)
    editor = edited()
    states: list[dict[str, Tensor]] = []
    editor.settle(on_part=lambda: states.append(editor.state()))
    editor.load_state(states[0])
    editor.edits = editor.edits[:4]
    assert [curve.steps for curve in editor.settle()] == [4, 4]


class Killed(Exception):
    """In place of a process's end."""


def die(*_: Any) -> None:
    raise Killed


def test_another_round_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_PART", PART)
    editor = edited()
    states: list[dict[str, Tensor]] = []
    editor.settle(on_part=lambda: states.append(editor.state()))
    editor.load_state(states[-1])  # in the second round
    steps: list[int] = []
    editor.settle(done=0, on_step=lambda *step: steps.append(step[0]))
    assert steps == [*range(1, 6)] * 2


def test_a_state_from_before_a_round_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_PART", PART)
    whole, editor = edited(), edited()
    before = editor.state()
    with pytest.raises(Killed):
        editor.settle(on_part=die)
    editor.load_state(before)
    assert told(editor.settle()) == told(whole.settle())
    assert_same_state(editor.state(), whole.state())


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_run_that_ends_in_a_round_goes_on_from_its_last_part(
    parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine edits take three steps a round, of which there are six."""
    run_in(tmp_path / "whole")
    monkeypatch.setattr(schedule, "_PART", 1)
    write, settle, made = Checkpoints.write, schedule.settle, 0

    def kill(checkpoints: Checkpoints, done: int, state: Mapping[str, Tensor]) -> None:
        write(checkpoints, done, state)
        if made == parts:
            raise Killed

    def count(*given: Any) -> schedule.Curve | None:
        nonlocal made
        made += 1
        return settle(*given)

    monkeypatch.setattr(baft.trained, "settle", count)
    plan = dataclasses.replace(PLAN, checkpoint_every=1000)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "write", kill)
        with pytest.raises(Killed):
            run_in(tmp_path / "broken", plan=plan)
    assert made == parts
    run_in(tmp_path / "broken", plan=plan)
    assert made == 6 * 3
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_what_is_half_settled_is_not_looked_at_as_not_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking an edit back settles without a look, so that a run that goes on in the middle of a round has had none."""
    run_in(tmp_path)
    monkeypatch.setattr(schedule, "_PART", 1)
    with RunFolder(tmp_path) as place, monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("baft.runs.sequential.SequentialRun._keep_part", keep_and_die)
        drop(open_context(small_editor(), ASKED, plan=PLAN, folder=place), place, 5)
    looks = [(point["edits"], point["settled"]) for point in run_in(tmp_path).results["retention"]]
    assert looks == [(1, 0), (4, 0), (8, 6)]


def keep_and_die(run: SequentialRun, edits: int, keep: Callable[..., None] = SequentialRun._keep_part) -> None:
    keep(run, edits)
    raise Killed
