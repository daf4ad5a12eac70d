"""All commands, and what is said of those that are stopped and have no words of their own for it."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from baft.cli import edits, run, tools, use
from baft.cli.endings import begins_anew, ending_with

__all__ = ["app"]


class _Commands(TyperGroup):
    def invoke(self, context: Any) -> Any:
        with ending_with(begins_anew):
            return super().invoke(context)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Edit facts in language models with BaFT.",
)
for command in (run.demo, run.run, tools.report, use.generate, tools.testbed, tools.info):
    app.command()(command)
app.command("eval")(use.evaluate)
app.add_typer(edits.app, name="edits")
