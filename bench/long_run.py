"""A thousand requests, one after another: do the edits hold, and does the thousandth cost what the tenth did?

    python bench/long_run.py                                              FactWorld (large), 1,000 requests
    python bench/long_run.py --model cf1200 --dataset 'counterfact.json[:1200]'    a benchmark, and a testbed that
                                                                                   knows as many of its records
    python bench/long_run.py --edits 300 --remember 32                    is memory flat, once it is used up?
    python bench/long_run.py --config of_128_bases.yaml                   other settings, which name the results

Runs as ``baft run --mode sequential`` does, in a folder that is kept; broken off, the same command goes on. Prints the
final measures, the cost of an edit at the beginning and at the end, the share of time that journal and checkpoints
took, how memory grew, and how much of it holds remembered texts. The figures, the run's results.json and its report go
to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from report import RESULTS, called, markdown, provenance
from terminal import plain_console

from baft.config import BaftConfig
from baft.console import Console
from baft.datasets.factworld import WORLDS
from baft.evaluation.measures import known_before
from baft.report import write_report
from baft.runs.folder import RunFolder
from baft.runs.inputs import load_config
from baft.runs.journal import Journal
from baft.runs.run import run_edits
from baft.runs.start import RunWords, start

# A thousand facts need more bases than a hundred, more unrelated texts a step, and longer settling: with 128 bases, 96
# texts and 32 rounds locality ended at 0.94, with 192, 128 and 64 at 0.95; half as much weight again on its loss took
# from generality alone.
_MANY: dict[str, Any] = {"learning_rate": 6e-3, "settling_rounds": 64}
FACTWORLD = BaftConfig(rank=192, max_steps=8, locality_weight=16.0, unrelated_per_step=192, **_MANY)
# CounterFact asks its rephrasings behind other texts, so that is how they are learned. A thousand of its records need
# as many bases as a testbed is wide: with 128, and 16 rounds, later edits undid more of what earlier ones had learned.
# All edits take the same number of steps: where they end with their loss, after 15 at most, the last take 1.8 times as
# many as the first.
BENCHMARK = BaftConfig(
    rank=256,
    stop_below=0.0,
    max_steps=8,
    locality_weight=8.0,
    unrelated_per_step=96,
    retellings=6,
    contexts=4,
    **_MANY,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="factworld-large")
    parser.add_argument("--dataset", default="factworld-large")
    parser.add_argument("--method", default="baft")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--measure-every", type=int, default=100)
    parser.add_argument("--config", type=Path, help="a YAML file with fields of BaftConfig, in place of ours")
    parser.add_argument("--remember", type=int, help="MiB that the engine may remember texts in, as of baft run")
    parser.add_argument("--out", type=Path, help="the run's folder; runs/long/... by default")
    options = parser.parse_args()
    ours = FACTWORLD if options.dataset in WORLDS else BENCHMARK
    name = f"{called(options.dataset)}_{options.method}_{options.edits}"
    if options.config:
        name += f"_{options.config.stem}"
    if options.remember:
        name += f"_in_{options.remember}_mib"
    folder = options.out or Path("runs/long") / name
    words = RunWords(
        model=options.model,
        dataset=options.dataset,
        mode="sequential",
        method=options.method,
        config=load_config(options.config) if options.config else ours,
        edits=options.edits,
        measure_every=options.measure_every,
        remember=options.remember,
    )
    run(words, folder)
    about = provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    changed = {k: v for k, v in words.config.model_dump(mode="json").items() if v != getattr(BaftConfig(), k)}
    rows = figures(folder)
    place = RESULTS / f"long_run_{name}"
    place.mkdir(parents=True, exist_ok=True)
    write_report([folder], place / "report.html")
    shutil.copy(folder / "results.json", place)
    (place / "figures.json").write_text(json.dumps({**about, "config": changed, "figures": rows}, indent=1) + "\n")
    table = [["figure", "value"], *([label, f"{value:.4g}"] for label, value in rows.items())]
    (place / "figures.md").write_text(markdown(table, about))
    terminal = plain_console()
    for label, value in rows.items():
        terminal.print(f"{label:60} {value:.4g}")
    terminal.print(f"Saved: {place}")


def run(words: RunWords, folder: Path) -> None:
    """Begin the run, or go on with it, or see that it is done."""
    console = Console()
    with RunFolder(folder) as place, console.progress() as watcher:
        if place.begun and (found := RunWords(**place.started_with())) != words:
            other = [name for name in RunWords.model_fields if getattr(found, name) != getattr(words, name)]
            sys.exit(f"{folder}: holds a run with another {', '.join(other)}; delete it, or give --out another folder")
        if place.results.exists():
            return
        started = start(words, place, on_training=watcher.training)
        run_edits(
            started.editor,
            started.requests,
            words.mode,
            plan=started.plan,
            folder=place,
            watcher=watcher,
            description=started.description,
        )


def figures(folder: Path) -> dict[str, float]:
    """What the run is judged by."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    records = list(Journal(folder / "journal.sqlite", read_only=True).records(measures=False))
    # As many edits as lie between two consolidations, so that each stretch has its share of them.
    stretch = results["config"]["consolidate_every"] or 25
    seconds = [record.seconds for record in records]
    steps = [record.steps for record in records]
    found = {
        f"{moment} {measure}, by generation": metrics[measure]["generation"]
        for moment, metrics in results["metrics"].items()
        for measure in ("reliability", "generality", "locality", "portability")
        if metrics[measure]
    }
    known = known_before(results["metrics"]["final"])
    whole = sum(session["seconds"] for session in results["sessions"])
    # A run that was broken off has been several processes, each of which remembered and grew from nothing.
    measured = [(point["edits"], point["memory"]) for point in results["retention"]]
    early = max((edits for edits, _ in measured if edits <= 100), default=measured[0][0])

    def most(kind: str, up_to: float = math.inf) -> float:
        return max(memory[kind] or 0 for edits, memory in measured if edits <= up_to) / 2**20

    general = results["retention"][-1]["general"]
    return {
        **found,
        **_beyond_retellings(folder / "journal.sqlite"),
        **{f"{asked} that the unedited model gave the old answer to": share for asked, share in known.items()},
        **({"perplexity of held-out texts, unedited": general["before"]} if general else {}),
        **({"perplexity of held-out texts, at the end": general["perplexity"]} if general else {}),
        f"seconds an edit, edits 1 to {stretch}": fmean(seconds[:stretch]),
        f"seconds an edit, the last {stretch}": fmean(seconds[-stretch:]),
        "ratio of the two": _ratio(seconds, stretch),
        "ratio of the steps": _ratio(steps, stretch),
        "seconds an edit, all": fmean(seconds),
        "seconds of settling, an edit": results["timing"]["settling_seconds"] / len(seconds),
        "share of journal and checkpoints": sum(s["bookkeeping_seconds"] for s in results["sessions"]) / whole,
        f"MiB at most, up to edit {early}": most("process", early),
        "MiB at most, at the end": most("process"),
        f"MiB of texts that the engine remembers, up to edit {early}": most("remembered", early),
        "MiB of texts that the engine remembers, at most": most("remembered"),
    }


def _beyond_retellings(journal: Path) -> dict[str, float]:
    """Generality of what retellings can't have taught word for word: those begin with the subject."""
    right = [
        result.generation
        for record in Journal(journal, read_only=True).records()
        for result in record.final
        if result.question.measure == "generality"
        and not (record.request.subject and result.question.prompt.startswith(record.request.subject))
    ]
    return {"final generality, of rephrasings that don't begin with the subject": fmean(right)} if right else {}


def _ratio(values: Sequence[float], stretch: int) -> float:
    return fmean(values[-stretch:]) / fmean(values[:stretch])


if __name__ == "__main__":
    main()
