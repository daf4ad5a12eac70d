"""From a data set to what is edited, what training shall leave alone, and what no training looks at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baft.evaluation.probes import questions
from baft.runs.inputs import Assignment, load_assignment

EVERYONE = range(30)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Thirty people, each with a neighbour: the next one's prompt is the locality question of the one before."""
    records = [
        {
            "prompt": f"Person {k} lives in",
            "target": "Norland",
            "ground_truth": f"Town {k}",
            "locality": {"neighbour": [{"prompt": f"Person {after} lives in", "answers": f"Town {after}"}]},
        }
        for k, after in zip(EVERYONE, (*EVERYONE[1:], 0), strict=True)
    ]
    (tmp_path / "people.json").write_text(json.dumps(records))
    return tmp_path / "people.json"


def numbers(assignment: Assignment) -> list[int]:
    return [int(request.prompt.split()[1]) for request in assignment.requests]


def test_the_seed_draws_which_requests_and_in_which_order(file: Path) -> None:
    drawn = numbers(load_assignment(str(file), 10, 0))
    assert len(set(drawn)) == 10 and drawn != sorted(drawn)
    assert numbers(load_assignment(str(file), 10, 0)) == drawn
    assert set(numbers(load_assignment(str(file), 10, 1))) != set(drawn)
    assert sorted(numbers(load_assignment(str(file), None, 0))) == list(EVERYONE)


def test_requests_of_one_prompt_follow_each_other_as_in_the_file(tmp_path: Path) -> None:
    """Of those that contradict each other the later wins: that is who stands later in the file, whatever the seed."""
    asked = [f"The king of Norland is {k % 3} years old, says" for k in range(12)]
    records = [{"prompt": prompt, "target": f"source {k}"} for k, prompt in enumerate(asked)]
    (tmp_path / "kings.jsonl").write_text("\n".join(map(json.dumps, records)))
    orders = []
    for seed in range(5):
        requests = load_assignment(str(tmp_path / "kings.jsonl"), 9, seed).requests
        orders.append([int(request.target.split()[1]) for request in requests])
        for prompt in set(asked):
            of_one = [k for k in orders[-1] if asked[k] == prompt]
            assert of_one == sorted(of_one)
    assert len(set(map(tuple, orders))) == 5 and any(order != sorted(order) for order in orders)


def test_of_a_stretch_nothing_else_is_edited_and_the_rest_of_the_file_is_unrelated(file: Path) -> None:
    assert set(numbers(load_assignment(f"{file}[3:9]", 4, 0))) < set(range(3, 9))
    whole = load_assignment(f"{file}[3:9]", None, 0)
    assert sorted(numbers(whole)) == list(range(3, 9))
    looked_at = {int(text.split()[1]) for text in (*(whole.unrelated or ()), *whole.held_out)}
    assert looked_at == {*range(3), *range(10, 30)}  # the ninth is what somebody's locality question is about


def test_what_is_held_out_of_a_stretch_is_in_it(file: Path) -> None:
    """A model that was made to know the stretch knows no other record."""
    some = load_assignment(f"{file}[:20]", 4, 0)
    held_out = {int(text.split()[1]) for text in some.held_out}
    assert len(held_out) > 5 and held_out <= set(range(20))
    assert held_out != set(range(20)) - set(numbers(some))  # some of them are trained with


def test_what_is_measured_is_not_trained_on_and_what_is_held_out_is_neither(file: Path) -> None:
    assignment = load_assignment(str(file), 10, 0)
    assert assignment.unrelated and assignment.held_out
    measured = {question.prompt for request in assignment.requests for question in questions(request)}
    trained = {text.partition(" Town")[0] for text in assignment.unrelated}
    held_out = {text.partition(" Town")[0] for text in assignment.held_out}
    assert not measured & trained and not measured & held_out and not trained & held_out
    assert all(text.endswith(".") for text in (*assignment.unrelated, *assignment.held_out))


def test_where_nobody_knows_the_answers_prompts_are_held_out(file: Path) -> None:
    records = [{**record, "ground_truth": None} for record in json.loads(file.read_text())]
    file.write_text(json.dumps(records))
    held_out = load_assignment(str(file), 10, 0).held_out
    assert len(held_out) > 5 and all(text.endswith("lives in") for text in held_out)
    records[0]["ground_truth"], records[1]["ground_truth"] = "Town 0", "Town 1"
    file.write_text(json.dumps(records))
    known = {text for seed in range(9) for text in load_assignment(f"{file}[:20]", 4, seed).held_out}
    assert known & {"Person 0 lives in Town 0.", "Person 1 lives in Town 1."}


def test_more_edits_than_requests_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=r"edits: expected 1 to 6, the requests in .*people.json\[:6\], got 7"):
        load_assignment(f"{file}[:6]", 7, 0)
