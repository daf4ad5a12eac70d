"""The Triton backend's retraction, against the polar factors in float64."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from near_bases import distance_of, near_bases
from torch import Tensor
from triton_here import DEVICE, backend

from baft_kernels import retract_

EPS = torch.finfo(torch.float32).eps
SHAPES = ((1, 1), (1, 130), (3, 20), (12, 96), (16, 384), (33, 130))


def drawn(distance: float) -> list[Tensor]:
    return [basis.to(DEVICE) for basis in near_bases(distance, SHAPES)]


@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.03, 0.3])
def test_near_bases_go_to_their_polar_factors(distance: float) -> None:
    bases = drawn(distance)
    before = [basis.clone() for basis in bases]
    distances = backend.retract(bases)
    for basis, old, found in zip(bases, before, distances.tolist(), strict=True):
        assert found == pytest.approx(distance_of(old), rel=1e-4, abs=1e-6)
        exact = retract_(old.cpu().double())
        # A rounding of 1, for entries below 1; of r numbers, each some roundings off, one and a half root r.
        assert float((basis.cpu() - exact).abs().max()) <= EPS
        assert distance_of(basis) <= 1.5 * EPS * len(basis) ** 0.5


def test_far_ones_are_reported_and_left_alone() -> None:
    bases = drawn(0.1)
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
    first = drawn(0.1)
    second = [basis.clone() for basis in first]
    backend.retract(first)
    backend.retract(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_change_is_a_new_version() -> None:
    basis = torch.nn.Parameter(drawn(0.1)[3])
    with torch.inference_mode():
        untracked = drawn(0.1)[3]
    version = basis._version
    with torch.no_grad():
        backend.retract([basis, untracked])
    assert basis._version > version


def test_what_a_graph_reads_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many other bases are retracted later: the graph knows its table by the address alone."""
    module = sys.modules[backend.retract.__module__]
    monkeypatch.setattr(module, "_in_graphs", {})
    tables = []
    for captured in (True, False):
        basis = torch.eye(3, 3 + captured, device=DEVICE)
        monkeypatch.setattr(module, "_is_captured", lambda device, captured=captured: captured)
        backend.retract([basis])
        tables.append(weakref.ref(module._table(((basis.data_ptr(), *basis.shape),), basis.device)))
    for number in range(64):
        module._known_table(((number, 1, 1),), torch.device(DEVICE))
    gc.collect()
    assert [table() is not None for table in tables] == [True, False]


def test_what_is_refused() -> None:
    assert backend.retract([]).numel() == 0
    for wrong in (torch.eye(3).double(), torch.eye(4)[:, :2], torch.ones(3)):
        with pytest.raises(ValueError, match=r"expected contiguous float32 \[r, d\]"):
            backend.retract([wrong.to(DEVICE)])
    with pytest.raises(NotImplementedError, match="rank: expected at most 64"):
        backend.retract([torch.eye(65, device=DEVICE)])
