"""Packed parameters: made once for each version, and never stale."""

from __future__ import annotations

import gc

import pytest
import torch
from op_calls import draw_call

from baft_kernels import packing
from baft_kernels.packing import Parameters, difference, packed


class Counter:
    """A pack function that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, parameters: Parameters, dtype: torch.dtype) -> torch.Tensor:
        self.calls += 1
        return difference(parameters).to(dtype)


def parameters(seed: int = 0) -> Parameters:
    return Parameters(*draw_call((1,), 12, 3, seed=seed)[1:6])


def test_one_version_is_packed_once() -> None:
    pack, given = Counter(), parameters()
    first = packed(pack, given, torch.float32)
    assert packed(pack, given, torch.float32) is first
    assert pack.calls == 1
    assert packed(pack, given, torch.bfloat16).dtype == torch.bfloat16
    assert packed(pack, given, torch.float32) is first
    assert pack.calls == 2


@pytest.mark.parametrize("name", Parameters._fields)
def test_a_change_in_place_is_seen(name: str) -> None:
    pack, given = Counter(), parameters()
    packed(pack, given, torch.float32)
    getattr(given, name).add_(1)
    changed = packed(pack, given, torch.float32)
    assert pack.calls == 2
    assert torch.equal(changed, given.source - given.basis)


@pytest.mark.parametrize("name", Parameters._fields)
def test_another_tensor_in_the_place_of_one_is_seen(name: str) -> None:
    pack, given = Counter(), parameters()
    packed(pack, given, torch.float32)
    packed(pack, given._replace(**{name: getattr(given, name).clone()}), torch.float32)
    assert pack.calls == 2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_training_step_packs_once(optimizer: type[torch.optim.Optimizer]) -> None:
    pack = Counter()
    given = Parameters(*(torch.nn.Parameter(value) for value in parameters()))
    steps = optimizer(list(given), lr=0.1)  # type: ignore[call-arg]
    for step in range(3):
        for value in given:
            value.grad = torch.ones_like(value)
        for _ in range(2):
            assert torch.equal(packed(pack, given, torch.float32), (given.source - given.basis).detach())
        assert pack.calls == step + 1
        steps.step()


def test_packs_go_with_their_parameters() -> None:
    gc.collect()
    before = len(packing._entries)
    given = parameters()
    packed(Counter(), given, torch.float32)
    assert len(packing._entries) == before + 1
    del given
    gc.collect()
    assert len(packing._entries) == before


def test_inference_tensors_have_no_versions_and_are_packed_each_time() -> None:
    pack = Counter()
    with torch.inference_mode():
        given = parameters()
        packed(pack, given, torch.float32)
        packed(pack, given, torch.float32)
    assert pack.calls == 2


def test_the_difference_is_formed_from_the_masters() -> None:
    given = parameters()
    close = given._replace(source=given.basis + 1e-6)
    assert torch.equal(difference(close), close.source - close.basis)
