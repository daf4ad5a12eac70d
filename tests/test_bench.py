"""The benchmarks' promises: what is wrong gets no time, and every figure says where it comes from."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parents[1] / "bench"))

import bookkeeping  # after the folder of the benchmarks is known
import capacity
import comparison
import editing_quality
import long_run
import long_targets
import roofline
from products import recorded_products
from report import called, commit, markdown, provenance
from rich.console import Console
from small_runs import run_in
from terminal import plain_console
from timing import Spread, interleaved
from tiny import tiny_model, tiny_tokenizer
from variants import RIVALS, Case

from baft import BaftConfig

CPU = torch.device("cpu")
CASE = Case(rows=3, d=16, r=2, dtype=torch.float32, training=False)


def test_bytes_are_those_that_must_move() -> None:
    # h and out; D, G and R; w and u.
    assert CASE.bytes == 2 * 3 * 16 * 4 + 3 * 2 * 16 * 4 + 2 * 3 * 2 * 4
    # The backward pass: g, h, dh; D, G and R; their gradients; w and u.
    training = Case(3, 16, 2, torch.bfloat16, training=True)
    forward = Case(3, 16, 2, torch.bfloat16, training=False).bytes
    assert training.bytes == forward + 3 * 3 * 16 * 2 + 3 * 2 * 16 * 2 + 3 * 2 * 16 * 4 + 2 * 3 * 2 * 4


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(*given: Any, **options: Any) -> Any:
        result = served(*given, **options)
        return result._replace(update=result.update * 1.001) if options.get("return_aux") else result

    served = roofline.baft
    monkeypatch.setattr(roofline, "baft", slightly_wrong)
    monkeypatch.setattr(roofline, "fused_backends", lambda h, rank: ["cpu"])
    eager = {"eager": RIVALS["eager"]}
    rows = {row.variant: row for row in roofline.measure(CASE, eager, CPU, rounds=1)}
    assert rows["cpu"].spread is None
    assert "update" in str(rows["cpu"].problem)
    assert rows["eager"].spread is not None and rows["copy"].spread is not None
    cells = {line[1]: line for line in roofline._cells(CASE, list(rows.values()))}
    assert cells["cpu"][2] == "no time"


def test_who_raises_gets_no_time_and_takes_no_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr(roofline, "baft", fails)
    monkeypatch.setattr(roofline, "fused_backends", lambda h, rank: ["cpu"])
    rivals = {"eager": RIVALS["eager"], "compiled": fails}
    rows = {row.variant: row for row in roofline.measure(CASE, rivals, CPU, rounds=1)}
    assert rows["cpu"].problem == rows["compiled"].problem == "OutOfMemoryError: out of memory"
    assert rows["eager"].spread is not None and rows["copy"].spread is not None
    monkeypatch.setattr(roofline, "interleaved", fails)
    rows = {row.variant: row for row in roofline.measure(CASE, rivals, CPU, rounds=1)}
    assert {row.problem for row in rows.values()} == {"OutOfMemoryError: out of memory"} and len(rows) == 4


def test_variants_take_turns() -> None:
    order: list[str] = []
    works = {name: lambda number, name=name: order.append(name) for name in ("one", "other")}
    spreads = interleaved(works, rotation=2, rounds=4, device=CPU)
    assert set(spreads) == {"one", "other"}
    changes = sum(order[i] != order[i + 1] for i in range(len(order) - 1))
    assert changes >= 4  # each round has both, and the first of one round isn't that of the next


def test_a_spread_is_of_the_batches() -> None:
    spread = Spread.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    assert (spread.median, spread.p20, spread.p80) == (3.5, 2.0, 5.0)


def test_a_figure_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a checkout without git
    monkeypatch.setenv("BAFT_COMMIT", "abc123")
    about = provenance(CPU)
    assert about["commit"] == "abc123"
    assert about["device"]
    assert about["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(not shutil.which("git"), reason="git isn't installed")
def test_a_commit_is_dirty_by_more_than_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / "bench" / name for name in ("run.py", "results/run.md")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("old")
    who = ("-c", "user.name=N", "-c", "user.email=n@example.org")
    for arguments in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "first")):
        subprocess.run(["git", *arguments], check=True)
    clean = commit()
    files[1].write_text("new")
    assert clean and not clean.endswith("-dirty") and commit() == clean
    files[0].write_text("new")
    assert commit() == f"{clean}-dirty"


def test_products_of_both_passes_are_recorded() -> None:
    layer = torch.nn.Linear(4, 5)
    x = torch.randn(3, 4, requires_grad=True)
    with recorded_products() as products:
        layer(x).sum().backward()
        torch.bmm(torch.randn(2, 3, 4), torch.randn(2, 4, 6))
    once = 2 * 3 * 4 * 5
    assert products.operations == 3 * once + 2 * 2 * 3 * 4 * 6
    assert products.seconds() > 0


def test_a_bar_in_a_cell_ends_no_column() -> None:
    about = {"commit": "c", "device": "d", "threads": 1, "versions": {"torch": "2"}, "command": "x", "date": "today"}
    assert markdown([["|R|", "b"], ["1", "2"]], about).splitlines()[0] == r"| \|R\| | b |"


def test_what_is_said_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    plain_console().print("failed: [/INST] [tribe] :cat:")
    assert capsys.readouterr().out == "failed: [/INST] [tribe] :cat:\n"


# -- comparisons of edits --


def test_the_grid_is_the_same_for_both_methods() -> None:
    plan = editing_quality.tuning_plan(["batch"])
    points = [entry.variant.overrides for entry in plan]
    half = len(plan) // 2
    assert points[:half] == points[half:] and len({str(point) for point in points}) == half == 6
    assert [entry.variant.method for entry in plan] == ["baft"] * half + ["loreft"] * half
    assert len({entry.label for entry in plan}) == len(plan)


def test_every_comparison_can_be_configured() -> None:
    single, together = editing_quality.ABLATIONS_OF_SINGLE_EDITS, editing_quality.ABLATIONS
    for variants in (capacity.VARIANTS, long_targets.VARIANTS, single, together):
        assert [BaftConfig(**changes) for changes in variants.values()]


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("factworld", "factworld"),
        ("data/facts.json", "facts"),
        ("data/facts.json[:600]", "facts_0-600"),
        ("facts.json[300:]", "facts_300-"),
    ],
)
def test_what_results_about_a_data_set_are_called(dataset: str, name: str) -> None:
    assert called(dataset) == name


def found(entry: comparison.Entry) -> dict[str, Any]:
    """What a run might have found."""
    about = {"label": entry.label, "mode": entry.mode, "seed": entry.seed, "parameters": 1}
    measured = {"measures": {"reliability": 1.0}, "known before": {"prompts": 0.75}}
    return {**about, **measured, "steps": 1, "seconds_per_edit": 1.0}


def test_a_comparison_keeps_what_is_done_and_says_that_it_is_not_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variants = {"one": comparison.Variant(), "other": comparison.Variant("loreft")}
    plan = comparison.plan_of(variants, ["sequential"], [0])
    (tmp_path / "some_comparison.md").write_text("an earlier one")

    def one_by_one(*_: object) -> Iterator[list[dict[str, Any]]]:
        yield [found(plan[1])]  # the second was faster
        assert (tmp_path / "some_comparison.md").read_text() == "an earlier one"
        kept = (tmp_path / "some_comparison.partial.md").read_text()
        assert "| other |" in kept and "1 of 2 runs" in kept
        yield [found(entry) for entry in plan]

    monkeypatch.setattr(comparison, "RESULTS", tmp_path)
    monkeypatch.setattr(comparison, "run_all", one_by_one)
    comparison.compare("comparison", plan, comparison.Task("model", "some.json", 3), 1)
    kept = json.loads((tmp_path / "some_comparison.json").read_text())
    assert [run["label"] for run in kept["runs"]] == ["one", "other"]
    table = (tmp_path / "some_comparison.md").read_text()
    assert " of 2 runs" not in table
    assert "The unedited model gave the old answers to 75.0% of the prompts." in table
    assert {path.name for path in tmp_path.iterdir()} == {"some_comparison.json", "some_comparison.md"}


def test_the_figures_of_a_long_run_are_those_of_all_its_processes(tmp_path: Path) -> None:
    run_in(tmp_path)
    path = tmp_path / "results.json"
    results = json.loads(path.read_text())
    grown = [{"process": 300 * 2**20, "remembered": 2**20}, {"process": 500 * 2**20, "remembered": 8 * 2**20}]
    for point in results["retention"]:  # the last one by a process that was started again
        last = point is results["retention"][-1]
        point["memory"] = {"process": 400 * 2**20, "remembered": None} if last else grown[point["edits"] > 1]
    path.write_text(json.dumps(results))
    figures = long_run.figures(tmp_path)
    assert (figures["MiB at most, up to edit 9"], figures["MiB at most, at the end"]) == (500, 500)
    assert figures["MiB of texts that the engine remembers, at most"] == 8
    final = results["metrics"]["final"]["reliability"]["generation"]
    assert figures["final reliability, by generation"] == final
    assert 0 < figures["share of journal and checkpoints"] < 1


def test_bookkeeping_is_all_of_a_run_but_its_training(tmp_path: Path) -> None:
    tiny_model(max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    began = time.perf_counter()
    found = bookkeeping.measured(str(tmp_path / "model"), 23, tmp_path)
    seconds = time.perf_counter() - began
    rows = found["stretches"]
    assert [row["requests"] for row in rows] == [2 * (k + 1) for k in range(10)]
    assert all(row["ms of training"] > 0 for row in rows) and sum(row["ms of all else"] for row in rows) > 0
    assert sum(2 * (row["ms of training"] + row["ms of all else"]) for row in rows) < 1000 * seconds
    assert [row["MiB at most"] for row in rows] == sorted(row["MiB at most"] for row in rows)
    assert 0 < found["seconds to go on"] < seconds and 0 < found["seconds of the report"] < seconds


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lines = [json.dumps({"prompt": f"{name} is in", "target": "Norland"}) for name in ("Ada", "Bob")]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    small = {"max_steps": 1, "rank": 2, "settling_rounds": 0, "subject_texts": 0}
    variants = {
        name: comparison.Variant(overrides={**small, **changes})
        for name, changes in {"wrong": {"rank": -1}, "right": {}}.items()
    }
    said = io.StringIO()
    task = comparison.Task(str(tmp_path), str(tmp_path / "facts.jsonl"), 2)
    plan = comparison.plan_of(variants, ["sequential"], [0])
    runs = comparison.run_all(plan, task, 1, Console(file=said, width=200))
    assert [[run["label"] for run in done] for done in runs] == [["right"]]
    assert "wrong, seed 0: failed: ValidationError" in said.getvalue()
