"""How commands end before their end: real signals and full disks, what is said then, and that nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from small_runs import ASKED
from tiny import one_thread, tiny_model, tiny_tokenizer

from baft.cli import main
from baft.cli.endings import Ended, ending_with, stopped_alike
from baft.runs.folder import JOURNAL
from baft.runs.outcome import outcome
from baft.testbed.training import TrainingReport

__all__ = ["one_thread"]

# What takes long to import, before the processes are forked that need it.
for module in ("baft.cli.commands", "baft.report.overview", "baft.runs.logs", "baft.runs.start", "baft.runs.undo"):
    import_module(module)

PATIENCE = 120.0
INTERRUPT, TERMINATE, HANG_UP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
CONFIG = """{rank: 24, layers: [0, 1, 2], backend: reference, rate_width: null, learning_rate: 0.06, max_steps: 3,
consolidate_every: 3, settling_rounds: 3, batch_size: 4, unrelated_per_step: 2, subject_texts: 3}"""


@dataclass(frozen=True)
class Done:
    returncode: int | None
    output: str

    @property
    def last(self) -> str:
        assert "Traceback" not in self.output
        return self.output.rstrip("\n").rpartition("\n")[2]


def baft(
    *arguments: object,
    scratch: Path,
    ready: Callable[[], None] = lambda: None,
    stop: signal.Signals | None = None,
    after: Callable[[], object] = lambda: None,
) -> Done:
    """Run the command in a process of its own: a fork, which saves importing torch.

    Args:
        scratch: a folder for what it prints, both streams as they come.
        ready: called there first.
        stop: what it is sent, if it still runs, when ``after`` has returned.
    """
    process = multiprocessing.get_context("fork").Process(target=_enter, args=(arguments, scratch, ready))
    process.start()
    if stop:
        after()
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, stop)
    process.join(PATIENCE)
    process.kill()
    return Done(process.exitcode, (scratch / "output").read_text())


def _enter(arguments: tuple[object, ...], scratch: Path, ready: Callable[[], None]) -> None:
    output = os.open(scratch / "output", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
    sys.argv = ["baft", *map(str, arguments)]
    ready()
    main()


@dataclass(frozen=True)
class Pause:
    """Has a process wait, as it calls a function for the n-th time, for what it is sent."""

    function: str
    call: int
    marker: Path

    def __call__(self) -> None:
        original, left = resolve_name(self.function), iter(range(self.call - 1))

        def wait(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is not None:
                return original(*arguments, **options)
            self.marker.touch()
            time.sleep(PATIENCE)
            raise AssertionError("nobody stopped it")

        pytest.MonkeyPatch().setattr(self.function, wait)

    def reached(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.marker.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.marker.unlink()


def stopped_in(function: str, call: int, by: signal.Signals, *arguments: object, scratch: Path) -> Done:
    pause = Pause(function, call, scratch / "marker")
    return baft(*arguments, scratch=scratch, ready=pause, stop=by, after=pause.reached)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """What starts the run that is stopped here, but for where it goes."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model(max_position_embeddings=128).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    asked = [request.model_dump(mode="json") for request in ASKED]
    records = [{**fields, "prompt": f"{number}: {fields['prompt']}"} for number in range(60) for fields in asked]
    (folder / "facts.json").write_text(json.dumps(records))
    (folder / "config.yaml").write_text(CONFIG)
    files = ("--model", folder / "model", "--dataset", folder / "facts.json", "--config", folder / "config.yaml")
    return ("run", *files, "--mode", "sequential", "--edits", 8, "--measure-every", 4, "--log", "csv")


