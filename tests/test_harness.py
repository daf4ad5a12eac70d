"""General ability by lm-eval: its scores are of the model as it is, with its edits or without."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
from tiny import REQUESTS, one_thread, tiny_editor, tiny_model

from baft.evaluation.harness import general_ability

__all__ = ["one_thread"]

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval isn't installed: pip install 'baft-kernels[lm-eval]'"
)


def capitals() -> dict[str, Any]:
    """A task of lm-eval, written out: which of two answers the model holds more likely, of what will be edited."""
    from datasets import Dataset

    documents = [
        {"prompt": request.prompt, "answers": [request.target, other.target], "right": 0}
        for request, other in itertools.pairwise(REQUESTS[:4])
    ]
    return {
        "task": "invented_capitals",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@needs_lm_eval
def test_scores_are_of_the_model_as_it_is() -> None:
    model = tiny_model().train()
    editor = tiny_editor(model)
    before = general_ability(editor, [capitals()])
    editor.edit(REQUESTS[:3])
    after = general_ability(editor, [capitals()])
    assert after["invented_capitals/acc"] == 1.0 > before["invented_capitals/acc"]
    with editor.disabled():
        assert general_ability(editor, [capitals()]) == before
    assert model.training


@needs_lm_eval
def test_options_are_lm_evals() -> None:
    scores = general_ability(tiny_editor(), [capitals()], limit=1, bootstrap_iters=0)
    assert scores["invented_capitals/acc"] in (0.0, 1.0)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tasks: expected at least one"):
        general_ability(tiny_editor(), [])
    with pytest.raises(ValueError, match="positions that need no subject"):
        general_ability(tiny_editor(positions="subject"), ["hellaswag"])
    monkeypatch.setattr("baft.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'baft-kernels\[lm-eval\]'"):
        general_ability(tiny_editor(), ["hellaswag"])
