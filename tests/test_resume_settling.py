"""Settling that breaks off goes on from there, and ends as if nothing had happened: bit for bit."""

from __future__ import annotations

import math
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from small_runs import ASKED, PLAN, Broken, Listener, break_off_after, run_in, small_editor
from tiny import one_thread as one_thread
from torch import Tensor

from baft.engine.encoding import Encoded
from baft.engine.learner import DivergedError, Learner
from baft.engine.schedule import Curve, OnStep, settle
from baft.runs.checkpoints import Checkpoints
from baft.runs.journal import Journal
from baft.runs.outcome import outcome
from baft.runs.run import RunPlan


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never broken off."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_in(folder)
    return folder


def test_settling_that_goes_on_leaves_the_state_before_it_alone(whole: Path, tmp_path: Path) -> None:
    """The checkpoint of the last edit is gone by then: what is in the editor must not be taken for it."""
    plan = RunPlan(**{**vars(PLAN), "checkpoint_every": 1})
    with pytest.raises(Broken):
        run_in(tmp_path, plan=plan, listener=break_off_after(15))
    assert "000000009" not in [path.name for path in (tmp_path / "checkpoints").iterdir()]
    run_in(tmp_path, plan=plan)
    assert "000000009" not in [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.parametrize("lost", [10, 12, 15])
def test_a_round_whose_checkpoint_was_not_written_is_made_again(
    lost: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Checkpoints.write

    def fail(checkpoints: Checkpoints, done: int, state: Mapping[str, Tensor]) -> None:
        if done == lost:
            raise Broken
        write(checkpoints, done, state)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "write", fail)
        with pytest.raises(Broken):
            run_in(tmp_path)
    assert len(Journal(tmp_path / "journal.sqlite", read_only=True).settling()) == lost - 9
    listener = Listener()
    run_in(tmp_path, listener=listener)
    assert outcome(tmp_path) == outcome(whole)
    assert not any("otherwise" in said for said in listener.said)


def test_a_run_that_has_settled_early_settles_no_further(tmp_path: Path) -> None:
    changes = {"stop_below": 1e9}
    run_in(tmp_path / "whole", **changes)
    with pytest.raises(Broken):
        run_in(tmp_path / "broken", listener=break_off_after(10), **changes)  # nine edits and a round
    run_in(tmp_path / "broken", **changes)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    assert [curve["converged"] for curve in outcome(tmp_path / "broken")["settling"]] == [True]


def test_nothing_settles_where_no_round_is_wanted(tmp_path: Path) -> None:
    run_in(tmp_path, settling_rounds=0)
    assert outcome(tmp_path)["settling"] == []
    editor = small_editor()
    editor.edit(ASKED)
    editor.save_pretrained(tmp_path / "expected")
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "adapter" / file.name).read_bytes()


def test_settling_is_checked_against_the_journal(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        run_in(tmp_path, listener=break_off_after(12))
    for path in (tmp_path / "checkpoints").iterdir():
        if int(path.name) > 9:
            shutil.rmtree(path)
    with sqlite3.connect(tmp_path / "journal.sqlite") as journal:
        journal.execute("UPDATE settling SET training = json_set(training, '$.losses[0]', 0.125) WHERE round = 1")
    listener = Listener()
    run_in(tmp_path, listener=listener)
    (said,) = (text for text in listener.said if "otherwise" in text)
    assert said.startswith("settling round 2 ") and "0.125" in said
    assert outcome(tmp_path) == outcome(whole)  # what the journal has is of the rounds that the state has had


def test_settling_without_a_finite_loss_ends_before_that_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(trainer: Learner, past: Sequence[Encoded], number: int, on_step: OnStep | None = None) -> Curve:
        curve = settle(trainer, past, number, on_step)
        if number == 2:  # having left its traces
            raise DivergedError(math.nan, curve.steps)
        return curve

    monkeypatch.setattr("baft.trained.settle", diverge)
    with pytest.raises(Broken):
        run_in(tmp_path / "run", listener=break_off_after(12))
    listener = Listener()
    run_in(tmp_path / "run", listener=listener)
    found = outcome(tmp_path / "run")
    assert [curve["diverged"] for curve in found["settling"]] == [False, False, True]
    assert found["settling"][2]["losses"] == [None]
    assert not any("otherwise" in said for said in listener.said)
    editor = small_editor()
    editor.edit(ASKED)
    with pytest.raises(DivergedError):
        states: list[dict[str, Tensor]] = []
        editor.settle(on_round=lambda _: states.append(editor.state()))
    editor.load_state(states[-1])
    editor.save_pretrained(tmp_path / "expected")
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "run" / "adapter" / file.name).read_bytes()
