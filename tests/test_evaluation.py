"""Measures: what is asked, how it is judged, how it is averaged; with a model that says what the test tells it to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from baft import BaftConfig, EditRequest, Probe
from baft.console import Console
from baft.evaluation.fluency import ngram_entropy
from baft.evaluation.measures import Evaluator, known_before, summarise
from baft.evaluation.probes import questions
from baft.runs.records import results_as_json, results_from_json


class ScriptedEditor:
    """Stands in for an editor: ``before`` and ``after`` say what the unedited and the edited model answer.

    Teacher forcing compares words: the model predicts the words of what it would say.
    """

    def __init__(self, before: dict[str, str], after: dict[str, str]) -> None:
        self.config = BaftConfig()
        self.before, self.after = before, after
        self.enabled = True
        self.generated: list[tuple[bool, str]] = []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def _says(self, prompt: str) -> str:
        return (self.after if self.enabled else self.before).get(prompt, "nothing")

    def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
        self.generated += [(self.enabled, prompt) for prompt in prompts]
        return [self._says(prompt) for prompt in prompts]

    def force(self, pairs: Sequence[tuple[str, str]], **_: Any) -> list[tuple[list[int], list[int]]]:
        return [
            (
                [hash(word) for word in (self._says(p).split() + [""] * 9)[: len(a.split())]],
                [hash(w) for w in a.split()],
            )
            for p, a in pairs
        ]


REQUEST = EditRequest(
    prompt="The mayor of Zell is",
    target="Ada Brin",
    target_aliases=["A. Brin"],
    subject="Zell",
    rephrases=["Zell's mayor is", "Who leads Zell?"],
    locality={"neighbour": [("The mayor of Ulm is", "Bo Lind")], "open": ["Once upon a time"]},
    portability={"hop": [Probe(prompt=p, answers="Oslo", group="q") for p in ("Where?", "In what town?")]},
)
BEFORE = {
    "The mayor of Zell is": "Cy Dorn",
    "The mayor of Ulm is": "Bo Lind. He",
    "Once upon a time": "there was",
}


def _metrics(after: dict[str, str], requests: Sequence[EditRequest] = (REQUEST,)) -> dict[str, Any]:
    return summarise(Evaluator(ScriptedEditor(BEFORE, after)).measure(requests))  # type: ignore[arg-type]


def test_questions_of_a_request() -> None:
    asked = [(q.measure, q.kind, q.prompt, q.answers, q.subject) for q in questions(REQUEST)]
    accepted = ("Ada Brin", "A. Brin")
    assert asked == [
        ("reliability", "reliability", "The mayor of Zell is", accepted, "Zell"),
        ("generality", "generality", "Zell's mayor is", accepted, "Zell"),
        ("generality", "generality", "Who leads Zell?", accepted, "Zell"),
        ("locality", "neighbour", "The mayor of Ulm is", ("Bo Lind",), None),
        ("locality", "open", "Once upon a time", (), None),
        ("portability", "hop", "Where?", ("Oslo",), None),
        ("portability", "hop", "In what town?", ("Oslo",), None),
    ]


def test_each_measure_by_generation() -> None:
    after = {
        "The mayor of Zell is": "A. Brin. She",  # an alias counts
        "Zell's mayor is": "Ada Brin",
        "Who leads Zell?": "Ada",  # not the whole answer
        "The mayor of Ulm is": "bo lind",  # the same answer as before, said otherwise
        "Once upon a time": "there were",  # changed, though nobody knows a right answer
        "In what town?": "Oslo",  # one wording of the question is enough
    }
    metrics = _metrics(after)
    generation = {measure: values["generation"] for measure, values in metrics.items()}
    assert generation == {"reliability": 1.0, "generality": 0.5, "locality": 0.5, "portability": 1.0}
    assert metrics["locality"]["kinds"] == {"neighbour": 1.0, "open": 0.0}


def test_teacher_forcing_is_partial_by_token_and_strict_by_answer() -> None:
    reliability = _metrics({"The mayor of Zell is": "Ada Krog"})["reliability"]
    assert (reliability["generation"], reliability["token"], reliability["sequence"]) == (0.0, 0.5, 0.0)


def test_forced_locality_compares_with_the_unedited_model_and_not_with_the_truth() -> None:
    before = {"The mayor of Ulm is": "Bo Krog"}  # the unedited model is wrong, and so it shall stay
    editor = ScriptedEditor(before, {"The mayor of Ulm is": "Bo Krog"})
    result = summarise(Evaluator(editor).measure([REQUEST]))  # type: ignore[arg-type]
    assert result["locality"]["token"] == 1.0
    editor = ScriptedEditor(before, {"The mayor of Ulm is": "Bo Lind"})
    result = summarise(Evaluator(editor).measure([REQUEST]))  # type: ignore[arg-type]
    assert result["locality"]["token"] == 0.5


def test_what_the_model_knew_before_is_held_against_the_benchmarks_old_answers() -> None:
    request = REQUEST.model_copy(update={"ground_truth": ("Dorn", "Cy Dorn")})
    metrics = _metrics({"The mayor of Zell is": "Ada Brin", "The mayor of Ulm is": "Krog"}, [request])
    # It knew the mayors of Zell and Ulm, Zell's in none of two other words; how the open text was, nobody says.
    assert known_before(metrics) == {"prompts": 1.0, "rephrasings": 0.0, "locality questions": 1.0}
    assert metrics["portability"]["known"] is None


def test_a_target_is_no_old_answer() -> None:
    """Nobody says what stands where the record's truth is what it asks for, in whatever spelling."""
    for truth in (("Ada Brin",), ("Cy Dorn", "a. brin")):
        request = REQUEST.model_copy(update={"ground_truth": truth})
        assert [q.was for q in questions(request) if q.measure in ("reliability", "generality")] == [()] * 3
        assert known_before(_metrics({}, [request])) == {"locality questions": 1.0}


