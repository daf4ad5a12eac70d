"""A run's folder: what lies where, and that one process at a time writes to it.

run.json          what the run is, the words it was started with, and the commit of its code where that is known
journal.sqlite    every request with its training and what was said (``baft.runs.journal``)
checkpoints/      the editor's state, now and then (``baft.runs.checkpoints``)
adapter/          the edits, to be loaded by ``BaftEditor.from_pretrained``; when the run is done
results.json      the figures; when the run is done
edits.jsonl       the journal for readers, a request a line; when the run is done
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from baft.runs.checkpoints import Checkpoints
from baft.runs.environment import commit_of
from baft.runs.identity import differences
from baft.runs.journal import Journal
from baft.runs.records import EditRecord
from baft.storage import atomic_write

__all__ = ["EDITS", "JOURNAL", "RESULTS", "RunFolder"]

RESULTS, EDITS, JOURNAL = "results.json", "edits.jsonl", "journal.sqlite"

FORMAT = 1


class RunFolder:
    """The folder that a run writes to; a context manager, or held by this process until ``close`` is called.

    Args:
        path: the folder.
        begun: expect a run in it, and make none.

    Raises:
        ValueError: if the folder holds something that is no run, can't be made, or if another process is at it.
    """

    def __init__(self, path: str | Path, *, begun: bool = False) -> None:
        self.path = Path(path)
        if begun:
            self._read_identity()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: expected a new or empty folder, got {self.path}, which is a file")
        if self.path.exists() and not (self.begun or self._is_empty()):
            raise ValueError(f"out: expected a new or empty folder, got {self.path}, which holds other files")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise ValueError(f"out: expected a folder that can be written to, got {self.path} ({error})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(
                f"out: expected to be the only process that writes to {self.path}, got another one that is at it; "
                "`baft edits list` and `baft report` read it meanwhile"
            ) from None
        self._journal: Journal | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have it."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        os.close(self._lock)

    # -- what lies where -------------------------------------------------------------------------------------------

    @property
    def identity_file(self) -> Path:
        return self.path / "run.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def picture(self) -> Path:
        return self.path / "report.png"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def results(self) -> Path:
        return self.path / RESULTS

    @property
    def edits(self) -> Path:
        return self.path / EDITS

    @property
    def journal(self) -> Journal:
        """Made, if there is none yet.

        Raises:
            ValueError: if there was one, and it is gone: with a new one the run would begin again from nothing.
        """
        if self._journal is None:
            place = self.path / JOURNAL
            if not place.exists() and (counts := self.checkpoints().counts()):
                raise ValueError(
                    f"{place}: expected a journal, as there are checkpoints up to {counts[-1]}, got none: put it back, "
                    "or begin the run in another folder"
                )
            self._journal = Journal(place)
        return self._journal

    def checkpoints(self, every: int | None = None) -> Checkpoints:
        return Checkpoints(self.path / "checkpoints", every)

    # -- beginning and going on ------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        return self.identity_file.exists()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do, but perhaps the report."""
        return self.results.exists()

    def _is_empty(self) -> bool:
        """But for what a process leaves that is killed before it has begun the run."""
        return all(path.name.startswith(".") for path in self.path.iterdir())

    def started_with(self) -> dict[str, Any]:
        """The words that the run was started with.

        Raises:
            ValueError: if the folder isn't a run's, or one of another format.
        """
        words: dict[str, Any] = self._read_identity()["started_with"]
        return words

    def begin(self, identity: Mapping[str, Any], started_with: Mapping[str, Any]) -> None:
        """Make it the folder of a run."""
        self._write_identity(
            {
                "format": FORMAT,
                "started_with": started_with,
                "commit": commit_of(Path(__file__).parent),
                "identity": identity,
            }
        )

    def go_on(self, identity: Mapping[str, Any], said: Mapping[str, Any] | None = None) -> None:
        """Make sure that it is the folder of this run.

        Args:
            said: the words that it is gone on with, to be kept in place of the earlier ones.

        Raises:
            ValueError: if it is another's; the message says in what they differ.
        """
        known, now = self._read_identity(), json.loads(json.dumps(identity))
        words = known["started_with"] if said is None else said
        called = {what: str(words[what]) for what in ("model", "dataset") if what in words}
        different = differences(known["identity"], now, **called)
        if different:
            commit = known.get("commit") if known["identity"].get("code") != now.get("code") else None
            way_back = f"; its code was that of commit {commit}: check that out" if commit else ""
            raise ValueError(
                f"{self.path} is another run, which can't be gone on with: {'; '.join(different)}{way_back}"
            )
        if said is not None and said != known["started_with"]:
            self._write_identity({**known, "started_with": said})

    def _write_identity(self, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        atomic_write(self.identity_file, lambda path: path.write_text(text))

    def _read_identity(self) -> dict[str, Any]:
        try:
            content = _read_json(self.identity_file)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{self.path}: expected a run's folder, found no {self.identity_file.name} in it"
            ) from None
        if content.get("format") != FORMAT:
            raise ValueError(f"{self.identity_file}: expected format {FORMAT}, got {content.get('format')!r}")
        return content

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self, records: Iterable[EditRecord], results: Mapping[str, Any]) -> None:
        """Write ``edits.jsonl`` and ``results.json``; with the latter there the run is done."""

        def write_records(path: Path) -> None:
            with path.open("w", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(record.as_json(), ensure_ascii=False) + "\n")

        atomic_write(self.edits, write_records)
        text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        atomic_write(self.results, lambda path: path.write_text(text, "utf-8"))

    def found(self) -> dict[str, Any]:
        """What ``finish`` wrote to ``results.json``.

        Raises:
            ValueError: if it is damaged.
        """
        return _read_json(self.results)

    def reopen(self) -> None:
        """Take back that the run is done: what its end wrote is no longer so."""
        for path in (self.results, self.edits, self.page, self.picture, *self.path.glob(f"{self.page.stem}-*.png")):
            path.unlink(missing_ok=True)
        if self.adapter.exists():
            shutil.rmtree(self.adapter)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file ({error})") from error
    return content
