"""An editing run from beginning to end: record the base, edit, measure, write down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from baft.distributed import ALONE, World
from baft.editing import Editor, Mode
from baft.evaluation.fluency import fluency
from baft.evaluation.measures import Evaluator, summarise
from baft.requests import EditRequest
from baft.runs.at_once import edit_in_one_batch, edit_singly
from baft.runs.conflicts import conflicts, describe, superseded
from baft.runs.context import RunContext
from baft.runs.environment import peak_memory_bytes, versions
from baft.runs.folder import RunFolder
from baft.runs.journal import Journal
from baft.runs.logs import MetricsLog
from baft.runs.records import EditRecord
from baft.runs.retention import Retention, sample
from baft.runs.sequential import SequentialRun
from baft.runs.watcher import Nobody, Watcher
from baft_kernels.backends import resolve_backend

__all__ = ["RunPlan", "RunReport", "open_context", "run_edits"]

# Fluency is measured on at most this many requests.
_FLUENT = 100


@dataclass(frozen=True)
class RunPlan:
    """What is done beside the editing.

    Attributes:
        held_out: texts that no training looks at, for general ability by perplexity.
        measure_every: edits between two measurements of earlier ones, beside 1, 10, 100, ...
        retained: earlier edits that are asked about then, at most.
        final: edits that are asked about at the end, at most; None asks about all.
        checkpoint_every: edits between two checkpoints; None writes them as often as costs next to nothing.
    """

    held_out: Sequence[str] = ()
    measure_every: int | None = None
    retained: int = 100
    final: int | None = None
    checkpoint_every: int | None = None


@dataclass(frozen=True)
class RunReport:
    """What a run gives: the content of ``results.json``, and the journal that has each edit's record."""

    results: dict[str, Any]
    journal: Journal

    def records(self, limit: int | None = None) -> Iterator[EditRecord]:
        """Each edit's record, in order; at most ``limit`` of them."""
        return self.journal.records(limit=limit)


def run_edits(
    editor: Editor,
    requests: Sequence[EditRequest],
    mode: Mode,
    *,
    plan: RunPlan | None = None,
    folder: RunFolder | None = None,
    evaluator: Evaluator | None = None,
    watcher: Watcher | None = None,
    log: MetricsLog | None = None,
    description: dict[str, Any] | None = None,
    world: World = ALONE,
) -> RunReport:
    """Edit ``requests`` and measure them; a run that ``folder`` has the beginning of goes on where it broke off.

    *Immediate* measures each request right after its own edit, with what was edited before still on; *final* measures
    all of them after the last. A batch has no state in between, so its immediate measures are the final ones; single
    edits have no state that holds them all, so their final measures are null. A sequential run also measures
    *retention*: a fixed sample of the requests so far after 1, 10, 100, ... edits.

    Args:
        plan: what is done beside the editing.
        folder: where to write; None writes nothing.
        evaluator: asks; its base answers are kept in the journal.
        log: gets the figures of a sequential run as they come.
        description: what else ``results.json`` shall say, at its top (model, data set, ...).
        world: processes that share the run, each with an editor that knows of it; the folder is the first one's.

    Raises:
        ValueError: for more processes than requests.
        RuntimeError: if losses aren't finite any more.
        OSError: if something can't be written; what was written before is kept.
    """
    context = open_context(
        editor,
        requests,
        mode,
        plan=plan,
        folder=folder,
        evaluator=evaluator,
        watcher=watcher,
        log=log,
        world=world,
    )
    journal = context.journal
    journal.begin_session(len(journal.positions()))
    for conflict in context.conflicts:
        context.say(describe(conflict))
    run = SequentialRun(context)
    if mode == "sequential":
        run.restore()
        run.edit()
    elif mode == "batch":
        edit_in_one_batch(context)
    else:
        edit_singly(context)
    if mode != "single":
        run.measure()
    results = {**(description or {}), **_results(context, mode)}
    if folder:
        if mode != "single":
            editor.save_pretrained(folder.adapter)
        folder.finish(journal.records(), results)
    return RunReport(results, journal)


def open_context(
    editor: Editor,
    requests: Sequence[EditRequest],
    mode: Mode = "sequential",
    *,
    plan: RunPlan | None = None,
    folder: RunFolder | None = None,
    evaluator: Evaluator | None = None,
    watcher: Watcher | None = None,
    log: MetricsLog | None = None,
    world: World = ALONE,
) -> RunContext:
    """What the parts of a run share; the arguments are those of ``run_edits``."""
    if world.parts > len(requests):
        raise ValueError(f"processes: expected at most {len(requests)}, as many as requests, got {world.parts}")
    plan = plan or RunPlan()
    journal = Journal.copy_of(folder.journal if folder else Journal(None), world)
    evaluator = evaluator or Evaluator(editor, world=world)
    evaluator.base = journal
    return RunContext(
        editor=editor,
        requests=requests,
        journal=journal,
        evaluator=evaluator,
        retention=Retention(evaluator, plan.held_out, plan.retained, plan.measure_every),
        checkpoints=folder.checkpoints(plan.checkpoint_every) if folder else None,
        watcher=watcher or Nobody(),
        log=log,
        final=plan.final,
        conflicts=conflicts(requests) if mode != "single" else [],
        world=world,
    )


def _results(context: RunContext, mode: Mode) -> dict[str, Any]:
    editor, journal = context.editor, context.journal
    totals = journal.totals()
    edits = totals["edits"]
    # What a later request contradicts can't hold at the end.
    overruled = superseded(context.conflicts, journal.dropped() | journal.diverged())
    final = summarise(journal.measured("final", without=overruled)) if mode != "single" else None
    return {
        "protocol": {**context.evaluator.protocol, "mode": mode},
        "config": editor.config.model_dump(mode="json") | {"layers": list(editor.layers)},
        "versions": versions(),
        "backend": resolve_backend(editor.config.backend),
        "seed": editor.config.seed,
        "edits": edits,
        "metrics": {
            "immediate": final if mode == "batch" else summarise(journal.measured("immediate")),
            "final": final,
        },
        "retention": journal.retention(),
        "fluency": _fluency(context) if mode != "single" else None,
        "timing": {
            "seconds_per_edit": totals["seconds"] / edits,
            "editing_seconds": totals["seconds"],
            "total_seconds": sum(session["seconds"] for session in journal.sessions()),
            "steps": totals["steps"],
            "processes": context.world.size,
        },
        "dropped": sorted(journal.dropped()),
        "conflicts": context.conflicts,
        "training": {"converged": totals["converged"], "diverged": totals["diverged"]},
        "sessions": journal.sessions(),
        "engine": editor.engine_report(),
        "memory": {"peak_bytes": peak_memory_bytes(), "bytes_per_edit": _bytes_per_edit(editor, mode, edits)},
    }


def _fluency(context: RunContext) -> dict[str, Any]:
    editor = context.editor
    requests = context.at(sample(context.journal.positions(), _FLUENT))
    with editor.disabled():
        before = fluency(editor, requests, batch_size=context.evaluator.batch_size)
    return {"before": before, "after": fluency(editor, requests, batch_size=context.evaluator.batch_size)}


def _bytes_per_edit(editor: Editor, mode: Mode, edits: int) -> float:
    """Bytes of parameters that each edit costs: a set of its own in single mode, a share of the one set otherwise."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in editor.parameters().values())
    return float(total) if mode == "single" else total / edits
