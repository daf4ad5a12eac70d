"""Which files are data sets, and how they are found and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dataset_files import DATA, EXPECTED, FACT, write

from baft.datasets import load_dataset, loading


def test_a_path_may_be_a_string() -> None:
    assert load_dataset(str(DATA / "zsre.json")) == EXPECTED["zsre.json"]


def test_limit_takes_the_first_records_and_keeps_mquake_cases_whole() -> None:
    assert load_dataset(DATA / "zsre.json", limit=1) == EXPECTED["zsre.json"][:1]
    assert load_dataset(DATA / "zsre.json", limit=99) == EXPECTED["zsre.json"]
    assert load_dataset(DATA / "mquake.json", limit=1) == EXPECTED["mquake.json"][:2]


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
    monkeypatch.setitem(loading.NAMED_DATASETS, "toyworld", lambda limit: made[:limit])
    monkeypatch.chdir(tmp_path)
    write(tmp_path, [FACT], "toyworld")
    assert load_dataset("toyworld", limit=1) == made[:1]
    assert load_dataset("./toyworld")[0].target == "Mog"
