"""Memory that runs out while a model is measured: fewer texts at a time, and no request is blamed for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ASKED, Listener, run_in
from small_runs import finished_run as finished_run
from tiny import one_thread, tiny_editor

from baft.evaluation.measures import Evaluator
from baft.evaluation.portions import Portions
from baft.runs.outcome import outcome
from baft.runs.sequential import RequestError

__all__ = ["one_thread"]

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

# Where the model is measured, by generation, by teacher forcing, on held-out texts, on free texts.
ASKING = (
    "baft.trained.generate_texts",
    "baft.trained.force_answers",
    "baft.runs.retention.perplexity",
    "baft.evaluation.fluency.negative_log_likelihoods",
)


def have_memory_for(texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what measures run out of memory with more texts at a time."""

    def within(ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*arguments: Any, **options: Any) -> Any:
            size = options.get("batch_size", arguments[-1])
            if size > texts:
                raise NO_MEMORY
            return ask(*arguments, **options)

        return asked

    for name in ASKING:
        module, _, function = name.rpartition(".")
        monkeypatch.setattr(name, within(getattr(__import__(module, fromlist=[function]), function)))


def test_a_run_goes_on_with_fewer_texts_at_a_time(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_memory_for(5, monkeypatch)
    listener = Listener()
    run_in(tmp_path, listener=listener)
    (said,) = (text for text in listener.said if "memory" in text)
    assert said == "memory ran out while measuring answers, 64 texts at a time: from now on 4 are"
    assert said in json.loads((tmp_path / "results.json").read_text())["sessions"][0]["notes"]
    found, expected = outcome(tmp_path), outcome(finished_run)
    assert found["training"]["out_of_memory"] == 0
    for name in ("tensors", "settling", "metrics"):
        assert found[name] == expected[name]
    for point, other in zip(found["retention"], expected["retention"], strict=True):
        assert point["general"] == {name: pytest.approx(value) for name, value in other["general"].items()}


def test_a_run_that_cannot_be_measured_ends_and_blames_no_request(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        have_memory_for(0, patched)
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"while measuring answers, one text alone: less for .*--remember"
            ) as ended:
                run_in(tmp_path)
            assert not isinstance(ended.value, RequestError)
    run_in(tmp_path)
    assert outcome(tmp_path) == outcome(finished_run)


def test_a_request_is_not_blamed_for_what_is_asked_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the unedited model says is known by then: it is the edited one that there is no memory for."""
    ask = Evaluator._ask

    def run_out(evaluator: Evaluator, *arguments: Any) -> Any:
        have_memory_for(0, monkeypatch)
        return ask(evaluator, *arguments)

    monkeypatch.setattr(Evaluator, "_ask", run_out)
    with pytest.raises(RuntimeError, match="while measuring answers, one text alone") as ended:
        run_in(tmp_path)
    assert not isinstance(ended.value, RequestError)


def test_what_is_asked_again_is_told_of_once() -> None:
    evaluator, told = Evaluator(tiny_editor(), max_new_tokens=2, batch_size=4), 0

    def count(done: int, of: int) -> None:
        nonlocal told
        told += done
        if told == 8:
            raise NO_MEMORY

    prompts = [request.prompt for request in ASKED]
    assert evaluator._generate(prompts, count) == evaluator.editor.generate(prompts, max_new_tokens=2)
    assert told == 8 and evaluator.portions.size == 2


def test_parts_of_one_model_do_not_ask_again() -> None:
    """The others would wait for it."""

    def ask(_: int) -> None:
        raise NO_MEMORY

    with pytest.raises(RuntimeError, match="while measuring answers, 64 texts at a time: "):
        Portions(64, together=True).ask("answers", ask)


def test_other_errors_are_not_of_memory() -> None:
    def ask(_: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$"):
        Portions(64).ask("answers", ask)
