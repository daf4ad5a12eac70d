"""``baft run --resume`` as a user types it: what it needs, what may be said anew, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import baft

from baft import BaftEditor
from baft.runs.start import RunWords, start


def test_resuming_needs_the_folder_alone(sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A finished run is one that has nothing left to do."""
    out, results = sequential_run
    again = Path(shutil.copytree(out, tmp_path / "again"))
    (again / "results.json").unlink()
    done = baft("run", "--resume", "--out", again, "--json")
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout)
    assert resumed["metrics"] == results["metrics"] and len(resumed["sessions"]) == 2
    assert (again / "edits.jsonl").read_bytes() == (out / "edits.jsonl").read_bytes()


def test_a_run_that_is_done_shows_what_it_found(
    sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is loaded for that, and no file changes."""
    out, results = sequential_run
    again = Path(shutil.copytree(out, tmp_path / "again"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in again.rglob("*") if path.is_file()}
    monkeypatch.setattr("baft.runs.start.start", None)
    done = baft("run", "--resume", "--out", again, "--seed", 3)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert f"The run in {again} is done: nothing is left to do." in said
    assert "100.0 %" in said and str(again / "results.json") in said and str(again / "report.html") in said
    done = baft("run", "--resume", "--out", again, "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == results and "nothing is left to do" in done.stderr
    refused = baft("run", "--resume", "--out", again, "--seed", 4)
    assert refused.returncode == 2 and "seed: the run was started with 3, got 4" in refused.stderr
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in again.rglob("*") if path.is_file()}
    assert after == before
    (again / "report.html").unlink()  # what ended it before its report was written
    assert baft("run", "--resume", "--out", again).returncode == 0 and (again / "report.html").exists()
    (again / "results.json").write_text("{")
    damaged = baft("run", "--resume", "--out", again)
    assert damaged.returncode == 2 and f"{again}/results.json: expected JSON, got a damaged file" in damaged.stderr


def test_a_run_goes_on_wherever_its_files_are(
    testbed: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started with paths from one folder, resumed in another; then with all files in other places."""
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    start.mkdir()
    elsewhere.mkdir()
    shutil.copytree(testbed, start / "model")
    shutil.copy(dataset, start / "facts.json")
    (start / "texts.txt").write_text("Arvik is in Norland.\n")
    monkeypatch.chdir(start)
    files = ("--model", "model", "--dataset", "facts.json[:3]", "--held-out", "texts.txt")
    run = tmp_path / "run"
    done = baft("run", *files, "--mode", "sequential", "--method", "none", "--out", run)
    assert done.returncode == 0, done.stderr
    (run / "results.json").unlink()  # it has an end to come to, for which it needs all of them
    monkeypatch.chdir(elsewhere)
    assert baft("run", "--resume", "--out", run).returncode == 0
    (run / "results.json").unlink()
    for path in start.iterdir():
        shutil.move(path, elsewhere / f"moved-{path.name}")
    done = baft("run", "--resume", "--out", run)
    assert done.returncode == 2 and str(start / "facts.json[:3]") in done.stderr
    files = ("--model", "moved-model", "--dataset", "moved-facts.json[:3]", "--held-out", "moved-texts.txt")
    for _ in range(2):  # as it is done, too: there is no other way to tell of new places
        done = baft("run", "--resume", "--out", run, *files)
        assert done.returncode == 0 and "nothing is left to do" not in done.stdout, done.stderr
    monkeypatch.chdir(tmp_path)
    assert baft("edits", "rollback", run, 2, "--yes").returncode == 0  # said once is enough


def test_how_much_is_remembered_is_passed_on(
    sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose memory ran out goes on with less."""
    out, _ = sequential_run
    again = Path(shutil.copytree(out, tmp_path / "again"))
    (again / "results.json").unlink()
    given: list[int | None] = []

    def note(words: RunWords, *_: object, **__: object) -> None:
        given.append(words.remember)
        editor = start(words, None).editor
        assert isinstance(editor, BaftEditor) and editor._options.memory == (words.remember or 2048) << 20
        raise ValueError("that is all")

    monkeypatch.setattr("baft.runs.start.start", note)
    for option in ((), ("--remember", 3)):
        done = baft("run", "--resume", "--out", again, *option)
        assert done.returncode == 2 and "that is all" in done.stderr
    assert given == [None, 3]


def test_resuming_another_run_is_refused(sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = sequential_run
    done = baft("run", "--resume", "--out", out, "--mode", "batch")
    assert done.returncode == 2 and "mode: the run was started with 'sequential', got 'batch'" in done.stderr
    other = tmp_path / "other.yaml"
    other.write_text("rank: 23\nlocality_weight: 5\n")
    for option, value in (
        ("--seed", 5),
        ("--method", "lora"),
        ("--backend", "reference"),
        ("--measure-every", 3),
        ("--final", 1),
        ("--slots", 2),
        ("--quantise", "bnb-4bit"),
    ):
        done = baft("run", "--resume", "--out", out, option, value)
        assert done.returncode == 2, option
        assert f"{option[2:].replace('-', '_')}: the run was started with" in done.stderr
    assert baft("run", "--resume", "--out", out, "--tensor-parallel").returncode == 2
    done = baft("run", "--resume", "--out", out, "--held-out", other)
    assert (
        done.returncode == 2 and "the held-out texts changed (2 before and now, but with other contents)" in done.stderr
    )
    done = baft("run", "--resume", "--out", out, "--config", other)
    assert done.returncode == 2 and done.stderr.endswith("with another one: rank was 24 and is 23\n")
    other.write_text("rank: 24\nlocality_weight: 5\nseed: 4\n")
    done = baft("run", "--resume", "--out", out, "--config", other)
    assert done.returncode == 2 and done.stderr.endswith("with another one: seed was 3 and is 4\n")
    same = out.with_suffix(".yaml")  # the same words may be said again
    again = shutil.copytree(out, tmp_path / "again")
    for file in (same, other):  # in which --seed overrules what the file says
        done = baft(
            "run", "--resume", "--out", again, "--seed", 3, "--config", file, "--edits", 4, "--mode", "sequential"
        )
        assert done.returncode == 0, done.stderr
    for command in (("run", "--resume", "--out"), ("edits", "rollback"), ("edits", "drop")):
        done = baft(*command, tmp_path / "none", *((5,) if command[0] == "edits" else ()))
        assert done.returncode == 2 and "run.json" in done.stderr
        assert not (tmp_path / "none").exists()  # nobody asked for a folder
    done = baft("run", "--out", out, "--model", "m", "--dataset", "d", "--mode", "batch")
    assert done.returncode == 2 and "--resume" in done.stderr
    done = baft("run", "--out", tmp_path / "new", "--mode", "batch")
    assert done.returncode == 2 and "expected --model, --dataset and --mode" in done.stderr
    assert "got no --model and --dataset" in done.stderr


def test_a_run_goes_on_without_tasks_that_are_no_longer_to_be_had(
    sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Or it could never come to its end."""
    again = Path(shutil.copytree(sequential_run[0], tmp_path / "again"))
    (again / "results.json").unlink()
    began = json.loads((again / "run.json").read_text())
    began["started_with"]["lm_eval"] = "gone"
    (again / "run.json").write_text(json.dumps(began))
    resume = ("run", "--resume", "--out", again)
    assert baft(*resume).returncode == 2
    done = baft(*resume, "--lm-eval", "other")
    assert done.returncode == 2 and "lm_eval: the run was started with 'gone', got 'other'" in done.stderr
    done = baft(*resume, "--lm-eval", "")
    assert done.returncode == 0, done.stderr


def test_a_data_set_that_changed_is_refused(
    sequential_run: tuple[Path, dict[str, Any]], dataset: Path, tmp_path: Path
) -> None:
    out, _ = sequential_run
    again = Path(shutil.copytree(out, tmp_path / "again"))
    (again / "results.json").unlink()
    other = tmp_path / "other.json"
    other.write_text(dataset.read_text().replace(json.loads(dataset.read_text())[0]["target_new"], "Elsewhere"))
    words = json.loads((again / "run.json").read_text())
    words["started_with"]["dataset"] = str(other)
    (again / "run.json").write_text(json.dumps(words))
    done = baft("run", "--resume", "--out", again)
    said = f"the requests of {other} changed (4 before and now, but with other contents)"
    assert done.returncode == 2 and said in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("field", "said"), [("prompt", "tokens with its target"), ("rephrase", "of the generality question")]
)
def test_a_request_that_cannot_be_edited_is_refused_before_anything_is(
    field: str, said: str, testbed: Path, dataset: Path, tmp_path: Path
) -> None:
    """And not when its turn comes, some day."""
    records = json.loads(dataset.read_text())[:3]
    records[2][field] *= 100
    (tmp_path / "long.json").write_text(json.dumps(records))
    arguments = ("--model", testbed, "--dataset", tmp_path / "long.json", "--mode", "sequential")
    done = baft("run", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "run" / "run.json").exists()
