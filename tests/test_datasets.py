"""Benchmark loaders: what every field of every format means, and the one line that says what is wrong with a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from baft.datasets import DatasetError, load_dataset, loading
from baft.requests import EditRequest, Probe

DATA = Path(__file__).parent / "data"


def ask(prompt: str, *answers: str, group: str | None = None) -> Probe:
    return Probe(prompt=prompt, answers=answers, group=group)


EXPECTED = {
    "zsre.json": [
        EditRequest(
            prompt="Which valley holds Lake Orrin?",
            target="Bryce Valley",
            subject="Lake Orrin",
            ground_truth=("Corrow Valley", "The Corrow"),
            rephrases=("In what valley is Lake Orrin?",),
            locality={"neighborhood": (ask("nq question: how many strings has a lute", "15"),)},
        ),
        EditRequest(prompt="When was Vanda Mill built?", target="1812", subject="Vanda Mill"),
    ],
    "zsre_portability.json": [
        EditRequest(
            prompt="What river does Pellam Bridge cross?",
            target="Ona",
            subject="Pellam Bridge",
            ground_truth=("Ister",),
            rephrases=("Which river is under Pellam Bridge?",),
            locality={"neighborhood": (ask("nq question: who painted the blue door", "Mira Holt"),)},
            portability={"one_hop": (ask("Into which sea flows the river that Pellam Bridge crosses?", "Grey Sea"),)},
        ),
        EditRequest(
            prompt="What river does Quill Bridge cross?",
            target="Ister",
            subject="Quill Bridge",
            ground_truth=("Ona",),
            rephrases=("Which river is under Quill Bridge?",),
            locality={"neighborhood": (ask("nq question: who wrote the salt road", "Ed Farn"),)},
        ),
    ],
    "counterfact_flat.json": [
        EditRequest(
            prompt="The trade of Oskar Lind is that of a",
            target="baker",
            subject="Oskar Lind",
            ground_truth=("cooper",),
            rephrases=("It rained all week. Oskar Lind earns his bread as a",),
            locality={"neighborhood": (ask("Karl Moen's trade is that of a", "cooper"),)},
            id="0",
        ),
        EditRequest(
            prompt="Nina Varga was born in", target="Lisbon", subject="Nina Varga", ground_truth=("Oslo",), id="12"
        ),
    ],
    "counterfact_rome.json": [
        EditRequest(
            prompt="The mother tongue of Gwen {Gwennie} Parry is",
            target="Dutch",
            subject="Gwen {Gwennie} Parry",
            ground_truth=("Welsh",),
            rephrases=("The bus was late. Gwen Parry grew up speaking", "At home Gwen Parry spoke"),
            locality={
                "neighborhood": (
                    ask("Rhys Morgan's mother tongue is", "Welsh"),
                    ask("The native language of Eira Vaughan is", "Welsh"),
                ),
                "attribute": (ask("Joost de Wit grew up speaking", "Dutch"),),
            },
            generation_prompts=("Gwen Parry's favourite poem is", "Gwen Parry lives in"),
            id="7",
        ),
        EditRequest(
            prompt="Harrow Glass Works was founded in",
            target="1901",
            subject="Harrow Glass Works",
            ground_truth=("1877",),
            id="8",
        ),
    ],
    "knowedit_zsre.json": [
        EditRequest(
            prompt="Which family does the Ambrel Moth belong to?",
            target="Sterrinae",
            subject="Ambrel Moth",
            ground_truth=("Geometridae", "geometer moths"),
            rephrases=("What family is the Ambrel Moth in?",),
            locality={
                "Relation_Specificity": (
                    ask("The taxon rank of the Ambrel Moth is", "species", "sp."),
                    ask("Ambrel Moth taxon rank"),
                )
            },
            portability={"Reasoning": (ask("What is the common name of the Ambrel Moth's family?", "waves"),)},
        ),
        EditRequest(
            prompt="Which genus does the Dunby Fern belong to?",
            target="Blechnum",
            subject="Dunby Fern",
            ground_truth=("Asplenium",),
            rephrases=("What is the genus of the Dunby Fern?",),
        ),
    ],
    "wikidata_recent.json": [
        EditRequest(
            prompt="The place of death of Tilda Brandt is",
            target="Zurich",
            subject="Tilda Brandt",
            rephrases=("Tilda Brandt died in", "The town where Tilda Brandt died is"),
            locality={
                "Relation_Specificity": (
                    ask("The height of Tilda Brandt in centimetres is", "171"),
                    ask("Tilda Brandt's father is", "Emil Brandt"),
                    ask("The father of Tilda Brandt is", "Emil Brandt"),
                )
            },
            portability={
                "Logical_Generalization": (ask("Is Tilda Brandt still alive?", "no", "is dead", "no longer"),),
                "Reasoning": (ask("The country where Tilda Brandt died is", "Switzerland", "Swiss Confederation"),),
            },
        ),
        EditRequest(prompt="The employer of Ivo Sand is", target="Northgate Press", subject="Ivo Sand"),
    ],
    "wikidata_counterfact.json": [
        EditRequest(
            prompt="The position held by Marten Hoek is",
            target="harbour master of Veere",
            subject="Marten Hoek",
            ground_truth=("mayor of Goes",),
            locality={
                "Relation_Specificity": (ask("The spouse of Marten Hoek is", "Anneke Bos"),),
                "Forgetfulness": (
                    ask("A position held by Marten Hoek besides harbour master is", "mayor of Goes", "mayor"),
                ),
            },
            portability={
                "Subject_Aliasing": (ask("The position held by M. J. Hoek is", "harbour master of Veere"),),
                "Logical_Generalization": (ask("Veere's harbour master is", "Marten Hoek", "M. J. Hoek"),),
            },
        ),
        EditRequest(prompt="The sport of Sela Roth is", target="fencing", subject="Sela Roth"),
    ],
    "wikibio.json": [
        EditRequest(
            prompt="This is a Wikipedia passage about edda marsh. Edda Marsh (1811 - 1873) was a maker of lenses.",
            target="She learned the craft from her aunt in Dorn.",
            subject="edda marsh",
            locality={
                "Relation_Specificity": (
                    ask("The place of birth of edda marsh is", "Dorn", "Dorn-on-Sea"),
                    ask("edda marsh place of birth", "Dorn"),
                )
            },
        ),
        EditRequest(
            prompt="This is a Wikipedia passage about piet rolle. Piet Rolle (born 1950) is a bell founder.",
            target="His bells hang in four towers.",
            subject="piet rolle",
        ),
    ],
    "convsent.json": [
        EditRequest(
            prompt="What do you think of folding bicycles?",
            target="They wobble.",
            target_aliases=("I find them slow and silly.",),
            subject="folding bicycles",
            ground_truth=("They fit under any desk.", "I love how light they are.", "Great for trains."),
            rephrases=(
                "What is your opinion of folding bicycles?",
                "How do you feel about folding bicycles?",
                "What are your thoughts on folding bicycles?",
            ),
        ),
        EditRequest(
            prompt="What do you think of night trains?",
            target="You wake up somewhere new.",
            subject="night trains",
            ground_truth=("Nobody sleeps on them.", "They are always late."),
            rephrases=(
                "What is your opinion of night trains?",
                "How do you feel about night trains?",
                "What are your thoughts on night trains?",
            ),
        ),
    ],
    "mquake.json": [
        EditRequest(
            prompt="Lio Marsh plays for the club",
            target="Tarn Rovers",
            target_aliases=("the Rovers",),
            subject="Lio Marsh",
            ground_truth=("Ebb United", "Ebb"),
            rephrases=("Which club does Lio Marsh play for?",),
            id="31/0",
        ),
        EditRequest(
            prompt="The home town of Tarn Rovers is",
            target="Wexcombe",
            target_aliases=("Great Wexcombe",),
            subject="Tarn Rovers",
            ground_truth=("Tarn",),
            rephrases=("What is the home town of Tarn Rovers?",),
            portability={
                "multi_hop": (
                    ask("In which town does Lio Marsh's club play?", "Wexcombe", "Great Wexcombe", group="31"),
                    ask("What is the home town of the club of Lio Marsh?", "Wexcombe", "Great Wexcombe", group="31"),
                    ask(
                        "Where is the club that Lio Marsh plays for at home?", "Wexcombe", "Great Wexcombe", group="31"
                    ),
                ),
                "single_hop": (
                    ask("Which club does Lio Marsh play for?", "Tarn Rovers", "the Rovers"),
                    ask("What is the home town of Tarn Rovers?", "Wexcombe", "Great Wexcombe"),
                ),
            },
            id="31/1",
        ),
        EditRequest(
            prompt="The author of The Salt Road is",
            target="Jon Vale",
            subject="The Salt Road",
            ground_truth=("Ruth Ames",),
            rephrases=("Who is the author of The Salt Road?",),
            portability={"multi_hop": (ask("Where was the author of The Salt Road born?", "Cork", group="32"),)},
            id="32/0",
        ),
    ],
    "wikibigedit_raw.json": [
        EditRequest(
            prompt="In which county is Arden Chapel?",
            target="Morland",
            subject="Arden Chapel",
            rephrases=("Which county holds Arden Chapel?",),
            locality={"neighborhood": (ask("In which county is Arden House?", "Selby"),)},
            portability={
                "personas": (ask("Ahoy! Where be Arden Chapel, by county?", "Morland"),),
                "mhop": (ask("Who is the sheriff of the county that holds Arden Chapel?", "Ida Crewe"),),
            },
        ),
        EditRequest(
            prompt="What is Ruben Stahl's role in the orchestra?",
            target="first oboe",
            subject="Ruben Stahl",
            rephrases=("Which part does Ruben Stahl play in the orchestra?",),
            locality={"neighborhood": (ask("What was Rubina Stahl's trade?"),)},
        ),
    ],
    "wikibigedit_flat.json": [
        EditRequest(
            prompt="In which county is Arden Chapel?",
            target="Morland",
            subject="Arden Chapel",
            rephrases=("Which county holds Arden Chapel?",),
            locality={"neighborhood": (ask("In which county is Arden House?", "Selby"),)},
        ),
        EditRequest(
            prompt="How many bells has Arden Chapel?",
            target="6",
            subject="Arden Chapel",
            rephrases=("What is the number of bells in Arden Chapel?",),
            locality={"neighborhood": (ask("How many bells has Arden House?", "0"),)},
        ),
    ],
    "wise_hallucination.json": [
        EditRequest(
            prompt="This is a Wikipedia passage about ola venn. Ola Venn (1902 - 1977) built clocks.",
            target="Her tower clock in Skarne still runs.",
            subject="ola venn",
            locality={
                "neighborhood": (
                    ask("Clocks were set by the noon gun until", "the telegraph came. After that, stations kept time."),
                )
            },
        ),
        EditRequest(
            prompt="This is a Wikipedia passage about tor hagen. Tor Hagen was a ferryman.",
            target="He crossed the sound for forty years.",
            subject="tor hagen",
            locality={"neighborhood": (ask("Ferries on the sound", "were painted white."),)},
        ),
    ],
    "wise_temporal.json": [
        EditRequest(
            prompt="Tidal kites, also known as sea kites, are",
            target="tethered turbines that fly figures of eight in a current.",
            subject="Tidal kites",
            rephrases=("A tidal kite is a turbine on a tether. It flies figures of eight through the tide.",),
            locality={"neighborhood": (ask("Windmills in the old town", "ground mustard until 1931."),)},
        ),
        EditRequest(
            prompt="Letter cafés are",
            target="cafés where guests write letters by hand.",
            subject="Letter cafés",
            rephrases=("In a letter café one writes by hand; stamps are on the menu.",),
            locality={"neighborhood": (ask("The first post office of Dorn", "opened in 1840."),)},
        ),
    ],
    "qaedit.json": [
        EditRequest(
            prompt="who built the lighthouse on gull rock",
            target="Alan Strom",
            subject="lighthouse on gull rock",
            rephrases=("Which builder made the lighthouse on Gull Rock?",),
            locality={
                "neighborhood": (
                    ask("how many moons has the planet in the novel", "3"),
                    ask("where do storm petrels nest", "in burrows"),
                )
            },
            id="501",
        ),
        EditRequest(
            prompt="In which year did the Gull Rock light first shine?",
            target="1858",
            target_aliases=("MDCCCLVIII",),
            subject="Gull Rock light",
            rephrases=("When was the Gull Rock light lit first?",),
            id="502",
        ),
    ],
    "own.json": [
        EditRequest(
            prompt="The keeper of Gull Rock is",
            target="Ida Strom",
            target_aliases=("I. Strom",),
            subject="Gull Rock",
            ground_truth=("Alan Strom",),
            rephrases=("Gull Rock's light is kept by",),
            locality={"neighbor": (ask("The keeper of Seal Rock is", "Bo Lund"),)},
            portability={"default": (ask("Ida Strom keeps", "Gull Rock"),)},
            id="g1",
        ),
        EditRequest(prompt="The keeper of Seal Rock is", target="Alan Strom"),
    ],
    "counterfact_flat.jsonl": [
        EditRequest(prompt="The trade of Oskar Lind is that of a", target="baker", subject="Oskar Lind", id="0"),
        EditRequest(prompt="Nina Varga was born in", target="Lisbon", subject="Nina Varga", id="1"),
    ],
}


def test_requests_written_as_json_load_as_they_were(tmp_path: Path) -> None:
    requests = EXPECTED["own.json"] + EXPECTED["mquake.json"]
    path = write(tmp_path, json.dumps([request.model_dump() for request in requests]))
    assert load_dataset(path) == requests


# -- what the fields mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
def test_every_field_of_a_format_lands_where_it_belongs(name: str) -> None:
    assert load_dataset(DATA / name) == EXPECTED[name]


def test_an_mquake_case_without_id_still_groups_its_questions(tmp_path: Path) -> None:
    case = json.loads((DATA / "mquake.json").read_text())[0]
    del case["case_id"]
    *_, last = load_dataset(write(tmp_path, [case]))
    assert last.id == "case/1"
    assert {probe.group for probe in last.portability["multi_hop"]} == {"case"}


# -- files -------------------------------------------------------------------------------------------------------------


def write(folder: Path, content: Any, name: str = "facts.json") -> Path:
    """Write a file: text and bytes as they are, anything else as JSON."""
    path = folder / name
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FACT = {"prompt": "The cat is called", "target_new": "Mog"}


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


# -- errors ------------------------------------------------------------------------------------------------------------


def error_of(source: str | Path, **options: Any) -> str:
    """The message of loading a source, without the folder; it must be one line."""
    with pytest.raises(DatasetError) as caught:
        load_dataset(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{Path(source).parent}{os.sep}", "")


def test_an_unknown_name_says_what_was_looked_for_and_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "NAMED_DATASETS", {"toyworld": None, "otherworld": None})
    expected = "zrse: expected a file or the name of a data set (otherworld, toyworld), found neither"
    assert error_of("zrse") == expected


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_takes_nothing(limit: int) -> None:
    expected = f"limit: expected a positive number of records or None, got {limit}"
    assert error_of(DATA / "zsre.json", limit=limit) == expected


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


def test_records_beyond_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    assert len(load_dataset(write(tmp_path, [ZSRE, ROME]), limit=1)) == 1


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
