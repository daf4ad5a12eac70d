"""What a run has to say of itself: ``results.json`` at its end, and as much of it as there is at any time before.

What can't change is in the journal from the beginning, the rest is counted from what else the journal holds: a reader
needs the journal alone.
"""

from __future__ import annotations

from typing import Any

from baft.evaluation.fluency import fluency
from baft.evaluation.harness import general_ability
from baft.evaluation.measures import summarise
from baft.evaluation.portions import Portions
from baft.runs.conflicts import can_hold
from baft.runs.context import RunContext
from baft.runs.environment import peak_memory_bytes, versions
from baft.runs.journal import Journal
from baft.runs.records import curve_as_json
from baft.runs.retention import sample
from baft.trained import TrainedEditor
from baft_kernels.backends import resolve_backend

__all__ = ["describe", "results", "results_so_far", "superseded"]

# Fluency is measured on at most this many requests.
_FLUENT = 100

# Texts that lm-eval asks about at a time, to begin with: they are longer than a data set's questions.
_ASKED_BY_LM_EVAL = 16


def describe(context: RunContext, mode: str) -> dict[str, Any]:
    """What can be said of a run before its first edit."""
    editor = context.editor
    return {
        "protocol": {**context.evaluator.protocol, "mode": mode, **_texts(context)},
        "config": editor.config.model_dump(mode="json") | {"layers": list(editor.layers)},
        "versions": versions(),
        "backend": resolve_backend(editor.config.backend),
        "seed": editor.config.seed,
        "requests": len(context.requests),
        "conflicts": context.conflicts,
        "lm_eval": _asked_before(context),
    }


def _texts(context: RunContext) -> dict[str, Any]:
    """How many texts there are beside the requests."""
    editor = context.editor
    unrelated = editor.unrelated_texts if isinstance(editor, TrainedEditor) else None
    return {
        "unrelated_texts": dict(zip(("given", "self_written"), unrelated, strict=True)) if unrelated else None,
        "held_out_texts": len(context.retention.held_out),
    }


def _asked_before(context: RunContext) -> dict[str, Any] | None:
    """lm-eval's scores of the unedited model: a data set of it that can't be had is found before the first edit.

    A run that goes on has them in its journal.
    """
    if not context.tasks:
        return None
    asked = context.journal.described("lm_eval")
    if not asked:
        context.watcher.stage("lm-eval: the unedited model")
        with context.editor.disabled():
            asked = {"before": _general_ability(context)}
        context.watcher.advance()
    return dict(asked)


def _asked_after(context: RunContext, before: dict[str, Any] | None) -> dict[str, Any] | None:
    if before is None:
        return None
    context.watcher.stage("lm-eval: the edited model")
    asked = {**before, "after": _general_ability(context)}
    context.watcher.advance()
    return asked


def _general_ability(context: RunContext) -> dict[str, float]:
    portions = Portions(_ASKED_BY_LM_EVAL, together=context.world.one_model, say=context.say)
    return portions.ask(
        "general ability by lm-eval", lambda size: general_ability(context.editor, context.tasks, batch_size=size)
    )


def results_so_far(journal: Journal) -> dict[str, Any]:
    """All that a journal tells of its run, finished or not.

    Raises:
        ValueError: if it has no edit yet.
    """
    known, totals = journal.description(), journal.totals()
    edits, sessions, settling = totals["edits"], journal.sessions(), journal.settling()
    if not edits:
        raise ValueError(f"{journal.path}: expected a run with edits, got one that has none yet")
    contradicted = superseded(journal)
    mode = known["protocol"]["mode"]
    final = summarise(journal.measured("final", without=contradicted))
    return {
        **known,
        "requests": known["requests"] - len(journal.dropped()),
        "edits": edits,
        "metrics": {
            "immediate": final if mode == "batch" else summarise(journal.measured("immediate")),
            "final": final if any(final.values()) else None,
        },
        "retention": journal.retention(),
        "timing": {
            "seconds_per_edit": totals["seconds"] / edits,
            "editing_seconds": totals["seconds"],
            "total_seconds": sum(session["seconds"] for session in sessions),
            "steps": totals["steps"],
            "settling_seconds": sum(curve.seconds for curve in settling),
            "settling_steps": sum(curve.steps for curve in settling),
        },
        "dropped": sorted(journal.dropped()),
        "superseded": sorted(contradicted),
        "training": {name: totals[name] for name in ("converged", "diverged", "out_of_memory")},
        "settling": [curve_as_json(curve) for curve in settling],
        "sessions": sessions,
    }


def superseded(journal: Journal) -> set[int]:
    """Positions of the edits that a later one contradicts, so that they can't hold any more."""
    done = journal.positions()
    return {*done}.difference(can_hold(journal.description()["conflicts"], done, journal.given_up()))


def results(context: RunContext, mode: str) -> dict[str, Any]:
    """What ``results.json`` holds: beside what the journal tells, what only this process knows."""
    editor = context.editor
    found = results_so_far(context.journal)
    found["timing"]["processes"] = context.world.size
    # Bytes of parameters that each edit costs: a set of its own in single mode, a share of the one set otherwise.
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in editor.parameters().values())
    return {
        **found,
        "fluency": None if mode == "single" else _fluency(context),
        "lm_eval": _asked_after(context, found["lm_eval"]),
        "engine": editor.engine_report(),
        "memory": {
            "peak_bytes": _peak_bytes(found["retention"]),
            "bytes_per_edit": float(parameters) if mode == "single" else parameters / found["edits"],
        },
    }


def _peak_bytes(retention: list[dict[str, Any]]) -> dict[str, int | None]:
    """Highest memory of this process, and of those before it that were broken off, as they last saw it themselves."""
    seen = [peak_memory_bytes(), *(point["memory"] for point in retention)]
    return {kind: max(memory[kind] or 0 for memory in seen) or None for kind in seen[0]}


def _fluency(context: RunContext) -> dict[str, Any]:
    editor = context.editor
    requests = context.at(sample(context.journal.positions(), _FLUENT))

    def measured() -> dict[str, float | None]:
        return context.evaluator.portions.ask("fluency", lambda size: fluency(editor, requests, batch_size=size))

    with editor.disabled():
        before = measured()
    return {"before": before, "after": measured()}
