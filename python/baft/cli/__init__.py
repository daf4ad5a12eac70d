"""The command line: reads options, calls the library, prints.

Exit status: 0 done, 1 failed while running or stopped, 2 the input can't be used.
"""

from __future__ import annotations

import logging
import sys

from baft.cli.endings import Ended, begins_anew, ending_with, stopped_alike, tell

__all__ = ["main"]


def main() -> None:
    """The ``baft`` command: one clear line for bad input (status 2), and for what ends before its end (status 1)."""
    # What they warn of comes again and again: at each try to reach the hub, at each product of 8-bit weights.
    for library in ("transformers", "huggingface_hub", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with stopped_alike():
        try:
            with ending_with(begins_anew):
                from baft.cli.commands import app  # takes seconds, in which it may be stopped, too
            app()
        except ValueError as error:
            tell(error)
            sys.exit(2)
        except (Ended, MemoryError, OSError, RuntimeError) as error:
            tell(error)
            sys.exit(1)
