"""An editing run from beginning to end: record the base, edit, measure, write down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from baft.distributed import ALONE, World
from baft.editing import Editor, LooksAhead, Mode
from baft.evaluation.measures import Evaluator
from baft.evaluation.probes import old_answers
from baft.evaluation.room import check_room, tokens_needed
from baft.requests import EditRequest
from baft.runs.at_once import edit_in_one_batch, edit_singly
from baft.runs.conflicts import can_hold, conflicts, in_words
from baft.runs.context import RunContext, in_groups
from baft.runs.folder import RunFolder
from baft.runs.journal import Journal
from baft.runs.logs import MetricsLog
from baft.runs.records import EditRecord
from baft.runs.results import describe, results
from baft.runs.retention import Retention, sample
from baft.runs.sequential import SequentialRun
from baft.runs.watcher import Nobody, Watcher

__all__ = ["RunPlan", "RunReport", "open_context", "run_edits"]

# Prompts of several requests that are named one by one, at most.
_NAMED = 20


@dataclass(frozen=True)
class RunPlan:
    """What is done beside the editing.

    Attributes:
        held_out: texts that no training looks at, for general ability by perplexity.
        measure_every: edits between two measurements of earlier ones, beside 1, 10, 100, 1000, 2000, 5000, ...
        retained: earlier edits that are asked about then, at most.
        final: edits that are asked about at the end, at most; None asks about all.
        answer_tokens: of a generated answer, at most; None is what the requests need (``tokens_needed``).
        tasks: of lm-eval, for general ability (``baft.evaluation.harness.check_tasks``): of the unedited model before
            the first edit, and of the edited one at the end. Single edits have no such end, and aren't asked.
        checkpoint_every: edits between two checkpoints; None writes them as often as costs next to nothing. After the
            last edit and after each settling round there is one in any case.
    """

    held_out: Sequence[str] = ()
    measure_every: int | None = None
    retained: int = 100
    final: int | None = None
    answer_tokens: int | None = None
    tasks: Sequence[str] = ()
    checkpoint_every: int | None = None


@dataclass(frozen=True)
class RunReport:
    """What a run gives: the content of ``results.json``, and the journal that has each edit's record."""

    results: dict[str, Any]
    journal: Journal

    def records(self, limit: int | None = None) -> Iterator[EditRecord]:
        """Each edit's record, in order; at most ``limit`` of them."""
        return self.journal.records(limit=limit)


def run_edits(
    editor: Editor,
    requests: Sequence[EditRequest],
    mode: Mode,
    *,
    plan: RunPlan | None = None,
    folder: RunFolder | None = None,
    watcher: Watcher | None = None,
    log: MetricsLog | None = None,
    description: dict[str, Any] | None = None,
    world: World = ALONE,
) -> RunReport:
    """Edit ``requests`` and measure them; a run that ``folder`` has the beginning of goes on where it broke off.

    *Immediate* measures each request right after its own edit, with what was edited before still on; *final* measures
    all of them after the last. A batch has no state in between, so its immediate measures are the final ones; single
    edits have no state that holds them all, so their final measures are null. A sequential run also measures
    *retention*: a fixed sample of the requests so far after 1, 10, 100, 1000, 2000, 5000, ... edits.

    Args:
        plan: what is done beside the editing.
        folder: where to write; None writes nothing.
        log: gets the figures of a sequential run as they come.
        description: what else ``results.json`` shall say, at its top (model, data set, ...).
        world: processes that share the run, each with an editor that knows of it; the folder is the first one's.

    Raises:
        ValueError: for more processes than requests, or a question that the model has no room for (``check_room``).
        RuntimeError: if losses aren't finite any more, or memory runs out; for a sequential run see ``RequestError``.
        OSError: if something can't be written; what was written before is kept.
    """
    context = open_context(
        editor,
        requests,
        mode,
        plan=plan,
        folder=folder,
        watcher=watcher,
        log=log,
        world=world,
    )
    try:
        return _run(context, mode, folder, description)
    finally:
        context.close()


