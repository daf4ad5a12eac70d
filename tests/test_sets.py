"""Parameter sets side by side: each is updated as torch's own AdamW would update it alone, and none moves another."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from looks import assert_same_state
from tiny import one_thread as one_thread
from tiny import random_interventions
from torch import Tensor

from baft import BaftConfig
from baft.engine.sets import ParameterSets
from baft_kernels import BaftIntervention, GroupedBaftIntervention, orthonormality_error, retract_after_step
from baft_kernels.backends import why_unusable
from baft_kernels.stiefel import NEAR

COUNT = 3
STEPS: list[list[int]] = [[0], [0, 2], [1], [2, 0, 1], [0, 2], [1, 2]]

Draw = dict[str, Tensor]


def update(sets: ParameterSets, chosen: Sequence[int], rate: float = 1.0) -> None:
    """A step on the chosen sets, with all that follows it."""
    distances = sets.update(chosen, sets.rates(rate)).tolist()
    sets.retract_far(chosen, [distance if math.isfinite(distance) else 0.0 for distance in distances])


def config(**changes: Any) -> BaftConfig:
    return BaftConfig(**{"rank": 4, "learning_rate": 3e-2, "gate_learning_rate": 1e-2, **changes})


def grouped_sets(count: int = COUNT, *, gate_fn: str = "sigmoid", **changes: Any) -> ParameterSets:
    """Sets on two layers, all of them alike."""
    own = random_interventions((0, 2), gate_fn=gate_fn)
    return ParameterSets({layer: GroupedBaftIntervention(i, count) for layer, i in own.items()}, config(**changes))


def leaves(sets: ParameterSets) -> dict[str, Tensor]:
    return {
        f"layers.{layer}.{name}": parameter
        for layer, intervention in sets.interventions.items()
        for name, parameter in intervention.named_parameters()
    }


def draw(sets: ParameterSets, chosen: Sequence[int], generator: torch.Generator) -> dict[int, Draw]:
    """Gradients for the chosen sets, of magnitudes that AdamW's eps can be told in."""
    of_set: dict[int, Draw] = {k: {} for k in chosen}
    for name, leaf in leaves(sets).items():
        gradient = torch.zeros_like(leaf)
        for k in chosen:
            of_set[k][name] = gradient[k] = 10 ** (-4 * torch.rand(1, generator=generator)) * torch.randn(
                leaf[k].shape, generator=generator
            )
        leaf.grad = gradient
    return of_set


class Alone:
    """One set, by torch's own optimiser."""

    def __init__(self, config: BaftConfig, gate_fn: str) -> None:
        self.interventions = random_interventions((0, 2), gate_fn=gate_fn)
        named = {
            f"layers.{layer}.{name}": p for layer, i in self.interventions.items() for name, p in i.named_parameters()
        }
        self.named = named
        gates = [p for name, p in named.items() if "gate" in name]
        others = [p for name, p in named.items() if "gate" not in name]
        rate, gate_rate = config.rates(next(iter(self.interventions.values())).basis.shape[-1])
        groups = [{"params": others, "lr": rate}, {"params": gates, "lr": gate_rate}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        bases = [i.basis for i in self.interventions.values()]
        retract_after_step(self.optimizer, bases, project_gradients=config.project_gradients)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, gradients: Draw, rate: float) -> None:
        for name, parameter in self.named.items():
            parameter.grad = gradients[name].clone()
        for group, base_rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = torch.tensor(rate * base_rate, dtype=torch.float32).item()  # as the sets have it
        self.optimizer.step()


# -- the update --


def test_a_step_moves_wide_bases_as_far_as_narrow_ones() -> None:
    distances = {}
    for width, rate_width in ((256, 256), (4096, 256), (4096, None)):
        intervention = BaftIntervention(width, 64, generator=torch.Generator().manual_seed(0))
        sets = ParameterSets({0: intervention}, BaftConfig(rate_width=rate_width))
        generator = torch.Generator().manual_seed(1)
        # Of one token: all rows alike, which takes bases farthest.
        gradient = torch.randn(64, 1, generator=generator) * torch.randn(width, generator=generator)
        for parameter in intervention.parameters():
            parameter.grad = gradient if parameter.ndim == 2 else gradient[:, 0].contiguous()
        distances[width, rate_width] = float(sets.update([0], sets.rates()))
    assert distances[4096, 256] < distances[256, 256] < 1.2 * NEAR
    assert distances[4096, 256] < NEAR < distances[4096, None]


