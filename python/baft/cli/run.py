"""``baft run`` and ``baft demo``: edit, and measure."""

from __future__ import annotations

import json
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from baft.cli.endings import begins_anew, command, edits_are, ending_with
from baft.cli.options import (
    AnswerTokens,
    Backend,
    Config,
    DeviceMap,
    Edits,
    Json,
    Method,
    OptionalDataset,
    OptionalModel,
    OptionalSeed,
    Out,
    Quantise,
    Seed,
    TensorParallel,
)
from baft.console import Console
from baft.datasets.factworld import WORLDS

if TYPE_CHECKING:
    from baft.distributed import World
    from baft.runs.folder import RunFolder
    from baft.runs.run import RunReport
    from baft.runs.start import RunWords

__all__ = ["demo", "run"]

# What a run that goes on may be told anew: of the first three the contents tell whether it is the same run.
_MAY_DIFFER = {"model", "dataset", "held_out", "remember", "log"}


def demo(
    context: typer.Context,
    edits: Annotated[int, typer.Option(help="How many facts to edit, one after another.")] = 20,
    out: Out = Path("runs/demo"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Edit facts of FactWorld, a small invented world, in a small model that knows it: watch, then read the report."""
    if out == Path("runs/demo"):
        out = _next_free(out)
    run(context, out, "factworld", "factworld", "sequential", edits=edits, seed=seed, as_json=as_json)


def _next_free(folder: Path) -> Path:
    """``runs/demo``, or ``runs/demo-2``, ... : the first that isn't there yet."""
    number = 1
    while (numbered := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return numbered


def run(
    context: typer.Context,
    out: Out,
    model: OptionalModel = None,
    dataset: OptionalDataset = None,
    mode: Annotated[Literal["single", "batch", "sequential"] | None, typer.Option()] = None,
    method: Method = "baft",
    edits: Edits = None,
    seed: OptionalSeed = None,
    backend: Backend = None,
    config: Config = None,
    slots: Annotated[
        int | None, typer.Option(help="Single edits trained at a time; chosen by the memory that is free.", min=1)
    ] = None,
    remember: Annotated[
        int | None, typer.Option(help="MiB for what the engine remembers of texts; 2048 by default.", min=1)
    ] = None,
    device_map: DeviceMap = None,
    tensor_parallel: TensorParallel = False,
    quantise: Quantise = None,
    held_out: Annotated[Path | None, typer.Option(help="Texts for general ability, one a line.")] = None,
    measure_every: Annotated[
        int | None,
        typer.Option(help="Measure earlier edits after so many, beside 1, 10, 100, 1000, 2000, 5000, ...", min=1),
    ] = None,
    retained: Annotated[int, typer.Option(help="Earlier edits that are asked about then, at most.", min=1)] = 100,
    final: Annotated[
        int | None, typer.Option(help="Edits that are asked about at the end, at most; all by default.", min=1)
    ] = None,
    answer_tokens: AnswerTokens = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Edits between two checkpoints; by default as often as costs next to nothing.", min=1),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            help="Ask lm-eval's tasks, with commas between, of the unedited and of the edited model; "
            "with --resume '' asks none, if they are no longer to be had."
        ),
    ] = None,
    log: Annotated[Literal["csv", "tensorboard"] | None, typer.Option(help="Also write figures as they come.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, as it was started.")] = False,
    as_json: Json = False,
) -> None:
    """Edit a model with the requests of a data set, and measure before, during and after."""
    from baft.distributed import launched
    from baft.runs.folder import RunFolder
    from baft.runs.inputs import load_config
    from baft.runs.start import RunWords

    said = {"model": model, "dataset": dataset, "held_out": held_out, "lm_eval": lm_eval, "remember": remember}
    anew = {name: value for name, value in said.items() if value is not None}

    def chosen(folder: RunFolder) -> RunWords:
        if resume:
            words = RunWords(**folder.started_with())
            _agree(words, context)
            return words.model_copy(update=anew).located()
        if model is None or dataset is None or mode is None:
            needed = {"--model": model, "--dataset": dataset, "--mode": mode}
            missing = " and ".join(option for option, value in needed.items() if value is None)
            raise ValueError(f"run: expected --model, --dataset and --mode, or --resume; got no {missing}")
        if folder.begun:
            raise ValueError(
                f"out: expected a new or empty folder, got {out}, which has a run in it: --resume goes on with it"
            )
        return RunWords(
            model=model,
            dataset=dataset,
            mode=mode,
            method=method,
            config=load_config(config, seed=seed, backend=backend),
            edits=edits,
            slots=slots,
            remember=remember,
            device_map=device_map,
            tensor_parallel=tensor_parallel,
            quantise=quantise,
            held_out=held_out,
            measure_every=measure_every,
            retained=retained,
            final=final,
            answer_tokens=answer_tokens,
            checkpoint_every=checkpoint_every,
            lm_eval=lm_eval,
            log=log,
        ).located()

    with (
        launched() as world,
        RunFolder(out, begun=resume) if world.writes else nullcontext() as folder,
        ending_with(lambda error: _way_on(folder, error)),
    ):
        words, done = world.first_ones((chosen(folder), folder.done) if folder else (None, False))
        assert words is not None
        if done and not (anew or log):  # something new is looked at, and kept, even so
            _show(folder, as_json)
        else:
            _run(words, folder, log or words.log, as_json, replace(world, one_model=words.tensor_parallel))


def _show(folder: RunFolder | None, as_json: bool) -> None:
    """What a run that is done has found; no file is changed, but that a report is written where there is none."""
    from baft.runs.folder import JOURNAL
    from baft.runs.journal import Journal
    from baft.runs.run import RunReport

    if folder is None:
        return
    console = Console(quiet=as_json)
    console.say(f"The run in {folder.path} is done: nothing is left to do.")
    with closing(Journal(folder.path / JOURNAL, read_only=True)) as journal:
        _end(RunReport(folder.found(), journal), folder, console, as_json, report_anew=not folder.page.exists())


def _end(report: RunReport, folder: RunFolder, console: Console, as_json: bool, *, report_anew: bool = True) -> None:
    """The end of a run: its report, and what a person or a machine reads of it."""
    from baft.report import write_report
    from baft.report.overview import draw_run

    if report_anew:
        draw_run(report.results, folder.picture)
        write_report([folder.path])
    console.report(report, folder)
    if as_json:
        typer.echo(json.dumps(report.results))


def _way_on(folder: RunFolder | None, ended: BaseException) -> str:
    """What is kept of a run that something has ended, and how it is gone on with."""
    from baft.runs.sequential import RequestError

    if folder is None or isinstance(ended, RequestError):  # which says itself how to go on
        return ""
    stopped = isinstance(ended, KeyboardInterrupt)
    try:
        if not folder.begun:
            return f"the run hadn't begun, and {begins_anew(ended)}" if stopped else ""
        edits = len(folder.journal.positions())
        unreported = folder.done and not folder.page.exists()
        kept = "all is kept, but the report isn't written: " if unreported else f"{edits_are(edits)} kept: "
    except (OSError, ValueError):  # of the same cause
        kept = ""
    when = "" if stopped else "once that is mended, "
    return f"{kept}{when}{command('run', '--resume', '--out', folder.path)} goes on from there"


def _is_said(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _agree(words: RunWords, context: typer.Context) -> None:
    """A run that goes on is as it was started; what is said again has to be the same, but for ``_MAY_DIFFER``."""
    from baft.runs.identity import differences
    from baft.runs.inputs import load_config

    said = {name: value for name, value in context.params.items() if _is_said(context, name)}
    started: dict[str, Any] = {**dict(words), "seed": words.config.seed, "backend": words.config.backend}
    if path := said.pop("config", None):
        config = load_config(path, seed=said.get("seed"), backend=said.get("backend"))
        left_open = {"seed", "backend"} - config.model_fields_set
        config = config.model_copy(update={name: getattr(words.config, name) for name in left_open})
        found = differences(words.config.model_dump(mode="json"), config.model_dump(mode="json"))
        if found:
            raise ValueError(f"config: the run was started with another one: {'; '.join(found)}")
    if not said.get("lm_eval", True):
        del said["lm_eval"]
    for name, value in started.items():
        may_differ = name in _MAY_DIFFER and not {value, said.get(name)} & WORLDS.keys()  # which lie nowhere else
        if name in said and not may_differ and said[name] != value:
            first = "none" if value is None else repr(value)
            raise ValueError(f"{name}: the run was started with {first}, got {said[name]!r}")


def _run(words: RunWords, folder: RunFolder | None, log: str | None, as_json: bool, world: World) -> None:
    from baft.runs.logs import open_log
    from baft.runs.run import run_edits
    from baft.runs.start import start

    console = Console(quiet=as_json, silent=not world.writes)
    with console.progress() as watcher:
        started = start(words, folder, on_training=watcher.training, world=world)
        figures = open_log(log, folder.path) if log and folder else None
        try:
            report = run_edits(
                started.editor,
                started.requests,
                words.mode,
                plan=started.plan,
                folder=folder,
                watcher=watcher,
                log=figures,
                description=started.description,
                world=world,
            )
        finally:
            if figures:
                figures.close()
    if folder:
        _end(report, folder, console, as_json)
