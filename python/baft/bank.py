"""Several edited models in one: parameter sets side by side, for batches whose sequences are edited differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from baft.attach import Attachment
from baft.transfer import sent
from baft_kernels import BaftIntervention, GroupedBaftIntervention

__all__ = ["AdapterBank"]


class AdapterBank:
    """N states of an editor's interventions; made by ``BaftEditor.bank``.

    Args:
        interventions: by layer; what the states are of.
        states: each with ``layers.{layer}.{name}`` for every parameter, as ``BaftEditor.parameters()`` returns them.

    Raises:
        ValueError: for no states, or one with other parameters, by name or by shape.
    """

    def __init__(self, interventions: Mapping[int, BaftIntervention], states: Sequence[Mapping[str, Tensor]]) -> None:
        if not states:
            raise ValueError("states: expected at least one, got none")
        self._interventions = {layer: GroupedBaftIntervention(i, len(states)) for layer, i in interventions.items()}
        own = {
            f"layers.{layer}.{name}": parameter
            for layer, intervention in self._interventions.items()
            for name, parameter in intervention.named_parameters()
        }
        wanted = {name: list(parameter.shape[1:]) for name, parameter in own.items()}
        for index, state in enumerate(states):
            got = {name: list(value.shape) for name, value in state.items() if name.startswith("layers.")}
            for name in [*wanted, *got]:
                if got.get(name) != wanted.get(name):
                    expected = f"shape {wanted[name]}" if name in wanted else "no such parameter"
                    raise ValueError(f"states[{index}], {name}: expected {expected}, got {got.get(name)}")
            for name, parameter in own.items():
                parameter.detach()[index].copy_(state[name])
        for parameter in own.values():
            parameter.requires_grad_(False)
        self._count = len(states)

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def on(self, attachment: Attachment, adapter_ids: Sequence[int]) -> Iterator[None]:
        """Edit sequence i of the batches in this context by state ``adapter_ids[i]``.

        Raises:
            ValueError: for a number that isn't a state's.
        """
        bad = [number for number in adapter_ids if not 0 <= number < len(self)]
        if bad:
            raise ValueError(f"adapter_ids: expected numbers from 0 to {len(self) - 1}, got {bad[0]}")
        # Sent once: each layer would wait for a copy of its own.
        there = next(iter(self._interventions.values())).basis.device
        with attachment.sets(self._interventions, sent(adapter_ids, there)):
            yield
