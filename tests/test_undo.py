"""Edits taken back: the state before a request is exactly that state, and a dropped request was never there."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_runs import ASKED, PLAN, Listener, run_in, small_editor
from tiny import one_thread as one_thread

from baft.engine.continuations import Asked, Continuations
from baft.engine.encoding import Tokens
from baft.engine.schedule import Curve
from baft.runs.folder import RunFolder
from baft.runs.outcome import outcome
from baft.runs.run import RunPlan, open_context
from baft.runs.undo import cost_of_drop, cost_of_rollback, drop, roll_back

SPARSE = RunPlan(**{**vars(PLAN), "checkpoint_every": 4})


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A finished run, with checkpoints after 4, 8 and 9 edits, and after all that settles them."""
    run_in(tmp_path / "run", plan=SPARSE)
    return tmp_path / "run"


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in load_file(folder / "adapter_model.safetensors").items()}


def test_rolling_back_gives_the_state_before_a_request(done: Path, tmp_path: Path) -> None:
    place = RunFolder(done)
    cost = cost_of_rollback(place, 6)
    assert (cost.kept, cost.checkpoint, cost.edits) == (6, 4, 2) and cost.seconds > 0
    roll_back(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, 6)
    assert place.journal.positions() == [0, 1, 2, 3, 4, 5]
    assert not place.results.exists()
    place.close()
    before = small_editor()
    before.edit(ASKED[:6])
    before.save_pretrained(tmp_path / "before")
    assert tensors(done / "adapter") == tensors(tmp_path / "before")
    assert json.loads((done / "adapter" / "edits.json").read_text())["edits"] == [
        request.model_dump(mode="json") for request in ASKED[:6]
    ]


