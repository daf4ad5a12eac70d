"""Draws: different numbers, each as likely as any other, and walks and samples that go on where they stopped."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from op_calls import seeded

from baft.engine import draws
from baft.engine.draws import Reservoir, Stretch, Walk, draw_indices

# -- indices --


@pytest.mark.parametrize(("population", "size"), [(5, 3), (3, 5), (5000, 5000), (5000, 40), (10**9, 40), (1, 0)])
def test_indices_are_different_ones_of_the_population(population: int, size: int) -> None:
    drawn = draw_indices(population, size, seeded())
    assert len(set(drawn)) == len(drawn) == min(population, size)
    assert all(0 <= index < population for index in drawn)
    assert drawn == draw_indices(population, size, seeded())
    if size > 3:
        assert drawn != draw_indices(population, size, seeded(1))


def test_every_selection_of_a_large_population_is_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_FEW", 0)
    generator = seeded()
    drawn = Counter(tuple(draw_indices(5, 2, generator)) for _ in range(4000))
    assert len(drawn) == 20  # ordered pairs, 200 of each within five standard deviations
    assert all(abs(count - 200) < 5 * 200**0.5 for count in drawn.values())


# -- walks --


def rows_of(stretches: list[Stretch]) -> list[int]:
    return [row for stretch in stretches for row in stretch.rows]


def test_a_walk_visits_all_rows_once_a_round_in_an_order_of_its_own() -> None:
    walk, generator = Walk(), seeded()
    walk.join(10, generator)
    rounds = [[walk.next(4, generator) for _ in range(3)] for _ in range(2)]
    for stretches in rounds:
        assert [len(stretch.rows) for stretch in stretches] == [4, 4, 2]
        assert sorted(rows_of(stretches)) == list(range(10))
        assert [stretch.first for stretch in stretches] == [True, False, False]
        assert [stretch.last for stretch in stretches] == [False, False, True]
    assert rows_of(rounds[0]) != rows_of(rounds[1])


def test_a_walk_goes_on_where_it_stopped_after_what_is_new() -> None:
    walk, generator = Walk(), seeded()
    walk.join(10, generator)
    before = walk.next(4, generator)
    walk.join(13, generator)
    rest = [walk.next(3, generator) for _ in range(3)]
    assert sorted(rest[0].rows) == [10, 11, 12]
    assert sorted(rows_of([before, *rest])) == list(range(13))
    assert not any(stretch.first or stretch.last for stretch in rest)  # nobody saw this round whole
    whole = walk.next(13, generator)
    assert (sorted(whole.rows), whole.first, whole.last) == (list(range(13)), True, True)


def test_rows_that_are_gone_are_not_visited() -> None:
    walk, generator = Walk(), seeded()
    walk.join(10, generator)
    walk.next(2, generator)
    walk.join(5, generator)
    rest = walk.next(10, generator)
    assert set(rest.rows) <= set(range(5))
    assert sorted(walk.next(10, generator).rows) == list(range(5))


def test_a_walk_is_taken_back_to_a_mark() -> None:
    walk, generator = Walk(), seeded()
    walk.join(6, generator)
    walk.next(4, generator)
    mark, drawn = walk.mark(), generator.get_state()
    expected = [walk.next(4, generator) for _ in range(3)]
    walk.back_to(mark)
    generator.set_state(drawn)
    assert [walk.next(4, generator) for _ in range(3)] == expected


def test_a_walk_goes_on_from_its_state() -> None:
    walk, generator = Walk(), seeded()
    walk.join(10, generator)
    walk.next(4, generator)
    again, drawn = Walk(), generator.get_state()
    again.load_state({name: tensor.clone() for name, tensor in walk.state().items()})
    generators = generator, seeded()
    generators[1].set_state(drawn)
    results = []
    for one, of in zip((walk, again), generators, strict=True):
        one.join(12, of)
        results.append([one.next(5, of) for _ in range(5)])
    assert results[0] == results[1]


# -- samples --


def test_a_reservoir_holds_all_rows_while_they_fit() -> None:
    reservoir = Reservoir(4)
    reservoir.join(3, seeded())
    assert sorted(reservoir.rows) == [0, 1, 2]
    reservoir.join(50, seeded())
    assert len(set(reservoir.rows)) == 4
    assert all(0 <= row < 50 for row in reservoir.rows)


def test_each_row_is_as_likely_in_a_reservoir_as_any_other() -> None:
    generator, held = seeded(), Counter[int]()
    for _ in range(2000):
        reservoir = Reservoir(3)
        for count in (2, 5, 6, 10):  # it doesn't matter in what steps a history grows
            reservoir.join(count, generator)
        held.update(reservoir.rows)
    assert len(held) == 10
    assert all(abs(count - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for count in held.values())


def test_a_reservoir_goes_on_from_its_state_and_forgets_what_is_gone() -> None:
    reservoir, again = Reservoir(3), Reservoir(3)
    reservoir.join(8, seeded())
    again.load_state({name: tensor.clone() for name, tensor in reservoir.state().items()})
    for one in (reservoir, again):
        one.join(30, seeded(1))
    assert again.rows == reservoir.rows
    assert all(torch.equal(value, reservoir.state()[name]) for name, value in again.state().items())
    reservoir.join(2, seeded())
    assert set(reservoir.rows) <= {0, 1}
