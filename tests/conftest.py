"""What every test gets: the same random numbers each time, no network, the published benchmark files if at hand."""

from __future__ import annotations

import os

# Read when huggingface_hub is imported, so it is set before anything that could import it.
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from baft.datasets.factworld import FactWorld

# The kernels' tests also run where only torch, triton and pytest are installed, as by bench/gpu_suite.py: what else a
# test needs, it imports itself.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # The same examples in every run, and no time limit for one of them: the first call of a torch op can be slow.
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the published benchmark files, ``BAFT_DATA_DIR``; a test that asks for it is skipped without."""
    folder = os.environ.get("BAFT_DATA_DIR")
    if not folder:
        pytest.skip("BAFT_DATA_DIR is unset: set it to the folder of the published benchmark files")
    if not Path(folder).is_dir():
        pytest.fail(f"BAFT_DATA_DIR: expected a folder, got {folder!r}")
    return Path(folder)


@pytest.fixture(scope="session")
def small_world() -> FactWorld:
    """An invented world of few people."""
    from baft.datasets.factworld import FactWorld

    return FactWorld(1, people=24)


@pytest.fixture(scope="session")
def testbed(small_world: FactWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that knows the small world; it is trained in some ten seconds."""
    from baft.testbed.folder import make_testbed
    from baft.testbed.training import TestbedRecipe

    folder = tmp_path_factory.mktemp("testbed") / "model"
    recipe = TestbedRecipe(hidden_size=96, vocabulary=500, batch_size=32, max_epochs=66, recall_wanted=0.99)
    make_testbed(folder, small_world, recipe, facts="a small world")
    return folder


@pytest.fixture(scope="session")
def dataset(small_world: FactWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world's requests as a file in a format that users have (KnowEdit's fields)."""
    import json

    file = tmp_path_factory.mktemp("data") / "world.json"
    records = [
        {
            "prompt": r.prompt,
            "target_new": r.target,
            "subject": r.subject,
            "ground_truth": r.ground_truth,
            "rephrase": r.rephrases[0],
            "locality": {
                kind: [{"prompt": probe.prompt, "ground_truth": probe.answers} for probe in probes]
                for kind, probes in r.locality.items()
            },
        }
        for r in small_world.requests()
    ]
    file.write_text(json.dumps(records))
    return file


@pytest.fixture(scope="session")
def sequential_run(
    testbed: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run by the command: its folder, and what it printed. Tests only read it."""
    import json

    from command import baft

    out = tmp_path_factory.mktemp("runs") / "sequential"
    config = out.with_suffix(".yaml")
    config.write_text("rank: 24\nlocality_weight: 5\n")
    arguments = ("--model", testbed, "--dataset", dataset, "--mode", "sequential", "--edits", 4, "--config", config)
    done = baft("run", *arguments, "--out", out, "--seed", 3, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)
