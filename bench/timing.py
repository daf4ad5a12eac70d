"""Timing: variants take turns, inputs rotate past the caches, small work on a GPU is replayed from a CUDA graph."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

__all__ = ["PAST_CACHES", "Spread", "Work", "interleaved"]

# Inputs that rotate are this many bytes in all: more than any cache of today's CPUs and GPUs below 128 MiB.
PAST_CACHES = 256 * 2**20
_BATCH_SECONDS = 4e-3  # calls are timed in batches of about this long: far above what a clock can tell apart
_LONGEST_BATCH = 256

Work = Callable[[int], object]
"""One call on the inputs with this number, out of those that rotate."""


@dataclass(frozen=True)
class Spread:
    """Seconds a call: the median and the 20th and 80th percentile over batches."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        fifths = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 4
        return cls(median(seconds), fifths[0], fifths[3])


def interleaved(works: dict[str, Work], *, rotation: int, rounds: int, device: torch.device) -> dict[str, Spread]:
    """Time each of ``works``, in turns: what disturbs the machine for a while disturbs all of them.

    Args:
        works: by name.
        rotation: how many inputs there are to rotate through.
        rounds: batches of each.
        device: on a GPU each batch is a CUDA graph, replayed, and timed by events.
    """
    batch = _on_gpu if device.type == "cuda" else _on_cpu
    timers = {name: batch(work, rotation) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for round_ in range(rounds):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            seconds[name].append(timers[name]())
    return {name: Spread.of(values) for name, values in seconds.items()}


def _on_cpu(work: Work, rotation: int) -> Callable[[], float]:
    numbers = itertools.cycle(range(rotation))
    for _ in range(3):
        work(next(numbers))
    start = time.perf_counter()
    work(next(numbers))
    calls = max(1, min(_LONGEST_BATCH, round(_BATCH_SECONDS / max(time.perf_counter() - start, 1e-7))))

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work(next(numbers))
        return (time.perf_counter() - start) / calls

    return timed


def _on_gpu(work: Work, rotation: int) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for number in range(3):
            work(number % rotation)
    stream.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    with torch.cuda.stream(stream):
        work(0)
    end.record(stream)
    end.synchronize()
    calls = max(4, min(_LONGEST_BATCH, round(_BATCH_SECONDS / max(start.elapsed_time(end) * 1e-3, 1e-7))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(calls):
            work(number % rotation)
    graph.replay()

    def timed() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    return timed
