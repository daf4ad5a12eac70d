"""The journal: what was written stays, whoever else reads, is killed, or has filled the disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from small_runs import ASKED, Listener, run_in
from small_runs import finished_run as finished_run
from tiny import one_thread as one_thread

from baft.distributed import World
from baft.runs.environment import in_place_of, machine
from baft.runs.journal import Journal
from baft.runs.records import EditRecord


def test_a_full_disk_loses_nothing_that_was_written(finished_run: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.begin_session(0)
    records = list(Journal(finished_run / "journal.sqlite", read_only=True).records())
    journal.add(records[0])
    pages = next(journal._rows("PRAGMA page_count"))[0]
    list(journal._rows(f"PRAGMA max_page_count = {pages}"))
    big = EditRecord(1, records[1].request, records[1].curve, immediate=records[1].immediate * 200)
    with pytest.raises(OSError, match="full; what was written before is kept"):
        journal.add(big)
    assert journal.positions() == [0]
    journal.close()
    assert next(Journal(tmp_path / "journal.sqlite").records()).request == records[0].request


def test_a_journal_that_is_busy_is_no_damaged_one(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1, and not 2: the input is as it should be."""
    path = tmp_path / "journal.sqlite"
    path.write_bytes((finished_run / "journal.sqlite").read_bytes())
    monkeypatch.setattr("baft.runs.database._PATIENCE", 0)
    journal, reader = Journal(path), Journal(path, read_only=True)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for use in (
            lambda: Journal(path),
            lambda: Journal(path, read_only=True),
            lambda: Journal.as_it_is(path),
            journal.positions,
            lambda: next(reader.records()),
            lambda: journal.begin_session(0),
        ):
            with pytest.raises(OSError, match=r"journal\.sqlite.* is locked; what was written before is kept"):
                use()
    assert len(journal.positions()) == len(ASKED)


