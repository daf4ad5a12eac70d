"""The public functions of the op: check the arguments, choose the backend, flatten, call the operator."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from baft_kernels import ops
from baft_kernels.arguments import check_adapters, check_call, rows_of
from baft_kernels.autograd import fused
from baft_kernels.backends import REFERENCE, resolve_backend
from baft_kernels.packing import Parameters
from baft_kernels.reference import BaftOutput, baft_reference

__all__ = ["baft", "baft_", "grouped_baft"]


@overload
def baft(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    *,
    gate_fn: str = ...,
    positions: Tensor | None = ...,
    return_aux: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def baft(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    *,
    gate_fn: str = ...,
    positions: Tensor | None = ...,
    return_aux: Literal[True],
    backend: str = ...,
) -> BaftOutput: ...
def baft(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    *,
    gate_fn: str = "sigmoid",
    positions: Tensor | None = None,
    return_aux: bool = False,
    backend: str = "auto",
) -> Tensor | BaftOutput:
    """Edit hidden vectors: ``out = h + R^T (w * (A h + b - R h))`` with ``w = gate_fn(G h + c)``.

    The formula is that of BaFT (arXiv 2503.00306); see ``baft_kernels.reference``.

    Args:
        h: [..., d], float32, bfloat16, float16 or float64; the axis before the last is the sequence.
        basis: R, [r, d], orthonormal rows, 1 <= r <= d.
        source: A, [r, d].
        source_bias: b, [r].
        gate: G, [r, d]; None for ``gate_fn="none"``.
        gate_bias: c, [r]; None for ``gate_fn="none"``.
        gate_fn: ``"sigmoid"``, ``"softmax"`` over the r bases, or ``"none"`` (w = 1, LoReFT).
        positions: the rows to edit: None for all; a boolean mask of shape ``h.shape[:-1]``; or an integer tensor of row
            indices, [k] for every sequence alike or ``h.shape[:-2] + (k,)`` for each its own. No index may repeat.
            Other rows keep their bits. Under ``torch.compile`` indices aren't checked.
        return_aux: also return w and u.
        backend: ``"auto"`` (what the environment variable ``BAFT_BACKEND`` says, else the fastest that serves the call)
            or a backend's name, which then serves the call or raises.

    Returns:
        ``out`` [..., d] in h's dtype; with ``return_aux`` a ``BaftOutput(out, weights, update)``, where ``weights`` w
        and ``update`` u are [..., r], float32 (float64 for a float64 h), differentiable, and 0 at rows that weren't
        edited.

    Raises:
        TypeError: for an h or a parameter that isn't floating point, or positions that are neither integer nor boolean.
        ValueError: for shapes, devices, ranks, gates or positions that don't fit; for a non-finite parameter if
            ``BAFT_CHECK_FINITE=1`` is set; for a backend that can't serve the call.
    """
    parameters = Parameters(basis, source, source_bias, gate, gate_bias)
    check_call(h, parameters, gate_fn)
    rows = None if positions is None else rows_of(positions, h)
    serving = resolve_backend(backend, h, basis.shape[-2])
    if serving == REFERENCE:
        result = baft_reference(h, *parameters, gate_fn, rows)
    else:
        result = _flattened(h, parameters, rows, None, gate_fn, serving)
    return result if return_aux else result.out


def _flattened(
    h: Tensor, parameters: Parameters, rows: Tensor | None, adapters: Tensor | None, gate_fn: str, serving: str
) -> BaftOutput:
    """The operator on h of any rank: it only knows rows."""
    if h.ndim == 2:
        return BaftOutput(*fused(h, parameters, rows, adapters, gate_fn, serving))
    flat_rows = None if rows is None else rows.reshape(-1)
    out, weights, update = fused(h.reshape(-1, h.shape[-1]), parameters, flat_rows, adapters, gate_fn, serving)
    low = (*h.shape[:-1], parameters.basis.shape[-2])
    return BaftOutput(out.view(h.shape), weights.view(low), update.view(low))


@torch.no_grad()
def baft_(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    *,
    gate_fn: str = "sigmoid",
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``baft`` in place on ``h``, for inference: records no gradient, and changes only the rows at ``positions``.

    Arguments and errors are those of ``baft``.

    Returns:
        ``h`` itself.

    Raises:
        ValueError: also if ``h`` requires grad.
    """
    if h.requires_grad:
        raise ValueError("h: expected requires_grad=False, since baft_ writes in place, got True")
    parameters = Parameters(basis, source, source_bias, gate, gate_bias)
    check_call(h, parameters, gate_fn)
    rows = None if positions is None else rows_of(positions, h)
    serving = resolve_backend(backend, h, basis.shape[-2])
    if serving == REFERENCE:
        return h.copy_(baft_reference(h, *parameters, gate_fn, rows).out)
    flat_rows = None if rows is None else rows.reshape(-1)
    try:
        flat = h.view(-1, h.shape[-1])
    except RuntimeError:  # no view has these rows: work on a copy
        flat = h.reshape(-1, h.shape[-1])
        ops.forward_(flat, parameters, flat_rows, None, gate_fn, serving)
        return h.copy_(flat.view(h.shape))
    ops.forward_(flat, parameters, flat_rows, None, gate_fn, serving)
    return h


