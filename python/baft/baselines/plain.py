"""Training as anybody would write it: padded batches, torch's AdamW, the model run whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from baft import objective
from baft.config import BaftConfig
from baft.engine.encoding import IGNORED, Encoded, Encoder, TokenBatch
from baft.engine.learner import DivergedError, Ended, Learner, Plan
from baft.engine.sets import BETAS
from baft.engine.step import Lesson
from baft.engine.surroundings import Surroundings
from baft.engine.unrelated import UnrelatedPool
from baft.placement import device_of

__all__ = ["PlainTrainer", "answer_losses", "logits_of"]


class PlainTrainer(Learner):
    """Trains weights that change what the model computes.

    Lessons, losses, schedule and optimiser are BaFT's, so that methods differ by what they train and by nothing else.
    What they share in the end isn't speed: nothing is remembered from step to step, as BaFT's engine does.

    Args:
        model: frozen, but for ``weights``.
        encoder: knows the padding.
        weights: what is trained, by name.
        disabled: switches off what ``weights`` do.
        config: how to train.
        unrelated: what the locality loss looks at.
        surroundings: what the unedited model says of the edits' own subjects.
        learning_rate: AdamW's.

    Raises:
        ValueError: for a locality loss that only bases have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        weights: Mapping[str, nn.Parameter],
        disabled: Callable[[], AbstractContextManager[None]],
        config: BaftConfig,
        unrelated: UnrelatedPool,
        surroundings: Surroundings,
        learning_rate: float,
    ) -> None:
        super().__init__(config, unrelated, surroundings)
        if config.locality_loss != "kl":
            raise ValueError(f"locality_loss: expected kl, of a method without bases, got {config.locality_loss!r}")
        self.model = model
        self.encoder = encoder
        self.learning_rate = learning_rate
        self._weights = weights
        self._disabled = disabled
        self._optimizer = torch.optim.AdamW(
            weights.values(), lr=learning_rate, betas=BETAS, weight_decay=config.weight_decay
        )

    def take_steps(self, plan: Plan, ended: Ended) -> None:
        step = 0
        while (planned := plan(step)) is not None:
            step += 1
            try:
                losses = self._differentiate(planned.lesson, step)
                self._optimizer.param_groups[0]["lr"] = planned.rate * self.learning_rate
                self._optimizer.step()
            finally:  # a step that is broken off leaves nothing to the next
                self._optimizer.zero_grad()
            if ended(losses):
                return

    def _differentiate(self, lesson: Lesson, step: int) -> list[float]:
        """Add the gradients of a lesson's loss to the weights'; returns each edit's loss."""
        count = len(lesson.edits)
        batch = self.encoder.batch([*lesson.edits, *lesson.unrelated], device_of(self.model))
        unrelated = batch[count:]
        tokens = unrelated.attention_mask.bool()
        with self._disabled(), torch.no_grad():
            base = logits_of(self.model, unrelated)[tokens] if lesson.unrelated else None
        for weight in self._weights.values():
            weight.requires_grad_(True)
        try:
            logits = logits_of(self.model, batch)
            per_edit = taught = answer_losses(logits[:count], batch.labels[:count])
            if self.config.smoothing > 0:
                taught = answer_losses(
                    logits[:count], batch.labels[:count], self.config.smoothing, self.config.stop_below
                )
            loss = taught.mean()
            if base is not None:
                change = objective.kl_to_base(logits[count:][tokens], base)
                loss = loss + self.config.locality_weight * change.mean()
            if not math.isfinite(found := loss.item()):
                raise DivergedError(found, step)
            loss.backward()
        finally:  # the model is the caller's, who may train it by other means
            for weight in self._weights.values():
                weight.requires_grad_(False)
        return per_edit.tolist()

    def count_usage(self, edits: Sequence[Encoded]) -> None:
        """Weights have no gates whose load is to be balanced."""

    def moments(self) -> dict[str, Tensor]:
        return {
            f"optimizer.{name}.{key}": value.clone()
            for name, weight in self._weights.items()
            for key, value in self._optimizer.state[weight].items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        moments = {
            index: {key: state[f"optimizer.{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
            for index, name in enumerate(self._weights)
            if f"optimizer.{name}.step" in state
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})


def logits_of(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The model's logits at every token, [B, S, V]."""
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits


def answer_losses(logits: Tensor, labels: Tensor, smoothing: float = 0.0, enough: float = 0.0) -> Tensor:
    """Each row's mean of ``objective.smoothed_nll`` over its labels: [E, S, V], [E, S] -> [E], float32."""
    wanted = labels[:, 1:]
    answers = wanted != IGNORED
    nll = objective.smoothed_nll(logits[:, :-1][answers], wanted[answers], smoothing, enough)
    return objective.mean_of(nll, answers.sum(-1))
