"""A parameter set for each sequence: the same as one call a sequence, gradients added up by set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import Call, draw_call
from tape import CaptureError, capture_on_tape
from tolerance import assert_within_rule, plain_torch
from torch import Tensor

from baft_kernels import BaftOutput, grouped_baft
from baft_kernels.backends import why_unusable
from baft_kernels.reference import GATE_FNS, baft_reference

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(why_unusable(name) is not None, reason=f"{name}: {why_unusable(name)}"))
    for name in ("reference", "cpu")
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARAMETERS = ("basis", "source", "source_bias", "gate", "gate_bias")


def draw(lead: tuple[int, ...], d: int, r: int, sets: int, **options: Any) -> Call:
    """A call whose parameters have a leading axis of ``sets``."""
    calls = [draw_call(lead, d, r, seed=seed, **options) for seed in range(sets)]
    stacked = {
        name: None if getattr(calls[0], name) is None else torch.stack([getattr(call, name) for call in calls])
        for name in PARAMETERS
    }
    return calls[0]._replace(**stacked)


def grouped(call: Call, ids: Tensor, backend: str, **options: Any) -> BaftOutput:
    """``grouped_baft`` where ``backend`` computes, with its results where the call is."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    there = call.to(device)
    arguments = {"gate_fn": call.gate_fn, "positions": there.rows, "backend": backend, **options}
    result = grouped_baft(*there[:6], ids.to(device), return_aux=True, **arguments)
    return BaftOutput(*(value.to(call.h.device) for value in result))


def by_sequence(call: Call, ids: Tensor, function: Any) -> BaftOutput:
    """The definition: a call of its own for each sequence."""
    results = []
    for index, chosen in enumerate(ids.tolist()):
        one = {name: None if getattr(call, name) is None else getattr(call, name)[chosen] for name in PARAMETERS}
        rows = None if call.rows is None else call.rows[index]
        results.append(function(*call._replace(h=call.h[index], rows=rows, **one)))
    return BaftOutput(*(torch.stack(values) for values in zip(*results, strict=True)))


def with_gradients(call: Call, function: Any) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in call.floats().items()}
    outputs = function(call._replace(**leaves))
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (output.double() * torch.randint(-8, 9, output.shape, generator=generator) / 8).sum() for output in outputs
    )
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in outputs._asdict().items()} | named


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_fn", GATE_FNS)
@pytest.mark.parametrize("some", [False, True])
def test_it_is_accurate(gate_fn: str, dtype: torch.dtype, some: bool, backend: str) -> None:
    rows = torch.rand(5, 13, generator=torch.Generator().manual_seed(0)) < 0.6 if some else None
    call = draw((5, 13), 200, 6, 4, gate_fn=gate_fn, dtype=dtype, rows=rows)
    ids = torch.tensor([2, 0, 2, 3, 0])
    actual = with_gradients(call, lambda given: grouped(given, ids, backend))
    plain = with_gradients(call, lambda given: by_sequence(given, ids, plain_torch))
    exact = with_gradients(call.double(), lambda given: by_sequence(given, ids, baft_reference))
    for name in exact:
        assert_within_rule(name, actual[name], plain[name], exact[name])
    unused = [value[1] for name, value in actual.items() if name.removeprefix("gradient of ") in PARAMETERS]
    assert unused and not any(bool(gradient.any()) for gradient in unused)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(0, 4), (3, 0), (2, 3, 4), (2,)])
def test_any_leading_axes(lead: tuple[int, ...], backend: str) -> None:
    call = draw(lead, 20, 3, 2)
    ids = torch.arange(lead[0]) % 2
    result = grouped(call, ids, backend)
    assert result.out.shape == (*lead, 20)
    assert result.update.shape == (*lead, 3)
    if call.h.numel():
        torch.testing.assert_close(result.out, by_sequence(call, ids, baft_reference).out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_are_of_each_sequence(backend: str) -> None:
    call = draw((2, 4), 20, 3, 2)
    ids = torch.tensor([1, 0], dtype=torch.int32)
    indexed = grouped(call, ids, backend, positions=torch.tensor([[0, 3], [1, 2]]))
    masked = grouped(call._replace(rows=torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()), ids, backend)
    assert torch.equal(indexed.out, masked.out)
    assert torch.equal(indexed.out[0, 1:3], call.h[0, 1:3])


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (torch.tensor([0, 2]), ValueError, "adapter_ids: expected numbers from 0 to 1, got 0 to 2"),
        (torch.tensor([-1, 0]), ValueError, "adapter_ids: expected numbers from 0 to 1, got -1 to 0"),
        (torch.tensor([0, 1, 0]), ValueError, r"adapter_ids: expected \[2\], one for each of h's first axis"),
        (torch.tensor([0.0, 1.0]), TypeError, "adapter_ids: expected an integer tensor, got torch.float32"),
        (torch.tensor([True, False]), TypeError, "adapter_ids: expected an integer tensor, got torch.bool"),
    ],
)
def test_wrong_adapter_ids(ids: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        grouped(draw((2, 4), 20, 3, 2), ids, "auto")


def test_parameters_without_the_axis_of_sets() -> None:
    call = draw_call((2, 4), 20, 3)
    with pytest.raises(ValueError, match=r"basis: expected shape \[N, r, 20\]"):
        grouped(call, torch.tensor([0, 0]), "auto")
    both = draw((2, 4), 20, 3, 2)
    with pytest.raises(ValueError, match=r"gate: expected shape \[2, 3, 20\], got \[3, 20\]"):
        grouped(both._replace(gate=call.gate), torch.tensor([0, 0]), "auto")


def test_ids_that_are_known_to_be_right_are_not_looked_at() -> None:
    call = draw((2, 4), 20, 3, 2)
    ids = torch.tensor([1, 0])
    with pytest.raises(CaptureError):
        capture_on_tape(lambda: grouped(call, ids, "reference"))
    _, found = capture_on_tape(lambda: grouped(call, ids, "reference", ids_in_range=True))
    assert torch.equal(found.out, grouped(call, ids, "reference").out)