def _run(context: RunContext, mode: Mode, folder: RunFolder | None, description: dict[str, Any] | None) -> RunReport:
    journal, editor = context.journal, context.editor
    context.begin_session()
    known = describe(context, mode)
    journal.describe({**(description or {}), **known})
    context.watcher.say(_texts_in_words(known["protocol"]))
    for conflict in context.conflicts[:_NAMED]:
        context.say(in_words(conflict))
    more = len(context.conflicts) - _NAMED
    if more > 0:
        context.say(f"{more} more prompts are asked for several times: results.json lists them under conflicts")
    true_already = sum(bool(request.ground_truth) and not old_answers(request) for request in context.requests)
    if true_already:
        context.say(f"{true_already} requests have a target that was true already: nobody says what it replaces")
    if mode == "sequential":
        run = SequentialRun(context)
        run.restore()
        run.edit()
    elif mode == "batch":
        edit_in_one_batch(context)
    else:
        edit_singly(context)
    if mode != "single":
        _measure(context)
        if folder:  # before lm-eval is asked, which may fail for reasons of its own
            editor.save_pretrained(folder.adapter)
    found = results(context, mode)
    if folder:
        folder.finish(journal.records(), found)
    return RunReport(found, journal)


def _measure(context: RunContext) -> None:
    """Ask about what was edited, with all edits on; what was asked already isn't asked again."""
    wanted = {*(done := context.journal.positions())}
    if context.final is not None:
        wanted = {*sample(can_hold(context.conflicts, done, context.journal.given_up()), context.final)}
    left = [position for position in context.journal.unmeasured("final") if position in wanted]
    context.watcher.stage("measuring all edits at the end", len(wanted), len(wanted) - len(left))
    for group in in_groups(left):
        measured = context.evaluator.measure(context.at(group))
        context.journal.add_measures("final", dict(zip(group, measured, strict=True)))
        context.watcher.advance(units=len(group))


def _texts_in_words(protocol: dict[str, Any]) -> str:
    unrelated, held_out = protocol["unrelated_texts"], protocol["held_out_texts"]
    left_alone = (
        f"{unrelated['given']} unrelated texts are given, and {unrelated['self_written']} the model's own; "
        if unrelated
        else ""
    )
    general = "perplexity is measured on them" if held_out else "perplexity isn't measured"
    return f"{left_alone}{held_out} texts are held out: {general}"


def open_context(
    editor: Editor,
    requests: Sequence[EditRequest],
    mode: Mode = "sequential",
    *,
    plan: RunPlan | None = None,
    folder: RunFolder | None = None,
    watcher: Watcher | None = None,
    log: MetricsLog | None = None,
    world: World = ALONE,
) -> RunContext:
    """What the parts of a run share; the arguments are those of ``run_edits``."""
    if world.parts > len(requests):
        raise ValueError(f"processes: expected at most {len(requests)}, as many as requests, got {world.parts}")
    plan = plan or RunPlan()
    answer_tokens = plan.answer_tokens or tokens_needed(editor.encoder, requests)
    check_room(editor, requests, answer_tokens, fluency=mode != "single")
    journal = Journal.copy_of(folder.journal if folder else Journal(None), world)
    evaluator = Evaluator(
        editor, max_new_tokens=answer_tokens, base=journal, world=world, say=lambda text: context.say(text)
    )
    if isinstance(editor, LooksAhead):
        editor.keep_written_in(journal)
    context = RunContext(
        editor=editor,
        requests=requests,
        journal=journal,
        evaluator=evaluator,
        retention=Retention(evaluator, plan.held_out, plan.retained, plan.measure_every),
        checkpoints=folder.checkpoints(plan.checkpoint_every) if folder else None,
        watcher=watcher or Nobody(),
        log=log,
        final=plan.final,
        tasks=plan.tasks if mode != "single" else (),
        conflicts=conflicts(requests) if mode != "single" else [],
        world=world,
    )
    return context
