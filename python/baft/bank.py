"""Several edited models in one: parameter sets side by side, for batches whose sequences are edited differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from baft.attach import Attachment
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
        with torch.no_grad():
            for layer, intervention in self._interventions.items():
                for name, parameter in intervention.named_parameters():
                    for index, state in enumerate(states):
                        value = state.get(f"layers.{layer}.{name}")
                        if value is None or value.shape != parameter.shape[1:]:
                            got = None if value is None else list(value.shape)
                            raise ValueError(
                                f"states[{index}], layers.{layer}.{name}: expected shape {list(parameter.shape[1:])},"
                                f" got {got}"
                            )
                        parameter[index].copy_(value)
                intervention.requires_grad_(False)
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
        with attachment.sets(self._interventions, torch.tensor(adapter_ids)):
            yield
