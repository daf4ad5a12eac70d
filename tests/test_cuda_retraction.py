"""The CUDA retraction on the emulated GPU: polar factors, and the same in every order of events."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence

import pytest
import torch
from near_bases import SHAPES, distance_of, near_bases
from torch import Tensor

from baft_kernels import retract_
from baft_kernels.stiefel import ITERATIONS, NEAR

if shutil.which("g++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

import cuda_emulation as emulation  # after it is known that it can be built

EPS = torch.finfo(torch.float32).eps
# With little memory, this one comes in chunks, as do the last two of SHAPES.
LONG = ((12, 4096),)
CLUSTERS = {"8": 0, "4": 1, "1": 2, "2-in-chunks": 3}
every_cluster = pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)


class Basis(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("rank", ctypes.c_int), ("width", ctypes.c_int)]


def retract(bases: Sequence[Tensor], cluster: int = 0, *, seed: int = 0) -> Tensor:
    """Distances of ``bases``, which are moved, in one launch."""
    table = (Basis * len(bases))(*(Basis(basis.data_ptr(), *basis.shape) for basis in bases))
    distances = torch.full((len(bases),), torch.nan)
    emulation.run(
        emulation.library("retract").emulate_retract,
        table, len(bases), ctypes.c_void_p(distances.data_ptr()), ITERATIONS, ctypes.c_float(NEAR),
        cluster, ctypes.c_uint64(seed),
    )  # fmt: skip
    return distances


def copies(bases: Sequence[Tensor]) -> list[Tensor]:
    return [basis.clone() for basis in bases]


# -- polar factors --


@every_cluster
@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.03, 0.3])
def test_near_bases_go_to_their_polar_factors(distance: float, cluster: int) -> None:
    bases = near_bases(distance, SHAPES + LONG)
    before = copies(bases)
    distances = retract(bases, cluster)
    for basis, old, found in zip(bases, before, distances.tolist(), strict=True):
        assert found == pytest.approx(distance_of(old), rel=1e-4, abs=1e-6)
        exact = retract_(old.double())
        # Half a rounding of 1, for entries below 1; and for each of r rows, half a rounding of its length.
        assert float((basis - exact).abs().max()) <= 0.5 * EPS
        assert distance_of(basis) <= 0.5 * EPS * len(basis) ** 0.5


def test_far_ones_are_reported_and_left_alone() -> None:
    bases = near_bases(0.1, SHAPES)
    bases[1] *= 2
    bases[3][0, 0] = torch.nan
    bases[4][1] = bases[4][0]
    bases[5][7, 3] = torch.inf
    before = copies(bases)
    near = (retract(bases) <= NEAR).tolist()
    assert near == [True, False, True, False, False, False, True, True]
    for basis, old, moved in zip(bases, before, near, strict=True):
        assert torch.equal(basis.view(torch.int32), old.view(torch.int32)) != moved


@every_cluster
def test_nothing_beside_a_basis_is_written(cluster: int) -> None:
    for offset, shape in ((0, (3, 20)), (1, (3, 20)), (2, (5, 33)), (3, (12, 131)), (1, (64, 131))):
        (basis,) = near_bases(0.1, [shape])
        around = torch.full((basis.numel() + 16,), 7.0)
        inner = around[4 + offset :][: basis.numel()].view(shape).copy_(basis)
        retract([basis], cluster)
        retract([inner], cluster)
        assert torch.equal(inner, basis)
        inner.fill_(7.0)
        assert around.eq(7.0).all()


# -- orders of events --


@every_cluster
def test_every_order_of_events_gives_the_same_bits(cluster: int) -> None:
    bases = near_bases(0.1, SHAPES)
    first = copies(bases)
    distances = retract(first, cluster, seed=1)
    for seed in range(2, 6):
        again = copies(bases)
        assert torch.equal(retract(again, cluster, seed=seed), distances)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_a_basis_does_not_depend_on_its_company() -> None:
    bases = near_bases(0.1, SHAPES)
    together = copies(bases)
    distances = retract(together)
    for i, basis in enumerate(bases):
        alone = basis.clone()
        assert torch.equal(retract([alone]), distances[i : i + 1])
        assert torch.equal(alone, together[i])
