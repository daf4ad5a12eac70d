"""What is known of one request in a run, and its form in JSON: a line of ``edits.jsonl``, a row of the journal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from baft.engine.schedule import Curve
from baft.evaluation.probes import ProbeResult, Question
from baft.requests import EditRequest

__all__ = ["EditRecord", "curve_as_json", "curve_from_json", "results_as_json", "results_from_json"]


@dataclass
class EditRecord:
    """All that is known of one request in a run.

    Attributes:
        index: its place among the run's requests.
        curve: how it trained.
        seconds: wall-clock time of all that was done for it, consolidation included.
        steps: training steps likewise.
        immediate, final: what was asked right after it and at the run's end; empty where nothing was.
    """

    index: int
    request: EditRequest
    curve: Curve
    seconds: float = 0.0
    steps: int = 0
    immediate: list[ProbeResult] = field(default_factory=list)
    final: list[ProbeResult] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The form that readers of ``edits.jsonl`` get: what names and trains the request first, then all texts."""
        return {
            "index": self.index,
            "id": self.request.id,
            "prompt": self.request.prompt,
            "target": self.request.target,
            "subject": self.request.subject,
            "training": curve_as_json(self.curve),
            "seconds": self.seconds,
            "steps": self.steps,
            "immediate": results_as_json(self.immediate),
            "final": results_as_json(self.final),
        }


def curve_as_json(curve: Curve) -> dict[str, Any]:
    return {
        "steps": curve.steps,
        "converged": curve.converged,
        "diverged": curve.diverged,
        "out_of_memory": curve.out_of_memory,
        "seconds": curve.seconds,
        # JSON knows no NaN: a loss that is none is null.
        "losses": [loss if math.isfinite(loss) else None for loss in curve.losses],
    }


def curve_from_json(value: Mapping[str, Any]) -> Curve:
    losses = [math.nan if loss is None else loss for loss in value["losses"]]
    out_of_memory = value.get("out_of_memory", False)  # an older version's rows don't say
    return Curve(losses, value["steps"], value["converged"], value["diverged"], value["seconds"], out_of_memory)


def results_as_json(results: Sequence[ProbeResult]) -> list[dict[str, Any]]:
    return [
        {
            "measure": result.question.measure,
            "kind": result.question.kind,
            "prompt": result.question.prompt,
            "answers": result.question.answers,
            "subject": result.question.subject,
            "group": result.question.group,
            "was": result.question.was,
            "text": result.text,
            "before": result.before,
            "generation": result.generation,
            "token": result.token,
            "sequence": result.sequence,
        }
        for result in results
    ]


def results_from_json(values: Sequence[Mapping[str, Any]]) -> list[ProbeResult]:
    return [
        ProbeResult(
            Question(
                v["measure"],
                v["kind"],
                v["prompt"],
                tuple(v["answers"]),
                v["subject"],
                v["group"],
                tuple(v.get("was", ())),  # an older version's rows don't say
            ),
            v["text"],
            v["before"],
            v["generation"],
            v["token"],
            v["sequence"],
        )
        for v in values
    ]
