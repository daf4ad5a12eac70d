"""The questions that measure an edit, and what the model said to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from baft.evaluation.matching import matches, normalise
from baft.requests import EditRequest, Probe

__all__ = ["ASKED", "MEASURES", "Measure", "ProbeResult", "Question", "old_answers", "questions"]

Measure = Literal["reliability", "generality", "locality", "portability"]
MEASURES: tuple[Measure, ...] = ("reliability", "generality", "locality", "portability")

ASKED: dict[Measure, str] = {"reliability": "prompts", "generality": "rephrasings", "locality": "locality questions"}
"""What the questions of a measure are called, of those that benchmarks know an answer to from before the edit."""


@dataclass(frozen=True)
class Question:
    """One prompt put to the model for one measure of one request.

    Attributes:
        kind: the probe's kind within its measure ("neighbour"), or the measure's own name.
        answers: accepted answers; for locality the benchmark's, which teacher forcing uses.
        subject: the edited subject where it stands in the prompt, else None.
        group: questions of one request with the same group count once, as right if any is right.
        was: what a model answers that knows the world as it was before the edit; empty where the benchmark doesn't say.
    """

    measure: Measure
    kind: str
    prompt: str
    answers: tuple[str, ...]
    subject: str | None = None
    group: str | None = None
    was: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProbeResult:
    """What came of a question.

    Attributes:
        text: what the model generated.
        before: what the unedited model generated.
        generation: whether ``text`` answers rightly: with an accepted answer, or for locality as ``before`` did.
        token: teacher-forced share of right tokens, or None if there is no answer to force.
        sequence: teacher-forced, whether all tokens are right; None likewise.
    """

    question: Question
    text: str
    before: str
    generation: bool
    token: float | None
    sequence: bool | None

    @property
    def known(self) -> bool | None:
        """Whether the unedited model knew what was asked as it was, by generation; None where nobody says how it was.

        A model that didn't recognise its own fact in a rephrasing can't be expected to find the new one there.
        """
        return matches(self.before, self.question.was) if self.question.was else None


def old_answers(request: EditRequest) -> tuple[str, ...]:
    """What a model goes on with after the prompt that knows the world as it was; empty where the record doesn't say.

    A target that is true already is no new answer, and then nobody says what the old one is: more than a hundred of
    ZsRE's 3,000 records are such.
    """
    wanted = set(map(normalise, request.accepted))
    return () if any(normalise(answer) in wanted for answer in request.ground_truth) else request.ground_truth


def questions(request: EditRequest) -> Iterator[Question]:
    """Every question that ``request`` can be measured by; a measure without any is later reported as null."""

    def ask(measure: Measure, kind: str, probe: Probe, was: tuple[str, ...]) -> Question:
        subject = request.subject if request.subject and request.subject in probe.prompt else None
        return Question(measure, kind, probe.prompt, probe.answers, subject, probe.group, was)

    new, old = request.accepted, old_answers(request)
    yield ask("reliability", "reliability", Probe(prompt=request.prompt, answers=new), old)
    for prompt in request.rephrases:
        yield ask("generality", "generality", Probe(prompt=prompt, answers=new), old)
    for kind, probes in request.locality.items():
        for probe in probes:
            yield ask("locality", kind, probe, probe.answers)
    for kind, probes in request.portability.items():
        for probe in probes:
            yield ask("portability", kind, probe, ())
