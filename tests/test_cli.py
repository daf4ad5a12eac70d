"""The commands as a user types them: what they print, what they write, and their exit status."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from command import baft
from safetensors.torch import load_file, save_file

from baft import BaftConfig
from baft.distributed import World
from baft.runs.folder import RunFolder
from baft.runs.start import RunWords, start
from baft.testbed.benchmark import BenchmarkKnowledge
from baft.testbed.training import TrainingReport


def test_run_writes_what_it_prints(sequential_run: tuple[Path, dict[str, Any]]) -> None:
    out, printed = sequential_run
    assert printed == json.loads((out / "results.json").read_text())
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (out / "adapter").iterdir()}


def test_few_records_that_are_left_over_are_filled_up_and_counted_aloud(
    testbed: Path, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.json").write_text(json.dumps(json.loads(dataset.read_text())[:3]))
    (tmp_path / "config.yaml").write_text("rank: 4\nbatch_passes: 1\nsubject_texts: 0\n")
    arguments = ("--model", testbed, "--dataset", tmp_path / "few.json", "--mode", "batch")
    for edits in (3, 2):
        out = tmp_path / str(edits)
        done = baft("run", *arguments, "--config", tmp_path / "config.yaml", "--edits", edits, "--out", out)
        assert done.returncode == 0, done.stderr
        protocol = json.loads((out / "results.json").read_text())["protocol"]
        given, written = protocol["unrelated_texts"].values()
        assert (given > 0) == (edits < 3) and 0 < written <= 256 - given and protocol["held_out_texts"] == 0
        said = f"{given} unrelated texts are given, and {written} the model's own; 0 texts are held out"
        assert said in done.stdout


def test_results_say_how_they_came_about(sequential_run: tuple[Path, dict[str, Any]]) -> None:
    _, results = sequential_run
    assert (results["edits"], results["seed"], results["config"]["rank"]) == (4, 3, 24)
    assert results["protocol"]["mode"] == "sequential" and results["versions"]["torch"]
    assert results["timing"]["seconds_per_edit"] > 0 and results["memory"]["peak_bytes"]["process"] > 0
    assert [point["edits"] for point in results["retention"]] == [1, 4, 4]
    assert results["metrics"]["final"]["portability"] is None  # the file has no such probes


def test_a_run_on_a_model_that_knows_the_facts_edits_them(sequential_run: tuple[Path, dict[str, Any]]) -> None:
    out, results = sequential_run
    assert results["metrics"]["final"]["reliability"]["generation"] == 1.0
    assert results["metrics"]["final"]["reliability"]["known"] == 1.0
    # Four edits in a world of 24 people show that all parts work together; bench/ measures how well.
    assert results["metrics"]["final"]["generality"]["generation"] >= 0.5
    assert results["metrics"]["final"]["locality"]["generation"] >= 0.5
    lines = [json.loads(line) for line in (out / "edits.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        (probe,) = (p for p in line["final"] if p["measure"] == "reliability")
        assert probe["prompt"] == line["prompt"] and probe["text"].strip().startswith(line["target"])
        assert probe["before"].strip() != probe["text"].strip()
        assert line["training"]["steps"] == len(line["training"]["losses"]) and line["immediate"]


def test_generate_and_eval_use_a_saved_adapter(testbed: Path, sequential_run: tuple[Path, dict[str, Any]]) -> None:
    out, results = sequential_run
    line = json.loads((out / "edits.jsonl").read_text().splitlines()[-1])
    done = baft("generate", "--model", testbed, "--adapter", out / "adapter", line["prompt"], "--json")
    (said,) = json.loads(done.stdout)
    assert said["after"].strip().startswith(line["target"]) and not said["before"].strip().startswith(line["target"])
    asked = ("eval", "--model", testbed, "--adapter", out / "adapter", "--json")
    done = baft(*asked)
    assert json.loads(done.stdout)["metrics"] == results["metrics"]["final"]
    assert "asking the unedited model" in done.stderr
    short = json.loads(baft(*asked, "--edits", 1, "--answer-tokens", 1).stdout)
    assert short["protocol"]["generation"]["max_new_tokens"] == 1


def test_an_adapter_on_another_model_is_refused_unless_it_is_asked_for(
    testbed: Path, sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = sequential_run
    variant = Path(shutil.copytree(testbed, tmp_path / "variant"))
    weights = load_file(variant / "model.safetensors")
    save_file(
        {name: weight * 1.01 for name, weight in weights.items()}, variant / "model.safetensors", {"format": "pt"}
    )
    asked = ("generate", "--model", variant, "--adapter", out / "adapter", "The", "--json")
    done = baft(*asked)
    assert done.returncode == 2 and f"was saved for, '{testbed}', got '{variant}', with other weights in" in done.stderr
    done = baft(*asked, "--any-model")
    assert done.returncode == 0, done.stderr


def test_what_libraries_warn_of_is_not_printed() -> None:
    """Neither each try to reach the hub for a model that isn't there, nor each product of 8-bit weights."""
    baft("info")
    assert not any(
        logging.getLogger(name).isEnabledFor(logging.WARNING)
        for name in ("transformers", "huggingface_hub", "bitsandbytes")
    )


