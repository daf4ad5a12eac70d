"""What the unedited model says of an edit's subject: of the edited fact it shall say otherwise, and all else again."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

from baft.engine.continuations import Asked, Continuations
from baft.engine.encoding import Encoded, Encoder, Tokens, Words

__all__ = ["WRITTEN_AHEAD", "Surroundings"]

WRITTEN_AHEAD = 64
"""Requests that texts are written for together, where more are known than the next."""

# What takes a tokenizer to find out is remembered, a little of each of so many requests, so that no step waits for it.
# The texts themselves, ten times as much, are left to who keeps them.
_REMEMBERED = 1 << 16
# And of so many retellings the words, which only those behind other texts need.
_WORDS = 1 << 13

# Where an answer ends, as other texts are searched for it: at any mark, whether or not a sentence ends there. The marks
# of Chinese and Japanese too.
_END = re.compile("[.,;:!?\n\u3002\uff0c\uff1b\uff1a\uff01\uff1f]")


class _Choice(NamedTuple):
    """What a request makes of the texts about its subject, by their numbers.

    Attributes:
        staying: those that tell of no edit.
        telling: those that tell of its own fact and of no other edit, each with the column where the old answer begins.
    """

    staying: tuple[int, ...]
    telling: tuple[tuple[int, int], ...]


class Surroundings:
    """Texts about the subjects of edits, written by the unedited model.

    A text begins with the subject, goes on with one of the model's likeliest next tokens, another for each text, and
    then greedily. One that has the model's own answer to an edit's prompt in it tells of a fact that is edited, this
    one or another of the same subject, and can't stay as it is. Up to that answer it is the model's own rephrasing of
    the edit's prompt, which the target should follow too.

    Args:
        continuations: the model's.
        encoder: knows the tokens.
        count: texts of each subject, at most.
        limit: how many tokens a request in other words may have, as the model has no more positions.
    """

    def __init__(self, continuations: Continuations, encoder: Encoder, count: int, limit: int | None = None) -> None:
        self._continuations = continuations
        self._encoder = encoder
        self._count = count
        self._limit = limit
        self._name_in = lru_cache(_REMEMBERED)(self._read_name)
        self._answer_in = lru_cache(_REMEMBERED)(self._cut_to_answer)
        self._chosen = lru_cache(_REMEMBERED)(self._choose)
        self._start = lru_cache(_REMEMBERED)(self._encode)
        self._spaced = lru_cache(_REMEMBERED)(self._is_spaced)
        self._said = lru_cache(_WORDS)(self._say)
        # By subject, the prompts of all edits of ``_known``, as far as they have been looked at.
        self._asked: dict[str, set[Tokens]] = {}
        self._known: Sequence[Encoded] = ()
        self._seen = 0
        self._last: Encoded | None = None
        # Those being made: subjects and prompts.
        self._new: set[tuple[str, Tokens]] = set()

    def know(self, edits: Sequence[Encoded], new: Sequence[Encoded] = ()) -> None:
        """Be told all edits that there are.

        Args:
            edits: those so far: a list that may have grown since the last time, or another.
            new: those that are being made.
        """
        if not self._count:
            return
        if edits is not self._known or len(edits) < self._seen or (self._seen and edits[self._seen - 1] != self._last):
            self._asked.clear()
            self._known, self._seen = edits, 0
        for row in edits[self._seen :]:
            self._asked.setdefault(self._subject(row), set()).add(row.ids[: row.prompt_length])
        self._seen = len(edits)
        self._last = edits[-1] if edits else None
        self._new = {(self._subject(row), row.ids[: row.prompt_length]) for row in new}

    def write_ahead(self, rows: Sequence[Encoded]) -> None:
        """Have the model write together what will be asked for of these requests."""
        subjects = {row: self._subject(row) for row in rows} if self._count else {}
        asked = [Asked(row.ids[: row.prompt_length]) for row, subject in subjects.items() if subject]
        self._continuations.write([*asked, *(self._asked_of(subject) for subject in subjects.values() if subject)])

    def forget(self) -> None:
        """The model has changed: what it said is no longer what it says."""
        self._continuations.forget()

    def of(self, row: Encoded) -> tuple[Encoded, ...]:
        """The texts about a request's subject that tell of no edit; none if it has no subject."""
        subject = self._subject(row) if self._count else ""
        if not subject:
            return ()
        branches = self._branches(subject)
        return tuple(self._text_about(subject, branches[k]) for k in self._choice(row, subject, branches).staying)

    def all_about(self, subject: str) -> tuple[Encoded, ...]:
        """All texts about a subject, whatever they tell of it."""
        return tuple(self._text_about(subject, branch) for branch in self._branches(subject))

    def retold(self, row: Encoded) -> tuple[Encoded, ...]:
        """The texts that tell of a request's fact and of no other edit, each with the target instead of the old answer.

        Like ``row`` they are prompts with what shall follow. There are none of a later chunk of a target, none if
        another edit of the subject has the same old answer, and none in which the target would follow with a space
        where it follows the request's prompt without, or the other way round; nor any that the model is too short for.
        """
        subject = self._subject(row) if self._count and not row.given else ""
        if not subject:
            return ()
        branches, span = self._branches(subject), self._start(subject).subject
        found = []
        for number, column in self._choice(row, subject, branches).telling:
            told = branches[number][:column]
            ids = (*told, *row.ids[row.prompt_length :])
            if self._limit is None or len(ids) <= self._limit:
                found.append(Encoded(ids, column, span, words=self._words(told, row)))
        return tuple(found)

    def _choice(self, row: Encoded, subject: str, branches: Sequence[Tokens]) -> _Choice:
        prompt = row.ids[: row.prompt_length]
        others = frozenset(map(self._answer, self._prompts(subject) - {prompt}))
        return self._chosen(subject, self._answer(prompt), others, self._spaced(row), hash(tuple(branches)))

    def _choose(self, subject: str, answer: str, others: Collection[str], spaced: bool, written: int) -> _Choice:
        """Look through all texts about a subject.

        Args:
            answer: what the unedited model answers to the request's prompt; "" is none.
            others: what it answers to those of other edits of the subject.
            spaced: whether a space stands before the request's target.
            written: a sum of the texts, which may be others after the model has changed.
        """
        branches = self._branches(subject)
        texts = [self._told_by(branch, subject) for branch in branches]
        edited = [known for known in (answer, *others) if known]
        staying = tuple(k for k, text in enumerate(texts) if not any(known in text for known in edited))
        telling = []
        for number, (branch, text) in enumerate(zip(branches, texts, strict=True)):
            if not answer or answer in others or answer not in text:
                continue
            column = self._column(branch, text, subject, answer, spaced)
            if column is not None:
                told = self._told_by(branch[:column], subject)
                if not any(other and other in told for other in others):
                    telling.append((number, column))
        return _Choice(staying, tuple(telling))

    def _words(self, told: Tokens, row: Encoded) -> Words | None:
        """A retelling as a prompt and target in words; None if a template stands in it, which none would know."""
        if row.words is None or self._encoder.has_template:
            return None
        return self._said(told, row.words.target, self._subject(row))

    def _say(self, told: Tokens, target: str, subject: str) -> Words | None:
        """The subject as the tokenizer writes it: it may know no capitals."""
        text = self._text(told)
        return Words(text, target, subject) if subject in text else None

    def _prompts(self, subject: str) -> set[Tokens]:
        """The prompts of all edits of a subject."""
        return {*self._asked.get(subject, ()), *(prompt for about, prompt in self._new if about == subject)}

    def _told_by(self, branch: Tokens, subject: str) -> str:
        """What a text says of its subject, without naming it, and without regard to case."""
        return self._text(branch).casefold()[len(self._text(self._start(subject).ids).casefold()) :]

    def _column(self, branch: Tokens, whole: str, subject: str, answer: str, spaced: bool) -> int | None:
        """Where an answer begins in a text, in words of its own, ``spaced`` from what is before or not; else None.

        Args:
            whole: what the text says of its subject, the answer somewhere in it.
        """
        for column in range(len(self._start(subject).ids), len(branch)):
            told = self._told_by(branch[:column], subject)
            left = whole.removeprefix(told)
            rest = left.lstrip()
            if whole.startswith(told) and rest.startswith(answer) and not _goes_on(rest[len(answer) :]):
                return column if spaced == (left != rest) else None
        return None

    def _is_spaced(self, row: Encoded) -> bool:
        """Whether a space stands between a request's prompt and its target."""
        prompt = self._text(row.ids[: row.prompt_length])
        return self._text(row.ids).removeprefix(prompt)[:1].isspace()

    def _subject(self, row: Encoded) -> str:
        """ "" if it has none."""
        return "" if row.subject is None else self._name_in(row.ids[slice(*row.subject)])

    def _read_name(self, ids: Tokens) -> str:
        return self._text(ids).strip()

    def _asked_of(self, subject: str) -> Asked:
        return Asked(self._start(subject).ids, self._count)

    def _branches(self, subject: str) -> list[Tokens]:
        """All texts about a subject."""
        return self._continuations.of(self._asked_of(subject))

    def _text_about(self, subject: str, branch: Tokens) -> Encoded:
        return Encoded(branch, len(branch), self._start(subject).subject, about=subject)

    def _answer(self, prompt: Tokens) -> str:
        """What the unedited model answers to an edit's prompt."""
        (known,) = self._continuations.of(Asked(prompt))
        return self._answer_in(known[len(prompt) :])

    def _cut_to_answer(self, said: Tokens) -> str:
        return _END.split(self._text(said).strip(), maxsplit=1)[0].strip().casefold()

    def _encode(self, subject: str) -> Encoded:
        return self._encoder.prompt(subject, subject)

    def _text(self, ids: Tokens) -> str:
        return str(self._encoder.tokenizer.decode(list(ids), skip_special_tokens=True))


def _goes_on(text: str) -> bool:
    """Whether a word goes on with ``text``; scripts without spaces between words don't tell."""
    return text[:1].isalnum() and unicodedata.category(text[0]) != "Lo"
