"""The oracle itself: against the formulas written out by hand, and against the promises that every backend inherits."""

from __future__ import annotations

import pytest
import torch
from op_calls import Call, draw_call
from tolerance import assert_accurate, assert_within_rule, outputs_and_gradients
from torch import Tensor

from baft_kernels import BaftOutput, baft
from baft_kernels.reference import GATE_FNS, baft_reference

every_gate = pytest.mark.parametrize("gate_fn", GATE_FNS)
HALF_DTYPES = (torch.bfloat16, torch.float16)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def formula(call: Call) -> BaftOutput:
    """The intervention as the paper writes it, term by term, for a float64 call on all rows."""
    h = call.h
    p = torch.einsum("kd,...d->...k", call.source, h) + call.source_bias - torch.einsum("kd,...d->...k", call.basis, h)
    w = torch.ones_like(p)
    if call.gate is not None:
        exponential = torch.exp(torch.einsum("kd,...d->...k", call.gate, h) + call.gate_bias)
        w = exponential / (1 + exponential if call.gate_fn == "sigmoid" else exponential.sum(-1, keepdim=True))
    u = w * p
    return BaftOutput(h + torch.einsum("kd,...k->...d", call.basis, u), w, u)


def gradients_by_formula(call: Call, g: Tensor, gw: Tensor, gu: Tensor) -> dict[str, Tensor]:
    """The gradients from those of out, w and u, without p or the gate's argument: what backward kernels compute."""
    _, w, u = baft_reference(*call)
    du = g @ call.basis.mT + gu
    s = u * du + w * gw
    dp = w * du
    dz = {"sigmoid": (1 - w) * s, "softmax": s - w * s.sum(-1, keepdim=True), "none": torch.zeros_like(s)}[call.gate_fn]
    dh = g + dp @ (call.source - call.basis)
    h, g, u, dp, dz = (tensor.flatten(0, -2) for tensor in (call.h, g, u, dp, dz))
    gradients = {"source": dp.mT @ h, "basis": u.mT @ g - dp.mT @ h, "source_bias": dp.sum(0)}
    if call.gate is not None:
        dh = dh + (dz @ call.gate).view_as(dh)
        gradients |= {"gate": dz.mT @ h, "gate_bias": dz.sum(0)}
    return gradients | {"h": dh}


# -- the formula --


