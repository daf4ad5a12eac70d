"""The command line: reads options, calls the library, prints.

Exit status: 0 done, 1 failed while running, 2 the input can't be used.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from baft import cli_edits
from baft.console import Console

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Edit facts in language models with BaFT.",
)

app.add_typer(cli_edits.app, name="edits")

Model = Annotated[str, typer.Option(help="A folder, a Hugging Face name, or factworld.")]
Dataset = Annotated[str, typer.Option(help="A benchmark file, or factworld.")]
Adapter = Annotated[Path, typer.Option(help="A folder that save_pretrained or a run wrote.")]
Edits = Annotated[int | None, typer.Option(help="How many requests to edit; all by default.")]
Seed = Annotated[int, typer.Option(help="Of the choice of requests, of the bases, and of training.")]
Backend = Annotated[str | None, typer.Option(help="auto, reference, cpu, triton or cuda.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file with fields of BaftConfig.")]
Out = Annotated[Path, typer.Option(help="A new or empty folder for everything that the run writes.")]
Method = Annotated[
    Literal["baft", "loreft", "lora", "ft", "in-context", "none"],
    typer.Option(help="What edits: BaFT, or a baseline with its losses and its schedule."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command()
def demo(
    edits: Annotated[int, typer.Option(help="How many facts to edit, one after another.")] = 20,
    out: Out = Path("runs/demo"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Edit facts of FactWorld, a small invented world, in a small model that knows it: watch, then read the report."""
    if out == Path("runs/demo"):
        out = _next_free(out)
    run(out, "factworld", "factworld", "sequential", edits=edits, seed=seed, as_json=as_json)


def _next_free(folder: Path) -> Path:
    """``runs/demo``, or ``runs/demo-2``, ... : the first that isn't there yet."""
    number = 1
    while (numbered := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return numbered


@app.command()
def run(
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="A folder, a Hugging Face name, factworld, or factworld-large.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="A benchmark file, factworld, or factworld-large.")] = None,
    mode: Annotated[Literal["single", "batch", "sequential"] | None, typer.Option()] = None,
    method: Annotated[
        Literal["baft", "loreft", "lora", "ft", "in-context", "none"],
        typer.Option(help="What edits: BaFT, or a baseline."),
    ] = "baft",
    edits: Edits = None,
    seed: Seed = 0,
    backend: Backend = None,
    config: Config = None,
    slots: Annotated[
        int | None, typer.Option(help="Single edits trained at a time; chosen by the memory that is free.", min=1)
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help="Texts for general ability, one a line.")] = None,
    measure_every: Annotated[
        int | None, typer.Option(help="Measure earlier edits after so many, beside 1, 10, 100, ...", min=1)
    ] = None,
    retained: Annotated[int, typer.Option(help="Earlier edits that are asked about then, at most.", min=1)] = 100,
    final: Annotated[
        int | None, typer.Option(help="Edits that are asked about at the end, at most; all by default.", min=1)
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Edits between two checkpoints; by default as often as costs next to nothing.", min=1),
    ] = None,
    log: Annotated[Literal["csv", "tensorboard"] | None, typer.Option(help="Also write figures as they come.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, as it was started.")] = False,
    as_json: Json = False,
) -> None:
    """Edit a model with the requests of a data set, and measure before, during and after."""
    from baft.runs.folder import RunFolder
    from baft.runs.inputs import load_config
    from baft.runs.start import RunWords

    with RunFolder(out) as folder:
        if resume:
            words = RunWords(**folder.started_with())
            _agree(words, model=model, dataset=dataset, mode=mode, edits=edits)
        elif model is None or dataset is None or mode is None:
            raise ValueError(
                "run: expected --model, --dataset and --mode, or --resume; got " + _given(model, dataset, mode)
            )
        elif folder.begun:
            raise ValueError(
                f"out: expected a new or empty folder, got {out}, which has a run in it: --resume goes on with it"
            )
        else:
            words = RunWords(
                model=model,
                dataset=dataset,
                mode=mode,
                method=method,
                config=load_config(config, seed=seed, backend=backend),
                edits=edits,
                slots=slots,
                held_out=held_out,
                measure_every=measure_every,
                retained=retained,
                final=final,
                checkpoint_every=checkpoint_every,
            )
        _run(words, folder, log, as_json)


def _given(*words: str | None) -> str:
    return ", ".join(word for word in words if word) or "none"


def _agree(words: Any, **given: Any) -> None:
    """A run that goes on is as it was started; what is said again has to be the same."""
    for name, value in given.items():
        if value is not None and value != getattr(words, name):
            raise ValueError(f"{name}: the run was started with {getattr(words, name)!r}, got {value!r}")


