"""What a testbed is trained on: a benchmark's old facts, in all the wordings that the benchmark has for them."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from baft.datasets import load_dataset
from baft.datasets.factworld import FactWorld
from baft.requests import EditRequest, Probe
from baft.testbed.benchmark import BenchmarkKnowledge
from baft.testbed.folder import factworld_folder
from baft.testbed.training import TrainingReport
from baft.testbed.wordings import Statement, Wordings


def request(subject: str, prompt: str, *rephrases: str, truth: str = "Oslo", local: str | None = None) -> EditRequest:
    locality = {"neighbour": (Probe(prompt=local, answers=("Rome",)),)} if local else {}
    return EditRequest(
        prompt=prompt, target="Bern", subject=subject, ground_truth=(truth,), rephrases=rephrases, locality=locality
    )


BORN = "{} was born in"
NATIVE = "The birthplace of {} is"
REQUESTS = (
    request("Ada", "Ada was born in", "It rained. The birthplace of Ada is", local="Bob was born in"),
    request("Cleo", "The birthplace of Cleo is", "Nobody came. Cleo comes from"),
    request("Dora", "Dora lives near"),
)


def test_wordings_that_one_record_uses_for_its_fact_are_siblings_both_ways() -> None:
    wordings = Wordings(REQUESTS)
    assert set(wordings.siblings[BORN]) == {BORN, NATIVE}
    assert set(wordings.siblings[NATIVE]) == {BORN, NATIVE}
    assert wordings.siblings["{} lives near"] == ("{} lives near",)
    assert wordings.prefixes == ("It rained. ",)


@pytest.mark.parametrize("text", ["Ada was born in", "It rained. The birthplace of Ada is"])
def test_a_text_taken_apart_is_the_same_put_together(text: str) -> None:
    statement = Wordings(REQUESTS).of_subject(text, "Ada")
    assert statement is not None
    assert statement.subject == "Ada"
    assert statement.text == text


def test_a_text_is_taken_apart_only_at_a_known_wording() -> None:
    wordings = Wordings(REQUESTS)
    assert wordings.of_subject("Cleo comes from", "Cleo") is None
    assert wordings.of_any_subject("It rained. Nobody saw Bob") is None
    assert wordings.of_any_subject(" was born in") is None
    assert wordings.of_any_subject("Bob was born in") == Statement("", BORN, "Bob")


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("Ada knew that Ada was born in", id="the subject twice"),
        pytest.param("She was born in", id="no subject in it"),
        pytest.param("Ada {} was born in", id="the slot itself in it"),
    ],
)
def test_a_prompt_without_one_clear_place_for_its_subject_makes_no_wording(prompt: str) -> None:
    assert Wordings([request("Ada", prompt)]).siblings == {}


def test_an_epoch_says_each_fact_in_the_benchmarks_words_and_in_others() -> None:
    knowledge = BenchmarkKnowledge(REQUESTS)
    epochs = [knowledge.corpus(random.Random(seed)) for seed in range(60)]
    own = {"Ada was born in Oslo.", "It rained. The birthplace of Ada is Oslo."}
    assert all(own & set(epoch) for epoch in epochs)
    said = {text for epoch in epochs for text in epoch}
    for text in ("The birthplace of Ada is", "Ada was born in", "It rained. Ada was born in", "Cleo was born in"):
        assert f"{text} Oslo." in said
    assert {f"{prefix}{text} Rome." for prefix in ("", "It rained. ") for text in ("Bob was born in",)} <= said
    # What could not be taken apart stays as the benchmark has it, once in each epoch.
    assert all(epoch.count("Nobody came. Cleo comes from Oslo.") <= 1 for epoch in epochs)
    assert not any("Cleo comes from" in text and not text.startswith("Nobody came. ") for text in said)


def test_the_questions_are_the_benchmarks_own_texts_each_once() -> None:
    again = request("Ada", "Ada was born in", truth="Paris")
    questions = BenchmarkKnowledge((*REQUESTS, again)).questions()
    assert [probe.prompt for probe in questions] == [
        "Ada was born in",
        "It rained. The birthplace of Ada is",
        "Bob was born in",
        "The birthplace of Cleo is",
        "Nobody came. Cleo comes from",
        "Dora lives near",
    ]
    assert questions[0].answers == ("Oslo",)  # a prompt's first answer is the fact


def test_records_that_do_not_say_what_their_prompts_answer_are_refused() -> None:
    """Their locality questions have answers, but who knows these alone knows nothing that is edited."""
    said = request("Ada", "Ada was born in", local="Bob was born in")
    for truth in ((), ("bern.",)):
        with pytest.raises(ValueError, match=r"expected records with a ground truth.*got 2 that have none other"):
            BenchmarkKnowledge([said.model_copy(update={"ground_truth": truth})] * 2)


def test_a_target_is_never_learned_as_the_old_fact() -> None:
    twice = request("Bob", "Bob was born in", "Bob hails from", truth="Bern", local="Cleo was born in")
    knowledge = BenchmarkKnowledge((*REQUESTS, twice))
    assert knowledge.passed_over == 1 and BenchmarkKnowledge(REQUESTS).passed_over == 0
    assert "Cleo was born in" in [probe.prompt for probe in knowledge.questions()]
    assert not [text for seed in range(20) for text in knowledge.corpus(random.Random(seed)) if "Bern" in text]


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_another_process_has_trained_meanwhile_is_taken(
    whole: bool, small_world: FactWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAFT_CACHE_DIR", str(tmp_path))
    trained = (tiny_model(), tiny_tokenizer(), TrainingReport(1, 1, 1.0, recall=1.0))

    def train_while_another_does(*_: object, **__: object) -> object:
        monkeypatch.setattr("baft.testbed.folder.train_testbed", lambda *_, **__: trained)
        folder = factworld_folder(small_world)
        if not whole:
            (folder / "testbed.json").unlink()
        return trained

    monkeypatch.setattr("baft.testbed.folder.train_testbed", train_while_another_does)
    with nullcontext() if whole else pytest.raises(OSError, match="not empty"):
        assert (factworld_folder(small_world) / "testbed.json").exists()
    assert len([*tmp_path.iterdir()]) == 1  # nothing is left of the second one


def test_of_zsre_some_records_are_passed_over(data_dir: Path) -> None:
    requests = load_dataset(data_dir / "zsre_3k.json")
    letter_by_letter = sum(request.target in request.ground_truth for request in requests)
    assert 100 < letter_by_letter <= BenchmarkKnowledge(requests).passed_over < letter_by_letter + 10


def test_most_of_counterfact_can_be_said_in_other_words(data_dir: Path) -> None:
    requests = load_dataset(data_dir / "counterfact_3k.json[:600]")
    wordings = Wordings(requests)
    texts = [(text, request.subject) for request in requests for text in request.rephrases]
    apart = [wordings.of_subject(text, subject) for text, subject in texts if subject]
    assert sum(statement is not None for statement in apart) > 0.9 * len(texts)
    assert sum(len(siblings) > 1 for siblings in wordings.siblings.values()) > 0.5 * len(wordings.siblings)
    assert len(wordings.prefixes) > 500
