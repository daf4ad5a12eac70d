"""Bases at a known distance from orthonormal ones, for the tests of retraction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baft_kernels import orthonormal_basis

__all__ = ["distance_of", "near_bases"]


# The last two are more than a CTA with little memory can hold, in whole fours of columns and not.
SHAPES = ((1, 1), (1, 130), (3, 20), (12, 96), (16, 384), (33, 130), (64, 256), (64, 131))


def near_bases(distance: float, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """One float32 basis of each shape (r, d) with ||R R^T - I||_F = ``distance``, but for the rounding."""
    bases = []
    for r, d in shapes:
        drawn = torch.randn(r, r, dtype=torch.float64)
        error = drawn + drawn.mT
        values, vectors = torch.linalg.eigh(torch.eye(r) + distance / error.norm() * error)
        root = (vectors * values.sqrt()) @ vectors.mT
        bases.append((root @ orthonormal_basis(r, d, dtype=torch.float64)).float())
    return bases


def distance_of(basis: Tensor) -> float:
    """||R R^T - I||_F, in float64."""
    exact = basis.cpu().double()
    return float((exact @ exact.mT - torch.eye(len(exact), dtype=torch.float64)).norm())
