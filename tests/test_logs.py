"""Logs of metrics: what stands in them, and that a run which goes on leaves no trace of having been interrupted."""

from __future__ import annotations

import csv
import resource
import sys
from pathlib import Path

import pytest

from baft.runs.logs import LOGS, open_log


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_line_for_each_call_and_one_header(tmp_path: Path) -> None:
    log = open_log("csv", tmp_path)
    log.log(1, {"loss": 0.5, "reliability": None})
    log.log(2, {"reliability": 1.0, "loss": 0.25})
    log.close()
    assert (tmp_path / "metrics.csv").read_text() == "edits,loss,reliability\n1,0.5,\n2,0.25,1.0\n"


def test_csv_takes_new_columns_at_milestones(tmp_path: Path) -> None:
    log = open_log("csv", tmp_path)
    log.log(1, {"loss": 0.5})
    log.log(10, {"loss": 0.4, 'held, "so far"': 0.9})
    log.log(11, {"loss": 0.3})
    named = 'held, "so far"'
    assert [row[named] for row in _rows(tmp_path)] == ["", "0.9", ""]
    assert [row["loss"] for row in _rows(tmp_path)] == ["0.5", "0.4", "0.3"]


@pytest.mark.parametrize("torn", ["", "4,0."])
def test_a_run_that_goes_on_leaves_the_log_of_one_that_was_never_interrupted(tmp_path: Path, torn: str) -> None:
    values = {edits: {"loss": 1 / edits} | ({"held": 0.9} if edits == 5 else {}) for edits in range(1, 7)}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    for folder, attempts in ((whole, [range(1, 7)]), (broken, [range(1, 4), range(3, 7)])):
        for number, attempt in enumerate(attempts):
            log = open_log("csv", folder)
            for edits in attempt:
                log.log(edits, values[edits])
            log.close()
            if folder == broken and number == 0:
                with (folder / "metrics.csv").open("a") as file:
                    file.write(torn)
    assert (broken / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log("csv", tmp_path)
    log.log(1, {"loss": 0.5})
    written: list[bytes] = []
    original = Path.open

    def watched(self: Path, *arguments: object, **options: object) -> object:
        file = original(self, *arguments, **options)  # type: ignore[call-overload]

        class Watched:
            def __enter__(self) -> Watched:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> None:
                written.append(data)
                file.write(data)

        return Watched()

    monkeypatch.setattr(Path, "open", watched)
    log.log(2, {"loss": 0.25})
    assert written == [b"2,0.25\n"]


def test_a_full_disk_is_named_and_what_is_torn_is_left_out(tmp_path: Path) -> None:
    """A line that the disk has room for a part of is an error, and not a line of fewer cells."""
    log = open_log("csv", tmp_path)
    log.log(1, {"loss": 0.5})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.csv").stat().st_size + 3, before[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/metrics.csv'"):
            log.log(2, {"loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    open_log("csv", tmp_path).log(3, {"loss": 0.125})
    assert [row["edits"] for row in _rows(tmp_path)] == ["1", "3"]


def test_a_foreign_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("time,money\n1,2\n")
    with pytest.raises(ValueError, match=r"'edits' first in .*metrics.csv, got 'time'"):
        open_log("csv", tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "time,money\n1,2\n"


def test_tensorboard_shows_what_was_logged_and_hides_what_was_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard isn't installed: the extra of that name has it")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, offset in ((range(1, 4), 0.0), (range(3, 5), 0.5)):
        log = open_log("tensorboard", tmp_path)
        for edits in attempt:
            log.log(edits, {"loss": edits + offset, "held": None})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]
    assert events.Tags()["scalars"] == ["loss"]


def test_without_tensorboard_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'baft-kernels\[tensorboard\]'"):
        open_log("tensorboard", tmp_path)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    assert LOGS == ("csv", "tensorboard")
    with pytest.raises(ValueError, match="log: expected csv or tensorboard, got 'xml'"):
        open_log("xml", tmp_path)
