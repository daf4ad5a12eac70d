"""The CUDA backward kernels on the emulated GPU: accurate, and the same in every order of events."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from op_calls import Call, draw_call, draws
from test_grouped import by_sequence, with_gradients
from test_grouped import draw as draw_grouped
from test_reference import BITS, random_bits
from tolerance import Backend, assert_accurate, assert_within_rule, plain_torch
from torch import Tensor

from baft_kernels import BaftOutput
from baft_kernels.reference import GATE_FNS, baft_reference

if shutil.which("g++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

import cuda_emulation as emulation  # after it is known that it can be built
from cuda_emulation import BackwardShape, EmulatedParameters, Gradients

SHAPES = emulation.backward_shapes()
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"d{s.width}-r{s.rank}-{str(s.dtype)[6:]}")
every_gate = pytest.mark.parametrize("gate_fn", GATE_FNS)
SMALL, FLOAT16, FLOAT32 = SHAPES[1], SHAPES[2], SHAPES[8]
both_sizes = pytest.mark.parametrize("small", (SMALL, FLOAT32), ids=["16-bit", "32-bit"])  # of a number
POSITIONS = {"mask": lambda rows: rows, "list": lambda rows: rows.nonzero().flatten().flip(0)}


def packed(parameters: Any, shape: BackwardShape) -> EmulatedParameters:
    return emulation.pack([value if value is None else value.contiguous() for value in parameters], *shape[2:4])


class Problem:
    """A call with w and u, and gradients of all three outputs: what one backward pass is given."""

    def __init__(self, shape: BackwardShape, count: int, rank: int | None = None, **options: Any) -> None:
        self.shape = shape
        self.call = draw_call((count,), shape.width, rank or shape.rank, dtype=shape.dtype, **options)
        _, self.weights, self.update = baft_reference(*self.call)
        self.incoming = [torch.randn_like(self.call.h), torch.randn_like(self.weights), torch.randn_like(self.update)]

    def run(self, **options: Any) -> Gradients:
        """The gradients, in parameters without an axis of sets."""
        parameters = packed([value if value is None else value[None] for value in self.call[1:6]], self.shape)
        given = (self.call.h, self.weights, self.update, parameters, self.shape)
        found = emulation.backward(*self.incoming, *given, gate_fn=self.call.gate_fn, **options)
        return Gradients(found.h, *(value if value is None else value[0] for value in found[1:]))


def assert_same(actual: Gradients, expected: Gradients) -> None:
    """Bit for bit."""
    for name, one, other in zip(Gradients._fields, actual, expected, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


class _EmulatedGradients(torch.autograd.Function):
    """Outputs that were found elsewhere, with gradients by the emulated kernels."""

    @staticmethod
    def forward(ctx: Any, call: Call, outputs: BaftOutput, shape: BackwardShape, options: Any, *_: Any) -> Any:
        ctx.one_set = call.basis.ndim == 2
        sets = [value[None] if ctx.one_set and value is not None else value for value in call[1:6]]
        ctx.given = (call.h, outputs.weights, outputs.update, packed(sets, shape), shape)
        ctx.options = {"gate_fn": call.gate_fn, "rows": call.rows, **options}
        ctx.set_materialize_grads(False)
        if call.gate_fn == "none":
            ctx.mark_non_differentiable(outputs.weights)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_weights: Tensor | None, grad_update: Tensor | None) -> Any:
        found = emulation.backward(grad_out.contiguous(), grad_weights, grad_update, *ctx.given, **ctx.options)
        of_parameters = (value[0] if ctx.one_set and value is not None else value for value in found[1:])
        return None, None, None, None, found.h, *of_parameters


def emulated(shape: BackwardShape, **options: Any) -> Backend:
    """The reference forwards and the emulated kernels backwards; ``options`` are those of ``emulation.backward``."""

    def backend(*arguments: Any) -> BaftOutput:
        call = Call(*arguments)
        with torch.no_grad():
            if "adapters" not in options:
                outputs = baft_reference(*call)
            else:
                lead = (len(options["adapters"]), -1)
                rows = None if call.rows is None else call.rows.unflatten(0, lead)
                sequences = call._replace(h=call.h.unflatten(0, lead), rows=rows)
                found = by_sequence(sequences, options["adapters"], baft_reference)
                outputs = BaftOutput(*(value.flatten(0, 1) for value in found))
        return BaftOutput(*_EmulatedGradients.apply(call, outputs, shape, options, *call[:6]))

    return backend


# -- accuracy --


@every_shape
@every_gate
@pytest.mark.parametrize("some", [False, True], ids=["all", "mask"])
def test_they_are_accurate(shape: BackwardShape, gate_fn: str, some: bool) -> None:
    for rank in (shape.rank - 3,) if some else (shape.rank, 1):
        calls = draws(37, shape.width, rank, some=some, work=1 << 20, gate_fn=gate_fn, dtype=shape.dtype)[:12]
        assert_accurate(emulated(shape), *calls)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 130])
@pytest.mark.parametrize("clusters", [1, 3, 11])
@both_sizes
def test_any_number_of_rows_on_any_number_of_clusters(rows: int, clusters: int, small: BackwardShape) -> None:
    calls = [draw_call((rows,), small.width, 13, dtype=small.dtype, seed=seed) for seed in range(6)]
    assert_accurate(emulated(small, clusters=clusters), *calls)


@every_gate
@pytest.mark.parametrize("missing", [(1,), (2,), (1, 2)], ids=["no-weights", "no-update", "neither"])
def test_the_gradients_of_weights_and_update_may_be_missing(gate_fn: str, missing: tuple[int, ...]) -> None:
    problem = Problem(SMALL, 37, 13, gate_fn=gate_fn)
    for place in missing:
        problem.incoming[place] = torch.zeros_like(problem.incoming[place])
    expected = problem.run()
    for place in missing:
        problem.incoming[place] = None
    assert_same(problem.run(), expected)


def test_gradients_beyond_float16_make_no_nan() -> None:
    problem = Problem(FLOAT16, 3, 1)
    eye = torch.eye(1, FLOAT16.width)
    problem.call = problem.call._replace(basis=eye, source=2 * eye, gate=eye)
    problem.incoming[2] = torch.full((3, 1), 1e6)
    problem.update = torch.full((3, 1), 1e6)
    found = problem.run()
    assert torch.equal(found.h[:, 1:], problem.incoming[0][:, 1:])
    assert not any(value.isnan().any() for value in found)


def test_gradients_beyond_what_tf32_rounds_to_finite_numbers_make_no_nan() -> None:
    problem = Problem(FLOAT32, 3, 1, gate_fn="none")
    eye = torch.eye(1, FLOAT32.width)
    problem.call = problem.call._replace(h=1e-3 * problem.call.h, basis=eye, source=2 * eye)
    problem.incoming[0] *= 1e-3
    problem.incoming[2] = torch.full((3, 1), 3.4028e38)
    problem.update = torch.full((3, 1), 3.4028e38)
    found = problem.run()
    assert torch.equal(found.h[:, 1:], problem.incoming[0][:, 1:])
    assert not any(value.isnan().any() for value in found if value is not None)


# -- orders of events --


@every_shape
def test_every_order_of_events_gives_the_same_bits(shape: BackwardShape) -> None:
    problem = Problem(shape, 70)
    first = problem.run(seed=1)
    for seed in range(2, 12 if shape.width < 1000 else 5):
        assert_same(problem.run(seed=seed), first)


def test_the_gradient_of_a_row_does_not_depend_on_its_company() -> None:
    problem = Problem(SMALL, 40)
    together = problem.run().h
    incoming = problem.incoming
    for row in (0, 17, 39):
        alone = Problem(SMALL, 1)
        alone.call = problem.call._replace(h=problem.call.h[row : row + 1])
        alone.weights, alone.update = (value[row : row + 1] for value in (problem.weights, problem.update))
        alone.incoming = [value[row : row + 1] for value in incoming]
        assert torch.equal(alone.run().h[0], together[row])


# -- chosen rows --


@every_shape
@every_gate
@pytest.mark.parametrize("chosen", POSITIONS.values(), ids=POSITIONS)
def test_other_rows_pass_their_gradient_on_and_give_none(shape: BackwardShape, gate_fn: str, chosen: Any) -> None:
    rows = torch.rand(37) < 0.4
    clean = Problem(shape, 37, gate_fn=gate_fn, rows=rows)
    expected = clean.run(rows=chosen(rows))
    dirty = Problem(shape, 37, gate_fn=gate_fn, rows=rows)
    garbage = random_bits((37, shape.width), shape.dtype)
    dirty.call = clean.call._replace(h=torch.where(rows[:, None], clean.call.h, garbage))
    dirty.incoming = [torch.where(rows[:, None], clean.incoming[0], garbage)]
    dirty.incoming += [torch.where(rows[:, None], value, torch.nan) for value in clean.incoming[1:]]
    for place in ("weights", "update"):
        setattr(dirty, place, torch.where(rows[:, None], getattr(clean, place), torch.nan))
    actual = dirty.run(rows=chosen(rows))
    assert torch.equal(actual.h[~rows].view(BITS[shape.dtype]), dirty.incoming[0][~rows].view(BITS[shape.dtype]))
    assert torch.equal(actual.h[rows], expected.h[rows])
    assert_same(actual._replace(h=None), expected._replace(h=None))


@pytest.mark.parametrize("chosen", POSITIONS.values(), ids=POSITIONS)
def test_chosen_rows_give_what_they_give_alone(chosen: Any) -> None:
    rows = torch.rand(37) < 0.4
    problem = Problem(SMALL, 37, rows=rows)
    found = problem.run(rows=chosen(rows))
    alone = Problem(SMALL, int(rows.sum()))
    alone.call = problem.call._replace(h=problem.call.h[rows])
    alone.weights, alone.update = problem.weights[rows], problem.update[rows]
    alone.incoming = [value[rows] for value in problem.incoming]
    expected = alone.run()
    assert torch.equal(found.h[rows], expected.h)
    for actual, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)  # other rows are neighbours in a sum


# -- what is wanted, and where it lies --


@every_shape
@pytest.mark.parametrize("chosen", [None, *POSITIONS.values()], ids=["all", *POSITIONS])
def test_what_is_not_wanted_is_left_out(shape: BackwardShape, chosen: Any) -> None:
    problem = Problem(shape, 37)
    rows = None if chosen is None else chosen(torch.rand(37) < 0.4)
    both = problem.run(rows=rows)
    assert_same(problem.run(rows=rows, wants_parameters=False), Gradients(both.h))
    assert_same(problem.run(rows=rows, wants_input=False), both._replace(h=None))


@pytest.mark.parametrize("chosen", [None, *POSITIONS.values()], ids=["all", *POSITIONS])
@pytest.mark.parametrize("in_place", [False, True])
@both_sizes
def test_rows_may_lie_apart(chosen: Any, in_place: bool, small: BackwardShape) -> None:
    problem = Problem(small, 37)
    rows = None if chosen is None else chosen(torch.rand(37) < 0.4)
    expected = problem.run(rows=rows)

    def apart(value: Tensor, by: int) -> tuple[Tensor, Tensor]:
        wide = torch.full((39, small.width + by * 16 // small.dtype.itemsize), 7.0, dtype=small.dtype)
        return wide, wide[1:38, : small.width].copy_(value)

    problem.call = problem.call._replace(h=apart(problem.call.h, 2)[1])
    wide, problem.incoming[0] = apart(problem.incoming[0], 1)
    where = problem.incoming[0]
    if not in_place:
        wide, where = apart(problem.incoming[0], 3)
    assert_same(problem.run(rows=rows, grad_input=where), expected)
    wide[1:38, : small.width] = 7.0
    assert wide.eq(7.0).all()


# -- a set for each sequence --


@pytest.mark.parametrize(
    ("shape", "clusters"),
    [*((s, 3) for s in SHAPES if s.width < 2000), *((SMALL, clusters) for clusters in (1, 8, 20))],
)
@every_gate
@pytest.mark.parametrize("some", [False, True], ids=["all", "mask"])
def test_each_sequence_uses_its_own_set(shape: BackwardShape, gate_fn: str, some: bool, clusters: int) -> None:
    rows = torch.rand(6, 40) < 0.6 if some else None
    options = {"dtype": shape.dtype, "gate_fn": gate_fn, "rows": rows}
    call = draw_grouped((6, 40), shape.width, shape.rank - 3, 4, **options)
    ids = torch.tensor([2, 0, 0, 3, 2, 0])
    backend = emulated(shape, adapters=ids, clusters=clusters)

    def grouped(given: Call) -> BaftOutput:
        flat = given._replace(h=given.h.flatten(0, 1), rows=None if rows is None else rows.flatten())
        return BaftOutput(*(value.unflatten(0, (6, 40)) for value in backend(*flat)))

    outputs = {"out", "weights", "update"}
    actual = with_gradients(call, grouped)
    plain = with_gradients(call, lambda given: by_sequence(given, ids, plain_torch))
    exact = with_gradients(call.double(), lambda given: by_sequence(given, ids, baft_reference))
    for name in exact.keys() - outputs:
        assert_within_rule(name, actual[name], plain[name], exact[name])
    unused = [value[1] for name, value in actual.items() if name not in outputs | {"gradient of h"}]
    assert unused and not any(bool(gradient.any()) for gradient in unused)


def test_sets_in_turns_repeat_bit_for_bit() -> None:
    call = draw_grouped((9, 20), SMALL.width, 12, 3, dtype=SMALL.dtype)
    flat = call.h.flatten(0, 1)
    ids = torch.tensor([0, 1, 1, 0, 2, 2, 2, 0, 1])
    outputs = by_sequence(call, ids, baft_reference)
    weights, update = (value.flatten(0, 1).contiguous() for value in (outputs.weights, outputs.update))
    given = (torch.randn_like(flat), torch.randn_like(weights), None, flat, weights, update)
    for clusters in (2, 5):
        found = [
            emulation.backward(
                *given, packed(call[1:6], SMALL), SMALL, gate_fn="sigmoid", adapters=ids, clusters=clusters, seed=seed
            )
            for seed in range(6)
        ]
        for other in found[1:]:
            assert_same(other, found[0])
