"""Edits taken back: the state before a request is exactly that state, and a dropped request was never there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_runs import ASKED, PLAN, run_in, small_editor
from tiny import one_thread  # noqa: F401  # a fixture

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
    with pytest.raises(ValueError, match=r"\(0 to 8\), got 4"), RunFolder(done) as place:
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


def test_texts_that_came_of_a_dropped_requests_company_are_written_anew(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In that which they have in a run without it: all together, in the order of the requests."""
    place = RunFolder(done)
    together: list[list[Asked]] = []
    written = Continuations._written

    def note(self: Continuations, missing: list[Asked]) -> dict[Asked, list[Tokens]]:
        together.append(list(missing))
        return written(self, missing)

    monkeypatch.setattr(Continuations, "_written", note)
    drop(open_context(small_editor(), ASKED, plan=SPARSE, folder=place), place, 5)
    place.close()
    anew = together.copy()
    together.clear()
    run_in(tmp_path / "without", requests=[*ASKED[:5], *ASKED[6:]], plan=SPARSE)
    assert anew == together and len(anew) == 1


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
