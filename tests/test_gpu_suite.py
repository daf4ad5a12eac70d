"""bench/gpu_suite.py where no GPU is: a step that fails, hangs or dies takes no other along, and is told truthfully."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HANGS = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def gpu_suite() -> ModuleType:
    return script("gpu_suite")


def script(name: str) -> ModuleType:
    """A file of bench/."""
    path = Path(__file__).parents[1] / f"bench/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses are looked up
    spec.loader.exec_module(module)
    return module


def result(suite: ModuleType, folder: Path, perform: Any, *, seconds: float = 20, needs: tuple[str, ...] = ()) -> Any:
    log = folder / "log"
    log.touch()
    stage = suite.Stage("none", True, log, folder, folder, deadline=time.monotonic() + seconds)
    return suite.result_of(suite.Step("step", 1, perform, needs), stage)


def python(code: str) -> Any:
    """A step that runs a program."""

    def perform(stage: Any) -> str:
        stage.run(sys.executable, "-c", code)
        return "fine"

    return perform


@pytest.mark.parametrize(
    ("code", "status", "summary"),
    [
        ("print('NUMBERS {\"found\": 1}')", "passed", "fine"),
        ("print('NUMBERS {\"found\": 1}'); raise ValueError('wrong')", "failed", "ValueError: wrong"),
        ("print('NUMBERS {\"found\": 1}\\nlast'); import os; os.abort()", "failed", "SIGABRT after: last"),
    ],
)
def test_how_a_step_ends(gpu_suite: ModuleType, tmp_path: Path, code: str, status: str, summary: str) -> None:
    ended = result(gpu_suite, tmp_path, python(code))
    assert (ended["status"], ended["summary"]) == (status, summary)
    assert ended["numbers"]["found"] == 1


def test_what_hangs_is_ended_with_all_that_it_started(gpu_suite: ModuleType, tmp_path: Path) -> None:
    ended = result(gpu_suite, tmp_path, python(HANGS), seconds=1)
    started = int(ended["numbers"]["tail"][0])
    assert ended["status"] == "timed out"
    assert ended["summary"] == f"after 1 s, at: {started}"
    for _ in range(100):
        if _gone(started):
            return
        time.sleep(0.02)
    pytest.fail(f"{started} still runs")


def _gone(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"  # killed; whoever adopted it hasn't looked yet


def test_what_cannot_run_says_why(gpu_suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = result(gpu_suite, tmp_path, python(""), needs=("torch", "no_such_package"))
    assert (ended["status"], ended["summary"]) == ("skipped", "needs no_such_package")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_suite.glob, "glob", lambda pattern: [])
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    ended = result(gpu_suite, tmp_path, lambda stage: gpu_suite.sanitizer("memcheck", "cuda", stage))
    assert (ended["status"], ended["summary"]) == ("skipped", "compute-sanitizer not found")
    ended = result(gpu_suite, tmp_path, lambda stage: stage.nonsense)
    assert ended["status"] == "failed" and "nonsense" in ended["summary"]


TESTS = """
import os, time
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2, "too far off"
def test_waits(): pytest.skip("no GPU")
def test_dies(): os.abort()
def test_hangs(): time.sleep(60)
def test_spoils(monkeypatch):
    import gpu_tests
    gpu_tests._what_spoiled_the_context = lambda: "CUDA error: an illegal memory access was encountered"
def test_passes_too(): pass
def test_is_not_asked_for(): assert False
"""


@pytest.mark.slow
def test_tests_go_on_behind_what_crashes_hangs_or_spoils_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_tests = script("gpu_tests")
    monkeypatch.setattr(gpu_tests, "SECONDS_PER_TEST", 5.0)
    monkeypatch.setattr(gpu_tests, "MOST_SHARDS", 2)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(gpu_tests.signal, "signal", lambda *_: None)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import no_such_package")
    (tmp_path / "test_wanting.py").write_text("import pytest; pytest.importorskip('no_such_package')")
    gpu_tests.main(
        str(tmp_path), "not asked", *(str(tmp_path / f"test_{name}.py") for name in ("some", "broken", "wanting"))
    )
    found = gpu_tests.counted(tmp_path.glob("*.jsonl"))
    reasons = found.pop("reasons to skip")
    assert {name.rpartition("/")[2].rpartition("::")[2]: why for name, why in found.pop("failures").items()} == {
        "test_fails": "AssertionError: too far off",
        "test_dies": "its process ended: SIGABRT",
        "test_hangs": "it took more than 5 s",
        "test_spoils": "CUDA error: an illegal memory access was encountered",
        "test_broken.py": "ModuleNotFoundError: No module named 'no_such_package'",
    }
    assert found == {"passed": 2, "failed": 5, "skipped": 2, "cut off": []}
    assert "no GPU" in reasons and any("could not import 'no_such_package'" in reason for reason in reasons)


def test_what_is_cut_off_is_neither_passed_nor_failed(tmp_path: Path) -> None:
    gpu_tests = script("gpu_tests")
    for test, outcome in (("a", "begun"), ("a", "passed"), ("b", "begun")):
        gpu_tests._write(tmp_path / "0.jsonl", test, outcome)
    found = gpu_tests.counted([tmp_path / "0.jsonl", tmp_path / "1.jsonl"])
    assert (found["passed"], found["failed"], found["cut off"]) == (1, 0, ["b"])


@pytest.mark.slow
def test_a_rehearsal_goes_through_all_steps(tmp_path: Path) -> None:
    """Nothing fails but for want of time, and three files come of it."""
    suite = Path(__file__).parents[1] / "bench/gpu_suite.py"
    done = subprocess.run([sys.executable, suite, "--rehearse", "--out", tmp_path], capture_output=True, text=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"gpu_suite_rehearsal.{kind}" for kind in ("log", "json", "zip")
    }
    steps = json.loads((tmp_path / "gpu_suite_rehearsal.json").read_text())["steps"]
    assert [(step["step"], step["summary"]) for step in steps if step["status"] == "failed"] == [], done.stdout
    assert done.returncode == 0, done.stdout
