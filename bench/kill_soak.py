"""Does a run survive being killed? Kills it at random moments, resumes it, and compares with one that was let alone.

    python bench/kill_soak.py                   200 kills of FactWorld runs
    python bench/kill_soak.py --kills 1000 --model MODEL --dataset FILE

Each process begins as ``baft run --resume`` does, with nothing but the run's folder, and gets ``kill -9`` after a
random time, while it loads, trains, measures or writes. A run that comes to its end all the same is compared, bit for
bit: every curve, every text, every parameter and moment. Then the next one begins, until there were kills enough. The
result goes to bench/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from report import RESULTS, called, provenance
from terminal import plain_console

from baft.config import BaftConfig
from baft.runs.folder import RunFolder
from baft.runs.outcome import outcome
from baft.runs.run import run_edits
from baft.runs.start import RunWords, start

# Looking back often, and checkpoints at intervals of their own, give more kinds of moments to be killed at.
CONFIG = BaftConfig(max_steps=4, consolidate_every=5, consolidation_steps=4, unrelated_per_step=8, rehearsal=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--edits", type=int, default=12, help="requests in a run")
    parser.add_argument("--model", default="factworld")
    parser.add_argument("--dataset", default="factworld")
    parser.add_argument("--longest", type=float, default=6.0, help="seconds that a process is let live at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # and none but the children computes: a fork of a process with threads may hang
    words = RunWords(
        model=options.model,
        dataset=options.dataset,
        mode="sequential",
        config=CONFIG,
        edits=options.edits,
        measure_every=3,
        retained=4,
    )
    with tempfile.TemporaryDirectory() as scratch:
        result = soak(words, options.kills, options.longest, random.Random(options.seed), Path(scratch))
    about = provenance(torch.device("cpu"))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kill_soak_{called(options.dataset)}.json"
    path.write_text(json.dumps({**about, **result}, indent=1) + "\n")
    plain_console().print(f"Saved: {path}")
    sys.exit(result["unequal"] > 0)


def soak(words: RunWords, kills: int, longest: float, draw: random.Random, scratch: Path) -> dict[str, Any]:
    """Kill runs until there were ``kills`` of them."""
    console = plain_console()
    go_on(words, scratch / "whole", None)
    whole = outcome(scratch / "whole")
    done = Counter(kills=0, runs=0, unequal=0)
    found_at: Counter[str] = Counter()
    began = time.perf_counter()
    while done["kills"] < kills:
        folder = scratch / f"run-{done['runs']}"
        while not (folder / "results.json").exists():
            left = kills - done["kills"]
            if go_on(words, folder, draw.uniform(0.0, longest) if left else None):
                done["kills"] += 1
                found_at[what_it_was_at(folder)] += 1
        done["runs"] += 1
        equal = outcome(folder) == whole
        done["unequal"] += not equal
        console.print(
            f"{done['kills']} kills, {done['runs']} runs to their end, the last one "
            f"{'equal to' if equal else 'DIFFERENT FROM'} the one that was let alone"
        )
        shutil.rmtree(folder)
    return {**done, "killed while": dict(found_at), "seconds": time.perf_counter() - began, "edits": words.edits}


def go_on(words: RunWords, folder: Path, seconds: float | None) -> bool:
    """Begin a run, or go on with it, in a process of its own; returns whether it was killed, after ``seconds``.

    Raises:
        RuntimeError: if the process ended by itself, but not well.
    """
    process = multiprocessing.get_context("fork").Process(target=_run, args=(words, folder))
    process.start()
    process.join(seconds)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{folder}: expected a process that ends well or is killed, got status {process.exitcode}")
    return process.exitcode != 0


def _run(words: RunWords, folder: Path) -> None:
    with RunFolder(folder) as place:
        started = start(RunWords(**place.started_with()) if place.begun else words, place)
        run_edits(started.editor, started.requests, words.mode, plan=started.plan, folder=place)


def what_it_was_at(folder: Path) -> str:
    """What a killed process left: how far the run is."""
    with contextlib.suppress(ValueError, OSError), RunFolder(folder) as place:
        if not place.begun:
            return "beginning"
        edits = len(place.journal.positions())
        measured = edits - len(place.journal.unmeasured("final"))
        if measured or place.journal.settling():
            return "measuring at the end" if measured else "settling"
        return "editing" if edits else "before the first edit"
    return "beginning"


if __name__ == "__main__":
    main()
