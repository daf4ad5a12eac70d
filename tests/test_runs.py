"""The parts of a run: what is kept of it, when it looks back, what it says at its end."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from looks import texts_written_together
from small_runs import ASKED, Listener, run_in, small_editor
from small_runs import finished_run as finished_run
from tiny import one_thread as one_thread

from baft.engine.continuations import Asked, Continuations
from baft.engine.encoding import Tokens
from baft.runs import retention
from baft.runs import sequential as sequential_run
from baft.runs.conflicts import can_hold, conflicts
from baft.runs.folder import RunFolder
from baft.runs.journal import Journal
from baft.runs.retention import Retention, is_milestone, sample
from baft.runs.run import RunPlan, run_edits


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


# -- a run's end --


def test_edits_jsonl_has_all_that_the_journal_has(finished_run: Path) -> None:
    lines = [json.loads(line) for line in (finished_run / "edits.jsonl").read_text().splitlines()]
    records = list(Journal(finished_run / "journal.sqlite", read_only=True).records())
    assert [line["index"] for line in lines] == list(range(len(ASKED)))
    assert lines == [json.loads(json.dumps(record.as_json())) for record in records]
    assert [record.request for record in records] == ASKED
    assert all(record.immediate and record.final for record in records)


def test_the_retention_curve_looks_back_when_it_is_due(finished_run: Path) -> None:
    points = results_of(finished_run)["retention"]
    moments = [(point["edits"], point["settled"]) for point in points]
    assert moments == [(1, 0), (4, 0), (8, 0), (9, 0), (9, 6)]  # 1, every 4, and the end before and after settling
    for point in points:
        assert point["general"]["perplexity"] > 1 and point["general"]["before"] == points[0]["general"]["before"]
        (shares,) = point["gates"].values()
        assert len(shares) == 8 and sum(shares) == pytest.approx(1.0)
        assert point["memory"]["process"] > 0
    assert points[0]["seconds"] < points[-1]["seconds"]


def test_general_ability_changes_with_the_edits(finished_run: Path) -> None:
    last = results_of(finished_run)["retention"][-1]["general"]
    assert last["perplexity"] != pytest.approx(last["before"], rel=1e-3)


def test_the_time_for_bookkeeping_is_told(finished_run: Path) -> None:
    (session,) = results_of(finished_run)["sessions"]
    assert 0 < session["bookkeeping_seconds"] < session["seconds"]


def test_peak_memory_is_that_of_all_the_processes_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    much = {"process": 2**50, "gpu": None}  # what one that was broken off had come to
    monkeypatch.setattr(retention, "peak_memory_bytes", lambda: much)
    run_in(tmp_path / "run")
    assert results_of(tmp_path / "run")["memory"]["peak_bytes"] == much


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_other_modes_go_on_too(mode: Any, tmp_path: Path) -> None:
    whole = run_in(tmp_path / "whole", mode=mode, batch_passes=2).results
    broken = tmp_path / "broken"

    class Stop(Exception):
        pass

    def stop() -> None:
        # The first single edits are on the disk, or the batch is edited and its measures have begun.
        if len(Journal(broken / "journal.sqlite", read_only=True).positions()) > 0:
            raise Stop

    with pytest.raises(Stop):
        run_in(broken, mode=mode, listener=Listener(stop), batch_passes=2)
    resumed = run_in(broken, mode=mode, batch_passes=2).results
    assert resumed["metrics"] == whole["metrics"] and resumed["edits"] == len(ASKED)
    assert len(resumed["sessions"]) == 2


def test_texts_about_the_next_subjects_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = texts_written_together(monkeypatch)
    monkeypatch.setattr(sequential_run, "_ASKED_AHEAD", 4)
    run_in(tmp_path, max_steps=1, settling_rounds=0)
    subjects = [request.subject for request in ASKED]
    news = [len(set(subjects[k : k + 4]) - set(subjects[:k])) for k in range(0, len(ASKED), 4)]
    assert asked == [new + len(subjects[k : k + 4]) for new, k in zip(news, range(0, len(ASKED), 4), strict=True)]


def test_an_editor_edits_on_when_its_run_is_over(tmp_path: Path) -> None:
    """And asks a journal no more that is closed."""
    folder, editor = RunFolder(tmp_path / "run"), small_editor(max_steps=1)
    folder.begin({}, {})
    run_edits(editor, ASKED[:2], "sequential", folder=folder)
    folder.close()
    assert len(editor.edit(ASKED[2:4])) == 2
    assert len(list(editor.edit_each(ASKED[4:6]))) == 2


def test_the_seconds_of_an_edit_have_those_of_writing_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Continuations._written

    def slowly(self: Continuations, missing: Sequence[Asked]) -> dict[Asked, list[Tokens]]:
        time.sleep(1.0)
        return written(self, missing)

    monkeypatch.setattr(Continuations, "_written", slowly)
    run_in(tmp_path, max_steps=1, settling_rounds=0)
    journal = Journal(tmp_path / "journal.sqlite", read_only=True)
    assert sum(record.seconds for record in journal.records()) > 1.0


# -- requests for the same thing --


def test_conflicts_are_listed_and_what_was_contradicted_does_not_count(tmp_path: Path) -> None:
    again = ASKED[0].model_copy(update={"id": "again"})
    other = ASKED[1].model_copy(update={"target": "Sudland"})
    listener = Listener()
    results = run_in(tmp_path, requests=[*ASKED[:3], again, other], listener=listener, max_steps=30).results
    prompts = [ASKED[0].prompt, ASKED[1].prompt]
    assert results["conflicts"] == [
        {
            "kind": "duplicate",
            "prompt": prompts[0],
            "positions": [0, 3],
            "ids": [None, "again"],
            "targets": ["Ebor", "Ebor"],
        },
        {
            "kind": "contradiction",
            "prompt": prompts[1],
            "positions": [1, 4],
            "ids": [None, None],
            "targets": ["Arvik", "Sudland"],
        },
    ]
    assert [text for text in listener.said if "the last one wins" in text and repr(prompts[1]) in text]
    assert any("(0: 'Ebor', 3 (id again): 'Ebor')" in text for text in listener.said)
    assert results["metrics"]["immediate"]["reliability"]["generation"] == 1.0
    assert results["metrics"]["final"]["reliability"]["generation"] == 1.0
    assert results["superseded"] == [1]
    last = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert last[1]["final"][0]["text"] == last[4]["final"][0]["text"]


def test_what_was_contradicted_is_not_asked_whether_it_still_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[int, list[str]]] = []
    measure = Retention.measure

    def note(self: Retention, editor: Any, requests: list[Any], edits: int, *rest: Any) -> dict[str, Any]:
        looked.append((edits, [request.target for request in requests]))
        return measure(self, editor, requests, edits, *rest)

    monkeypatch.setattr(Retention, "measure", note)
    asked = [ASKED[0].model_copy(update={"target": target}) for target in ("Ebor", "Arvik", "Paris")]
    plan = RunPlan(measure_every=1, retained=2, final=1)
    run_in(tmp_path, requests=[ASKED[1], *asked], plan=plan, max_steps=1, settling_rounds=0)
    own = ASKED[1].target
    assert dict(looked) == {1: [own], 2: [own, "Ebor"], 3: [own, "Arvik"], 4: [own, "Paris"]}
    lines = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines if line["final"]] in ([own], ["Paris"])


def test_of_many_conflicts_a_few_are_named_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baft.runs.run._NAMED", 2)
    listener = Listener()
    twice = [request for request in ASKED[:4] for _ in range(2)]
    report = run_in(tmp_path, requests=twice, listener=listener, max_steps=1, settling_rounds=0)
    assert len(report.results["conflicts"]) == 4
    (session,) = report.results["sessions"]
    for said in (session["notes"], [text for text in listener.said if "asked for" in text]):
        assert [text.partition("is asked for")[0].strip() for text in said[:2]] == [repr(r.prompt) for r in ASKED[:2]]
        assert said[2:] == ["2 more prompts are asked for several times: results.json lists them under conflicts"]


def test_targets_that_were_true_already_are_counted_aloud(tmp_path: Path) -> None:
    true = [request.model_copy(update={"ground_truth": (request.target,)}) for request in ASKED[:2]]
    others = [ASKED[2].model_copy(update={"ground_truth": ("Nowhere",)}), ASKED[3]]
    listener = Listener()
    (session,) = run_in(tmp_path, requests=true + others, listener=listener, max_steps=1).results["sessions"]
    said = "2 requests have a target that was true already: nobody says what it replaces"
    assert said in listener.said and said in session["notes"]


def test_only_what_is_edited_in_contradicts() -> None:
    requests = [ASKED[0].model_copy(update={"target": target}) for target in ("Ebor", "Arvik", "Ebor", "Paris")]
    found = conflicts(requests)
    assert can_hold(found, range(4)) == [3]
    assert can_hold(found, range(3)) == can_hold(found, [0, 1, 2]) == [0, 2]  # before it came to the last one
    assert can_hold(found, range(4), given_up={3}) == [0, 2, 3]
    assert can_hold(found, [0, 1], given_up={1}) == [0, 1]
    assert conflicts([ASKED[0], ASKED[0].model_copy(update={"prompt": f"{ASKED[0].prompt} "})]) == []


# -- retention --


def test_milestones() -> None:
    assert [n for n in range(1, 1900) if is_milestone(n)] == [1, 10, 100, 1000]
    later = [2000, 5000, 10_000, 20_000, 50_000, 100_000]
    assert [n for n in range(1900, 100_100) if is_milestone(n)] == later
    assert [n for n in range(1, 30) if is_milestone(n, 8)] == [1, 8, 10, 16, 24]


def test_samples_of_a_growing_history_share_all_that_they_can() -> None:
    whole = list(range(500))
    before: set[int] = set()
    for size in range(1, 500):
        now = set(sample(whole[:size], 40))
        assert len(now) == min(size, 40)
        assert len(now - before) <= 1  # whoever joined
        before = now
