"""How well edits hold, generalise and stay local: BaFT against LoReFT at equal parameter count.

    python bench/editing_quality.py             the table: 100 FactWorld requests, in every mode, 3 seeds
    python bench/editing_quality.py --tune      the same grid for both methods, on a seed of its own
    python bench/editing_quality.py --ablate    one choice of the configuration changed at a time
    python bench/editing_quality.py --backends cpu reference    the same edits, computed by different backends

``--model`` and ``--dataset`` take another model and benchmark, such as a testbed that ``baft testbed`` trained. How
the runs are made, and where their results go, is in bench/comparison.py.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from comparison import REQUESTS, SEEDS, TUNING_SEED, Entry, Task, Variant, compare, of_baft, plan_of

from baft import BaftConfig
from baft.editing import Mode

MODES: tuple[Mode, ...] = ("single", "batch", "sequential")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tune", action="store_true", help="the grid, for both methods")
    which.add_argument("--ablate", action="store_true", help="one choice changed at a time")
    which.add_argument("--backends", nargs="+", metavar="BACKEND", help="BaFT on each of these backends of the op")
    parser.add_argument("--model", default="factworld")
    parser.add_argument("--dataset", default="factworld")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--seeds", type=int, nargs="+", help=f"{SEEDS} by default; of --tune always {TUNING_SEED}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share torch's threads")
    options = parser.parse_args()
    if options.tune and options.seeds:
        parser.error(f"--tune has a seed of its own, {TUNING_SEED}: expected no --seeds")
    seeds = options.seeds or SEEDS
    if options.tune:
        name, plan = "tuning", tuning_plan(options.modes)
    elif options.ablate:
        name, plan = "ablations", ablation_plan(options.modes, seeds)
    elif options.backends:
        changes = {f"backend {backend}": {"backend": backend} for backend in options.backends}
        name, plan = "backends", plan_of(of_baft(changes), options.modes, seeds)
    else:
        name, plan = "editing", plan_of(METHODS, options.modes, seeds)
    task = Task(options.model, options.dataset, options.requests)
    compare("_".join([name, *options.modes]), plan, task, options.jobs)


def ablation_plan(modes: Iterable[Mode], seeds: Sequence[int]) -> list[Entry]:
    """Every change of the configuration, in the modes that it changes."""
    changes = {mode: ABLATIONS_OF_SINGLE_EDITS if mode == "single" else ABLATIONS for mode in modes}
    return [entry for mode in changes for entry in plan_of(of_baft(changes[mode]), [mode], seeds)]


def tuning_plan(modes: Iterable[Mode]) -> list[Entry]:
    """Every point of the grid for both methods: the same budget of tuning."""
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    variants = {
        ", ".join([method, *(f"{name} {value:g}" for name, value in point.items())]): replace(variant, overrides=point)
        for (method, variant), point in itertools.product(METHODS.items(), points)
    }
    return plan_of(variants, modes, [TUNING_SEED])


if __name__ == "__main__":
    main()
