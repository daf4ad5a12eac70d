"""The command ``baft``, as a test calls it."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from baft.cli import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def baft(*arguments: object) -> Done:
    """Run the command in this process, which saves importing torch each time."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["baft", *map(str, arguments)])
        try:
            main()
        except SystemExit as exit:
            status = int(exit.code or 0)
    return Done(status, out.getvalue(), err.getvalue())
