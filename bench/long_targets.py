"""Paragraphs as targets: taught whole or in chunks, with and without smoothing.

    python bench/long_targets.py --requests 20

FactWorld's model is taught texts of four sentences about a person, none of which is true. *Reliability*: the prompt is
answered with the whole text, word for word. *Generality*: so is a rephrased prompt. *Told*: asked directly, the model
answers with what a later sentence says. Every figure is final and by generation. Results go to bench/results/ as JSON
and Markdown.
"""

from __future__ import annotations

import argparse
from typing import Any

from comparison import Task, compare, of_baft, plan_of

from baft import BaftConfig

_, STEPS = BaftConfig().steps_of_an_edit(alone=False)
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole, twice the steps": {"max_steps": 2 * STEPS},
    "whole, four times the steps": {"max_steps": 4 * STEPS},
    "chunks of 16 tokens": {"chunk_tokens": 16},
    "chunks of 8 tokens": {"chunk_tokens": 8},
    "smoothing 0.1": {"smoothing": 0.1},
    "smoothing 0.5": {"smoothing": 0.5},
    "chunks of 16 tokens, smoothing 0.1": {"chunk_tokens": 16, "smoothing": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share torch's threads")
    options = parser.parse_args()
    variants = of_baft({name: VARIANTS[name] for name in options.variants})
    task = Task("factworld", "factworld-paragraphs", options.requests)
    compare("long_targets", plan_of(variants, ["sequential"], options.seeds), task, options.jobs)


if __name__ == "__main__":
    main()
