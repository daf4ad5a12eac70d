"""The operator's gradient: an ``autograd.Function`` around the forward and the backward operator.

It saves h, w and u and nothing else of size T: the backward formulas need neither p nor z (``baft_kernels.reference``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baft_kernels import ops
from baft_kernels.packing import Parameters

__all__ = ["fused"]


def fused(
    h: Tensor, parameters: Parameters, rows: Tensor | None, adapters: Tensor | None, gate_fn: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, d], w [T, r] and u [T, r] of the operator, with a gradient where one is wanted; arguments: ``ops``."""
    wanted = torch.is_grad_enabled() and (h.requires_grad or any(p is not None and p.requires_grad for p in parameters))
    if wanted:
        return _Baft.apply(h, *parameters, rows, adapters, gate_fn, backend)
    return ops.forward(h, parameters, rows, adapters, gate_fn, backend)


class _Baft(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        basis: Tensor,
        source: Tensor,
        source_bias: Tensor,
        gate: Tensor | None,
        gate_bias: Tensor | None,
        rows: Tensor | None,
        adapters: Tensor | None,
        gate_fn: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = Parameters(basis, source, source_bias, gate, gate_bias)
        out, weights, update = ops.forward(h, parameters, rows, adapters, gate_fn, backend)
        ctx.save_for_backward(h, weights, update, *parameters, rows, adapters)
        ctx.gate_fn, ctx.backend = gate_fn, backend
        ctx.set_materialize_grads(False)
        if gate_fn == "none":
            ctx.mark_non_differentiable(weights)
        return out, weights, update

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_weights: Tensor | None, grad_update: Tensor | None) -> Any:
        h, weights, update, *parameters, rows, adapters = ctx.saved_tensors
        input_gradient, parameter_gradients = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:6])
        if grad_out is None:
            grad_out = torch.zeros_like(h)
        incoming = (grad_out, grad_weights, grad_update)
        gradients = ops.backward(
            incoming,
            (h, weights, update),
            Parameters(*parameters),
            rows,
            adapters,
            ctx.gate_fn,
            ctx.backend,
            input_gradient,
            parameter_gradients,
        )
        wanted = ctx.needs_input_grad[:6]
        return *(g if needed else None for g, needed in zip(gradients, wanted, strict=True)), None, None, None, None
