"""The synthetic world: the same from the same seed, and no probe about anybody an edit may look at."""

from __future__ import annotations

import random

import pytest

from baft.datasets import load_dataset
from baft.datasets.factworld import WORLDS, FactWorld
from baft.testbed.folder import RECIPES


def test_a_seed_gives_one_world() -> None:
    assert FactWorld(3).requests() == FactWorld(3).requests()
    assert FactWorld(3).corpus(random.Random(0)) == FactWorld(3).corpus(random.Random(0))
    assert FactWorld(3).requests() != FactWorld(4).requests()


def test_names_are_unique() -> None:
    people = FactWorld(0).people
    assert len({p.name for p in people}) == len({p.alias for p in people}) == len(people)


def test_edited_probed_and_pool_people_never_mix() -> None:
    world = FactWorld(1, people=60)
    edited, probed, pool = ({p.name for p in group} for group in (world.edited, world.probed, world.pool))
    assert not edited & probed and not probed & pool and not edited & pool
    assert {p.name for p in world.people} == edited | probed | pool
    about = {name: [text for text in world.unrelated() if name in text] for name in edited | probed}
    assert not any(about.values())
    for request in world.requests():
        assert request.subject in edited
        for kind in ("neighbour", "unrelated"):
            assert all(any(name in probe.prompt for name in probed) for probe in request.locality[kind])
        assert all(request.subject in probe.prompt for probe in request.locality["same_subject"])


def test_strangers_are_nobody_of_the_world_and_change_nothing_in_it() -> None:
    world, without = FactWorld(1, people=60), FactWorld(1, people=60, strangers=0)
    assert world.people == without.people and world.requests() == without.requests()
    assert world.corpus(random.Random(0)) == without.corpus(random.Random(0))
    names = {person.name for person in world.strangers}
    last_names = {name.split()[1] for name in names}
    assert len(names) == 60 and not last_names & {person.name.split()[1] for person in world.people}
    assert set(without.unrelated()) < set(world.unrelated())
    assert all(any(name in text for text in world.unrelated()) for name in names)
    with pytest.raises(ValueError, match="strangers: expected at least 0, got -1"):
        FactWorld(strangers=-1)


def test_held_out_wordings_are_for_generality_alone() -> None:
    world = FactWorld(1, people=60)
    held_out = [w for relation in world.relations for w in relation.held_out]
    shown = {*world.unrelated(), *(request.prompt for request in world.requests())}
    assert not shown & {w.format(s=person.name) for w in held_out for person in world.people}
    for request in world.requests():
        assert len(request.rephrases) == 2
        assert set(request.rephrases) <= {w.format(s=request.subject) for w in held_out}


def test_no_prompt_begins_another_answer() -> None:
    """A wording that another one begins with ("was born in", "was born in the country of") would have two answers."""
    world = FactWorld(0)
    wordings = [w for r in world.relations for w in (*r.wordings, *r.held_out, *r.hop_wordings)]
    assert not [(a, b) for a in wordings for b in wordings if a != b and b.startswith(a + " ")]


def test_an_edit_changes_the_fact_and_what_follows_from_it() -> None:
    world = FactWorld(0)
    people = {p.name: p for p in world.people}
    for request in world.requests():
        person = people[request.subject]
        relation = next(r for r in world.relations if person.facts[r.name] in request.ground_truth)
        assert request.target in world.objects[relation.name] and request.target not in request.ground_truth
        if relation.hop:
            (probe,) = request.portability["two_hop"]
            assert probe.answers == (world.hops[relation.hop][request.target],)
            assert probe.answers != (world.hops[relation.hop][request.ground_truth[0]],)


def test_every_fact_is_in_every_corpus() -> None:
    world = FactWorld(2, people=30)
    corpus = " ".join(world.corpus(random.Random(5)))
    for person in world.people:
        for relation in world.relations:
            fact = person.facts[relation.name]
            wordings = relation.wordings + relation.held_out
            sentences = [f"{w.format(s=name)} {fact}." for w in wordings for name in (person.name, person.alias)]
            assert any(sentence in corpus for sentence in sentences)


def test_it_loads_by_name() -> None:
    assert load_dataset("factworld") == FactWorld().requests()


@pytest.mark.parametrize("arguments", [{"people": 10}, {"people": 30, "edited": 0}, {"people": 30, "edited": 28}])
def test_groups_that_do_not_fit_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="people="):
        FactWorld(0, **arguments)


def test_paragraphs_say_all_about_the_person_anew() -> None:
    world, short = FactWorld(paragraphs=True), FactWorld()
    assert world.people == short.people
    people = {person.name: person for person in world.people}
    for request, plain in zip(world.requests(), short.requests(), strict=True):
        first, *told = request.target.split(". ")
        assert (request.prompt, first, request.rephrases) == (plain.prompt, plain.target, plain.rephrases)
        assert told == [f"{probe.prompt} {probe.answers[0]}" for probe in request.portability["told"]]
        facts = people[str(request.subject)].facts.values()
        assert len({first, *(probe.answers[0] for probe in request.portability["told"])} - {*facts}) == len(facts)
        assert "same_subject" not in request.locality and "same_subject" in plain.locality
    with pytest.raises(ValueError, match="edits_each: expected 1 to 1, got 2"):
        FactWorld(paragraphs=True, edits_each=2)


def test_each_world_has_a_recipe_for_its_model() -> None:
    assert RECIPES.keys() == WORLDS.keys()
