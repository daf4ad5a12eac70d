"""Whether earlier edits still hold: when it is asked, of which of them, and what else is looked at then."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from baft.editing import Editor, Gated
from baft.evaluation.likelihood import finite, perplexity
from baft.evaluation.measures import Evaluator, summarise
from baft.requests import EditRequest
from baft.runs.environment import peak_memory_bytes

__all__ = ["Retention", "is_milestone", "sample"]


def is_milestone(edits: int, every: int | None = None) -> bool:
    """1, 10, 100, 1000, from there on 2000, 5000, 10000, 20000, ..., and every so many.

    A long run that goes wrong is seen to before it has more than doubled.
    """
    leading = str(edits).rstrip("0")
    return leading == "1" or (edits >= 1000 and leading in ("2", "5")) or (every is not None and edits % every == 0)


def sample(population: Sequence[int], size: int) -> list[int]:
    """At most ``size`` of ``population``, in order: always the same ones, whatever joins them.

    Each number has a priority of its own, so that the samples of a growing population share all that they can, and a
    curve over it isn't the samples'.
    """
    chosen = heapq.nsmallest(size, population, key=lambda number: hashlib.sha256(str(number).encode()).digest())
    return sorted(chosen)


@dataclass
class Retention:
    """Measures what has been edited so far.

    Attributes:
        evaluator: asks.
        held_out: texts that no training looks at, for general ability; without any it isn't measured.
        size: edits that are asked about at most.
        every: edits between two measurements, beside the milestones.
    """

    evaluator: Evaluator
    held_out: Sequence[str] = ()
    size: int = 100
    every: int | None = None
    _unedited: float | None = field(default=None, init=False)

    def due(self, edits: int) -> bool:
        return is_milestone(edits, self.every)

    def measure(
        self, editor: Editor, requests: Sequence[EditRequest], edits: int, settled: int, seconds: float
    ) -> dict[str, Any]:
        """A point of the curve.

        Args:
            requests: a sample of what was edited.
            edits: how many edits were made.
            settled: how many rounds settled them.
            seconds: how long all that took.
        """
        usage = editor.gate_usage(requests) if isinstance(editor, Gated) else {}
        return {
            "edits": edits,
            "settled": settled,
            **summarise(self.evaluator.measure(requests)),
            "general": self._general(editor),
            "gates": {str(layer): shares.tolist() for layer, shares in usage.items()} or None,
            "seconds": seconds,
            "memory": {**peak_memory_bytes(), "remembered": editor.engine_report().get("remembered_bytes")},
        }

    def _general(self, editor: Editor) -> dict[str, float | None] | None:
        if not self.held_out:
            return None
        if self._unedited is None:
            with editor.disabled():
                self._unedited = self._perplexity(editor)
        return {"perplexity": finite(self._perplexity(editor)), "before": finite(self._unedited)}

    def _perplexity(self, editor: Editor) -> float:
        return self.evaluator.portions.ask(
            "perplexity", lambda size: perplexity(editor, self.held_out, batch_size=size)
        )