@pytest.fixture(scope="module")
def whole(words: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing ended before its end."""
    scratch = tmp_path_factory.mktemp("whole")
    done = baft(*words, "--out", scratch / "run", scratch=scratch)
    assert done.returncode == 0, done.output
    return scratch / "run"


# -- stopped --

# Where it was, at what call of that, by what, and what it says is kept.
STAGES = [
    ("baft.runs.start.identify", 1, TERMINATE, "the run hadn't begun, and the same command starts it again"),
    ("baft.runs.sequential.SequentialRun._ask_ahead", 1, INTERRUPT, "0 edits are kept"),
    ("baft.trained.edit_next", 2, TERMINATE, "1 edit is kept"),
    ("baft.runs.journal._write_measures", 2, HANG_UP, "2 edits are kept"),
    ("baft.runs.checkpoints._write_through", 2, INTERRUPT, "3 edits are kept"),
    ("baft.trained.settle", 2, TERMINATE, "8 edits are kept"),
    ("baft.runs.run._measure", 1, INTERRUPT, "8 edits are kept"),
    ("baft.storage.save_editor", 1, TERMINATE, "8 edits are kept"),
    ("baft.report.write_report", 1, INTERRUPT, "all is kept, but the report isn't written"),
]


def test_a_run_that_is_stopped_says_what_is_kept_and_goes_on(
    words: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a run"
    for function, call, by, kept in STAGES:
        began = (out / "run.json").exists()
        command = ("run", "--resume", "--out", out) if began else (*words, "--out", out)
        done = stopped_in(function, call, by, *command, scratch=tmp_path)
        way_on = f": `baft run --resume --out '{out}'` goes on from there" if "starts it again" not in kept else ""
        what = "Ctrl-C" if by == INTERRUPT else by.name
        assert (done.last, done.returncode) == (f"baft: stopped by {what}; {kept}{way_on}", 1), function
    done = baft("run", "--resume", "--out", out, scratch=tmp_path)
    assert done.returncode == 0 and (out / "report.html").exists()
    assert outcome(out) == outcome(whole)
    assert "otherwise" not in str(json.loads((out / "results.json").read_text())["sessions"])


def test_a_run_that_is_stopped_anywhere_ends_as_the_whole_one(
    words: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    draw, stops, out = random.Random(0), 0, tmp_path / "run"
    while not (out / "results.json").exists():
        command = ("run", "--resume", "--out", out) if (out / "run.json").exists() else (*words, "--out", out)
        stop = (INTERRUPT, TERMINATE)[stops % 2] if stops < 6 else None
        done = baft(*command, scratch=tmp_path, stop=stop, after=lambda: time.sleep(draw.uniform(0.3, 1.5)))
        stops += done.returncode != 0
        assert done.returncode == 0 or done.last.startswith("baft: stopped by "), done.output
    assert stops
    assert outcome(out) == outcome(whole)


def test_taking_edits_back_that_is_stopped_says_how_it_goes_on(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    begun, before = "baft.runs.sequential.SequentialRun.restore", "baft.runs.start.identify"
    for command, number in (("rollback", 4), ("drop", 1)):
        again = f"`baft edits {command} {run} {number} --yes`"
        arguments = ("edits", command, run, number, "--yes")
        done = stopped_in(before, 1, TERMINATE, *arguments, scratch=tmp_path)
        assert (done.returncode, done.last) == (1, f"baft: stopped by SIGTERM; no edit was taken back: {again} does it")
        done = stopped_in(begun, 1, INTERRUPT, *arguments, scratch=tmp_path)
        if command == "rollback":
            kept = f"the edits before 4 are kept: {again} goes on from there"
            assert baft(*arguments, scratch=tmp_path).returncode == 0
        else:
            kept = f"request 1 is left out: `baft run --resume --out {run}` goes on from there"
        assert (done.returncode, done.last) == (1, f"baft: stopped by Ctrl-C; {kept}")
    assert baft("run", "--resume", "--out", run, scratch=tmp_path).returncode == 0
    assert [record["index"] for record in outcome(run)["records"]] == [0, 2, 3, 4, 5, 6, 7]


def test_a_command_that_nothing_is_kept_of_says_so(words: tuple[object, ...], whole: Path, tmp_path: Path) -> None:
    arguments = ("eval", "--model", words[2], "--adapter", whole / "adapter")
    done = stopped_in("baft.evaluation.measures.Evaluator.record_base", 1, TERMINATE, *arguments, scratch=tmp_path)
    assert (done.returncode, done.last) == (1, "baft: stopped by SIGTERM; the same command starts it again")


@pytest.mark.parametrize(("number", "name"), [(INTERRUPT, "Ctrl-C"), (TERMINATE, "SIGTERM")])
def test_a_command_may_be_stopped_while_it_imports(number: signal.Signals, name: str, tmp_path: Path) -> None:
    """Which takes seconds."""
    (tmp_path / "torch.py").write_text(f"import os, time\nos.kill(os.getpid(), {number.value})\ntime.sleep(60)\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "baft.cli", "info"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"baft: stopped by {name}; the same command starts it again\n"


def test_what_a_process_is_told_to_ignore_stays_ignored() -> None:
    """By nohup, say; and outside the command all is as before."""
    handlers = [signal.getsignal(number) for number in (INTERRUPT, TERMINATE, HANG_UP)]
    signal.signal(HANG_UP, signal.SIG_IGN)
    try:
        with pytest.raises(Ended, match=r"^stopped by SIGTERM; that is all$"), stopped_alike():
            assert callable(signal.getsignal(TERMINATE))  # or it would end the tests
            signal.raise_signal(HANG_UP)
            with ending_with(lambda _: "that is all"):
                signal.raise_signal(TERMINATE)
    finally:
        signal.signal(HANG_UP, handlers[-1])
    assert [signal.getsignal(number) for number in (INTERRUPT, TERMINATE, HANG_UP)] == handlers


def test_who_asks_twice_gets_the_same_words() -> None:
    """Once it ends, nothing breaks off the saying of how to go on."""

    def way_on(_: BaseException) -> str:
        for number in (INTERRUPT, TERMINATE, HANG_UP):
            signal.raise_signal(number)
        return "that is all"

    with pytest.raises(Ended, match=r"^stopped by SIGTERM; that is all$"), stopped_alike(), ending_with(way_on):
        signal.raise_signal(TERMINATE)


def test_a_process_that_is_forked_ends_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    """One of a library's, which it ends by a signal when it has done its work."""
    with stopped_alike():
        process = multiprocessing.get_context("fork").Process(target=signal.raise_signal, args=(TERMINATE,))
        process.start()
        process.join(PATIENCE)
    assert (process.exitcode, capfd.readouterr().err) == (-TERMINATE, "")


def test_of_several_processes_one_says_that_they_were_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with stopped_alike():
        assert callable(signal.getsignal(TERMINATE))  # another launcher's, of processes that know nothing of each other
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stopped_alike():
        assert signal.getsignal(TERMINATE) is signal.SIG_DFL  # it ends at once, without a word
        with pytest.raises(SystemExit, match=r"^1$"), ending_with(lambda _: "that is all"):
            signal.raise_signal(INTERRUPT)
        with pytest.raises(OSError, match=r"^the disk$"), ending_with(lambda _: "that is all"):
            raise OSError("the disk")


# -- a disk that is full --


def leave_room(size: int) -> None:
    """For files of so many bytes each, which stands for what there is on a disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_run_that_fills_the_disk_goes_on_when_there_is_room(
    words: tuple[object, ...], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    resume = ("run", "--resume", "--out", out)
    state, journal = ((whole / name).stat().st_size for name in ("checkpoints/000000011/state.safetensors", JOURNAL))

    def fill(room: int, file: str, kept: str | None) -> None:
        command = resume if (out / "run.json").exists() else (*words, "--out", out)
        done = baft(*command, scratch=tmp_path, ready=partial(leave_room, room))
        way_on = f"; {kept}once that is mended, `baft run --resume --out {out}` goes on from there"
        says = rf"baft: .*{out}/{file}\b.*{'' if kept is None else way_on}"
        assert re.fullmatch(says, done.last) and done.returncode == 1, done.output

    fill(1 << 10, "run.json", None)
    fill(40 << 10, JOURNAL, "")  # it isn't even made
    fill(state - 100, "checkpoints/000000001", "1 edit is kept: ")
    fill(journal - 1, JOURNAL, r"\d edits are kept: ")
    assert baft(*resume, scratch=tmp_path).returncode == 0
    (out / "report.html").unlink()
    fill(20 << 10, "report.png", "all is kept, but the report isn't written: ")
    assert baft(*resume, scratch=tmp_path).returncode == 0 and (out / "report.html").exists()
    assert outcome(out) == outcome(whole)


def test_a_testbed_that_fills_the_disk_is_not_there(tmp_path: Path) -> None:
    """safetensors tells of it by an error of its own."""

    def fill() -> None:
        trained = (tiny_model(), tiny_tokenizer(), TrainingReport(parameters=1, steps=1, seconds=1.0, recall=1.0))
        pytest.MonkeyPatch().setattr("baft.testbed.folder.train_testbed", lambda *_, **__: trained)
        leave_room(1 << 16)

    facts = [{"prompt": f"{name} was born in", "target": "Bern", "ground_truth": "Oslo"} for name in ("Ada", "Bob")]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    out = tmp_path / "model"
    done = baft("testbed", "--dataset", tmp_path / "facts.json", "--out", out, scratch=tmp_path, ready=fill)
    assert done.returncode == 1 and re.fullmatch(f"baft: {out}: .*File too large.*", done.last)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.json", "output"]
