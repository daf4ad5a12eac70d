"""How likely a model finds texts, where that is hard to say: nothing written, a text too long, no finite number."""

from __future__ import annotations

import math

import pytest
from tiny import REQUESTS, tiny_editor, tiny_model

from baft.evaluation import likelihood
from baft.evaluation.fluency import fluency
from baft.evaluation.likelihood import perplexity


def test_where_nothing_is_written_there_is_no_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor()
    written = fluency(editor, REQUESTS[:2], max_new_tokens=4)
    assert written["perplexity"] is not None and written["perplexity"] > 1
    monkeypatch.setattr(editor, "generate", lambda prompts, **_: [" "] * len(prompts))
    assert fluency(editor, REQUESTS[:2])["perplexity"] is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_of_a_text_that_is_too_long_the_model_is_asked_what_it_takes(family: str) -> None:
    editor = tiny_editor(tiny_model(family))
    limit = editor.model.config.max_position_embeddings
    found = [perplexity(editor, ["the king is in Paris and " * repeats]) for repeats in (2, limit, 2 * limit)]
    assert found[1] == found[2] != found[0]


def test_what_was_written_may_have_more_tokens_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(tiny_model("gpt2"))  # which has no place for them
    monkeypatch.setattr(editor, "generate", lambda prompts, **_: ["x" * 100] * len(prompts))
    assert fluency(editor, REQUESTS[:2])["perplexity"] is not None


def test_a_likelihood_beyond_all_numbers_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "negative_log_likelihoods", lambda *_: [(1e6, 3)])
    assert perplexity(tiny_editor(), ["the king"]) == math.inf
    monkeypatch.setattr(likelihood, "negative_log_likelihoods", lambda *_: [(math.nan, 3)])
    assert math.isnan(perplexity(tiny_editor(), ["the king"]))
