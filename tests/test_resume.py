"""A run that breaks off goes on from there, and ends as if nothing had happened: bit for bit."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ASKED, PLAN, Broken, Listener, break_off_after, run_in, small_editor
from tiny import one_thread as one_thread

from baft.engine.continuations import Continuations
from baft.engine.encoding import Encoded
from baft.engine.history import Chunks
from baft.engine.learner import DivergedError, Learner
from baft.engine.schedule import Curve, OnStep, edit_next
from baft.engine.surroundings import Surroundings
from baft.evaluation.measures import summarise
from baft.report import write_report
from baft.report.source import EditLine, Metrics, RunSource, read_run
from baft.runs.folder import RunFolder
from baft.runs.journal import Journal
from baft.runs.outcome import outcome
from baft.runs.run import RunPlan
from baft.runs.sequential import RequestError
from baft.runs.undo import is_waiting, leave_out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never broken off."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_in(folder)
    return folder


@pytest.mark.parametrize("changes", [{"retellings": 2}, {"retellings": 2, "contexts": 2}])
def test_retellings_are_drawn_alike_again(
    changes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model tells of no fact by itself: here each is told in two more ways, the second the better known."""

    def retold(surroundings: Surroundings, row: Encoded) -> tuple[Encoded, ...]:
        words = [row.ids[: row.prompt_length], (row.ids[0], *row.ids[: row.prompt_length])]
        return tuple(Encoded((*told, *row.ids[row.prompt_length :]), len(told), words=row.words) for told in words)

    monkeypatch.setattr(Surroundings, "retold", retold)
    run_in(tmp_path / "whole", **changes)
    monkeypatch.undo()
    run_in(tmp_path / "without", **changes)
    assert outcome(tmp_path / "whole") != outcome(tmp_path / "without")
    monkeypatch.setattr(Surroundings, "retold", retold)
    plan = RunPlan(**{**vars(PLAN), "checkpoint_every": 4})
    with pytest.raises(Broken):
        run_in(tmp_path / "broken", plan=plan, listener=break_off_after(6), **changes)
    run_in(tmp_path / "broken", plan=plan, **changes)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_what_the_model_writes_of_subjects_is_in_the_journal(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on doesn't have it written anew: it would take long, and might come out otherwise."""
    with pytest.raises(Broken):
        run_in(tmp_path / "broken", listener=break_off_after(6))

    def refuse(*_: Any) -> None:
        raise AssertionError("written anew")

    monkeypatch.setattr(Continuations, "_written", refuse)
    run_in(tmp_path / "broken")
    assert outcome(tmp_path / "broken") == outcome(whole)


def test_a_report_of_a_run_that_goes_on_has_what_there_is(tmp_path: Path) -> None:
    """Read while the run is at it, after five of its nine edits."""
    seen: list[tuple[RunSource, list[EditLine]]] = []

    measured: list[RunSource] = []

    def look() -> None:
        journal = Journal(tmp_path / "journal.sqlite", read_only=True)
        if any(journal.measured("final")):
            measured.append(read_run(tmp_path))
        if len(journal.positions()) == 5 and not seen:
            source = read_run(tmp_path)
            seen.append((source, list(source.edits())))
            write_report([tmp_path], tmp_path.parent / "report.html")

    finished = run_in(tmp_path, listener=Listener(look))
    ((source, edits),) = seen
    in_the_end = list(read_run(tmp_path).edits())[:5]
    assert edits == [edit.model_copy(update={"final": []}) for edit in in_the_end]
    results = source.results
    assert (results.edits, results.requests, results.finished, results.metrics.final) == (5, 9, False, None)
    immediate = summarise(
        Journal(tmp_path / "journal.sqlite", read_only=True).measures(p, "immediate") for p in range(5)
    )
    assert results.last == Metrics.model_validate(immediate)
    assert measured and all(source.results.metrics.final is None for source in measured)  # it may be of a part of them
    assert [point.edits for point in results.retention] == [1, 4] and results.together == results.retention[-1]
    assert results.config == finished.results["config"] and results.protocol == finished.results["protocol"]
    page = (tmp_path.parent / "report.html").read_text()
    assert "5 of 9 sequential edits" in page and "not finished" in page


def test_a_run_without_an_edit_has_no_report_yet(tmp_path: Path) -> None:
    with pytest.raises(Broken):
        run_in(tmp_path, listener=break_off_after(0), mode="single")
    Journal(tmp_path / "journal.sqlite").cut(0)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/journal.sqlite: expected a run with edits, got one that has none"
    ):
        read_run(tmp_path)


