"""The public functions of the op: check the arguments, turn ``positions`` into rows, call the backend."""

from __future__ import annotations

import os
from typing import Literal, overload

import torch
from torch import Tensor

from baft_kernels import ops
from baft_kernels.autograd import fused
from baft_kernels.backends import REFERENCE, resolve_backend
from baft_kernels.packing import Parameters
from baft_kernels.reference import GATE_FNS, BaftOutput, baft_reference

__all__ = ["baft", "baft_", "check_gate_fn"]


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
    _check(h, basis, source, source_bias, gate, gate_bias, gate_fn)
    rows = None if positions is None else _rows(positions, h)
    parameters = Parameters(basis, source, source_bias, gate, gate_bias)
    serving = resolve_backend(backend, h)
    if serving == REFERENCE:
        result = baft_reference(h, *parameters, gate_fn, rows)
        return result if return_aux else result.out
    flat = h.reshape(-1, h.shape[-1])
    flat_rows = None if rows is None else rows.reshape(-1)
    out, weights, update = fused(flat, parameters, flat_rows, None, gate_fn, serving)
    if not return_aux:
        return out.view(h.shape)
    low = (*h.shape[:-1], basis.shape[0])
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
    _check(h, basis, source, source_bias, gate, gate_bias, gate_fn)
    rows = None if positions is None else _rows(positions, h)
    parameters = Parameters(basis, source, source_bias, gate, gate_bias)
    serving = resolve_backend(backend, h)
    if serving == REFERENCE:
        return h.copy_(baft_reference(h, *parameters, gate_fn, rows).out)
    flat_rows = None if rows is None else rows.reshape(-1)
    try:
        flat = h.view(-1, h.shape[-1])
    except RuntimeError:  # no view has these rows: work on a copy
        flat = h.reshape(-1, h.shape[-1])
        ops.forward_(flat, *parameters, flat_rows, None, gate_fn, serving)
        return h.copy_(flat.view(h.shape))
    ops.forward_(flat, *parameters, flat_rows, None, gate_fn, serving)
    return h


def check_gate_fn(gate_fn: str) -> None:
    """Raise ValueError unless ``gate_fn`` is one of the gates."""
    if gate_fn not in GATE_FNS:
        raise ValueError(f"gate_fn: expected one of {', '.join(GATE_FNS)}, got {gate_fn!r}")


def _check(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_fn: str,
) -> None:
    check_gate_fn(gate_fn)
    if h.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"h: expected float32, bfloat16, float16 or float64, got {h.dtype}")
    if h.ndim < 1 or h.shape[-1] < 1:
        raise ValueError(f"h: expected shape [..., d] with d >= 1, got {list(h.shape)}")
    d = h.shape[-1]
    if basis.ndim != 2 or basis.shape[1] != d or not 1 <= basis.shape[0] <= d:
        raise ValueError(f"basis: expected shape [r, {d}] with 1 <= r <= {d}, got {list(basis.shape)}")
    r = basis.shape[0]
    wanted = {"basis": (basis, [r, d]), "source": (source, [r, d]), "source_bias": (source_bias, [r])}
    if gate_fn == "none":
        if gate is not None or gate_bias is not None:
            raise ValueError('gate, gate_bias: expected None with gate_fn="none", got a tensor')
    else:
        if gate is None or gate_bias is None:
            raise ValueError(f"gate, gate_bias: expected tensors with gate_fn={gate_fn!r}, got None")
        wanted |= {"gate": (gate, [r, d]), "gate_bias": (gate_bias, [r])}
    check_finite = os.environ.get("BAFT_CHECK_FINITE") == "1"
    for name, (tensor, shape) in wanted.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")
        if tensor.device != h.device:
            raise ValueError(f"{name}: expected device {h.device} as h has, got {tensor.device}")
        if check_finite and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def _rows(positions: Tensor, h: Tensor) -> Tensor:
    """``positions`` as a boolean mask of shape ``h.shape[:-1]``."""
    if positions.device != h.device:
        raise ValueError(f"positions: expected device {h.device} as h has, got {positions.device}")
    lead = h.shape[:-1]
    if positions.dtype == torch.bool:
        if positions.shape != lead:
            raise ValueError(f"positions: expected a boolean mask of shape {list(lead)}, got {list(positions.shape)}")
        return positions
    if positions.is_floating_point() or positions.is_complex():
        raise TypeError(f"positions: expected an integer or boolean tensor, got {positions.dtype}")
    if h.ndim < 2:
        raise ValueError("positions: expected None for a single vector h, got indices")
    if positions.ndim < 1 or (positions.ndim > 1 and positions.shape[:-1] != lead[:-1]):
        leading = "".join(f"{size}, " for size in lead[:-1])
        raise ValueError(
            f"positions: expected shape [k] or [{leading}k] for h of shape {list(h.shape)}, got {list(positions.shape)}"
        )
    index = positions.long().expand(*lead[:-1], positions.shape[-1])
    rows = torch.zeros(lead, dtype=torch.bool, device=h.device)
    if torch.compiler.is_compiling():
        # The values aren't known while a graph is traced.
        return rows.scatter_(-1, index, True)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < lead[-1]:
        raise ValueError(
            f"positions: expected indices from 0 to {lead[-1] - 1}, got {int(index.min())} to {int(index.max())}"
        )
    rows.scatter_(-1, index, True)
    if int(rows.sum()) != index.numel():
        raise ValueError("positions: expected each index once in a sequence, got a repeated index")
    return rows
