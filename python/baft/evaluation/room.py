"""How long answers may get, and whether the model has room for all that it will be asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import shorten

from baft.editing import Editor
from baft.engine.encoding import Encoder, most_tokens
from baft.evaluation.fluency import FREE_TOKENS, free_prompts
from baft.evaluation.probes import questions
from baft.requests import EditRequest, numbered

__all__ = ["ANSWER_TOKENS", "check_room", "tokens_needed"]

ANSWER_TOKENS = 16
"""Tokens of a generated answer, at most, where none that is accepted needs more."""

# Tokens behind the longest accepted answer, so that a text can end there, or show that it doesn't.
_TO_END = 4


def tokens_needed(encoder: Encoder, requests: Sequence[EditRequest]) -> int:
    """Tokens that a generated answer to a question about ``requests`` may need, at most.

    It is one number for all of them, so that a text is the same whoever asks for it. A benchmark's answers to locality
    questions don't count: what is generated there is held against what the unedited model generates.
    """
    asked = (question for request in requests for question in questions(request) if question.measure != "locality")
    accepted = {answer for question in asked for answer in question.answers}
    longest = max((len(encoder.following(f" {answer}")) for answer in accepted), default=0)
    return max(ANSWER_TOKENS, longest + _TO_END)


def check_room(editor: Editor, requests: Sequence[EditRequest], answer_tokens: int, *, fluency: bool = False) -> None:
    """Make sure that each question about ``requests`` and its answer are no longer than what the model takes.

    Args:
        answer_tokens: of a generated answer, at most.
        fluency: whether it will also be asked for free texts.

    Raises:
        ValueError: for the first one that is too long.
    """
    limit = most_tokens(editor.model)
    if limit is None:
        return
    for number, request in enumerate(requests):
        for what, prompt, asked, following in _lengths(editor.encoder, request, answer_tokens, fluency):
            if asked + following > limit:
                raise ValueError(
                    f"{_named(number, request)}: expected at most {limit} tokens, as the model takes no more, got "
                    f"{asked} of {what} {shorten(prompt, 80)!r} and {following} to follow"
                    + _whose_answer(editor.encoder, requests, number, following)
                )


def _named(number: int, request: EditRequest) -> str:
    return f"{numbered(number, request)}, {shorten(request.prompt, 80)!r}"


def _whose_answer(encoder: Encoder, requests: Sequence[EditRequest], number: int, tokens: int) -> str:
    """In words, whose answer needs so many tokens, where that isn't the request with this number itself."""
    needing = [n for n, request in enumerate(requests) if tokens_needed(encoder, [request]) == tokens]
    if tokens == ANSWER_TOKENS or not needing or number in needing:
        return ""
    return f", as many as the longest answer of {_named(needing[0], requests[needing[0]])} needs"


def _lengths(
    encoder: Encoder, request: EditRequest, answer_tokens: int, fluency: bool
) -> Iterator[tuple[str, str, int, int]]:
    """Of each text that the model is asked to continue: what it is, itself, its tokens, and those that follow."""
    for question in questions(request):
        if question.answers:
            row = encoder.pair(question.prompt, question.answers[0], append_eos=False)
        else:
            row = encoder.prompt(question.prompt)
        asked, forced = row.prompt_length, len(row.ids) - row.prompt_length
        yield f"the {question.measure} question", question.prompt, asked, max(answer_tokens, forced)
    for prompt in free_prompts(request) if fluency else ():
        yield "the text for fluency", prompt, len(encoder.prompt(prompt).ids), FREE_TOKENS