def test_what_was_right_before_is_written_down_with_a_question() -> None:
    request = REQUEST.model_copy(update={"ground_truth": ("Dorn", "Cy Dorn")})
    (results,) = Evaluator(ScriptedEditor(BEFORE, {})).measure([request])  # type: ignore[arg-type]
    written = json.loads(json.dumps(results_as_json(results)))
    assert results_from_json(written) == results and results[0].question.was == ("Dorn", "Cy Dorn")
    for row in written:  # as an older version wrote it
        del row["was"]
    assert {result.known for result in results_from_json(written)} == {None}


def test_how_much_was_known_is_said_with_the_measures(capsys: pytest.CaptureFixture[str]) -> None:
    request = REQUEST.model_copy(update={"ground_truth": ("Cy Dorn",)})
    Console().metrics({"now": _metrics({}, [request])}, "1 request")
    said = " ".join(capsys.readouterr().out.split())
    assert "The unedited model gave the old answers to 100.0% of the prompts, 0.0% of the rephrasings" in said


def test_of_a_benchmark_without_old_answers_nobody_says_what_the_model_knew() -> None:
    assert known_before(_metrics({}, [EditRequest(prompt="p", target="t", rephrases=["q"])])) == {}


def test_a_measure_without_data_is_none() -> None:
    metrics = _metrics({}, [EditRequest(prompt="p", target="t")])
    assert metrics["reliability"]["generation"] == 0.0
    assert [metrics[name] for name in ("generality", "locality", "portability")] == [None, None, None]


def test_a_locality_probe_without_an_answer_has_no_forced_measure() -> None:
    request = EditRequest(prompt="p", target="t", locality=["Once upon a time"], portability={"hop": None})
    locality = _metrics({"Once upon a time": "there was"}, [request])["locality"]
    assert (locality["generation"], locality["token"], locality["sequence"]) == (1.0, None, None)


def test_each_request_counts_once_whatever_its_number_of_probes() -> None:
    one = EditRequest(prompt="p", target="t", rephrases=["right"])
    three = EditRequest(prompt="q", target="t", rephrases=["wrong 1", "wrong 2", "wrong 3"])
    generality = _metrics({"right": "t"}, [one, three])["generality"]
    assert (generality["generation"], generality["kinds"]) == (0.5, {"generality": 0.5})


def test_base_answers_are_recorded_once_and_with_the_edits_off() -> None:
    editor = ScriptedEditor(BEFORE, {})
    evaluator = Evaluator(editor)  # type: ignore[arg-type]
    evaluator.record_base([REQUEST])
    recorded = [prompt for enabled, prompt in editor.generated]
    assert not any(enabled for enabled, _ in editor.generated)
    assert sorted(recorded) == sorted(q.prompt for q in questions(REQUEST))
    editor.before = {}  # whatever the base says later is not asked for
    results = evaluator.measure([REQUEST])[0]
    assert results[0].before == "Cy Dorn"
    assert len([1 for enabled, _ in editor.generated if not enabled]) == len(recorded)


@pytest.mark.parametrize(
    ("text", "entropy"), [("a b c d e", (2 / 3 * 2 + 4 / 3 * 1.584962500721156) / 2), ("a a a a", 0.0)]
)
def test_ngram_entropy(text: str, entropy: float) -> None:
    assert ngram_entropy(text) == pytest.approx(entropy)
