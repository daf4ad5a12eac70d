"""What every field of every benchmark's format means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dataset_files import DATA, EXPECTED, write

from baft.datasets import load_dataset
from baft.requests import EditRequest


@pytest.mark.parametrize("name", EXPECTED)
def test_every_field_of_a_format_lands_where_it_belongs(name: str) -> None:
    assert load_dataset(DATA / name) == EXPECTED[name]


def test_an_mquake_case_without_id_still_groups_its_questions(tmp_path: Path) -> None:
    case = json.loads((DATA / "mquake.json").read_text())[0]
    del case["case_id"]
    *_, last = load_dataset(write(tmp_path, [case, case]))
    assert last.id == "record-1/1"
    assert {probe.group for probe in last.portability["multi_hop"]} == {"record-1"}


def test_requests_written_as_json_load_as_they_were(tmp_path: Path) -> None:
    requests = EXPECTED["own.json"] + EXPECTED["mquake.json"]
    path = write(tmp_path, json.dumps([request.model_dump() for request in requests]))
    assert load_dataset(path) == requests


def test_own_records_may_have_more_fields_and_numbers_as_identifiers(tmp_path: Path) -> None:
    """Even one that QAEdit's records have: they have none of ours; and one that is another format's identifier."""
    record = {
        "prompt": "Ann is",
        "target": "tall",
        "rephrases": ["Tall is"],
        "source": "a book",
        "subject_id": 3,
        "case_id": 4,
    }
    (request,) = load_dataset(write(tmp_path, [{**record, "id": 17}]))
    assert request == EditRequest(prompt="Ann is", target="tall", rephrases=("Tall is",), id="17")
    (request,) = load_dataset(write(tmp_path, [{"prompt": "Ann is", "target": "tall", "rephrase": "Tall is"}]))
    assert request.rephrases == ("Tall is",)  # as QAEdit calls them


# -- the published files -----------------------------------------------------------------------------------------------


def raw_and_loaded(path: Path) -> list[tuple[dict[str, Any], EditRequest]]:
    raw = json.loads(path.read_text(encoding="utf-8"))
    return list(zip(raw, load_dataset(path), strict=True))


def test_published_zsre(data_dir: Path) -> None:
    pairs = raw_and_loaded(data_dir / "zsre_3k.json")
    assert len(pairs) == 3000
    for raw, request in pairs:
        assert request.target == raw["alt"].strip()
        assert request.prompt == raw["src"]
        assert request.subject in request.prompt
        assert set(request.ground_truth) == {answer.strip() for answer in raw["answers"]}
        assert request.rephrases == (raw["rephrase"],)
        (locality,) = request.locality["neighborhood"]
        assert locality.prompt.startswith("nq question: ")
        assert locality.answers == (raw["loc_ans"],)
        assert not request.portability


def test_published_counterfact(data_dir: Path) -> None:
    pairs = raw_and_loaded(data_dir / "counterfact_3k.json")
    assert len(pairs) == len({request.id for _, request in pairs}) == 3000
    for raw, request in pairs:
        assert request.id == str(raw["case_id"])
        assert request.target == raw["target_new"]
        assert request.ground_truth == (raw["ground_truth"],)
        assert request.target not in request.ground_truth
        (locality,) = request.locality["neighborhood"]
        assert locality.answers == request.ground_truth
        assert request.subject in request.prompt


def test_published_wikibigedit(data_dir: Path) -> None:
    pairs = raw_and_loaded(data_dir / "wikibigedit_3k.json")
    assert len(pairs) == 3000
    for raw, request in pairs:
        assert request.target == raw["target_new"]
        assert request.subject == raw["subject"]
        assert len(request.rephrases) == 1
        (locality,) = request.locality["neighborhood"]
        assert locality.prompt == raw["locality_prompt"]
        assert locality.answers == (raw["locality_ground_truth"],)
        assert not request.ground_truth