@pytest.mark.parametrize("broken", ["baft.runs.sequential.SequentialRun.restore", "baft.storage.save_editor"])
@pytest.mark.parametrize("number", [0, 6])
def test_going_back_that_broke_off_can_be_asked_for_again(
    number: int, broken: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = RunFolder(done)
    drop(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, 4)

    def go_back() -> None:
        roll_back(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, number)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(broken, _break_off)
        go_back()
    left = [position for position in range(number) if position != 4]
    assert place.journal.positions() == left and not place.adapter.exists()
    go_back()
    assert place.journal.positions() == left
    before = small_editor()
    before.edit([ASKED[position] for position in left])
    before.save_pretrained(tmp_path / "before")
    assert tensors(done / "adapter") == tensors(tmp_path / "before")
    place.close()
    run_in(done, plan=SPARSE)  # once edited on, there is nothing to be asked for again
    with pytest.raises(ValueError, match=r"\(0 to 8\), got 4, which is left out already$"), RunFolder(done) as place:
        cost_of_rollback(place, 4)


def test_a_drop_that_broke_off_is_gone_on_with(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = RunFolder(done)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("baft.runs.sequential.SequentialRun.restore", _break_off)
        drop(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, 6)
    assert not place.adapter.exists()  # no state that isn't the journal's
    place.close()
    run_in(done, plan=SPARSE)
    without = small_editor()
    without.edit([*ASKED[:6], *ASKED[7:]])
    without.settle()
    without.save_pretrained(tmp_path / "without")
    assert tensors(done / "adapter") == tensors(tmp_path / "without")


def _break_off(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_was_rolled_back_goes_on_as_the_whole_one(done: Path) -> None:
    whole = outcome(done)
    place = RunFolder(done)
    roll_back(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, 3)
    place.close()
    run_in(done, plan=SPARSE)
    assert outcome(done) == whole


def test_a_dropped_request_was_never_there(done: Path, tmp_path: Path) -> None:
    place = RunFolder(done)
    assert cost_of_drop(place, 5).edits == 4  # 4 once more, and 6, 7, 8
    drop(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, 5)
    assert place.journal.positions() == [0, 1, 2, 3, 4, 6, 7, 8]
    place.close()
    without = small_editor()
    without.edit([*ASKED[:5], *ASKED[6:]])
    without.settle()
    without.save_pretrained(tmp_path / "without")
    assert tensors(done / "adapter") == tensors(tmp_path / "without")
    run_in(done, plan=SPARSE)
    results = json.loads((done / "results.json").read_text())
    assert results["edits"] == results["requests"] == 8 and results["dropped"] == [5]


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[list[Asked]]:
    """What the unedited model is asked to write together, each time that it is."""
    together: list[list[Asked]] = []
    written = Continuations._written

    def note(self: Continuations, missing: list[Asked]) -> dict[Asked, list[Tokens]]:
        together.append(list(missing))
        return written(self, missing)

    monkeypatch.setattr(Continuations, "_written", note)
    return together


@pytest.mark.parametrize(("ahead", "kept", "left"), [(64, 0, 1), (4, 1, 1), (2, 2, 2)])
def test_texts_that_came_of_a_dropped_requests_company_are_written_anew(
    ahead: int, kept: int, left: int, together: list[list[Asked]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In that which they have in a run without it; those of the requests before that company are kept."""
    monkeypatch.setattr("baft.runs.sequential._ASKED_AHEAD", ahead)
    quick = {"max_steps": 1, "settling_rounds": 0}
    run_in(tmp_path / "run", plan=SPARSE, **quick)
    together.clear()
    with RunFolder(tmp_path / "run") as place:
        drop(open_context(small_editor(**quick), ASKED, plan=SPARSE, folder=place), place, 5)
    anew = together.copy()
    together.clear()
    run_in(tmp_path / "without", requests=[*ASKED[:5], *ASKED[6:]], plan=SPARSE, **quick)
    assert anew == together[kept:] and len(anew) == left


def test_of_several_that_are_dropped_each_ones_company_is_found(
    together: list[list[Asked]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one that was dropped the others are one place further in front."""
    monkeypatch.setattr("baft.runs.sequential._ASKED_AHEAD", 4)
    quick = {"max_steps": 1, "settling_rounds": 0}
    run_in(tmp_path / "run", plan=SPARSE, **quick)
    with RunFolder(tmp_path / "run") as place:
        for number in (6, 4):
            together.clear()
            drop(open_context(small_editor(**quick), ASKED, plan=SPARSE, folder=place), place, number)
        anew = together.copy()
        together.clear()
        drop(open_context(small_editor(**quick), ASKED, plan=SPARSE, folder=place), place, 2)
    left = [ASKED[k] for k in (0, 1, 3, 5, 7, 8)]
    again = together.copy()
    together.clear()
    run_in(tmp_path / "without", requests=left, plan=SPARSE, **quick)
    assert again == together and len(again) == 2 and len(anew) == 1


def test_an_older_versions_texts_are_all_written_anew(tmp_path: Path, together: list[list[Asked]]) -> None:
    """It doesn't say in which company they were written."""
    quick = {"max_steps": 1, "settling_rounds": 0}
    run_in(tmp_path, plan=SPARSE, **quick)
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as journal:
        journal.execute("ALTER TABLE continued DROP COLUMN until")
    together.clear()
    with RunFolder(tmp_path) as place:
        drop(open_context(small_editor(**quick), ASKED, plan=SPARSE, folder=place), place, 8)
    assert len(together) == 1


def test_a_run_that_is_dropped_from_before_its_end_goes_on_as_one_without(
    together: list[list[Asked]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a company: the unedited model is asked about all of it nevertheless."""
    monkeypatch.setattr("baft.runs.sequential._ASKED_AHEAD", 4)
    left = iter(range(6))

    def stop() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "run", plan=SPARSE, listener=Listener(stop))
    together.clear()
    with RunFolder(tmp_path / "run") as place:
        assert place.journal.positions() == [*range(7)]
        drop(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, 1)
    run_in(tmp_path / "run", plan=SPARSE)
    anew = together.copy()
    together.clear()
    run_in(tmp_path / "without", requests=[ASKED[0], *ASKED[2:]], plan=SPARSE)
    assert anew == together and len(anew) == 2
    found, expected = outcome(tmp_path / "run"), outcome(tmp_path / "without")
    for name in ("tensors", "settling", "metrics"):
        assert found[name] == expected[name]


def test_without_its_last_request_a_run_is_settled_and_looked_at_anew(done: Path, tmp_path: Path) -> None:
    place = RunFolder(done)
    settling = sum(curve.seconds for curve in place.journal.settling())
    cost = cost_of_drop(place, 8)
    assert cost.edits == 0 and cost.seconds == pytest.approx(settling) and settling > 0
    drop(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, 8)
    place.close()
    run_in(done, plan=SPARSE)
    run_in(tmp_path / "without", requests=ASKED[:8], plan=SPARSE)
    found, expected = outcome(done), outcome(tmp_path / "without")
    assert (found["tensors"], found["settling"]) == (expected["tensors"], expected["settling"])
    assert found["retention"] == expected["retention"]
    assert [(point["edits"], point["settled"]) for point in found["retention"]] == [(1, 0), (4, 0), (8, 0), (8, 6)]


def test_a_half_settled_run_rolls_back_to_edits_that_are_not_settled(tmp_path: Path) -> None:
    run_in(tmp_path / "whole", plan=SPARSE)
    place = RunFolder(tmp_path / "whole")
    place.checkpoints().cut(11)
    place.journal.cut(9)  # what is settled, and nothing else
    for number in range(2):
        place.journal.add_settling(number, Curve([0.5]))
    roll_back(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, 8)
    assert place.journal.settling() == [] and place.checkpoints().counts() == [4, 8]
    place.close()
    before = small_editor()
    before.edit(ASKED[:8])
    before.save_pretrained(tmp_path / "before")
    assert tensors(tmp_path / "whole" / "adapter") == tensors(tmp_path / "before")


def test_what_was_never_edited_cannot_be_taken_back(done: Path) -> None:
    place = RunFolder(done)
    for number in (9, -1):
        with pytest.raises(ValueError, match=rf"expected the number of one that was edited \(0 to 8\), got {number}"):
            cost_of_rollback(place, number)
