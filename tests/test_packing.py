"""Packed parameters: made once for each version, and never stale."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from op_calls import draw_call

from baft_kernels import BaftIntervention, baft, packing
from baft_kernels.backends import why_unusable
from baft_kernels.packing import Held, Parameters, difference, packed, repack


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


# -- packs that are filled again, where they are --


class Filler:
    """A fill function that remembers how many packs each of its calls filled."""

    def __init__(self) -> None:
        self.filled: list[int] = []

    def __call__(self, held: Sequence[Held]) -> None:
        self.filled.append(len(held))
        for given, dtype, pack in held:
            pack.copy_(difference(given).to(dtype))


def room(given: Parameters, dtype: torch.dtype) -> torch.Tensor:
    return torch.full_like(given.basis, torch.nan, dtype=dtype)


def other_room(given: Parameters, dtype: torch.dtype) -> torch.Tensor:
    return room(given, dtype)


def test_a_new_version_goes_where_the_old_one_was() -> None:
    fill, given = Filler(), parameters()
    pack = packed(room, given, torch.float32, fill)
    assert packed(room, given, torch.float32, fill) is pack
    given.source.add_(1)
    assert packed(room, given, torch.float32, fill) is pack
    assert torch.equal(pack, difference(given))
    assert fill.filled == [1, 1]


def test_what_is_packed_of_all_layers_is_renewed_in_one_go() -> None:
    fill, layers = Filler(), [parameters(seed) for seed in range(3)]
    rooms = [(one, room, torch.float32) for one in layers] + [(layers[1], other_room, torch.bfloat16)]
    packs = [packed(make, one, dtype, fill) for one, make, dtype in rooms]
    for one in layers:
        one.gate.add_(1)  # type: ignore[union-attr]
        one.basis.mul_(2)
    fill.filled.clear()
    repack(one.basis for one in layers)
    assert fill.filled == [4]
    for (one, make, dtype), pack in zip(rooms, packs, strict=True):
        assert torch.equal(pack, difference(one).to(dtype))
        assert packed(make, one, dtype, fill) is pack
    repack(one.basis for one in layers)
    assert fill.filled == [4]


def test_other_layers_and_packs_of_other_backends_are_left_alone() -> None:
    fill, count, (one, other) = Filler(), Counter(), (parameters(seed) for seed in range(2))
    packed(room, one, torch.float32, fill)
    packed(count, one, torch.float32)
    packed(room, other, torch.float32, fill)
    for given in (one, other):
        given.basis.add_(1)
    fill.filled.clear()
    repack([one.basis, parameters(2).basis])
    assert (fill.filled, count.calls) == ([1], 1)
    assert torch.equal(packed(count, one, torch.float32), difference(one))
    assert torch.equal(packed(room, other, torch.float32, fill), difference(other))
    assert fill.filled == [1, 1]


@pytest.mark.parametrize("name", Parameters._fields)
def test_a_change_after_the_renewal_is_seen(name: str) -> None:
    fill, given = Filler(), parameters()
    packed(room, given, torch.float32, fill)
    given.basis.add_(1)
    repack([given.basis])
    getattr(given, name).add_(1)
    assert torch.equal(packed(room, given, torch.float32, fill), difference(given))
    assert fill.filled == [1, 1, 1]


@pytest.mark.parametrize("moved", [lambda data: data.clone(), lambda data: data[:2]], ids=["elsewhere", "shortened"])
def test_parameters_in_other_memory_have_another_pack(moved: Any) -> None:
    fill, given = Filler(), parameters()
    pack = packed(room, given, torch.float32, fill)
    before = pack.clone()
    for value in given:
        value.data = moved(value.data)  # type: ignore[union-attr]
        value.add_(1)  # type: ignore[union-attr]
    repack([given.basis])
    assert torch.equal(packed(room, given, torch.float32, fill), difference(given))
    assert torch.equal(pack, before)


def test_a_fill_that_fails_leaves_the_pack_stale() -> None:
    fill, given = Filler(), parameters()

    def failing(held: Sequence[Held]) -> None:
        if fill.filled:
            fill.filled.clear()
            raise RuntimeError("no launch")
        fill(held)

    packed(room, given, torch.float32, failing)
    given.source.add_(1)
    with pytest.raises(RuntimeError, match="no launch"):
        repack([given.basis])
    assert torch.equal(packed(room, given, torch.float32, failing), difference(given))


# -- streams and graphs, which a CPU has none of: (stream, whether it is captured) --


def test_a_stream_neither_uses_nor_renews_what_another_one_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    fill, given = Filler(), parameters()
    pack = packed(room, given, torch.float32, fill)
    monkeypatch.setattr(packing, "_stream_of", lambda tensor: (1, False))
    assert packed(room, given, torch.float32, fill) is not pack
    before = pack.clone()
    given.source.add_(1)
    repack([given.basis])
    assert fill.filled == [1, 1, 1]
    assert torch.equal(pack, before)


def test_a_graph_packs_what_is_trained_and_reads_what_its_stream_has_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    fill, given = Filler(), parameters()
    monkeypatch.setattr(packing, "_stream_of", lambda tensor: (1, False))
    pack = packed(room, given, torch.float32, fill)
    monkeypatch.setattr(packing, "_stream_of", lambda tensor: (1, True))
    assert packed(room, given, torch.float32, fill) is pack
    given.source.requires_grad_()
    assert packed(room, given, torch.float32, fill) is not pack
    given.source.requires_grad_(False).add_(1)
    stale = pack.clone()
    repack([given.basis])
    made = packed(room, given, torch.float32, fill)
    assert made is not pack
    assert packed(room, given, torch.float32, fill) is not made  # which isn't there before the graph is replayed
    assert torch.equal(pack, stale)
    monkeypatch.setattr(packing, "_stream_of", lambda tensor: (1, False))
    assert packed(room, given, torch.float32, fill) is pack
    assert torch.equal(pack, difference(given))


# -- lifetimes --


def test_packs_go_with_their_parameters() -> None:
    gc.collect()
    before = len(packing._entries)
    given = parameters()
    packed(Counter(), given, torch.float32)
    assert len(packing._entries) == before + 1
    del given
    gc.collect()
    assert len(packing._entries) == before


def test_garbage_may_be_collected_while_packs_are_renewed() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself, self.parameters = self, parameters()

    pack, fill, kept = Counter(), Filler(), [parameters() for _ in range(300)]
    for given in kept:
        packed(pack, given, torch.float32, fill)
    left: list[int] = []  # packs that there are after each collection

    def count(phase: str, _: dict[str, int]) -> None:
        if phase == "stop":
            left.append(len(packing._entries))

    threshold = gc.get_threshold()
    gc.collect()
    gc.callbacks.append(count)
    try:
        gc.set_threshold(100_000)
        packed(pack, Cycle().parameters, torch.float32, fill)
        before = len(packing._entries)
        bases = [given.basis for given in kept]
        gc.set_threshold(gc.get_count()[0] + len(bases) + 50)  # so that it comes while 300 packs are looked through
        repack(bases)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(count)
    assert left and left[0] == before - 1


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


@pytest.mark.skipif(why_unusable("cpu") is not None, reason=f"cpu: {why_unusable('cpu')}")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_of_any_optimiser_makes_a_new_pack(optimizer: type[torch.optim.Optimizer], fused: bool) -> None:
    layer = BaftIntervention(24, 4, backend="cpu")
    h = torch.randn(3, 24)
    stepping = optimizer([layer.source, layer.source_bias], lr=0.1, fused=fused)  # not the basis: no retraction
    layer(h).sum().backward()
    stepping.step()
    torch.testing.assert_close(layer(h), baft(h, *layer.parameters(), backend="reference"))
