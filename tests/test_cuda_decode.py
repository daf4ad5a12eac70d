"""The CUDA forward kernel for few rows on the emulated GPU: accurate, and the same in every order of events."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from op_calls import Call
from test_grouped import draw as draw_grouped
from test_reference import BITS, random_bits
from tolerance import assert_within_rule, plain_torch
from torch import Tensor

from baft_kernels.reference import baft_reference

if shutil.which("g++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

import cuda_emulation as emulation  # after it is known that it can be built
from cuda_emulation import DecodeShape
from test_cuda_forward import POSITIONS, beyond_its_dtype, draw, every_gate, packed, stream

SHAPES = emulation.decode_shapes()
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"d{s.width}-r{s.rank}-{str(s.dtype)[6:]}")
SMALL, FLOAT16, FLOAT32 = SHAPES[1], SHAPES[2], SHAPES[7]
both_sizes = pytest.mark.parametrize("small", (SMALL, FLOAT32), ids=["16-bit", "32-bit"])  # of a number


def decode(call: Call, shape: DecodeShape, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rank = call.basis.shape[-2]
    return emulation.forward_decode(call.h, packed(call, shape), rank, shape, gate_fn=call.gate_fn, **options)


def assert_same_bits(actual: Any, expected: Any) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


# -- accuracy --


@every_shape
@every_gate
def test_it_is_accurate(shape: DecodeShape, gate_fn: str) -> None:
    for rank in (shape.rank, shape.rank - 3, 3, 1):
        calls = [draw(shape, 17, rank, gate_fn=gate_fn, seed=seed) for seed in range(3)]
        results = [
            (decode(call, shape, seed=seed), plain_torch(*call), baft_reference(*call.double()))
            for seed, call in enumerate(calls)
        ]
        for place, name in enumerate(("out", "weights", "update")):
            actual, plain, exact = (torch.cat([one[place] for one in column]) for column in zip(*results, strict=True))
            assert_within_rule(name, actual, plain, exact)


@every_shape
@pytest.mark.parametrize("tile_rows", [1, 3, 8])
def test_a_row_does_not_depend_on_its_company(shape: DecodeShape, tile_rows: int) -> None:
    call = draw(shape, 64)
    together = decode(call, shape)
    for rows in range(1, 18) if shape in (SMALL, FLOAT32) else (1, 13):
        some = decode(call._replace(h=call.h[:rows].clone()), shape, tile_rows=tile_rows)
        assert_same_bits(some, [value[:rows] for value in together])


@both_sizes
def test_it_agrees_with_the_streaming_kernel_to_the_bit_where_that_has_the_same_strips(small: DecodeShape) -> None:
    streamed = emulation.shapes()[1 if small is SMALL else 6]
    assert streamed[1:] == small[1:4]
    call = draw(small, 20)
    assert_same_bits(decode(call, small), stream(call, streamed))


@beyond_its_dtype
def test_coefficients_beyond_their_dtype_make_no_nan(dtype: torch.dtype, value: float) -> None:
    shape = FLOAT16 if dtype == torch.float16 else FLOAT32
    call = draw(shape, 3, 1, gate_fn="none")
    eye = torch.eye(1, shape.width)
    call = call._replace(basis=eye, source=eye, source_bias=torch.tensor([value]))
    out, _, update = decode(call, shape)
    assert update.eq(torch.tensor(value)).all()
    assert not out.isnan().any()
    assert torch.equal(out[:, 1:], call.h[:, 1:])


# -- orders of events --


@every_shape
def test_every_order_of_events_gives_the_same_bits(shape: DecodeShape) -> None:
    call = draw(shape, 19)
    first = decode(call, shape, seed=1)
    for seed in range(2, 20 if shape.width < 1000 else 5):
        assert_same_bits(decode(call, shape, seed=seed), first)


def test_all_ctas_add_up_in_one_order() -> None:
    call = draw(SMALL, 1, 1, gate_fn="none")
    firsts = range(0, SMALL.width, SMALL.width // 4)  # first columns of the CTAs' slices
    h, basis, difference = (torch.zeros(1, SMALL.width) for _ in range(3))
    for column, value in zip(firsts, (2.0**30, 1.0, -(2.0**30), 1.0), strict=True):
        h[0, column], difference[0, column] = value, 1.0
        basis[0, column + 1] = 1.0
    call = call._replace(h=h.bfloat16(), basis=basis, source=basis + difference, source_bias=torch.zeros(1))
    out, _, update = decode(call, SMALL)
    assert update.item() == 1.0  # 2 or 0 in other orders
    assert all(out[0, column + 1] == 1.0 for column in firsts)


# -- chosen rows --


@every_shape
@pytest.mark.parametrize("chosen", POSITIONS.values(), ids=POSITIONS)
def test_other_rows_keep_their_bits(shape: DecodeShape, chosen: Any) -> None:
    rows = torch.rand(37) < 0.4
    call = draw(shape, 37)
    clean = call._replace(h=call.h[rows].contiguous())
    dirty = call._replace(h=torch.where(rows[:, None], call.h, random_bits((37, shape.width), shape.dtype)))
    out, weights, update = decode(dirty, shape, rows=chosen(rows))
    assert torch.equal(out[~rows].view(BITS[shape.dtype]), dirty.h[~rows].view(BITS[shape.dtype]))
    assert not weights[~rows].any() and not update[~rows].any()
    assert_same_bits((out[rows], weights[rows], update[rows]), decode(clean, shape))


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "elsewhere"])
@pytest.mark.parametrize("chosen", [None, *POSITIONS.values()], ids=["all", *POSITIONS])
@both_sizes
def test_it_reads_and_writes_the_rows_of_wider_tensors(chosen: Any, in_place: bool, small: DecodeShape) -> None:
    rows = torch.rand(37) < 0.4
    call = draw(small, 37)
    positions = None if chosen is None else chosen(rows)
    expected = decode(call, small, rows=positions)
    # Rows at odd multiples of 4 bytes: no more is asked of them.
    word = 4 // small.dtype.itemsize
    wide, elsewhere = (torch.full((39, small.width + extra * word), 7.0, dtype=small.dtype) for extra in (3, 5))
    h, other = (tensor[1:38, word : word + small.width] for tensor in (wide, elsewhere))
    h.copy_(call.h)
    other.copy_(call.h)
    results = decode(call._replace(h=h), small, rows=positions, out=h if in_place else other)
    assert_same_bits(results, expected)
    if not in_place:
        assert torch.equal(h, call.h)
    for inner in (h, other):
        inner.fill_(7.0)
    assert wide.eq(7.0).all() and elsewhere.eq(7.0).all()


def test_in_place_other_rows_are_not_even_written() -> None:
    call = draw(SMALL, 1)
    expected, _, _ = decode(call, SMALL)
    for edited in range(8):
        h = call.h.clone().expand(8, -1)  # eight rows in one place, where writing the others would undo the edit
        decode(call._replace(h=h), SMALL, rows=torch.arange(8) == edited, out=h, seed=edited)
        assert torch.equal(h[:1], expected)


# -- launched before the previous kernel has ended --


@every_shape
@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("chosen", [None, *POSITIONS.values()], ids=["all", *POSITIONS])
def test_what_the_previous_kernel_writes_is_waited_for(shape: DecodeShape, settled: bool, chosen: Any) -> None:
    rows = torch.rand(19) < 0.4
    call, parameters = draw(shape, 19), packed(draw(shape, 19), shape)
    positions = None if chosen is None else chosen(rows)
    options = {"gate_fn": call.gate_fn, "rows": positions, "settled": settled}
    expected = emulation.forward_decode(call.h, parameters, shape.rank, shape, **options)
    for in_place in (False, True):
        h = call.h.clone()
        unfinished = [(h, torch.full_like(h, torch.nan))]
        if positions is not None:
            unfinished.append((positions, torch.zeros_like(positions)))
        if not settled:
            unfinished += [(value, torch.zeros_like(value)) for value in parameters]
        results = emulation.forward_decode(
            h, parameters, shape.rank, shape, out=h if in_place else None, unfinished=unfinished, **options
        )
        assert_same_bits(results, expected)


def test_adapters_are_waited_for() -> None:
    call = draw_grouped((5, 3), SMALL.width, 12, 3, dtype=SMALL.dtype)
    ids = torch.tensor([2, 0, 0, 1, 2])
    flat = call._replace(h=call.h.flatten(0, 1))
    expected = decode(flat, SMALL, adapters=ids)
    assert_same_bits(decode(flat, SMALL, adapters=ids, unfinished=[(ids, torch.ones_like(ids))]), expected)


# -- a set for each sequence --


@every_gate
@pytest.mark.parametrize("length", [1, 8, 11])
@both_sizes
def test_each_sequence_uses_its_own_set(gate_fn: str, length: int, small: DecodeShape) -> None:
    call = draw_grouped((5, length), small.width, 12, 3, dtype=small.dtype, gate_fn=gate_fn)
    flat = call._replace(h=call.h.flatten(0, 1))
    ids = torch.tensor([2, 0, 0, 1, 2])
    results = decode(flat, small, adapters=ids)
    for place, index in enumerate(ids.tolist()):
        one = {
            name: None if value is None else value[index]
            for name, value in call._asdict().items()
            if name in ("basis", "source", "source_bias", "gate", "gate_bias")
        }
        alone = decode(call._replace(h=call.h[place].contiguous(), **one), small)
        assert_same_bits([value[place * length : (place + 1) * length] for value in results], alone)


def test_a_set_for_each_sequence_with_chosen_rows() -> None:
    call = draw_grouped((3, 10), SMALL.width, 16, 2, dtype=SMALL.dtype)
    flat = call._replace(h=call.h.flatten(0, 1))
    ids = torch.tensor([1, 0, 1])
    every = decode(flat, SMALL, adapters=ids)
    chosen = torch.tensor([3, 9, 12, 10, 29, 20])  # two of each sequence
    listed = decode(flat, SMALL, adapters=ids, rows=chosen)
    mask = torch.zeros(30, dtype=torch.bool).index_fill_(0, chosen, True)
    masked = decode(flat, SMALL, adapters=ids, rows=mask)
    assert_same_bits([value[mask] for value in listed], [value[mask] for value in every])
    assert_same_bits(masked, listed)
