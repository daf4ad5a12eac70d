"""The package's operations under pytest-benchmark, to compare one checkout with another on one machine:

    python -m pytest bench/suites --benchmark-autosave
    python -m pytest bench/suites --benchmark-compare

For figures against a copy, eager torch and torch.compile there is ``bench/roofline.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from variants import Case, draw, fused_backends

from baft_kernels import BaftIntervention, baft, grouped_baft, retract_
from baft_kernels.backends import FUSED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["reference", *FUSED]
ROWS = (1, 16, 256, 2048) if DEVICE.type == "cpu" else (1, 16, 256, 4096, 32768)


def skip_unless_served(backend: str, h: torch.Tensor, rank: int) -> None:
    if backend not in ("reference", *fused_backends(h, rank)):
        pytest.skip(f"{backend} doesn't serve this here")


def timed(benchmark: Any, function: Callable[[], object]) -> None:
    """Run it to its end, on a GPU too."""

    def finished() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    finished()
    benchmark(finished)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=(torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("r", [8, 16, 32])
@pytest.mark.parametrize("d", [768, 4096])
@pytest.mark.parametrize("rows", ROWS)
def test_forward(rows: int, d: int, r: int, dtype: torch.dtype, backend: str, benchmark: Any) -> None:
    operands = draw(Case(rows, d, r, dtype, training=False), DEVICE)
    h = torch.randn(rows, d, device=DEVICE).to(dtype)
    skip_unless_served(backend, h, r)
    timed(benchmark, lambda: baft(h, *operands.masters, backend=backend))


@pytest.mark.parametrize("d", [768, 4096])
@pytest.mark.parametrize("rows", ROWS)
def test_forward_and_backward(rows: int, d: int, dtype: torch.dtype, backend: str, benchmark: Any) -> None:
    operands = draw(Case(rows, d, 16, dtype, training=True), DEVICE)
    h = torch.randn(rows, d, device=DEVICE).to(dtype).requires_grad_()
    skip_unless_served(backend, h, 16)
    gradient = torch.randn_like(h)
    inputs = [h, *operands.masters]
    timed(benchmark, lambda: torch.autograd.grad(baft(h, *operands.masters, backend=backend), inputs, gradient))


def test_module_in_a_training_step(dtype: torch.dtype, backend: str, benchmark: Any) -> None:
    layer = BaftIntervention(4096, 16, device=DEVICE, backend=backend)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    h = torch.randn(8, 32, 4096, device=DEVICE).to(dtype)
    skip_unless_served(backend, h, 16)

    def step() -> None:
        layer(h).square().mean().backward()
        optimizer.step()
        layer.retract_()
        optimizer.zero_grad()

    timed(benchmark, step)


@pytest.mark.parametrize("r", [12, 64])
def test_retraction(r: int, benchmark: Any) -> None:
    basis = BaftIntervention(4096, r, device=DEVICE).basis.detach()
    step = 1e-3 * torch.randn_like(basis)
    timed(benchmark, lambda: retract_(basis.add_(step)))


@pytest.mark.parametrize("sets", [4, 64])
def test_grouped(sets: int, dtype: torch.dtype, backend: str, benchmark: Any) -> None:
    operands = draw(Case(1, 1024, 16, dtype, training=False), DEVICE)
    parameters = [tensor.expand(sets, *tensor.shape).contiguous() for tensor in operands.masters]
    h = torch.randn(sets, 16, 1024, device=DEVICE).to(dtype)
    ids = torch.arange(sets, device=DEVICE)
    skip_unless_served(backend, h, 16)
    timed(benchmark, lambda: grouped_baft(h, *parameters, ids, backend=backend))