@overload
def grouped_baft(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    adapter_ids: Tensor,
    *,
    ids_in_range: bool = ...,
    gate_fn: str = ...,
    positions: Tensor | None = ...,
    return_aux: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def grouped_baft(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    adapter_ids: Tensor,
    *,
    ids_in_range: bool = ...,
    gate_fn: str = ...,
    positions: Tensor | None = ...,
    return_aux: Literal[True],
    backend: str = ...,
) -> BaftOutput: ...
def grouped_baft(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    adapter_ids: Tensor,
    *,
    ids_in_range: bool = False,
    gate_fn: str = "sigmoid",
    positions: Tensor | None = None,
    return_aux: bool = False,
    backend: str = "auto",
) -> Tensor | BaftOutput:
    """``baft`` with a parameter set for each sequence: sequence i of the batch uses set ``adapter_ids[i]``.

    Args:
        h: [B, ..., d], as for ``baft``.
        basis, source: [N, r, d], for N parameter sets.
        source_bias: [N, r].
        gate: [N, r, d], and gate_bias: [N, r]; None for ``gate_fn="none"``.
        adapter_ids: integers [B], each from 0 to N - 1. A set may serve several sequences, or none: its gradient is
            then 0. Under ``torch.compile``, and while a CUDA graph is captured, the numbers aren't checked.
        ids_in_range: True says that they are known to be right. Looking at them waits for the GPU, at every call; but
            wrong ones that nobody looks at read memory that isn't the parameters'.
        gate_fn, positions, return_aux, backend: as for ``baft``.

    Returns:
        As ``baft``.

    Raises:
        TypeError, ValueError: as ``baft``, and for ``adapter_ids`` of another shape, type or range.
    """
    parameters = Parameters(basis, source, source_bias, gate, gate_bias)
    sets = basis.shape[0] if basis.ndim == 3 else 0
    check_call(h, parameters, gate_fn, sets=sets)
    adapters = check_adapters(adapter_ids, h, sets, ids_in_range)
    rows = None if positions is None else rows_of(positions, h)
    serving = resolve_backend(backend, h, basis.shape[-2])
    if serving == REFERENCE:
        result = _grouped_reference(h, parameters, rows, adapters, gate_fn)
    else:
        result = _flattened(h, parameters, rows, adapters, gate_fn, serving)
    return result if return_aux else result.out


def _grouped_reference(
    h: Tensor, parameters: Parameters, rows: Tensor | None, adapters: Tensor, gate_fn: str
) -> BaftOutput:
    chosen = Parameters(*(None if value is None else value[adapters] for value in parameters))  # type: ignore[arg-type]
    sequences = h.flatten(1, -2) if h.ndim > 2 else h.unsqueeze(1)
    result = baft_reference(sequences, *chosen, gate_fn, None if rows is None else rows.reshape(sequences.shape[:-1]))
    return BaftOutput(*(value.view(*h.shape[:-1], value.shape[-1]) for value in result))
