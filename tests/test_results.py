"""What the documentation says was measured is what the raw results say: no figure in its tables is typed by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import comparison  # noqa: E402  # after the folder of the benchmarks is known

RESULTS = ROOT / "bench" / "results"
HEADS = {"neighbours": "- neighbour", "unrelated": "- unrelated", "same subject": "- same subject"}
THREE = ("reliability", "generality", "locality")


def cells(page: Path, heading: str, number: int = 0) -> list[list[str]]:
    """The rows of a table under a heading, the first one its header."""
    under = page.read_text().split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    tables = [block.splitlines() for block in under.split("\n\n") if block.startswith("|")]
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in tables[number])
    return [header, *body]


def table(page: Path, heading: str, number: int = 0) -> list[dict[str, str]]:
    """The rows of a table under a heading, by their columns' heads."""
    header, *body = cells(page, heading, number)
    heads = [head.removeprefix("of it: ") for head in header]
    return [dict(zip(heads, row, strict=True)) for row in body]


def raw(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def compared(name: str) -> Callable[[str, str], dict[str, str]]:
    """What a comparison found, by mode and label, as its own table has it."""
    header, *rows = comparison.tabulate(raw(f"{name}.json")["runs"])
    found = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows}
    return lambda mode, label: found[mode, label]


def assert_same(row: dict[str, str], found: dict[str, str]) -> None:
    """Every figure that a row has, in places where deviations don't count."""
    named = {HEADS.get(head, head): cell for head, cell in row.items()}
    figures = {head: cell for head, cell in named.items() if head in found and head not in ("mode", "") and cell}
    assert len(figures) >= 3
    assert figures == {
        head: found[head] if "±" in cell else found[head].split(" ")[0] for head, cell in figures.items()
    }


@pytest.mark.parametrize(("number", "data"), [(0, "factworld"), (1, "counterfact_3k_0-1200")])
def test_requests_in_every_mode(number: int, data: str) -> None:
    for row in table(RESULTS / "README.md", "A hundred requests", number):
        mode = row["mode"].removesuffix(", one seed")
        assert_same(row, compared(f"{data}_editing_{mode}")(mode, row["method"]))


def test_other_methods() -> None:
    found = compared("factworld_baselines_sequential")
    for row in table(RESULTS / "README.md", "Other methods"):
        assert_same(row, found("sequential", row["method"]))


def test_parts_of_a_sequence() -> None:
    in_other_words = {
        "without rehearsal": "no rehearsal",
        "without rehearsal and consolidation": "no rehearsal, no consolidation",
        "without consolidation": "no consolidation",
        "without settling": "no settling",
        "without retellings": "no retellings",
        "without any text about the subjects, and so without retellings": "nothing about the subjects",
        "rank that grows from 16 to 64": "rank grows from 16 to 64",
        "rank that grows from 64 to 128": "rank grows from 64 to 128",
    }
    found = compared("factworld-large_capacity_200")
    for row in table(RESULTS / "README.md", "What each part of a sequence brings"):
        assert_same(row, found("sequential", in_other_words.get(row[""], row[""])))


@pytest.mark.parametrize(
    ("heading", "run"),
    [("FactWorld", "long_run_factworld-large_baft_1000"), ("CounterFact", "long_run_counterfact_3k_0-1200_baft_1000")],
)
def test_a_thousand_in_a_sequence(heading: str, run: str) -> None:
    results, figures = raw(f"{run}/results.json"), raw(f"{run}/figures.json")["figures"]
    points = {f"{point['edits']:,}" + ", settled" * bool(point["settled"]): point for point in results["retention"]}
    for row in table(RESULTS / "README.md", heading):
        measure, *found = row.values()
        assert found.pop() == f"{figures[f'final {measure}, by generation']:.3f}"
        moments = list(row)[1:-1]
        assert found == [f"{points[moment][measure]['generation']:.3f}" for moment in moments]


def times(name: str, mode: str, task: str, variant: str) -> float:
    rows = [row for row in raw(f"edit_throughput_{name}_cpu.json")["rows"] if "times_plain" in row]
    return next(r["times_plain"] for r in rows if (r["mode"], r["task"], r["variant"]) == (mode, task, variant))


def test_how_fast_edits_are_made() -> None:
    tasks = ("edit", "edit + locality", "by default")
    variants = {
        "times": "ours",
        "without replay": "- replay",
        "head where needed": "- head where needed",
        "texts side by side": "- texts side by side",
        "edits abreast": "- edits abreast",
    }
    under = table(RESULTS / "README.md", "How fast edits are made")
    assert len(under) == 9
    for number, row in enumerate(under):
        mode = next(cell for cell in row.values() if cell in ("single", "sequential", "batch"))
        for head, variant in variants.items():
            if cell := row[head].strip("*"):
                assert cell == f"{times('factworld', mode, tasks[number // 3], variant):.1f}"
    for (_, *found), task in zip(cells(ROOT / "README.md", "How fast edits are made")[1:], tasks, strict=True):
        assert found == [
            f"{times(name, mode, task, 'ours'):.1f}"
            for name in ("factworld", "counterfact_3k_0-1200")
            for mode in ("single", "sequential", "batch")
        ]


def test_the_summary() -> None:
    modes = {"single edits": "single", "one batch": "batch", "in a sequence": "sequential"}
    files = {"FactWorld": "factworld", "CounterFact": "counterfact_3k_0-1200"}
    _, *rows = cells(ROOT / "README.md", "What we measured")
    assert len(rows) == 7
    for label, requests, *found in rows:
        data, how, *_ = label.split(", ")
        if requests == "1,000":
            name = "long_run_factworld-large" if data == "FactWorld" else f"long_run_{files[data]}"
            figures = raw(f"{name}_baft_1000/figures.json")["figures"]
            assert found == [*(f"{figures[f'final {measure}, by generation']:.3f}" for measure in THREE), "", "", ""]
            continue
        runs = raw(f"{files[data]}_editing_{modes[how]}.json")
        assert runs["task"]["requests"] == int(requests)
        assert found == [
            f"{fmean(run['measures'][measure] for run in runs['runs'] if run['label'] == method):.3f}"
            for method in ("BaFT", "LoReFT")
            for measure in THREE
        ]
