"""The two that bench/edit_throughput.py times: editing as one would write it first, and our engine, doing the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peak_memory import PeakMemory
from plain_editing import PlainEditor, Text

from baft import BaftConfig, BaftEditor, EditRequest
from baft.editing import Mode
from baft.engine.encoding import Encoded
from baft.engine.modes import frozen_for_editing
from baft.engine.options import EngineOptions
from baft.evaluation.measures import Evaluator, summarise

__all__ = ["TASKS", "Subject", "Timed", "edit_ours", "edit_plainly", "now", "plain_editor", "plain_text", "removed"]

TASKS: dict[str, dict[str, Any]] = {
    "edit": {"locality_weight": 0.0, "rehearsal": 0, "subject_texts": 0},
    "edit + locality": {"subject_texts": 0},
    "by default": {},
}


@dataclass
class Subject:
    """What is edited: a model, requests, texts to leave alone, and overrides of the configuration."""

    name: str
    model: Any
    tokenizer: Any
    requests: list[EditRequest]
    unrelated: list[str] | None
    overrides: dict[str, Any]

    def editor(self, task: str, options: EngineOptions, backend: str = "auto") -> BaftEditor:
        config = BaftConfig(**{**TASKS[task], **self.overrides, "consolidate_every": 0, "backend": backend})
        return BaftEditor(self.model, self.tokenizer, config, unrelated=self.unrelated, options=options)


@dataclass
class Timed:
    """Editing some requests: seconds, steps of all, bytes beyond what was held before, and what came of it.

    Attributes:
        edits: how many were made; None of a batch that wasn't trained to its end.
        peak_bytes: of ours with what is kept of texts, and every edit's state.
        slots: how many of ours went abreast.
        quality: measures by name; None where there is nothing to measure.
    """

    edits: int | None
    seconds: float
    steps: int
    peak_bytes: int | None
    slots: int | None = None
    padding: float | None = None
    quality: dict[str, float] | None = None


def edit_ours(
    subject: Subject, mode: Mode, task: str, count: int, options: EngineOptions, backend: str = "auto"
) -> Timed:
    """Make ``count`` edits, and ask the edited models about them."""
    memory = PeakMemory(subject.model.device)
    editor = subject.editor(task, options, backend)
    requests = subject.requests[:count]
    with removed(editor):
        next(editor.edit_each(requests[:1]))  # what is done once: texts encoded, gates calibrated
        editor._begin().surroundings.forget()
        start = now(subject)
        outcomes = list(editor.edit_each(requests)) if mode == "single" else editor.edit(requests, mode)
        seconds, peak_bytes = now(subject) - start, memory.bytes()
        # A batch's are everyone's. Of single edits those that memory ran out in don't count, though their time does.
        steps = sum(outcome.curve.steps for outcome in outcomes[: 1 if mode == "batch" else None])
        quality = None
        if not subject.overrides:  # random weights have no quality
            states = [outcome.state for outcome in outcomes] if mode == "single" else None
            measured = Evaluator(editor, max_new_tokens=12, batch_size=128).measure(
                [outcome.request for outcome in outcomes], states=states
            )
            metrics = summarise(measured)
            quality = {name: metrics[name]["generation"] for name in ("reliability", "locality")}
        report = editor.engine_report()
        slots = report["abreast"]["slots"] if mode == "single" else None
        return Timed(count, seconds, steps, peak_bytes, slots, report["padding"], quality)


def edit_plainly(subject: Subject, mode: Mode, task: str, count: int, rounds: int) -> Timed:
    """The same: ``count`` edits, or of a batch so many ``rounds``."""
    memory, steps = PeakMemory(subject.model.device), 0
    with plain_editor(subject, task) as (plain, draw_for):
        plain.step(*draw_for([0])())  # what is done once, on a GPU: kernels loaded, libraries made ready
        plain.restart()
        draw_for.forget()
        if mode == "batch":  # of which a few steps are timed, and not the texts of all its edits
            draw_for(range(count))()
        start = now(subject)
        if mode == "batch":
            size = plain.config.batch_size
            draws = [draw_for(range(first, min(first + size, count))) for first in range(0, count, size)]
            for draw in rounds * draws:
                plain.step(*draw())
                steps += 1
        else:
            for number in range(count):
                if mode == "single":
                    plain.restart()
                draw = draw_for([number], range(number) if mode == "sequential" else ())
                steps += plain.edit(draw, alone=mode == "single")[0]
        return Timed(None if mode == "batch" else count, now(subject) - start, steps, memory.bytes())


class Draws:
    """Draws the texts of steps, by our editor's own trainer, as if one request after the other came to be known.

    Texts about a subject are written when they are first asked for, with transformers' ``generate`` and so with a KV
    cache: as one would write it first.
    """

    def __init__(self, subject: Subject, editor: BaftEditor) -> None:
        self._requests = subject.requests
        self._editor = editor
        self._trainer = editor._begin()

    def __call__(self, new: Sequence[int], past: Sequence[int] = ()) -> Callable[[], tuple[list[Text], list[Text]]]:
        """What draws a step's texts on requests, after others, both by number: edits, and unrelated ones."""
        taught, rehearsed = ([self._editor._encode(self._requests[k]) for k in numbers] for numbers in (new, past))
        generator = torch.Generator().manual_seed(new[0])

        def draw() -> tuple[list[Text], list[Text]]:
            lesson = self._trainer.lesson(taught, rehearsed, generator=generator)
            return [plain_text(t) for t in lesson.edits], [plain_text(t) for t in lesson.unrelated]

        return draw

    def forget(self) -> None:
        """Forget what was written."""
        self._trainer.surroundings.forget()


@contextmanager
def plain_editor(subject: Subject, task: str) -> Iterator[tuple[PlainEditor, Draws]]:
    """The plain one, that starts where ours does; and what draws its steps' texts."""
    ours = subject.editor(task, EngineOptions())
    with removed(ours):
        draws = Draws(subject, ours)
        starts = {
            layer: tuple(getattr(i, name).detach().clone() for name in ("basis", "gate", "gate_bias"))
            for layer, i in ours.attachment.interventions.items()
        }
    plain = PlainEditor(subject.model, ours.attachment.blocks.modules, starts, ours.config, ours.encoder.pad_id)

    try:
        with frozen_for_editing(subject.model):
            yield plain, draws
    finally:
        plain.remove()


@contextmanager
def removed(editor: BaftEditor) -> Iterator[None]:
    """Take an editor off its model at the end."""
    try:
        yield
    finally:
        editor.remove()


def plain_text(text: Encoded) -> Text:
    return Text(text.ids, text.prompt_length)


def now(subject: Subject) -> float:
    """Seconds, when the device has done all that it was given."""
    if subject.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
