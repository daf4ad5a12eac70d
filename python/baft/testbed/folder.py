"""Testbed models on disk: saved with what they know, and kept in a cache between runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from baft.datasets.factworld import FactWorld
from baft.storage import naming
from baft.testbed.training import Knowledge, OnProgress, TestbedRecipe, TrainingReport, train_testbed

__all__ = ["RECALL_NEEDED", "RECIPES", "cache_folder", "factworld_folder", "make_testbed", "without_progress_bars"]

REPORT = "testbed.json"

RECIPES: dict[str, TestbedRecipe] = {
    "factworld": TestbedRecipe(),
    "factworld-large": TestbedRecipe(max_epochs=32),
    "factworld-paragraphs": TestbedRecipe(),
}
"""How a model of each of ``baft.datasets.factworld.WORLDS`` is trained."""

RECALL_NEEDED = 0.98
"""Training goes on for the recipe's ``recall_wanted``; a model that ends a little below is still good to edit."""


def cache_folder() -> Path:
    """Where trained testbeds are kept: ``BAFT_CACHE_DIR``, else ``baft`` in the user's cache folder."""
    if configured := os.environ.get("BAFT_CACHE_DIR"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baft"


def make_testbed(
    folder: Path,
    knowledge: Knowledge,
    recipe: TestbedRecipe,
    *,
    facts: str,
    recall_needed: float = RECALL_NEEDED,
    on_progress: OnProgress | None = None,
) -> TrainingReport:
    """Train a testbed and save it in ``folder``, whole or not at all.

    Args:
        facts: what it was trained on, in words, for ``testbed.json``.
        recall_needed: a model that knows less isn't saved.

    Raises:
        ValueError: if ``folder`` exists and isn't empty.
        RuntimeError: if training ended before the model knew enough.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: expected a new or empty folder, got one in use")
    model, tokenizer, report = train_testbed(knowledge, recipe, on_progress=on_progress)
    if report.recall < recall_needed:
        raise RuntimeError(
            f"the testbed model knows {report.recall:.1%} of the facts after {report.steps} steps, "
            f"expected at least {recall_needed:.0%}; give it more epochs or a larger size"
        )
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with naming(folder):
            _save(
                beside, model, tokenizer, {"facts": facts, **dataclasses.asdict(recipe), **dataclasses.asdict(report)}
            )
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return report


def _save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, report: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    with without_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No bars of transformers' own for models that load and save in a blink."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def factworld_folder(
    world: FactWorld, recipe: TestbedRecipe | None = None, *, on_progress: OnProgress | None = None
) -> Path:
    """The folder of a model that knows ``world``: from the cache, or trained now and put there.

    The cache's key is made of the training texts and the recipe, so a changed world or recipe is trained anew.
    """
    recipe = recipe or TestbedRecipe()
    content = json.dumps(
        [dataclasses.asdict(recipe), [dataclasses.astuple(p) for p in world.people], *_all_wordings(world)]
    )
    folder = cache_folder() / f"factworld-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if not (folder / REPORT).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            make_testbed(folder, world, recipe, facts=f"FactWorld, seed {world.seed}", on_progress=on_progress)
        except OSError:
            if not (folder / REPORT).exists():  # else another process has trained it meanwhile: the same model
                raise
    return folder


def _all_wordings(world: FactWorld) -> list[list[str]]:
    return [[*relation.wordings, *relation.held_out, *relation.hop_wordings] for relation in world.relations]
