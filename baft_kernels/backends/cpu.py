"""The C++ kernels of csrc/cpu: packing for them, and the calls.

On x86-64 and ARM gradients that are subnormal as float32, below 1.2e-38, count as zero, and come out as zero.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from baft_kernels.backends.protocol import Backend
from baft_kernels.packing import Parameters, difference, packed

__all__ = ["CpuBackend"]

# As in csrc/cpu/kernels.h and op.h.
_PANEL = 32
_BLOCK = 64
_GATES = ("sigmoid", "softmax", "none")
_MOST_PAIRS = 256
_INTERFACE = 3

_library = torch.library.Library("baft_kernels", "FRAGMENT")
_library.define(
    "cpu_forward(Tensor h, Tensor projection, Tensor basis, Tensor bias, int gate) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "cpu_forward_out(Tensor h, Tensor(a!) out, Tensor(b!) weights, Tensor(c!) update, Tensor? rows, Tensor projection,"
    " Tensor basis, Tensor bias, int gate) -> ()"
)
_library.define(
    "cpu_grouped_forward_out(Tensor h, Tensor(a!) out, Tensor(b!) weights, Tensor(c!) update, Tensor rows,"
    " Tensor number, Tensor first, Tensor projection, Tensor basis, Tensor bias, int gate) -> ()"
)
_library.define("cpu_empty_like(Tensor h) -> Tensor")
_library.define(
    "cpu_backward(Tensor grad_out, Tensor? grad_weights, Tensor? grad_update, Tensor h, Tensor weights, Tensor update,"
    " Tensor? rows, Tensor basis, Tensor projection, int gate, Tensor(a!)? grad_h, Tensor(b!)? basis_gradient,"
    " Tensor(c!)? source_gradient, Tensor(d!)? source_bias_gradient, Tensor(e!)? gate_gradient,"
    " Tensor(f!)? gate_bias_gradient) -> ()"
)


def _load() -> str | None:
    """Load the compiled library; what is wrong with it, or None."""
    try:
        library = importlib.import_module("baft_kernels._cpu")  # registers the operators
    except ModuleNotFoundError:
        return "csrc/ wasn't built: it takes a C++ compiler, ninja and torch's headers when the package is installed"
    except ImportError as error:
        return f"the compiled library doesn't load: {error}"
    if library.INTERFACE != _INTERFACE:
        return (
            f"the compiled library is of another version ({library.INTERFACE}, expected {_INTERFACE}): build it again"
        )
    return None


def _pairs() -> bool:
    return bool(sys.modules["baft_kernels._cpu"].pairs())


_PROBLEM = _load()  # at once: not while a call is traced


# -- packing: layouts of csrc/cpu/kernels.h, for one parameter set or, with a leading axis, for each of several --


class _ForwardPack(NamedTuple):
    projection: Tensor
    basis: Tensor
    bias: Tensor


class _BackwardPack(NamedTuple):
    basis: Tensor
    projection: Tensor


def _panels(matrix: Tensor, pairs: bool) -> Tensor:
    """[..., k, d] as [..., panels, d, _PANEL], or [..., panels, d / 2, _PANEL, 2]: for a projection on its rows."""
    padded = F.pad(matrix, (0, matrix.shape[-1] % 2 if pairs else 0, 0, -matrix.shape[-2] % _PANEL))
    panels = padded.unflatten(-2, (-1, _PANEL))
    if not pairs:
        return panels.mT.contiguous()
    return panels.unflatten(-1, (-1, 2)).transpose(-3, -2).to(torch.bfloat16, memory_format=torch.contiguous_format)


def _blocks(matrix: Tensor, pairs: bool) -> Tensor:
    """[..., k, d] as [..., blocks, k, _BLOCK], or [..., blocks, k / 2, _BLOCK, 2]: for a write-back of its rows."""
    padded = F.pad(matrix, (0, -matrix.shape[-1] % _BLOCK, 0, matrix.shape[-2] % 2 if pairs else 0))
    blocks = padded.unflatten(-1, (-1, _BLOCK)).transpose(-3, -2)
    if not pairs:
        return blocks.contiguous()
    return blocks.unflatten(-2, (-1, 2)).mT.to(torch.bfloat16, memory_format=torch.contiguous_format)


def _projection(parameters: Parameters) -> Tensor:
    """D, and G below it where there is a gate: [..., r, d] or [..., 2r, d], in float32."""
    d = difference(parameters)
    return d if parameters.gate is None else torch.cat([d, parameters.gate.detach().float()], dim=-2)


def _in_pairs(parameters: Parameters, dtype: torch.dtype) -> bool:
    """Whether the kernels multiply pairs of bfloat16: for that dtype, where the processor can, up to some rank."""
    return dtype == torch.bfloat16 and _pairs() and 2 * parameters.basis.shape[-2] <= _MOST_PAIRS


def _pack_forward(parameters: Parameters, dtype: torch.dtype) -> _ForwardPack:
    pairs = _in_pairs(parameters, dtype)
    biases = [bias.detach().float() for bias in (parameters.source_bias, parameters.gate_bias) if bias is not None]
    basis = parameters.basis.detach().float()
    return _ForwardPack(_panels(_projection(parameters), pairs), _blocks(basis, pairs), torch.cat(biases, dim=-1))


def _pack_backward(parameters: Parameters, dtype: torch.dtype) -> _BackwardPack:
    pairs = _in_pairs(parameters, dtype)
    return _BackwardPack(_panels(parameters.basis.detach().float(), pairs), _blocks(_projection(parameters), pairs))


# -- the calls --


class CpuBackend(Backend):
    """Serves float32, bfloat16 and float16 on the CPU; sums in float32, whatever the dtype."""

    name = "cpu"
    serves = "float32, bfloat16 and float16 on the CPU, any d and r"

    def why_unusable(self) -> str | None:
        return _PROBLEM

    def why_not(self, h: Tensor, rank: int) -> str | None:
        if h.device.type != "cpu":
            return f"it serves tensors on the CPU, and h is on {h.device}"
        if h.dtype == torch.float64:
            return "it serves float32, bfloat16 and float16, and h is float64"
        return None

    def forward(
        self,
        h: Tensor,
        parameters: Parameters,
        rows: Tensor | None,
        adapters: Tensor | None,
        gate_fn: str,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if out is not None and _without_gaps(out) is not out:
            dense, weights, update = self.forward(h, parameters, rows, adapters, gate_fn, None)
            return out.copy_(dense), weights, update
        h = _without_gaps(h)
        pack = packed(_pack_forward, parameters, h.dtype)
        gate = _GATES.index(gate_fn)
        if rows is None and adapters is None and out is None:
            return torch.ops.baft_kernels.cpu_forward.default(h, *pack, gate)
        low = (h.shape[0], parameters.basis.shape[-2])
        if rows is None:
            out = h.new_empty(h.shape) if out is None else out
            weights, update = h.new_empty(low, dtype=torch.float32), h.new_empty(low, dtype=torch.float32)
        else:
            out = h.clone(memory_format=torch.contiguous_format) if out is None else out
            weights, update = h.new_zeros(low, dtype=torch.float32), h.new_zeros(low, dtype=torch.float32)
        rows = _numbers(rows)
        if adapters is None:
            torch.ops.baft_kernels.cpu_forward_out(h, out, weights, update, rows, *pack, gate)
        else:
            sets = _by_set(rows, adapters, h.shape[0])
            torch.ops.baft_kernels.cpu_grouped_forward_out(h, out, weights, update, *sets, *pack, gate)
        return out, weights, update

    def backward(
        self,
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
        grad_out, grad_weights, grad_update = incoming
        h, grad_out = _without_gaps(h), _without_gaps(grad_out)
        aux = [None if gradient is None else gradient.contiguous() for gradient in (grad_weights, grad_update)]
        of_h = None
        if input_gradient:
            of_h = (
                torch.ops.baft_kernels.cpu_empty_like(h)
                if rows is None
                else grad_out.clone(memory_format=torch.contiguous_format)
            )
        gradients = None
        if parameter_gradients:  # zeros are for the sets that no sequence uses
            make = torch.empty_like if adapters is None else torch.zeros_like
            gradients = Parameters(
                *(
                    None if value is None else make(value, dtype=torch.float32, memory_format=torch.contiguous_format)  # type: ignore[arg-type]
                    for value in parameters
                )
            )
        pack = packed(_pack_backward, parameters, h.dtype)
        gate = _GATES.index(gate_fn)
        rows = _numbers(rows)
        for chosen, some in [(None, rows)] if adapters is None else _by_set(rows, adapters, h.shape[0]).each():
            of_set = (tensor if chosen is None else tensor[chosen] for tensor in pack)
            targets = (None,) * 5 if gradients is None else gradients if chosen is None else gradients.of_set(chosen)
            torch.ops.baft_kernels.cpu_backward(grad_out, *aux, h, weights, update, some, *of_set, gate, of_h, *targets)
        return of_h, gradients


def _without_gaps(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def _numbers(rows: Tensor | None) -> Tensor | None:
    """Rows by number; None for all."""
    return rows.nonzero().flatten() if rows is not None and rows.dtype == torch.bool else rows


class _Sets(NamedTuple):
    """Rows sorted by parameter set: those from first[i] to first[i + 1] are of set number[i]."""

    rows: Tensor
    number: Tensor
    first: Tensor

    def each(self) -> Iterator[tuple[int, Tensor]]:
        """Every set that is used, with its rows."""
        return zip(self.number.tolist(), self.rows.split(self.first.diff().tolist()), strict=True)


def _by_set(rows: Tensor | None, adapters: Tensor, count: int) -> _Sets:
    """Share out ``rows`` (None for all ``count``), each being of its sequence's set."""
    each_row = adapters.long().repeat_interleave(count // max(1, adapters.numel()))
    wanted = each_row if rows is None else each_row[rows]
    ordered, order = wanted.sort(stable=True)
    number, counts = ordered.unique_consecutive(return_counts=True)
    return _Sets(order if rows is None else rows[order], number, F.pad(counts.cumsum(0), (1, 0)))
