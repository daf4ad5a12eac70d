"""Comparisons of edits: the same requests under several configurations or methods, modes and seeds.

What bench/editing_quality.py, capacity.py, baselines.py and long_targets.py have in common. Each gives a plan of runs;
here they are run, each in a process of its own, and what they found becomes a table. Every figure is by generation (see
``baft.evaluation``). Results go to bench/results/ as JSON and Markdown, with every run's measures.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from report import RESULTS, called, markdown, provenance
from rich.console import Console
from terminal import plain_console, show

from baft import BaftConfig
from baft.baselines.methods import METHODS, make_editor
from baft.editing import Mode
from baft.evaluation.measures import Metrics, known_before, shares
from baft.runs.environment import versions
from baft.runs.inputs import load_assignment, load_model
from baft.runs.run import run_edits

__all__ = ["REQUESTS", "SEEDS", "TUNING_SEED", "Entry", "Task", "Variant", "compare", "of_baft", "plan_of"]

REQUESTS = 100
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # its choice and order of requests are not among those that are reported


@dataclass(frozen=True)
class Variant:
    """What is compared: a method of ``baft.baselines.methods``, changes to its configuration, its own options."""

    method: str = "baft"
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Task(NamedTuple):
    """What is edited: so many requests of a data set, on a model."""

    model: str
    dataset: str
    requests: int


class Entry(NamedTuple):
    """One run of a plan."""

    label: str
    mode: Mode
    seed: int
    variant: Variant


def of_baft(changes: Mapping[str, dict[str, Any]]) -> dict[str, Variant]:
    """BaFT with each of some changes to its configuration, by their labels."""
    return {label: Variant(overrides=overrides) for label, overrides in changes.items()}


def plan_of(variants: dict[str, Variant], modes: Iterable[Mode], seeds: Iterable[int]) -> list[Entry]:
    """Every variant in every mode with every seed."""
    product = itertools.product(modes, variants.items(), seeds)
    return [Entry(label, mode, seed, variant) for mode, (label, variant), seed in product]


def compare(name: str, plan: list[Entry], task: Task, jobs: int) -> None:
    """Run a plan, show its table, and save it under the data set's and its own name: after each run what is done.

    Until all of it is done the files are called ``*.partial.*``. A run that fails is named, and the others go on.
    """
    console = plain_console(220)
    about = {
        **provenance(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": threads_of_each(jobs),
        "task": task._asdict(),
        "versions": versions(),
        "defaults": BaftConfig().model_dump(mode="json"),
        "runs planned": len(plan),
    }
    rows, path, name = [], None, f"{called(task.dataset)}_{name}"
    for runs in run_all(plan, task, jobs, console):
        rows = tabulate(runs)
        path = save(name, runs, rows, about)
    if path is None:
        sys.exit("none of the runs came to its end")
    show(rows, console)
    console.print(f"Saved: {path}")


def threads_of_each(jobs: int) -> int:
    """Threads of each of so many runs at a time."""
    return max(1, torch.get_num_threads() // jobs)


def run_all(plan: list[Entry], task: Task, jobs: int, console: Console) -> Iterator[list[dict[str, Any]]]:
    """Run each entry of ``plan``, ``jobs`` at a time in processes of their own, saying how it goes.

    Yields, whenever one is done, what those that are have found, in the order of the plan. One that fails is missing.
    """
    load_model(task.model)  # FactWorld's is trained, if need be, before several processes ask for it
    threads = threads_of_each(jobs)
    runs: dict[int, dict[str, Any]] = {}
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(run_once, entry, task): number for number, entry in enumerate(plan)}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                entry = plan[futures[future]]
                left = (time.perf_counter() - start) / done * (len(plan) - done) / 60
                said = f"[{done} of {len(plan)}] {entry.mode}, {entry.label}, seed {entry.seed}"
                if error := future.exception():
                    console.print(f"{said}: failed: {type(error).__name__}: {error}")
                    continue
                runs[futures[future]] = future.result()
                measures = list(runs[futures[future]]["measures"].items())[:3]
                figures = ", ".join(f"{name} {value:.3f}" for name, value in measures)
                console.print(f"{said}: {figures}; {left:.0f} min left", style="dim")
                yield [runs[number] for number in sorted(runs)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_once(entry: Entry, task: Task) -> dict[str, Any]:
    """One run: its final measures, whole and by kind, and what it cost."""
    model, tokenizer = load_model(task.model)
    assignment = load_assignment(task.dataset, task.requests, entry.seed)
    variant = entry.variant
    editor = make_editor(
        variant.method,
        model,
        tokenizer,
        BaftConfig(seed=entry.seed, **variant.overrides),
        unrelated=assignment.unrelated,
        options=METHODS[variant.method].options(**variant.options),
    )
    results = run_edits(editor, assignment.requests, entry.mode).results
    metrics = results["metrics"]
    final = metrics["immediate" if entry.mode == "single" else "final"]  # of single edits there is no later
    return {
        **{"label": entry.label, "mode": entry.mode, "seed": entry.seed, **asdict(variant)},
        "parameters": sum(parameter.numel() for parameter in editor.parameters().values()),
        "measures": dict(_columns(final)),
        "known before": known_before(final),
        "steps": results["timing"]["steps"],
        "seconds_per_edit": results["timing"]["seconds_per_edit"],
    }


def _columns(metrics: Metrics) -> Iterator[tuple[str, float]]:
    for measure, values in metrics.items():
        if values is None:
            continue
        yield measure, values["generation"]
        if len(values["kinds"]) > 1:
            yield from ((f"- {kind.replace('_', ' ')}", value) for kind, value in values["kinds"].items())


def tabulate(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of mean ± standard deviation over seeds, one for each mode and label; the first row is the header."""
    measures = runs[0]["measures"]
    rows = [["mode", "configuration", "parameters", *measures, "steps", "s/edit"]]
    for mode, label in dict.fromkeys((run["mode"], run["label"]) for run in runs):
        same = [run for run in runs if (run["mode"], run["label"]) == (mode, label)]
        cells = [_spread([run["measures"][name] for run in same]) for name in measures]
        steps, seconds = fmean(run["steps"] for run in same), fmean(run["seconds_per_edit"] for run in same)
        rows.append([mode, label, f"{same[0]['parameters']:,}", *cells, f"{steps:.0f}", f"{seconds:.2f}"])
    return rows


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ±{pstdev(values):.3f}" if len(values) > 1 else "")


def save(name: str, runs: list[dict[str, Any]], rows: list[list[str]], about: dict[str, Any]) -> Path:
    """Write the raw runs as JSON and the table as Markdown beside it; returns the latter's path."""
    RESULTS.mkdir(exist_ok=True)
    planned = about["runs planned"]
    ending = "" if len(runs) == planned else ".partial"
    (RESULTS / f"{name}{ending}.json").write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    note = f"{about['task']['requests']} requests, by generation. {_known(runs)}"
    if ending:
        note = f"{len(runs)} of {planned} runs. {note}"
    path = RESULTS / f"{name}{ending}.md"
    path.write_text(markdown(rows, about, note))
    if not ending:
        for left in RESULTS.glob(f"{name}.partial.*"):
            left.unlink()
    return path


def _known(runs: list[dict[str, Any]]) -> str:
    """What the unedited model knew of it: no measure can be read without."""
    each = [run["known before"] for run in runs]
    asked = dict.fromkeys(name for found in each for name in found)
    known = {name: fmean(found[name] for found in each if name in found) for name in asked}
    return f"The unedited model gave the old answers to {shares(known)}. " if known else ""
