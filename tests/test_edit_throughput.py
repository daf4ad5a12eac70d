"""bench/edit_throughput.py: that plain editing and ours do the same, and what is told of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import edit_throughput  # after the benchmarks' folder is known
from contenders import TASKS, Subject, edit_ours, edit_plainly, plain_editor, plain_text
from peak_memory import PeakMemory
from plain_editing import generate_one_by_one, generate_with_cache
from tiny import tiny_model, tiny_tokenizer

from baft import EditRequest
from baft.editing import Mode
from baft.engine.encoding import Encoder
from baft.engine.options import EngineOptions

REQUESTS = [EditRequest(prompt=f"the {name} of", target=target) for name, target in (("red", "a dog"), ("one", "cats"))]
OVERRIDES = {"rank": 4, "max_steps": 3, "batch_passes": 3, "stop_below": 0.0, "unrelated_per_step": 4}


@pytest.fixture
def subject() -> Subject:
    texts = [f"text {k} of the red house" for k in range(8)]
    return Subject("tiny", tiny_model(), tiny_tokenizer(), REQUESTS, texts, OVERRIDES)


@pytest.mark.parametrize("task", TASKS)
def test_both_begin_with_the_same_loss(subject: Subject, task: str) -> None:
    with plain_editor(subject, task) as (plain, draw_for):
        plainly = []
        for number in (0, 1):
            plain.restart()
            plainly.append(plain.step(*draw_for([number])()))
    editor = subject.editor(task, EngineOptions())
    ours = [outcome.curve.losses[0] for outcome in editor.edit(REQUESTS, "single")]
    torch.testing.assert_close(torch.tensor(plainly), torch.tensor(ours))
    assert abs(ours[0] - ours[1]) > 1e-3  # or it wouldn't show whose they are


@pytest.mark.parametrize("mode", get_args(Mode))
def test_both_take_the_steps_that_are_counted(subject: Subject, mode: Mode) -> None:
    plain = edit_plainly(subject, mode, "edit + locality", 2, rounds=3)
    ours = edit_ours(subject, mode, "edit + locality", 2, EngineOptions())
    assert plain.steps == ours.steps == (3 if mode == "batch" else 6)
    assert (plain.edits, ours.edits) == (None if mode == "batch" else 2, 2)


def test_the_bench_prints_its_table_and_draws_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(edit_throughput, "load", lambda options: dataclasses.replace(subject, name="qwen2.5"))
    sizes = "--requests 2 --plain-requests 1 --rounds 1".split()
    for arguments in (["--variants", "ours", "- replay", "+ CUDA graphs", *sizes], ["--slots", "1", "9", *sizes]):
        monkeypatch.setattr(sys, "argv", ["edit_throughput.py", *arguments, "--out", str(tmp_path)])
        edit_throughput.main()
        assert f"Saved: {tmp_path}" in capsys.readouterr().out.replace("\n", "")
    stem = str(tmp_path / "edit_throughput_qwen2.5_cpu")
    rows = json.loads(Path(f"{stem}.json").read_text())["rows"]
    timed = [row for row in rows if "times_plain" in row]
    assert [(row["mode"], row["task"], row["variant"]) for row in timed] == [
        (mode, task, variant)
        for mode in ("single", "sequential", "batch")
        for task in TASKS
        for variant in ("plain", "ours", "- replay")
    ]
    for row in timed:
        plain = next(r for r in timed if (r["mode"], r["task"]) == (row["mode"], row["task"]))
        assert row["times_plain"] == pytest.approx(plain["seconds_per_step"] / row["seconds_per_step"])
    assert [row["slots"] for row in timed if row["mode"] == "single"] == [None, 2, 2] * len(TASKS)
    table = Path(f"{stem}.md").read_text().splitlines()
    assert table[0].startswith("| mode | task | variant |") and len(table[2].split("|")) == len(table[0].split("|"))
    curve = Path(str(stem).replace("throughput_", "throughput_slots_") + ".md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in curve[2:8]] == ["1", "2"] * len(TASKS)  # as many as there are requests
    for picture in (f"{stem}.png", str(stem).replace("throughput_", "throughput_slots_") + ".png"):
        assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_all_ways_of_asking_get_the_same_answers(subject: Subject) -> None:
    encoder = Encoder(subject.tokenizer, append_eos=False)
    prompts = [plain_text(encoder.prompt(request.prompt)) for request in REQUESTS]
    ways = [
        [text.ids for text in generate(subject.model, prompts, 8, subject.tokenizer.eos_token_id)]
        for generate in (generate_one_by_one, generate_with_cache)
    ]
    assert ways[0] == ways[1]
    found = edit_throughput.compare_asking(subject, argparse.Namespace(rounds=1))
    assert found["same"] == 1 and found["questions"] == len(REQUESTS)
    assert min(found["plain"], found["cached"], found["ours"]) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process anew")
def test_memory_is_the_highest_point_since_the_beginning() -> None:
    before = torch.ones(32 << 18)  # 32 MiB
    memory = PeakMemory(torch.device("cpu"))
    for size in (8, 64, 16):
        torch.ones(size << 18)
    found = memory.bytes()
    assert found is not None and 60 <= found / 2**20 < 92  # the system counts by the way, in steps
    idle = PeakMemory(torch.device("cpu")).bytes()
    assert idle is not None and idle < 16 << 20
    del before


def test_where_nothing_tells_there_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert PeakMemory(torch.device("cpu")).bytes() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert PeakMemory(torch.device("cpu")).bytes() is None
