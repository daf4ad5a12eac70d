"""The Triton backend's forward pass: against the reference in float64, in every form of launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import Call, draw_call
from test_reference import BITS, random_bits
from tolerance import assert_within_rule, plain_torch
from torch import Tensor
from triton_here import DEVICE, Triton, backend, poisoned

from baft_kernels.backends.triton.launch import RowsLaunch
from baft_kernels.reference import GATE_FNS, baft_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAUNCHES = {
    "two sweeps": RowsLaunch(rows=16, columns=32, warps=4, stages=2),
    "on chip": RowsLaunch(rows=16, columns=32, warps=4, on_chip=True),
    "split": RowsLaunch(rows=16, columns=32, warps=4, splits=2),
}
# Rows that aren't edited may be NaN; numpy, which the interpreter computes with, remarks on that.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
every_launch = pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
every_gate = pytest.mark.parametrize("gate_fn", GATE_FNS)


def assert_outputs_accurate(call: Call, **options: Any) -> None:
    """Hold out, w and u to the tolerance rule."""
    actual = Triton(**options)(*call)
    plain, exact = plain_torch(*call), baft_reference(*call.double())
    for name in actual._fields:
        assert_within_rule(name, *(getattr(outputs, name) for outputs in (actual, plain, exact)))


def forward(call: Call, h: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The backend's own function on an h that is where the kernels run."""
    parameters = (value if value is None else value.to(DEVICE) for value in call[1:6])
    with poisoned():
        return backend.forward(h, backend.pack(*parameters, h.dtype), gate_fn=call.gate_fn, **options)


# -- accuracy --


@every_launch
@every_gate
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs(launch: RowsLaunch, gate_fn: str, dtype: torch.dtype) -> None:
    assert_outputs_accurate(draw_call((17,), 96, 8, gate_fn=gate_fn, dtype=dtype), by_rows=launch)


@pytest.mark.parametrize(("gate_fn", "dtype"), list(zip(GATE_FNS, DTYPES, strict=True)))
@pytest.mark.parametrize(("length", "d", "r"), [(1, 1, 1), (2, 20, 3), (63, 130, 16), (17, 130, 33), (1, 130, 3)])
def test_ragged_sizes(length: int, d: int, r: int, gate_fn: str, dtype: torch.dtype) -> None:
    # With the launch that the backend chooses.
    assert_outputs_accurate(draw_call((length,), d, r, gate_fn=gate_fn, dtype=dtype))


def test_a_source_close_to_the_basis() -> None:
    assert_outputs_accurate(draw_call((17,), 96, 8, dtype=torch.bfloat16, source_distance=1e-3))


def test_no_rows() -> None:
    call = draw_call((0,), 20, 3)
    for adapters in (None, torch.empty(0, dtype=torch.int64)):
        outputs = forward(call, call.h.to(DEVICE), adapters=adapters)
        assert [list(output.shape) for output in outputs] == [[0, 20], [0, 3], [0, 3]]


@every_launch
def test_rows_far_apart_in_memory(launch: RowsLaunch) -> None:
    call = draw_call((17,), 96, 8)
    wide = torch.full((17, 100), torch.nan, device=DEVICE)
    wide[:, 2:98] = call.h
    expected = forward(call, call.h.to(DEVICE), launch=launch)
    for actual, wanted in zip(forward(call, wide[:, 2:98], launch=launch), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_coefficients_beyond_float16_make_no_nan() -> None:
    call = draw_call((3,), 20, 1, gate_fn="none", dtype=torch.float16)
    call = call._replace(basis=torch.eye(1, 20), source=torch.eye(1, 20), source_bias=torch.tensor([1e6]))
    out, _, update = forward(call, call.h.to(DEVICE))
    assert update.cpu().eq(1e6).all()
    assert torch.equal(out[:, 1:].cpu(), call.h[:, 1:])


# -- chosen rows --

ROWS = torch.zeros(37, dtype=torch.bool)
ROWS[[0, 3, 4, 15, 17, 36]] = True


@every_launch
@pytest.mark.parametrize("listed", [False, True], ids=["mask", "list"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_rows_keep_their_bits(launch: RowsLaunch, listed: bool, dtype: torch.dtype) -> None:
    call = draw_call((37,), 96, 3, dtype=dtype)
    dirty = call._replace(h=torch.where(ROWS[:, None], call.h, random_bits((37, 96), dtype)), rows=ROWS)
    actual = Triton(listed=listed, by_rows=launch)(*dirty)
    assert torch.equal(actual.out[~ROWS].view(BITS[dtype]), dirty.h[~ROWS].view(BITS[dtype]))
    alone = Triton(by_rows=launch)(*call._replace(h=call.h[ROWS]))
    for outputs, wanted in zip(actual, alone, strict=True):
        torch.testing.assert_close(outputs[ROWS], wanted)
    assert not actual.weights[~ROWS].any()
    assert not actual.update[~ROWS].any()


@every_launch
@pytest.mark.parametrize("rows", [None, ROWS, ROWS.nonzero().flatten().flip(0)], ids=["all", "mask", "list"])
def test_in_place_touches_the_chosen_rows_only(launch: RowsLaunch, rows: Tensor | None) -> None:
    call = draw_call((37,), 96, 3)
    rows = None if rows is None else rows.to(DEVICE)
    h = call.h.to(DEVICE)
    expected = forward(call, h, rows=rows, launch=launch)
    wide = torch.full((39, 100), 7.0, device=DEVICE)
    inner = wide[1:38, :96]
    inner.copy_(h)
    out, weights, update = forward(call, inner, rows=rows, launch=launch, out=inner)
    assert out is inner
    for actual, wanted in zip((out, weights, update), expected, strict=True):
        assert torch.equal(actual, wanted)
    wide[1:38, :96] = 7.0
    assert wide.eq(7.0).all()


def test_no_chosen_rows() -> None:
    call = draw_call((5,), 20, 3)
    for rows in (torch.zeros(5, dtype=torch.bool), torch.empty(0, dtype=torch.int64)):
        h = call.h.to(DEVICE)
        out, weights, update = forward(call, h, rows=rows.to(DEVICE))
        assert torch.equal(out, h)
        assert not weights.any()
        assert not update.any()


# -- promises --


@every_launch
def test_results_repeat_bit_for_bit(launch: RowsLaunch) -> None:
    call = draw_call((37,), 96, 8, dtype=torch.bfloat16)
    h = call.h.to(DEVICE)
    for first, second in zip(forward(call, h, launch=launch), forward(call, h, launch=launch), strict=True):
        assert torch.equal(first, second)


def test_too_high_a_rank_is_refused() -> None:
    call = draw_call((1,), backend.MAX_RANK + 1, backend.MAX_RANK + 1)
    with pytest.raises(NotImplementedError, match="rank: expected at most 128"):
        forward(call, call.h.to(DEVICE))


def test_why_it_is_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "no CUDA device" in str(backend.why_unusable())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.why_unusable() is None
    monkeypatch.setattr(backend, "_IS_INSTALLED", False)
    assert backend.why_unusable() == "triton isn't installed"
