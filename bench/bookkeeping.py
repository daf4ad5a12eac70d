"""What does a request cost beside its training, when ten thousand came before it?

    python bench/bookkeeping.py                      10,000 requests
    python bench/bookkeeping.py --requests 100000    as many as one would want to leave alone

The requests are invented, and with two steps each on four bases next to nothing of them is learned. Prints what an edit
took, by the number of requests that came before: its training, in which texts are drawn from all of these, and all
else, which is to ask the model before and after, judge the answers, write the journal and checkpoints, and look back at
earlier edits now and then. The engine may remember little of texts, so that what else grows in memory is seen. In the
end going on with the run is timed, and its report. Results go to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from report import RESULTS, markdown, provenance
from terminal import plain_console, show

from baft.config import BaftConfig
from baft.report import write_report
from baft.runs.environment import peak_memory_bytes
from baft.runs.folder import RunFolder
from baft.runs.journal import Journal
from baft.runs.run import run_edits
from baft.runs.start import RunWords, start
from baft.runs.watcher import Nobody

CONFIG = BaftConfig(
    rank=4,
    max_steps=2,
    unrelated_per_step=4,
    subject_texts=2,
    retellings=1,
    rehearsal=3,
    consolidate_every=1000,
    consolidation_steps=5,
    settling_rounds=1,
    batch_size=256,
)
REMEMBER = 64  # MiB
STRETCHES = 10
LEAST = 1000


class Clock(Nobody):
    """Notes when each edit was done, and how much memory the process had taken by then."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self.memory: list[int] = []
        self._editing = False

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self._editing = name == "editing"
        if self._editing:
            self.moments.append(time.perf_counter())
            self.memory.append(_memory())

    def advance(self, note: str = "", units: int = 1) -> None:
        if self._editing:
            self.moments.append(time.perf_counter())
            self.memory.append(_memory())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    if options.requests < LEAST:
        parser.error(
            f"--requests: expected at least {LEAST}, since what is asked ahead for many is one edit's, got less"
        )
    with tempfile.TemporaryDirectory() as scratch:
        result = measured("factworld", options.requests, Path(scratch))
    about = provenance(torch.device("cpu"))
    name = f"bookkeeping_{options.requests}"
    note = (
        f"Means. At the end going on with the run took {result['seconds to go on']:.0f} s, its report "
        f"{result['seconds of the report']:.0f} s, and {result['MiB of the report']:.1f} MiB. "
    )
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, **result}, indent=1) + "\n")
    table = tabulate(result["stretches"])
    (RESULTS / f"{name}.md").write_text(markdown(table, about, note))
    terminal = plain_console(120)
    show(table, terminal)
    terminal.print(f"{note}Saved: {RESULTS / name}.md")


def measured(model: str, count: int, scratch: Path) -> dict[str, Any]:
    """Run so many requests in a folder of ``scratch``."""
    data, folder, clock = scratch / "requests.json", scratch / "run", Clock()
    data.write_text(json.dumps(invented(count)))
    words = RunWords(
        model=model, dataset=str(data), mode="sequential", config=CONFIG, measure_every=count, remember=REMEMBER
    )
    go_on(words, folder, clock)
    began = time.perf_counter()
    go_on(words, folder, Nobody())
    going_on, began = time.perf_counter() - began, time.perf_counter()
    page = write_report([folder], scratch / "report.html").page
    reporting = time.perf_counter() - began
    records = list(Journal(folder / "journal.sqlite", read_only=True).records(measures=False))
    return {
        "stretches": stretches([record.seconds for record in records], clock),
        "seconds to go on": going_on,
        "seconds of the report": reporting,
        "MiB of the report": page.stat().st_size / 2**20,
        "MiB of the journal": (folder / "journal.sqlite").stat().st_size / 2**20,
    }


def invented(count: int) -> list[dict[str, Any]]:
    """Requests about as many subjects, with a rephrasing and a locality question each."""
    draw = random.Random(0)

    def name() -> str:
        return "".join(draw.choice("bdfklmnprst") + draw.choice("aeiou") for _ in range(3)).capitalize()

    subjects = [f"{name()} {name()} {number}" for number in range(count)]
    return [
        {
            "prompt": f"The profession of {subject} is",
            "target": name(),
            "subject": subject,
            "rephrases": [f"By trade, {subject} is a"],
            "locality": {"near": [{"prompt": f"The profession of {name()} is"}]},
        }
        for subject in subjects
    ]


def go_on(words: RunWords, folder: Path, watcher: Nobody) -> None:
    with RunFolder(folder) as place:
        started = start(words, place)
        run_edits(
            started.editor,
            started.requests,
            words.mode,
            plan=started.plan,
            folder=place,
            watcher=watcher,
            description=started.description,
        )


def stretches(training: Sequence[float], clock: Clock) -> list[dict[str, float]]:
    """What an edit took, by tenths of the run, and how much memory the process had taken at their ends."""
    whole = [after - before for before, after in zip(clock.moments, clock.moments[1:], strict=False)]
    size = len(training) // STRETCHES
    return [
        {
            "requests": (number + 1) * size,
            "ms of training": 1000 * fmean(training[number * size : (number + 1) * size]),
            "ms of all else": 1000 * fmean(whole[k] - training[k] for k in range(number * size, (number + 1) * size)),
            "MiB at most": clock.memory[(number + 1) * size] / 2**20,
        }
        for number in range(STRETCHES)
    ]


def tabulate(rows: Sequence[dict[str, float]]) -> list[list[str]]:
    return [[*rows[0]], *([f"{row['requests']:,.0f}", *(f"{v:.1f}" for v in [*row.values()][1:])] for row in rows)]


def _memory() -> int:
    """Bytes that the process has taken so far, at most."""
    return peak_memory_bytes()["process"] or 0


if __name__ == "__main__":
    main()
