"""How the engine works: what changes the time and the memory of editing, and never, but for rounding, its result."""

from __future__ import annotations

from dataclasses import dataclass

from baft.distributed import ALONE, World

__all__ = ["EngineOptions"]


@dataclass(frozen=True)
class EngineOptions:
    """Each part of the engine can be switched off, to see what it brings.

    Attributes:
        replay: compute what lies below the first edit, and the unedited model's predictions, once for each text.
        head_where_needed: apply the head to the tokens that a loss looks at, and not to all.
        side_by_side: lay several short texts in one row, instead of padding each to the longest.
        slots: single edits trained in one forward pass; None chooses, on a GPU by what memory is free.
        memory: bytes that ``replay`` may remember in.
        graphs: on an NVIDIA GPU, capture steps in CUDA graphs, one for each shape, and replay them. Single edits
            capture anew in each call. Off by default, as it has yet to run on one; the tests show it on a stand-in.
        world: processes that edit together: each trains on a part of every step's texts, all end up with the same
            parameters. Single edits are each process's own.

    Raises:
        ValueError: for a number that isn't positive.
    """

    replay: bool = True
    head_where_needed: bool = True
    side_by_side: bool = True
    slots: int | None = None
    memory: int = 2 << 30
    graphs: bool = False
    world: World = ALONE

    def __post_init__(self) -> None:
        for name in ("slots", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
