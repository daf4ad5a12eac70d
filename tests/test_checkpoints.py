"""Checkpoints: whole or not at all, few, and none lost to a disk that is full, damaged or slow."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from baft.runs.checkpoints import Checkpoints, kept


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
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoints/000000002'"):
        checkpoints.write(2, {"a": torch.ones(1)})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000001"]
    assert checkpoints.newest(5) is not None


@pytest.mark.parametrize(("function", "left"), [("shutil.rmtree", 1.0), ("pathlib.Path.rename", 0.0)])
def test_one_that_takes_the_place_of_another_leaves_one_of_them_wherever_it_is_stopped(
    function: str, left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each part of a settling round does."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.write(1, {"a": torch.zeros(1)})
    rename = Path.rename

    def stop(path: Path, *target: Path, **_: object) -> object:
        if target and not path.name.startswith(".1."):
            return rename(path, *target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(function, stop)
        checkpoints.write(1, {"a": torch.ones(1)})
    known = Checkpoints(tmp_path / "checkpoints").newest(1)
    assert known is not None and known.state["a"].item() == left


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


DAMAGES = {
    "missing": "it has no state.safetensors",
    "cut off": "state.safetensors isn't what was written: it has another sum than in checkpoint.json",
    "no JSON": "checkpoint.json describes nothing",
    "no object": "checkpoint.json describes nothing",
    "an older one's": "expected format 2 in checkpoint.json, got 1",
    "another's": "checkpoint.json is that of another one, after 2 edits and rounds",
}


@pytest.mark.parametrize("damage", DAMAGES)
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
    elif damage == "another's":
        description.write_bytes((folder / "000000002" / description.name).read_bytes())
    else:
        description.write_text({"no JSON": "{", "no object": "1", "an older one's": '{"format": 1}'}[damage])
    known = checkpoints.newest(5)
    assert known is not None and known.done == 2
    (said,) = checkpoints.damaged
    assert said == f"checkpoint {folder}/000000004 is damaged: {DAMAGES[damage]}"
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
