"""The one line that says what is wrong with a file of records, and where."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from dataset_files import DATA, FACT, write

from baft.datasets import DatasetError, load_dataset, loading
from baft.datasets.loading import load_with_rest


def error_of(source: str | Path) -> str:
    """The message of loading a source, without the folder; it must be one line."""
    with pytest.raises(DatasetError) as caught:
        load_dataset(source)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{Path(source).parent}{os.sep}", "")


def test_an_unknown_name_says_what_was_looked_for_and_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "NAMED_DATASETS", {"toyworld": None, "otherworld": None})
    expected = (
        "zrse: expected a file, a stretch of one (FILE[:300]) or the name of a data set (otherworld, toyworld),"
        " found none"
    )
    assert error_of("zrse") == expected


@pytest.mark.parametrize(("stretch", "got"), [(":0", "0 to 0"), ("2:1", "2 to 1"), ("2:", "2 to 2"), (":3", "0 to 3")])
def test_a_stretch_that_the_file_does_not_have(stretch: str, got: str) -> None:
    expected = f"zsre.json[{stretch}]: expected a stretch of the file's 2 records, got {got}"
    assert error_of(DATA / f"zsre.json[{stretch}]") == expected


@pytest.mark.parametrize("stretch", [":-1", "::2", "1"])
def test_a_stretch_counts_from_the_beginning_and_has_no_steps(stretch: str) -> None:
    message = error_of(DATA / f"zsre.json[{stretch}]")
    assert message.startswith(f"zsre.json[{stretch}]: expected a file, a stretch of one (FILE[:300]) or")


def test_a_stretch_of_no_file() -> None:
    assert error_of(DATA / "zrse.json[:1]").startswith("zrse.json[:1]: expected a file, a stretch of one")


FILE_ERRORS = {
    "empty": ("", "expected JSON, got an error: Expecting value: line 1 column 1 (char 0)"),
    "not JSON": ("prompt,target\n", "expected JSON, got an error: Expecting value: line 1 column 1 (char 0)"),
    "cut off": ('[{"prompt": "The', "expected JSON, got an error: Unterminated string starting at: line 1 column 13"),
    "bad line": (
        f'{json.dumps(FACT)}\n{{"prompt": }}\n',
        "line 2: expected JSON, got an error: Expecting value: line 1 column 12",
    ),
    "not UTF-8": (b'[{"prompt": "caf\xe9"}]', "expected UTF-8 text, got byte 0xe9"),
    "too deep": ("[" * 100_000, "expected JSON, got an error: "),
    "one object": (FACT, 'expected a JSON list of records, got {"prompt": "The cat is called", "target_new": "Mog"}'),
    "no records": ([], "expected at least one record, got none"),
}


@pytest.mark.parametrize("case", FILE_ERRORS)
def test_a_file_that_holds_no_records(case: str, tmp_path: Path) -> None:
    content, expected = FILE_ERRORS[case]
    assert error_of(write(tmp_path, content)).startswith(f"facts.json: {expected}")


def test_a_folder_is_no_data_set(tmp_path: Path) -> None:
    assert error_of(tmp_path).endswith("can't be read: Is a directory")


ZSRE = {"src": "Which valley holds Lake Orrin?", "alt": "Bryce Valley", "loc": "nq question: who", "cond": ""}
ROME = {"case_id": 7, "requested_rewrite": {"prompt": "{} is", "subject": "Ann", "target_new": {"str": "tall"}}}
EASYEDIT = "EasyEdit (flat CounterFact and WikiBigEdit, KnowEdit, WISE)"


def without(record: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != field}


def rewrite(**changes: Any) -> dict[str, Any]:
    """The ROME record with a changed rewrite; a field set to None is left out."""
    fields = ROME["requested_rewrite"] | changes
    return {"case_id": 7, "requested_rewrite": {name: value for name, value in fields.items() if value is not None}}


RECORD_ERRORS = {
    "no object": ("The cat is called Mog", 'expected an object, got "The cat is called Mog"'),
    "nearest ZsRE": (without(ZSRE, "alt"), "fits no known format; in the nearest, ZsRE, field 'alt' is missing"),
    "nearest CounterFact": (
        {"case_id": 7, "paraphrase_prompts": [], "neighborhood_prompts": []},
        "(id 7): fits no known format; in the nearest, CounterFact, field 'requested_rewrite' is missing",
    ),
    "nearest MQuAKE": (
        {"case_id": 7, "requested_rewrite": "none", "new_single_hops": [], "new_answer": "x"},
        "(id 7): fits no known format; in the nearest, MQuAKE,"
        " field 'requested_rewrite': expected a list, got \"none\"",
    ),
    "nearest WikiBio": (
        {"text": "A", "labels": "B"},
        "fits no known format; in the nearest, WikiBio, field 'concept' is missing",
    ),
    "nearest ConvSent": (
        {"ent": "tea", "pos": "I love it.", "neg": []},
        "fits no known format; in the nearest, ConvSent, field 'pos': expected a list, got \"I love it.\"",
    ),
    "nearest WikiBigEdit": (
        {"update": "Who?", "personas": "Arr, who?", "loc": "Who else?"},
        "fits no known format; in the nearest, WikiBigEdit, field 'ans' is missing",
    ),
    "nearest QAEdit": (
        {"id": 3, "source": "NQ", "prompt": "who", "rephrase": "Who?"},
        "(id 3): fits no known format; in the nearest, QAEdit, field 'target' is missing",
    ),
    "nearest EasyEdit": (
        {"prompt": "Ann is", "locality_prompt": "Bea is", "ground_truth": "short"},
        f"fits no known format; in the nearest, {EASYEDIT}, field 'target_new' is missing",
    ),
    "like nothing": (
        {"question": "Who?", "label": 1},
        "fits no known format; expected the fields of one of (ZsRE: src, alt; CounterFact: requested_rewrite;"
        " MQuAKE: requested_rewrite; WikiBio: text, labels, concept; ConvSent: ent, pos, neg;"
        " WikiBigEdit: update, ans; EditRequest: prompt, target; QAEdit: prompt, target;"
        f" {EASYEDIT}: prompt, target_new),"
        ' got ["label", "question"]',
    ),
    "empty target": (ZSRE | {"alt": " "}, "field 'alt': expected a text that is not empty, got \" \""),
    "null target": (
        FACT | {"target_new": None, "case_id": 4},
        "(id 4): field 'target_new': expected a text that is not empty, got null",
    ),
    "empty list of targets": (
        FACT | {"target_new": []},
        "field 'target_new': expected a text that is not empty, got []",
    ),
    "empty prompt": (ZSRE | {"src": ""}, "field 'src': expected a text that is not empty, got \"\""),
    "own, with an alias of a wrong type": (
        {"prompt": "Ann is", "target": "tall", "target_aliases": [{"str": "long"}]},
        'EditRequest.target_aliases: Value error, expected a text, a number, or lists of them, got [{"str": "long"}]',
    ),
    "own, with probes of a wrong type": (
        {"prompt": "Ann is", "target": "tall", "locality": 5},
        "EditRequest.locality: Value error, expected a prompt, a probe, or a list of them as 'default', got 5",
    ),
    "own, with a misspelt probe": (
        {"prompt": "Ann is", "target": "tall", "portability": {"hop": {"promt": "Bea is"}}},
        "EditRequest.portability: Value error, expected a prompt, a probe, or a list of them as 'hop',"
        ' got {"hop": {"promt": "Bea is"}}',
    ),
    "own, with a misspelt subject": (
        {"prompt": "Ann is", "target": "tall", "subjects": "Ann", "id": 4},
        "(id 4): expected the field 'subject', got 'subjects', which nothing reads",
    ),
    "own, with QAEdit's name beside an own one": (
        {"prompt": "Ann is", "target": "tall", "ground_truth": "short", "rephrase": ["Tall is"]},
        "expected the field 'rephrases', got 'rephrase', which nothing reads",
    ),
    "own, in other case": (
        {"prompt": "Ann is", "target": "tall", "Ground_Truth": "short"},
        "expected the field 'ground_truth', got 'Ground_Truth', which nothing reads",
    ),
    "QAEdit's, with a misspelt own one": (
        {"prompt": "Ann is", "target": "tall", "rephrase": "Tall is", "ground_truths": "short"},
        "expected the field 'ground_truth', got 'ground_truths', which nothing reads",
    ),
    "several prompts": (ZSRE | {"src": ["A", "B"]}, 'field \'src\': expected one text, got ["A", "B"]'),
    "target of a wrong type": (ZSRE | {"alt": {"str": "B"}}, 'field \'alt\': expected text, got {"str": "B"}'),
    "alias of a wrong type": (
        ZSRE | {"answers": ["A", True]},
        "field 'answers': expected text, got [\"A\", true]",
    ),
    "no subject for {}": (
        rewrite(subject=None),
        "(id 7): field 'requested_rewrite.subject': expected the subject that belongs in the {} of the prompt,"
        " got nothing",
    ),
    "rewrite without target": (
        rewrite(target_new=None),
        "(id 7): field 'requested_rewrite.target_new.str': expected a text that is not empty, got nothing",
    ),
    "rewrite with a bare target": (
        rewrite(target_new="tall"),
        "(id 7): field 'requested_rewrite.target_new': expected an object, got \"tall\"",
    ),
    "no rewrites": (
        {"case_id": 9, "requested_rewrite": []},
        "(id 9): field 'requested_rewrite': expected at least one rewrite, got []",
    ),
    "bad second rewrite": (
        {"requested_rewrite": [ROME["requested_rewrite"], {"prompt": "{} is", "target_new": {"str": "x"}}]},
        "field 'requested_rewrite[1].subject': expected the subject that belongs in the {} of the prompt, got nothing",
    ),
    "bad locality": (FACT | {"locality": ["Bea is"]}, "field 'locality': expected an object, got [\"Bea is\"]"),
    "bad probes": (
        FACT | {"portability": {"Reasoning": [{"prompt": "So"}, "then"]}},
        'field \'portability.Reasoning\': expected a list of objects, got [{"prompt": "So"}, "then"]',
    ),
    "half a surrogate pair": (
        ZSRE | {"src": "caf\ud800"},
        "EditRequest.prompt: Input should be a valid string, unable to parse raw data as a unicode string,"
        ' got "caf\\ud800"',
    ),
    "a long value": (
        FACT | {"locality": "x" * 999},
        f"field 'locality': expected an object, got \"{'x' * 56}...",
    ),
}


@pytest.mark.parametrize("case", RECORD_ERRORS)
def test_a_bad_record_is_named_with_its_field(case: str, tmp_path: Path) -> None:
    record, expected = RECORD_ERRORS[case]
    colon = "" if expected.startswith("(id") else ":"
    message = error_of(write(tmp_path, [record]))
    assert message == f"facts.json: record 0{colon} {expected}"


def test_a_later_bad_record_is_counted_from_zero(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, [ZSRE, ZSRE, ZSRE | {"alt": ""}]))
    assert message == "facts.json: record 2: field 'alt': expected a text that is not empty, got \"\""


def test_mixed_formats_name_the_first_record_that_differs(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, [ZSRE, ZSRE, ROME, FACT]))
    assert message == (
        "facts.json: record 2 (id 7): has the fields of CounterFact, but record 0 has those of ZsRE:"
        " expected one format in a file"
    )


def test_records_outside_of_a_stretch_are_not_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path, [ZSRE, ROME, ROME, ZSRE | {"alt": ""}])
    assert len(load_dataset(f"{path}[1:3]")) == 2
    with pytest.raises(DatasetError, match=r"record 3: field 'alt': expected a text that is not empty"):
        load_with_rest(f"{path}[1:3]")


def test_a_bad_record_in_a_stretch_is_counted_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, [ZSRE, ZSRE, ROME])
    assert error_of(f"{path}[1:]") == (
        "facts.json: record 2 (id 7): has the fields of CounterFact, but record 1 has those of ZsRE:"
        " expected one format in a file"
    )