def _run(words: Any, folder: Any, log: str | None, as_json: bool) -> None:
    from baft.report.overview import draw_run
    from baft.runs.logs import open_log
    from baft.runs.run import run_edits
    from baft.runs.start import start

    console = Console(quiet=as_json)
    with console.progress() as watcher:
        started = start(words, folder, on_training=watcher.training)
        report = run_edits(
            started.editor,
            started.requests,
            words.mode,
            plan=started.plan,
            folder=folder,
            watcher=watcher,
            log=open_log(log, folder.path) if log else None,
            description=started.description,
        )
    draw_run(report.results, folder.picture)
    console.report(report, folder)
    if as_json:
        typer.echo(json.dumps(report.results))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of finished runs.")],
    out: Annotated[
        Path | None, typer.Option(help="The page: by default report.html, in the folder of a single run, or here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show runs as a page of curves, pictures and generated texts, several of them side by side."""
    from baft.report import write_report

    written = write_report(folders, out)
    if as_json:
        typer.echo(json.dumps({"page": str(written.page), "pictures": [str(path) for path in written.pictures]}))
    else:
        Console().say("\n".join(f"{path}" for path in (written.page, *written.pictures)))


@app.command("eval")
def evaluate(
    model: Model,
    adapter: Adapter,
    dataset: Annotated[str | None, typer.Option(help="Measure these requests instead of the adapter's own.")] = None,
    edits: Edits = None,
    as_json: Json = False,
) -> None:
    """Measure a saved adapter: on the requests that were edited, or on those of a data set."""
    from baft.datasets import load_dataset
    from baft.editor import BaftEditor
    from baft.evaluation.measures import Evaluator, summarise
    from baft.runs.inputs import load_model
    from baft.runs.watcher import watched

    console = Console(quiet=as_json)
    with console.progress() as watcher:
        loaded, tokenizer = load_model(model, on_training=watcher.training)
        editor = BaftEditor.from_pretrained(loaded, tokenizer, adapter)
        requests = (load_dataset(dataset) if dataset else editor.edits)[:edits]
        evaluator = Evaluator(editor)
        metrics = summarise(evaluator.measure(requests, watched(watcher, "measuring")))
    if as_json:
        typer.echo(json.dumps({"protocol": evaluator.protocol, "requests": len(requests), "metrics": metrics}))
    else:
        console.metrics({"now": metrics}, f"{len(requests)} requests")


@app.command()
def generate(
    model: Model,
    adapter: Adapter,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    as_json: Json = False,
) -> None:
    """Continue prompts with the unedited and with the edited model."""
    from baft.editor import BaftEditor
    from baft.runs.inputs import load_model

    console = Console(quiet=as_json)
    with console.progress() as watcher:
        loaded, tokenizer = load_model(model, on_training=watcher.training)
        editor = BaftEditor.from_pretrained(loaded, tokenizer, adapter)
        after = editor.generate(prompts, max_new_tokens=max_new_tokens)
        with editor.disabled():
            before = editor.generate(prompts, max_new_tokens=max_new_tokens)
    rows = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        console.continuations(rows)


@app.command()
def testbed(
    dataset: Dataset,
    out: Out,
    records: Annotated[int, typer.Option(help="How many records' facts the model shall know.", min=1)] = 300,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a small model that knows the facts of a benchmark's records, to edit them on."""
    import dataclasses

    from baft.datasets import load_dataset
    from baft.testbed.benchmark import RECIPE, BenchmarkKnowledge
    from baft.testbed.folder import make_testbed

    console = Console(quiet=as_json)
    knowledge = BenchmarkKnowledge(load_dataset(dataset, limit=records))
    with console.progress() as watcher:
        recipe = dataclasses.replace(RECIPE, seed=seed)
        report = make_testbed(
            out, knowledge, recipe, facts=f"{records} records of {dataset}", on_progress=watcher.training
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        console.say(f"A model of {report.parameters:,} parameters knows {report.recall:.1%} of the facts: {out}")


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, backends, and what they can do here."""
    from baft_kernels.info import collect, render

    report: dict[str, Any] = collect()
    typer.echo(json.dumps(report, indent=2) if as_json else render(report))


def main() -> None:
    """The ``baft`` command: one clear line for bad input (status 2) and for a run that fails (status 1)."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except ValueError as error:
        sys.exit(_fail(error, 2))
    except (OSError, RuntimeError) as error:
        sys.exit(_fail(error, 1))


def _fail(error: Exception, status: int) -> int:
    typer.echo(f"baft: {' '.join(str(error).split())}", err=True)
    return status


if __name__ == "__main__":
    main()
