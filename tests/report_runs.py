"""Folders of made-up runs, for tests of the report: the figures in them were never measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MEASURES = ("reliability", "generality", "locality", "portability")
MILESTONES = (1, 10, 100, 1000, 10_000)


def scores(value: float | None) -> dict[str, Any] | None:
    return value if value is None else {"generation": value, "token": value, "sequence": value, "kinds": {}}


def metrics(**values: float | None) -> dict[str, Any]:
    return {measure: scores(values.get(measure, 0.9)) for measure in MEASURES}


def edit(index: int, **changes: Any) -> dict[str, Any]:
    """A line of ``edits.jsonl``: right after its edit, and at the end unless ``right_at_the_end`` says otherwise.

    Args:
        changes: ``prompt``, ``target``, ``before``, ``said`` (at both moments), ``right_after``, ``right_at_the_end``,
            ``diverged``, ``losses``, ``final``.
    """
    prompt = changes.get("prompt", f"Person {index} plays the")
    target = changes.get("target", "oboe")
    losses = changes.get("losses", [8.0, 2.5, 0.6, 0.02])

    def probes(right: bool) -> list[dict[str, Any]]:
        said = changes.get("said", target if right else "violin")
        return [
            probe("reliability", prompt, [target], said, changes.get("before", "cello."), right),
            probe("generality", f"In other words, {prompt}", [target], said, "cello.", right),
            probe("locality", f"Neighbour {index} plays the", [], "harp", "harp.", True, kind="neighbour"),
            probe("locality", "The capital of Ruritania is", [], "Strelsau", "Strelsau.", True, kind="unrelated"),
        ]

    return {
        "index": index,
        "id": f"made-up-{index}",
        "prompt": prompt,
        "target": target,
        "subject": None,
        "training": {
            "steps": len(losses),
            "converged": not changes.get("diverged", False),
            "diverged": changes.get("diverged", False),
            "seconds": 0.5 + index % 7 / 10,
            "losses": losses,
        },
        "immediate": probes(changes.get("right_after", True)),
        "final": changes.get("final", probes(changes.get("right_at_the_end", True))),
    }


def probe(
    measure: str, prompt: str, answers: list[str], text: str, before: str, right: bool, kind: str | None = None
) -> dict[str, Any]:
    return {
        "measure": measure,
        "kind": kind or measure,
        "prompt": prompt,
        "answers": answers,
        "text": text,
        "before": before,
        "generation": right,
        "token": float(right),
        "sequence": right,
    }


def results(edits: int, **changes: Any) -> dict[str, Any]:
    """``results.json`` with everything that a run may record on the way, ``changes`` at its top."""
    made = {
        "method": "BaFT",
        "model": "no-model",
        "dataset": "made-up.json",
        "protocol": {
            "primary": "generation",
            "generation": {"decoding": "greedy", "max_new_tokens": 16, "stop": "EOS", "match": "exact"},
            "teacher_forced": {"token": "share of tokens", "sequence": "all tokens", "locality": "agreement"},
            "prompt_template": "{prompt}",
            "mode": "sequential",
        },
        "config": {"rank": 8, "layers": [0, 2], "gate_fn": "sigmoid", "stop_below": 0.05},
        "versions": {"baft-kernels": "0", "triton": None},
        "backend": "reference",
        "seed": 0,
        "edits": edits,
        "metrics": {"immediate": metrics(), "final": metrics(locality=0.97)},
        "retention": [retained(n, k) for k, n in enumerate(MILESTONES) if n <= edits],
        "timing": {"seconds_per_edit": 0.8, "total_seconds": 0.8 * edits},
        "training": {"converged": edits, "diverged": 0, "out_of_memory": 0},
        "memory": {"peak_bytes": {"process": 2**29, "gpu": None}, "bytes_per_edit": 4096.0},
        "superseded": [],
        "dropped": [],
    }
    return made | changes


def retained(edits: int, place: int) -> dict[str, Any]:
    return {
        "edits": edits,
        **metrics(reliability=1 - 0.02 * place, generality=0.95 - 0.04 * place, locality=0.99 - 0.01 * place),
        "general": {"perplexity": 20.0 + 0.6 * place, "before": 20.0},
        # The rank grows after the first moment.
        "gates": {
            layer: [(k % 4 + 1 + place) / (20 + 8 * place) for k in range(8 if place else 6)] for layer in ("0", "2")
        },
        "seconds": 0.8 * edits,
        "memory": {"process": 2**29 + place * 2**20, "gpu": 2**30},
    }


def write_run(folder: Path, edits: Iterable[dict[str, Any]], **changes: Any) -> Path:
    """Write the folder of a run with these ``edits`` and those ``changes`` of its results."""
    folder.mkdir(parents=True)
    lines = list(edits)
    (folder / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps(results(len(lines), **changes)))
    return folder