# Nine edits advance nine times, six settling rounds six times, and the measures at the end once.
@pytest.mark.parametrize(
    ("advances", "every"),
    [(0, 1), (3, 1), (3, 4), (8, 4), (5, 100), (9, 100), (10, 1), (10, 4), (12, 100), (14, 4), (15, 1), (15, 100)],
)
def test_a_run_that_broke_off_ends_as_the_whole_one(advances: int, every: int, whole: Path, tmp_path: Path) -> None:
    plan = RunPlan(**{**vars(PLAN), "checkpoint_every": every})
    with pytest.raises(Broken):
        run_in(tmp_path, plan=plan, listener=break_off_after(advances))
    assert not (tmp_path / "results.json").exists()
    listener = Listener()
    run_in(tmp_path, plan=plan, listener=listener)
    assert outcome(tmp_path) == outcome(whole)
    assert not any("otherwise" in said for said in listener.said)


def test_it_may_break_off_many_times(whole: Path, tmp_path: Path) -> None:
    sessions = 0
    while not (tmp_path / "results.json").exists():
        with contextlib.suppress(Broken):
            run_in(tmp_path, listener=break_off_after(1))
        sessions += 1
    assert sessions >= len(ASKED) // 2
    assert outcome(tmp_path) == outcome(whole)


def test_a_killed_run_ends_as_the_whole_one(whole: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    draw = random.Random(0)
    kills = 0
    while not (tmp_path / "results.json").exists():
        process = context.Process(target=run_in, args=(tmp_path,))
        process.start()
        process.join(draw.uniform(0.05, 0.6) if kills < 8 else 60)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills >= 3
    assert outcome(tmp_path) == outcome(whole)


def test_what_a_run_says_is_checked_against_the_journal(tmp_path: Path) -> None:
    plan = RunPlan(checkpoint_every=100)
    with pytest.raises(Broken):
        run_in(tmp_path, plan=plan, listener=break_off_after(3))
    with sqlite3.connect(tmp_path / "journal.sqlite") as journal:
        journal.execute("UPDATE edits SET training = json_set(training, '$.losses[0]', 0.125) WHERE position >= 1")
        (edits,) = journal.execute("SELECT count(*) FROM edits").fetchone()
    listener = Listener()
    run_in(tmp_path, plan=plan, listener=listener)
    (said,) = (text for text in listener.said if "otherwise" in text)  # one of a thousand would be enough
    assert said.startswith("edit 1 ") and "0.125" in said
    assert f"so did {edits - 2} more of the {edits} edits that were made again" in listener.said
    results = json.loads((tmp_path / "results.json").read_text())
    assert said in results["sessions"][1]["notes"]


def test_a_damaged_checkpoint_is_passed_over_aloud(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        run_in(tmp_path, plan=RunPlan(**{**vars(PLAN), "checkpoint_every": 2}), listener=break_off_after(6))
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1] / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    listener = Listener()
    run_in(tmp_path, listener=listener)
    assert any("is damaged" in said and "going on from 4 edits" in said for said in listener.said)
    assert outcome(tmp_path) == outcome(whole)


def test_a_request_without_a_finite_loss_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Chunks] = []

    def diverge(trainer: Learner, new: Chunks, past: Sequence[Encoded], on_step: OnStep | None = None) -> Curve:
        calls.append(new)
        curve = edit_next(trainer, new, past, on_step)
        if len(calls) == 3:  # having left its traces
            raise DivergedError(math.nan, curve.steps)
        return curve

    monkeypatch.setattr("baft.trained.edit_next", diverge)
    run_in(tmp_path / "with", requests=ASKED[:5])
    monkeypatch.undo()
    run_in(tmp_path / "without", requests=[*ASKED[:2], *ASKED[3:5]])
    with_it, without = outcome(tmp_path / "with"), outcome(tmp_path / "without")
    assert with_it["training"]["diverged"] == 1
    assert with_it["tensors"] == without["tensors"]
    diverged = with_it["records"][2]["training"]
    assert diverged["diverged"] and diverged["losses"][-1] is None


