"""General ability by lm-eval: its scores are of the model as it is, with its edits or without."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import ASKED, Listener, finished_run, run_in
from tiny import REQUESTS, one_thread, tiny_editor, tiny_model

from baft import BaftConfig, BaftEditor
from baft.console import Console
from baft.evaluation.harness import check_tasks, general_ability, side_by_side
from baft.report.source import read_run
from baft.report.words import facts
from baft.runs.folder import RunFolder
from baft.runs.run import RunPlan, RunReport
from baft.runs.start import RunWords, start
from baft.storage import load_editor

__all__ = ["finished_run", "one_thread"]

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval isn't installed: pip install 'baft-kernels[lm-eval]'"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a task of lm-eval: which of two answers the model holds more likely, of what will be edited."""
    documents = [
        {"prompt": request.prompt, "answers": [request.target, other.target], "right": 0}
        for request, other in itertools.pairwise(REQUESTS[:4])
    ]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "invented",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "invented.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


@needs_lm_eval
def test_scores_are_of_the_model_as_it_is(folder: Path) -> None:
    model = tiny_model().train()
    editor = tiny_editor(model)
    before = general_ability(editor, ["invented"], include=folder)
    editor.edit(REQUESTS[:3])
    after = general_ability(editor, ["invented"], include=folder)
    assert after["invented/acc"] == 1.0 > before["invented/acc"]
    with editor.disabled():
        assert general_ability(editor, ["invented"], include=folder) == before
    assert model.training


@needs_lm_eval
def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ValueError, match=r"^tasks: expected some of lm-eval's .*, got no such task$"):
        check_tasks(["hellaswag", "no such task"], tiny_editor().config)


@needs_lm_eval
def test_options_are_lm_evals(folder: Path) -> None:
    scores = general_ability(tiny_editor(), ["invented"], include=folder, limit=1, bootstrap_iters=0)
    assert scores["invented/acc"] in (0.0, 1.0)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tasks: expected at least one"):
        general_ability(tiny_editor(), [])
    with pytest.raises(ValueError, match="positions that need no subject"):
        general_ability(tiny_editor(positions="subject"), ["hellaswag"])
    monkeypatch.setattr("baft.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'baft-kernels\[lm-eval\]'"):
        general_ability(tiny_editor(), ["hellaswag"])


# -- in a run --


def a_run(folder: Path, listener: Listener | None = None, **changes: Any) -> RunReport:
    return run_in(folder, plan=RunPlan(tasks=("invented",)), requests=ASKED[:4], listener=listener, **changes)


def test_a_run_asks_before_its_first_edit_and_after_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With lm-eval or without: here what it would say is how many edits are on, and what it takes to say."""
    asked: list[float] = []

    def count(editor: BaftEditor, tasks: Sequence[str], **_: int) -> dict[str, float]:
        assert tasks == ("invented",)
        asked.append(float(len(editor.edits) if editor.attachment.enabled else 0))
        return {"invented/acc": asked[-1], "invented/acc_stderr": 0.5}

    def stop() -> None:
        if (tmp_path / "checkpoints").is_dir():  # an edit was made
            raise InterruptedError

    monkeypatch.setattr("baft.runs.results.general_ability", count)
    with pytest.raises(InterruptedError):
        a_run(tmp_path, Listener(stop))
    assert asked == [0.0]
    report = a_run(tmp_path)
    assert asked == [0.0, 4.0]  # what the unedited model scored was in the journal
    scores = report.results["lm_eval"]
    assert scores == {
        moment: {"invented/acc": n, "invented/acc_stderr": 0.5} for moment, n in (("before", 0), ("after", 4))
    }
    assert side_by_side(scores) == [("invented/acc", 0.0, 4.0)]
    with RunFolder(tmp_path) as place:
        Console().report(RunReport(report.results, place.journal), place)
    assert re.search(r"invented/acc +0.000 +4.000", capsys.readouterr().out)
    told = dict(facts(read_run(tmp_path).results))
    assert told["General ability by lm-eval"] == "invented/acc 0.000 unedited, 4.000 edited"


def test_where_memory_runs_out_it_is_asked_with_fewer_texts_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, sizes = 16, []

    def score(editor: BaftEditor, tasks: Sequence[str], batch_size: int) -> dict[str, float]:
        sizes.append(batch_size)
        if batch_size > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"invented/acc": 0.5}

    monkeypatch.setattr("baft.runs.results.general_ability", score)

    def edited() -> None:  # what the engine remembers by then takes some of it
        nonlocal room
        room = 4

    report = a_run(tmp_path, listener := Listener(edited))
    assert sizes == [16, 16, 8, 4] and report.results["lm_eval"]["after"] == {"invented/acc": 0.5}
    assert "memory ran out while measuring general ability by lm-eval, 16 texts at a time: from now on 4 are" in (
        listener.said
    )


def test_edits_are_saved_before_it_is_asked_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(editor: BaftEditor, *_: Any, **__: Any) -> dict[str, float]:
        if editor.edits:
            raise ConnectionError("no data set of lm-eval's")
        return {"invented/acc": 0.5}

    monkeypatch.setattr("baft.runs.results.general_ability", fail)
    with pytest.raises(ConnectionError):
        a_run(tmp_path)
    assert not (tmp_path / "results.json").exists()
    assert len(load_editor(tmp_path / "adapter").edits) == 4


def test_a_run_without_tasks_says_nothing_of_them(finished_run: Path) -> None:
    assert json.loads((finished_run / "results.json").read_text())["lm_eval"] is None
    assert "General ability by lm-eval" not in dict(facts(read_run(finished_run).results))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mode": "single"}, "lm-eval: expected edits that a model holds together at the end, got single ones"),
        ({"method": "in-context"}, "lm-eval: expected edits that .*, got batch ones by in-context"),
        ({}, r"pip install 'baft-kernels\[lm-eval\]'"),
    ],
)
def test_what_a_run_cannot_ask_is_refused_at_its_start(
    said: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baft.evaluation.harness.find_spec", lambda name: None)
    words = {"model": "nowhere", "dataset": "nowhere", "mode": "batch", "config": BaftConfig(), "lm_eval": "hellaswag"}
    with pytest.raises(ValueError, match=message):
        start(RunWords(**{**words, **said}), None)
