"""bench/gpu_suite.py where no GPU is: a step that fails, hangs or dies takes no other along, and is told truthfully."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HANGS = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def gpu_suite() -> ModuleType:
    path = Path(__file__).parents[1] / "bench/gpu_suite.py"
    spec = importlib.util.spec_from_file_location("gpu_suite", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module  # where its dataclasses are looked up
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
    ended = result(gpu_suite, tmp_path, lambda stage: gpu_suite.sanitizer("memcheck", stage))
    assert (ended["status"], ended["summary"]) == ("skipped", "compute-sanitizer not found")
    ended = result(gpu_suite, tmp_path, lambda stage: stage.nonsense)
    assert ended["status"] == "failed" and "nonsense" in ended["summary"]


REPORT = """<testsuites><testsuite>
<testcase classname="a" name="passes"/>
<testcase classname="a" name="fails"><failure message="long">a = 1
E   AssertionError: out: too far off
E     more</failure></testcase>
<testcase classname="" name="b"><error message="collection failure">E   ImportError: no b</error></testcase>
<testcase classname="a" name="waits"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_what_the_tests_report(gpu_suite: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "0.xml").write_text(REPORT)
    (tmp_path / "1.xml").write_text("<testsuites><testsuite><testcase name='other'/></testsuite></testsuites>")
    assert gpu_suite.counted(tmp_path.glob("*.xml")) == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "failures": {"a::fails": "AssertionError: out: too far off", "::b": "ImportError: no b"},
        "reasons to skip": {"no GPU": 1},
    }
