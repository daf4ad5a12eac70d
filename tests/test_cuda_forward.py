"""The CUDA forward kernels on the emulated GPU: accurate, and the same in every order of events."""

from __future__ import annotations

import shutil
from functools import cache
from typing import Any

import pytest
import torch
from op_calls import Call, draw_call
from test_grouped import draw as draw_grouped
from test_reference import BITS, random_bits
from tolerance import assert_within_rule, plain_torch
from torch import Tensor

from baft_kernels import BaftOutput
from baft_kernels.reference import GATE_FNS, baft_reference

if shutil.which("g++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

import cuda_emulation as emulation  # after it is known that it can be built
from cuda_emulation import EmulatedParameters, Shape

SHAPES = emulation.shapes()
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"d{s.width}-r{s.rank}-{str(s.dtype)[6:]}")
every_gate = pytest.mark.parametrize("gate_fn", GATE_FNS)
SMALL, FLOAT16, FLOAT32 = SHAPES[1], SHAPES[2], SHAPES[6]
both_sizes = pytest.mark.parametrize("small", (SMALL, FLOAT32), ids=["16-bit", "32-bit"])  # of a number
# A coefficient that is beyond float16, and beyond what TF32 can round to a finite number.
beyond_its_dtype = pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e6), (torch.float32, 3.4028e38)])
POSITIONS = {"mask": lambda rows: rows, "list": lambda rows: rows.nonzero().flatten().flip(0)}


def draw(shape: Shape, rows: int, rank: int | None = None, **options: Any) -> Call:
    return draw_call((rows,), shape.width, shape.rank if rank is None else rank, dtype=shape.dtype, **options)


def packed(call: Call, shape: Shape) -> EmulatedParameters:
    sets = [value if value is None or call.basis.ndim == 3 else value[None].contiguous() for value in call[1:6]]
    return emulation.pack(sets, shape.rank, shape.dtype)


def stream(call: Call, shape: Shape, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rank = call.basis.shape[-2]
    return emulation.forward_stream(call.h, packed(call, shape), rank, shape, gate_fn=call.gate_fn, **options)


# -- accuracy --


@every_shape
@every_gate
def test_it_is_accurate(shape: Shape, gate_fn: str) -> None:
    for rank in (shape.rank, shape.rank - 3, 1):
        calls = [draw(shape, 37, rank, gate_fn=gate_fn, seed=seed) for seed in range(2)]
        results = [
            (stream(call, shape, seed=seed), plain_torch(*call), baft_reference(*call.double()))
            for seed, call in enumerate(calls)
        ]
        for place, name in enumerate(("out", "weights", "update")):
            actual, plain, exact = (torch.cat([one[place] for one in column]) for column in zip(*results, strict=True))
            assert_within_rule(name, actual, plain, exact)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 130])
@pytest.mark.parametrize("clusters", [1, 3, 7])
@both_sizes
def test_any_number_of_rows_on_any_number_of_clusters(rows: int, clusters: int, small: Shape) -> None:
    """Each row comes out as it does among others, bit for bit."""
    call = draw(small, 130)
    some = stream(call._replace(h=call.h[:rows]), small, clusters=clusters)
    for actual, whole in zip(some, all_rows(small), strict=True):
        assert torch.equal(actual, whole[:rows])


@cache
def all_rows(small: Shape) -> tuple[Tensor, Tensor, Tensor]:
    call = draw(small, 130)
    results = stream(call, small)
    plain, exact = plain_torch(*call), baft_reference(*call.double())
    for name, *values in zip(BaftOutput._fields, results, plain, exact, strict=True):
        assert_within_rule(name, *values)
    return results


@beyond_its_dtype
def test_coefficients_beyond_their_dtype_make_no_nan(dtype: torch.dtype, value: float) -> None:
    shape = FLOAT16 if dtype == torch.float16 else FLOAT32
    call = draw(shape, 3, 1, gate_fn="none")
    eye = torch.eye(1, shape.width)
    call = call._replace(basis=eye, source=eye, source_bias=torch.tensor([value]))
    out, _, update = stream(call, shape)
    assert update.eq(torch.tensor(value)).all()
    assert not out.isnan().any()
    assert torch.equal(out[:, 1:], call.h[:, 1:])


# -- orders of events --


@every_shape
def test_every_order_of_events_gives_the_same_bits(shape: Shape) -> None:
    call = draw(shape, 70)
    first = stream(call, shape, clusters=2, seed=1)
    for seed in range(2, 8 if shape.width < 1000 else 4):
        for actual, expected in zip(stream(call, shape, clusters=2, seed=seed), first, strict=True):
            assert torch.equal(actual, expected)


def test_a_row_does_not_depend_on_its_company() -> None:
    call = draw(SMALL, 40)
    together = stream(call, SMALL)
    for row in (0, 17, 39):
        alone = stream(call._replace(h=call.h[row : row + 1].clone()), SMALL)
        for actual, expected in zip(alone, together, strict=True):
            assert torch.equal(actual[0], expected[row])


# -- chosen rows --


@every_shape
@pytest.mark.parametrize("chosen", POSITIONS.values(), ids=POSITIONS)
def test_other_rows_keep_their_bits(shape: Shape, chosen: Any) -> None:
    rows = torch.rand(37) < 0.4
    call = draw(shape, 37)
    clean = call._replace(h=call.h[rows].contiguous())
    dirty = call._replace(h=torch.where(rows[:, None], call.h, random_bits((37, shape.width), shape.dtype)))
    out, weights, update = stream(dirty, shape, rows=chosen(rows))
    alone = stream(clean, shape)
    assert torch.equal(out[~rows].view(BITS[shape.dtype]), dirty.h[~rows].view(BITS[shape.dtype]))
    assert not weights[~rows].any() and not update[~rows].any()
    for actual, expected in zip((out, weights, update), alone, strict=True):
        assert torch.equal(actual[rows], expected)


@pytest.mark.parametrize("chosen", [None, *POSITIONS.values()], ids=["all", *POSITIONS])
@both_sizes
def test_in_place_writes_the_chosen_rows_only(chosen: Any, small: Shape) -> None:
    rows = torch.rand(37) < 0.4
    call = draw(small, 37)
    positions = None if chosen is None else chosen(rows)
    expected = stream(call, small, rows=positions)
    wide = torch.full((39, small.width + 16 // small.dtype.itemsize), 7.0, dtype=small.dtype)
    inner = wide[1:38, : small.width].copy_(call.h)
    results = emulation.forward_stream(
        inner, packed(call, small), small.rank, small, gate_fn=call.gate_fn, rows=positions, out=inner
    )
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)
    wide[1:38, : small.width] = 7.0
    assert wide.eq(7.0).all()


# -- a set for each sequence --


@every_gate
@both_sizes
def test_each_sequence_uses_its_own_set(gate_fn: str, small: Shape) -> None:
    call = draw_grouped((5, 20), small.width, 12, 3, dtype=small.dtype, gate_fn=gate_fn)
    flat = call._replace(h=call.h.flatten(0, 1))
    ids = torch.tensor([2, 0, 0, 1, 2])
    for clusters in (1, 3):
        results = stream(flat, small, adapters=ids, clusters=clusters)
        for place, index in enumerate(ids.tolist()):
            one = {
                name: None if value is None else value[index]
                for name, value in call._asdict().items()
                if name in ("basis", "source", "source_bias", "gate", "gate_bias")
            }
            alone = stream(call._replace(h=call.h[place].contiguous(), **one), small)
            for actual, expected in zip(results, alone, strict=True):
                assert torch.equal(actual[place * 20 : place * 20 + 20], expected)
