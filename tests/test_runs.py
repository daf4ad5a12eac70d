"""The parts of a run: what is kept of it, when it looks back, what it says at its end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from looks import texts_written_together
from small_runs import ASKED, Listener, run_in, small_editor
from tiny import one_thread, tiny_model  # noqa: F401  # a fixture

from baft.distributed import World
from baft.engine.continuations import Asked, Continuations
from baft.engine.encoding import Tokens
from baft.runs import retention
from baft.runs import sequential as sequential_run
from baft.runs.checkpoints import Checkpoints, kept
from baft.runs.conflicts import can_hold, conflicts
from baft.runs.environment import commit_of
from baft.runs.folder import RunFolder
from baft.runs.identity import differences, hash_of_model
from baft.runs.journal import Journal
from baft.runs.records import EditRecord
from baft.runs.retention import Retention, is_milestone, sample
from baft.runs.run import RunPlan, run_edits


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sequential"
    run_in(folder)
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


# -- a run's end --


def test_edits_jsonl_has_all_that_the_journal_has(sequential: Path) -> None:
    lines = [json.loads(line) for line in (sequential / "edits.jsonl").read_text().splitlines()]
    records = list(Journal(sequential / "journal.sqlite", read_only=True).records())
    assert [line["index"] for line in lines] == list(range(len(ASKED)))
    assert lines == [json.loads(json.dumps(record.as_json())) for record in records]
    assert [record.request for record in records] == ASKED
    assert all(record.immediate and record.final for record in records)


def test_the_retention_curve_looks_back_when_it_is_due(sequential: Path) -> None:
    points = results_of(sequential)["retention"]
    moments = [(point["edits"], point["settled"]) for point in points]
    assert moments == [(1, 0), (4, 0), (8, 0), (9, 0), (9, 6)]  # 1, every 4, and the end before and after settling
    for point in points:
        assert point["general"]["perplexity"] > 1 and point["general"]["before"] == points[0]["general"]["before"]
        (shares,) = point["gates"].values()
        assert len(shares) == 8 and sum(shares) == pytest.approx(1.0)
        assert point["memory"]["process"] > 0
    assert points[0]["seconds"] < points[-1]["seconds"]


def test_general_ability_changes_with_the_edits(sequential: Path) -> None:
    last = results_of(sequential)["retention"][-1]["general"]
    assert last["perplexity"] != pytest.approx(last["before"], rel=1e-3)


def test_the_time_for_bookkeeping_is_told(sequential: Path) -> None:
    (session,) = results_of(sequential)["sessions"]
    assert 0 < session["bookkeeping_seconds"] < session["seconds"]


def test_peak_memory_is_that_of_all_the_processes_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    much = {"process": 2**50, "gpu": None}  # what one that was broken off had come to
    monkeypatch.setattr(retention, "peak_memory_bytes", lambda: much)
    run_in(tmp_path / "run")
    assert results_of(tmp_path / "run")["memory"]["peak_bytes"] == much


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_other_modes_go_on_too(mode: Any, tmp_path: Path) -> None:
    whole = run_in(tmp_path / "whole", mode=mode, batch_passes=2).results
    broken = tmp_path / "broken"

    class Stop(Exception):
        pass

    def stop() -> None:
        # The first single edits are on the disk, or the batch is edited and its measures have begun.
        if len(Journal(broken / "journal.sqlite", read_only=True).positions()) > 0:
            raise Stop

    with pytest.raises(Stop):
        run_in(broken, mode=mode, listener=Listener(stop), batch_passes=2)
    resumed = run_in(broken, mode=mode, batch_passes=2).results
    assert resumed["metrics"] == whole["metrics"] and resumed["edits"] == len(ASKED)
    assert len(resumed["sessions"]) == 2


def test_texts_about_the_next_subjects_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = texts_written_together(monkeypatch)
    monkeypatch.setattr(sequential_run, "_ASKED_AHEAD", 4)
    run_in(tmp_path, max_steps=1, settling_rounds=0)
    subjects = [request.subject for request in ASKED]
    news = [len(set(subjects[k : k + 4]) - set(subjects[:k])) for k in range(0, len(ASKED), 4)]
    assert asked == [new + len(subjects[k : k + 4]) for new, k in zip(news, range(0, len(ASKED), 4), strict=True)]


def test_an_editor_edits_on_when_its_run_is_over(tmp_path: Path) -> None:
    """And asks a journal no more that is closed."""
    folder, editor = RunFolder(tmp_path / "run"), small_editor(max_steps=1)
    folder.begin({}, {})
    run_edits(editor, ASKED[:2], "sequential", folder=folder)
    folder.close()
    assert len(editor.edit(ASKED[2:4])) == 2
    assert len(list(editor.edit_each(ASKED[4:6]))) == 2


def test_the_seconds_of_an_edit_have_those_of_writing_its_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Continuations._written

    def slowly(self: Continuations, missing: Sequence[Asked]) -> dict[Asked, list[Tokens]]:
        time.sleep(1.0)
        return written(self, missing)

    monkeypatch.setattr(Continuations, "_written", slowly)
    run_in(tmp_path, max_steps=1, settling_rounds=0)
    journal = Journal(tmp_path / "journal.sqlite", read_only=True)
    assert sum(record.seconds for record in journal.records()) > 1.0


# -- requests for the same thing --


def test_conflicts_are_listed_and_what_was_contradicted_does_not_count(tmp_path: Path) -> None:
    again = ASKED[0].model_copy(update={"id": "again"})
    other = ASKED[1].model_copy(update={"target": "Sudland"})
    listener = Listener()
    results = run_in(tmp_path, requests=[*ASKED[:3], again, other], listener=listener, max_steps=30).results
    prompts = [ASKED[0].prompt, ASKED[1].prompt]
    assert results["conflicts"] == [
        {"kind": "duplicate", "prompt": prompts[0], "positions": [0, 3], "targets": ["Ebor", "Ebor"]},
        {"kind": "contradiction", "prompt": prompts[1], "positions": [1, 4], "targets": ["Arvik", "Sudland"]},
    ]
    assert [text for text in listener.said if "the last one wins" in text and repr(prompts[1]) in text]
    assert results["metrics"]["immediate"]["reliability"]["generation"] == 1.0
    assert results["metrics"]["final"]["reliability"]["generation"] == 1.0
    assert results["superseded"] == [1]
    last = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert last[1]["final"][0]["text"] == last[4]["final"][0]["text"]


def test_what_was_contradicted_is_not_asked_whether_it_still_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[int, list[str]]] = []
    measure = Retention.measure

    def note(self: Retention, editor: Any, requests: list[Any], edits: int, *rest: Any) -> dict[str, Any]:
        looked.append((edits, [request.target for request in requests]))
        return measure(self, editor, requests, edits, *rest)

    monkeypatch.setattr(Retention, "measure", note)
    asked = [ASKED[0].model_copy(update={"target": target}) for target in ("Ebor", "Arvik", "Paris")]
    plan = RunPlan(measure_every=1, retained=2, final=1)
    run_in(tmp_path, requests=[ASKED[1], *asked], plan=plan, max_steps=1, settling_rounds=0)
    own = ASKED[1].target
    assert dict(looked) == {1: [own], 2: [own, "Ebor"], 3: [own, "Arvik"], 4: [own, "Paris"]}
    lines = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines if line["final"]] in ([own], ["Paris"])


def test_of_many_conflicts_a_few_are_named_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baft.runs.run._NAMED", 2)
    listener = Listener()
    twice = [request for request in ASKED[:4] for _ in range(2)]
    report = run_in(tmp_path, requests=twice, listener=listener, max_steps=1, settling_rounds=0)
    assert len(report.results["conflicts"]) == 4
    (session,) = report.results["sessions"]
    for said in (session["notes"], [text for text in listener.said if "asked for" in text]):
        assert [text.partition("is asked for")[0].strip() for text in said[:2]] == [repr(r.prompt) for r in ASKED[:2]]
        assert said[2:] == ["2 more prompts are asked for several times: results.json lists them under conflicts"]


def test_targets_that_were_true_already_are_counted_aloud(tmp_path: Path) -> None:
    true = [request.model_copy(update={"ground_truth": (request.target,)}) for request in ASKED[:2]]
    others = [ASKED[2].model_copy(update={"ground_truth": ("Nowhere",)}), ASKED[3]]
    listener = Listener()
    (session,) = run_in(tmp_path, requests=true + others, listener=listener, max_steps=1).results["sessions"]
    said = "2 requests have a target that was true already: nobody says what it replaces"
    assert said in listener.said and said in session["notes"]


def test_only_what_is_edited_in_contradicts() -> None:
    requests = [ASKED[0].model_copy(update={"target": target}) for target in ("Ebor", "Arvik", "Ebor", "Paris")]
    found = conflicts(requests)
    assert can_hold(found, range(4)) == [3]
    assert can_hold(found, range(3)) == can_hold(found, [0, 1, 2]) == [0, 2]  # before it came to the last one
    assert can_hold(found, range(4), given_up={3}) == [0, 2, 3]
    assert can_hold(found, [0, 1], given_up={1}) == [0, 1]
    assert conflicts([ASKED[0], ASKED[0].model_copy(update={"prompt": f"{ASKED[0].prompt} "})]) == []


# -- checkpoints --


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "generator": torch.Generator().get_state()}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest(10) is None and checkpoints.due(1)
    checkpoints.write(7, state)
    checkpoints.write(9, {"a": torch.zeros(1)})
    known = Checkpoints(tmp_path / "checkpoints").newest(8)
    assert known is not None and known.done == 7
    assert known.state.keys() == state.keys() and all(torch.equal(known.state[name], state[name]) for name in state)


def test_a_full_disk_leaves_the_checkpoints_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.write(1, {"a": torch.zeros(1)})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(2, {"a": torch.ones(1)})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000001"]
    assert checkpoints.newest(5) is not None


def test_one_that_cannot_be_read_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system that stutters must not cost days of training."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for done in (1, 2):
        checkpoints.write(done, {"a": torch.full((1,), float(done))})

    def stutter(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", stutter)
        with pytest.raises(OSError, match=r"checkpoints/000000002 can't be read: .*Input/output.*nothing was changed"):
            checkpoints.newest(5)
    assert checkpoints.counts() == [1, 2] and checkpoints.damaged == []
    known = checkpoints.newest(5)
    assert known is not None and known.done == 2


@pytest.mark.parametrize("damage", ["missing", "cut off", "no JSON"])
def test_a_damaged_one_is_set_aside_until_the_run_is_as_far_again(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    for done in (2, 4):
        checkpoints.write(done, {"a": torch.zeros(1)})
    state, description = (folder / "000000004" / name for name in ("state.safetensors", "checkpoint.json"))
    if damage == "missing":
        state.unlink()
    elif damage == "cut off":
        state.write_bytes(state.read_bytes()[:-1])
    else:
        description.write_text("{")
    known = checkpoints.newest(5)
    assert known is not None and known.done == 2
    (said,) = checkpoints.damaged
    assert "000000004 is damaged" in said
    assert checkpoints.counts() == [2] and description.name in os.listdir(folder / "000000004.damaged")
    checkpoints.write(3, {"a": torch.zeros(1)})
    assert (folder / "000000004.damaged").exists()
    checkpoints.write(5, {"a": torch.zeros(1)})
    assert sorted(os.listdir(folder)) == ["000000002", "000000003", "000000005"]


def test_going_back_takes_damaged_ones_along(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    for done in (2, 4):
        checkpoints.write(done, {"a": torch.zeros(1)})
        (folder / f"{done:09d}" / "state.safetensors").unlink()
    assert checkpoints.newest(5) is None
    checkpoints.cut(3)
    assert os.listdir(folder) == ["000000002.damaged"]


def test_a_kill_in_the_middle_of_removing_one_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    for done in (1, 2):
        checkpoints.write(done, {"a": torch.zeros(1)})

    def killed(path: Path, **_: object) -> None:
        (path / "state.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", killed)
        checkpoints.cut(1)
    assert checkpoints.counts() == [1]
    Checkpoints(folder)
    assert os.listdir(folder) == ["000000001"]


def test_kept_checkpoints_are_few_and_near(tmp_path: Path) -> None:
    """Written after every edit, thinned each time: at any age one isn't further away than about its age."""
    counts: list[int] = []
    for edits in range(1, 3000):
        counts = sorted(kept([*counts, edits]))
        assert len(counts) <= 2 * edits.bit_length() + 2
        assert counts[-1] == edits
    for wanted in range(1, 2999):
        found = max((count for count in counts if count <= wanted), default=0)
        assert wanted - found <= 2 * (2999 - wanted) + 2, wanted


