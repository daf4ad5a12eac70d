"""What a person sees: progress with an estimate while it runs, tables when it is done."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from baft.evaluation.harness import side_by_side
from baft.evaluation.measures import known_before, shares
from baft.evaluation.probes import MEASURES, ProbeResult
from baft.progress import Lines, ProgressWatcher, bars
from baft.requests import numbered
from baft.runs.folder import RunFolder
from baft.runs.records import EditRecord
from baft.runs.run import RunReport

__all__ = ["Console"]

_SHOWN_EDITS = 8

# Requests that are named by their numbers, at most.
_NAMED = 20

# Lines that are laid out together.
_LINES = 200

# In place of a mark, where a later edit wants something else.
_SUPERSEDED = Text("superseded", style="dim")


class Console:
    """Prints for people; with ``quiet`` only progress is shown, on the error stream.

    Args:
        quiet: keep the standard output for JSON.
        silent: show nothing at all.
    """

    def __init__(self, *, quiet: bool = False, silent: bool = False) -> None:
        # What models and data sets say is no markup; ":cat:" in it is no picture, and its numbers aren't special.
        self._console = RichConsole(stderr=quiet, quiet=silent, markup=False, emoji=False, highlight=False)
        self._quiet = quiet

    @contextmanager
    def progress(self) -> Iterator[ProgressWatcher]:
        drawn = self._console.is_terminal and not self._console.is_dumb_terminal
        with bars(self._console) if drawn else nullcontext(Lines(self._console)) as watcher:
            yield watcher
            watcher.finish()

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)  # a path that is broken in two can't be copied

    def report(self, report: RunReport, folder: RunFolder) -> None:
        """The end of a run: some of what was said, the measures, the costs, and where everything is."""
        if self._quiet:
            return
        results = report.results
        self._said(report)
        self.metrics(results["metrics"], f"{results['edits']} edits, {results['protocol']['mode']}")
        if results.get("lm_eval"):
            self._general(side_by_side(results["lm_eval"]))
        timing, memory = results["timing"], results["memory"]
        self._ends(report)
        padding = results["engine"].get("padding")
        self.say(
            f"{timing['seconds_per_edit']:.2f} s an edit ({timing['steps']} steps in all), "
            f"{timing['total_seconds']:.0f} s in all, {memory['bytes_per_edit'] / 1024:.1f} KiB an edit, "
            f"{memory['peak_bytes']['process'] / 2**20:.0f} MiB at most; backend {results['backend']}"
            + ("" if padding is None else f", {padding:.0%} of what it computed was padding")
        )
        self.say(f"Report:  {folder.page}\nFigures: {folder.results}\nTexts:   {folder.edits}")

    def _ends(self, report: RunReport) -> None:
        """How edits ended, and which requests aren't among them."""
        results = report.results
        training, edits = results["training"], results["edits"]
        given_up = {"without a finite loss": training["diverged"], "for want of memory": training["out_of_memory"]}
        all_steps = edits - training["converged"] - sum(given_up.values())
        if all_steps and results["timing"]["steps"]:
            fewer = ", the others fewer: their loss was low enough before" if training["converged"] else ""
            self.say(f"{all_steps} of {edits} edits took all of their steps{fewer}")
        if any(given_up.values()):
            why = ", ".join(f"{number} {reason}" for reason, number in given_up.items() if number)
            self.say(f"Given up ({why}): {_numbers(sorted(report.journal.given_up()))}")
        if results["dropped"]:
            self.say(f"Left out by `baft edits drop`: {_numbers(results['dropped'])}")

    def _said(self, report: RunReport) -> None:
        table = Table(title="What the model says", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("prompt", "before", "wanted", "after", ""):
            table.add_column(column, overflow="fold")
        for record in report.records(_SHOWN_EDITS):
            first = _first(record.final or record.immediate)
            if first is None:
                continue
            mark = _SUPERSEDED if record.index in report.results["superseded"] else _mark(first)
            table.add_row(first.question.prompt, _line(first.before), record.request.target, _line(first.text), mark)
        self._console.print(table)
        more = report.results["edits"] - _SHOWN_EDITS
        if more > 0:
            self.say(f"... and {more} more, in edits.jsonl")

    def metrics(self, moments: dict[str, Any], title: str) -> None:
        """The measures at each moment by generation, whole and by kind; at the last moment also by teacher forcing."""
        shown = [(name, metrics) for name, metrics in moments.items() if metrics]
        last = shown[-1][1]
        table = Table(title=f"Share of probes answered rightly, {title}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("measure", no_wrap=True)
        for name, _ in shown:
            table.add_column(f"generated,\n{name}", justify="right", style="bold", no_wrap=True)
        table.add_column("teacher-\nforced,\nby token", justify="right", no_wrap=True)
        table.add_column("teacher-\nforced,\nwhole answer", justify="right", no_wrap=True)
        for measure in MEASURES:
            generated = [_percent(m[measure] and m[measure]["generation"]) for _, m in shown]
            forced = [_percent(last[measure] and last[measure][family]) for family in ("token", "sequence")]
            table.add_row(measure, *generated, *forced)
            kinds = dict.fromkeys(kind for _, m in shown if m[measure] for kind in m[measure]["kinds"])
            for kind in kinds if len(kinds) > 1 else ():
                values = [m[measure]["kinds"].get(kind) if m[measure] else None for _, m in shown]
                table.add_row(f"  {kind}", *map(_percent, values), style="dim")
        self._console.print(table)
        if known := known_before(last):
            self.say(f"The unedited model gave the old answers to {shares(known)}")

    def _general(self, scores: Sequence[tuple[str, float, float]]) -> None:
        table = Table(title="General ability, by lm-eval", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("task", overflow="fold")
        table.add_column("unedited", justify="right", no_wrap=True)
        table.add_column("edited", justify="right", no_wrap=True, style="bold")
        for name, before, after in scores:
            table.add_row(name, f"{before:.3f}", f"{after:.3f}")
        self._console.print(table)

    def edits(self, records: Iterable[EditRecord], superseded: Collection[int] = ()) -> None:
        """A row for each edit, some hundreds at a time: nobody waits for the last one to see the first.

        Those numbered in ``superseded``, which a later one contradicts, aren't judged at the end.
        """
        records = iter(records)
        for number in itertools.count():
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=number == 0, expand=True)
            table.add_column("number", justify="right", width=6)
            table.add_column("prompt", overflow="fold", ratio=2)
            table.add_column("target", overflow="fold", ratio=1)
            for column, width in (("steps", 5), ("loss", 6), ("at once", 7), ("at the end", 10)):
                table.add_column(column, justify="right", no_wrap=True, width=width)
            for record in itertools.islice(records, _LINES):
                loss = f"{record.curve.losses[-1]:.3f}" if record.curve.losses else ""
                moments = (record.immediate, record.final)
                marks = [_mark(r) if (r := _first(results)) else Text("") for results in moments]
                if record.index in superseded:
                    marks[1] = _SUPERSEDED
                request = record.request
                prompt = Text.assemble(request.prompt, (f"\n{request.id}" if request.id else "", "dim"))
                table.add_row(str(record.index), prompt, request.target, str(record.steps), loss, *marks)
            if number == 0 or table.row_count:
                self._console.print(table)
            if table.row_count < _LINES:
                return

    def edit(self, record: EditRecord, *, superseded: bool = False) -> None:
        """All of one edit, and whether a later one contradicts it."""
        request, curve = record.request, record.curve
        name = numbered(record.index, request, "edit")
        self._console.print(Text(f"{name}: {request.prompt} -> {request.target}", style="bold"))
        endings = {
            "no finite loss after {} steps": curve.diverged,
            "out of memory after {} steps": curve.out_of_memory,
            "a loss that was low enough after {} steps": curve.converged,
        }
        end = next((end for end, is_so in endings.items() if is_so), "all {} steps taken")
        self.say(f"{end.format(curve.steps)}: losses {', '.join(f'{loss:.3f}' for loss in curve.losses)}")
        if consolidation := max(record.steps - curve.steps, 0):
            self.say(f"{consolidation} more steps consolidated all edits so far")
        if superseded:
            self.say("superseded: a later request has its prompt and another target")
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("measure", "prompt", "before", "at once", "", "at the end", ""):
            table.add_column(column, overflow="fold")
        for at_once, last in itertools.zip_longest(record.immediate, record.final):
            asked = (at_once or last).question
            said = [cell for r in (at_once, last) for cell in ((_line(r.text), _mark(r)) if r else ("", Text("")))]
            table.add_row(asked.kind.replace("_", " "), asked.prompt, _line((at_once or last).before), *said)
        self._console.print(table)

    def continuations(self, rows: Sequence[dict[str, str]]) -> None:
        for row in rows:
            self._console.print(Text(row["prompt"], style="bold"))
            self._console.print(Text(f"  before: {_line(row['before'])}"))
            self._console.print(Text(f"  after:  {_line(row['after'])}"))


def _percent(value: float | None) -> str:
    return "no data" if value is None else f"{100 * value:.1f} %"


def _numbers(positions: Sequence[int]) -> str:
    """Requests by their numbers, the first of them if they are many."""
    more = len(positions) - _NAMED
    named = ", ".join(map(str, positions[:_NAMED]))
    return f"request{'s' if len(positions) > 1 else ''} {named}" + (f" and {more} more" if more > 0 else "")


def _line(text: str) -> str:
    return " ".join(text.split())


def _first(results: Sequence[ProbeResult]) -> ProbeResult | None:
    """What the model said to the prompt itself."""
    return next((result for result in results if result.question.measure == "reliability"), None)


def _mark(result: ProbeResult) -> Text:
    return Text("✓", style="green") if result.generation else Text("✗", style="red")
