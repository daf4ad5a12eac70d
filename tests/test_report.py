"""The report as a file: what is read, what the page and its pictures hold, and that it is the same each time."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import edit, metrics, results, retained, write_run

from baft.report import compare, curves, write_report
from baft.report.digest import choose, digest
from baft.report.gates import gates
from baft.report.overview import _title
from baft.report.packing import pack
from baft.report.source import EditLine, Results, read_run
from baft.report.words import duration, facts, labels, percent, size

HOSTILE = """</script><script>document.title = "taken"</script><img src=x onerror=alert(1)> & "q" 'a' \u2028 é"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    edits = (edit(k, right_at_the_end=k % 10 != 3) for k in range(100))
    return write_run(tmp_path_factory.mktemp("runs") / "one", edits)


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return write_report([run]).page.read_text("utf-8")


class Page(HTMLParser):
    """Collects what a page would load, its scripts, and the ids that it names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self._in_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.loads += [value for name in ("src", "href", "xlink:href", "srcset") if (value := named.get(name))]
        self.ids += [value] if (value := named.get("id")) else []
        if tag == "script":
            self.scripts.append("")
            self._in_script = True

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def _data(html: str) -> list[dict[str, Any]]:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(data)


def _results(**changes: Any) -> Results:
    return Results.model_validate(results(10, **changes))


# -- what is read --


def test_a_run_of_today_is_read(run: Path) -> None:
    source = read_run(run)
    assert (source.results.edits, source.results.mode) == (100, "sequential")
    assert source.results.last.generation("locality") == 0.97
    assert [edit.index for edit in source.edits()] == list(range(100)) == [edit.index for edit in source.edits()]


def test_what_runs_did_not_record_before_is_no_data() -> None:
    old = results(10, retention=[{"edits": 10, **metrics()}])
    del old["method"]
    read = Results.model_validate(old | {"config": {"rank": 4, "gate_fn": "none"}})
    for picture in (curves.general(read), curves.memory(read), gates(read)):
        assert picture.figure is None and picture.words.startswith("No data")
    assert curves.retention(read).figure and curves.seconds(read, [1.0, 2.0]).figure


def test_general_ability_that_is_no_finite_number_is_left_out() -> None:
    points = [retained(1, 0), retained(10, 1)]
    points[1]["general"]["perplexity"] = None
    figure = curves.general(_results(retention=points)).figure
    assert figure and len(figure.axes[0].lines[0].get_xdata()) == 1
    points[0]["general"]["before"] = None
    assert curves.general(_results(retention=points)).words == "No data: no value of this run is finite."


def test_of_many_looks_back_some_are_named() -> None:
    figure = gates(_results(retention=[retained(n, min(n - 1, 3)) for n in range(1, 41)])).figure
    assert figure and [t.get_text() for t in figure.axes[0].get_xticklabels()] == [str(n) for n in range(1, 41, 4)]


@pytest.mark.parametrize(
    ("method", "words"),
    [("BaFT", "with BaFT, rank 4, blocks 0, 2"), ("LoRA", "with LoRA, blocks 0, 2"), (None, "with BaFT, rank 4")],
)
def test_a_runs_picture_names_its_method(method: str | None, words: str) -> None:
    made = results(10, method=method, config={"rank": 4, "gate_fn": "sigmoid", "layers": [0, 2]})
    assert words in _title({name: value for name, value in made.items() if value is not None})


def test_settling_and_what_is_remembered_of_texts_are_told() -> None:
    rounds = [{"losses": [0.2], "diverged": False}] * 2 + [{"losses": [None], "diverged": True}]
    made = results(10, settling=rounds)
    made["timing"]["settling_seconds"] = 90.0
    made["retention"][-1]["settled"] = 3
    made["retention"][-1]["memory"]["remembered"] = 2**20
    read = Results.model_validate(made)
    assert ("Settling", "2 rounds over all edits, 90 s") in facts(read)
    assert "After 10 edits, settled:" in curves.retention(read).words
    assert "After 10 edits, settled:" in curves.general(read).words
    assert "before and after settling" not in curves.retention(read).words
    made["retention"].insert(-1, {**made["retention"][-1], "settled": 0})
    read = Results.model_validate(made)
    for picture in (curves.retention(read), curves.general(read), compare.held({"a": read})):
        assert picture.words.count("The last two points are before and after settling.") == 1
    assert "memory of texts 1.0 MiB after 10 edits" in curves.memory(read).words
    assert "Settling" not in dict(facts(Results.model_validate(results(10))))


def test_requests_that_were_left_out_are_named() -> None:
    assert ("Left out", "3, 17") in facts(Results.model_validate(results(10, dropped=[3, 17])))
    assert "Left out" not in dict(facts(Results.model_validate(results(10))))


def test_ticks_say_where_they_are() -> None:
    """0.25 % isn't 0.2 %."""
    made = results(10)
    for point in made["retention"]:
        point["gates"] = {"0": [0.02, *[0.01] * 98]}
    read = Results.model_validate(made)
    for picture in (compare.trade_off({"a": read}), gates(read)):
        assert picture.figure is not None
        picture.figure.canvas.draw()
        axis = picture.figure.axes[-1].yaxis  # of the gates, the colours'
        ticks = [100 * tick for tick in axis.get_majorticklocs()]
        assert len(ticks) > 4
        assert [float(label.get_text().removesuffix(" %")) for label in axis.get_ticklabels()] == pytest.approx(ticks)


