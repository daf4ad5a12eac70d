"""How many edits a second? Against editing as one would write it first, and with each part of ours switched off.

    python bench/edit_throughput.py                     FactWorld: single, sequential and batched edits
    python bench/edit_throughput.py --slots 1 2 4 8 16  the curve over how many single edits share a pass
    python bench/edit_throughput.py --model cf1200 --dataset "counterfact_3k.json[:1200]"  a testbed of `baft testbed`
    python bench/edit_throughput.py --shape llama-2-7b  real shapes with random weights, on a GPU

Three tasks. *edit*: the loss of the request alone, at each step one text. *edit + locality*: unrelated texts more at
each step, 48 or of a single edit 16, whose predictions shall stay. *by default*: some of these are what the model says
of the subject, which it has to write first, and the edit is retold in its words. The last table has the operations of a
step's matrix products, and how long these take alone. Variants take turns, and seconds are medians over rounds. "Plain"
is bench/plain_editing.py; "times plain" compares steps, of a batch the plain one's first few. MiB is what editing takes
at most beyond the model, in ours all that it keeps of texts. Results go to bench/results/ as JSON, Markdown and a
picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from contenders import TASKS, Subject, Timed, edit_ours, edit_plainly, now, plain_editor, plain_text, removed
from plain_editing import Text, generate_one_by_one, generate_with_cache
from products import recorded_products
from report import RESULTS, called, markdown, provenance
from rich.console import Console
from shapes import SHAPES, build
from stopwatch import SECTIONS, WRITING, Stopwatch
from terminal import plain_console, show
from throughput_pictures import draw_curve, draw_parts

from baft import BaftEditor
from baft.editing import EditOutcome, Mode
from baft.engine.continuations import Continuations
from baft.engine.options import EngineOptions
from baft.engine.sets import ParameterSets
from baft.evaluation.probes import questions
from baft.runs.inputs import load_assignment, load_model
from baft_kernels import BaftIntervention, GroupedBaftIntervention

MODES: tuple[Mode, ...] = ("single", "sequential", "batch")
OURS = "ours"
_NEW_TOKENS = 12  # of an answer
Generate = Callable[[Any, Sequence[Text], int, int | None], list[Text]]


class Part(NamedTuple):
    """What one of our variants does otherwise than ours by default."""

    options: EngineOptions = EngineOptions()
    backend: str = "auto"
    modes: Sequence[Mode] = MODES
    on_gpus_only: bool = False


PARTS = {
    OURS: Part(),
    "- edits abreast": Part(EngineOptions(slots=1), modes=("single",)),
    "- replay": Part(EngineOptions(replay=False)),
    "- head where needed": Part(EngineOptions(head_where_needed=False)),
    "- texts side by side": Part(EngineOptions(side_by_side=False)),
    "+ Triton kernels": Part(backend="triton", on_gpus_only=True),
    "+ CUDA kernels": Part(backend="cuda", on_gpus_only=True),
    "+ CUDA graphs": Part(EngineOptions(graphs=True), on_gpus_only=True),
    "+ CUDA kernels and graphs": Part(EngineOptions(graphs=True), "cuda", on_gpus_only=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="factworld")
    parser.add_argument("--dataset", default="factworld")
    parser.add_argument("--shape", choices=SHAPES, help="a real model's shape, with random weights")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=PARTS, default=list(PARTS), help="of ours")
    parser.add_argument("--requests", type=int, default=32, help="edited by ours; a sequence: twice --plain-requests")
    parser.add_argument("--plain-requests", type=int, default=4, help="edited by the plain one; its rounds of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slots", type=int, nargs="+", help="only this: single edits with so many in a pass")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = plain_console(150)
    options.out.mkdir(parents=True, exist_ok=True)
    subject = load(options)
    if options.slots:
        report_slots(subject, options, console)
    else:
        report_parts(subject, options, console)


def load(options: argparse.Namespace) -> Subject:
    if options.shape:
        return Subject(options.shape, *build(options.shape, options.requests))
    model, tokenizer = load_model(options.model)
    assignment = load_assignment(options.dataset, options.requests, seed=0)
    return Subject(called(options.dataset), model, tokenizer, assignment.requests, assignment.unrelated, {})


# -- the table ---------------------------------------------------------------------------------------------------------


def report_parts(subject: Subject, options: argparse.Namespace, console: Console) -> None:
    rows = [
        ["mode", "task", "variant", "s/edit", "ms/step", "times plain", "MiB", "padding", "reliability", "locality"]
    ]
    raw: list[dict[str, Any]] = []
    about = {**provenance(subject.model.device), "subject": subject.name, "overrides": subject.overrides}
    path = options.out / f"edit_throughput_{subject.name}_{subject.model.device.type}"
    shares = [["task", "variant", *SECTIONS]]
    for mode, task in itertools.product(options.modes, options.tasks):
        for line in compare(subject, mode, task, options, console):
            raw.append(line)
            rows.append(
                [
                    mode,
                    task,
                    line["variant"],
                    _figure(line["seconds_per_edit"], 4),
                    f"{line['seconds_per_step'] * 1e3:.2f}",
                    f"{line['times_plain']:.2f}",
                    _figure(line["peak_mib"], 0),
                    *(_figure(line[name]) for name in ("padding", "reliability", "locality")),
                ]
            )
        save(raw, about, path)  # in case that there is no time for the rest
    for task in options.tasks:
        for variant, seconds in sections(subject, task, options).items():
            raw.append({"sections": variant, "task": task, "seconds": seconds})
            total = sum(seconds.values())
            shares.append([task, variant, *(f"{seconds.get(name, 0.0) / total:.0%}" for name in SECTIONS)])
    bound = [["task", "variant", "GFLOP a step", "ms of the products alone", "ms a step, single edits", "share"]]
    for task in options.tasks:
        steps = {r["variant"]: r["seconds_per_step"] for r in raw if (r.get("mode"), r.get("task")) == ("single", task)}
        for variant, found in product_bound(subject, task, options).items():
            raw.append({"products": variant, "task": task, **found})
            whole = steps.get(variant)
            bound.append(
                [
                    task,
                    variant,
                    f"{found['operations'] / 1e9:.2f}",
                    f"{found['seconds'] * 1e3:.1f}",
                    "" if whole is None else f"{whole * 1e3:.1f}",
                    "" if whole is None else f"{found['seconds'] / whole:.0%}",
                ]
            )
    asked = ""
    if not subject.overrides:
        answers = compare_asking(subject, options)
        raw.append({"asking": answers})
        asked = (
            f"{answers['questions']} questions of edited models: {answers['plain'] * 1e3:.1f} ms each one by one, "
            f"{answers['cached'] * 1e3:.1f} ms with a KV cache; {answers['ours'] * 1e3:.2f} ms side by side, "
            f"{answers['plain'] / answers['ours']:.1f} and {answers['cached'] / answers['ours']:.1f} times as fast; "
            f"{answers['same']:.0%} of the answers are the same text.\n"
        )
    show(rows, console)
    show(shares, console)
    show(bound, console)
    console.print(asked, end="")
    save(raw, about, path)
    Path(f"{path}.md").write_text("\n".join([*(markdown(table, about) for table in (rows, shares, bound)), asked]))
    draw_parts(raw, Path(f"{path}.png"), subject.name)
    console.print(f"Saved: {path}.md and .png")


def compare(
    subject: Subject, mode: Mode, task: str, options: argparse.Namespace, console: Console
) -> Iterator[dict[str, Any]]:
    """Every variant's figures, the plain one's first."""
    # Of a sequence both make the same edits: what they rehearse grows with it.
    count = 2 * options.plain_requests if mode == "sequential" else options.requests
    plain_count = options.plain_requests if mode == "single" else count
    variants: dict[str, Callable[[], Timed]] = {
        "plain": lambda: edit_plainly(subject, mode, task, plain_count, rounds=options.plain_requests)
    }
    for name in options.variants:
        part = PARTS[name]
        if mode in part.modes and (subject.model.device.type == "cuda" or not part.on_gpus_only):
            variants[name] = lambda part=part: edit_ours(subject, mode, task, count, part.options, part.backend)
    timed: dict[str, list[Timed]] = {name: [] for name in variants}
    for round_ in range(options.rounds):
        for name, run in variants.items():
            timed[name].append(run())
            console.print(f"{mode}, {task}, round {round_ + 1}, {name}: {timed[name][-1].seconds:.1f} s", style="dim")
    # By the step: one takes more of them than another.
    plain = median(t.seconds / t.steps for t in timed["plain"])
    for name, runs in timed.items():
        step = median(t.seconds / t.steps for t in runs)
        yield {
            "mode": mode,
            "task": task,
            "variant": name,
            "seconds_per_edit": None if (edits := runs[0].edits) is None else median(t.seconds for t in runs) / edits,
            "seconds_per_step": step,
            "times_plain": plain / step,
            "peak_mib": _peak_mib(runs),
            "slots": runs[0].slots,
            "padding": runs[0].padding,
            **(runs[0].quality or {"reliability": None, "locality": None}),
            "rounds": [vars(t) for t in runs],
        }


# -- where the time goes -----------------------------------------------------------------------------------------------


def sections(subject: Subject, task: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds by section, of a few single edits, plain and ours."""
    found = {}
    watch = Stopwatch(subject.model.device)
    writing = [(Continuations, name, WRITING) for name in ("of", "write")]
    with plain_editor(subject, task) as (plain, draw_for):
        blocks, first = plain.blocks, min(plain.interventions)
        calls: list[tuple[Any, str, str]] = [*writing, (type(plain.optimizer), "step", "optimiser")]
        calls += [(i, "forward", "interventions") for i in plain.interventions.values()]
        with watch.on(subject.model, blocks, first, calls):
            plain.edit(draw_for([0]), alone=True)
        found["plain"] = dict(watch.seconds)
    editor = subject.editor(task, EngineOptions())
    with removed(editor):
        list(editor.edit_each(subject.requests[:1]))
        editor._begin().surroundings.forget()
        calls = [(cls, "edit", "interventions") for cls in (BaftIntervention, GroupedBaftIntervention)]
        calls += writing
        calls.append((ParameterSets, "update", "optimiser"))
        with watch.on(subject.model, blocks, first, calls):
            list(editor.edit_each(subject.requests[: options.requests]))
        found[OURS] = dict(watch.seconds)
    return found


