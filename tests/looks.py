"""What tests look at in an editor: what it says, its logits, its state, what it trains on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from baft import EditRequest
from baft.editing import Editor
from baft.engine.continuations import Asked, Continuations
from baft.engine.encoding import Tokens
from baft.engine.step import Lesson, StepInputs, TrainingStep


def said(editor: Editor, requests: Sequence[EditRequest]) -> list[str]:
    """What the model goes on with after each request's prompt, up to EOS."""
    prompts, subjects = [request.prompt for request in requests], [request.subject for request in requests]
    return [text.strip() for text in editor.generate(prompts, subjects=subjects, max_new_tokens=6)]


def targets(requests: Sequence[EditRequest]) -> list[str]:
    return [request.target for request in requests]


@torch.no_grad()
def logits(editor: Editor) -> Tensor:
    return editor.model(input_ids=torch.tensor([[1, 20, 30, 40, 50]])).logits


def assert_same_state(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def texts_written_together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each time from now on that the unedited model writes texts, how many it was asked for."""
    asked: list[int] = []
    written = Continuations._written

    def count(self: Continuations, missing: Sequence[Asked]) -> dict[Asked, list[Tokens]]:
        asked.append(len(missing))
        return written(self, missing)

    monkeypatch.setattr(Continuations, "_written", count)
    return asked


@contextmanager
def trained_batches(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The texts of each training step's lessons, edits first, in order."""
    batches: list[list[str]] = []
    arrange = TrainingStep.arrange

    def watch(step: TrainingStep, lessons: Sequence[Lesson], **options: Any) -> StepInputs:
        for lesson in lessons:
            texts = [text.ids for text in [*lesson.edits, *lesson.unrelated]]
            batches.append(editor.tokenizer.batch_decode(texts, skip_special_tokens=True))
        return arrange(step, lessons, **options)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingStep, "arrange", watch)
        yield batches
