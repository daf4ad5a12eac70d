"""A run's memory on disk: every request, how it trained, what was said, in one SQLite file.

SQLite rather than lines of JSON: a transaction is on the disk whole or not at all, whenever the process is killed or
the disk is full; the final measures of an edit are written long after its line would have been; and the hundred
thousandth edit is found without reading those before it. The file is written by one process, in rollback mode, which
unlike write-ahead logging works on network file systems too.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from baft.distributed import World
from baft.engine.continuations import Asked
from baft.engine.encoding import Tokens
from baft.engine.schedule import Curve
from baft.evaluation.base_answers import Forced
from baft.evaluation.probes import ProbeResult
from baft.requests import EditRequest
from baft.runs.database import add_columns, connect, in_words, opened_to_read
from baft.runs.records import EditRecord, curve_as_json, curve_from_json, results_as_json, results_from_json

__all__ = ["Journal", "Moment"]

Moment = Literal["immediate", "final"]

_TABLES = """
CREATE TABLE IF NOT EXISTS edits (
    position INTEGER PRIMARY KEY, request TEXT NOT NULL, training TEXT NOT NULL, seconds REAL NOT NULL, steps INTEGER
);
CREATE TABLE IF NOT EXISTS measures (
    position INTEGER NOT NULL, moment TEXT NOT NULL, results TEXT NOT NULL, PRIMARY KEY (position, moment)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS base_texts (prompt TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS base_forced (
    prompt TEXT NOT NULL, answer TEXT NOT NULL, forced TEXT NOT NULL, PRIMARY KEY (prompt, answer)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS continued (
    prompt TEXT NOT NULL, branches INTEGER NOT NULL, texts TEXT NOT NULL, until INTEGER, PRIMARY KEY (prompt, branches)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS self_written (one INTEGER PRIMARY KEY CHECK (one = 1), texts TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS retention (
    edits INTEGER NOT NULL, settled INTEGER NOT NULL, point TEXT NOT NULL, PRIMARY KEY (edits, settled)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS settling (round INTEGER PRIMARY KEY, training TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cut (one INTEGER PRIMARY KEY CHECK (one = 1), position INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS dropped (position INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS description (one INTEGER PRIMARY KEY CHECK (one = 1), text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sessions (
    id INTEGER PRIMARY KEY, began REAL NOT NULL, last REAL NOT NULL, resumed_at INTEGER NOT NULL,
    bookkeeping REAL NOT NULL DEFAULT 0, notes TEXT NOT NULL DEFAULT '[]', machine TEXT NOT NULL DEFAULT '{}'
);
"""

# Columns that an older version's tables lack.
_NEWER = (("continued", "until", "INTEGER"), ("sessions", "machine", "TEXT NOT NULL DEFAULT '{}'"))

# Edits that are read at a time.
_PAGE = 64

# Bytes of a journal that one process gives to others at a time.
_PIECE = 1 << 24


class Journal:
    """The journal of one run.

    Args:
        path: its file, made if need be; None keeps it in memory, for runs that write nothing.
        read_only: only look, which may be done while another process writes. The writer waits, at most ten minutes,
            while a copy is made; no other reading takes long enough to be noticed.

    Attributes:
        asked_until: what the unedited model writes now is for requests before this place in the run's order.

    Raises:
        ValueError: if the file is no journal, or a damaged one; so does whatever reads or writes it.
        OSError: if it can't be read or written now: the disk is full, or another process has it; likewise.
    """

    def __init__(self, path: Path | None, *, read_only: bool = False) -> None:
        self.path = path
        self._bookkeeping = 0.0
        self._session: int | None = None
        self._folder: TemporaryDirectory[str] | None = None
        self.asked_until: int | None = None
        with in_words(path):
            if read_only:
                assert path is not None
                self._connection = opened_to_read(path)
                return
            self._connection = connect(path, "rwc")
            self._connection.execute("PRAGMA journal_mode=TRUNCATE")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_TABLES)
            add_columns(self._connection, _NEWER)

    @classmethod
    def as_it_is(cls, path: Path) -> Journal:
        """A copy of the journal at ``path`` at this moment, for who reads much of it while the run may go on.

        It is on disk, as there may be more than fits in memory, until nobody has the journal any more.
        """
        folder = TemporaryDirectory(prefix="baft-journal-")
        copy = Path(folder.name) / path.name
        with closing(cls(path, read_only=True)) as source:
            source._copy_to(copy)
        journal = cls(copy, read_only=True)
        journal.path, journal._folder = path, folder  # by the name that people know
        return journal

    @classmethod
    def copy_of(cls, journal: Journal, world: World) -> Journal:
        """In the first process ``journal`` itself, in the others a copy of that one, on disk while they have it."""
        if world.size == 1:
            return journal
        folder = TemporaryDirectory(prefix="baft-journal-")
        path = Path(folder.name) / "copy.sqlite"
        if world.writes:
            journal._copy_to(path)
        pieces = world.each_of_the_first_ones(_pieces(path) if world.writes else ())
        if world.writes:
            for _ in pieces:
                pass
            return journal
        with path.open("wb") as file:
            file.writelines(pieces)
        copy = cls(path)
        copy._folder = folder
        copy._connection.execute("PRAGMA synchronous=OFF")  # nobody goes on with it
        return copy

    def _copy_to(self, path: Path) -> None:
        with in_words(f"{self.path}, on its way to {path}"), closing(sqlite3.connect(path)) as target:
            self._connection.backup(target)

    def _has(self, table: str) -> bool:
        """Whether there is such a table; one that is only read may lack what is newer than it."""
        return self._one("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?", table) is not None

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is written in it is on the disk when it ends, or nothing of it is.

        Raises:
            OSError: if it can't be written, because the disk is full for instance.
        """
        began = time.perf_counter()
        try:
            with in_words(self.path):
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute(
                    "UPDATE sessions SET last = ?, bookkeeping = ? WHERE id = ?",
                    (time.time(), self._bookkeeping, self._session),
                )
                self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        finally:
            self.charge(time.perf_counter() - began)

    def charge(self, seconds: float) -> None:
        """Count time that this session spent on writing things down; that of the journal itself is counted already."""
        self._bookkeeping += seconds

    def _rows(self, statement: str, *values: object) -> Iterator[tuple[Any, ...]]:
        with in_words(self.path), closing(self._connection.cursor()) as cursor:
            yield from cursor.execute(statement, values)

    def _one(self, statement: str, *values: object) -> Any:
        row = next(self._rows(statement, *values), None)
        return None if row is None else row[0]

    # -- edits -----------------------------------------------------------------------------------------------------

    def add(self, *records: EditRecord) -> None:
        """Write down edits with their immediate measures: all of them, or after an error none."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM cut")
            for record in records:
                row = (
                    record.index,
                    record.request.model_dump_json(),
                    json.dumps(curve_as_json(record.curve)),
                    record.seconds,
                    record.steps,
                )
                connection.execute("INSERT INTO edits VALUES (?, ?, ?, ?, ?)", row)
                if record.immediate:
                    _write_measures(connection, record.index, "immediate", record.immediate)

    def add_measures(self, moment: Moment, measured: Mapping[int, Sequence[ProbeResult]]) -> None:
        """Write down what was asked of edits, by position."""
        with self._transaction() as connection:
            for position, results in measured.items():
                _write_measures(connection, position, moment, results)

    def records(self, first: int = 0, limit: int | None = None, *, measures: bool = True) -> Iterator[EditRecord]:
        """Edits from a position on, in order; at most ``limit`` of them.

        Args:
            measures: with what was asked of them.
        """
        for position, request, training, seconds, steps in self._in_pages(first, limit):
            record = EditRecord(
                position,
                EditRequest.model_validate_json(request),
                curve_from_json(json.loads(training)),
                seconds,
                steps,
            )
            if measures:
                record.immediate = self.measures(position, "immediate")
                record.final = self.measures(position, "final")
            yield record

    def _in_pages(self, first: int, limit: int | None) -> Iterator[tuple[Any, ...]]:
        """Rows of edits. Nothing is locked between pages, however long the reader takes."""
        left = math.inf if limit is None else limit
        while left > 0:
            page = list(
                self._rows(
                    "SELECT position, request, training, seconds, steps FROM edits WHERE position >= ? "
                    "ORDER BY position LIMIT ?",
                    first,
                    int(min(left, _PAGE)),
                )
            )
            yield from page
            if len(page) < min(left, _PAGE):
                return
            first, left = page[-1][0] + 1, left - len(page)

    def measures(self, position: int, moment: Moment) -> list[ProbeResult]:
        found = self._one("SELECT results FROM measures WHERE position = ? AND moment = ?", position, moment)
        return results_from_json(json.loads(found)) if found else []

    def measured(self, moment: Moment, without: Collection[int] = ()) -> Iterator[list[ProbeResult]]:
        """What was asked of every edit at a moment, in order, but of those ``without``."""
        rows = self._rows("SELECT position, results FROM measures WHERE moment = ? ORDER BY position", moment)
        for position, results in rows:
            if position not in without:
                yield results_from_json(json.loads(results))

    def unmeasured(self, moment: Moment) -> list[int]:
        """Positions of the edits that weren't asked at a moment."""
        rows = self._rows(
            "SELECT position FROM edits WHERE position NOT IN (SELECT position FROM measures WHERE moment = ?) "
            "ORDER BY position",
            moment,
        )
        return [position for (position,) in rows]

    def positions(self) -> list[int]:
        """Positions of the requests that are done, in order."""
        return [position for (position,) in self._rows("SELECT position FROM edits ORDER BY position")]

    def given_up(self) -> set[int]:
        """Positions of those that were given up, if for want of memory, and aren't edited in."""
        rows = self._rows(
            "SELECT position FROM edits "
            "WHERE json_extract(training, '$.diverged') OR json_extract(training, '$.out_of_memory')"
        )
        return {position for (position,) in rows}

    def dropped(self) -> set[int]:
        """Positions of the requests that are left out."""
        return {position for (position,) in self._rows("SELECT position FROM dropped")}

    def totals(self) -> dict[str, Any]:
        """Over all edits: their number, seconds, steps, and how many converged, diverged, or ran out of memory."""
        names = ("edits", "seconds", "steps", "converged", "diverged", "out_of_memory")
        row = next(
            self._rows(
                "SELECT count(*), coalesce(sum(seconds), 0.0), coalesce(sum(steps), 0), "
                "coalesce(sum(json_extract(training, '$.converged')), 0), "
                "coalesce(sum(json_extract(training, '$.diverged')), 0), "
                "coalesce(sum(json_extract(training, '$.out_of_memory')), 0) FROM edits"
            )
        )
        return dict(zip(names, row, strict=True))

    def cut(self, position: int, *, drop: bool = False) -> None:
        """Forget the edits from ``position`` on, and all measures that they were part of; see ``cut_at``.

        Args:
            drop: leave the request at ``position`` out of the run from now on.
        """
        with self._transaction() as connection:
            if drop:
                _leave_out(connection, position)
            left = connection.execute("SELECT count(*) FROM edits WHERE position < ?", (position,)).fetchone()[0]
            connection.execute("DELETE FROM edits WHERE position >= ?", (position,))
            connection.execute("DELETE FROM measures WHERE position >= ? OR moment = 'final'", (position,))
            connection.execute("DELETE FROM retention WHERE edits > ? OR settled > 0", (left,))
            connection.execute("DELETE FROM settling")
            connection.execute("INSERT OR REPLACE INTO cut VALUES (1, ?)", (position,))

    def leave_out(self, position: int) -> None:
        """Leave a request that isn't edited yet out of the run from now on."""
        with self._transaction() as connection:
            _leave_out(connection, position)

    def cut_at(self) -> int | None:
        """Where the edits were cut off, if nothing was edited since: the editor's state may not have followed."""
        found: int | None = self._one("SELECT position FROM cut") if self._has("cut") else None
        return found

    # -- settling rounds --------------------------------------------------------------------------------------------

    def add_settling(self, number: int, curve: Curve) -> None:
        """Write down how a settling round trained, the number of them before it being ``number``."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM cut")
            connection.execute("DELETE FROM settling WHERE round >= ?", (number,))
            connection.execute("INSERT INTO settling VALUES (?, ?)", (number, json.dumps(curve_as_json(curve))))

    def settling(self) -> list[Curve]:
        """The settling rounds that are done."""
        if not self._has("settling"):  # an older version's
            return []
        return [
            curve_from_json(json.loads(text)) for (text,) in self._rows("SELECT training FROM settling ORDER BY round")
        ]

    # -- retention -------------------------------------------------------------------------------------------------

    def add_retention(self, point: Mapping[str, Any]) -> None:
        with self._transaction() as connection:
            row = (point["edits"], point["settled"], json.dumps(point))
            connection.execute("INSERT OR REPLACE INTO retention VALUES (?, ?, ?)", row)

    def retention(self) -> list[dict[str, Any]]:
        points = [json.loads(point) for (point,) in self._rows("SELECT point FROM retention")]
        return sorted(points, key=lambda point: (point["edits"], point.get("settled", 0)))

    def has_retention(self, edits: int, settled: int) -> bool:
        """Whether there was a look back after so many edits and settling rounds."""
        return self._one("SELECT 1 FROM retention WHERE edits = ? AND settled = ?", edits, settled) is not None

    # -- the unedited model's answers, as ``BaseAnswers`` --------------------------------------------------------------

    def text(self, prompt: str) -> str | None:
        found: str | None = self._one("SELECT text FROM base_texts WHERE prompt = ?", prompt)
        return found

    def forced(self, prompt: str, answer: str) -> Forced | None:
        found = self._one("SELECT forced FROM base_forced WHERE prompt = ? AND answer = ?", prompt, answer)
        return None if found is None else Forced(*map(tuple, json.loads(found)))

    def add_base(self, texts: Mapping[str, str], forced: Mapping[tuple[str, str], Forced]) -> None:
        rows = [(*pair, json.dumps([answer.predicted, answer.wanted])) for pair, answer in forced.items()]
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO base_texts VALUES (?, ?)", texts.items())
            connection.executemany("INSERT OR REPLACE INTO base_forced VALUES (?, ?, ?)", rows)

    # -- what it writes, as ``KeptContinuations``, in tokens ----------------------------------------------------------

    def continued(self, asked: Asked) -> list[Tokens] | None:
        prompt = json.dumps(asked.prompt)
        found = self._one("SELECT texts FROM continued WHERE prompt = ? AND branches = ?", prompt, asked.branches)
        return None if found is None else [tuple(text) for text in json.loads(found)]

    def add_continued(self, found: Mapping[Asked, Sequence[Tokens]]) -> None:
        rows = [
            (json.dumps(asked.prompt), asked.branches, json.dumps(texts), self.asked_until)
            for asked, texts in found.items()
        ]
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO continued VALUES (?, ?, ?, ?)", rows)

    # -- what it writes in place of unrelated texts, before the first edit ---------------------------------------------

    def self_written(self) -> list[str] | None:
        """What ``add_self_written`` was told; None if nothing, as by an older version."""
        found = self._one("SELECT texts FROM self_written")
        return None if found is None else json.loads(found)

    def add_self_written(self, texts: Sequence[str]) -> None:
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO self_written VALUES (1, ?)", (json.dumps(list(texts)),))

    # -- what run it is --------------------------------------------------------------------------------------------

    def describe(self, description: Mapping[str, Any]) -> None:
        """Keep what can be said of the run before its first edit."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO description VALUES (1, ?)", (json.dumps(description),))

    def described(self, name: str) -> Any:
        """One of the things that ``describe`` was told; None if it wasn't, or nothing yet."""
        text = self._one("SELECT text FROM description") if self._has("description") else None
        return None if text is None else json.loads(text).get(name)

    def description(self) -> dict[str, Any]:
        """What ``describe`` was told.

        Raises:
            ValueError: if it was told nothing: the run hasn't begun, or an older version began it.
        """
        text = self._one("SELECT text FROM description") if self._has("description") else None
        if text is None:
            raise ValueError(
                f"{self.path}: expected a run that has begun, got one that hasn't, or that an older version began: "
                "gone on with to its end, it has its results"
            )
        found: dict[str, Any] = json.loads(text)
        return found

    # -- sessions --------------------------------------------------------------------------------------------------

    def begin_session(self, resumed_at: int, machine: Mapping[str, Any] | None = None) -> None:
        """A process begins, or goes on, with so many edits made, on a ``baft.runs.environment.machine``."""
        with self._transaction() as connection:
            now = time.time()
            self._bookkeeping = 0.0
            self._session = connection.execute(
                "INSERT INTO sessions (began, last, resumed_at, machine) VALUES (?, ?, ?, ?)",
                (now, now, resumed_at, json.dumps(machine or {})),
            ).lastrowid

    def note(self, text: str) -> None:
        """Keep something that was said aloud in this session."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE sessions SET notes = json_insert(notes, '$[#]', ?) WHERE id = (SELECT max(id) FROM sessions)",
                (text,),
            )

    def sessions(self) -> list[dict[str, Any]]:
        known = self._one("SELECT 1 FROM pragma_table_info('sessions') WHERE name = 'machine'")
        machine = "machine" if known else "'{}'"  # an older version's, that is only read
        rows = self._rows(
            f"SELECT began, last - began, resumed_at, bookkeeping, notes, {machine} FROM sessions ORDER BY id"
        )
        return [
            {
                "began": began,
                "seconds": seconds,
                "resumed_at": at,
                "bookkeeping_seconds": cost,
                "notes": json.loads(notes),
                "machine": json.loads(machine),
            }
            for began, seconds, at, cost, notes, machine in rows
        ]


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _leave_out(connection: sqlite3.Connection, position: int) -> None:
    """Leave a request out, and forget the texts that were written in its company or in another than they shall be."""
    connection.execute(
        "DELETE FROM continued WHERE until IS NULL "  # an older version's, which doesn't say
        "OR until > ? - (SELECT count(*) FROM dropped WHERE position < ?)",
        (position, position),
    )
    connection.execute("INSERT OR IGNORE INTO dropped VALUES (?)", (position,))


def _write_measures(
    connection: sqlite3.Connection, position: int, moment: Moment, results: Sequence[ProbeResult]
) -> None:
    row = (position, moment, json.dumps(results_as_json(results), ensure_ascii=False))
    connection.execute("INSERT OR REPLACE INTO measures VALUES (?, ?, ?)", row)