# -- what matrix products alone take -----------------------------------------------------------------------------------


def product_bound(subject: Subject, task: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of a step of a single edit, plain and ours: operations of its matrix products, and seconds of these alone.

    What ours does once for each text, however many steps there are, is left out, as it was done by an edit before.
    """
    found = {}
    with plain_editor(subject, task) as (plain, draw_for):
        plain.edit(draw_for([0]), alone=True)
        plain.restart()
        with recorded_products() as products:
            steps = plain.edit(draw_for([0]), alone=True)[0]
        found["plain"] = {"operations": products.operations / steps, "seconds": products.seconds() / steps}
    editor = subject.editor(task, EngineOptions())
    with removed(editor):
        requests = subject.requests[: options.requests]
        list(editor.edit_each(requests))
        with recorded_products() as products:
            taken = sum(outcome.curve.steps for outcome in editor.edit_each(requests))
        found[OURS] = {"operations": products.operations / taken, "seconds": products.seconds() / taken}
    return found


# -- asking ------------------------------------------------------------------------------------------------------------


def compare_asking(subject: Subject, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for each question that measures single edits, in three ways.

    *plain*: each prompt by itself, without a KV cache; *cached*: with one, by transformers; *ours*: all side by side.
    """
    editor = subject.editor("edit", EngineOptions())
    with removed(editor):
        outcomes = sorted(editor.edit_each(subject.requests), key=lambda outcome: outcome.index)
        asked = [(o, question.prompt) for o in outcomes for question in questions(o.request)]
        before = editor.state()
        texts, plain = ask_one_by_one(subject, editor, asked, generate_one_by_one)
        _, cached = ask_one_by_one(subject, editor, asked, generate_with_cache)
        editor.load_state(before)
        bank = editor.bank([outcome.state for outcome in outcomes])
        seconds = []
        for _ in range(options.rounds):
            start = now(subject)
            together = editor.generate(
                [prompt for _, prompt in asked],
                adapters=bank,
                adapter_ids=[outcome.index for outcome, _ in asked],
                max_new_tokens=_NEW_TOKENS,
                batch_size=128,
            )
            seconds.append((now(subject) - start) / len(asked))
    same = sum(a == b for a, b in zip(texts, together, strict=True)) / len(asked)
    return {"questions": len(asked), "plain": plain, "cached": cached, "ours": median(seconds), "same": same}


def ask_one_by_one(
    subject: Subject, editor: BaftEditor, asked: Sequence[tuple[EditOutcome, str]], generate: Generate
) -> tuple[list[str], float]:
    """The answer to each prompt, under its own edit, and the seconds that each took."""
    texts, current = [], None
    start = now(subject)
    for outcome, prompt in asked:
        if current is not outcome:
            editor.load_state(outcome.state)
            current = outcome
        text = generate(
            subject.model, [plain_text(editor.encoder.prompt(prompt))], _NEW_TOKENS, subject.tokenizer.eos_token_id
        )[0]
        texts.append(subject.tokenizer.decode(text.ids[text.prompt_length :], skip_special_tokens=True))
    return texts, (now(subject) - start) / len(asked)


# -- the curve over slots ----------------------------------------------------------------------------------------------


def report_slots(subject: Subject, options: argparse.Namespace, console: Console) -> None:
    rows, raw = [["task", "edits abreast", "s/edit", "ms/step of an edit", "MiB"]], []
    about = {**provenance(subject.model.device), "subject": subject.name}
    path = options.out / f"edit_throughput_slots_{subject.name}_{subject.model.device.type}"
    for task in options.tasks:
        for slots in options.slots:
            runs = [
                edit_ours(subject, "single", task, options.requests, EngineOptions(slots=slots))
                for _ in range(options.rounds)
            ]
            asked, slots = slots, min(t.slots for t in runs if t.slots)  # fewer, where memory ran out
            seconds = median(t.seconds for t in runs) / options.requests
            step = median(t.seconds / t.steps for t in runs)
            peak = _peak_mib(runs)
            line = {"task": task, "asked": asked, "slots": slots, "seconds_per_edit": seconds, "peak_mib": peak}
            raw.append({**line, "rounds": [vars(t) for t in runs]})
            rows.append([task, str(slots), f"{seconds:.4f}", f"{step * 1e3:.2f}", _figure(peak, 0)])
            save(raw, about, path)
            console.print(f"{task}, {slots} abreast: {seconds:.4f} s an edit", style="dim")
    show(rows, console)
    Path(f"{path}.md").write_text(markdown(rows, about))
    draw_curve(raw, Path(f"{path}.png"), subject.name)
    console.print(f"Saved: {path}.md")


# -- small things ------------------------------------------------------------------------------------------------------


def save(raw: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    Path(f"{path}.json").write_text(json.dumps({**about, "rows": raw}, indent=1) + "\n")


def _peak_mib(runs: Sequence[Timed]) -> float | None:
    peaks = [t.peak_bytes for t in runs if t.peak_bytes is not None]
    return max(peaks) / 2**20 if peaks else None


def _figure(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
