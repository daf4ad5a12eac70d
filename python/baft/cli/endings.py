"""How a command ends before its end: one line says what happened, what is kept, and how to go on.

What asks a process to end, as batch systems, containers and closed terminals do some time before they kill it, goes the
way that Ctrl-C goes: as KeyboardInterrupt, upon which whatever is being written stays whole. Nothing here imports more
than Python has, since a command may be stopped while it still imports.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Ended", "begins_anew", "command", "edits_are", "ending_with", "stopped_alike", "tell"]

# Of these Python itself handles the first.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(Exception):
    """A command has ended before its end; the words are all that there is to say of it."""


@contextmanager
def stopped_alike() -> Iterator[None]:
    """Let whatever asks the process to end do as Ctrl-C does, but for what it is told to ignore, as nohup tells it.

    Of several processes only the one that prints is asked so: the others have no words to end with. Nor have those that
    a library forks from it for its own work.
    """
    process = os.getpid()

    def interrupt(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:
            raise KeyboardInterrupt(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    before = {number: signal.getsignal(number) for number in _STOPS}
    for number, handler in before.items():
        if handler is signal.SIG_DFL and _prints():
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that Python doesn't know stays, too
                signal.signal(number, handler)


@contextmanager
def ending_with(way_on: Callable[[BaseException], str]) -> Iterator[None]:
    """What ends before its end says what it always says, and then ``way_on``'s words.

    Args:
        way_on: given what ended it, says what is kept and how to go on, or nothing.

    Raises:
        Ended: in place of an interrupt, and of an error for which there are words.
    """
    try:
        yield
    except (KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        if stopped:
            for number in _STOPS:  # who asks twice gets the same words
                signal.signal(number, signal.SIG_IGN)
            if not _prints():
                sys.exit(1)
        words = way_on(error) if _prints() else ""
        if not (stopped or words):
            raise
        happened = f"stopped by {str(error) or 'Ctrl-C'}" if stopped else _line(error)
        raise Ended(f"{happened}; {words}" if words else happened) from error


def tell(error: Exception) -> None:
    """Say, in one line, what ended the command."""
    with contextlib.suppress(OSError):  # the terminal may be gone, or the disk full that its output goes to
        print(f"baft: {_line(error)}", file=sys.stderr, flush=True)


def begins_anew(ended: BaseException) -> str:
    """What is said of a command that nothing is kept of: how to go on, where it was stopped."""
    return "the same command starts it again" if isinstance(ended, KeyboardInterrupt) else ""


def command(*words: object) -> str:
    """``baft`` with these words, for a person to type, who has torchrun start it where it started this one."""
    return f"`baft {shlex.join(map(str, words))}`" + (", under torchrun as before," if _by_torchrun() else "")


def edits_are(number: int) -> str:
    return "1 edit is" if number == 1 else f"{number} edits are"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _prints() -> bool:
    """Whether this process, of several that torchrun may have started, is the one that prints."""
    return not _by_torchrun() or os.environ["RANK"] == "0"


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
