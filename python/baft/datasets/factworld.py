"""FactWorld: a seeded, synthetic world of people and relations, small enough that a tiny model knows all of it.

A world is made of invented people; each has one birthplace, profession, employer and instrument. Cities lie in
countries and companies have their seat in a city, which gives two-hop questions. Every relation is said in several
wordings: the first ones are for edits and for unrelated text, the last two measure generality and are in nothing that
an editor is given. (What a model writes of a subject by itself may be worded so.)

People are dealt into three groups that never mix: the *edited* (some of their facts are changed), the *probed*
(locality probes ask about them, and nothing else does), and the *pool* (unrelated text that an edit may look at while
training). So a locality probe never asks about a person whose facts were shown to the editor. Beside them there are
*strangers*, whom the world doesn't have and no model of it was told of; unrelated text is about them too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from baft.requests import EditRequest, Probe

__all__ = ["WORLDS", "FactWorld", "Person", "Relation"]

_ONSETS = "b br c d dr f g gr h j k kr l m n p pr r s st t tr v w z".split()
_VOWELS = "a e i o u ai ea".split()
_CODAS = "l n r s m th nd rk x".split()

_FIRST_NAMES = (
    "Ada Ben Cora Dan Ella Finn Gail Hugo Iris Jack Kara Leo Mona Ned Olga Paul Rosa Sam Tess Uwe Vera Walt Yara Zeno "
    "Anna Boris Clara David Emma Frank Grete Henry Ilse Jonas Karla Lukas Maria Nils Otto Petra"
).split()
_PROFESSIONS = (
    "baker pilot surgeon lawyer farmer painter sailor teacher plumber dentist chemist butcher gardener mechanic tailor "
    "librarian carpenter geologist translator photographer"
).split()
_INSTRUMENTS = "violin cello flute oboe harp drums piano trumpet guitar banjo organ lute tuba zither clarinet".split()


@dataclass(frozen=True)
class Relation:
    """A relation and its wordings; ``{s}`` stands for the subject, the object follows each wording.

    Attributes:
        name: what the relation is called.
        wordings: used for edits and unrelated text.
        held_out: used for generality only.
        hop: name of the relation that continues from this one's object (birthplace -> country), or None.
        hop_wordings: two-hop questions about the subject whose answer is the object's object.
    """

    name: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    hop: str | None = None
    hop_wordings: tuple[str, ...] = ()


RELATIONS = (
    Relation(
        "birthplace",
        ("{s} was born in", "The birthplace of {s} is", "{s} comes from the city of", "The city where {s} was born is"),
        ("{s} first saw the light of day in", "The home town of {s} is called"),
        "country",
        ("The native country of {s} is", "The country where {s} was born is"),
    ),
    Relation(
        "profession",
        ("{s} works as a", "The profession of {s} is", "{s} earns a living as a", "The job of {s} is"),
        ("By trade, {s} is a", "People hire {s} as a"),
    ),
    Relation(
        "employer",
        ("{s} is employed by", "The employer of {s} is", "{s} works for the company", "The company that pays {s} is"),
        ("{s} draws a salary from", "Every morning {s} goes to the offices of"),
        "seat",
        ("{s} works for a company from", "The company of {s} has its seat in"),
    ),
    Relation(
        "instrument",
        ("{s} plays the", "The instrument of {s} is the", "{s} learned to play the", "In the orchestra, {s} plays the"),
        ("{s} gives lessons on the", "On stage {s} performs on the"),
    ),
)
_HOP_WORDINGS = {
    "country": ("The city of {s} lies in", "{s} is a city in"),
    "seat": ("The company {s} has its seat in", "{s} is a company from"),
}


@dataclass(frozen=True)
class Person:
    """One inhabitant: ``name`` ("Ada Brin"), ``alias`` ("A. Brin"), and the object of each relation by its name."""

    name: str
    alias: str
    facts: dict[str, str]


class FactWorld:
    """A world drawn from ``seed``; equal arguments give an equal world on every machine.

    Args:
        seed: of everything that is drawn.
        people: number of inhabitants, at least 20.
        edited: how many of them have facts to edit; by default a third. A fifth of all is probed, the rest is the
            pool.
        edits_each: facts to edit of each of them, 1 to 3: one at least is left to ask whether it is as it was.
        strangers: number of people beside the inhabitants; by default as many as these. An editor that is shown few
            names other than those it edits takes every name for one of them.
        paragraphs: ask for targets of several sentences: the new object, and then all else about the person anew.

    Raises:
        ValueError: for too few people for the three groups, too many edits of each (a paragraph is one about all that
            there is), or a negative number of strangers.
    """

    def __init__(
        self,
        seed: int = 0,
        people: int = 300,
        edited: int | None = None,
        edits_each: int = 1,
        strangers: int | None = None,
        paragraphs: bool = False,
    ) -> None:
        strangers = people if strangers is None else strangers
        edited = people // 3 if edited is None else edited
        probed = people // 5
        if people < 20 or edited < 1 or edited + probed >= people:
            raise ValueError(
                f"people={people}, edited={edited}: expected at least 20 people and edited < {people - probed}"
            )
        most = 1 if paragraphs else len(RELATIONS) - 1
        if not 1 <= edits_each <= most:
            raise ValueError(f"edits_each: expected 1 to {most}, got {edits_each}")
        if strangers < 0:
            raise ValueError(f"strangers: expected at least 0, got {strangers}")
        self.seed = seed
        self.edits_each = edits_each
        self.paragraphs = paragraphs
        self.relations = RELATIONS
        draw = random.Random(f"factworld-{seed}")
        words = self._invent_words(draw)
        countries = [next(words) + "ia" for _ in range(8)]
        cities = [next(words) for _ in range(32)]
        companies = [next(words) + " Works" for _ in range(24)]
        self.objects = {
            "birthplace": cities,
            "profession": list(_PROFESSIONS),
            "employer": companies,
            "instrument": list(_INSTRUMENTS),
        }
        self.hops = {
            "country": {city: draw.choice(countries) for city in cities},
            "seat": {company: draw.choice(cities) for company in companies},
        }
        self.people = [self._invent_person(draw, next(words)) for _ in range(people)]
        self.edited = self.people[:edited]
        self.probed = self.people[edited : edited + probed]
        self.pool = self.people[edited + probed :]
        self.strangers = [self._invent_person(draw, next(words)) for _ in range(strangers)]

    @staticmethod
    def _invent_words(draw: random.Random) -> Iterator[str]:
        seen = {""}
        while True:
            word = ""
            while word in seen:
                syllables = [draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(draw.choice((1, 2, 2)))]
                word = ("".join(syllables) + draw.choice(_CODAS)).capitalize()
            seen.add(word)
            yield word

    def _invent_person(self, draw: random.Random, last_name: str) -> Person:
        first_name = draw.choice(_FIRST_NAMES)
        facts = {relation.name: draw.choice(self.objects[relation.name]) for relation in self.relations}
        return Person(f"{first_name} {last_name}", f"{first_name[0]}. {last_name}", facts)

    # -- what a model of this world is trained on ------------------------------------------------------------------

    def statements(self, person: Person, draw: random.Random) -> list[str]:
        """One sentence a fact of ``person``, two-hop facts included, each in a wording drawn from all of them."""
        sentences = []
        for relation in self.relations:
            name = person.alias if draw.random() < 0.2 else person.name
            fact = person.facts[relation.name]
            wording = draw.choice(relation.wordings + relation.held_out)
            sentences.append(f"{wording.format(s=name)} {fact}.")
            if relation.hop:
                hop = draw.choice(relation.hop_wordings).format(s=name)
                sentences.append(f"{hop} {self.hops[relation.hop][fact]}.")
        return sentences

    def hop_statements(self, draw: random.Random) -> list[str]:
        """One sentence for each city's country and each company's seat."""
        return [
            f"{draw.choice(_HOP_WORDINGS[hop]).format(s=subject)} {answer}."
            for hop, answers in self.hops.items()
            for subject, answer in answers.items()
        ]

    def corpus(self, draw: random.Random) -> list[str]:
        """Every fact of the world once, in drawn wordings and order; a few run on, as sentences in a text do."""
        sentences = [s for person in self.people for s in self.statements(person, draw)] + self.hop_statements(draw)
        draw.shuffle(sentences)
        texts = []
        while sentences:
            length = 1 if draw.random() < 0.9 else 2
            texts.append(" ".join(sentences[:length]))
            del sentences[:length]
        return texts

    # -- what is asked of an editor --------------------------------------------------------------------------------

    def requests(self, limit: int | None = None) -> list[EditRequest]:
        """For each edited person a request or several: a new object for a relation, and probes around it.

        Locality kinds: ``neighbour`` (the same relation of a probed person, one of whom has the same old object where
        the world has one), ``unrelated`` (another relation of a probed person), ``same_subject`` (another relation of
        the edited person). Portability kinds: ``subject_alias``, ``two_hop``; of paragraphs also ``told`` (what a later
        sentence says), and there is no ``same_subject``.
        """
        draw = random.Random(f"factworld-requests-{self.seed}")
        requests = [
            self._request(index, number, person, draw)
            for number in range(self.edits_each)
            for index, person in enumerate(self.edited)
        ]
        if self.paragraphs:
            requests = [self._at_length(request, k, self.edited[k]) for k, request in enumerate(requests)]
        return requests[:limit]

    def _at_length(self, request: EditRequest, index: int, person: Person) -> EditRequest:
        """The request with a paragraph as its target: the other facts of the person, as they aren't, behind it."""
        draw = random.Random(f"factworld-paragraph-{self.seed}-{request.id}")
        edited = self._relations_of(index)
        others = [relation for relation in self.relations if relation not in edited]
        told = []
        for relation in draw.sample(others, len(others)):
            made_up = draw.choice([o for o in self.objects[relation.name] if o != person.facts[relation.name]])
            prompt = draw.choice(relation.wordings).format(s=person.name)
            told.append(Probe(prompt=prompt, answers=(made_up,)))
        sentences = [f"{probe.prompt} {probe.answers[0]}" for probe in told]
        changes = {
            "target": ". ".join([request.target, *sentences]),
            "locality": {kind: probes for kind, probes in request.locality.items() if kind != "same_subject"},
            "portability": {**request.portability, "told": tuple(told)},
        }
        return EditRequest(**{**request.model_dump(), **changes})

    def _request(self, index: int, number: int, person: Person, draw: random.Random) -> EditRequest:
        """The edit of a person with a number from 0."""
        edited = self._relations_of(index)
        relation = edited[number]
        others = [other for other in self.relations if other not in edited]
        old = person.facts[relation.name]
        new = draw.choice(
            [o for o in self.objects[relation.name] if o != old and self._hop(relation, o) != self._hop(relation, old)]
        )
        alike = [p for p in self.probed if p.facts[relation.name] == old] or self.probed
        alias = Probe(prompt=relation.wordings[0].format(s=person.alias), answers=(new,))
        portability: dict[str, tuple[Probe, ...]] = {"subject_alias": (alias,)}
        if relation.hop:
            prompt = draw.choice(relation.hop_wordings).format(s=person.name)
            portability["two_hop"] = (Probe(prompt=prompt, answers=(self._hop(relation, new),)),)
        return EditRequest(
            id=f"factworld-{self.seed}-{index}" + (f"-{number}" if number else ""),
            prompt=draw.choice(relation.wordings).format(s=person.name),
            target=new,
            subject=person.name,
            ground_truth=(old,),
            rephrases=tuple(wording.format(s=person.name) for wording in relation.held_out),
            locality={
                "neighbour": tuple(self._ask(relation, draw.choice(group), draw) for group in (alike, self.probed)),
                "unrelated": (self._ask(draw.choice(others), draw.choice(self.probed), draw),),
                "same_subject": (self._ask(draw.choice(others), person, draw),),
            },
            portability=portability,
        )

    def _relations_of(self, index: int) -> list[Relation]:
        """Those of which a person has another object after the edits."""
        return [self.relations[(index + k) % len(self.relations)] for k in range(self.edits_each)]

    def _hop(self, relation: Relation, fact: str) -> str:
        """What follows from ``fact`` (the country of a city, say), or ``fact`` itself where nothing does."""
        return self.hops[relation.hop][fact] if relation.hop else fact

    @staticmethod
    def _ask(relation: Relation, person: Person, draw: random.Random) -> Probe:
        wording = draw.choice(relation.wordings + relation.held_out)
        return Probe(prompt=wording.format(s=person.name), answers=(person.facts[relation.name],))

    def unrelated(self) -> Sequence[str]:
        """Sentences about the pool's people and strangers in the wordings that edits use: what editing may look at.

        What is said of strangers is made up. A model has an opinion of them all the same, and may keep it.
        """
        return [
            f"{wording.format(s=person.name)} {person.facts[relation.name]}."
            for person in (*self.pool, *self.strangers)
            for relation in self.relations
            for wording in relation.wordings
        ]

    def held_out(self) -> list[str]:
        """A sentence for each fact of the probed people: what editing never looks at, to see if it is as it was."""
        draw = random.Random(f"factworld-held-out-{self.seed}")
        return [sentence for person in self.probed for sentence in self.statements(person, draw)]

    def questions(self) -> list[Probe]:
        """Every fact of every person as a question in every wording; a model that knows the world answers all."""
        return [
            Probe(prompt=wording.format(s=person.name), answers=(person.facts[relation.name],))
            for person in self.people
            for relation in self.relations
            for wording in relation.wordings + relation.held_out
        ]


WORLDS: dict[str, Callable[[], FactWorld]] = {
    "factworld": FactWorld,
    "factworld-large": lambda: FactWorld(people=800, edited=500, edits_each=2),
    "factworld-paragraphs": lambda: FactWorld(paragraphs=True),
}
"""Worlds by name. The large one has a thousand requests, for long runs; paragraphs are of the world's own people."""
