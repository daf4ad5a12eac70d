"""The Triton backend with several parameter sets: each sequence as if it alone had been called with its own set."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from op_calls import Call, draw_call
from test_triton_backward import TWO_PARTS
from test_triton_forward import LAUNCHES, every_gate, every_launch
from torch import Tensor
from triton_here import DEVICE, backend, poisoned

from baft_kernels.backends.triton.launch import RowsLaunch, columns_launch, rows_launch

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
# Set 1 is used by nobody.
ADAPTERS = [2, 0, 2, 3]
LENGTH, DIM, RANK, SETS = 17, 48, 3, 4


def grouped_call(gate_fn: str = "sigmoid", dtype: torch.dtype = torch.float32, length: int = LENGTH) -> Call:
    """A call on a batch of sequences [B S, d], with parameters that have a leading axis."""
    sets = [draw_call((0,), DIM, RANK, gate_fn=gate_fn, dtype=dtype, seed=seed) for seed in range(SETS)]
    stacked = [
        None if values[0] is None else torch.stack(values) for values in zip(*(s[1:6] for s in sets), strict=True)
    ]
    return Call(torch.randn(len(ADAPTERS) * length, DIM).to(dtype), *stacked, gate_fn)


def set_of(call: Call, index: int) -> list[Tensor | None]:
    return [value if value is None else value[index] for value in call[1:6]]


def run(call: Call, incoming: list[Tensor], h: Tensor, parameters: Any, **options: Any) -> tuple[Any, Any]:
    """The outputs, and the gradients."""
    packed = backend.pack(*(p if p is None else p.to(DEVICE) for p in parameters), call.h.dtype)
    launch = options.pop("launch", None)
    h = h.to(DEVICE)
    with poisoned():
        outputs = backend.forward(h, packed, gate_fn=call.gate_fn, launch=launch, **options)
        options |= {"gate_fn": call.gate_fn, "by_rows": launch, "by_columns": TWO_PARTS if launch else None}
        gradients = backend.backward(*(g.to(DEVICE) for g in incoming), h, *outputs[1:], packed, **options)
    return outputs, gradients


def incoming_for(call: Call) -> list[Tensor]:
    total = call.h.shape[0]
    return [torch.randn_like(call.h), torch.randn(total, RANK), torch.randn(total, RANK)]


@every_launch
@every_gate
def test_each_sequence_uses_its_own_set(launch: RowsLaunch, gate_fn: str) -> None:
    call = grouped_call(gate_fn)
    incoming = incoming_for(call)
    adapters = torch.tensor(ADAPTERS, dtype=torch.int32, device=DEVICE)
    outputs, gradients = run(call, incoming, call.h, call[1:6], adapters=adapters, launch=launch)
    expected = [torch.zeros(SETS, *p.shape[1:]) for p in call[1:6] if p is not None]
    for place, index in enumerate(ADAPTERS):
        mine = slice(place * LENGTH, (place + 1) * LENGTH)
        alone = run(call, [g[mine] for g in incoming], call.h[mine], set_of(call, index), launch=launch)
        for actual, wanted in zip((*outputs, gradients[0]), (*alone[0], alone[1][0]), strict=True):
            assert torch.equal(actual[mine], wanted)
        for total, part in zip(expected, alone[1][1:], strict=False):
            total[index] += part[0].cpu()
    for actual, wanted in zip(gradients[1:], expected, strict=False):
        torch.testing.assert_close(actual.cpu(), wanted)
        assert not actual[1].any()


@pytest.mark.parametrize("launch", [*LAUNCHES.values(), None], ids=[*LAUNCHES, "chosen"])
def test_one_row_each(launch: RowsLaunch | None) -> None:
    call = grouped_call(dtype=torch.bfloat16, length=1)
    adapters = torch.tensor(ADAPTERS, device=DEVICE)
    outputs, _ = run(call, incoming_for(call), call.h, call[1:6], adapters=adapters, launch=launch)
    for place, index in enumerate(ADAPTERS):
        one = slice(place, place + 1)
        alone, _ = run(call, [g[one] for g in incoming_for(call)], call.h[one], set_of(call, index), launch=launch)
        for actual, wanted in zip(outputs, alone, strict=True):
            torch.testing.assert_close(actual[one], wanted)


@every_launch
def test_with_a_mask(launch: RowsLaunch) -> None:
    call = grouped_call()
    incoming = incoming_for(call)
    mask = torch.rand(len(call.h)) < 0.4
    dirty = torch.where(mask[:, None], call.h, torch.nan)
    options = {"adapters": torch.tensor(ADAPTERS, device=DEVICE), "launch": launch}
    (out, weights, update), gradients = run(call, incoming, dirty, call[1:6], rows=mask.to(DEVICE), **options)
    whole, _ = run(call, incoming, call.h, call[1:6], **options)
    for actual, wanted in zip((out, weights, update), whole, strict=True):
        assert torch.equal(actual[mask], wanted[mask])
    assert out[~mask].isnan().all()
    assert not weights[~mask].any()
    # What reaches the parameters is what comes of the chosen rows.
    kept = [g * mask[:, None] for g in incoming]
    _, expected = run(call, kept, torch.where(mask[:, None], call.h, 0), call[1:6], rows=mask.to(DEVICE), **options)
    for actual, wanted in zip(gradients[1:], expected[1:], strict=True):
        torch.testing.assert_close(actual, wanted)


def test_other_adapters_are_not_known_to_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a captured graph relies on: shapes alone decide.
    known: list[tuple[Any, ...]] = []

    def note(choose: Any, *shapes: Any) -> Any:
        known.append((choose, *shapes))
        return choose(*shapes)

    for kernels, choose in (("forward", rows_launch), ("backward", rows_launch), ("backward", columns_launch)):
        place = f"baft_kernels.backends.triton.kernels.{kernels}.{choose.__name__}"
        monkeypatch.setattr(place, partial(note, choose))
    call = grouped_call()
    for adapters in (ADAPTERS, [1, 1, 1, 1]):
        run(call, incoming_for(call), call.h, call[1:6], adapters=torch.tensor(adapters, device=DEVICE))
    assert len(known) == 6 and known[:3] == known[3:]


def test_lists_and_uneven_batches_are_refused() -> None:
    call = grouped_call()
    adapters = torch.tensor(ADAPTERS, device=DEVICE)
    with pytest.raises(NotImplementedError, match="rows: expected a mask"):
        run(call, incoming_for(call), call.h, call[1:6], adapters=adapters, rows=torch.tensor([0], device=DEVICE))
    with pytest.raises(ValueError, match="adapters: expected a number that divides the 67 rows of h, got 4"):
        run(call, incoming_for(call), call.h[:-1], call[1:6], adapters=adapters)
