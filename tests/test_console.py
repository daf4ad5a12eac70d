"""What a person sees: texts of models and data sets as they are, and how far a run is, in a log file too."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from report_runs import results
from rich.console import Console as RichConsole

from baft import EditRequest
from baft.console import Console
from baft.engine.schedule import Curve
from baft.evaluation.probes import MEASURES, ProbeResult, Question
from baft.progress import Lines, bars
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
    request = EditRequest(prompt=f"prompt {text}", target=f"target {text}", id="case[7]")
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
    printed = capsys.readouterr().out
    assert_whole(printed, "prompt", "target")
    assert "case[7]" in printed
    Console().edit(record())
    printed = capsys.readouterr().out
    assert_whole(printed, "edit 0 (id case[7]): prompt", "before", "said")
    Console().continuations([{name: f"{name} {' '.join(MARKED)}" for name in ("prompt", "before", "after")}])
    assert_whole(capsys.readouterr().out, "prompt", "before: before", "after:  after")
    journal = Journal(None)
    journal.add(record())
    timing = {"seconds_per_edit": 1.0, "total_seconds": 1.0, "steps": 1}
    with RunFolder(tmp_path / "run") as folder:
        Console().report(RunReport(results(1, timing=timing, engine={}), journal), folder)
    assert_whole(capsys.readouterr().out, "prompt", "before", "target", "said")


def test_what_a_later_edit_contradicts_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(None)
    journal.add(record())
    timing = {"seconds_per_edit": 1.0, "total_seconds": 1.0, "steps": 1}
    for superseded in ([], [0]):
        Console().edits([record()], superseded)
        assert capsys.readouterr().out.count("✗") == (1 if superseded else 2)
        Console().edit(record(), superseded=bool(superseded))
        assert ("superseded: a later request" in capsys.readouterr().out) == bool(superseded)
        with RunFolder(tmp_path / str(superseded)) as folder:
            found = {**results(1, timing=timing, engine={}), "superseded": superseded}
            Console().report(RunReport(found, journal), folder)
        printed = capsys.readouterr().out
        assert ("✗" in printed, "superseded" in printed) == (not superseded, bool(superseded))


def test_how_edits_ended_is_said_of_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taking all steps is no failure."""

    def said(converged: int, *, given_up: int = 0, dropped: int = 0, steps: int = 9) -> list[str]:
        journal = Journal(None)
        journal.add(*(EditRecord(k, record().request, Curve([1.0], 1, diverged=k < given_up)) for k in range(30)))
        timing = {"seconds_per_edit": 1.0, "total_seconds": 1.0, "steps": steps}
        training = {"converged": converged, "diverged": given_up, "out_of_memory": 0}
        found = results(30, timing=timing, engine={}, training=training, dropped=[*range(40, 40 + dropped)])
        with RunFolder(tmp_path / "run") as folder:
            Console().report(RunReport(found, journal), folder)
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith(("Given up", "Left out")) or "all of their steps" in line]

    assert said(30) == said(0, steps=0) == []
    assert said(0) == ["30 of 30 edits took all of their steps"]
    fewer = "of 30 edits took all of their steps, the others fewer: their loss was low enough before"
    assert said(12) == [f"18 {fewer}"]
    assert said(12, given_up=2) == [f"16 {fewer}", "Given up (2 without a finite loss): requests 0, 1"]
    assert said(30, dropped=1) == ["Left out by `baft edits drop`: request 40"]
    assert said(30, dropped=22)[0].endswith("requests " + ", ".join(map(str, range(40, 60))) + " and 2 more")


def test_measures_fit_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the kinds of questions that data sets have."""
    monkeypatch.setenv("COLUMNS", "80")
    kinds = dict.fromkeys(("Relation_Specificity", "Forgetfulness"), 1.0)
    asked = {"generation": 1.0, "token": 1.0, "sequence": 1.0, "kinds": kinds, "known": None}
    moment = {**dict.fromkeys(MEASURES), "locality": asked}
    Console().metrics({"immediate": moment, "final": moment}, "2 edits")
    printed = capsys.readouterr().out
    assert "…" not in printed and all(word in printed for word in ("immediate", "by token", "whole answer", *kinds))


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


# -- how far a run is --


class Log:
    """A log file, and a clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._file = io.StringIO()
        self.watcher = Lines(RichConsole(file=self._file), lambda: self.now)

    def advance(self, seconds: float, note: str = "", units: int = 1) -> None:
        self.now += seconds
        self.watcher.advance(note, units)

    @property
    def lines(self) -> list[str]:
        return self._file.getvalue().splitlines()


def test_a_log_has_a_line_where_a_stage_begins_and_ends() -> None:
    log = Log()
    log.watcher.stage("asking", 4)
    assert log.lines == ["asking: begins, 0 of 4"]
    log.advance(1.0, units=4)
    log.watcher.stage("training")
    log.advance(2.5, "loss 0.5")
    log.watcher.finish()
    assert log.lines[1:] == [
        "asking: ended, 4 of 4 after 0:00:01, 0.25 s each",
        "training: begins",
        "training: ended, 1 after 0:00:02, 2.5 s each; loss 0.5",
    ]
    log.watcher.finish()
    assert len(log.lines) == 4


def test_a_log_has_a_line_a_minute_with_pace_estimate_and_measures() -> None:
    log = Log()
    log.watcher.stage("editing", 10_000, 400)  # a run that goes on
    for edit in range(100):
        log.advance(1.5, f"loss 0.{edit}")
    assert log.lines[1:] == [
        "editing: 440 of 10000 after 0:01:00, 1.5 s each, 3:59:00 left; loss 0.39",
        "editing: 480 of 10000 after 0:02:00, 1.5 s each, 3:58:00 left; loss 0.79",
    ]
    log.advance(400.0)  # and none for the minutes in which nothing was done
    assert len(log.lines) == 4


def test_what_is_said_is_one_line_of_a_log() -> None:
    log = Log()
    log.watcher.say("a long sentence, " * 40)
    assert len(log.lines) == 1


@pytest.mark.parametrize("shown", ["file", "terminal", "dumb terminal"])
def test_bars_are_drawn_on_a_terminal_alone(
    shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb" if shown == "dumb terminal" else "xterm")
    monkeypatch.setattr(RichConsole, "is_terminal", shown != "file")
    with Console().progress() as watcher:
        watcher.training(1, 2, loss=0.5, known=0.25)
        begun = capsys.readouterr().out
    ended = capsys.readouterr().out
    if shown == "terminal":
        assert "━" in begun + ended
    else:
        assert begun == "training the testbed model (once): begins, 0 of 2\n"
        assert ended.startswith("training the testbed model (once): ended, 1 of 2 after")
        assert ended.endswith("loss 0.50, knows 25% of the facts\n")


def test_an_edit_of_minutes_has_a_pace_too() -> None:
    clock = 0.0
    file = io.StringIO()
    console = RichConsole(file=file, force_terminal=True, width=200, get_time=lambda: clock)
    with bars(console) as watcher:
        watcher.stage("editing", 100)
        for _ in range(4):
            clock += 90.0
            watcher.advance()
    assert "90 s each" in file.getvalue()
