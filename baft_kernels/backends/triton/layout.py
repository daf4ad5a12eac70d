"""The parameters as the Triton kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TritonPack(NamedTuple):
    """N parameter sets in the dtype of the operands, that of h, except for the biases.

    Attributes:
        projection: [N, P, d] with P = 2 r, rows 2k = D_k and 2k + 1 = G_k, so that one product gives p and z of a basis
            side by side; P = r, rows D_k, without a gate.
        basis: R, [N, r, d].
        bias: [N, P] in float32, b_k and c_k in the places of D_k and G_k.
    """

    projection: Tensor
    basis: Tensor
    bias: Tensor


def pack(
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    dtype: torch.dtype,
) -> TritonPack:
    """Pack the parameters of one set ([r, d], [r]), or of N with a leading axis, for an h in ``dtype``.

    D = A - R is formed in float32 and rounded once: the difference of rounded matrices would cancel, since a source
    stays close to its basis.
    """
    sets, (rank, dim) = basis.shape[:-2].numel(), basis.shape[-2:]
    projection = source.detach().float() - basis.detach().float()
    bias = source_bias.detach().float()
    if gate is not None and gate_bias is not None:
        projection = torch.stack((projection, gate.detach().float()), dim=-2)
        bias = torch.stack((bias, gate_bias.detach().float()), dim=-1)
    return TritonPack(
        projection=projection.reshape(sets, -1, dim).to(dtype).contiguous(),
        basis=basis.detach().reshape(sets, rank, dim).to(dtype).contiguous(),
        bias=bias.reshape(sets, -1).contiguous(),
    )
