"""The command ``baft``, in a process that dies as by ``kill -9``: where its edit with a number is about to be kept.

    torchrun --nproc-per-node 2 tests/dying.py RANK EDITS run ...

Of several processes the one of that rank dies, and the others are left to notice.
"""

from __future__ import annotations

import os
import signal
import sys

from baft.cli import main
from baft.runs.journal import Journal
from baft.runs.records import EditRecord


def die_at(edits: int) -> None:
    """End this process at its ``edits``-th edit, before the journal has it."""
    add = Journal.add

    def add_or_die(journal: Journal, *records: EditRecord) -> None:
        if len(journal.positions()) + len(records) >= edits:
            os.kill(os.getpid(), signal.SIGKILL)
        add(journal, *records)

    Journal.add = add_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    rank, edits = sys.argv[1:3]
    del sys.argv[1:3]
    if os.environ["RANK"] == rank:
        die_at(int(edits))
    main()
