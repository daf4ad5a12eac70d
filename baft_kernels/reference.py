"""The BaFT intervention and its gradients in plain torch: the oracle that every backend is held against.

Formulas: Liu et al., "Unlocking Efficient, Scalable, and Continual Knowledge Editing with Basis-Level Representation
Fine-Tuning", arXiv 2503.00306. With ``gate_fn="none"`` it is LoReFT (Wu et al., arXiv 2404.03592).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "GATE_FNS",
    "BaftGradients",
    "BaftOutput",
    "GateFn",
    "accumulation_dtype",
    "baft_backward_reference",
    "baft_reference",
]

GateFn = Literal["sigmoid", "softmax", "none"]
GATE_FNS: tuple[str, ...] = get_args(GateFn)


class BaftOutput(NamedTuple):
    """``out`` [..., d] in h's dtype; ``weights`` w and ``update`` u, [..., r] in the accumulation dtype."""

    out: Tensor
    weights: Tensor
    update: Tensor


def accumulation_dtype(h: Tensor) -> torch.dtype:
    """float32 for float32, bfloat16 and float16; float64 for float64 (gradcheck)."""
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def baft_reference(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_fn: str,
    rows: Tensor | None = None,
) -> BaftOutput:
    """``out = h + R^T (w * p)`` with ``p = A h + b - R h`` and the gate ``w``, on the chosen rows.

    Args:
        h: [..., d] hidden vectors.
        basis: R, [r, d], orthonormal rows.
        source, source_bias: A [r, d] and b [r].
        gate, gate_bias: G [r, d] and c [r]; None for ``gate_fn="none"``.
        gate_fn: ``"sigmoid"``, ``"softmax"`` (over the r bases) or ``"none"`` (w = 1).
        rows: boolean [...], the rows to edit, or None for all. Other rows keep their bits, have w = u = 0, and give the
            parameters no gradient, even if they hold NaN.

    Every parameter may have a leading axis B: then h is [B, S, d], and each sequence has parameters of its own.
    """
    dtype = accumulation_dtype(h)
    # Autocast would run the products in half precision, whatever the dtypes of their operands.
    with torch.autocast(h.device.type, enabled=False):
        basis, source, source_bias = basis.to(dtype), source.to(dtype), source_bias.to(dtype)
        # Zeros stand in for the other rows, since a NaN there would reach the parameters' gradients as 0 * NaN.
        x = (h if rows is None else torch.where(rows.unsqueeze(-1), h, 0)).to(dtype)
        # (A - R) h, not A h - R h: a trained source is close to the basis, and the difference of products would cancel.
        p = _linear(x, source - basis, source_bias)
        if gate_fn == "none":
            w = torch.ones_like(p)
        else:
            assert gate is not None and gate_bias is not None
            z = _linear(x, gate.to(dtype), gate_bias.to(dtype))
            w = torch.sigmoid(z) if gate_fn == "sigmoid" else torch.softmax(z, dim=-1)
        u = w * p
        out = (x + u @ basis).to(h.dtype)
    if rows is not None:
        chosen = rows.unsqueeze(-1)
        w, u, out = torch.where(chosen, w, 0), torch.where(chosen, u, 0), torch.where(chosen, out, h)
    return BaftOutput(out, w, u)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x weight^T + bias``, for one weight [r, d] or for one of each sequence [B, r, d]."""
    return F.linear(x, weight, bias) if weight.ndim == 2 else x @ weight.mT + bias.unsqueeze(-2)


class BaftGradients(NamedTuple):
    """The gradients of h and of the parameters, in the accumulation dtype; those of G and c are None without a gate."""

    h: Tensor
    basis: Tensor
    source: Tensor
    source_bias: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None


def baft_backward_reference(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    grad_update: Tensor | None,
    h: Tensor,
    weights: Tensor,
    update: Tensor,
    basis: Tensor,
    source: Tensor,
    gate: Tensor | None,
    gate_fn: str,
    rows: Tensor | None = None,
) -> BaftGradients:
    """The gradients from h, w and u alone: neither p nor z has to be kept or computed again.

    With g, gw and gu the gradients of out, w and u, and s = u * du + w * gw:

        du = R g + gu      dp = w * du      dz = (1 - w) * s  (sigmoid),  s - w sum(s)  (softmax)
        dh = g + (A - R)^T dp + G^T dz
        dA = dp^T h        dR = u^T g - dA        dG = dz^T h        db = sum dp        dc = sum dz

    Args:
        grad_out: [..., S, d]; grad_weights and grad_update: [..., S, r] or None.
        h: [..., S, d]; weights and update: what ``baft_reference`` returned for it.
        basis, source, gate, gate_fn, rows: as they were there.

    Returns:
        Gradients summed over the rows; with parameters for each sequence [B, r, d], those of each sequence.
    """
    dtype = accumulation_dtype(h)
    with torch.autocast(h.device.type, enabled=False):
        g, x = grad_out.to(dtype), h.to(dtype)
        if rows is not None:
            g_chosen, x = torch.where(rows.unsqueeze(-1), g, 0), torch.where(rows.unsqueeze(-1), x, 0)
        else:
            g_chosen = g
        basis, source = basis.to(dtype), source.to(dtype)
        w, u = weights.to(dtype), update.to(dtype)
        du = g_chosen @ basis.mT
        if grad_update is not None:
            du = du + grad_update
        dp = w * du
        dh = g + dp @ (source - basis)
        d_source = dp.mT @ x
        d_basis = u.mT @ g_chosen - d_source
        if gate is None:
            return BaftGradients(dh, d_basis, d_source, dp.sum(-2), None, None)
        s = u * du
        if grad_weights is not None:
            s = s + w * grad_weights
        dz = (1 - w) * s if gate_fn == "sigmoid" else s - w * s.sum(-1, keepdim=True)
        return BaftGradients(dh + dz @ gate.to(dtype), d_basis, d_source, dp.sum(-2), dz.mT @ x, dz.sum(-2))
