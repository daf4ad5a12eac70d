"""Requests of one run that ask for the same thing twice, or for two things at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from baft.evaluation.matching import normalise
from baft.requests import EditRequest

__all__ = ["can_hold", "conflicts", "in_words"]


def conflicts(requests: Sequence[EditRequest]) -> list[dict[str, Any]]:
    """Prompts that several requests share: ``positions``, ``ids``, ``targets``, and ``kind``.

    ``duplicate`` requests want the same; of ``contradiction`` the later one wins.
    """
    by_prompt: dict[str, list[int]] = {}
    for position, request in enumerate(requests):
        by_prompt.setdefault(request.prompt, []).append(position)
    found = []
    for prompt, positions in by_prompt.items():
        if len(positions) > 1:
            targets = [requests[position].target for position in positions]
            kind = "duplicate" if len(set(map(normalise, targets))) == 1 else "contradiction"
            ids = [requests[position].id for position in positions]
            found.append({"kind": kind, "prompt": prompt, "positions": positions, "ids": ids, "targets": targets})
    return found


def can_hold(found: Sequence[dict[str, Any]], done: Sequence[int], given_up: Collection[int] = ()) -> list[int]:
    """Those of the edits that are ``done``, in order, that no later one of them contradicts.

    Args:
        found: what ``conflicts`` returned.
        done: positions of requests.
        given_up: positions of those that were: not edited in, they contradict nobody.
    """
    edited = {*done}.difference(given_up)
    superseded = set()
    for conflict in found:
        asked = zip(conflict["positions"], map(normalise, conflict["targets"]), strict=True)
        wanted = {position: target for position, target in asked if position in edited}
        last = list(wanted.values())[-1:]
        superseded |= {position for position, target in wanted.items() if [target] != last}
    return [position for position in done if position not in superseded]


def in_words(conflict: dict[str, Any]) -> str:
    """A conflict in words."""
    each = zip(conflict["positions"], conflict["ids"], conflict["targets"], strict=True)
    asked = ", ".join(f"{position}{f' (id {id})' if id else ''}: {target!r}" for position, id, target in each)
    ends = "the last one wins" if conflict["kind"] == "contradiction" else "they want the same"
    return f"{conflict['prompt']!r} is asked for {len(conflict['positions'])} times ({asked}): {ends}"
