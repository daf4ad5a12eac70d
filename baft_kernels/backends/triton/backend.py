"""The Triton kernels as a backend: packing once for each version, and what has no kernel by plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baft_kernels.backends import triton, unfused
from baft_kernels.backends.protocol import Backend
from baft_kernels.packing import Held, Parameters, packed

__all__ = ["TritonBackend"]


def _room(parameters: Parameters, dtype: torch.dtype) -> triton.TritonPack:
    basis = parameters.basis
    sets, (rank, dim) = basis.shape[:-2].numel(), basis.shape[-2:]
    return triton.room(sets, rank, dim, dtype, basis.device, gated=parameters.gate is not None)


def _fill(held: Sequence[Held]) -> None:
    for parameters, _, pack in held:
        triton.fill(pack, *parameters)


class TritonBackend(Backend):
    """Serves float32, bfloat16 and float16 on NVIDIA GPUs; ranks above ``MAX_RANK`` by plain torch."""

    name = "triton"
    serves = "float32, bfloat16 and float16 on NVIDIA GPUs, any d, r up to 128 by kernels and above by plain torch"
    unproven = "its kernels have run in Triton's interpreter and through its compiler, but not yet on a GPU"

    def why_unusable(self) -> str | None:
        return triton.why_unusable()

    def why_not(self, h: Tensor, rank: int) -> str | None:
        if h.device.type != "cuda" and not (h.device.type == "cpu" and triton.interpreted()):
            return f"it serves tensors on an NVIDIA GPU, and h is on {h.device}"
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
        dense = h if h.shape[1] == 1 or h.stride(1) == 1 else h.contiguous()
        if parameters.basis.shape[-2] > triton.MAX_RANK or (out is not None and dense is not out):
            return unfused.forward(h, parameters, rows, adapters, gate_fn, out)
        rows = rows if adapters is None else unfused.as_mask(rows, h.shape[0])
        pack = packed(_room, parameters, h.dtype, _fill)
        return triton.forward(dense, pack, gate_fn=gate_fn, rows=rows, adapters=adapters, out=out)

    def retract(self, bases: Sequence[Tensor]) -> Tensor | None:
        here = bases[0].device
        fitting = (
            b.dtype == torch.float32 and b.is_contiguous() and b.device == here and len(b) <= triton.MAX_RETRACTION_RANK
            for b in bases
        )
        runs_here = here.type == "cuda" or (here.type == "cpu" and triton.interpreted())
        return triton.retract(list(bases)) if runs_here and all(fitting) else None

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
        wanted = (input_gradient, parameter_gradients)
        if parameters.basis.shape[-2] > triton.MAX_RANK:
            call = (incoming, h, weights, update, parameters, rows, adapters, gate_fn)
            return unfused.backward(*call, *wanted)
        grad_out, grad_weights, grad_update = incoming
        rows = rows if adapters is None else unfused.as_mask(rows, h.shape[0])
        of_h, *gradients = triton.backward(
            grad_out if grad_out.stride(1) == 1 else grad_out.contiguous(),
            grad_weights,
            grad_update,
            h if h.stride(1) == 1 else h.contiguous(),
            weights,
            update,
            packed(_room, parameters, h.dtype, _fill),
            gate_fn=gate_fn,
            rows=rows,
            adapters=adapters,
            input_gradient=input_gradient,
            parameter_gradients=parameter_gradients,
        )
        if not parameter_gradients:
            return of_h, None
        pairs = zip(gradients, parameters, strict=True)
        shaped = (
            None if gradient is None or value is None else gradient.view(value.shape) for gradient, value in pairs
        )
        return of_h, Parameters(*shaped)  # type: ignore[arg-type]
