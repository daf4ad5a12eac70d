"""The training of BaFT's own parameters, and what it carries from one edit to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from baft.config import BaftConfig
from baft.engine.ahead import take_steps
from baft.engine.encoding import Encoded
from baft.engine.ending import Ending
from baft.engine.graphs import CudaCapture, Graphs
from baft.engine.learner import Ended, Learner, Plan
from baft.engine.passes import Passes
from baft.engine.sets import ParameterSets
from baft.engine.step import TrainingStep
from baft.engine.surroundings import Surroundings
from baft.engine.unrelated import UnrelatedPool
from baft.placement import device_of

__all__ = ["Abreast", "Trainer"]


@dataclass(frozen=True)
class Abreast:
    """How single edits were trained together, for people.

    Attributes:
        slots: how many at a time.
        lesson_bytes: what a step took at most for each of them on a GPU; None where it wasn't measured.
        graphs: what was captured.
    """

    slots: int
    lesson_bytes: int | None
    graphs: str


class Trainer(Learner):
    """The training of an editor's own parameters, and all that continues it: moments, gate usage, what is drawn.

    Args:
        passes: forward passes of the model under edit.
        config: how to train.
        unrelated: what the locality loss looks at.
        surroundings: what the unedited model says of the edits' own subjects.

    Attributes:
        ahead: how many steps are begun before it is known what the step before them found.
        abreast: how single edits were trained, the last time that there were some.
    """

    def __init__(
        self, passes: Passes, config: BaftConfig, unrelated: UnrelatedPool, surroundings: Surroundings
    ) -> None:
        super().__init__(config, unrelated, surroundings)
        self.passes = passes
        device = device_of(passes.model)
        ending = Ending(config.stop_below, device)
        sets = ParameterSets(passes.attachment.interventions, config)
        self.step = TrainingStep(passes, sets, config, ending=ending, world=passes.options.world)
        self._capture = CudaCapture(device)
        self.graphs = self.graphs_for(self.step)
        self.abreast: Abreast | None = None
        self.ahead = 1 if device.type == "cuda" else 0

    def take_steps(self, plan: Plan, ended: Ended) -> None:
        take_steps(self, plan, ended)

    def count_usage(self, edits: Sequence[Encoded]) -> None:
        self.step.count_usage(edits)

    def refresh(self) -> None:
        """Notice if the model's own weights have changed since it was last asked to."""
        if self.passes.refresh():
            self.graphs.forget()
            self.surroundings.forget()

    def renew(self) -> None:
        """Go on with interventions whose rank has changed."""
        sets, before = self.step.sets.renewed(), self.step.usage
        self.step.sets, self.step.usage = sets, sets.new_usage()
        for layer, usage in self.step.usage.items():
            rank = min(len(usage), len(before[layer]))
            usage[:rank] = before[layer][:rank]
        self.graphs.forget()

    def report(self) -> dict[str, Any]:
        """How the engine worked so far, for people."""
        abreast = {} if self.abreast is None else {"abreast": asdict(self.abreast)}
        return {**self.passes.report(), "graphs": self.graphs.report(), **abreast}

    def graphs_for(self, step: TrainingStep, *, at_first: bool = True) -> Graphs:
        """What computes the steps of ``step``, which has an ``ending``, on this trainer's device; see ``Graphs``."""
        return Graphs(step, self._capture, self._why_no_graphs(step), at_first=at_first)

    def _why_no_graphs(self, step: TrainingStep) -> str | None:
        if not self.passes.options.graphs:
            return "switched off"
        if step.world.parts > 1:
            return "several processes take each step together"
        return CudaCapture.why_not(sorted({weight.device for weight in self.passes.model.parameters()}, key=str))

    def moments(self) -> dict[str, Tensor]:
        return self.step.sets.moments()

    def course(self) -> dict[str, Tensor]:
        """As any learner's, and gate usage by layer."""
        return {**{f"usage.{layer}": usage.clone() for layer, usage in self.step.usage.items()}, **super().course()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        for layer, usage in self.step.usage.items():
            usage.copy_(state[f"usage.{layer}"])
        self.step.sets.load_moments(state)