def test_damage_that_is_found_late_is_named(finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    content = bytearray((finished_run / "journal.sqlite").read_bytes())
    content[8192:] = bytes(len(content) - 8192)
    path.write_bytes(content)
    journal = Journal(path, read_only=True)
    with pytest.raises(ValueError, match=r"journal\.sqlite: expected a run's journal, got a file that can't be read"):
        list(journal.records())


def test_another_database_is_no_journal(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as other:
        other.execute("CREATE TABLE measures (position INTEGER)")
    with pytest.raises(ValueError, match=r"other\.sqlite: expected a run's journal, got a database without a table"):
        Journal(tmp_path / "other.sqlite", read_only=True)


def test_other_processes_get_the_journal_in_pieces(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be gigabytes of it."""
    monkeypatch.setattr("baft.runs.journal._PIECE", 4096)
    sent: list[bytes | None] = []
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda values: sent.extend(values))
    first = Journal(finished_run / "journal.sqlite")
    assert Journal.copy_of(first, World(0, 2)) is first
    assert len(sent) > 10 and max(len(piece or b"") for piece in sent) == 4096
    left = iter(sent)

    def receive(values: list[bytes | None]) -> None:
        values[:] = [next(left)]

    monkeypatch.setattr("torch.distributed.broadcast_object_list", receive)
    copy = Journal.copy_of(Journal(None), World(1, 2))
    assert next(left, "none") == "none"
    assert list(copy.records()) == list(first.records()) and copy.retention() == first.retention()
    copy.begin_session(9)
    assert len(copy.sessions()) == len(first.sessions()) + 1


def test_several_records_are_written_together_or_not_at_all(finished_run: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    records = list(Journal(finished_run / "journal.sqlite", read_only=True).records())
    with pytest.raises(Exception, match="UNIQUE"):
        journal.add(records[0], records[1], records[0])
    assert journal.positions() == []


def test_an_earlier_session_is_left_as_it_was(tmp_path: Path) -> None:
    """Its time is its own: a run that is resumed in the morning didn't take all night."""
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, listener=Listener(interrupt_after(tmp_path, 2)))
    (before,) = Journal(tmp_path / "journal.sqlite", read_only=True).sessions()
    first, second = run_in(tmp_path).results["sessions"]
    assert first == before and second["resumed_at"] == 2


def test_a_session_on_another_machine_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits may differ, which nobody could tell afterwards."""
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, listener=Listener(interrupt_after(tmp_path, 2)))
    with pytest.raises(KeyboardInterrupt):  # on the same one
        run_in(tmp_path, listener=Listener(interrupt_after(tmp_path, 4)))
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, listener=(listener := Listener(interrupt_after(tmp_path, 6))))
    first, second, third, fourth = run_in(tmp_path).results["sessions"]  # on that one
    said = "goes on with 2 threads in place of 1: the same within rounding, not bit for bit"
    assert said in listener.said and third["notes"] == [said] and second["notes"] == fourth["notes"] == []
    assert first["machine"] == second["machine"] == {**third["machine"], "threads": 1} == machine(1) | {"threads": 1}


def test_an_older_journal_does_not_know_its_machines(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, listener=Listener(interrupt_after(tmp_path, 2)))
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as journal:
        journal.execute("ALTER TABLE sessions DROP COLUMN machine")
    (known,) = Journal(tmp_path / "journal.sqlite", read_only=True).sessions()
    assert known["machine"] == {}
    first, second = run_in(tmp_path).results["sessions"]
    assert first == known and second["machine"] == machine(1) and second["notes"] == []


def test_machines_differ_in_what_results_depend_on() -> None:
    here = machine(1) | {"gpu": None, "kernels": "avx512", "threads": 2}
    assert in_place_of(here, here) == in_place_of({}, here) == ""
    assert in_place_of(here, here | {"threads": 1, "kernels": None, "processes": 4}) == (
        "kernels none in place of avx512, 1 thread in place of 2, 4 processes in place of 1"
    )
    gpu = here | {"gpu": "A"}
    assert in_place_of(gpu, gpu | {"threads": 1, "processor": "B"}) == ""
    assert in_place_of(gpu, gpu | {"gpu": "B", "processes": 2}) == "gpu B in place of A, 2 processes in place of 1"
    assert in_place_of(gpu, here | {"threads": 1}) == "gpu none in place of A, 1 thread in place of 2"


def interrupt_after(folder: Path, edits: int) -> Callable[[], None]:
    def interrupt() -> None:
        if len(Journal(folder / "journal.sqlite", read_only=True).positions()) == edits:
            raise KeyboardInterrupt

    return interrupt


def test_who_reads_slowly_does_not_stop_who_writes(finished_run: Path, tmp_path: Path) -> None:
    records = list(Journal(finished_run / "journal.sqlite", read_only=True).records())
    journal = Journal(tmp_path / "journal.sqlite")
    journal.add(*records[:2])
    next(journal._rows("PRAGMA busy_timeout = 0"))
    reader = Journal(tmp_path / "journal.sqlite", read_only=True)
    reading = reader.records()
    assert next(reading).index == 0
    copy = Journal.as_it_is(tmp_path / "journal.sqlite")
    copied = copy.records()
    assert next(copied).index == 0
    journal.add(records[2])
    assert [record.index for record in reader.records()] == [0, 1, 2]
    assert [record.index for record in copied] == [1] and copy.positions() == [0, 1]


def test_records_come_in_pages_without_a_gap(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(finished_run / "journal.sqlite", read_only=True)
    for page in (1, 2, 9, 100):
        monkeypatch.setattr("baft.runs.journal._PAGE", page)
        assert [record.index for record in journal.records()] == list(range(9))
        assert [record.index for record in journal.records(3, limit=4)] == [3, 4, 5, 6]
        assert [record.index for record in journal.records(limit=0)] == []


def test_a_journal_can_be_read_after_a_kill_in_the_middle_of_a_transaction(finished_run: Path, tmp_path: Path) -> None:
    """What is left of the transaction beside the file is taken back by whoever comes first, readers too."""
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    records = list(Journal(finished_run / "journal.sqlite", read_only=True).records())
    journal.add(records[0])
    # A cache this small spills into the file before the end, as a large transaction does.
    next(journal._rows("PRAGMA cache_size = 1"), None)
    with pytest.raises(OSError, match="killed"), journal._transaction() as connection:
        for position in range(1, 200):
            connection.execute("INSERT INTO base_texts VALUES (?, ?)", (str(position), "x" * 4000))
        killed = tmp_path / "killed"
        killed.mkdir()
        for file in tmp_path.glob("journal.sqlite*"):
            (killed / file.name).write_bytes(file.read_bytes())
        raise OSError("killed")
    assert (killed / "journal.sqlite-journal").stat().st_size > 0
    left = Journal(killed / "journal.sqlite", read_only=True)
    assert left.positions() == [0] and left.text("1") is None


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="expected a run's journal"):
        Journal(tmp_path / "journal.sqlite")
