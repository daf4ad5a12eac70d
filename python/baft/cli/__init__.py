"""The command line: reads options, calls the library, prints.

Exit status: 0 done, 1 failed while running, 2 the input can't be used.
"""

from __future__ import annotations

import logging
import sys

import typer

from baft.cli import edits, run, tools, use

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Edit facts in language models with BaFT.",
)
for command in (run.demo, run.run, tools.report, use.generate, tools.testbed, tools.info):
    app.command()(command)
app.command("eval")(use.evaluate)
app.add_typer(edits.app, name="edits")


def main() -> None:
    """The ``baft`` command: one clear line for bad input (status 2) and for a run that fails (status 1)."""
    for library in ("transformers", "huggingface_hub"):  # whose tries to reach the hub are lines without end
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app()
    except ValueError as error:
        sys.exit(_fail(error, 2))
    except (OSError, RuntimeError) as error:
        sys.exit(_fail(error, 1))


def _fail(error: Exception, status: int) -> int:
    typer.echo(f"baft: {' '.join(str(error).split())}", err=True)
    return status
