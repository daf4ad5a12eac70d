"""An editing run from beginning to end: record the base, edit, measure, write down."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from baft.editing import Editor, EditOutcome, Mode
from baft.engine.generation import OnBatch
from baft.evaluation.fluency import fluency
from baft.evaluation.measures import Evaluator, Metrics, summarise
from baft.requests import EditRequest
from baft.runs.results import EditRecord, RunFolder, peak_memory_bytes, versions
from baft_kernels.backends import resolve_backend

__all__ = ["RunReport", "Watcher", "run_edits", "watched"]

T = TypeVar("T")

# The retention curve and fluency are measured on at most this many requests, evenly spread.
_SAMPLE = 100

# Single edits whose answers are generated in the same batches.
_MEASURED_TOGETHER = 32


class Watcher(Protocol):
    """Is told how a run goes on."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage of ``total`` units begins."""

    def advance(self, note: str = "", units: int = 1) -> None:
        """One more unit of the stage is done, or several."""


@dataclass(frozen=True)
class RunReport:
    """What a run gives: the content of ``results.json``, and each edit's record."""

    results: dict[str, Any]
    records: list[EditRecord]


def run_edits(
    editor: Editor,
    requests: Sequence[EditRequest],
    mode: Mode,
    *,
    folder: RunFolder | None = None,
    evaluator: Evaluator | None = None,
    watcher: Watcher | None = None,
    description: dict[str, Any] | None = None,
) -> RunReport:
    """Edit ``requests`` and measure them.

    *Immediate* measures each request right after its own edit, with what was edited before still on; *final* measures
    all of them after the last. A batch has no state in between, so its immediate measures are the final ones; single
    edits have no state that holds them all, so their final measures are null. A sequential run also measures
    *retention*: all requests so far (at most 100 of them) after 1, 10, 100, ... edits.

    Args:
        folder: where to write; None writes nothing.
        description: what else ``results.json`` shall say, at its top (model, data set, ...).
    """
    evaluator = evaluator or Evaluator(editor)
    watcher = watcher or _Nobody()
    start = time.perf_counter()
    evaluator.record_base(requests, watched(watcher, "recording the unedited model's answers"))
    base_seconds = time.perf_counter() - start
    run = _Run(editor, requests, mode, folder, evaluator, watcher)
    began = time.perf_counter()
    if mode == "single":
        run.edit_singly()
    else:
        run.edit_together()
    editing = time.perf_counter() - began - run.measuring
    records = sorted(run.records, key=lambda record: record.index)
    if mode != "single":
        measured = evaluator.measure(requests, watched(watcher, "measuring"))
        for record, final in zip(records, measured, strict=True):
            record.final = final
            if mode == "batch":
                record.immediate = final
    final_metrics = summarise(r.final for r in records) if mode != "single" else None
    if mode == "sequential" and not _is_milestone(len(requests)):
        run.retention.append({"edits": len(requests), **summarise(record.final for record in _evenly(records))})
    results = {
        **(description or {}),
        "protocol": {**evaluator.protocol, "mode": mode},
        "config": editor.config.model_dump(mode="json") | {"layers": list(editor.layers)},
        "versions": versions(),
        "backend": resolve_backend(editor.config.backend),
        "seed": editor.config.seed,
        "edits": len(requests),
        "metrics": {"immediate": summarise(r.immediate for r in records), "final": final_metrics},
        "retention": run.retention,
        "fluency": _fluency(editor, requests, evaluator.batch_size) if mode != "single" else None,
        "timing": {
            "seconds_per_edit": editing / len(requests),
            "editing_seconds": editing,
            "base_answers_seconds": base_seconds,
            "total_seconds": time.perf_counter() - start,
            "steps": run.steps,
        },
        "training": {
            "converged": sum(record.curve.converged for record in records),
            "diverged": sum(record.curve.diverged for record in records),
        },
        "engine": editor.engine_report(),
        "memory": {"peak_bytes": peak_memory_bytes(), "bytes_per_edit": _adapter_bytes(editor, mode, len(requests))},
    }
    if folder:
        if mode != "single":
            editor.save_pretrained(folder.adapter)
        folder.finish(records, results)
    return RunReport(results, records)


