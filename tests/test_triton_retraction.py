"""The Triton backend's retraction, against the polar factors in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_here import DEVICE, backend

from baft_kernels import orthonormal_basis, retract_

EPS = torch.finfo(torch.float32).eps
SHAPES = ((1, 1), (1, 130), (3, 20), (12, 96), (16, 384), (33, 130))


def near_bases(distance: float) -> list[Tensor]:
    """One basis of each shape with ||R R^T - I||_F = ``distance``, but for the rounding."""
    bases = []
    for r, d in SHAPES:
        drawn = torch.randn(r, r, dtype=torch.float64)
        error = drawn + drawn.mT
        values, vectors = torch.linalg.eigh(torch.eye(r) + distance / error.norm() * error)
        root = (vectors * values.sqrt()) @ vectors.mT
        bases.append((root @ orthonormal_basis(r, d, dtype=torch.float64)).float().to(DEVICE))
    return bases


def distance_of(basis: Tensor) -> float:
    exact = basis.cpu().double()
    return float((exact @ exact.mT - torch.eye(len(exact), dtype=torch.float64)).norm())


@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.03, 0.3])
def test_near_bases_go_to_their_polar_factors(distance: float) -> None:
    bases = near_bases(distance)
    before = [basis.clone() for basis in bases]
    distances = backend.retract(bases)
    for basis, old, found in zip(bases, before, distances.tolist(), strict=True):
        assert found == pytest.approx(distance_of(old), rel=1e-4, abs=1e-6)
        exact = retract_(old.cpu().double())
        # A rounding of 1, for entries below 1; of r numbers, each some roundings off, one and a half root r.
        assert float((basis.cpu() - exact).abs().max()) <= EPS
        assert distance_of(basis) <= 1.5 * EPS * len(basis) ** 0.5


def test_far_ones_are_reported_and_left_alone() -> None:
    bases = near_bases(0.1)
    bases[1] *= 2
    bases[3][0, 0] = torch.nan
    bases[4][1] = bases[4][0]
    before = [basis.clone() for basis in bases]
    distances = backend.retract(bases)
    near = (distances <= 0.5).tolist()
    assert near == [True, False, True, False, False, True]
    for basis, old, moved in zip(bases, before, near, strict=True):
        assert torch.equal(basis.nan_to_num(), old.nan_to_num()) != moved


def test_results_repeat_bit_for_bit() -> None:
    first = near_bases(0.1)
    second = [basis.clone() for basis in first]
    backend.retract(first)
    backend.retract(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_change_is_a_new_version() -> None:
    basis = torch.nn.Parameter(near_bases(0.1)[3])
    with torch.inference_mode():
        untracked = near_bases(0.1)[3]
    version = basis._version
    with torch.no_grad():
        backend.retract([basis, untracked])
    assert basis._version > version


def test_what_is_refused() -> None:
    assert backend.retract([]).numel() == 0
    for wrong in (torch.eye(3).double(), torch.eye(4)[:, :2], torch.ones(3)):
        with pytest.raises(ValueError, match=r"expected contiguous float32 \[r, d\]"):
            backend.retract([wrong.to(DEVICE)])
    with pytest.raises(NotImplementedError, match="rank: expected at most 64"):
        backend.retract([torch.eye(65, device=DEVICE)])
