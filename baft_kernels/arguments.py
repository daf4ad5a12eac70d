"""What a call must be: shapes, dtypes, devices and ranges of its arguments, each error naming the argument."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from baft_kernels.packing import Parameters
from baft_kernels.reference import GATE_FNS

__all__ = ["check_adapters", "check_call", "check_gate_fn", "rows_of"]


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_gate_fn(gate_fn: str) -> None:
    """Raise ValueError unless ``gate_fn`` is one of the gates."""
    if gate_fn not in GATE_FNS:
        raise ValueError(f"gate_fn: expected one of {', '.join(GATE_FNS)}, got {gate_fn!r}")


def check_call(h: Tensor, parameters: Parameters, gate_fn: str, *, sets: int | None = None) -> None:
    """Raise unless h [..., d] and the parameters fit together; with ``sets`` N, these have a leading axis of N."""
    if not _fits(h, parameters, gate_fn, sets):
        _report(h, parameters, gate_fn, sets)


def _fits(h: Tensor, parameters: Parameters, gate_fn: str, sets: int | None) -> bool:
    """Whether there is nothing to report, found in as few steps as can be: it comes before every call."""
    basis, source, source_bias, gate, gate_bias = parameters
    shape, dtype, device = basis.shape, basis.dtype, h.device
    lead = () if sets is None else (sets,)
    if gate_fn == "none":
        gated = gate is None and gate_bias is None
    else:
        gated = (
            (gate_fn == "sigmoid" or gate_fn == "softmax")
            and gate is not None
            and gate_bias is not None
            and gate.shape == shape
            and gate_bias.shape == shape[:-1]
            and gate.dtype == gate_bias.dtype == dtype
            and gate.device == gate_bias.device == device
        )
    return (
        gated
        and h.dtype in _DTYPES
        and dtype in _DTYPES
        and h.ndim > 0
        and len(shape) == len(lead) + 2
        and shape[:-2] == lead
        and 1 <= shape[-2] <= shape[-1] == h.shape[-1]
        and source.shape == shape
        and source_bias.shape == shape[:-1]
        and source.dtype == source_bias.dtype == dtype
        and basis.device == source.device == source_bias.device == device
        and not _finite_asked()
    )


def _report(h: Tensor, parameters: Parameters, gate_fn: str, sets: int | None) -> None:
    """Raise what is wrong; nothing may be, as with parameters of several dtypes."""
    check_gate_fn(gate_fn)
    if h.dtype not in _DTYPES:
        raise TypeError(f"h: expected float32, bfloat16, float16 or float64, got {h.dtype}")
    if h.ndim < 1 or h.shape[-1] < 1:
        raise ValueError(f"h: expected shape [..., d] with d >= 1, got {list(h.shape)}")
    d = h.shape[-1]
    basis, source, source_bias, gate, gate_bias = parameters
    lead = [] if sets is None else [sets]
    if basis.ndim != len(lead) + 2 or basis.shape[-1] != d or not 1 <= basis.shape[-2] <= d:
        axes = "r" if sets is None else "N, r"
        raise ValueError(f"basis: expected shape [{axes}, {d}] with 1 <= r <= {d}, got {list(basis.shape)}")
    r = basis.shape[-2]
    matrix, vector = [*lead, r, d], [*lead, r]
    wanted = {"basis": (basis, matrix), "source": (source, matrix), "source_bias": (source_bias, vector)}
    if gate_fn == "none":
        if gate is not None or gate_bias is not None:
            raise ValueError('gate, gate_bias: expected None with gate_fn="none", got a tensor')
    else:
        if gate is None or gate_bias is None:
            raise ValueError(f"gate, gate_bias: expected tensors with gate_fn={gate_fn!r}, got None")
        wanted |= {"gate": (gate, matrix), "gate_bias": (gate_bias, vector)}
    check_finite = _finite_asked()
    for name, (tensor, shape) in wanted.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")
        if tensor.device != h.device:
            raise ValueError(f"{name}: expected device {h.device} as h has, got {tensor.device}")
        if check_finite and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def _finite_asked() -> bool:
    # Looking first whether it is there takes a quarter of the time of ``get``, which catches an exception.
    return "BAFT_CHECK_FINITE" in os.environ and os.environ["BAFT_CHECK_FINITE"] == "1"


def check_adapters(adapter_ids: Tensor, h: Tensor, sets: int, in_range: bool) -> Tensor:
    """``adapter_ids`` [B] as int64, for h [B, ..., d] and ``sets`` parameter sets; ``in_range`` if that is known."""
    if adapter_ids.dtype == torch.bool or adapter_ids.is_floating_point() or adapter_ids.is_complex():
        raise TypeError(f"adapter_ids: expected an integer tensor, got {adapter_ids.dtype}")
    if adapter_ids.device != h.device:
        raise ValueError(f"adapter_ids: expected device {h.device} as h has, got {adapter_ids.device}")
    if h.ndim < 2 or adapter_ids.shape != h.shape[:1]:
        wanted = f"[{h.shape[0]}], one for each of h's first axis" if h.ndim > 1 else "h of shape [B, ..., d]"
        raise ValueError(f"adapter_ids: expected {wanted}, got {list(adapter_ids.shape)} for h {list(h.shape)}")
    ids = adapter_ids.long()
    if ids.numel() and not in_range and not _values_unknown(h):
        least, most = torch.stack(torch.aminmax(ids)).tolist()  # a GPU is waited for once
        if not 0 <= least <= most < sets:
            raise ValueError(f"adapter_ids: expected numbers from 0 to {sets - 1}, got {least} to {most}")
    return ids


def _values_unknown(h: Tensor) -> bool:
    """While a graph is traced or captured, no value can be looked at."""
    return torch.compiler.is_compiling() or (h.is_cuda and torch.cuda.is_current_stream_capturing())


def rows_of(positions: Tensor, h: Tensor) -> Tensor:
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
    if _values_unknown(h):
        return rows.scatter_(-1, index, True)
    if not index.numel():
        return rows
    # On a GPU an index out of range ends the process, so what is scattered is in range; and the host waits only once.
    if lead[-1]:
        rows.scatter_(-1, index.clamp(0, lead[-1] - 1), True)
    least, most, distinct = torch.stack([*torch.aminmax(index), rows.sum()]).tolist()
    if not 0 <= least <= most < lead[-1]:
        raise ValueError(f"positions: expected indices from 0 to {lead[-1] - 1}, got {least} to {most}")
    if distinct != index.numel():
        raise ValueError("positions: expected each index once in a sequence, got a repeated index")
    return rows