def test_it_is_told_how_much_the_model_knew_of_what_it_was_to_forget() -> None:
    made = results(10)
    assert "Known before" not in dict(facts(Results.model_validate(made)))
    made["metrics"]["final"]["reliability"]["known"] = 0.5
    made["metrics"]["final"]["generality"]["known"] = 0.254
    found = ("Known before", "the old answers to 50.0% of the prompts, 25.4% of the rephrasings")
    assert found in facts(Results.model_validate(made))


def _broken(kind: str, folder: Path) -> Path:
    run = write_run(folder / "run", [edit(0)])
    if kind == "no results":
        (run / "results.json").unlink()
    elif kind == "no run":
        (run / "results.json").unlink()
        (run / "edits.jsonl").unlink()
    elif kind == "no edits":
        (run / "edits.jsonl").unlink()
    elif kind == "no folder":
        shutil.rmtree(run)
    elif kind == "older":
        (run / "results.json").write_text(json.dumps({"metrics": {"rewrite_acc": 1.0}}))
    elif kind == "not json":
        (run / "results.json").write_text("{")
    elif kind == "torn line":
        with (run / "edits.jsonl").open("a") as file:
            file.write('{"index": 1, "pro')
    return run


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no results", "expected the folder of a run, got .*run, which has no results.json"),
        ("no run", "expected the folder of a run, got .*run, which has no results.json"),
        ("no folder", "expected the folder of a run, got .*run, where there is no folder"),
        ("no edits", "expected the folder of a run, got .*run, which has no edits.jsonl"),
        ("older", "expected the results of a run in .*results.json, got one with protocol: Field required"),
        ("not json", "expected the results of a run in .*results.json, got one with its text: Invalid JSON"),
        ("torn line", "expected an edit in line 2 of .*edits.jsonl, got one with its text: Invalid JSON"),
    ],
)
def test_what_is_no_finished_run_is_one_clear_error(kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        write_report([_broken(kind, tmp_path)])
    assert not list(tmp_path.glob("**/report*"))


def test_no_folders_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report([])


def test_a_run_named_twice_is_an_error(run: Path) -> None:
    with pytest.raises(ValueError, match="expected different runs"):
        write_report([run, run / ".." / run.name])


# -- what the page holds --


def test_the_page_loads_nothing(html: str) -> None:
    page = Page(html)
    assert not [target for target in page.loads if not target.startswith(("#", "data:image/png"))]
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", html)


def test_only_the_scripts_that_the_policy_names_may_run(html: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy.startswith("default-src 'none'") and scripts
    assert re.findall("'sha256-([^']*)'", policy) == hashes


def test_no_two_elements_have_the_same_id(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [edit(0), edit(1)]) for name in "ab"]
    ids = [name for name in Page(write_report(runs, tmp_path / "page.html").page.read_text("utf-8")).ids]
    ours = [name for name in ids if not re.fullmatch(r"[A-Za-z][0-9a-f]{10}|image[0-9a-f]{10}", name)]
    assert len(ours) == len(set(ours)) and "run-2-gates" in ours


def test_the_same_runs_give_the_same_bytes(run: Path, html: str, tmp_path: Path) -> None:
    again = write_report([run], tmp_path / "again.html")
    assert again.page.read_text("utf-8") == html
    names = ["retention", "general", "seconds", "memory", "gates"]
    assert [picture.name for picture in again.pictures] == [f"again-{name}.png" for name in names]
    for picture in again.pictures:
        assert picture.read_bytes() == (run / picture.name.replace("again", "report")).read_bytes()


def test_hostile_texts_are_data(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [edit(0, prompt=HOSTILE, target=HOSTILE, said=HOSTILE)], dataset=HOSTILE)
    html = write_report([run]).page.read_text("utf-8")
    assert len(Page(html).scripts) == 5  # the data, and the four of the page
    assert "<img" not in html and 'title = "taken"' not in html
    assert HOSTILE in _data(html)[0]["texts"]


def test_already_is_what_the_unedited_model_gave_of_the_new_answers(html: str) -> None:
    lines = [EditLine.model_validate(edit(k, before="Oboe." if k < 3 else "cello.")) for k in range(4)]
    assert digest(lines).already == {"reliability": 0.75, "generality": 0.0}
    heads = re.findall(r'<th scope="col">(.*?)</th>', html)
    assert heads[:3] == ["already", "right after", "at the end"]


def test_a_measure_without_data_is_said_to_have_none(tmp_path: Path) -> None:
    none = metrics(portability=None)
    run = write_run(tmp_path / "run", [edit(0)], metrics={"immediate": none, "final": none})
    html = write_report([run]).page.read_text("utf-8")
    (row,) = re.findall(r"portability</th>(.*?)</tr>", html, re.DOTALL)
    assert row.count("no data") == 4 and "%" not in row


def test_texts_and_curves_stand_once(html: str) -> None:
    (run,) = _data(html)
    assert len(run["texts"]) == len(set(run["texts"])) and run["texts"].count("oboe") == 1
    assert run["curves"] == [[8.0, 2.5, 0.6, 0.02]]


def test_a_packed_edit_has_all_that_was_said() -> None:
    line = edit(7, right_at_the_end=False, before="lute.")
    packed = pack([EditLine.model_validate(line)], {0})
    texts, (row,) = packed["texts"], packed["edits"]
    index, id, prompt, target, steps, seconds, ended, curve, immediate, final, probes, superseded = row
    assert (index, texts[id], texts[prompt], texts[target]) == (7, "made-up-7", "Person 7 plays the", "oboe")
    assert (steps, seconds, ended, packed["curves"][curve]) == (4, 0.5, "converged", (8.0, 2.5, 0.6, 0.02))
    assert (immediate, final, len(probes), superseded) == (True, False, 4, False)
    measure, kind, asked, answers, before, text, right, later, still = probes[0]
    assert (measure, texts[kind], texts[asked]) == (0, "reliability", "Person 7 plays the")
    assert [texts[answer] for answer in answers] == ["oboe"] and texts[before] == "lute."
    assert (texts[text], right, texts[later], still) == ("oboe", True, "violin", False)


def test_single_edits_have_no_end_that_holds_them_all() -> None:
    packed = pack([EditLine.model_validate(edit(0, final=[]))], {0})
    (row,) = packed["edits"]
    assert row[8:10] == [True, None] and row[10][0][-2:] == [None, None]


def test_what_is_superseded_has_not_failed() -> None:
    lines = [EditLine.model_validate(edit(k, right_at_the_end=False, diverged=k == 2)) for k in range(3)]
    assert digest(lines, superseded={1, 2}).troubled == [True, False, True]
    packed = pack(lines, {0, 1}, superseded={1})
    failed, superseded = packed["edits"]
    judged = [[probe[-1] for probe in row[10]] for row in (failed, superseded)]
    assert (failed[9], judged[0]) == (False, [False, False, True, True])
    assert (superseded[9], judged[1]) == (None, [None, None, True, True])  # what it should leave alone is asked of it
    assert packed["texts"][superseded[10][0][-2]] == "violin"


def test_how_an_edit_ended_is_told() -> None:
    line = edit(0)
    endings = {
        "converged": {},
        "stopped": {"converged": False},
        "diverged": {"converged": False, "diverged": True},
        "out of memory": {"converged": False, "out_of_memory": True},
    }
    lines = [EditLine.model_validate(line | {"training": line["training"] | change}) for change in endings.values()]
    assert [row[6] for row in pack(lines, {0, 1, 2, 3})["edits"]] == list(endings)
    assert digest(lines).troubled == [False, False, True, True]


def test_many_edits_are_a_sample_with_every_failure_and_the_page_says_so(tmp_path: Path) -> None:
    failed, diverged = {5, 50, 95}, {20}
    edits = (edit(k, right_at_the_end=k not in failed, diverged=k in diverged) for k in range(100))
    html = write_report([write_run(tmp_path / "run", edits)], most_edits=10).page.read_text("utf-8")
    (run,) = _data(html)
    shown = {row[0] for row in run["edits"]}
    assert (run["total"], len(shown)) == (100, 10) and failed | diverged <= shown


def test_a_sample_is_spread_over_the_run() -> None:
    assert choose([False] * 100, 4) == {0, 25, 50, 75}
    assert choose([True] * 100, 4) == {0, 25, 50, 75}
    assert choose([False, True, False], 2) == {0, 1}
    assert choose([False, True], 9) == {0, 1}


# -- what the pictures show --


def test_retention_has_a_curve_for_each_measure_that_has_data() -> None:
    points = [{**retained(n, k), "portability": None} for k, n in enumerate((1, 10))]
    figure = curves.retention(_results(retention=points)).figure
    assert figure
    (axes,) = figure.axes
    drawn = {line.get_label(): list(line.get_xydata().tolist()) for line in axes.lines}  # type: ignore[union-attr]
    assert set(drawn) == {"reliability", "generality", "locality"}
    assert drawn["generality"] == [[1, 0.95], [10, pytest.approx(0.91)]] and axes.get_xscale() == "log"


def test_general_ability_is_a_ratio_to_the_unedited_model() -> None:
    figure = curves.general(_results(retention=[retained(1, 0), retained(10, 5)])).figure
    assert figure and figure.axes[0].lines[0].get_xydata().tolist() == [[1, 1.0], [10, 1.15]]  # type: ignore[union-attr]


def test_time_of_many_edits_is_smoothed() -> None:
    figure = curves.seconds(_results(), [1.0] * 500 + [3.0] * 500).figure
    assert figure
    (line,) = figure.axes[0].lines
    assert len(line.get_xdata()) == 100 and line.get_xdata()[0] == 5.5  # type: ignore[arg-type, index]
    assert set(line.get_ydata()) == {1.0, 3.0}  # type: ignore[arg-type]


def test_a_basis_that_was_not_there_yet_is_blank() -> None:
    picture = gates(_results(retention=[retained(1, 0), retained(10, 1)]))
    assert picture.figure
    table = picture.figure.axes[0].images[0].get_array()
    assert table is not None and table.shape == (8, 2)
    assert table.mask.tolist() == [[False, False]] * 6 + [[True, False]] * 2


def test_the_plane_has_a_mark_for_each_run_and_measure() -> None:
    final = {"immediate": metrics(), "final": metrics(locality=0.8, reliability=0.9, generality=0.6)}
    nothing = {"immediate": metrics(locality=None), "final": metrics(locality=None)}
    runs = {"a": _results(), "b": _results(metrics=final), "c": _results(metrics=nothing)}
    figure = compare.trade_off(runs).figure
    assert figure
    marks = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_marker() != "None"]  # type: ignore[union-attr]
    assert marks == [[[0.97, 0.9]], [[0.97, 0.9]], [[0.8, 0.9]], [[0.8, 0.6]]]


# -- words --


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    first, second, third = (write_run(tmp_path / name, [edit(0)]) for name in ("a", "b", "x/a"))
    other = write_run(tmp_path / "c", [edit(0)], method="in-context")
    called = labels([read_run(folder) for folder in (first, second, other)])
    assert called == ["BaFT, rank 8 (a)", "BaFT, rank 8 (b)", "in-context"]
    assert len(set(labels([read_run(folder) for folder in (first, third)]))) == 2


def test_numbers_in_words() -> None:
    assert [percent(value) for value in (None, 0.0, 0.5)] == [
        "no data",
        "0.0\N{NO-BREAK SPACE}%",
        "50.0\N{NO-BREAK SPACE}%",
    ]
    assert [size(value) for value in (512, 2048, 3 * 2**20, 2**33)] == ["512 B", "2.0 KiB", "3.0 MiB", "8.0 GiB"]
    assert [duration(value) for value in (9, 600, 36_000)] == ["9 s", "10 min", "10.0 h"]
