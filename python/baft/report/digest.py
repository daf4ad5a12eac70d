"""One pass over a run's edits, however many: what the page says of all of them, and which of them it shows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from baft.evaluation.matching import matches
from baft.evaluation.probes import Measure
from baft.report.source import EditLine, ProbeLine

__all__ = ["ALREADY_GIVEN", "MOST_EDITS", "Digest", "choose", "digest", "is_right"]

# A page with more edits than this is slow to load; a browser pages through them easily.
MOST_EDITS = 2000

# What the unedited model gave of the new answers already is known for these: locality compares with that model itself,
# and a line doesn't say which of a request's portability questions are the same one in other words.
ALREADY_GIVEN: tuple[Measure, ...] = ("reliability", "generality")


@dataclass(frozen=True)
class Digest:
    """What a page needs of all edits.

    Attributes:
        seconds: the time that each edit trained, in order.
        already: of each of ``ALREADY_GIVEN`` the share of questions to which the unedited model gave the new answer.
        troubled: of each edit, whether it failed at the end, though it could hold there, or was given up.
    """

    seconds: list[float]
    already: dict[Measure, float | None]
    troubled: list[bool]


def is_right(probes: Iterable[ProbeLine]) -> bool | None:
    """Whether an edit holds: its own prompt gives its target. None where that wasn't asked."""
    asked = [probe.generation for probe in probes if probe.measure == "reliability"]
    return all(asked) if asked else None


def digest(edits: Iterable[EditLine], superseded: Collection[int] = ()) -> Digest:
    """Go through ``edits``, of which those numbered in ``superseded`` can't hold at the end."""
    seconds: list[float] = []
    troubled: list[bool] = []
    already: dict[Measure, list[float]] = {measure: [] for measure in ALREADY_GIVEN}
    for edit in edits:
        probes = edit.final or edit.immediate
        seconds.append(edit.training.seconds)
        given_up = edit.training.diverged or edit.training.out_of_memory
        troubled.append(given_up or (edit.index not in superseded and is_right(probes) is False))
        for measure, shares in already.items():
            asked = [matches(probe.before, probe.answers) for probe in probes if probe.measure == measure]
            if asked:
                shares.append(fmean(asked))  # each request counts once, as in the measures themselves
    given = {measure: fmean(shares) if shares else None for measure, shares in already.items()}
    return Digest(seconds, given, troubled)


def choose(troubled: Sequence[bool], most: int) -> set[int]:
    """The places of at most ``most`` edits: those in trouble first, then others, each evenly spread over the run."""
    bad = [place for place, is_bad in enumerate(troubled) if is_bad]
    good = [place for place, is_bad in enumerate(troubled) if not is_bad]
    chosen = _evenly(bad, most)
    return {*chosen, *_evenly(good, most - len(chosen))}


def _evenly(places: Sequence[int], most: int) -> list[int]:
    count = min(len(places), most)
    return [places[k * len(places) // count] for k in range(count)]
