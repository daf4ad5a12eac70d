"""What BaFT's rivals make of the same requests: no edit, the facts in the prompt, fine-tuning, LoRA, LoReFT.

    python bench/baselines.py                 the table: 100 FactWorld requests, one after another, 3 seeds
    python bench/baselines.py --tune          the rivals' own settings, on a seed that isn't reported

All methods get the same requests, unrelated texts, losses and schedule, and are asked the same questions; every figure
is by generation. LoReFT and LoRA have as many parameters as BaFT, within a rank; fine-tuning has one layer's. Results
go to bench/results/ as JSON and Markdown. Seconds are of the methods as they are here: BaFT and LoReFT have an engine
that remembers what doesn't change from step to step, the others train plainly. A testbed's model has read one sentence
at a time and never learned to look into a context, so the facts in the prompt tell it nothing: that row needs a real
language model.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from comparison import REQUESTS, SEEDS, TUNING_SEED, Task, Variant, compare, plan_of

RIVALS = {
    "no edit": Variant("none"),
    "in-context": Variant("in-context"),
    "fine-tuning": Variant("ft"),
    "LoRA": Variant("lora"),
    "LoReFT": Variant("loreft"),
    "BaFT": Variant("baft"),
}
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
FACTS = (1, 4, 16)
TUNING_REQUESTS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="the rivals' own settings, on a seed of its own")
    parser.add_argument("--methods", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--model", default="factworld")
    parser.add_argument("--dataset", default="factworld")
    parser.add_argument("--requests", type=int, help=f"{REQUESTS} by default, {TUNING_REQUESTS} to tune")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"{SEEDS} by default; of --tune always {TUNING_SEED}")
    parser.add_argument("--mode", choices=("batch", "sequential"), default="sequential")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share torch's threads")
    options = parser.parse_args()
    variants = {name: RIVALS[name] for name in options.methods}
    seeds, requests, name = options.seeds or SEEDS, options.requests or REQUESTS, "baselines"
    if options.tune:
        if options.seeds:
            parser.error(f"--tune has a seed of its own, {TUNING_SEED}: expected no --seeds")
        variants, seeds, requests = tuned(variants), [TUNING_SEED], options.requests or TUNING_REQUESTS
        name = "baseline_tuning"
    task = Task(options.model, options.dataset, requests)
    compare(f"{name}_{options.mode}", plan_of(variants, [options.mode], seeds), task, options.jobs)


def tuned(variants: dict[str, Variant]) -> dict[str, Variant]:
    """Every setting that is tried of those methods that have some of their own."""
    points = {}
    for name, variant in variants.items():
        for rate in RATES if variant.method in ("ft", "lora") else ():
            points[f"{name}, learning rate {rate:g}"] = replace(variant, options={"learning_rate": rate})
        for facts in FACTS if variant.method == "in-context" else ():
            points[f"{name}, {facts} facts"] = replace(variant, options={"facts": facts})
    return points


if __name__ == "__main__":
    main()