@pytest.mark.parametrize(
    "changes",
    [{}, {"weight_decay": 0.1}, {"project_gradients": True}, {"gate_fn": "none"}, {"gate_fn": "softmax"}],
)
def test_each_set_is_updated_bit_for_bit_as_by_torchs_fused_adamw(changes: dict[str, Any]) -> None:
    sets = grouped_sets(**changes)
    own = config(**changes)
    alone = [Alone(own, own.gate_fn) for _ in range(COUNT)]
    generator = torch.Generator().manual_seed(0)
    for index, chosen in enumerate(STEPS):
        rate = 1.0 - 0.1 * index
        for k, gradients in draw(sets, chosen, generator).items():
            alone[k].step(gradients, rate)
        update(sets, chosen, rate)
        assert all(leaf.grad is None for leaf in leaves(sets).values())
    for k, other in enumerate(alone):
        moments = {
            f"optimizer.{name}.{key}": other.optimizer.state[parameter][key]
            for name, parameter in other.named.items()
            for key in ("exp_avg", "exp_avg_sq", "step")
        }
        assert_same_state(sets.state(k), {**{name: p.detach() for name, p in other.named.items()}, **moments})
        assert all(orthonormality_error(i.basis) <= 1e-6 for i in other.interventions.values())


def test_a_single_set_is_updated_alike_grouped_or_not() -> None:
    grouped, single = grouped_sets(1), ParameterSets(random_interventions((0, 2)), config())
    assert (grouped.count, single.count, single.grouped) == (1, 1, None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradients = draw(grouped, [0], generator)[0]
        for name, leaf in leaves(single).items():
            leaf.grad = gradients[name].clone()
        update(grouped, [0])
        update(single, [0])
    assert_same_state(grouped.state(), single.state())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("updated", [[0, 2], [0, 1, 2]])
def test_a_gradient_that_is_no_number_moves_no_other_set(bad: float, updated: list[int]) -> None:
    """Whether the set whose gradient it is takes part in the update or not."""
    sets, healthy = grouped_sets(), grouped_sets()
    for _ in range(2):
        for one, chosen in ((sets, [0, 1, 2]), (healthy, [0, 2])):
            draw(one, [0, 1, 2], torch.Generator().manual_seed(0))
            if one is sets:
                for leaf in leaves(one).values():
                    assert leaf.grad is not None
                    leaf.grad[1].fill_(bad)
            update(one, updated if one is sets else chosen)
    for k in (0, 2):
        assert_same_state(sets.state(k), healthy.state(k))
        assert int(sets.state(k)["optimizer.layers.0.basis.step"]) == 2


def test_sets_that_are_not_updated_keep_their_bits() -> None:
    sets = grouped_sets()
    before = [sets.state(k) for k in range(COUNT)]
    draw(sets, range(COUNT), torch.Generator().manual_seed(0))
    update(sets, [1])
    for k in (0, 2):
        assert_same_state(sets.state(k), before[k])
    changed = [name for name, value in sets.state(1).items() if not torch.equal(value, before[1][name])]
    assert changed == list(before[1])


def test_gates_learn_at_their_own_rate() -> None:
    sets = grouped_sets(gate_learning_rate=0.0)
    before = sets.parameters(0)
    draw(sets, [0], torch.Generator().manual_seed(0))
    update(sets, [0])
    changed = {name for name, value in sets.parameters(0).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "gate" not in name}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_forward_sees_each_update(backend: str) -> None:
    """What backends pack of the parameters is stale then, and after a load."""
    if why_unusable(backend) is not None:
        pytest.skip(f"{backend}: {why_unusable(backend)}")
    own = random_interventions((1,))
    own[1].backend = backend
    intervention = GroupedBaftIntervention(own[1], 2)
    sets = ParameterSets({1: intervention}, config())
    h, ids = torch.randn(2, 5, 32), torch.tensor([0, 1])

    def agrees() -> bool:
        fresh = copy.deepcopy(intervention)
        return torch.equal(intervention.edit(h, ids).out, fresh.edit(h, ids).out)

    before, start = intervention.edit(h, ids).out, sets.state(0)
    draw(sets, [0], torch.Generator().manual_seed(0))
    update(sets, [0])
    after = intervention.edit(h, ids).out
    assert agrees()
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    sets.load(start, 0)
    assert agrees()
    assert torch.equal(intervention.edit(h, ids).out, before)


# -- in and out --


def test_a_state_goes_from_one_set_to_another() -> None:
    sets, other = grouped_sets(), grouped_sets(2)
    generator = torch.Generator().manual_seed(0)
    for chosen in STEPS:
        draw(sets, chosen, generator)
        update(sets, chosen)
    state, untouched = sets.state(2), other.state(0)
    assert [key for key in state if key.startswith("optimizer.")] == list(sets.moments(2))
    other.load(state, 1)
    assert_same_state(other.state(1), state)
    assert_same_state(other.state(0), untouched)
    # And goes on there as it would have here.
    for one, k in ((sets, 2), (other, 1)):
        draw(one, [k], torch.Generator().manual_seed(1))
        update(one, [k])
    assert_same_state(other.state(1), sets.state(2))


def test_a_state_is_a_copy() -> None:
    sets = grouped_sets()
    state, kept = sets.state(1), copy.deepcopy(sets.state(1))
    draw(sets, [1], torch.Generator().manual_seed(0))
    update(sets, [1])
    assert_same_state(state, kept)


def test_moments_that_a_state_lacks_start_at_0() -> None:
    sets = grouped_sets()
    start = sets.parameters(1)
    draw(sets, range(COUNT), torch.Generator().manual_seed(0))
    update(sets, [0, 1, 2])
    sets.load(start, 1)
    assert_same_state(sets.parameters(1), start)
    assert not any(moment.any() for moment in sets.moments(1).values())
    assert all(moment.any() for moment in sets.moments(0).values())


def test_interventions_that_grow_keep_the_moments_of_their_old_bases() -> None:
    own = random_interventions((0, 2))
    sets = ParameterSets(own, config())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for leaf in leaves(sets).values():
            leaf.grad = torch.randn(leaf.shape, generator=generator)
        update(sets, [0])
    before = sets.moments(0)
    for intervention in own.values():
        intervention.grow(2, generator=generator)
    grown = sets.renewed()
    for name, moment in grown.moments(0).items():
        if name.endswith(".step"):
            assert torch.equal(moment, before[name])
            continue
        assert len(moment) == 6
        assert torch.equal(moment[:4], before[name]), name
        assert before[name].any() and not moment[4:].any(), name
    shrunk = {layer: BaftIntervention(32, 4) for layer in own}
    for layer, intervention in own.items():
        intervention.replace(dict(shrunk[layer].named_parameters()))
    assert {len(m) for name, m in grown.renewed().moments(0).items() if not name.endswith(".step")} == {4}


def test_new_interventions_are_known_to_edit_nothing() -> None:
    new = {layer: BaftIntervention(32, 4) for layer in (0, 2)}
    grouped = ParameterSets({layer: GroupedBaftIntervention(i, 2) for layer, i in new.items()}, config())
    assert ParameterSets(new, config()).are_identity() and grouped.are_identity()
    assert not grouped_sets().are_identity()
    draw(grouped, [1], torch.Generator().manual_seed(0))
    update(grouped, [1])
    assert not grouped.are_identity()
    usage = grouped.new_usage()
    assert {layer: zeros.tolist() for layer, zeros in usage.items()} == {0: [0.0] * 4, 2: [0.0] * 4}