def test_checkpoints_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 2.0, 150.0, 202.5])  # made; begun, written in 2 s; asked 148 s later, and 200 s later
    monkeypatch.setattr("baft.runs.checkpoints.time.monotonic", lambda: next(clock))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.write(1, {"a": torch.zeros(1)})
    assert not checkpoints.due(2)
    assert checkpoints.due(3)


# -- journal --


def test_a_full_disk_loses_nothing_that_was_written(sequential: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.begin_session(0)
    records = list(Journal(sequential / "journal.sqlite", read_only=True).records())
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
    sequential: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1, and not 2: the input is as it should be."""
    path = tmp_path / "journal.sqlite"
    path.write_bytes((sequential / "journal.sqlite").read_bytes())
    monkeypatch.setattr("baft.runs.journal._PATIENCE", 0)
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


def test_damage_that_is_found_late_is_named(sequential: Path, tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    content = bytearray((sequential / "journal.sqlite").read_bytes())
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
    sequential: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be gigabytes of it."""
    monkeypatch.setattr("baft.runs.journal._PIECE", 4096)
    sent: list[bytes | None] = []
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda values: sent.extend(values))
    first = Journal(sequential / "journal.sqlite")
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


def test_several_records_are_written_together_or_not_at_all(sequential: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    records = list(Journal(sequential / "journal.sqlite", read_only=True).records())
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


def interrupt_after(folder: Path, edits: int) -> Callable[[], None]:
    def interrupt() -> None:
        if len(Journal(folder / "journal.sqlite", read_only=True).positions()) == edits:
            raise KeyboardInterrupt

    return interrupt


def test_who_reads_slowly_does_not_stop_who_writes(sequential: Path, tmp_path: Path) -> None:
    records = list(Journal(sequential / "journal.sqlite", read_only=True).records())
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


def test_records_come_in_pages_without_a_gap(sequential: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(sequential / "journal.sqlite", read_only=True)
    for page in (1, 2, 9, 100):
        monkeypatch.setattr("baft.runs.journal._PAGE", page)
        assert [record.index for record in journal.records()] == list(range(9))
        assert [record.index for record in journal.records(3, limit=4)] == [3, 4, 5, 6]
        assert [record.index for record in journal.records(limit=0)] == []


def test_a_journal_can_be_read_after_a_kill_in_the_middle_of_a_transaction(sequential: Path, tmp_path: Path) -> None:
    """What is left of the transaction beside the file is taken back by whoever comes first, readers too."""
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    records = list(Journal(sequential / "journal.sqlite", read_only=True).records())
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


# -- retention --


def test_milestones() -> None:
    assert [n for n in range(1, 1900) if is_milestone(n)] == [1, 10, 100, 1000]
    later = [2000, 5000, 10_000, 20_000, 50_000, 100_000]
    assert [n for n in range(1900, 100_100) if is_milestone(n)] == later
    assert [n for n in range(1, 30) if is_milestone(n, 8)] == [1, 8, 10, 16, 24]


def test_samples_of_a_growing_history_share_all_that_they_can() -> None:
    whole = list(range(500))
    before: set[int] = set()
    for size in range(1, 500):
        now = set(sample(whole[:size], 40))
        assert len(now) == min(size, 40)
        assert len(now - before) <= 1  # whoever joined
        before = now


# -- identity --


def test_differences_name_what_differs() -> None:
    before = {"mode": "batch", "config": {"rank": 4, "layers": None}, "code": "abc"}
    now = {"mode": "batch", "config": {"rank": 8, "layers": None}, "code": "abd"}
    assert differences(before, now) == ["config.rank was 4 and is 8", 'code was "abc" and is "abd"']
    assert differences(before, before) == []


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_code_is_that_of_its_own_checkout(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("x = 1\n")

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert commit_of(package) is None
    git("init")
    git("commit", "--allow-empty", "-m", "something else")
    assert commit_of(package) is None  # as an environment in a project's folder
    git("add", ".")
    git("commit", "-m", "code")
    commit = git("rev-parse", "HEAD").strip()
    assert commit_of(package) == commit
    (package / "code.py").write_text("x = 2\n")
    assert commit_of(package) == f"{commit}-dirty"


def test_a_model_is_known_by_its_weights() -> None:
    model = tiny_model()
    known = hash_of_model(model)
    assert hash_of_model(tiny_model()) == known
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        kept_bits = weight.clone()
        weight[0, 0] += 1e-3
        assert hash_of_model(model) != known
        weight.copy_(kept_bits)
        weight[[0, 1]] = weight[[1, 0]]  # the same numbers in other places
        assert hash_of_model(model) != known
        weight[[0, 1]] = weight[[1, 0]]
    assert hash_of_model(model) == known
