"""How well edits hold, generalise and stay local: BaFT against LoReFT at equal parameter count.

    python bench/editing_quality.py             the table: 100 FactWorld requests, in every mode, 3 seeds
    python bench/editing_quality.py --tune      the same grid for both methods, on a seed of its own
    python bench/editing_quality.py --ablate    one choice of the configuration changed at a time
    python bench/editing_quality.py --backends cpu reference    the same edits, computed by different backends

``--model`` and ``--dataset`` take another model and benchmark, such as a testbed that ``baft testbed`` trained. Every
figure is by generation (see ``baft.evaluation``). Results go to bench/results/ as JSON and
Markdown, with the commit, versions and every run's measures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from report import RESULTS, called, command, commit, counted_threads
from rich.console import Console
from rich.table import Table

from baft import BaftConfig
from baft.baselines.methods import METHODS as ALL_METHODS
from baft.baselines.methods import make_editor
from baft.editing import Mode
from baft.evaluation.measures import Evaluator, Metrics, known_before, shares
from baft.runs.environment import versions
from baft.runs.inputs import load_assignment, load_model
from baft.runs.run import run_edits

REQUESTS = 100
SEEDS = (0, 1, 2)
MODES: tuple[Mode, ...] = ("single", "batch", "sequential")
TUNING_SEED = 100  # its choice and order of requests are not among those that are reported


@dataclass(frozen=True)
class Variant:
    """What is compared: a method of ``baft.baselines.methods``, changes to its configuration, its own options."""

    method: str = "baft"
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


METHODS = {"BaFT": Variant("baft"), "LoReFT": Variant("loreft")}
GRID = {"learning_rate": (4e-3, 8e-3), "locality_weight": (7.5, 15.0, 30.0)}
ABLATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gates learn as fast as the rest": {"gate_learning_rate": BaftConfig().learning_rate},
    "gates don't learn": {"gate_learning_rate": 0.0},
    "nearly linear gates (scale 0.2)": {"gate_scale": 0.2},
    "sharp gates (scale 8)": {"gate_scale": 8.0},
    "gates start closed (bias -4)": {"gate_bias": -4.0},
    "softmax gates": {"gate_fn": "softmax"},
    "load balancing, weight 0.05": {"balance_weight": 0.05},
    "locality by the size of u, weight 10": {"locality_loss": "update", "locality_weight": 10.0},
    "a quarter of the locality weight": {"locality_weight": BaftConfig().locality_weight / 4},
    "no locality loss": {"locality_weight": 0.0},
    "rank 12": {"rank": 12},
    "two lowest blocks": {"layers": (0, 1)},
    "last prompt token only": {"positions": "last"},
}
ABLATIONS_OF_SINGLE_EDITS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "an edit ends with its own loss": {"min_steps": 0},
    "10 steps": {"max_steps": 10},
    "30 steps": {"max_steps": 30, "min_steps": 30},
    "8 unrelated texts": {"unrelated_per_edit": 8},
    "48 unrelated texts": {"unrelated_per_edit": 48},
    "no texts about the subject": {"subject_texts": 0},
    "no retellings": {"retellings": 0},
    "no locality loss": {"locality_weight": 0.0},
}


class Task(NamedTuple):
    """What is edited: so many requests of a data set, on a model; and how long an answer to it may be."""

    model: str
    dataset: str
    requests: int
    max_new_tokens: int = 12


class Entry(NamedTuple):
    """One run of a plan."""

    label: str
    mode: Mode
    seed: int
    variant: Variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tune", action="store_true", help="the grid, for both methods")
    which.add_argument("--ablate", action="store_true", help="one choice changed at a time")
    which.add_argument("--backends", nargs="+", metavar="BACKEND", help="BaFT on each of these backends of the op")
    parser.add_argument("--model", default="factworld")
    parser.add_argument("--dataset", default="factworld")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share torch's threads")
    options = parser.parse_args()
    if options.tune:
        name, plan = "tuning", tuning_plan(options.modes)
    elif options.ablate:
        name, plan = "ablations", ablation_plan(options.modes, options.seeds)
    elif options.backends:
        changes = {f"backend {backend}": {"backend": backend} for backend in options.backends}
        name, plan = "backends", plan_of(_variants(changes), options.modes, options.seeds)
    else:
        name, plan = "editing", plan_of(METHODS, options.modes, options.seeds)
    task = Task(options.model, options.dataset, options.requests)
    compare("_".join([name, *options.modes]), plan, task, options.jobs)


def _variants(changes: dict[str, dict[str, Any]]) -> dict[str, Variant]:
    """BaFT with each of some changes to its configuration."""
    return {label: Variant(overrides=overrides) for label, overrides in changes.items()}


def plan_of(variants: dict[str, Variant], modes: Iterable[Mode], seeds: Iterable[int]) -> list[Entry]:
    """Every variant in every mode with every seed."""
    product = itertools.product(modes, variants.items(), seeds)
    return [Entry(label, mode, seed, variant) for mode, (label, variant), seed in product]


def ablation_plan(modes: Iterable[Mode], seeds: Sequence[int]) -> list[Entry]:
    """Every change of the configuration, in the modes that it changes."""
    changes = {mode: ABLATIONS_OF_SINGLE_EDITS if mode == "single" else ABLATIONS for mode in modes}
    return [entry for mode in changes for entry in plan_of(_variants(changes[mode]), [mode], seeds)]


def tuning_plan(modes: Iterable[Mode]) -> list[Entry]:
    """Every point of the grid for both methods: the same budget of tuning."""
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    variants = {
        ", ".join([method, *(f"{name} {value:g}" for name, value in point.items())]): replace(variant, overrides=point)
        for (method, variant), point in itertools.product(METHODS.items(), points)
    }
    return plan_of(variants, modes, [TUNING_SEED])


def compare(name: str, plan: list[Entry], task: Task, jobs: int) -> None:
    """Run a plan, show its table, and save it under the data set's and its own name: after each run what is done.

    Until all of it is done the files are called ``*.partial.*``. A run that fails is named, and the others go on.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 220)
    about = {
        "command": command(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
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


def run_all(plan: list[Entry], task: Task, jobs: int, console: Console) -> Iterator[list[dict[str, Any]]]:
    """Run each entry of ``plan``, ``jobs`` at a time in processes of their own, saying how it goes.

    Yields, whenever one is done, what those that are have found, in the order of the plan. One that fails is missing.
    """
    load_model(task.model)  # FactWorld's is trained, if need be, before several processes ask for it
    threads = max(1, torch.get_num_threads() // jobs)
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
                runs[futures[future]] = {**future.result(), "threads": threads}
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
        options=ALL_METHODS[variant.method].options(**variant.options),
    )
    evaluator = Evaluator(editor, max_new_tokens=task.max_new_tokens, batch_size=128)
    results = run_edits(editor, assignment.requests, entry.mode, evaluator=evaluator).results
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


def show(rows: list[list[str]], console: Console) -> None:
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def save(name: str, runs: list[dict[str, Any]], rows: list[list[str]], about: dict[str, Any]) -> Path:
    """Write the raw runs as JSON and the table as Markdown beside it; returns the latter's path."""
    RESULTS.mkdir(exist_ok=True)
    planned = about["runs planned"]
    ending = "" if len(runs) == planned else ".partial"
    (RESULTS / f"{name}{ending}.json").write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    header, *body = rows
    table = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body])
    threads = counted_threads(runs[0]["threads"])
    made = f"commit {about['commit']}, torch {about['versions']['torch']}, {threads}, {about['date']}"
    said = f"{about['task']['requests']} requests, by generation. {_known(runs)}`{about['command']}`, {made}."
    if ending:
        said = f"{len(runs)} of {planned} runs. {said}"
    path = RESULTS / f"{name}{ending}.md"
    path.write_text(f"{table}\n\n{said}\n")
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


if __name__ == "__main__":
    main()