def test_of_several_processes_that_share_the_questions_one_prints(
    testbed: Path, sequential_run: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = sequential_run
    shared: list[tuple[int, int]] = []

    def share(world: World, items: list[Any]) -> list[Any]:
        shared.append((world.rank, len(items)))
        return items

    monkeypatch.setattr(World, "share", share)
    for rank in range(2):  # each asks everything here, so that they need not talk
        monkeypatch.setattr("baft.distributed.launched", lambda r=rank: nullcontext(World(r, 2, one_model=True)))
        done = baft("eval", "--model", testbed, "--adapter", out / "adapter", "--json")
        assert done.returncode == 0 and shared.pop() == (rank, results["edits"])
        if rank == 0:
            assert json.loads(done.stdout)["metrics"] == results["metrics"]["final"]
        else:
            assert done.stdout == "" and "measuring" not in done.stderr


def test_a_seed_is_the_option_else_the_files_else_the_default(
    testbed: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def note(words: RunWords, *_: object, **__: object) -> None:
        given.append(words.config.seed)
        raise ValueError("that is all")

    monkeypatch.setattr("baft.runs.start.start", note)
    files = {name: tmp_path / f"{name}.yaml" for name in ("says", "silent")}
    files["says"].write_text("seed: 7\n")
    files["silent"].write_text("rank: 24\n")
    arguments = ("--model", testbed, "--dataset", dataset, "--mode", "sequential")
    for number, (file, option) in enumerate((f, o) for f in files for o in ((), ("--seed", 0), ("--seed", 3))):
        done = baft("run", *arguments, "--config", files[file], *option, "--out", tmp_path / str(number))
        assert "that is all" in done.stderr
    assert given == [7, 0, 3, 0, 0, 3]
    assert "that is all" in baft("demo", "--out", tmp_path / "demo").stderr and given[-1] == 0


def test_eval_leaves_out_what_a_later_request_contradicts(
    testbed: Path, sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, _ = sequential_run
    line = json.loads((out / "edits.jsonl").read_text().splitlines()[-1])
    same = {"prompt": line["prompt"], "subject": line["subject"]}
    file = tmp_path / "twice.json"
    file.write_text(json.dumps([{**same, "target_new": target} for target in ("Nowhere", line["target"])]))
    asked = ("eval", "--model", testbed, "--adapter", out / "adapter", "--dataset", file)
    found = json.loads(baft(*asked, "--json").stdout)
    assert (found["requests"], found["superseded"]) == (1, 1)
    assert found["metrics"]["reliability"]["generation"] == 1.0
    assert "Left out, as later requests contradict them: 1" in " ".join(baft(*asked).stdout.split())


def test_edits_are_listed_shown_and_rolled_back(sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = sequential_run
    run = Path(shutil.copytree(out, tmp_path / "run"))
    lines = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    done = baft("edits", "list", run, "--json", "--first", 1, "--limit", 2)
    assert [json.loads(line) for line in done.stdout.splitlines()] == lines[1:3]
    assert lines[3]["target"].split()[0] in baft("edits", "list", run).stdout  # a long one is folded
    assert json.loads(baft("edits", "show", run, 2, "--json").stdout) == lines[2]
    assert lines[2]["prompt"] in " ".join(baft("edits", "show", run, 2).stdout.split())
    asked = baft("edits", "rollback", run, 2)
    assert asked.returncode == 0 and "Nothing was changed" in asked.stdout and (run / "results.json").exists()
    assert "2 of 4 edits are to be taken back; results, report and adapter" in " ".join(asked.stdout.split())
    assert baft("report", run).returncode == 0 and list(run.glob("report-*.png"))
    done = baft("edits", "rollback", run, 2, "--yes")
    assert done.returncode == 0, done.stderr
    assert not list(run.glob("report*"))  # what it shows is no longer so
    assert len(baft("edits", "list", run, "--json").stdout.splitlines()) == 2
    assert baft("edits", "show", run, 2).returncode == 2
    assert baft("run", "--resume", "--out", run).returncode == 0
    again = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    assert [line["final"] for line in again] == [line["final"] for line in lines]
    assert baft("edits", "drop", run, 0, "--yes").returncode == 0
    assert [json.loads(line)["index"] for line in baft("edits", "list", run, "--json").stdout.splitlines()] == [1, 2, 3]


def test_a_request_that_is_still_to_be_edited_is_dropped_at_once(
    sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is loaded for it, and nothing made again."""
    run = Path(shutil.copytree(sequential_run[0], tmp_path / "run"))
    with RunFolder(run) as place:
        place.reopen()
        place.checkpoints().cut(2)
        place.journal.cut(2)
    monkeypatch.setattr("baft.runs.start.start", None)
    asked = baft("edits", "drop", run, 3)
    assert asked.returncode == 0 and "nothing is to be made again" in asked.stdout and "--yes" in asked.stdout
    done = baft("edits", "drop", run, 3, "--yes")
    assert done.returncode == 0 and "It is left out" in done.stdout
    monkeypatch.undo()
    assert baft("run", "--resume", "--out", run).returncode == 0
    assert [json.loads(line)["index"] for line in (run / "edits.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert baft("edits", "drop", run, 3, "--yes").returncode == 2


def test_report_shows_a_run(sequential_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = sequential_run
    done = baft("report", out, "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert written["page"] == str(out / "report.html") and "<!doctype html>" in (out / "report.html").read_text()
    assert str(out / "report-retention.png") in written["pictures"]
    refused = baft("report", out, tmp_path)
    assert refused.returncode == 2 and "expected the folder of a run" in refused.stderr


def test_a_testbed_says_what_it_cannot_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def note(folder: Path, knowledge: BenchmarkKnowledge, *_: object, **__: object) -> TrainingReport:
        return TrainingReport(parameters=1, steps=1, seconds=1.0, recall=0.99)

    monkeypatch.setattr("baft.testbed.folder.make_testbed", note)
    facts = [{"prompt": f"{name} was born in", "target": "Bern", "locality": ["Ada is"]} for name in ("Ada", "Bob")]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    done = baft("testbed", "--dataset", tmp_path / "facts.json", "--out", tmp_path / "model")
    assert done.returncode == 2 and "expected records with a ground truth" in done.stderr
    facts[0]["ground_truth"] = "Oslo"
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    done = baft("testbed", "--dataset", tmp_path / "facts.json", "--out", tmp_path / "model")
    assert done.returncode == 0 and "1 of 2 records have no old answer" in done.stdout


def test_a_testbed_that_knows_too_little_is_kept_and_says_so(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = baft("testbed", "--dataset", f"{dataset}[:2]", "--out", out, "--epochs", 1, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "testbed.json").read_text())
    assert json.loads(done.stdout)["recall"] == report["recall"] < 0.98 and report["max_epochs"] == 1
    said = " ".join(done.stderr.split())
    assert f"its epochs (1) the model knows {report['recall']:.1%} of the facts, expected at least 98%" in said
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_the_other_modes(mode: str, testbed: Path, dataset: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("rank: 24\nlocality_weight: 5\n")
    arguments = ("--model", testbed, "--dataset", dataset, "--mode", mode, "--edits", 3, "--config", config)
    done = baft("run", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metrics"]["immediate"]["reliability"]["generation"] == 1.0
    assert (results["metrics"]["final"] is None) == (mode == "single")
    assert results["engine"].get("abreast", {}).get("slots") == (3 if mode == "single" else None)
    assert "reliability" in done.stdout and "100.0 %" in done.stdout


def test_a_baseline_runs_by_its_name(testbed: Path, dataset: Path, tmp_path: Path) -> None:
    arguments = ("--model", testbed, "--dataset", dataset, "--mode", "sequential", "--edits", 2)
    done = baft("run", *arguments, "--out", tmp_path / "out", "--method", "none", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert (results["method"], results["timing"]["steps"]) == ("no edit", 0)
    assert results["metrics"]["final"]["reliability"]["generation"] == 0.0
    assert results["metrics"]["final"]["locality"]["generation"] == 1.0
    # What only BaFT's engine knows is refused.
    done = baft("run", *arguments, "--out", tmp_path / "other", "--method", "lora", "--slots", 2)
    assert done.returncode == 2 and "slots: expected no number with method lora" in done.stderr
    done = baft("run", *arguments, "--out", tmp_path / "other", "--method", "lora", "--remember", 9)
    assert done.returncode == 2 and "remember: expected no number with method lora" in done.stderr


def test_a_baseline_works_in_one_process() -> None:
    words = RunWords(model="a model", dataset="a data set", mode="single", method="lora", config=BaftConfig())
    with pytest.raises(ValueError, match=r"got lora, which works in one: start it without torchrun$"):
        start(words, None, world=World(1, 2))


def test_single_edits_do_not_add_up(testbed: Path, dataset: Path, tmp_path: Path) -> None:
    """The same request gives the same result alone and after others."""
    texts = []
    for edits in (1, 3):
        out = tmp_path / str(edits)
        arguments = ("--model", testbed, "--dataset", dataset, "--mode", "single", "--edits", edits, "--seed", 5)
        arguments += ("--slots", 1)  # one at a time, so that not even roundings depend on the others
        config = tmp_path / "config.yaml"
        # What counts as unrelated depends on what is edited, so this goes without.
        config.write_text("rank: 24\nlocality_weight: 0\ngate_fn: none\n")
        assert baft("run", *arguments, "--config", config, "--out", out).returncode == 0
        texts.append([json.loads(line) for line in (out / "edits.jsonl").read_text().splitlines()])
    assert texts[0][0]["immediate"] == texts[1][0]["immediate"]
    assert texts[0][0]["training"]["losses"] == texts[1][0]["training"]["losses"]


def test_the_command_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "baft.cli", "info", "--json"], capture_output=True, text=True, check=True
    )
    assert "reference" in json.loads(done.stdout)["backends"]


def _bad(name: str, tmp_path: Path, testbed: Path, dataset: Path) -> tuple[list[object], str]:
    """Arguments of a bad ``baft run``, and what the error line must name."""
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps([{"prompt": "p", "target_new": ""}]))
    config = tmp_path / "config.yaml"
    fields = {"unknown field": "rnk: 3", "rank": "rank: 5000", "layers": "layers: [0, 7]"}
    config.write_text(fields.get(name, "{}"))
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("kept")
    values: dict[str, object] = {
        "--model": testbed,
        "--dataset": dataset,
        "--mode": "batch",
        "--edits": 2,
        "--config": config,
        "--out": tmp_path / "out",
    }
    change, says = {
        "no model": ({"--model": tmp_path / "nowhere"}, "model"),
        "no dataset": ({"--dataset": "nowhere.json"}, "nowhere.json"),
        "empty target": ({"--dataset": broken}, "record 0"),
        "too many edits": ({"--edits": 10_000}, "edits"),
        "too many of a stretch": ({"--dataset": f"{dataset}[:1]"}, "edits: expected 1 to 1"),
        "used folder": ({"--out": used}, "holds other files"),
        "unknown field": ({}, "rnk"),
        "rank": ({}, "5000"),
        "layers": ({}, "[0, 7]"),
        "backend": ({"--backend": "quantum"}, "quantum"),
    }[name]
    return [item for pair in (values | change).items() for item in pair], says


@pytest.mark.parametrize(
    "name",
    [
        *("no model", "no dataset", "empty target", "too many edits", "too many of a stretch", "used folder"),
        *("unknown field", "rank", "layers", "backend"),
    ],
)
def test_bad_input_is_one_line_and_status_2(name: str, tmp_path: Path, testbed: Path, dataset: Path) -> None:
    arguments, says = _bad(name, tmp_path, testbed, dataset)
    done = baft("run", *arguments)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("baft: ") and says in last and "Traceback" not in done.stderr
    assert (tmp_path / "used" / "file").read_text() == "kept"