@every_gate
@pytest.mark.parametrize(("d", "r"), [(1, 1), (96, 1), (96, 3), (96, 12), (96, 96), (768, 12)])
@pytest.mark.parametrize("length", [0, 1, 2, 63])
def test_outputs_follow_the_formula(gate_fn: str, d: int, r: int, length: int) -> None:
    call = draw_call((2, length), d, r, gate_fn=gate_fn, dtype=torch.float64)
    for actual, expected in zip(baft_reference(*call), formula(call), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_small_case_worked_out_on_paper() -> None:
    # One basis vector, (0.6, 0.8). R h = 2.2, A h = 3, so p = 3 + 0.2 - 2.2 = 1; G h + c = 0, so w = 1/2.
    h, basis, source, gate = (torch.tensor(rows) for rows in ([[1.0, 2.0]], [[0.6, 0.8]], [[1.0, 1.0]], [[2.0, -1.0]]))
    out, weights, update = baft_reference(h, basis, source, torch.tensor([0.2]), gate, torch.tensor([0.0]), "sigmoid")
    torch.testing.assert_close(weights, torch.tensor([[0.5]]))
    torch.testing.assert_close(update, torch.tensor([[0.5]]))
    torch.testing.assert_close(out, torch.tensor([[1.3, 2.4]]))


def test_without_a_gate_it_is_loreft() -> None:
    call = draw_call((3, 4), 10, 3, gate_fn="none", dtype=torch.float64)
    expected = call.h + (call.h @ call.source.mT + call.source_bias - call.h @ call.basis.mT) @ call.basis
    out, weights, _ = baft_reference(*call)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(weights, torch.ones_like(weights))


@every_gate
def test_the_change_is_as_long_as_the_update(gate_fn: str) -> None:
    call = draw_call((5, 7), 48, 6, gate_fn=gate_fn, dtype=torch.float64)
    out, _, update = baft_reference(*call)
    torch.testing.assert_close((out - call.h).norm(dim=-1), update.norm(dim=-1), rtol=1e-12, atol=1e-12)


# -- gradients --


@every_gate
@pytest.mark.parametrize("some_rows", [False, True])
def test_gradcheck(gate_fn: str, some_rows: bool) -> None:
    rows = torch.tensor([[True, False, True], [False, False, True]]) if some_rows else None
    call = draw_call((2, 3), 5, 2, gate_fn=gate_fn, dtype=torch.float64, rows=rows)
    names = list(call.floats())

    def differentiable_outputs(*tensors: Tensor) -> list[Tensor]:
        outputs = baft_reference(*call._replace(**dict(zip(names, tensors, strict=True))))
        return [output for output in outputs if output.requires_grad]

    leaves = [tensor.requires_grad_() for tensor in call.floats().values()]
    assert len(differentiable_outputs(*leaves)) == (2 if gate_fn == "none" else 3)
    assert torch.autograd.gradcheck(differentiable_outputs, leaves)


@every_gate
def test_gradients_follow_the_formulas_of_the_backward_kernels(gate_fn: str) -> None:
    call = draw_call((3, 5), 24, 4, gate_fn=gate_fn, dtype=torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in call.floats().items()}
    outputs = baft_reference(*call._replace(**leaves))
    generator = torch.Generator().manual_seed(0)
    incoming = [torch.randn(output.shape, dtype=torch.float64, generator=generator) for output in outputs]
    pairs = [(output, gradient) for output, gradient in zip(outputs, incoming, strict=True) if output.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    expected = gradients_by_formula(call, *incoming)
    assert expected.keys() == leaves.keys()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-11, atol=1e-11, msg=name)


# -- precision --


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize(("lead", "d", "r"), [((3, 21), 96, 12), ((1, 1), 768, 3), ((2,), 1, 1), ((2, 0), 96, 12)])
def test_every_dtype_keeps_the_tolerance_rule(
    gate_fn: str, dtype: torch.dtype, lead: tuple[int, ...], d: int, r: int
) -> None:
    assert_accurate(baft_reference, draw_call(lead, d, r, gate_fn=gate_fn, dtype=dtype))


@every_gate
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_accumulates_in_float32_and_rounds_once(gate_fn: str, dtype: torch.dtype) -> None:
    call = draw_call((4, 63), 768, 12, gate_fn=gate_fn, dtype=dtype)
    actual = outputs_and_gradients(baft_reference, call)
    single = outputs_and_gradients(baft_reference, call._replace(h=call.h.float()))
    exact = outputs_and_gradients(baft_reference, call.double())
    for name in exact:
        assert_within_rule(name, actual[name], single[name], exact[name])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_a_source_close_to_the_basis_loses_no_digits(dtype: torch.dtype) -> None:
    # A h - R h in float32 would leave p with an error of 1e-7 / 1e-5.
    call = draw_call((63,), 768, 12, dtype=dtype, source_distance=1e-5)
    exact = baft_reference(*call.double()).update
    error = (baft_reference(*call).update - exact).norm() / exact.norm()
    assert error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    def under_autocast(*arguments: object) -> BaftOutput:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return baft_reference(*arguments)

    call = draw_call((2, 9), 64, 4, dtype=dtype)
    expected = outputs_and_gradients(baft_reference, call)
    actual = outputs_and_gradients(under_autocast, call)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype
        assert torch.equal(actual[name], expected[name]), name


def test_runs_repeat_bit_for_bit() -> None:
    call = draw_call((4, 63), 768, 12)
    first, second = (outputs_and_gradients(baft_reference, call) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


# -- layouts --


@every_gate
def test_inputs_of_any_layout(gate_fn: str) -> None:
    call = draw_call((6, 5), 48, 4, gate_fn=gate_fn)
    strided = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in call.floats().items()}
    permuted = call._replace(**strided)._replace(h=call.h.transpose(0, 1))
    assert not any(tensor.is_contiguous() for tensor in permuted.floats().values())
    assert_accurate(baft_reference, permuted)
    torch.testing.assert_close(baft_reference(*permuted).out.transpose(0, 1), baft_reference(*call).out)


def test_a_vector_and_many_leading_axes() -> None:
    call = draw_call((2, 3, 2, 3), 16, 4)
    expected = baft_reference(*call)
    vector = baft_reference(*call._replace(h=call.h[1, 2, 0, 1]))
    for one, all_of_them in zip(vector, expected, strict=True):
        torch.testing.assert_close(one, all_of_them[1, 2, 0, 1])


# -- positions --


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit patterns: NaNs with payloads, quiet and signalling, infinities, subnormal numbers, and minus zero."""
    integer = BITS[dtype]
    lowest, highest = torch.iinfo(integer).min, torch.iinfo(integer).max
    bits = torch.randint(lowest, highest, shape, dtype=integer, generator=torch.Generator().manual_seed(0))
    infinity = int(torch.tensor(float("inf"), dtype=dtype).view(integer))
    bits[..., :4] = torch.tensor([infinity, infinity + 1, lowest, 1], dtype=integer)
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", list(BITS))
def test_other_rows_keep_their_bits_and_have_no_effect(dtype: torch.dtype) -> None:
    rows = torch.tensor([[True, False, False, True, False], [False, False, True, True, False]])
    clean = draw_call((2, 5), 24, 3, dtype=dtype, rows=rows)
    dirty = clean._replace(h=torch.where(rows.unsqueeze(-1), clean.h, random_bits((2, 5, 24), dtype)))
    actual, expected = (outputs_and_gradients(baft_reference, call) for call in (dirty, clean))
    assert torch.equal(actual["out"][~rows].view(BITS[dtype]), dirty.h[~rows].view(BITS[dtype]))
    assert torch.equal(actual["out"][rows], expected["out"][rows])
    for name in actual.keys() - {"out"}:
        assert torch.equal(actual[name], expected[name]), name
    for name in ("weights", "update"):
        assert not actual[name][~rows].any()


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_rows_are_edited_as_if_alone(gate_fn: str, dtype: torch.dtype) -> None:
    rows = torch.tensor([[True, False, True], [False, False, True]])
    some = draw_call((2, 3), 24, 3, gate_fn=gate_fn, dtype=dtype, rows=rows)
    alone = baft_reference(*some._replace(h=some.h[rows], rows=None))
    for actual, expected in zip(baft_reference(*some), alone, strict=True):
        torch.testing.assert_close(actual[rows], expected)
    assert_accurate(baft_reference, some)


@pytest.mark.parametrize(
    ("lead", "positions", "chosen"),
    [
        ((2, 4), [1, 3], [[0, 1, 0, 1], [0, 1, 0, 1]]),
        ((2, 4), [3, 0], [[1, 0, 0, 1], [1, 0, 0, 1]]),
        ((2, 4), [[0, 1], [3, 2]], [[1, 1, 0, 0], [0, 0, 1, 1]]),
        ((4,), [2], [0, 0, 1, 0]),
        ((2, 1, 3), [[[0]], [[2]]], [[[1, 0, 0]], [[0, 0, 1]]]),
        ((2, 1, 3), [1], [[[0, 1, 0]], [[0, 1, 0]]]),
        ((2, 4), [], [[0, 0, 0, 0], [0, 0, 0, 0]]),
        ((2, 0), [], [[], []]),
    ],
)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.uint8])
def test_indices_mean_the_same_as_a_mask(
    lead: tuple[int, ...], positions: list[int], chosen: list[int], index_dtype: torch.dtype
) -> None:
    call = draw_call(lead, 8, 2)
    indexed = baft(
        *call[:6], positions=torch.tensor(positions, dtype=index_dtype), return_aux=True, backend="reference"
    )
    expected = baft_reference(*call._replace(rows=torch.tensor(chosen, dtype=torch.bool)))
    for actual, wanted in zip(indexed, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_mask_for_a_single_vector() -> None:
    call = draw_call((), 8, 2)
    assert torch.equal(baft(*call[:6], positions=torch.tensor(False)), call.h)
    assert torch.equal(baft(*call[:6], positions=torch.tensor(True)), baft(*call[:6]))
