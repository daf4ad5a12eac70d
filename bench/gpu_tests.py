"""The GPU backends' tests in many processes, which go on where one of them crashes or hangs. A pytest plugin, too.

    python bench/gpu_tests.py FOLDER EXPRESSION FILE...

runs the tests in FILEs that match pytest's ``-k EXPRESSION``, in a process for each processor, since most of the time
goes into compiling. Each process writes to FOLDER which test it begins, and what came of it. One whose CUDA context is
spoiled, or whose test takes too long, ends itself; its successor leaves out what has been begun.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
MOST_SHARDS = 16  # since they share one GPU
MOST_PROCESSES = 6  # one after the other, of a shard: each takes seconds to start
SECONDS_PER_TEST = 60.0

# -- what is written: a line of JSON when a test begins, and when it has ended --


def counted(records: Iterable[Path]) -> dict[str, Any]:
    """How many tests passed, failed and were skipped; what each failure raised; the reasons for skipping."""
    ends: dict[str, dict[str, str]] = {}
    for record in (record for path in records for record in _read(path)):
        ends[record["test"]] = record
    of = {outcome: [end for end in ends.values() if end["outcome"] == outcome] for outcome in OUTCOMES}
    return {
        **{outcome: len(of[outcome]) for outcome in ("passed", "failed", "skipped")},
        "failures": {end["test"]: end["why"] for end in of["failed"]},
        "reasons to skip": dict(Counter(end["why"] for end in of["skipped"])),
        "cut off": [end["test"] for end in of[BEGUN]],
    }


BEGUN = "begun"
OUTCOMES = (BEGUN, "passed", "skipped", "failed")  # the worst of a test's set-up, call and tear-down counts


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _write(path: Path, test: str, outcome: str, why: str = "") -> None:
    with path.open("a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "why": why}) + "\n")


# -- the plugin --


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="run only the I-th of N parts of the tests, I from 0")
    parser.addoption("--record", type=Path, help="the file of outcomes; tests in it are left out")
    parser.addoption("--seconds-per-test", type=float, help="after which the process ends")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config.getoption("--record"), config.getoption("--seconds-per-test")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, config.getoption("--shard").split("/"))
    known = {record["test"] for record in _read(config.getoption("--record"))}
    items[:] = [item for item in items if _part(item) % count == index and item.nodeid not in known]


def _part(item: pytest.Item) -> int:
    """The same for tests that differ only in their number of rows: they use the same compiled kernels."""
    callspec = getattr(item, "callspec", None)
    parameters = {} if callspec is None else {k: v for k, v in callspec.params.items() if k != "rows"}
    return zlib.crc32(f"{item.nodeid.partition('[')[0]} {parameters}".encode())


class Recorder:
    """Writes down what tests begin and how they end, and ends the process where going on makes no sense."""

    def __init__(self, path: Path, seconds_per_test: float) -> None:
        self.path, self.seconds_per_test = path, seconds_per_test
        self.terminal = os.dup(2)  # while a test runs, pytest catches what goes to 2 itself
        self.outcome, self.why = BEGUN, ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.outcome, self.why = BEGUN, ""
        _write(self.path, item.nodeid, BEGUN)
        faulthandler.dump_traceback_later(self.seconds_per_test, exit=True, file=self.terminal)
        result = yield
        spoiled = _what_spoiled_the_context()  # waits for the kernels, so that a fault belongs to its test
        faulthandler.cancel_dump_traceback_later()
        if spoiled is not None:
            self._take("failed", self.why or spoiled)
        _write(self.path, item.nodeid, self.outcome, self.why)
        if spoiled is not None:
            print(f"\nThis process can't use the GPU any more: {spoiled}", flush=True)
            os._exit(3)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._take(report.outcome, _why(report))
        if report.failed:
            print(f"\n{report.longreprtext}", flush=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            _write(self.path, report.nodeid, report.outcome, _why(report))

    def _take(self, outcome: str, why: str) -> None:
        if OUTCOMES.index(outcome) > OUTCOMES.index(self.outcome):
            self.outcome, self.why = outcome, why


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):  # file, line and reason
        return report.longrepr[2].removeprefix("Skipped: ")
    raised = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return raised[0] if raised else report.longreprtext[-250:]


def _what_spoiled_the_context() -> str | None:
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


# -- the processes --


@dataclass
class Shard:
    """One part of the tests: a process, and after it its successors."""

    index: int
    command: Sequence[str]
    record: Path
    stopped: threading.Event

    def run(self) -> str | None:
        """Why not all of its tests were run; None if they were."""
        for _ in range(MOST_PROCESSES):
            process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for line in process.stdout or ():
                sys.stdout.write(f"{self.index}: {line}")
            status = process.wait()
            if self.stopped.is_set():
                return "stopped"
            if status in (0, 1, 5) and not self._ends_in_a_test():  # 1: some failed; 5: none of the tests was its
                return None
            if status in (2, 4):
                return f"pytest's exit status is {status}"
            self._blame(status)
        return f"{MOST_PROCESSES} processes ended one after the other"

    def _ends_in_a_test(self) -> bool:
        last = _read(self.record)[-1:]
        return bool(last) and last[0]["outcome"] == BEGUN

    def _blame(self, status: int) -> None:
        """The test that a process ended in is the one that failed."""
        if self._ends_in_a_test():
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            why = f"it took more than {SECONDS_PER_TEST:.0f} s" if status == 1 else f"its process ended: {name}"
            _write(self.record, _read(self.record)[-1]["test"], "failed", why)


def main(folder: str, expression: str, *files: str) -> None:
    count = min(MOST_SHARDS, os.cpu_count() or 1)
    options = "-v --tb=short --no-summary -p no:cacheprovider -p gpu_tests --continue-on-collection-errors".split()
    command = [sys.executable, "-m", "pytest", *options, "-k", expression, *files]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    stopped = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stopped.set())  # the tests' processes get it as well
    shards = []
    for index in range(count):
        record = Path(folder) / f"{index}.jsonl"
        own = [f"--shard={index}/{count}", f"--record={record}", f"--seconds-per-test={SECONDS_PER_TEST}"]
        shards.append(Shard(index, [*command, *own], record, stopped))
    with ThreadPoolExecutor(count) as pool:
        ends = dict(enumerate(pool.map(Shard.run, shards)))
    if bad := {index: end for index, end in ends.items() if end is not None}:
        sys.exit(f"not all tests were run, by shard: {bad}")


if __name__ == "__main__":
    main(*sys.argv[1:])
