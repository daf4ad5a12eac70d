"""What each part of a sequential run brings, and what else might: one change at a time against the defaults.

    python bench/capacity.py --model factworld-large --dataset factworld-large --requests 200
    python bench/capacity.py --variants defaults "rank 128"        some of the variants, on a hundred requests

``--model`` and ``--dataset`` choose the world, or a benchmark with a testbed that knows it. Every figure is final and
by generation: all requests are asked after the last edit. Results go to bench/results/ as JSON and Markdown.
"""

from __future__ import annotations

import argparse
from typing import Any

from comparison import Task, Variant, compare, plan_of

from baft import BaftConfig

RANK = BaftConfig().rank
GROWTH = {"rank": RANK // 4, "grow_by": RANK // 8, "max_rank": RANK}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no consolidation": {"consolidate_every": 0},
    "a quarter of the consolidation": {"consolidation_steps": BaftConfig().consolidation_steps // 4},
    "no settling": {"settling_rounds": 0},
    "no retellings": {"retellings": 0},
    "nothing about the subjects": {"subject_texts": 0},
    "no rehearsal": {"rehearsal": 0},
    "no rehearsal, no consolidation": {"rehearsal": 0, "consolidate_every": 0},
    "rehearsal from a reservoir of 100": {"rehearsal_buffer": 100},
    "rank 16": {"rank": 16},
    "rank 128": {"rank": 128},
    f"rank grows from {RANK // 4} to {RANK}": GROWTH,
    f"rank grows from {RANK} to {2 * RANK}": {"grow_by": RANK // 8, "max_rank": 2 * RANK},
    "growth and load balancing": {**GROWTH, "balance_weight": 0.05},
    "load balancing, weight 0.05": {"balance_weight": 0.05},
    "contexts 4": {"contexts": 4},
    "contexts 16": {"contexts": 16},
    "contexts 64": {"contexts": 64},
    "contexts 4, retellings 6": {"contexts": 4, "retellings": 6},
    "contexts 4, retellings 6, subject texts 24": {"contexts": 4, "retellings": 6, "subject_texts": 24},
    "smoothing 0.1": {"smoothing": 0.1},
    "smoothing 0.5": {"smoothing": 0.5},
}
_STAGES = 10  # in which a rank that grows does so within a run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--model", default="factworld")
    parser.add_argument("--dataset", default="factworld")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share torch's threads")
    options = parser.parse_args()
    variants = {name: variant(VARIANTS[name], options.requests) for name in options.variants}
    task = Task(options.model, options.dataset, options.requests)
    compare(f"capacity_{options.requests}", plan_of(variants, ["sequential"], options.seeds), task, options.jobs)


def variant(changes: dict[str, Any], requests: int) -> Variant:
    """BaFT with these changes; a rank that grows reaches its end before the run does."""
    grows = {"grow_every": max(1, requests // _STAGES)} if "grow_by" in changes else {}
    return Variant(overrides={**changes, **grows})


if __name__ == "__main__":
    main()
