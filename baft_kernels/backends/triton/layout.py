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


def room(sets: int, rank: int, dim: int, dtype: torch.dtype, device: torch.device, *, gated: bool) -> TritonPack:
    """Memory for a pack of so many sets, for an h in ``dtype``; with a gate, the projection has 2 r rows."""
    count = 2 * rank if gated else rank
    return TritonPack(
        projection=torch.empty(sets, count, dim, dtype=dtype, device=device),
        basis=torch.empty(sets, rank, dim, dtype=dtype, device=device),
        bias=torch.empty(sets, count, dtype=torch.float32, device=device),
    )


@torch.inference_mode()  # where a pack may have been made, which nothing else may write then
def fill(
    pack: TritonPack,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
) -> None:
    """Pack the parameters of one set ([r, d], [r]), or of N with a leading axis, into the room that there is for them.

    D = A - R is formed in float32 and rounded once: the difference of rounded matrices would cancel, since a source
    stays close to its basis.
    """
    sets, rank, dim = pack.basis.shape
    projection = pack.projection.view(sets, rank, -1, dim)
    bias = pack.bias.view(sets, rank, -1)
    pack.basis.copy_(basis.reshape(sets, rank, dim))
    projection[:, :, 0].copy_((source.float() - basis.float()).reshape(sets, rank, dim))
    bias[:, :, 0].copy_(source_bias.reshape(sets, rank))
    if gate is not None and gate_bias is not None:
        projection[:, :, 1].copy_(gate.reshape(sets, rank, dim))
        bias[:, :, 1].copy_(gate_bias.reshape(sets, rank))


def pack(
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    dtype: torch.dtype,
) -> TritonPack:
    """Room, filled with these parameters."""
    sets, (rank, dim) = basis.shape[:-2].numel(), basis.shape[-2:]
    made = room(sets, rank, dim, dtype, basis.device, gated=gate is not None)
    fill(made, basis, source, source_bias, gate, gate_bias)
    return made
