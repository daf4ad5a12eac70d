"""What training carries from one edit to the next, and how the lessons of a step are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from baft.config import BaftConfig
from baft.engine.encoding import Encoded
from baft.engine.ending import Ending
from baft.engine.graphs import CudaCapture, Graphs
from baft.engine.passes import Passes
from baft.engine.sets import ParameterSets
from baft.engine.step import Lesson, TrainingStep
from baft.engine.unrelated import UnrelatedPool, draw_indices

__all__ = ["Trainer"]


class Trainer:
    """The training of an editor's own parameters, and all that continues it: moments, gate usage, random generator.

    Args:
        passes: forward passes of the model under edit.
        config: how to train.
        unrelated: what the locality loss looks at.

    Attributes:
        ahead: how many steps are begun before it is known what the step before them found.
    """

    def __init__(self, passes: Passes, config: BaftConfig, unrelated: UnrelatedPool) -> None:
        self.passes = passes
        self.config = config
        self.unrelated = unrelated
        self.generator = torch.Generator().manual_seed(config.seed)
        device = passes.model.device
        ending = Ending(config.stop_below, device)
        sets = ParameterSets(passes.attachment.interventions, config)
        self.step = TrainingStep(passes, sets, config, ending=ending)
        self.graphs = Graphs(self.step, CudaCapture(device), self._why_no_graphs())
        self.ahead = 1 if device.type == "cuda" else 0

    def lesson(
        self,
        new: Sequence[Encoded],
        past: Sequence[Encoded] = (),
        *,
        generator: torch.Generator | None = None,
        set: int = 0,
    ) -> Lesson:
        """``new`` requests with earlier ones, as many as are rehearsed, and unrelated texts, as configured."""
        generator = generator or self.generator
        rehearsed = [past[i] for i in draw_indices(len(past), self.config.rehearsal, generator)] if past else []
        wanted = self.config.unrelated_per_step if self.config.locality_weight > 0 else 0
        return Lesson([*new, *rehearsed], self.unrelated.draw(wanted, generator), set)

    def refresh(self) -> None:
        """Notice if the model's own weights have changed since it was last asked to."""
        if self.passes.refresh():
            self.graphs.forget()

    def report(self) -> dict[str, Any]:
        """How the engine worked so far, for people."""
        return {**self.passes.report(), "graphs": self.graphs.report()}

    def _why_no_graphs(self) -> str | None:
        if not self.passes.options.graphs:
            return "switched off"
        return CudaCapture.why_not(sorted({weight.device for weight in self.passes.model.parameters()}, key=str))

    def state(self) -> dict[str, Tensor]:
        """What continuing after a save and load needs besides the parameters, as copies."""
        return {**self.step.sets.moments(), **self.course()}

    def course(self) -> dict[str, Tensor]:
        """Of that, what isn't the optimiser's: gate usage by layer, and the random generator."""
        usage = {f"usage.{layer}": usage.clone() for layer, usage in self.step.usage.items()}
        return {**usage, "generator": self.generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what ``state`` returned."""
        self.generator.set_state(state["generator"].cpu())
        for layer, usage in self.step.usage.items():
            usage.copy_(state[f"usage.{layer}"])
        self.step.sets.load_moments(state)
