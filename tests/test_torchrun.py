"""The command under torchrun: two processes give what one gives, and what was broken off ends as if it never had been.

What they compute together is compared in ``test_distributed.py``; here it is what a person types.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import LOOPBACK, PATIENCE
from small_runs import ASKED, small_editor
from tiny import one_thread, tiny_model, tiny_tokenizer

from baft.cli import main
from baft.runs.journal import Journal
from baft.runs.outcome import outcome

__all__ = ["one_thread"]

DYING = Path(__file__).with_name("dying.py")


def under_torchrun(
    *arguments: object, program: tuple[object, ...] = ("-m", "baft.cli")
) -> subprocess.CompletedProcess[str]:
    """Two processes of the command, with one thread each."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    return subprocess.run(
        [sys.executable, *map(str, (*torchrun, *program, *arguments))],
        env={**os.environ, "OMP_NUM_THREADS": "1"} | LOOPBACK,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def alone(*arguments: object) -> None:
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["baft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """What starts a run of tiny edits, but for its mode and its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(max_position_embeddings=128).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    records = "".join(request.model_dump_json() + "\n" for request in ASKED)
    (folder / "requests.jsonl").write_text(records)
    (folder / "config.yaml").write_text(yaml.safe_dump(small_editor().config.model_dump(mode="json")))
    places = ("--model", folder / "model", "--dataset", folder / "requests.jsonl", "--config", folder / "config.yaml")
    return (*places, "--edits", 6, "--checkpoint-every", 4)


@pytest.fixture(scope="module")
def of_two(words: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequential run of two processes that was never broken off."""
    folder = tmp_path_factory.mktemp("runs") / "of two"
    done = under_torchrun("run", *words, "--mode", "sequential", "--out", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Figures:") == 1  # one of them has printed
    return folder


def test_single_edits_are_bit_for_bit_those_of_one_process(words: tuple[object, ...], tmp_path: Path) -> None:
    """Each is trained by itself."""
    single = (*words, "--mode", "single", "--slots", 1)
    alone("run", *single, "--out", tmp_path / "of one")
    done = under_torchrun("run", *single, "--out", tmp_path / "of two", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)  # one process has printed, and nothing else
    assert results == json.loads((tmp_path / "of two" / "results.json").read_text())
    assert results["timing"]["processes"] == 2
    assert outcome(tmp_path / "of two") == outcome(tmp_path / "of one")


def test_a_sequence_is_that_of_one_process_within_rounding(
    words: tuple[object, ...], of_two: Path, tmp_path: Path
) -> None:
    alone("run", *words, "--mode", "sequential", "--out", tmp_path / "of one")
    two, one = (outcome(folder) for folder in (of_two, tmp_path / "of one"))
    for records in zip(two.pop("records"), one.pop("records"), strict=True):
        losses, expected = (record["training"].pop("losses") for record in records)
        assert losses == pytest.approx(expected, rel=1e-3)
        assert records[0] == records[1]  # what was said, word for word
    assert two["metrics"] == one["metrics"] and two["fluency"] == one["fluency"]


def test_a_sequence_whose_process_is_killed_goes_on_as_if_it_had_not_been(
    words: tuple[object, ...], of_two: Path, tmp_path: Path
) -> None:
    """The killed one is not the one that writes, which is left to notice."""
    sequential = ("run", *words, "--mode", "sequential", "--out", tmp_path)
    killed = under_torchrun(*sequential, program=(DYING, 1, 5))
    assert killed.returncode == 1 and "exitcode: -9" in killed.stderr
    # The fifth was made; torchrun ends the other process, before or after it has written that down.
    assert len(Journal(tmp_path / "journal.sqlite", read_only=True).positions()) in (4, 5)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000004"]
    resumed = under_torchrun("run", "--resume", "--out", tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(tmp_path) == outcome(of_two)
