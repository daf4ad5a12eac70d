"""SQLite as a run's journal needs it: opened to write or to read, its errors in words, columns that are newer."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["add_columns", "connect", "in_words", "opened_to_read"]

# Seconds that one process waits for another that reads, or writes: a copy of a large journal may take some.
_PATIENCE = 600


def connect(path: Path | None, mode: str) -> sqlite3.Connection:
    """A connection to the file at ``path``, or to memory; ``mode`` is SQLite's: "ro", "rw", or "rwc" to make it."""
    name = ":memory:" if path is None else f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(name, timeout=_PATIENCE, isolation_level=None, uri=True)


@contextmanager
def in_words(path: object) -> Iterator[None]:
    """SQLite's errors in the terms of ``Journal``."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"{path}: {error}; what was written before is kept") from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:
            raise  # no fault of the file
        raise ValueError(f"{path}: expected a run's journal, got a file that can't be read ({error})") from error


def opened_to_read(path: Path) -> sqlite3.Connection:
    """A connection that reads. After a kill in the middle of a transaction it takes back what that had begun."""
    for mode in ("ro", "rw"):
        connection = connect(path, mode)
        try:
            known = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'edits'").fetchone()
        except sqlite3.OperationalError as error:
            connection.close()
            if mode == "rw" or "readonly" not in str(error):
                raise
            continue
        if known is None:
            connection.close()
            raise ValueError(f"{path}: expected a run's journal, got a database without a table of edits")
        return connection
    raise AssertionError


def add_columns(connection: sqlite3.Connection, columns: Iterable[tuple[str, str, str]]) -> None:
    """Add those ``columns`` that aren't there: each a table, a name, and what SQL says of it."""
    for table, column, kind in columns:
        if column not in [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
