"""The torch operators: registered rightly, compiled without a break, the same under autocast and checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from op_calls import Call, draw_call
from processes import in_processes
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from baft_kernels import BaftIntervention, baft, ops
from baft_kernels.backends import why_unusable
from baft_kernels.reference import GATE_FNS

_REASON = why_unusable("cpu")
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"the cpu backend: {_REASON}")
OPERATORS = torch.ops.baft_kernels


def arguments(call: Call, *, adapters: Tensor | None = None) -> tuple[Any, ...]:
    """A call in the order of the operator's schema."""
    return (*call[:6], call.rows, adapters, call.gate_fn, "cpu")


def layouts(h: Tensor) -> dict[str, Tensor]:
    """The same numbers, laid out in other ways."""
    wide = torch.zeros(h.shape[0], h.shape[1] + 5)
    wide[:, 2:-3] = h
    return {"dense": h, "transposed": h.t().contiguous().t(), "sliced": wide[:, 2:-3]}


# -- registration --


@pytest.mark.parametrize("layout", ["dense", "transposed", "sliced"])
@pytest.mark.parametrize("gate_fn", GATE_FNS)
@pytest.mark.parametrize("rows", [None, "mask", "list"])
def test_opcheck_of_the_forward(gate_fn: str, layout: str, rows: str | None) -> None:
    chosen = {None: None, "mask": torch.arange(5) % 2 == 0, "list": torch.tensor([4, 0])}[rows]
    call = draw_call((5,), 20, 3, gate_fn=gate_fn, rows=chosen)
    call = call._replace(h=layouts(call.h)[layout])
    torch.library.opcheck(OPERATORS.forward.default, arguments(call))
    torch.library.opcheck(OPERATORS.forward_.default, arguments(call._replace(h=call.h.clone())))


@pytest.mark.parametrize("layout", ["dense", "transposed", "sliced"])
@pytest.mark.parametrize("gate_fn", GATE_FNS)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_backward(gate_fn: str, layout: str, wanted: tuple[bool, bool]) -> None:
    call = draw_call((5,), 20, 3, gate_fn=gate_fn)
    _, weights, update = OPERATORS.forward(*arguments(call))
    gradient = layouts(torch.randn(5, 20))[layout]
    for aux in ((None, None), (torch.randn(5, 3), torch.randn(3, 5).t())):
        outer = (gradient, *aux, layouts(call.h)[layout], weights, update)
        torch.library.opcheck(OPERATORS.backward.default, (*outer, *arguments(call)[1:], *wanted))


# -- compiling --


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("positions", [None, torch.tensor([0, 2])])
def test_forward_and_backward_compile_whole_and_only_once_for_every_length(positions: Tensor | None) -> None:
    layer = BaftIntervention(24, 3, backend="cpu")
    with torch.no_grad():
        layer.source += 0.3 * torch.randn(3, 24)
    compiled_graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(h: Tensor) -> Tensor:
        result = layer.edit(h, positions)
        return result.out.square().sum() + result.update.abs().sum() + result.weights.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=compiled_graphs)
    for length in (5, 6, 9, 17):
        h = torch.randn(2, length, 24, requires_grad=True)
        wanted = [h, *layer.parameters()]
        actual, expected = torch.autograd.grad(compiled(h), wanted), torch.autograd.grad(loss(h), wanted)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert compiled_graphs.frame_count == 1


# -- training with it --


def test_autocast_changes_nothing_but_what_comes_in() -> None:
    call = draw_call((2, 7), 24, 3, dtype=torch.bfloat16)
    expected = baft(*call[:6], return_aux=True, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = baft(*call[:6], return_aux=True, backend="cpu")
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    layer = BaftIntervention(24, 3, backend="cpu")
    h = torch.randn(2, 7, 24, requires_grad=True)
    expected = torch.autograd.grad(layer(h).square().sum(), [h, *layer.parameters()])
    checkpoint(layer, h, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, gradient in zip([h, *layer.parameters()], expected, strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, gradient)


def test_nothing_of_size_t_is_saved_but_h_and_two_low_rank_outputs() -> None:
    call = draw_call((50,), 64, 4)
    leaves = call._replace(**{name: value.requires_grad_() for name, value in call.floats().items()})
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        baft(*leaves[:6], backend="cpu")
    assert sorted(tensor.shape for tensor in saved if tensor.shape[0] == 50) == [(50, 4), (50, 4), (50, 64)]
    assert len(saved) == 8  # and the five parameters


def test_only_the_gradients_that_are_wanted_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = draw_call((5,), 24, 3)
    asked: list[tuple[bool, bool]] = []
    backward = ops.backward
    monkeypatch.setattr(ops, "backward", lambda *given: (asked.append(given[-2:]), backward(*given))[1])
    leaves = {name: value.requires_grad_() for name, value in call.floats().items()}
    for names in (["h"], ["basis"], ["h", "gate"]):
        detached = {name: value if name in names else value.detach() for name, value in leaves.items()}
        out = baft(*call._replace(**detached)[:6], backend="cpu")
        torch.autograd.grad(out.sum(), [leaves[name] for name in names])
    assert asked == [(True, False), (False, True), (True, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_that_trains_takes_no_copy_beyond_the_output(dtype: torch.dtype) -> None:
    rows, d, r = 2000, 256, 16
    call = draw_call((rows,), d, r, dtype=dtype)
    leaves = call._replace(**{name: value.requires_grad_() for name, value in call.floats().items()})
    kept = [baft(*leaves[:6], backend="cpu")]  # packs
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept.append(baft(*leaves[:6], backend="cpu"))
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    assert max(held) == rows * d * dtype.itemsize + 2 * rows * r * 4


# -- in parallel --


def _train_one_of_two(rank: int, _: int, folder: Path) -> None:
    """A step on half of the rows, in a process of its own."""
    layer = BaftIntervention(24, 3, backend="cpu", generator=torch.Generator().manual_seed(0))
    parallel = torch.nn.parallel.DistributedDataParallel(layer)
    h = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    parallel(h[rank]).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    save_file(gradients, folder / f"{rank}.safetensors")


def test_data_parallel_processes_agree_with_one(tmp_path: Path) -> None:
    in_processes(_train_one_of_two, tmp_path)
    layer = BaftIntervention(24, 3, backend="cpu", generator=torch.Generator().manual_seed(0))
    h = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    layer(h).square().mean().backward()
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, parameter in layer.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.grad)
