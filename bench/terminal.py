"""Where benchmarks print to."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["plain_console", "show"]


def plain_console(width: int | None = None) -> Console:
    """Prints text as it is, since what models and errors say isn't markup; to a file in lines of ``width`` columns."""
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else width)


def show(rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print a table, its first row the header."""
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
