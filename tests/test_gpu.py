"""Every backend that serves an NVIDIA GPU, on one: accurate over the whole grid, repeatable, captured in graphs.

Skipped where there is no GPU. The kernels' own tests run without one, in Triton's interpreter (test_triton_*).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import test_grouped
import torch
from near_bases import SHAPES, near_bases
from op_calls import AWKWARD_WIDTHS, Call, draw_call, draws
from tolerance import assert_accurate, assert_within_rule, outputs_and_gradients, plain_torch
from torch import Tensor

from baft_kernels import (
    BaftIntervention,
    BaftOutput,
    baft,
    baft_,
    grouped_baft,
    orthonormality_error,
    repack,
    retract_,
    retract_all_,
)
from baft_kernels.backends import FUSED
from baft_kernels.reference import GATE_FNS, baft_reference

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU on this machine", allow_module_level=True)

NAMES = [name for name in FUSED if name != "cpu"]
every_backend = pytest.mark.parametrize("backend", NAMES)
every_gate = pytest.mark.parametrize("gate_fn", GATE_FNS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
GPU = "cuda"


@pytest.fixture(autouse=True)
def usable(request: pytest.FixtureRequest) -> Iterator[None]:
    if "backend" in request.fixturenames:
        reason = FUSED[request.getfixturevalue("backend")].why_unusable()
        if reason is not None:
            pytest.skip(reason)
    yield
    torch.cuda.synchronize()  # a fault belongs to the test that caused it


def skip_unless_served(backend: str, h: Tensor, rank: int) -> None:
    reason = FUSED[backend].why_not(h, rank)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def on(backend: str) -> Any:
    """The op on a backend, with the arguments of ``baft_reference``."""

    def served(*arguments: Any) -> BaftOutput:
        *call, gate_fn, rows = arguments
        skip_unless_served(backend, call[0], call[1].shape[-2])
        return baft(*call, gate_fn=gate_fn, positions=rows, return_aux=True, backend=backend)

    return served


# -- accuracy --


@every_backend
@every_dtype
@every_gate
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 129, 1000])
@pytest.mark.parametrize(("d", "r"), AWKWARD_WIDTHS)
def test_it_is_accurate(rows: int, d: int, r: int, gate_fn: str, dtype: torch.dtype, backend: str) -> None:
    calls = draws(rows, d, r, gate_fn=gate_fn, dtype=dtype, some=(rows + r) % 2 == 1)
    assert_accurate(on(backend), *(call.to(GPU) for call in calls))


@every_backend
@pytest.mark.parametrize("r", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("d", [768, 1024, 2048, 2560, 3072, 3584, 4096, 5120, 8192])
def test_the_widths_that_models_have(d: int, r: int, backend: str) -> None:
    # One dtype and one number of rows: each combination is a kernel to compile.
    assert_accurate(on(backend), *(call.to(GPU) for call in draws(200, d, r, dtype=torch.bfloat16)))


@every_dtype
@every_gate
@pytest.mark.parametrize("rows", [1, 17, 64, 65, 300])
@pytest.mark.parametrize("r", [3, 8, 12, 16, 32])
@pytest.mark.parametrize("d", [768, 1024, 2048, 2560, 3072, 3584, 4096, 5120, 8192])
@pytest.mark.parametrize("backend", ["cuda"])  # whose kernels are compiled beforehand
def test_every_instance(d: int, r: int, rows: int, gate_fn: str, dtype: torch.dtype, backend: str) -> None:
    calls = draws(rows, d, r, gate_fn=gate_fn, dtype=dtype, some=rows % 5 == 2)
    assert_accurate(on(backend), *(call.to(GPU) for call in calls))


@every_backend
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
@every_dtype
def test_a_source_close_to_the_basis_does_not_cancel(distance: float, dtype: torch.dtype, backend: str) -> None:
    calls = draws(33, 4096, 16, dtype=dtype, source_distance=distance)
    assert_accurate(on(backend), *(call.to(GPU) for call in calls))


@every_backend
@every_dtype
def test_many_rows(dtype: torch.dtype, backend: str) -> None:
    assert_accurate(on(backend), draw_call((40_000,), 768, 16, dtype=dtype).to(GPU))


@every_backend
def test_more_elements_than_32_bits_count(backend: str) -> None:
    rows, d = 2**19 + 100, 4096
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    call = draw_call((64,), d, 16, dtype=torch.bfloat16).to(GPU)
    h = torch.zeros(rows, d, dtype=torch.bfloat16, device=GPU)
    h[-64:] = call.h

    def found(function: Any, given: Call) -> dict[str, Tensor]:
        """Outputs, and the gradient of h where all rows have the same one coming in: to draw so many takes too long."""
        leaves = given._replace(h=given.h.requires_grad_())
        result = function(*leaves)
        incoming = call.h[:1].detach().to(given.h.dtype).expand(given.h.shape)
        (of_h,) = torch.autograd.grad(result.out, leaves.h, incoming)
        return {**{name: value.detach() for name, value in result._asdict().items()}, "gradient of h": of_h}

    many = found(on(backend), call._replace(h=h))
    plain, exact = found(plain_torch, call), found(baft_reference, call.double())
    for name in exact:
        assert_within_rule(name, many[name][-64:], plain[name], exact[name])
    assert not many["out"][: 2**19 - 64].isnan().any()


@every_backend
def test_float16_saturates_inside_and_overflows_only_where_the_result_does(backend: str) -> None:
    call = draw_call((3,), 768, 1, gate_fn="none", dtype=torch.float16)
    eye = torch.eye(1, 768)
    call = call._replace(basis=eye, source=eye, source_bias=torch.tensor([1e6])).to(GPU)
    result = on(backend)(*call)
    assert result.update.eq(1e6).all()
    assert torch.equal(result.out[:, 1:], call.h[:, 1:])


# -- grouped --


@every_backend
@every_gate
@every_dtype
@pytest.mark.parametrize("some", [False, True])
def test_a_set_for_each_sequence(gate_fn: str, dtype: torch.dtype, some: bool, backend: str) -> None:
    rows = torch.rand(5, 130, generator=torch.Generator().manual_seed(0)) < 0.6 if some else None
    d = 200 if backend == "triton" else 768
    call = test_grouped.draw((5, 130), d, 6, 4, gate_fn=gate_fn, dtype=dtype, rows=rows)
    ids = torch.tensor([2, 0, 2, 3, 0])
    there, there_ids = call.to(GPU), ids.to(GPU)
    skip_unless_served(backend, there.h, 6)

    def grouped(given: Call) -> BaftOutput:
        return grouped_baft(
            *given[:6], there_ids, gate_fn=gate_fn, positions=given.rows, return_aux=True, backend=backend
        )

    actual = test_grouped.with_gradients(there, grouped)
    plain = test_grouped.with_gradients(call, lambda given: test_grouped.by_sequence(given, ids, plain_torch))
    exact = test_grouped.with_gradients(
        call.double(), lambda given: test_grouped.by_sequence(given, ids, baft_reference)
    )
    for name in exact:
        assert_within_rule(name, actual[name].cpu(), plain[name], exact[name])


# -- rows and layouts --


@every_backend
@every_dtype
@pytest.mark.parametrize("rows", [5, 300])
def test_in_place_touches_the_chosen_rows_only(rows: int, dtype: torch.dtype, backend: str) -> None:
    call = draw_call((rows,), 768, 12, dtype=dtype).to(GPU)
    skip_unless_served(backend, call.h, 12)
    mask = torch.rand(rows, device=GPU) < 0.5
    for positions in (None, mask, mask.nonzero().flatten().flip(0)):
        expected = baft(*call[:6], positions=positions, backend=backend)
        wide = torch.full((rows + 2, 800), 7.0, dtype=dtype, device=GPU)
        inner = wide[1:-1, :768].copy_(call.h)
        assert baft_(inner, *call[1:6], positions=positions, backend=backend) is inner
        torch.testing.assert_close(inner, expected)
        if positions is not None:
            assert torch.equal(inner[~mask], call.h[~mask])
        wide[1:-1, :768] = 7.0
        assert wide.eq(7.0).all()


@every_backend
def test_any_alignment(backend: str) -> None:
    # Neither rows nor tensors start at a multiple of 16 bytes.
    d = 1003 if backend == "triton" else 1024
    call = draw_call((70,), d, 8, dtype=torch.bfloat16).to(GPU)
    expected = outputs_and_gradients(on(backend), call)
    wide = torch.empty(70 * (d + 3) + 1, dtype=torch.bfloat16, device=GPU)[1:].view(70, d + 3)
    shifted = wide[:, 1 : d + 1].copy_(call.h)
    actual = outputs_and_gradients(on(backend), call._replace(h=shifted))
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name])


# -- what must not matter --


@every_backend
@pytest.mark.parametrize("rows", [1, 40, 5000])
def test_results_repeat_bit_for_bit(rows: int, backend: str) -> None:
    call = draw_call((rows,), 4096, 16, dtype=torch.bfloat16).to(GPU)
    first = outputs_and_gradients(on(backend), call)
    for _ in range(20):
        for name, value in outputs_and_gradients(on(backend), call).items():
            assert torch.equal(value, first[name]), name


@every_backend
def test_two_streams_at_once(backend: str) -> None:
    calls = [draw_call((3000,), 4096, 16, dtype=torch.bfloat16, seed=seed).to(GPU) for seed in range(2)]
    expected = [on(backend)(*call).out for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, call, found in zip(streams, calls, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(on(backend)(*call).out)
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(out, wanted) for out in found)


@every_backend
def test_calls_from_several_threads_do_not_meet(backend: str) -> None:
    calls = [draw_call((40,), 768, 8, dtype=torch.bfloat16, seed=seed).to(GPU) for seed in range(4)]
    expected = [on(backend)(*call).out for call in calls]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(30):
                if not torch.equal(on(backend)(*calls[index]).out, expected[index]):
                    wrong.append(index)

    workers = [threading.Thread(target=functools.partial(work, index)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


# -- graphs and compilers --


def captured(function: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``function`` in a graph, after a few calls of it, and what the captured call returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@every_backend
@pytest.mark.parametrize("rows", [1, 200])
def test_a_replayed_graph_sees_new_data(rows: int, backend: str) -> None:
    call = draw_call((rows,), 2048, 16, dtype=torch.bfloat16).to(GPU)
    with torch.no_grad():
        graph, out = captured(lambda: baft(*call[:6], backend=backend))
        for seed in range(3):
            call.h.copy_(draw_call((rows,), 2048, 16, dtype=torch.bfloat16, seed=seed).h)
            graph.replay()
            assert torch.equal(out, baft(*call[:6], backend=backend))


@every_backend
def test_a_training_step_in_a_graph_sees_new_parameters(backend: str) -> None:
    layers = [
        BaftIntervention(768, 8, backend=served, generator=torch.Generator().manual_seed(0)).to(GPU)
        for served in (backend, "reference")
    ]
    h, target = (torch.randn(100, 768, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in layers]

    def step(layer: BaftIntervention, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = (layer(h) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for layer in layers:
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
    graph, loss = captured(lambda: step(layers[0], optimizers[0]))
    for _ in range(3):  # as the calls before the capture did
        step(layers[1], optimizers[1])
    for _ in range(5):
        graph.replay()
        expected = step(layers[1], optimizers[1])
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


@every_backend
def test_a_graph_reads_what_is_packed_again(backend: str) -> None:
    call = draw_call((5,), 2048, 16, dtype=torch.bfloat16).to(GPU)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            baft(*call[:6], backend=backend)
        with torch.cuda.graph(graph, stream=stream):
            out = baft(*call[:6], backend=backend)
        for _ in range(3):
            call.source.add_(0.1)
            repack([call.basis])
            graph.replay()
            fresh = [value.clone() for value in call[1:6] if value is not None]
            assert torch.equal(out, baft(call.h, *fresh, backend=backend))


@every_backend
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_calls_right_behind_the_kernels_that_write_what_they_read(rows: int, backend: str) -> None:
    layers = [BaftIntervention(4096, 16, backend=backend).to(GPU).requires_grad_(False) for _ in range(4)]
    hs = torch.randn(100, rows, 4096, device=GPU, dtype=torch.bfloat16)

    def chained(h: Tensor, pause: Any) -> Tensor:
        for layer in layers:
            h = 0.9 * h
            pause()
            h = layer(h)
            pause()
            baft_(h, layer.basis, layer.source, layer.source_bias, layer.gate, layer.gate_bias, backend=backend)
            pause()
        return h

    for _ in range(3):
        for layer in layers:
            layer.source += 0.1 * torch.randn_like(layer.source)
        repack(layer.basis for layer in layers)
        found = [chained(h, lambda: None) for h in hs]
        for h, actual in zip(hs, found, strict=True):
            assert torch.equal(actual, chained(h, torch.cuda.synchronize))


@every_backend
def test_a_graph_of_grouped_calls_sees_new_adapters(backend: str) -> None:
    call = test_grouped.draw((4, 30), 768, 8, 3, dtype=torch.bfloat16).to(GPU)
    ids = torch.tensor([0, 1, 2, 1], device=GPU)
    with torch.no_grad():
        graph, out = captured(lambda: grouped_baft(*call[:6], ids, backend=backend))
        for new in ([2, 2, 2, 2], [1, 0, 2, 0]):
            ids.copy_(torch.tensor(new))
            graph.replay()
            assert torch.equal(out, grouped_baft(*call[:6], ids, backend=backend))


@every_backend
def test_it_compiles_whole_and_once_for_every_length(backend: str) -> None:
    torch._dynamo.reset()
    layer = BaftIntervention(768, 8, backend=backend).to(GPU)

    def loss(h: Tensor) -> Tensor:
        result = layer.edit(h)
        return result.out.float().square().mean() + result.update.abs().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for length in (5, 6, 40):
        h = torch.randn(2, length, 768, device=GPU, dtype=torch.bfloat16, requires_grad=True)
        wanted = [h, *layer.parameters()]
        found = [torch.autograd.grad(function(h), wanted) for function in (compiled, loss)]
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected)


@every_backend
def test_autocast_changes_nothing_but_what_comes_in(backend: str) -> None:
    call = draw_call((7,), 768, 8, dtype=torch.bfloat16).to(GPU)
    expected = on(backend)(*call)
    with torch.autocast(GPU, dtype=torch.float16):
        actual = on(backend)(*call)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


# -- memory --


@every_backend
def test_a_forward_that_trains_takes_no_copy_beyond_the_output(backend: str) -> None:
    rows, d, r = 8192, 4096, 16
    call = draw_call((rows,), d, r, dtype=torch.bfloat16).to(GPU)
    leaves = call._replace(**{name: value.requires_grad_() for name, value in call.floats().items()})
    on(backend)(*leaves)  # packs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = on(backend)(*leaves)
    peak = torch.cuda.max_memory_allocated() - before
    needed = rows * d * 2 + 2 * rows * r * 4
    assert peak <= 1.05 * needed, f"{peak} bytes, needed {needed}"
    del result


# -- retraction --


# All layers of a model at once; awkward shapes; what clusters of four CTAs can't hold at a time, nor those of eight.
BASES = {"layers": [(12, 4096)] * 32, "awkward": [*SHAPES], "wide": [(64, 4096), (32, 8192)], "wider": [(64, 8192)]}


@every_backend
@pytest.mark.parametrize("distance", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("shapes", BASES.values(), ids=BASES)
def test_the_bases_of_all_layers(shapes: list[tuple[int, int]], distance: float, backend: str) -> None:
    bases = [basis.to(GPU) for basis in near_bases(distance, shapes)]
    expected = [retract_(basis.cpu().double()) for basis in bases]
    retract_all_(bases, backend=backend)
    for basis, wanted in zip(bases, expected, strict=True):
        assert orthonormality_error(basis) <= 5e-7
        torch.testing.assert_close(basis.cpu().double(), wanted, rtol=0, atol=1e-6)


# -- staying right --


@every_backend
@pytest.mark.parametrize("rows", [1, 200])
def test_ten_thousand_launches_give_the_same_bits(rows: int, backend: str) -> None:
    call = draw_call((rows,), 4096, 16, dtype=torch.bfloat16).to(GPU)
    with torch.no_grad():
        first = on(backend)(*call)
        differing = torch.zeros((), dtype=torch.int64, device=GPU)
        for _ in range(10_000):
            for actual, expected in zip(on(backend)(*call), first, strict=True):
                differing += (actual != expected).sum()
    assert differing.item() == 0


@every_backend
def test_running_out_of_memory_in_the_middle_harms_nothing(backend: str) -> None:
    call = draw_call((64,), 4096, 16, dtype=torch.bfloat16).to(GPU)
    expected = on(backend)(*call).out
    big = torch.zeros(2**14, 4096, dtype=torch.bfloat16, device=GPU)  # its output doesn't fit
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    # A limit of this process, and not memory that is taken: other tests may use the GPU at the same time.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            on(backend)(*call._replace(h=big))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(on(backend)(*call).out, expected)
