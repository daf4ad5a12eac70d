"""The operator by plain torch, for the calls that a backend serves but has no kernel for, such as a very large rank."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from baft_kernels.packing import Parameters
from baft_kernels.reference import baft_backward_reference, baft_reference

__all__ = ["as_mask", "backward", "forward"]

Some = TypeVar("Some", Tensor, None, Tensor | None)


def forward(
    h: Tensor, parameters: Parameters, rows: Tensor | None, adapters: Tensor | None, gate_fn: str, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``Backend.forward``."""
    mask = _cut(as_mask(rows, h.shape[0]), adapters)
    result = baft_reference(_cut(h, adapters), *_of_each(parameters, adapters), gate_fn, mask)
    made, weights, update = (value.reshape(h.shape[0], value.shape[-1]) for value in result)
    return made if out is None else out.copy_(made), weights, update


def backward(
    incoming: tuple[Tensor, Tensor | None, Tensor | None],
    h: Tensor,
    weights: Tensor,
    update: Tensor,
    parameters: Parameters,
    rows: Tensor | None,
    adapters: Tensor | None,
    gate_fn: str,
    input_gradient: bool,
    parameter_gradients: bool,
) -> tuple[Tensor | None, Parameters | None]:
    """As ``Backend.backward``."""
    mask = as_mask(rows, h.shape[0])
    grad_out, grad_weights, grad_update = incoming
    used = _of_each(parameters, adapters)
    of_h, *of_parameters = baft_backward_reference(
        _cut(grad_out, adapters),
        _cut(grad_weights, adapters),
        _cut(grad_update, adapters),
        _cut(h, adapters),
        _cut(weights, adapters),
        _cut(update, adapters),
        used.basis,
        used.source,
        used.gate,
        gate_fn,
        _cut(mask, adapters),
    )
    gradients = Parameters(*of_parameters) if parameter_gradients else None  # type: ignore[arg-type]
    if gradients is not None and adapters is not None:
        gradients = _added_up(gradients, parameters.basis.shape[0], adapters)
    if not input_gradient:
        return None, gradients
    of_h = of_h.reshape(h.shape).to(h.dtype)
    return of_h if mask is None else torch.where(mask[:, None], of_h, grad_out), gradients


def as_mask(rows: Tensor | None, count: int) -> Tensor | None:
    """``rows`` as a boolean mask [count]."""
    if rows is None or rows.dtype == torch.bool:
        return rows
    return torch.zeros(count, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)


def _cut(value: Some, adapters: Tensor | None) -> Some:
    """[T, ...] as [B, S, ...], a sequence for each of ``adapters``."""
    if value is None or adapters is None:
        return value
    sequences = adapters.shape[0]
    return value.reshape(sequences, value.shape[0] // max(1, sequences), *value.shape[1:])


def _of_each(parameters: Parameters, adapters: Tensor | None) -> Parameters:
    """The parameters that each sequence uses, with a leading axis B."""
    if adapters is None:
        return parameters
    return Parameters(*(None if value is None else value[adapters] for value in parameters))  # type: ignore[arg-type]


def _added_up(gradients: Parameters, sets: int, adapters: Tensor) -> Parameters:
    """The gradients of the parameter sets [N, ...], from those of the sequences [B, ...]."""
    return Parameters(
        *(  # type: ignore[arg-type]
            None if g is None else g.new_zeros(sets, *g.shape[1:]).index_add_(0, adapters, g) for g in gradients
        )
    )
