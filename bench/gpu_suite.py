"""Is it right on this GPU, and how fast is it? One command, for a machine that one has for minutes only.

    python bench/gpu_suite.py                              every step, in under eight minutes
    python bench/gpu_suite.py --only machine calls_cuda    some of them
    python bench/gpu_suite.py --rehearse                   the same steps without a GPU, at tiny sizes

Each step's commands are processes of their own, with a limit of time: what crashes, hangs or spoils its CUDA context
takes no other step along, and what can't run here says why. Three files come of it, in bench/results or in --out:
gpu_suite_GPU.json has every step's status and numbers, written anew after each; gpu_suite_GPU.log the whole output;
gpu_suite_GPU.zip the files that the benchmarks save. Exit status 0: none failed or timed out.

It runs from a plain checkout, baft-kernels not installed; one without git says its commit in BAFT_COMMIT. The CUDA
kernels are built for this GPU, by nvcc, unless a baft_kernels/_cuda.abi3.so is there that was built from these sources,
here or elsewhere: copy it along, and the minute that nvcc takes is left for the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import report  # noqa: E402  # after the folders of this checkout are known
import torch  # noqa: E402
from gpu_programs import MARK, NOBODY, device  # noqa: E402
from variants import RIVALS  # noqa: E402

PYTHON = sys.executable
GRACE = 5.0  # seconds from asking a command to stop, so that pytest can write its report, to killing it
TINY = "--rows 1 --d 64 --dtypes float32 --no-compile --rounds 2"
GPU_STATE = "name,driver_version,compute_cap,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


class Failed(Exception):
    """How a step ended; the message says why."""

    status = "failed"


class TimedOut(Failed):
    status = "timed out"


class Skipped(Failed):
    status = "skipped"


BAD = (Failed.status, TimedOut.status)
REHEARSED = "a rehearsal runs nothing on a GPU"
GPU_BACKENDS = ("cuda", "triton")
UP_TO_DATE = "is up to date"  # what setup.py says of a library that needn't be built


# -- commands --


@dataclass
class Stage:
    """What a step works with: the log, folders, the time it has, its last command's output, the numbers it finds."""

    gpu: str
    rehearsal: bool
    log: Path
    results: Path
    scratch: Path
    deadline: float = 0.0
    output: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def run(self, *command: object, **environment: str) -> None:
        """Run a command, its output to the log; what it started ends with it.

        Raises:
            Failed: unless it succeeds, in the time that the step has left.
        """
        limit = self.deadline - time.monotonic()
        if limit <= 0:
            raise TimedOut(f"no time was left for {command[0]}")
        arguments = list(map(str, command))
        self.note("$ " + shlex.join(arguments).replace(PYTHON, "python").replace(f"{ROOT}/", ""))
        begin = self.log.stat().st_size
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                arguments, cwd=ROOT, env=_environment(self.rehearsal) | environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise TimedOut(f"after {limit:.0f} s, at: {gist(self._logged(begin))}") from None
        finally:
            _end_group(process)
            self.output = self._logged(begin)
            for printed in re.findall(rf"^{MARK}(\{{.*\}})$", self.output, re.MULTILINE):
                self.numbers |= json.loads(printed)
        if process.returncode:
            raise Failed(_reason(process.returncode, self.output))

    def program(self, name: str, *arguments: object, under: Sequence[str] = (), **environment: str) -> None:
        """Run a program of gpu_programs.py, under a tool perhaps."""
        self.run(*under, PYTHON, HERE / "gpu_programs.py", name, *arguments, **environment)

    def backend(self, name: str) -> str:
        """What stands in for a GPU's backend in a rehearsal."""
        return "cpu" if self.rehearsal else name

    def note(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(f"\n{text}\n")

    def _logged(self, begin: int) -> str:
        return self.log.read_bytes()[begin:].decode(errors="replace")


def gist(output: str) -> str:
    """What the output of a command comes down to: the exception that ended it, or else its last line."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    raised = [line for line in lines[-8:] if re.match(r"[\w.]+(Error|Exception): ", line)]
    return (raised or lines or ["no output"])[-1][:250]


def _reason(status: int, output: str) -> str:
    if status > 0:
        return gist(output)
    before = output.partition("Fatal Python error")[0]  # where faulthandler begins
    return f"{signal.Signals(-status).name} after: {gist(before)}"


def _environment(rehearsal: bool) -> dict[str, str]:
    """For commands: this checkout's packages, output as it comes, and a build of what runs here, which must succeed."""
    folders = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "COLUMNS": "200"}
    if rehearsal:
        settings |= {"BAFT_BUILD_CPU": "1", "BAFT_BUILD_CUDA": "0"}
    else:
        major, minor = torch.cuda.get_device_capability()
        settings |= {"BAFT_BUILD_CPU": "0", "BAFT_BUILD_CUDA": "1", "BAFT_CUDA_ARCHITECTURES": f"{major}{minor}a"}
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(folders)}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started: they are asked to stop, then killed."""
    for demand in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, demand)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


# -- the steps: each returns a line that sums it up, or raises Failed --


def build(stage: Stage) -> str:
    """The CUDA kernels, in place, unless they are there; in a rehearsal, those for the CPU."""
    command = (PYTHON, "setup.py", "build_ext", "--inplace")
    stage.run(*command)
    if UP_TO_DATE not in stage.output:
        return "built in place"
    try:
        stage.run(PYTHON, "-c", "import torch, baft_kernels._cuda")
    except Failed as end:
        stage.note(f"The library that is there doesn't load: {end}")
        stage.run(*command, "--force")
        return f"built in place, since the one that was there doesn't load: {end}"
    return "not built: a library of these sources is there already"


def machine(stage: Stage) -> str:
    """What there is: versions, which backends are usable, the GPU with its driver, clocks and temperature.

    Raises:
        Failed: if a GPU's backend isn't usable, for then most of the other steps say nothing of it.
    """
    stage.numbers["capability"] = None if stage.rehearsal else torch.cuda.get_device_capability()
    stage.run(PYTHON, "-m", "baft_kernels.info", "--json")
    info = stage.numbers["info"] = json.loads(stage.output[stage.output.index("{") : stage.output.rindex("}") + 1])
    for tool, arguments in (("nvcc", "--version"), ("nvidia-smi", f"--query-gpu={GPU_STATE} --format=csv")):
        stage.numbers[tool] = "not found"
        if shutil.which(tool):
            stage.run(tool, *arguments.split())
            stage.numbers[tool] = stage.output.splitlines()
    for backend in () if stage.rehearsal else GPU_BACKENDS:
        if (reason := info["backends"][backend]["reason"]) is not None:
            raise Failed(f"{backend} isn't usable: {reason}")
    return ", ".join(f"{what} {info['versions'][what]}" for what in ("python", "torch", "triton", "cuda"))


def tests(expression: str, names: Sequence[str], stage: Stage) -> str:
    """The GPU backends' tests, on this machine's GPU: those in the files ``names`` that match ``expression``.

    In a rehearsal only the last file's: without a GPU the others take long, or are skipped.
    """
    from gpu_tests import counted  # here, since it imports pytest

    folder = stage.scratch / f"tests {expression}"
    folder.mkdir()
    ended: Failed | None = None
    try:
        files = [ROOT / "tests" / name for name in (names[-1:] if stage.rehearsal else names)]
        stage.run(PYTHON, HERE / "gpu_tests.py", folder, expression, *files)
    except Failed as end:
        ended = end
    stage.numbers |= counted(folder.glob("*.jsonl"))
    counts = ", ".join(f"{stage.numbers[what]} {what}" for what in ("passed", "failed", "skipped"))
    if missing := sorted(set(re.findall(r"could not import '(\w+)'", str(stage.numbers["reasons to skip"])))):
        counts += f", some for want of {' and '.join(missing)}"
    if ended is not None:
        raise type(ended)(f"{counts}; {ended}")
    if stage.rehearsal and not stage.numbers["failed"] + stage.numbers["passed"]:
        raise Skipped(REHEARSED)
    if stage.numbers["failed"] or not stage.numbers["passed"]:
        raise Failed("; ".join([counts, *(f"{test}: {why}" for test, why in stage.numbers["failures"].items())][:2]))
    return counts


def calls(backend: str, stage: Stage) -> str:
    """A few calls of every kind: do they come to an end, with finite results?"""
    stage.program("few_calls", stage.backend(backend))
    return f"{stage.numbers['calls']} combinations"


def sanitizer(tool: str, backend: str, stage: Stage) -> str:
    """The same calls, watched. What Triton needs for them it has compiled by now: under a tool that would take long."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    folders = [os.environ.get("PATH", ""), *(f"{toolkit}/bin" for toolkit in toolkits if toolkit)]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if program is None or stage.rehearsal:
        raise Skipped(REHEARSED if program else "compute-sanitizer not found")
    # torch asks the driver for functions that it may lack: errors of the API aren't ours. Without torch's cache each
    # tensor is an allocation of its own, so that what is read past its end is seen.
    options = ["--report-api-errors", "no", "--target-processes", "application-only", "--launch-timeout", "0"]
    found: list[tuple[str, str]] = []
    try:
        stage.program(
            "few_calls", backend, under=[program, "--tool", tool, *options], PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
    except Failed:
        if "Device not supported" in stage.output:
            raise Skipped("compute-sanitizer doesn't support this device") from None
        raise
    finally:
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: ((\d+) .*)", stage.output)
        stage.numbers["found"] = found[-1][0] if found else None
    if not found or int(found[-1][1]):
        raise Failed(gist(stage.output))
    return found[-1][0]


def repeat(stage: Stage) -> str:
    """The same call many times over: the same bits?"""
    launches = 20 if stage.rehearsal else 2000
    stage.program("repeated_calls", launches)
    return f"the same bits in {launches} calls of each kind, forward and backward"


def roofline(name: str, arguments: str, stage: Stage) -> str:
    """How fast the op is: some cases of bench/roofline.py. They are shared out among steps, lest one cost them all."""
    name = f"{name}_{stage.gpu}"
    chosen = (TINY if stage.rehearsal else arguments).split()
    stage.program("script", "roofline.py", stage.results, "--name", name, *chosen)
    rows = stage.numbers["rows"] = json.loads((stage.results / f"{name}.json").read_text())["rows"]
    wrong = [f"{row['variant']}: {row['problem']}" for row in rows if row["problem"]]
    if wrong:
        raise Failed(f"{len(wrong)} without a time, the first {wrong[0]}")
    copies = {str(row["case"]): row["seconds"]["median"] for row in rows if row["variant"] == "copy"}
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row["variant"] not in {"copy", *RIVALS}:
            shares.setdefault(row["variant"], []).append(copies[str(row["case"])] / row["seconds"]["median"])
    if not shares:
        raise Failed(NOBODY)
    return ", ".join(f"{backend} {min(all_):.2f} to {max(all_):.2f} of a copy" for backend, all_ in shares.items())


def retraction(stage: Stage) -> str:
    """What it costs to keep a basis orthonormal: bench/retraction.py."""
    tiny = "--d 64 --r 4 --rounds 1".split() if stage.rehearsal else []
    stage.program("script", "retraction.py", stage.results, *tiny)
    path = stage.results / f"retraction_{device().type}.json"
    found = json.loads(path.read_text())
    rows, together = stage.numbers["rows"], stage.numbers["rows_of_layers"] = found["rows"], found["rows_of_layers"]
    ratios = [row["theirs"]["median"] / row["ours"]["median"] for row in rows]
    longest: dict[str, float] = {}
    for row in together:
        longest[row["backend"]] = max(row["seconds"]["median"] * 1e6, longest.get(row["backend"], 0.0))
    of_layers = ", ".join(f"{backend} {micro:,.0f} µs at most" for backend, micro in longest.items())
    ours = f"{min(ratios):.1f} to {max(ratios):.1f} times as fast as torch's parametrization"
    return f"{ours}; {found['layers']} layers at once: {of_layers}"


def edit_throughput(stage: Stage) -> str:
    """Edits a second at a real model's shape: bench/edit_throughput.py."""
    shape = "tiny" if stage.rehearsal else "llama-2-7b"
    size = "--requests 2 --plain-requests 1 --rounds 1" if stage.rehearsal else "--requests 64 --plain-requests 1"
    arguments = f"--shape {shape} --modes single sequential --tasks edit --rounds 1 {size}".split()
    # Without "- edits abreast", which alone would take all the time.
    variants = ["ours", "+ Triton kernels", "+ CUDA kernels", "+ CUDA graphs", "+ CUDA kernels and graphs"]
    stage.program("script", "edit_throughput.py", stage.results, *arguments, "--variants", *variants)
    path = stage.results / f"edit_throughput_{shape}_{device().type}.json"
    rows = stage.numbers["rows"] = json.loads(path.read_text())["rows"]
    ours = [row for row in rows if row.get("variant") not in (None, "plain")]
    best = [
        min((r for r in ours if r["mode"] == mode), key=lambda r: r["seconds_per_step"])
        for mode in ("single", "sequential")
    ]
    return ", ".join(f"{r['mode']} {r['seconds_per_edit']:.3f} s an edit ({r['variant']})" for r in best)


def edit_slots(stage: Stage) -> str:
    """And how many single edits should share a pass there."""
    shape = "tiny" if stage.rehearsal else "llama-2-7b"
    size = "--requests 2 --slots 1 2" if stage.rehearsal else "--requests 64 --slots 4 16 64"
    arguments = f"--shape {shape} --tasks edit --rounds 1 {size}".split()
    stage.program("script", "edit_throughput.py", stage.results, *arguments)
    path = stage.results / f"edit_throughput_slots_{shape}_{device().type}.json"
    rows = stage.numbers["rows"] = json.loads(path.read_text())["rows"]
    return ", ".join(f"{row['slots']} abreast {row['seconds_per_edit']:.3f} s an edit" for row in rows)


class Step(NamedTuple):
    """A step, its part of the time (what it leaves goes to those after it), and what it imports beside torch."""

    name: str
    part: float
    perform: Callable[[Stage], str]
    needs: tuple[str, ...] = ()


TRITON_TESTS = tuple(f"test_triton{part}.py" for part in ("", "_forward", "_backward", "_grouped", "_retraction"))
STEPS = (
    Step("build", 60, build, ("setuptools",)),
    Step("machine", 15, machine),
    # The CUDA kernels first: they needn't be compiled here, and no interpreter has run what nvcc made of them.
    Step("calls_cuda", 20, partial(calls, "cuda")),
    Step("tests_cuda", 90, partial(tests, "cuda", ("test_gpu.py", "test_gpu_engine.py")), ("pytest",)),
    Step("memcheck", 30, partial(sanitizer, "memcheck", "cuda")),
    Step("synccheck", 25, partial(sanitizer, "synccheck", "cuda")),
    Step("racecheck", 30, partial(sanitizer, "racecheck", "cuda")),
    Step("calls_triton", 40, partial(calls, "triton")),
    Step(
        "tests_triton",
        100,
        partial(tests, "not cuda", ("test_gpu.py", "test_gpu_engine.py", *TRITON_TESTS)),
        ("pytest",),
    ),
    Step("repeat", 20, repeat),
    Step("roofline", 30, partial(roofline, "roofline", "--r 16 --no-compile"), ("rich", "matplotlib")),
    Step("roofline_ranks", 45, partial(roofline, "roofline_ranks", "--r 8 32 --no-compile"), ("rich", "matplotlib")),
    Step("retraction", 15, retraction, ("rich",)),
    Step("edit_throughput", 60, edit_throughput, ("rich", "transformers", "yaml", "pydantic")),
    Step("edit_slots", 40, edit_slots, ("rich", "transformers", "yaml", "pydantic")),
    # The rivals' own compiling takes longest, and what is above doesn't need it.
    Step("roofline_compiled", 40, partial(roofline, "roofline_compiled", "--r 16"), ("rich", "matplotlib")),
    Step("memcheck_triton", 30, partial(sanitizer, "memcheck", "triton")),
)


# -- the suite --


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--limit", type=float, default=480.0, metavar="SECONDS", help="for all steps; default 480")
    parser.add_argument("--out", type=Path, default=report.RESULTS, metavar="FOLDER", help="default bench/results")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: to try the suite out")
    options = parser.parse_args()
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("bench/gpu_suite.py: torch sees no GPU here; --rehearse goes through the steps without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that it ends its commands first
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(suite(options, Path(scratch)))


def suite(options: argparse.Namespace, scratch: Path) -> int:
    """Go through the steps; 1 if one failed or ran out of time."""
    about = report.provenance(device())
    gpu = re.sub(r"\W+", "_", about["device"].removeprefix("NVIDIA ").lower())
    title = about["device"]
    if options.rehearse:
        gpu, title = "rehearsal", "A rehearsal without a GPU: no figure here is a GPU's"
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log, saved, packed = (out / f"gpu_suite_{gpu}.{kind}" for kind in ("log", "json", "zip"))
    log.write_text(f"{title}\n")
    print(title)
    made = scratch / "results"
    made.mkdir()
    stage = Stage(gpu, options.rehearse, log, made, scratch)
    steps = [step for step in STEPS if step.name in options.only]
    results: list[dict[str, Any]] = [{"step": step.name, "status": "not finished"} for step in steps]
    end = time.monotonic() + options.limit
    for number, step in enumerate(steps):
        save({"title": title, **about, "steps": results}, saved)
        print(f"[{number + 1} of {len(steps)}] {step.name} ... ", end="", flush=True)
        begin = time.monotonic()
        stage.deadline = begin + (end - begin) * step.part / sum(later.part for later in steps[number:])
        results[number] = result_of(step, stage) | {"seconds": round(time.monotonic() - begin, 1)}
        pack(made, packed)
        print(results[number]["status"], "" if results[number]["status"] == "passed" else results[number]["summary"])
    save({"title": title, **about, "steps": results}, saved)
    table = "\n".join(f"{r['step']:<17} {r['status']:<10} {r['seconds']:6.1f} s  {r['summary']}" for r in results)
    stage.note(table)
    print(f"\n{table}\n\nSaved: {saved}, {log} and {packed}")
    return int(any(result["status"] in BAD for result in results))


def save(results: dict[str, Any], path: Path) -> None:
    """Replace the file at once: whenever the suite is killed, it is whole."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(path)


def pack(folder: Path, path: Path) -> None:
    """All files of a folder in one, likewise: where results are copied from a machine, few may be."""
    new = path.with_suffix(".new")
    with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    new.replace(path)


def result_of(step: Step, stage: Stage) -> dict[str, Any]:
    """How a step ended, in words and numbers."""
    limit = stage.deadline - time.monotonic()
    stage.note(f"== {step.name}, {limit:.0f} s at most ==")
    stage.numbers, stage.output = {}, ""
    try:
        if missing := [name for name in step.needs if importlib.util.find_spec(name) is None]:
            raise Skipped(f"needs {' and '.join(missing)}")
        status, summary = "passed", step.perform(stage)
    except Failed as end:
        status, summary = end.status, str(end)
    except Exception as error:  # of this file's own: the other steps go on
        stage.note(traceback.format_exc())
        status, summary = Failed.status, repr(error)
    if status in BAD:
        stage.numbers["tail"] = stage.output.splitlines()[-60:]
    return {"step": step.name, "status": status, "summary": summary, "limit": round(limit, 1), "numbers": stage.numbers}


if __name__ == "__main__":
    main()
