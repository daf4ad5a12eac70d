"""What a person sees: texts of models and data sets as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import results

from baft import EditRequest
from baft.console import Console
from baft.engine.schedule import Curve
from baft.evaluation.probes import MEASURES, ProbeResult, Question
from baft.runs.folder import RunFolder
from baft.runs.journal import Journal
from baft.runs.records import EditRecord
from baft.runs.run import RunReport

# What rich's markup would take for a tag that was never opened, for a tag, and for the name of a picture.
MARKED = ("[/INST]", "[tribe]", ":cat:")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough for no text to be folded."""
    monkeypatch.setenv("COLUMNS", "300")


def record() -> EditRecord:
    """An edit with all of ``MARKED`` in every text of it."""
    text = " ".join(MARKED)
    request = EditRequest(prompt=f"prompt {text}", target=f"target {text}")
    answer = ProbeResult(
        Question("reliability", "reliability", f"prompt {text}", (f"target {text}",)),
        text=f"said {text}",
        before=f"before {text}",
        generation=False,
        token=None,
        sequence=None,
    )
    return EditRecord(0, request, Curve([1.0], 1), immediate=[answer], final=[answer])


def assert_whole(printed: str, *texts: str) -> None:
    for text in texts:
        assert f"{text} {' '.join(MARKED)}" in printed


def test_texts_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Console().edits([record()])
    assert_whole(capsys.readouterr().out, "prompt", "target")
    Console().edit(record())
    assert_whole(capsys.readouterr().out, "prompt", "before", "said")
    Console().continuations([{name: f"{name} {' '.join(MARKED)}" for name in ("prompt", "before", "after")}])
    assert_whole(capsys.readouterr().out, "prompt", "before: before", "after:  after")
    journal = Journal(None)
    journal.add(record())
    timing = {"seconds_per_edit": 1.0, "total_seconds": 1.0, "steps": 1}
    with RunFolder(tmp_path / "run") as folder:
        Console().report(RunReport(results(1, timing=timing, engine={}), journal), folder)
    assert_whole(capsys.readouterr().out, "prompt", "before", "target", "said")


def test_kinds_of_questions_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """They are a data set's own words."""
    kinds = dict.fromkeys(MARKED, 1.0)
    asked = {"generation": 1.0, "token": None, "sequence": None, "kinds": kinds, "known": None}
    Console().metrics({"now": {**dict.fromkeys(MEASURES), "locality": asked}}, "2 edits")
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in MARKED)


def test_what_is_said_on_the_way_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Such as a prompt that several requests have."""
    with Console().progress() as watcher:
        watcher.stage(f"editing {' '.join(MARKED)}", 1)
        watcher.say(f"prompt {' '.join(MARKED)}")
        watcher.advance(f"note {' '.join(MARKED)}")
    assert_whole(capsys.readouterr().out, "editing", "prompt", "note")