class _Run:
    """The editing of a run, with what is measured on the way.

    Attributes:
        records: of the requests edited so far, in the order in which they were done.
        retention: measures at milestones.
        measuring: seconds spent on measures, so far.
        steps: training steps of all edits.
    """

    def __init__(
        self,
        editor: Editor,
        requests: Sequence[EditRequest],
        mode: Mode,
        folder: RunFolder | None,
        evaluator: Evaluator,
        watcher: Watcher,
    ) -> None:
        self.editor, self.requests, self.mode = editor, requests, mode
        self.folder, self.evaluator, self.watcher = folder, evaluator, watcher
        self.records: list[EditRecord] = []
        self.retention: list[dict[str, Any]] = []
        self.measuring = 0.0
        self.steps = 0

    def edit_singly(self) -> None:
        """Each request alone, several at a time; those that are done are measured side by side."""
        self.watcher.stage("editing", len(self.requests))
        unmeasured: list[EditOutcome] = []
        for outcome in self.editor.edit_each(self.requests, on_step=self._stepped):
            unmeasured.append(outcome)
            if len(unmeasured) == _MEASURED_TOGETHER:
                self._measure_singles(unmeasured)
                unmeasured = []  # and let their states go
        if unmeasured:
            self._measure_singles(unmeasured)

    def edit_together(self) -> None:
        """All requests, in one batch or one after another."""
        if self.mode == "sequential":
            self.watcher.stage("editing", len(self.requests))
        self.editor.edit(self.requests, self.mode, on_edit=self._done, on_step=self._stepped)

    def _stepped(self, step: int, at_most: int, loss: float) -> None:
        self.steps += 1
        if self.mode == "batch":
            if step == 1:
                self.watcher.stage("editing, step by step", at_most)
            self.watcher.advance(f"loss {loss:.3f}")

    def _done(self, outcome: EditOutcome) -> None:
        record = EditRecord(outcome.index, outcome.request, outcome.curve)
        self.records.append(record)
        if self.mode == "batch":
            return
        began = time.perf_counter()
        record.immediate = self.evaluator.measure([outcome.request])[0]
        self._keep(record)
        if _is_milestone(len(self.records)):
            self.retention.append(_retained(self.evaluator, self.requests[: len(self.records)]))
        self.measuring += time.perf_counter() - began

    def _measure_singles(self, outcomes: Sequence[EditOutcome]) -> None:
        began = time.perf_counter()
        states = [outcome.state for outcome in outcomes if outcome.state is not None]
        measured = self.evaluator.measure([outcome.request for outcome in outcomes], states=states)
        for outcome, immediate in zip(outcomes, measured, strict=True):
            record = EditRecord(outcome.index, outcome.request, outcome.curve, immediate)
            self.records.append(record)
            self._keep(record)
        self.measuring += time.perf_counter() - began

    def _keep(self, record: EditRecord) -> None:
        if self.folder:
            self.folder.append(record)
        self.watcher.advance(f"loss {record.curve.losses[-1]:.3f}")


def watched(watcher: Watcher, stage: str) -> OnBatch:
    """Shows batches of a generation as a stage; it begins with the first one, when their number is known."""
    begun = False

    def on_batch(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            watcher.stage(stage, total)
            begun = True
        watcher.advance(units=done)

    return on_batch


def _is_milestone(edits: int) -> bool:
    """1, 10, 100, 1000, ..."""
    return str(edits).strip("0") == "1"


def _evenly(items: Sequence[T]) -> list[T]:
    """At most ``_SAMPLE`` of ``items``, evenly spread."""
    return list(items[:: max(1, math.ceil(len(items) / _SAMPLE))])


def _retained(evaluator: Evaluator, requests: Sequence[EditRequest]) -> dict[str, Any]:
    metrics: Metrics = summarise(evaluator.measure(_evenly(requests)))
    return {"edits": len(requests), **metrics}


def _fluency(editor: Editor, requests: Sequence[EditRequest], batch_size: int) -> dict[str, Any]:
    sample = _evenly(requests)
    with editor.disabled():
        before = fluency(editor, sample, batch_size=batch_size)
    return {"before": before, "after": fluency(editor, sample, batch_size=batch_size)}


def _adapter_bytes(editor: Editor, mode: Mode, edits: int) -> float:
    """Bytes of parameters that each edit costs: a set of its own in single mode, a share of the one set otherwise."""
    total = sum(p.numel() * p.element_size() for p in editor.parameters().values())
    return float(total) if mode == "single" else total / edits


class _Nobody:
    def stage(self, name: str, total: int | None = None) -> None: ...
    def advance(self, note: str = "", units: int = 1) -> None: ...
