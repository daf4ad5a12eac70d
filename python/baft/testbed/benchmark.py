"""What a model must know before a benchmark's records can be edited on it: the facts as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from baft.evaluation.probes import old_answers
from baft.requests import EditRequest, Probe
from baft.testbed.training import TestbedRecipe
from baft.testbed.wordings import SLOT, Statement, Wordings

__all__ = ["RECIPE", "BenchmarkKnowledge"]

# Facts in varied words take more epochs than FactWorld's: 600 records of CounterFact were known whole after 41.
RECIPE = TestbedRecipe(max_epochs=50)

# How often a varied text starts with unrelated words, where the benchmark's own rephrasings do.
_PREFIXED = 0.5


@dataclass(frozen=True)
class _Fact:
    """One old fact: the benchmark's own texts of it and, where these come apart, all wordings for its subject."""

    answer: str
    texts: tuple[str, ...]
    subject: str = ""
    wordings: tuple[str, ...] = ()


class BenchmarkKnowledge:
    """The old facts of some benchmark records, as something to train on.

    These are each request's prompt and rephrasings with the old answer, and its locality prompts with their answers.
    Portability questions have answers that hold after the edit only, and are left out. Where a prompt stands in several
    records, its first answer is the fact. Each epoch says a fact once as the benchmark does and once in a wording drawn
    from those that mean the same (``baft.testbed.wordings``), so that the model learns facts and not texts.

    Attributes:
        passed_over: requests without an old answer (``old_answers``): of these the model learns the locality alone.

    Raises:
        ValueError: if no request has one (ZsRE's do, as ``answers``; WikiBigEdit's don't): the model would know nothing
            of what is to be edited.
    """

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        self.passed_over = sum(not old_answers(request) for request in requests)
        if self.passed_over == len(requests):
            raise ValueError(
                f"dataset: expected records with a ground truth, which is what the model is to know of their prompts "
                f"before they are edited, got {len(requests)} that have none other than their target"
            )
        self._wordings = Wordings(requests)
        self._facts = tuple(_without_repeated_texts(self._old_facts(requests)))

    def corpus(self, draw: random.Random) -> list[str]:
        texts = [text for fact in self._facts for text in self._tellings(fact, draw)]
        draw.shuffle(texts)
        return texts

    def questions(self) -> list[Probe]:
        return [Probe(prompt=text, answers=(fact.answer,)) for fact in self._facts for text in fact.texts]

    def _tellings(self, fact: _Fact, draw: random.Random) -> Iterator[str]:
        """One of the benchmark's texts, or all of them where there is no other wording; and a varied one."""
        if not fact.wordings:
            yield from (f"{text} {fact.answer}." for text in fact.texts)
            return
        yield f"{draw.choice(fact.texts)} {fact.answer}."
        prefix = draw.choice(self._wordings.prefixes or ("",)) if draw.random() < _PREFIXED else ""
        yield f"{prefix}{draw.choice(fact.wordings).replace(SLOT, fact.subject)} {fact.answer}."

    def _old_facts(self, requests: Sequence[EditRequest]) -> Iterator[_Fact]:
        for request in requests:
            if answers := old_answers(request):
                texts = (request.prompt, *request.rephrases)
                known = self._wordings.of_subject(request.prompt, request.subject) if request.subject else None
                yield self._fact(answers[0], texts, known)
            for probe in (probe for probes in request.locality.values() for probe in probes):
                if probe.answers:
                    yield self._fact(probe.answers[0], (probe.prompt,), self._wordings.of_any_subject(probe.prompt))

    def _fact(self, answer: str, texts: tuple[str, ...], known: Statement | None) -> _Fact:
        if known is None:
            return _Fact(answer, texts)
        return _Fact(answer, texts, known.subject, self._wordings.siblings[known.wording])


def _without_repeated_texts(facts: Iterator[_Fact]) -> Iterator[_Fact]:
    said: set[str] = set()
    for fact in facts:
        texts = tuple(text for text in dict.fromkeys(fact.texts) if text not in said)
        said.update(texts)
        if texts:
            yield replace(fact, texts=texts)
