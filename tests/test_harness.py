"""General ability by lm-eval: its scores are of the model as it is, with its edits or without."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import yaml
from tiny import REQUESTS, one_thread, tiny_editor, tiny_model

from baft.evaluation.harness import general_ability

__all__ = ["one_thread"]

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
