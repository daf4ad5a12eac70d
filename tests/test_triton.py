"""The Triton backend behind the public functions: every form of call reaches the right kernel with the right arguments.

What the kernels compute is the subject of test_triton_forward, _backward, _grouped and _retraction.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_grouped
import torch
from op_calls import Call, draw_call
from tolerance import assert_accurate, outputs_and_gradients
from torch import Tensor
from triton_here import DEVICE, backend

from baft_kernels import (
    BaftIntervention,
    BaftOutput,
    baft,
    baft_,
    grouped_baft,
    orthonormal_basis,
    orthonormality_error,
    repack,
    retract_,
    retract_after_step,
    retract_all_,
)
from baft_kernels.backends import resolve_backend
from baft_kernels.backends.triton import backend as triton_backend
from baft_kernels.packing import Parameters, packed
from baft_kernels.reference import GATE_FNS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = {
    "all": None,
    "mask": torch.tensor([False, True, False, False, True]).repeat(2, 1),
    "the same of each": torch.tensor([4, 1]),
    "its own of each": torch.tensor([[1, 4], [4, 1]]),
}
every_choice = pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreted_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def triton(*arguments: Any, **options: Any) -> BaftOutput:
    """The arguments of ``baft_reference``, computed where Triton is, with the results where h is."""
    call = Call(*arguments)
    there = call.to(DEVICE)
    options = {"gate_fn": call.gate_fn, "positions": there.rows, "backend": "triton"} | options
    return BaftOutput(*(value.to(call.h.device) for value in baft(*there[:6], return_aux=True, **options)))


# -- accuracy --


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_fn", GATE_FNS)
def test_it_is_accurate(gate_fn: str, dtype: torch.dtype) -> None:
    assert_accurate(triton, *(draw_call((2, 9), 40, 5, gate_fn=gate_fn, dtype=dtype, seed=seed) for seed in range(6)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rank_without_kernels(dtype: torch.dtype) -> None:
    rank = backend.MAX_RANK + 1
    rows = torch.tensor([True, False, True])
    assert_accurate(triton, draw_call((3,), rank, rank, dtype=dtype, rows=rows))
    call = test_grouped.draw((3, 2), rank, rank, 2)
    ids = torch.tensor([1, 0, 1])
    actual = test_grouped.with_gradients(call, lambda given: test_grouped.grouped(given, ids, "triton"))
    expected = test_grouped.with_gradients(call, lambda given: test_grouped.grouped(given, ids, "reference"))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("gate_fn", GATE_FNS)
def test_a_set_for_each_sequence(gate_fn: str, some: bool) -> None:
    test_grouped.test_it_is_accurate(gate_fn, torch.bfloat16, some, "triton")


# -- rows and layouts --


@every_choice
def test_positions(positions: Tensor | None) -> None:
    call = draw_call((2, 5), 40, 3)
    actual = outputs_and_gradients(triton, call._replace(rows=positions))
    rows = None if positions is None else POSITIONS["mask"]
    plain = call._replace(rows=positions)
    expected = outputs_and_gradients(lambda *given: triton(*given, backend="reference"), plain)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])
    if rows is not None:
        assert torch.equal(actual["out"][~rows], call.h[~rows])


@every_choice
def test_in_place(positions: Tensor | None) -> None:
    call = draw_call((2, 5), 40, 3).to(DEVICE)
    positions = positions if positions is None else positions.to(DEVICE)
    expected = baft(*call[:6], positions=positions, backend="triton")
    layouts = (call.h.clone(), torch.randn(2, 5, 50)[..., :40], torch.randn(5, 2, 40).transpose(0, 1))
    for layout in (*layouts, torch.randn(2, 40, 5).mT):
        h = layout.to(DEVICE).copy_(call.h)
        assert baft_(h, *call[1:6], positions=positions, backend="triton") is h
        torch.testing.assert_close(h, expected)


def test_permuted_and_sliced_inputs() -> None:
    call = draw_call((5, 40), 40, 3)
    leaves = {name: value.requires_grad_() for name, value in call.floats().items()}
    for name in ("mT", "sliced"):
        h = call.h.mT if name == "mT" else torch.randn(5, 40, 90)[..., 7:87:2]
        gradient = torch.randn(40, 5, 40).transpose(0, 1) if name == "mT" else torch.randn(1, 40, 1).expand(5, 40, 40)
        found = []
        for served in ("triton", "reference"):
            out = triton(*call._replace(**leaves)._replace(h=h), backend=served).out
            found.append([out, *torch.autograd.grad(out, list(leaves.values())[1:], gradient)])
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # sums over 200 rows


# -- what calls it --


def test_a_module_trains_on_it() -> None:
    losses = []
    for served in ("triton", "reference"):
        layer = BaftIntervention(40, 4, backend=served, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        h, target = (torch.randn(6, 40, generator=torch.Generator().manual_seed(s)).to(DEVICE) for s in (1, 2))
        of_steps = []
        for _ in range(4):
            loss = (layer(h) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            layer.retract_()
            of_steps.append(loss.item())
        losses.append(of_steps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_it_compiles_whole_and_once_for_every_length() -> None:
    """What chooses the backend can be traced: nothing of it imports."""
    torch._dynamo.reset()
    layer = BaftIntervention(40, 4, backend="triton").to(DEVICE)
    compiled = torch.compile(lambda h: layer.edit(h).out, backend="eager", fullgraph=True, dynamic=True)
    for length in (5, 6, 12):
        h = torch.randn(2, length, 40, device=DEVICE)
        assert torch.equal(compiled(h), layer.edit(h).out)


def test_packs_are_renewed_where_they_lie() -> None:
    """So a graph that reads one sees what ``repack`` wrote; made in inference mode, they can be written outside."""
    call = draw_call((4,), 40, 3, dtype=torch.bfloat16).to(DEVICE)
    for changes in ({}, {"gate": None, "gate_bias": None, "gate_fn": "none"}):
        given = call._replace(**changes)
        parameters = Parameters(*given[1:6])
        with torch.inference_mode():
            triton(*given)
        known = packed(triton_backend._room, parameters, torch.bfloat16, triton_backend._fill)
        given.source.add_(0.1)
        repack([given.basis])
        expected = backend.pack(*parameters, torch.bfloat16)
        assert all(map(torch.equal, known, expected))
        assert packed(triton_backend._room, parameters, torch.bfloat16, triton_backend._fill) is known


def test_auto_waits_for_a_run_on_a_gpu() -> None:
    from baft_kernels.backends import FUSED

    served = resolve_backend("auto", torch.empty(1, 8, device=DEVICE))
    assert served == ("triton" if DEVICE == "cuda" and FUSED["triton"].unproven is None else served)
    assert served != "triton" or FUSED["triton"].unproven is None


@pytest.mark.parametrize(
    ("h", "says"),
    [
        (
            torch.ones(1, 8, dtype=torch.float64, device=DEVICE),
            "serves float32, bfloat16 and float16, and h is float64",
        ),
        (torch.ones(1, 8, device="meta"), "serves tensors on an NVIDIA GPU, and h is on meta"),
    ],
)
def test_what_it_cannot_serve(h: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=f"backend: expected one that serves this call, got 'triton': it {says}"):
        resolve_backend("triton", h, 1)


def test_adapters_that_do_not_divide_the_batch_are_refused() -> None:
    call = test_grouped.draw((3, 2), 20, 3, 2).to(DEVICE)
    with pytest.raises(ValueError, match="adapter_ids: expected"):
        grouped_baft(*call[:6], torch.tensor([0, 1], device=DEVICE), backend="triton")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_bases_near_and_far_are_retracted(backend: str) -> None:
    bases = [orthonormal_basis(r, 40).to(DEVICE) for r in (3, 5, 8)]
    for basis, step in zip(bases, (0.01, 0.3, 0.02), strict=True):
        basis += step * torch.randn_like(basis)
    expected = [retract_(basis.clone()) for basis in bases]
    retract_all_(bases, backend=backend)
    for basis, wanted in zip(bases, expected, strict=True):
        torch.testing.assert_close(basis, wanted, rtol=0, atol=2e-7)
    with pytest.raises(ValueError, match="expected finite entries"):
        retract_all_([bases[0], bases[1].fill_(torch.nan)], backend=backend)


def test_bases_without_a_kernel_are_retracted_by_torch() -> None:
    for bases in ([torch.eye(65, device=DEVICE) * 1.01], [torch.eye(8, device=DEVICE)[:, :4].mT * 1.01]):
        retract_all_(bases, backend="triton")
        assert orthonormality_error(bases[0]) < 1e-6
    retract_all_([], backend="triton")


def test_an_optimiser_retracts_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    bases = [torch.nn.Parameter(orthonormal_basis(3, 20).to(DEVICE)) for _ in range(4)]
    launches: list[int] = []
    retract = backend.retract
    monkeypatch.setattr(backend, "retract", lambda given: (launches.append(len(given)), retract(given))[1])
    optimizer = torch.optim.SGD(bases, lr=0.1)
    retract_after_step(optimizer, bases, backend="triton")
    sum(basis.square().sum() + basis.sum() for basis in bases).backward()
    optimizer.step()
    assert launches == [4]
    assert max(orthonormality_error(basis) for basis in bases) < 5e-7
