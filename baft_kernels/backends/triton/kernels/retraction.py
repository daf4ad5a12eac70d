"""Retraction: many bases moved to their polar factors (R R^T)^(-1/2) R in one launch, as ``baft_kernels.stiefel`` says.

One program for a basis. It sweeps over R three times, mostly in the L2 cache: for the Gram matrix; for the Gram matrix
of the first result, which shows what float32 lost; and to write the result, polished with it.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from baft_kernels.backends.triton.kernels.tiles import matmul
from baft_kernels.backends.triton.launch import MAX_RETRACTION_RANK, padded_rank, retraction_launch
from baft_kernels.stiefel import ITERATIONS, NEAR


def retract(bases: list[Tensor]) -> Tensor:
    """Move each of ``bases``, contiguous float32 [r, d] on one device, to its polar factor if it is near to it.

    Returns:
        ||R R^T - I||_F of each before the step, float32 [L]. Where it isn't at most ``NEAR`` the basis is as it was:
        the iteration needn't converge there.
    """
    if not bases:
        return torch.empty(0)
    for basis in bases:
        if basis.dtype != torch.float32 or not basis.is_contiguous() or basis.ndim != 2:
            raise ValueError(f"bases: expected contiguous float32 [r, d], got {basis.dtype} {list(basis.shape)}")
        if basis.device != bases[0].device:
            raise ValueError(f"bases: expected one device, got {bases[0].device} and {basis.device}")
    device = bases[0].device
    distances = torch.empty(len(bases), dtype=torch.float32, device=device)
    table = _table(tuple((basis.data_ptr(), *basis.shape) for basis in bases), device)
    rank = padded_rank(max(basis.shape[0] for basis in bases), MAX_RETRACTION_RANK)
    launch = retraction_launch(rank)
    with torch.cuda.device_of(distances):
        _retract_kernel[(len(bases),)](
            table, distances, R_PAD=rank, BD=launch.columns, NEAR=NEAR, ITERATIONS=ITERATIONS, num_warps=launch.warps
        )
    # Autograd, and what is packed for the kernels, know a change by the version, which a kernel's writes don't raise.
    for basis in bases:
        if not basis.is_inference():
            torch.autograd.graph.increment_version(basis)
    return distances


Places = tuple[tuple[int, int, int], ...]  # address, r and d of each basis

# What captured graphs read, kept for good: nobody says when a graph is gone.
_in_graphs: dict[Places, Tensor] = {}


def _table(bases: Places, device: torch.device) -> Tensor:
    """``bases`` on the device, int64 [L, 3]."""
    table = _known_table(bases, device)
    if _is_captured(device):
        _in_graphs[bases] = table
    return table


@functools.lru_cache(maxsize=64)
def _known_table(bases: Places, device: torch.device) -> Tensor:
    """Kept for a while, since a graph's capture allows no copy from the host."""
    return torch.tensor(bases, dtype=torch.int64).to(device)


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@triton.jit
def _retract_kernel(
    p_table, p_distances, R_PAD: tl.constexpr, BD: tl.constexpr, NEAR: tl.constexpr, ITERATIONS: tl.constexpr
):
    """One basis, padded with zeros to [R_PAD, BD] blocks."""
    i = tl.program_id(0)
    p_basis = tl.load(p_table + 3 * i).to(tl.pointer_type(tl.float32))
    rank = tl.load(p_table + 3 * i + 1)
    dim = tl.load(p_table + 3 * i + 2)
    o_r = tl.arange(0, R_PAD)
    b_eye = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0)
    b_zero = tl.zeros([R_PAD, R_PAD], tl.float32)
    b_wanted = tl.where((o_r < rank)[:, None], b_eye, 0.0).to(tl.float64)

    # Of each block in float32; across blocks in float64, since the sums end near 1 and their distance to it is wanted.
    b_gram = tl.zeros([R_PAD, R_PAD], tl.float64)
    for i_d in range(0, dim, BD):
        b_r = load_block(p_basis, i_d, rank, dim, R_PAD, BD)
        b_gram += matmul(b_r, b_r.T, b_zero).to(tl.float64)
    b_error = (b_gram - b_wanted).to(tl.float32)
    distance = tl.sqrt(tl.sum(tl.sum(b_error * b_error, 1), 0))
    tl.store(p_distances + i, distance)

    # NaN compares as false.
    if distance <= NEAR:
        # Coupled Newton-Schulz iteration: b_root goes to the root of the Gram matrix, b_inverse to that root's inverse.
        b_root = b_eye + b_error
        b_inverse = b_eye
        for _ in range(ITERATIONS):
            b_step = 1.5 * b_eye - 0.5 * matmul(b_inverse, b_root, b_zero)
            b_root = matmul(b_root, b_step, b_zero)
            b_inverse = matmul(b_step, b_inverse, b_zero)

        b_gram = tl.zeros([R_PAD, R_PAD], tl.float64)
        for i_d in range(0, dim, BD):
            b_r = load_block(p_basis, i_d, rank, dim, R_PAD, BD)
            b_r = matmul(b_inverse, b_r, tl.zeros([R_PAD, BD], tl.float32))
            b_gram += matmul(b_r, b_r.T, b_zero).to(tl.float64)
        # (1.5 I - 0.5 S) R as R + 0.5 (I - S) R: of the small part, the rounding doesn't matter.
        b_polish = (0.5 * (b_wanted - b_gram)).to(tl.float32)
        for i_d in range(0, dim, BD):
            b_r = load_block(p_basis, i_d, rank, dim, R_PAD, BD)
            b_r = matmul(b_inverse, b_r, tl.zeros([R_PAD, BD], tl.float32))
            b_r += matmul(b_polish, b_r, tl.zeros([R_PAD, BD], tl.float32))
            o_d = i_d + tl.arange(0, BD)
            tl.store(
                p_basis + o_r[:, None] * dim + o_d[None, :], b_r, mask=(o_r < rank)[:, None] & (o_d < dim)[None, :]
            )


@triton.jit
def load_block(p_basis, i_d, rank, dim, R_PAD: tl.constexpr, BD: tl.constexpr):
    """Columns ``i_d : i_d + BD`` of a basis, padded with zeros to [R_PAD, BD]."""
    o_r = tl.arange(0, R_PAD)
    o_d = i_d + tl.arange(0, BD)
    # [R_PAD, BD]
    return tl.load(
        p_basis + o_r[:, None] * dim + o_d[None, :], mask=(o_r < rank)[:, None] & (o_d < dim)[None, :], other=0.0
    )