def fail_at(monkeypatch: pytest.MonkeyPatch, errors: Mapping[int, Exception]) -> None:
    """Let the edits of some of ``ASKED`` fail, having left their traces."""
    spoiled = {small_editor()._encode(ASKED[position]).ids: error for position, error in errors.items()}

    def edit(trainer: Learner, new: Chunks, past: Sequence[Encoded], on_step: OnStep | None = None) -> Curve:
        curve = edit_next(trainer, new, past, on_step)
        if new[0].ids in spoiled:
            raise spoiled[new[0].ids]
        return curve

    monkeypatch.setattr("baft.trained.edit_next", edit)


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_request_that_memory_runs_out_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays so where the run goes on and makes the edits around it again, even if there is enough by then."""
    plan = dataclasses.replace(PLAN, checkpoint_every=100)
    listener = break_off_after(4)
    fail_at(monkeypatch, {2: NO_MEMORY})
    with pytest.raises(Broken):
        run_in(tmp_path / "with", requests=ASKED[:5], plan=plan, listener=listener)
    assert any(said.startswith("edit 2 needs more memory than there is: it is left out") for said in listener.said)
    monkeypatch.undo()
    listener = Listener()
    run_in(tmp_path / "with", requests=ASKED[:5], plan=plan, listener=listener)
    assert not any("otherwise" in said for said in listener.said)
    run_in(tmp_path / "without", requests=[*ASKED[:2], *ASKED[3:5]], plan=plan)
    with_it, without = outcome(tmp_path / "with"), outcome(tmp_path / "without")
    assert with_it["training"]["out_of_memory"] == 1 and with_it["training"]["diverged"] == 0
    assert with_it["tensors"] == without["tensors"]
    assert with_it["records"][2]["training"]["out_of_memory"] and with_it["records"][2]["final"]


def test_requests_that_fail_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, {1: NO_MEMORY, 2: DivergedError(math.nan, 1), 3: NO_MEMORY})
    with pytest.raises(RequestError, match=r"request 3: CUDA out of memory.* baft edits drop \S+ 3 --yes, then"):
        run_in(tmp_path)
    assert Journal(tmp_path / "journal.sqlite", read_only=True).positions() == [0, 1, 2]


def test_memory_that_runs_out_for_what_is_made_again_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal says that it is edited in."""
    plan = dataclasses.replace(PLAN, checkpoint_every=100)
    with pytest.raises(Broken):
        run_in(tmp_path, plan=plan, listener=break_off_after(4))
    fail_at(monkeypatch, {2: NO_MEMORY})
    with pytest.raises(torch.OutOfMemoryError):
        run_in(tmp_path, plan=plan)
    monkeypatch.undo()
    run_in(tmp_path, plan=plan)


def test_a_run_that_ended_at_a_request_goes_on_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, {4: ValueError("the rows of a basis have become dependent")})
    folder = tmp_path / "a run"
    for _ in range(2):  # again, the same end
        with pytest.raises(RequestError, match=rf"request 4: the rows .* baft edits drop '{folder}' 4 --yes, then"):
            run_in(folder)
    with RunFolder(folder) as place:
        assert [is_waiting(place, number) for number in (-1, 3, 4, 8, 9)] == [False, False, True, True, False]
        leave_out(place, 4)
        with pytest.raises(ValueError, match="still to be edited, got 4"):
            leave_out(place, 4)
    run_in(folder)
    run_in(tmp_path / "without", requests=[*ASKED[:4], *ASKED[5:]])
    found, expected = outcome(folder), outcome(tmp_path / "without")
    assert (found["tensors"], found["settling"]) == (expected["tensors"], expected["settling"])
    assert found["dropped"] == [4] and [record["index"] for record in found["records"]] == [0, 1, 2, 3, 5, 6, 7, 8]


# -- what isn't gone on with --


