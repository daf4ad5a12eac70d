"""Parameter sets in training: N of them side by side, each with its own optimiser's moments and step count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from baft.config import BaftConfig
from baft.transfer import sent
from baft_kernels import (
    BaftIntervention,
    GroupedBaftIntervention,
    project_to_tangent,
    repack,
    retract_,
    retract_near_,
)
from baft_kernels.stiefel import NEAR

__all__ = ["BETAS", "ParameterSets"]

BETAS = (0.9, 0.99)
"""AdamW's: a short memory, since an edit has tens of steps, not thousands."""

_EPS = 1e-8

Interventions = Mapping[int, BaftIntervention] | Mapping[int, GroupedBaftIntervention]


class _Moments(NamedTuple):
    """AdamW's state of one parameter, all with a leading axis of sets."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class ParameterSets:
    """The parameters of interventions on several layers, in one set or several, and how they are updated.

    All sets are updated by one call of torch's fused AdamW, and all bases retracted by one more. A set's update depends
    on nothing but its own gradients and moments.

    Args:
        interventions: by layer; ``BaftIntervention`` is one set, ``GroupedBaftIntervention`` as many as it has.
        config: learning rates and the like.

    Attributes:
        grouped: the interventions where they are grouped ones, else None.
        count: the number of sets.
    """

    def __init__(self, interventions: Interventions, config: BaftConfig) -> None:
        self.interventions = interventions
        self._config = config
        self._leaves = {
            f"layers.{layer}.{name}": parameter
            for layer, intervention in interventions.items()
            for name, parameter in intervention.named_parameters()
        }
        grouped = {layer: i for layer, i in interventions.items() if isinstance(i, GroupedBaftIntervention)}
        self.grouped = grouped or None
        self.count = next(iter(grouped.values())).sets if grouped else 1
        self._values = {name: self._with_sets(leaf.detach()) for name, leaf in self._leaves.items()}
        self._moments = {
            name: _Moments(torch.zeros_like(v), torch.zeros_like(v), v.new_zeros(self.count))
            for name, v in self._values.items()
        }

    def _with_sets(self, value: Tensor) -> Tensor:
        return value if self.grouped else value.unsqueeze(0)

    def rates(self, factor: float = 1.0) -> Tensor:
        """The learning rates of what isn't a gate and of gates, times ``factor``, as ``update`` takes them."""
        rates = [factor * rate for rate in self._config.rates(width=self._bases([0])[0].shape[-1])]
        return sent(rates, next(iter(self._values.values())).device, torch.float32)

    @torch.no_grad()
    def update(self, sets: Sequence[int], rates: Tensor, left_out: Tensor | None = None) -> Tensor:
        """One step of AdamW on some of the sets, and the retraction of their bases; gradients are used up.

        Args:
            sets: which ones.
            rates: what ``rates`` returned.
            left_out: float32 []; where it is 1, nothing changes, bit for bit.

        Returns:
            What ``retract_near_`` says of their bases, for ``retract_far``.
        """
        config = self._config
        gradients = {name: self._with_sets(leaf.grad) for name, leaf in self._leaves.items() if leaf.grad is not None}
        if config.project_gradients:
            for name in filter(_is_basis, gradients):
                gradients[name].copy_(project_to_tangent(gradients[name], self._values[name]))
        for gates in (False, True):
            chosen = [(name, k) for name in gradients if _is_gate(name) == gates for k in sets]
            if not chosen:
                continue
            adamw(
                [self._values[name][k] for name, k in chosen],
                [gradients[name][k] for name, k in chosen],
                [self._moments[name].exp_avg[k] for name, k in chosen],
                [self._moments[name].exp_avg_sq[k] for name, k in chosen],
                [],
                [self._moments[name].step[k] for name, k in chosen],
                fused=True,
                found_inf=left_out,
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=rates[int(gates)],
                weight_decay=config.weight_decay,
                eps=_EPS,
                maximize=False,
            )
        self.mark_written()
        self.drop_gradients()
        bases = self._bases(sets)
        distances = self._retract_near(bases, left_out)
        repack(intervention.basis for intervention in self.interventions.values())
        return distances

    def retract_far(self, sets: Sequence[int], distances: Sequence[float]) -> None:
        """Retract the bases that ``update`` left as they are.

        Raises:
            ValueError: if entries of one aren't finite.
        """
        for basis, distance in zip(self._bases(sets), distances, strict=True):
            if not distance <= NEAR:
                retract_(basis)

    def gradients(self) -> list[Tensor]:
        """What the parameters' gradients are accumulated in."""
        return [leaf.grad for leaf in self._leaves.values() if leaf.grad is not None]

    def drop_gradients(self) -> None:
        for leaf in self._leaves.values():
            leaf.grad = None

    def mark_written(self) -> None:
        """Let autograd know that the parameters were written to, which is how packed ones are known to be stale.

        Fused optimisers don't tell it, and replayed graphs don't.
        """
        torch.autograd.graph.increment_version(list(self._values.values()))

    def _retract_near(self, bases: Sequence[Tensor], left_out: Tensor | None) -> Tensor:
        if left_out is None:
            return retract_near_(bases, backend=self._config.backend)
        # Retracted once more, a basis that wasn't updated would change by roundings.
        before = [basis.clone() for basis in bases]
        distances = retract_near_(bases, backend=self._config.backend)
        for basis, kept in zip(bases, before, strict=True):
            basis.copy_(torch.where(left_out.to(basis.device) > 0, kept, basis))
        return distances

    def _bases(self, sets: Sequence[int]) -> list[Tensor]:
        return [value[k] for name, value in self._values.items() if _is_basis(name) for k in sets]

    def are_identity(self) -> bool:
        """Whether no set edits anything: sources equal bases, biases are 0."""
        return all(torch.equal(i.source, i.basis) and not i.source_bias.any() for i in self.interventions.values())

    def new_usage(self) -> dict[int, Tensor]:
        """A zero for each basis, by layer."""
        return {layer: i.basis.new_zeros(i.basis.shape[-2]) for layer, i in self.interventions.items()}

    @torch.no_grad()
    def renewed(self) -> ParameterSets:
        """Sets of the same interventions as they are now that their rank has changed; moments of new bases are 0.

        The count of steps stays the parameter's, so nothing corrects a new basis' moments for having started at 0.
        Where the old ones have trained for hundreds of steps, its first step is AdamW's own all the same, by ``BETAS``;
        the next hundred are longer, 2.1 times at most.
        """
        sets = ParameterSets(self.interventions, self._config)
        for name, moments in sets._moments.items():
            for new, old in zip(moments, self._moments[name], strict=True):
                if new.ndim == 1:
                    new.copy_(old)
                else:
                    rank = min(new.shape[1], old.shape[1])
                    new[:, :rank] = old[:, :rank]
        return sets

    # -- one set in and out ----------------------------------------------------------------------------------------

    def state(self, index: int = 0) -> dict[str, Tensor]:
        """A set's parameters as ``layers.{layer}.{name}``, and its moments as ``optimizer.{...}``, as copies."""
        return {**self.parameters(index), **self.moments(index)}

    def parameters(self, index: int = 0) -> dict[str, Tensor]:
        return {name: value[index].clone() for name, value in self._values.items()}

    def moments(self, index: int = 0) -> dict[str, Tensor]:
        return {
            f"optimizer.{name}.{key}": value[index].clone()
            for name, moments in self._moments.items()
            for key, value in moments._asdict().items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], index: int = 0) -> None:
        """Set one set to what ``state`` returned of another."""
        for name, value in self._values.items():
            value[index].copy_(state[name])
        self.load_moments(state, index)

    @torch.no_grad()
    def load_moments(self, state: Mapping[str, Tensor], index: int = 0) -> None:
        """Only its moments; those that aren't in ``state`` start at 0."""
        for name, moments in self._moments.items():
            for key, moment in moments._asdict().items():
                moment[index] = state.get(f"optimizer.{name}.{key}", 0.0)


def _is_gate(name: str) -> bool:
    return name.rpartition(".")[2].startswith("gate")


def _is_basis(name: str) -> bool:
    return name.endswith(".basis")
