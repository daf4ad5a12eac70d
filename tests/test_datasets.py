"""Which files are data sets, and how they are found and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dataset_files import DATA, EXPECTED, FACT, write

from baft.datasets import load_dataset, loading
from baft.datasets.loading import load_with_rest


def test_a_path_may_be_a_string() -> None:
    assert load_dataset(str(DATA / "zsre.json")) == EXPECTED["zsre.json"]


def test_a_stretch_of_a_file_is_written_as_of_a_list() -> None:
    whole = EXPECTED["zsre.json"]
    first, second = whole
    assert load_dataset(f"{DATA}/zsre.json[:1]") == [first]
    assert load_dataset(f"{DATA}/zsre.json[1:2]") == [second]
    assert load_dataset(f"{DATA}/zsre.json[1:]") == [second]
    assert load_dataset(f"{DATA}/zsre.json[:2]") == whole
    assert load_dataset(Path(f"{DATA}/zsre.json[:1]")) == [first]


def test_what_a_stretch_leaves_is_the_rest() -> None:
    first, second = EXPECTED["zsre.json"]
    assert load_with_rest(f"{DATA}/zsre.json[:1]") == ([first], [second])
    assert load_with_rest(f"{DATA}/zsre.json[1:]") == ([second], [first])
    assert load_with_rest(DATA / "zsre.json") == ([first, second], [])
    assert load_with_rest("factworld") == (load_dataset("factworld"), [])


def test_a_record_without_an_identifier_is_found_again_by_its_place_in_the_whole_file() -> None:
    assert [request.id for request in load_dataset(f"{DATA}/zsre.json[1:]")] == ["record-1"]


def test_a_stretch_of_mquake_keeps_cases_whole() -> None:
    assert load_dataset(f"{DATA}/mquake.json[:1]") == EXPECTED["mquake.json"][:2]


def test_a_file_that_is_called_like_a_stretch_is_that_file(tmp_path: Path) -> None:
    write(tmp_path, [{**FACT, "target_new": "another"}])
    assert load_dataset(write(tmp_path, [FACT], "facts.json[:1]"))[0].target == FACT["target_new"]


def test_json_lines_are_told_by_their_content_too(tmp_path: Path) -> None:
    lines = f"{json.dumps(FACT)}\n\n{json.dumps(FACT)}\n"
    assert len(load_dataset(write(tmp_path, lines))) == 2
    assert len(load_dataset(write(tmp_path, json.dumps(FACT), "one.jsonl"))) == 1


def test_a_line_separator_inside_a_text_does_not_end_a_json_line(tmp_path: Path) -> None:
    line = json.dumps({**FACT, "target_new": "Mog\u2028the Cat"}, ensure_ascii=False)
    assert load_dataset(write(tmp_path, line, "facts.jsonl"))[0].target == "Mog\u2028the Cat"


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path: Path) -> None:
    assert len(load_dataset(write(tmp_path, b"\xef\xbb\xbf" + json.dumps([FACT]).encode()))) == 1


def test_a_named_data_set_comes_before_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = EXPECTED["zsre.json"]
    monkeypatch.setitem(loading.NAMED_DATASETS, "toyworld", lambda: made)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [FACT], "toyworld")
    assert load_dataset("toyworld") == made
    assert load_dataset("./toyworld")[0].target == "Mog"
