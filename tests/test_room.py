"""How long generated answers may get, and that a question which the model has no room for is refused ahead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import ASKED, run_in
from tiny import REQUESTS, tiny_editor, tiny_model

from baft import EditRequest
from baft.evaluation.fluency import FREE_TOKENS
from baft.evaluation.probes import questions
from baft.evaluation.room import ANSWER_TOKENS, check_room, tokens_needed
from baft.runs import sequential as sequential_run
from baft.runs.journal import Journal
from baft.runs.run import RunPlan, run_edits

LONG = EditRequest(
    prompt="Ada Lund was", target="Bob Stone, the king of Norland and the president of Sudland", subject="Ada Lund"
)
WIDE = "the king of Norland " * 9
# The longest text that a tiny model takes.
LIMIT = 64


def _answer(editor: Any, answer: str) -> int:
    return len(editor.encoder.following(f" {answer}"))


def test_answers_are_as_long_as_the_longest_accepted_one_needs() -> None:
    editor = tiny_editor()
    assert tokens_needed(editor.encoder, REQUESTS) == tokens_needed(editor.encoder, []) == ANSWER_TOKENS
    longest = _answer(editor, LONG.target)
    assert longest > ANSWER_TOKENS
    alias = REQUESTS[0].model_copy(update={"target_aliases": (LONG.target,)})
    hop = EditRequest(prompt="p", target="t", portability={"hop": [("q", LONG.target)]})
    for request in (LONG, alias, hop):
        assert tokens_needed(editor.encoder, [*REQUESTS, request]) > longest
    kept = EditRequest(prompt="p", target="t", locality={"neighbour": [("q", LONG.target)]})
    assert tokens_needed(editor.encoder, [kept]) == ANSWER_TOKENS


def test_a_long_target_is_measured_to_its_end() -> None:
    found = run_edits(tiny_editor(stop_below=0.05), [LONG], "single").results
    assert found["metrics"]["immediate"]["reliability"]["generation"] == 1.0
    assert found["protocol"]["generation"]["max_new_tokens"] == tokens_needed(tiny_editor().encoder, [LONG])
    plan = RunPlan(answer_tokens=3)
    cut = run_edits(tiny_editor(stop_below=0.05), [LONG], "single", plan=plan).results
    assert cut["metrics"]["immediate"]["reliability"]["generation"] == 0.0
    assert cut["protocol"]["generation"]["max_new_tokens"] == 3


def test_a_text_is_the_same_whoever_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [*ASKED[:3], LONG]
    said = []
    for ahead in (1, 64):
        monkeypatch.setattr(sequential_run, "_ASKED_AHEAD", ahead)
        run_in(tmp_path / str(ahead), requests=requests, max_steps=1, settling_rounds=0, subject_texts=0)
        journal = Journal(tmp_path / str(ahead) / "journal.sqlite", read_only=True)
        said.append([journal.text(q.prompt) for request in requests for q in questions(request)])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        ({"rephrases": (WIDE,)}, "of the generality question 'the king of Norland"),
        ({"locality": {"near": ({"prompt": "q", "answers": (3 * WIDE,)},)}}, "of the locality question 'q' and"),
        ({"portability": {"hop": ({"prompt": WIDE, "answers": ("t",)},)}}, "of the portability question"),
        ({"generation_prompts": ("the king of Norland " * 3,)}, f"and {FREE_TOKENS} to follow"),
    ],
)
def test_a_question_that_is_too_long_is_named(request_: dict[str, Any], what: str) -> None:
    long = EditRequest(prompt="Ada Lund is", target="t", **request_)
    editor = tiny_editor(tiny_model("gpt2"))
    expected = rf"^request 1, 'Ada Lund is': expected at most {LIMIT} tokens, .*{re.escape(what)}"
    with pytest.raises(ValueError, match=expected):
        check_room(editor, [REQUESTS[0], long], ANSWER_TOKENS, fluency=True)
    with pytest.raises(ValueError, match=expected):
        run_edits(editor, [REQUESTS[0], long], "sequential")
    assert not editor.edits


def test_whose_answer_takes_the_room_is_named() -> None:
    """It is generated at the same length after all questions: the first that this is too long for isn't to blame."""
    wide = EditRequest(prompt=f"Bob is {WIDE}", target="t")
    long = EditRequest(prompt="Ada Lund is", target="t", target_aliases=("the king of Norland " * 8,), id="case 7")
    editor = tiny_editor(tiny_model("gpt2"))
    needed = tokens_needed(editor.encoder, [long])
    blamed = f"and {needed} to follow, as many as the longest answer of request 1 (id case 7), 'Ada Lund is' needs"
    with pytest.raises(ValueError, match=f"^request 0, 'Bob is .*{re.escape(blamed)}$"):
        check_room(editor, [wide, long], needed)
    with pytest.raises(ValueError, match=f"^request 0, 'Bob is .*and {needed} to follow$"):
        check_room(editor, [wide], needed)  # nobody's: it was asked for
    with pytest.raises(ValueError, match=f"^request 0 .*and {needed} to follow$"):
        check_room(editor, [long.model_copy(update={"prompt": WIDE}), long], needed)  # its own
    with pytest.raises(ValueError, match=r"^request 1 \(id case 7\): prompt: expected at most 64 tokens"):
        editor.check([wide, long.model_copy(update={"target": 2 * WIDE})])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_what_just_fits_is_asked(family: str) -> None:
    """These models have an embedding for each place in a text, and none for more."""
    editor = tiny_editor(tiny_model(family), max_steps=1, settling_rounds=0)

    def filled(room: int) -> str:
        """A prompt of so many tokens less than the model takes."""
        prompt = "x" * (LIMIT - room - 1)
        assert len(editor.encoder.prompt(prompt).ids) == LIMIT - room
        return prompt

    request = EditRequest(
        prompt=filled(FREE_TOKENS),
        target="king",
        rephrases=[filled(ANSWER_TOKENS)],
        locality=[filled(ANSWER_TOKENS)],
    )
    found = run_edits(editor, [request], "sequential").results
    assert found["metrics"]["final"]["locality"] and found["fluency"]["after"]["perplexity"]
    with pytest.raises(ValueError, match="of the generality question"):
        check_room(editor, [request], ANSWER_TOKENS + 1)
