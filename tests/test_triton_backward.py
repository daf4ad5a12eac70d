"""The Triton backend's backward pass: every gradient against the reference in float64, in every form of launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import Call, draw_call
from test_reference import BITS, random_bits
from test_triton_forward import LAUNCHES, ROWS, every_gate, every_launch
from tolerance import assert_accurate
from torch import Tensor
from triton_here import DEVICE, Triton, backend, poisoned

from baft_kernels.backends.triton.launch import ColumnsLaunch, RowsLaunch
from baft_kernels.reference import GATE_FNS, baft_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TWO_PARTS = ColumnsLaunch(rows=16, columns=32, warps=4, stages=2, splits=2)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def gradients(call: Call, *, grad_out: Tensor | None = None, seed: int = 1, **options: Any) -> list[Tensor | None]:
    """The backend's own function, on random incoming gradients."""
    generator = torch.Generator().manual_seed(seed)
    h, low = call.h.to(DEVICE), (call.h.shape[0], call.basis.shape[0])
    packed = backend.pack(*(value if value is None else value.to(DEVICE) for value in call[1:6]), h.dtype)
    incoming = [torch.randn(shape, generator=generator).to(DEVICE) for shape in (h.shape, low, low)]
    grad_out = incoming[0].to(h.dtype) if grad_out is None else grad_out
    rows = {"rows": options.pop("rows", None), "gate_fn": call.gate_fn}
    with poisoned():
        _, weights, update = backend.forward(h, packed, **rows)
        return list(backend.backward(grad_out, *incoming[1:], h, weights, update, packed, **rows, **options))


# -- accuracy --


@every_launch
@every_gate
def test_gradients(launch: RowsLaunch, gate_fn: str) -> None:
    for dtype in DTYPES:
        assert_accurate(
            Triton(by_rows=launch, by_columns=TWO_PARTS), draw_call((17,), 48, 8, gate_fn=gate_fn, dtype=dtype)
        )


@pytest.mark.parametrize(("gate_fn", "dtype"), list(zip(GATE_FNS, DTYPES, strict=True)))
@pytest.mark.parametrize(("length", "d", "r"), [(1, 1, 1), (2, 20, 3), (63, 96, 16), (17, 130, 33)])
def test_ragged_sizes(length: int, d: int, r: int, gate_fn: str, dtype: torch.dtype) -> None:
    # With the launches that the backend chooses.
    assert_accurate(
        Triton(),
        *(draw_call((length,), d, r, gate_fn=gate_fn, dtype=dtype, seed=s) for s in range(2 if length < 9 else 1)),
    )


@every_launch
@every_gate
def test_gradients_of_the_output_alone(launch: RowsLaunch, gate_fn: str) -> None:
    call = draw_call((17,), 48, 3, gate_fn=gate_fn)
    g = torch.randn(17, 48, dtype=torch.float64)
    found = []
    for function, arguments in ((Triton(by_rows=launch), call), (baft_reference, call.double())):
        leaves = {name: tensor.requires_grad_() for name, tensor in arguments.floats().items()}
        out = function(*arguments._replace(**leaves)).out
        found.append(torch.autograd.grad(out, list(leaves.values()), g.to(out.dtype)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected.float())


def test_what_is_not_asked_for() -> None:
    call = draw_call((17,), 20, 3)
    everything = gradients(call)
    for launch in LAUNCHES.values():
        assert torch.equal(everything[0], gradients(call, parameter_gradients=False)[0])
        assert gradients(call, by_rows=launch, parameter_gradients=False)[1:] == [None] * 5
        of_h, *others = gradients(call, by_rows=launch, input_gradient=False)
        assert of_h is None
        for actual, expected in zip(others, everything[1:], strict=True):
            torch.testing.assert_close(actual, expected)
    assert gradients(call._replace(gate=None, gate_bias=None, gate_fn="none"))[4:] == [None, None]


def test_no_rows() -> None:
    of_h, *others = gradients(draw_call((0,), 20, 3))
    assert of_h.shape == (0, 20)
    assert [list(gradient.shape) for gradient in others] == [[1, 3, 20], [1, 3, 20], [1, 3], [1, 3, 20], [1, 3]]
    assert not any(gradient.any() for gradient in others)


# -- chosen rows --


@every_launch
@pytest.mark.parametrize("listed", [False, True], ids=["mask", "list"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_rows_reach_no_parameter(launch: RowsLaunch, listed: bool, dtype: torch.dtype) -> None:
    call = draw_call((37,), 48, 3, dtype=dtype)
    others = ~ROWS[:, None]
    garbage = random_bits((37, 48), dtype)
    g = torch.randn(37, 48).to(dtype)
    rows = (ROWS.nonzero().flatten() if listed else ROWS).to(DEVICE)
    options = {"rows": rows, "by_rows": launch, "by_columns": TWO_PARTS}
    clean = gradients(call, grad_out=g.to(DEVICE), **options)
    dirty_call = call._replace(h=torch.where(others, garbage, call.h))
    dirty_g = torch.where(others, garbage, g)
    dirty = gradients(dirty_call, grad_out=dirty_g.to(DEVICE), **options)
    for actual, expected in zip(dirty[1:], clean[1:], strict=True):
        assert torch.equal(actual, expected)
    of_h = dirty[0].cpu()
    assert torch.equal(of_h[~ROWS].view(BITS[dtype]), dirty_g[~ROWS].view(BITS[dtype]))
    assert torch.equal(of_h[ROWS], clean[0].cpu()[ROWS])


@pytest.mark.parametrize("listed", [False, True], ids=["mask", "list"])
@every_gate
def test_gradients_of_chosen_rows(listed: bool, gate_fn: str) -> None:
    calls = [draw_call((37,), 20, 3, gate_fn=gate_fn, dtype=torch.bfloat16, rows=ROWS, seed=seed) for seed in range(2)]
    assert_accurate(Triton(listed=listed), *calls)


# -- promises --


def test_any_row_stride() -> None:
    call = draw_call((17,), 96, 3)
    g = torch.randn(17, 96, device=DEVICE)
    wide = torch.full((17, 100), torch.nan, device=DEVICE)
    wide[:, 2:98] = g
    constant = torch.randn(1, 96, device=DEVICE).expand(17, 96)
    for strided, contiguous in ((wide[:, 2:98], g), (constant, constant.contiguous())):
        pairs = zip(gradients(call, grad_out=strided), gradients(call, grad_out=contiguous), strict=True)
        assert all(torch.equal(actual, expected) for actual, expected in pairs)


@every_launch
def test_results_repeat_bit_for_bit(launch: RowsLaunch) -> None:
    call = draw_call((37,), 48, 8, dtype=torch.bfloat16)
    options = {"by_rows": launch, "by_columns": TWO_PARTS}
    for first, second in zip(gradients(call, **options), gradients(call, **options), strict=True):
        assert torch.equal(first, second)
