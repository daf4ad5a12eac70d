"""The written-out gradients against autograd's, in float64: they are what every backend's backward computes."""

from __future__ import annotations

import pytest
import torch
from op_calls import draw_call

from baft_kernels.reference import GATE_FNS, baft_backward_reference, baft_reference


@pytest.mark.parametrize("gate_fn", GATE_FNS)
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("incoming", ["out", "all"])
def test_they_are_autograds(gate_fn: str, some: bool, incoming: str) -> None:
    rows = torch.tensor([True, False, True, True, False]) if some else None
    call = draw_call((5,), 12, 4, gate_fn=gate_fn, dtype=torch.float64, rows=rows)
    leaves = {name: value.requires_grad_() for name, value in call.floats().items()}
    outputs = baft_reference(*call)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(value.shape, dtype=torch.float64, generator=generator) for value in outputs]
    if incoming == "out":
        gradients[1:] = [None, None]  # type: ignore[list-item]
    used = [
        (value, gradient)
        for value, gradient in zip(outputs, gradients, strict=True)
        if gradient is not None and value.requires_grad
    ]
    expected = torch.autograd.grad([v for v, _ in used], list(leaves.values()), [g for _, g in used])
    with torch.no_grad():
        actual = baft_backward_reference(
            *gradients, call.h, outputs.weights, outputs.update, call.basis, call.source, call.gate, gate_fn, rows
        )
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(getattr(actual, name), gradient, rtol=1e-12, atol=1e-12)
