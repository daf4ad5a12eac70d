"""What a report says in words: what was run, how runs are called, and how they were measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from baft.evaluation.harness import side_by_side
from baft.evaluation.measures import known_before, shares
from baft.report.source import Results, RetentionPoint, RunSource

__all__ = ["after", "count", "duration", "facts", "labels", "last_two", "method", "percent", "protocol", "size", "when"]

_WITH_RANK = ("BaFT", "LoReFT", "LoRA")


def method(results: Results) -> str:
    """Runs from before there were several methods don't name theirs."""
    return results.method or ("LoReFT" if results.config.get("gate_fn") == "none" else "BaFT")


def labels(runs: Sequence[RunSource]) -> list[str]:
    """What each run is called: its method and rank, and where that is not enough, its folder."""
    short = [_called(run.results) for run in runs]
    folders = [Path(run.name).name for run in runs]
    for extra in (folders, [run.name for run in runs]):
        counts = Counter(short)
        short = [f"{name} ({e})" if counts[name] > 1 else name for name, e in zip(short, extra, strict=True)]
    return short


def _called(results: Results) -> str:
    name, rank = method(results), results.config.get("rank")
    called = f"{name}, rank {rank}" if rank is not None and name in _WITH_RANK else name
    return called if results.finished else f"{called}, not finished"


def count(results: Results) -> str:
    """How many edits it has; of a run that isn't finished, how many it shall have too."""
    return f"{results.edits:,}" + (f" of {results.requests:,}" if results.requests and not results.finished else "")


def facts(results: Results) -> list[tuple[str, str]]:
    """What was run, with what, and what it cost, as pairs of a name and a value."""
    config, timing = results.config, results.timing
    layers = config.get("layers")
    known = {
        "Method": method(results),
        "Model": results.model,
        "Data set": results.dataset,
        "Edits": f"{count(results)}, {results.mode}" + ("" if results.finished else ", not finished"),
        "Left out": ", ".join(map(str, results.dropped)),
        "Rank": config.get("rank"),
        "Blocks": layers and ", ".join(map(str, layers)),
        "Known before": _known(results),
        "General ability by lm-eval": _general(results),
        "Seed": results.seed,
        "Backend": results.backend,
        "Time": timing.total_seconds and f"{duration(timing.total_seconds)} in all",
        "Time per edit": timing.seconds_per_edit and f"{timing.seconds_per_edit:.2f} s",
        "Settling": _settling(results),
        "Memory at most": _memory(results),
        "Parameters per edit": results.memory.bytes_per_edit and size(results.memory.bytes_per_edit),
        "Versions": ", ".join(f"{name} {number}" for name, number in results.versions.items() if number),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "")]


def _known(results: Results) -> str | None:
    """How much the model knew of what it was to forget: the measures can't be read without."""
    known = known_before(results.last.model_dump())
    return f"the old answers to {shares(known)}" if known else None


def _general(results: Results) -> str:
    scores = side_by_side(results.lm_eval or {})
    return "; ".join(f"{name} {before:.3f} unedited, {after:.3f} edited" for name, before, after in scores)


def _settling(results: Results) -> str | None:
    rounds = sum(not done.diverged for done in results.settling)
    said = f"{rounds} round{'s' if rounds != 1 else ''} over all edits, {duration(results.timing.settling_seconds)}"
    return said if rounds else None


def _memory(results: Results) -> str | None:
    peak = results.memory.peak_bytes
    parts = [f"{size(value)} {where}" for value, where in ((peak.process, "(process)"), (peak.gpu, "(GPU)")) if value]
    return ", ".join(parts) or None


def protocol(results: Results) -> list[tuple[str, str]]:
    """How it was measured, as pairs of a name and a value; what a run doesn't say isn't there."""
    said = results.protocol
    generation, forced = said.get("generation", {}), said.get("teacher_forced", {})
    moments = {
        "sequential": "right after: each request after its own edit, with what was edited before still on; "
        "at the end: all of them, with all edits made and settled",
        "batch": "all requests after the whole batch; there is no moment in between",
        "single": "each request after its own edit, alone; there is no state that holds them all",
    }
    length = generation.get("max_new_tokens")
    known = {
        "When": moments.get(results.mode),
        "Generation": generation.get("decoding"),
        "Length of an answer": length and f"at most {length} tokens; it stops at {generation.get('stop')}",
        "Right answer": generation.get("match"),
        "Locality": generation.get("locality"),
        "Teacher-forced, by token": forced.get("token"),
        "Teacher-forced, whole answer": forced.get("sequence"),
        "Teacher-forced locality": forced.get("locality"),
        "Prompt template": said.get("prompt_template"),
    }
    return [(name, str(value)) for name, value in known.items() if value]


def after(edits: int) -> str:
    return f"after {edits:,} edit{'s' if edits != 1 else ''}"


def when(point: RetentionPoint) -> str:
    """The moment of a look back, as a sentence begins with it."""
    return after(point.edits).capitalize() + (", settled" if point.settled else "")


def last_two(points: Sequence[RetentionPoint]) -> str:
    """Why two points are above one number of edits, where they are."""
    twice = len(points) > 1 and points[-1].settled and points[-2].edits == points[-1].edits
    return "The last two points are before and after settling. " if twice else ""


def percent(value: float | None) -> str:
    return "no data" if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
