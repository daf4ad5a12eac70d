"""Sequential runs of a tiny editor in a folder, and what such a run found, to compare one with another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import REQUESTS, tiny_editor, tiny_model

from baft import BaftEditor, EditRequest
from baft.editing import Mode
from baft.requests import Probe
from baft.runs.folder import RunFolder
from baft.runs.identity import identify
from baft.runs.logs import open_log
from baft.runs.run import RunPlan, RunReport, run_edits
from baft.runs.watcher import Nobody

# Those that every test edits, each with questions of three kinds.
ASKED = [
    request.model_copy(
        update={
            "rephrases": (f"Tell me: {request.prompt}",),
            "locality": {"neighbour": (Probe(prompt="Arvik is", answers=("Norland",)), Probe(prompt="Ebor is"))},
        }
    )
    for request in REQUESTS
] + [
    EditRequest(prompt=f"Where is {name}? {name} is in", target=target, subject=name)
    for name, target in [("Arvik", "Sudland"), ("Ebor", "France"), ("Paris", "Norland"), ("Bob Stone", "Ebor")]
]
PLAN = RunPlan(held_out=["The capital of France is Paris.", "Ada Lund was born in Arvik."], measure_every=4, retained=3)


class Listener(Nobody):
    """Hears what is said, and is asked at every advance whether to go on."""

    def __init__(self, on_advance: Callable[[], None] = lambda: None) -> None:
        self.said: list[str] = []
        self._on_advance = on_advance

    def advance(self, note: str = "", units: int = 1) -> None:
        self._on_advance()

    def say(self, text: str) -> None:
        self.said.append(text)


class Broken(Exception):
    """What breaks a run off."""


def break_off_after(advances: int) -> Listener:
    left = iter(range(advances))

    def advance() -> None:
        if next(left, None) is None:
            raise Broken

    return Listener(advance)


def small_editor(**changes: Any) -> BaftEditor:
    return tiny_editor(
        tiny_model(max_position_embeddings=128),  # room for free texts
        **{
            "max_steps": 3,
            "consolidate_every": 3,
            "settling_rounds": 6,
            "batch_size": 4,
            "balance_weight": 0.01,
            "subject_texts": 3,
            **changes,
        },
    )


def run_in(
    folder: Path,
    *,
    mode: Mode = "sequential",
    requests: list[EditRequest] = ASKED,
    plan: RunPlan = PLAN,
    listener: Listener | None = None,
    log: str | None = None,
    **changes: Any,
) -> RunReport:
    """Begin the run in ``folder``, or go on with it; ``changes`` go to the editor's configuration."""
    place, editor = RunFolder(folder), small_editor(**changes)
    try:
        identity = identify(
            method=editor.name,
            mode=mode,
            config=editor.config.model_dump(mode="json"),
            model=editor.model,
            requests=requests,
            unrelated=None,
            held_out=plan.held_out,
            tokenizer=editor.tokenizer,
            backend="reference",
        )
        if place.begun:
            place.go_on(identity)
        else:
            place.begin(identity, {"mode": mode})
        figures = open_log(log, folder) if log else None
        return run_edits(editor, requests, mode, plan=plan, folder=place, watcher=listener, log=figures)
    finally:
        place.close()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, for tests that only read it."""
    folder = tmp_path_factory.mktemp("runs") / "sequential"
    run_in(folder)
    return folder
