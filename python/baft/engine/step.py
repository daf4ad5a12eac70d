"""One training step: edits and unrelated texts in one forward pass, the losses of both, one optimiser step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from baft import objective
from baft.attach import Attachment, LayerRecord
from baft.config import BaftConfig
from baft.engine.encoding import Encoded, Encoder, TokenBatch
from baft.engine.unrelated import UnrelatedPool
from baft_kernels import retract_after_step

__all__ = ["TrainingStep"]


class TrainingStep:
    """The step, and what it carries from one to the next: optimiser moments, gate usage, and the random generator.

    Args:
        model: the frozen model, with ``attachment`` on it.
        attachment: its interventions are what is trained.
        encoder: pads batches.
        config: weights and rates.
        unrelated: what the locality loss looks at.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attachment: Attachment,
        encoder: Encoder,
        config: BaftConfig,
        unrelated: UnrelatedPool,
    ) -> None:
        self.model = model
        self.attachment = attachment
        self.encoder = encoder
        self.config = config
        self.unrelated = unrelated
        self.generator = torch.Generator().manual_seed(config.seed)
        interventions = attachment.interventions
        self._named = {
            f"layers.{layer}.{name}": parameter
            for layer, intervention in interventions.items()
            for name, parameter in intervention.named_parameters()
        }
        gates = [p for name, p in self._named.items() if name.rpartition(".")[2].startswith("gate")]
        others = [p for name, p in self._named.items() if not name.rpartition(".")[2].startswith("gate")]
        groups = [(others, config.learning_rate), (gates, config.gate_learning_rate)]
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters],
            weight_decay=config.weight_decay,
            betas=(0.9, 0.99),  # a short memory: an edit has tens of steps, not thousands
        )
        bases = [intervention.basis for intervention in interventions.values()]
        retract_after_step(self.optimizer, bases, project_gradients=config.project_gradients, backend=config.backend)
        # Sum of w over the tokens of all finished edits, by layer: the constant part of the load-balancing loss.
        self.usage = {layer: i.basis.new_zeros(i.low_rank_dimension) for layer, i in interventions.items()}

    def __call__(self, edits: Sequence[Encoded], rate: float = 1.0) -> Tensor:
        """Train once on ``edits`` and as many unrelated texts as configured.

        Args:
            edits: prompts with their targets.
            rate: factor on the learning rates.

        Returns:
            Each edit's loss before the step, [len(edits)], on the model's device.
        """
        config = self.config
        wanted = config.unrelated_per_step if config.locality_weight > 0 else 0
        unrelated = self.unrelated.draw(wanted, self.generator)
        batch = self.encoder.batch([*edits, *unrelated], self.model.device)
        count = len(edits)
        with self.attachment.recording() as records:
            logits = self._logits(batch)
        per_edit = objective.answer_nll(logits[:count], batch.labels[:count])
        loss = per_edit.mean()
        if config.balance_weight > 0:
            loss = loss + config.balance_weight * self._balance(records, batch, count)
        if unrelated:
            loss = loss + config.locality_weight * self._locality(logits, records, batch, count)
        loss.backward()
        for group, base_rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            group["lr"] = base_rate * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return per_edit.detach()

    def _rates(self) -> list[float]:
        return [self.config.learning_rate, self.config.gate_learning_rate][: len(self.optimizer.param_groups)]

    def _logits(self, batch: TokenBatch) -> Tensor:
        with self.attachment.prompts(batch.tokens):
            return self.model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits

    def _balance(self, records: dict[int, LayerRecord], batch: TokenBatch, count: int) -> Tensor:
        mask = batch.attention_mask[:count]
        terms = [objective.balance(self.usage[layer], r.weights[:count], mask) for layer, r in records.items()]
        return torch.stack([term.to(batch.ids.device) for term in terms]).mean()

    def _locality(self, logits: Tensor, records: dict[int, LayerRecord], batch: TokenBatch, count: int) -> Tensor:
        mask = batch.attention_mask[count:]
        if self.config.locality_loss == "kl":
            with torch.no_grad(), self.attachment.disabled():
                base = self._logits(batch[count:])
            return objective.kl_to_base(logits[count:], F.log_softmax(base.float(), dim=-1), mask)
        margin = self.config.locality_margin
        terms = [
            objective.relative_update(r.update[count:], r.squared_norm[count:], mask.to(r.update.device), margin)
            for r in records.values()
        ]
        return torch.stack([term.to(batch.ids.device) for term in terms]).mean()

    @torch.no_grad()
    def count_usage(self, edits: Sequence[Encoded]) -> None:
        """Add the gate weights on the tokens of finished edits to the usage that load balancing looks at."""
        if self.config.balance_weight <= 0:
            return
        batch = self.encoder.batch(edits, self.model.device)
        with self.attachment.recording() as records:
            self._logits(batch)
        for layer, record in records.items():
            mask = batch.attention_mask.to(record.weights.device)
            self.usage[layer] += (record.weights * mask.unsqueeze(-1)).sum((0, 1))

    # -- what continuing after a save and load needs ---------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Optimiser moments by parameter name, gate usage by layer, and the random generator, as copies."""
        state = {f"usage.{layer}": usage.clone() for layer, usage in self.usage.items()}
        state["generator"] = self.generator.get_state()
        for name, parameter in self._named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = value.clone()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state`` returned."""
        self.generator.set_state(state["generator"].cpu())
        for layer, usage in self.usage.items():
            usage.copy_(state[f"usage.{layer}"])
        for name, parameter in self._named.items():
            prefix = f"optimizer.{name}."
            moments = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
            self.optimizer.state.pop(parameter, None)
            if moments:
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter, copy=True)
                    for key, value in moments.items()
                }