def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Broken):
        run_in(tmp_path, listener=break_off_after(1))
    with pytest.raises(ValueError, match=r"another run.*config\.learning_rate was 0\.06 and is 0\.05"):
        run_in(tmp_path, learning_rate=0.05)
    with pytest.raises(ValueError, match=r"the requests of the data set changed \(9 before and now, but with other"):
        run_in(tmp_path, requests=ASKED[::-1])
    with pytest.raises(ValueError, match=r"another run.*the requests of the data set changed \(9 before, 8 now\)$"):
        run_in(tmp_path, requests=ASKED[:-1])
    with pytest.raises(ValueError, match=r"another run.*the held-out texts changed \(2 before, 1 now\)$"):
        run_in(tmp_path, plan=dataclasses.replace(PLAN, held_out=PLAN.held_out[:1]))


def test_another_code_is_refused_with_the_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pull, say, in a checkout that the packages run from."""
    for commit, way_back in (("3fa2c", "; its code was that of commit 3fa2c: check that out"), (None, "")):
        folder = tmp_path / str(commit)
        with monkeypatch.context() as patched, pytest.raises(Broken):
            patched.setattr("baft.runs.folder.commit_of", lambda _, commit=commit: commit)
            run_in(folder, listener=break_off_after(1))
        with monkeypatch.context() as patched:
            patched.setattr("baft.runs.identity.hash_of_code", lambda: "9bc")
            with pytest.raises(ValueError, match=rf"the code of baft changed{way_back}$"):
                run_in(folder)
        with pytest.raises(ValueError, match=r"learning_rate was 0\.06 and is 0\.05$"):
            run_in(folder, learning_rate=0.05)


def test_other_weights_and_another_tokenizer_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Broken):
        run_in(tmp_path, listener=break_off_after(1))
    editor = small_editor()
    with torch.no_grad():
        next(editor.model.parameters())[0, 0] += 1e-3
    with monkeypatch.context() as patched:
        patched.setattr("small_runs.small_editor", lambda **_: editor)
        with pytest.raises(ValueError, match=r"can't be gone on with: the weights of the model changed$"):
            run_in(tmp_path)
    other = small_editor()
    other.tokenizer = copy.deepcopy(other.tokenizer)
    other.tokenizer.add_tokens(["Freedonia"])
    monkeypatch.setattr("small_runs.small_editor", lambda **_: other)
    with pytest.raises(ValueError, match=r"can't be gone on with: the tokenizer of the model changed$"):
        run_in(tmp_path)


def test_the_log_of_a_run_that_goes_on_lacks_nothing(tmp_path: Path) -> None:
    """Wherever it breaks off: between an edit's line in the journal and in the log, too."""
    run_in(tmp_path / "whole", log="csv")

    def rows(folder: Path) -> list[dict[str, str]]:
        with (folder / "metrics.csv").open(newline="") as file:
            return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]

    expected = rows(tmp_path / "whole")
    assert [row["edits"] for row in expected].count("4") == 2  # the edit, and the look back at those so far
    for place in ("baft.runs.journal.Journal.add", "baft.runs.journal.Journal.add_retention"):
        for number in (1, 3, 4):
            folder = tmp_path / f"{place}{number}"
            with pytest.MonkeyPatch.context() as patched, pytest.raises(Broken):
                patched.setattr(place, broken_off_behind(place, number))
                run_in(folder, log="csv")
            run_in(folder, log="csv")
            assert rows(folder) == expected


def broken_off_behind(place: str, number: int) -> Callable[..., None]:
    """A method of ``Journal`` that does its work, but behind which all ends at its call of that number."""
    original, calls = getattr(Journal, place.rpartition(".")[2]), itertools.count(1)

    def broken(*arguments: Any) -> None:
        original(*arguments)
        if next(calls) == number:
            raise Broken

    return broken


def test_requests_that_diverge_in_a_row_are_counted_across_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(trainer: Learner, new: Chunks, past: Sequence[Encoded], on_step: OnStep | None = None) -> Curve:
        if new[0].ids in spoiled:
            raise DivergedError(math.nan, 0)
        return edit_next(trainer, new, past, on_step)

    spoiled = [small_editor()._encode(request).ids for request in ASKED[3:6]]
    monkeypatch.setattr("baft.trained.edit_next", diverge)
    for _ in range(2):  # again, the same end
        with pytest.raises(RequestError, match="request 5: the edit loss became nan"):
            run_in(tmp_path, plan=dataclasses.replace(PLAN, checkpoint_every=5))
        journal = Journal(tmp_path / "journal.sqlite", read_only=True)
        assert journal.positions() == [0, 1, 2, 3, 4]
        journal.close()
