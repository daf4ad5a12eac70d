"""What a report reads of a run: ``results.json`` for the figures, and each edit's line of ``edits.jsonl``.

A run that isn't finished has neither yet; its journal tells the same, as far as it has come. Only here does the report
know files. Fields that older or unfinished runs lack have a default, which the page shows as "no data"; everything else
has to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from baft.evaluation.probes import Measure
from baft.runs.folder import EDITS, JOURNAL, RESULTS
from baft.runs.journal import Journal
from baft.runs.results import results_so_far

__all__ = ["EditLine", "Metrics", "ProbeLine", "Results", "RetentionPoint", "RunSource", "Scores", "read_run"]


class _Read(BaseModel):
    """What is read may hold more than a report needs."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Scores(_Read):
    """One measure: by generation, teacher-forced by token and by whole answer, and by kind of probe.

    ``known`` is the share of its questions that the unedited model answered as was right before; older runs don't say.
    """

    generation: float | None
    token: float | None
    sequence: float | None
    known: float | None = None
    kinds: dict[str, float | None] = {}


class Metrics(_Read):
    """The four measures at one moment; None is a measure that no request has a probe for."""

    reliability: Scores | None
    generality: Scores | None
    locality: Scores | None
    portability: Scores | None

    def scores(self, measure: Measure) -> Scores | None:
        found: Scores | None = getattr(self, measure)
        return found

    def generation(self, measure: Measure) -> float | None:
        scores = self.scores(measure)
        return scores.generation if scores else None


class _Memory(_Read):
    process: int | None = None
    gpu: int | None = None
    remembered: int | None = None


class _General(_Read):
    perplexity: float | None
    before: float | None

    @property
    def ratio(self) -> float | None:
        """Perplexity as a multiple of the unedited model's; None where one of them isn't finite."""
        return self.perplexity / self.before if self.perplexity and self.before else None


class RetentionPoint(Metrics):
    """The measures of the edits so far, after ``edits`` of them, and what the run had cost by then."""

    edits: int
    settled: int = 0
    general: _General | None = None
    gates: dict[str, list[float]] | None = None
    seconds: float | None = None
    memory: _Memory | None = None


class _Moments(_Read):
    immediate: Metrics
    final: Metrics | None


class _PeakMemory(_Read):
    peak_bytes: _Memory = _Memory()
    bytes_per_edit: float | None = None


class _Timing(_Read):
    seconds_per_edit: float | None = None
    total_seconds: float | None = None
    settling_seconds: float = 0.0


class _Round(_Read):
    diverged: bool = False


class Results(_Read):
    """The content of ``results.json``.

    Attributes:
        requests: how many edits it shall be in the end, where that is known.
        finished: whether it has come to its end.
        superseded: the numbers of edits that a later one contradicts, so that they can't hold at the end.
        dropped: the numbers of requests that were left out.
        lm_eval: scores of lm-eval's tasks, ``before`` the first edit and ``after`` the last.
    """

    finished: bool = True
    requests: int | None = None
    method: str | None = None
    model: str = "a model"
    dataset: str = "a data set"
    protocol: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str | None]
    backend: str | None = None
    seed: int
    edits: int
    metrics: _Moments
    retention: list[RetentionPoint]
    timing: _Timing
    settling: list[_Round] = []
    superseded: frozenset[int] = frozenset()
    dropped: tuple[int, ...] = ()
    lm_eval: dict[str, dict[str, float]] | None = None
    memory: _PeakMemory = _PeakMemory()

    @property
    def mode(self) -> str:
        return str(self.protocol["mode"])

    @property
    def last(self) -> Metrics:
        """The measures at the end; of single edits, which have none together, those right after each."""
        return self.metrics.final or self.metrics.immediate

    @property
    def together(self) -> Metrics:
        """What to hold against another run: the measures at the end, or those of the last look back before it."""
        return self.last if self.finished or not self.retention else self.retention[-1]


class ProbeLine(_Read):
    """What the model said to one question; ``generation`` is whether that was right."""

    measure: Measure
    kind: str
    prompt: str
    answers: tuple[str, ...]
    text: str
    before: str
    generation: bool


class _Training(_Read):
    steps: int
    converged: bool
    diverged: bool
    out_of_memory: bool = False
    seconds: float
    losses: tuple[float | None, ...]


class EditLine(_Read):
    """One edit of a run."""

    index: int
    id: str | None = None
    prompt: str
    target: str
    training: _Training
    immediate: list[ProbeLine]
    final: list[ProbeLine]


@dataclass(frozen=True)
class RunSource:
    """All that a report needs of a run.

    Attributes:
        name: what tells the run from others; its folder.
        results: its figures.
        edits: gives its edits in order, from the first, each time it is called: there may be more than fit in memory.
    """

    name: str
    results: Results
    edits: Callable[[], Iterator[EditLine]]


def read_run(folder: str | Path) -> RunSource:
    """Read the folder of a run; of one that isn't finished, what there is by now.

    Raises:
        ValueError: if it is none, if it has no edit yet, or if its results are of another format.
    """
    folder = Path(folder)
    results, edits = folder / RESULTS, folder / EDITS
    if not results.is_file() and (folder / JOURNAL).is_file():
        return _read_journal(folder)
    if not folder.is_dir():
        raise ValueError(f"report: expected the folder of a run, got {folder}, where there is no folder")
    for path in (results, edits):
        if not path.is_file():
            raise ValueError(f"report: expected the folder of a run, got {folder}, which has no {path.name}")
    try:
        figures = Results.model_validate_json(results.read_bytes())
    except ValidationError as error:
        raise ValueError(f"report: expected the results of a run in {results}, {_first(error)}") from error
    return RunSource(str(folder), figures, lambda: _lines(edits))


def _read_journal(folder: Path) -> RunSource:
    """An unfinished run, as it is now; if it is going on, what it adds later isn't read."""
    journal = Journal.as_it_is(folder / JOURNAL)
    found = results_so_far(journal)
    # Measures at the end have begun, perhaps, and would be of a part of the edits.
    found["metrics"]["final"] = None

    def edits() -> Iterator[EditLine]:
        return (EditLine.model_validate({**record.as_json(), "final": []}) for record in journal.records())

    return RunSource(str(folder), Results.model_validate({**found, "finished": False}), edits)


def _lines(path: Path) -> Iterator[EditLine]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield EditLine.model_validate_json(line)
            except ValidationError as error:
                raise ValueError(f"report: expected an edit in line {number} of {path}, {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"got one with {'.'.join(map(str, first['loc'])) or 'its text'}: {first['msg']}"
