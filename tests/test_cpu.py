"""The C++ kernels: accurate at every size, the same at any number of threads, and on every instruction set."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import AWKWARD_WIDTHS, Call, draw_call, draws
from tolerance import Backend, assert_accurate, outputs_and_gradients
from torch import Tensor

from baft_kernels import BaftIntervention, BaftOutput, baft, baft_, grouped_baft, info
from baft_kernels.backends import cpu as cpu_backend
from baft_kernels.backends import why_unusable
from baft_kernels.reference import GATE_FNS

_REASON = why_unusable("cpu")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"the cpu backend: {_REASON}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpu(*arguments: Any) -> BaftOutput:
    *call, gate_fn, rows = arguments
    return baft(*call, gate_fn=gate_fn, positions=rows, return_aux=True, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_fn", GATE_FNS)
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 129])
@pytest.mark.parametrize(("d", "r"), AWKWARD_WIDTHS)
def test_it_is_accurate(rows: int, d: int, r: int, gate_fn: str, dtype: torch.dtype) -> None:
    assert_accurate(cpu, *draws(rows, d, r, gate_fn=gate_fn, dtype=dtype, some=(rows + r) % 2 == 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_accurate_over_many_rows(dtype: torch.dtype) -> None:
    assert_accurate(cpu, draw_call((1000,), 768, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_a_source_close_to_the_basis_does_not_cancel(distance: float, dtype: torch.dtype) -> None:
    assert_accurate(cpu, *draws(17, 768, 12, dtype=dtype, source_distance=distance))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    rows=st.integers(0, 40),
    d=st.integers(1, 200),
    rank=st.integers(1, 80),
    gate_fn=st.sampled_from(GATE_FNS),
    dtype=st.sampled_from(DTYPES[1:]),
    some=st.booleans(),
)
def test_any_size_works(rows: int, d: int, rank: int, gate_fn: str, dtype: torch.dtype, some: bool) -> None:
    assert_accurate(cpu, *draws(rows, d, min(rank, d), gate_fn=gate_fn, dtype=dtype, some=some))


# -- layouts of h --


def test_rows_of_a_wider_matrix_and_permuted_axes() -> None:
    wide = torch.randn(3, 9, 200)
    call = draw_call((3, 9), 96, 8)
    for h in (wide[..., 50:146], wide.transpose(0, 1)[..., :96], wide[:, ::2, 4:100], wide[:, :, ::2][..., :96]):
        arguments = call._replace(h=h)
        dense = call._replace(h=h.contiguous())
        for actual, expected in zip(cpu(*arguments), cpu(*dense), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("incoming", ["expanded", "transposed", "sliced"])
def test_gradients_of_any_layout(incoming: str) -> None:
    call = draw_call((6, 40), 40, 4)
    gradient = {
        "expanded": lambda: torch.randn(1, 1, 1).expand(6, 40, 40),
        "transposed": lambda: torch.randn(6, 40, 40).mT,
        "sliced": lambda: torch.randn(6, 40, 80)[..., ::2],
    }[incoming]()
    leaves = call._replace(**{name: value.requires_grad_() for name, value in call.floats().items()})
    inputs = list(leaves.floats().values())
    out = cpu(*leaves).out
    actual = torch.autograd.grad(out, inputs, gradient, retain_graph=True)
    expected = torch.autograd.grad(out, inputs, gradient.contiguous())
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


# -- rows that aren't chosen --


@pytest.mark.parametrize("positions", [torch.tensor([4, 1]), torch.tensor([False, True, False, False, True, False])])
def test_other_rows_keep_their_bits_and_may_hold_anything(positions: Tensor) -> None:
    call = draw_call((6,), 70, 3)
    chosen = torch.tensor([False, True, False, False, True, False])
    call.h[~chosen] = float("nan")
    leaves = call._replace(rows=positions, **{name: value.requires_grad_() for name, value in call.floats().items()})
    result = cpu(*leaves)
    assert torch.equal(result.out[~chosen].isnan(), torch.ones(4, 70, dtype=torch.bool))
    assert not result.update[~chosen].any() and not result.weights[~chosen].any()
    gradients = torch.autograd.grad(result.out[chosen].square().sum(), list(leaves.floats().values()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_in_place_writes_the_chosen_rows_and_no_others() -> None:
    call = draw_call((2, 9), 96, 8)
    expected = cpu(*call._replace(rows=torch.tensor([2, 7]))).out
    for layout in (
        call.h.clone(),
        torch.randn(2, 9, 120)[..., :96].copy_(call.h),
        torch.randn(9, 2, 96).transpose(0, 1),
    ):
        h = layout.copy_(call.h)
        assert baft_(h, *call[1:6], positions=torch.tensor([2, 7]), backend="cpu") is h
        assert torch.equal(h, expected)


# -- numbers so small that a processor is slow with them --

zeroes_them = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"), reason="no way to on this processor"
)


@zeroes_them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 200])
def test_subnormal_gradients_are_zero(rows: int, dtype: torch.dtype) -> None:
    """One of them costs as much as a hundred other numbers, and in a long run there come to be many."""
    call = draw_call((rows,), 2048, 12, dtype=dtype)
    leaves = call._replace(**{name: value.requires_grad_() for name, value in call.floats().items()})
    out = cpu(*leaves).out
    incoming = torch.full_like(out, 1e-39)
    assert incoming.all()
    for gradient in torch.autograd.grad(out, list(leaves.floats().values()), incoming):
        assert not gradient.any()


def test_the_subnormal_gradients_of_float16_are_kept() -> None:
    layer = BaftIntervention(96, 8, backend="cpu")  # which, being new, changes nothing
    h = torch.randn(30, 96, dtype=torch.float16).requires_grad_()
    incoming = torch.randint(1, 1024, h.shape) * torch.tensor(2.0**-24, dtype=torch.float16)
    (gradient,) = torch.autograd.grad(layer(h), h, incoming)
    assert torch.equal(gradient, incoming)


def test_subnormal_numbers_are_numbers_everywhere_else() -> None:
    """In the forward pass, and in what threads do after a backward pass: those too that it was the first to need."""
    h = torch.full((30, 1024), 1e-39).requires_grad_()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out = BaftIntervention(1024, 12, backend="cpu")(h)
        assert torch.equal(out, h)
        for number in (2, 4):
            torch.set_num_threads(number)
            out.sum().backward(retain_graph=True)
            assert (torch.full((1 << 20,), 1e-39) * 0.5).all()
    finally:
        torch.set_num_threads(threads)


# -- what must not matter --


def _results(call: Call) -> dict[str, Tensor]:
    backend: Backend = cpu
    return outputs_and_gradients(backend, call)


@pytest.mark.parametrize("rows", [1, 30, 300])
def test_results_are_the_same_bit_for_bit_at_any_number_of_threads(rows: int) -> None:
    call = draw_call((rows,), 2048, 12, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = _results(call)
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for name, value in _results(call).items():
                assert torch.equal(value, expected[name]), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 30, 300])
@pytest.mark.parametrize("some", [False, True])
def test_sets_that_share_a_call_are_as_in_calls_of_their_own(some: bool, rows: int) -> None:
    """Bit for bit, whether threads take whole sets, which are small, or work together on each."""
    calls = [draw_call((rows,), 1088, 12, seed=seed) for seed in range(5)]
    ids = torch.tensor([3, 0, 4, 1])
    stacked = [torch.stack([getattr(call, name) for call in calls]) for name in Call._fields[1:6]]
    h = torch.stack([calls[number].h for number in ids])
    chosen = torch.arange(rows).flip(0)[: rows // 2 + 1] if some else None
    expected = [
        torch.stack(values)
        for values in zip(*(cpu(*calls[n]._replace(rows=chosen))._asdict().values() for n in ids), strict=True)
    ]
    positions = None if chosen is None else chosen.expand(len(ids), -1)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found = grouped_baft(h, *stacked, ids, positions=positions, return_aux=True, backend="cpu")
            for actual, wanted in zip(found, expected, strict=True):
                assert torch.equal(actual, wanted)
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_threads_do_not_meet() -> None:
    calls = [draw_call((40,), 256, 8, seed=seed) for seed in range(4)]
    expected = [cpu(*call).out for call in calls]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(30):
            if not torch.equal(cpu(*calls[index]).out, expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=functools.partial(work, index)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.parametrize("variant", ["avx512", "avx2", "portable"])
def test_the_other_instruction_sets(variant: str) -> None:
    environment = {**os.environ, "BAFT_CPU_VARIANT": variant, "OMP_NUM_THREADS": "1"}
    which = "test_it_is_accurate and 63 and (96 or 2048) or over_many_rows or keep_their_bits or subnormal"
    # This session's processes share a plugin-free run of the same tests, since a process chooses its variant once.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__)), "-k", which]
    code = "import torch; from baft_kernels import _cpu; print(_cpu.variant())"
    chosen = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if chosen.stdout.strip() != variant:
        pytest.skip(f"this processor or build has no {variant} kernels")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "passed" in done.stdout


# -- what is said when they can't run --


def _importing(result: object) -> Any:
    def import_module(name: str) -> object:
        assert name == "baft_kernels._cpu"
        if isinstance(result, Exception):
            raise result
        return result

    return import_module


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (ModuleNotFoundError("No module named 'baft_kernels._cpu'"), "csrc/ wasn't built: it takes a C++ compiler"),
        (ImportError("_cpu.abi3.so: undefined symbol: torch_call"), "doesn't load: _cpu.abi3.so: undefined symbol"),
        (types.SimpleNamespace(INTERFACE=0), "is of another version (0, expected"),
    ],
)
def test_a_library_that_is_missing_or_broken_says_so(
    result: object, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_backend.importlib, "import_module", _importing(result))
    problem = cpu_backend._load()
    assert says in str(problem)
    monkeypatch.undo()
    monkeypatch.setattr(cpu_backend, "_PROBLEM", problem)
    state = info.collect()["backends"]["cpu"]
    assert (state["usable"], state["reason"]) == (False, problem)
    assert info.collect()["auto"]["cpu"]["backend"] == "reference"
