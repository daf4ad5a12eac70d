"""``baft report``, ``baft testbed``, ``baft info``: what there is beside editing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from baft.cli.options import Dataset, Json, Out, Seed
from baft.console import Console

__all__ = ["info", "report", "testbed"]


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs, finished or not.")],
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


def testbed(
    dataset: Dataset,
    out: Out,
    seed: Seed = 0,
    epochs: Annotated[
        int | None, typer.Option(help="Times that each fact is read, at most; 50 by default.", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a small model that knows the facts of a data set, to edit that data set on.

    Half an hour on two cores for 600 records of CounterFact: name a stretch of a large file. A model that doesn't know
    them all in the end is kept, and says how many.
    """
    import dataclasses

    from baft.datasets import load_dataset
    from baft.testbed.benchmark import RECIPE, BenchmarkKnowledge
    from baft.testbed.folder import RECALL_NEEDED, make_testbed

    console = Console(quiet=as_json)
    requests = load_dataset(dataset)
    knowledge = BenchmarkKnowledge(requests)
    if knowledge.passed_over:
        console.say(
            f"{knowledge.passed_over} of {len(requests)} records have no old answer, or it is their target: "
            "nothing is learned of their prompts"
        )
    with console.progress() as watcher:
        recipe = dataclasses.replace(RECIPE, seed=seed, max_epochs=epochs or RECIPE.max_epochs)
        report = make_testbed(out, knowledge, recipe, facts=dataset, recall_needed=0.0, on_progress=watcher.training)
    if report.recall < RECALL_NEEDED:
        console.say(
            f"At the end of its epochs ({recipe.max_epochs}) the model knows {report.recall:.1%} of the facts, "
            f"expected at least {RECALL_NEEDED:.0%}: it is kept; more --epochs may teach it more"
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        console.say(f"A model of {report.parameters:,} parameters knows {report.recall:.1%} of the facts: {out}")


def info(as_json: Json = False) -> None:
    """Versions, backends, and what they can do here."""
    from baft_kernels.info import collect, render

    report: dict[str, Any] = collect()
    typer.echo(json.dumps(report, indent=2) if as_json else render(report))
