"""Where, when and of what a result was made; and tables as Markdown."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import baft_kernels
from baft_kernels.info import collect, processor

__all__ = ["RESULTS", "called", "command", "commit", "markdown", "provenance"]

RESULTS = Path(__file__).parent / "results"


def commit() -> str | None:
    """The commit of this checkout, "-dirty" if a file was changed since, results apart, which are what runs make."""
    if not shutil.which("git"):
        return os.environ.get("BAFT_COMMIT")
    described = _git("describe", "--always") or os.environ.get("BAFT_COMMIT")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)bench/results")
    return f"{described}-dirty" if described and changed else described


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def provenance(device: torch.device) -> dict[str, Any]:
    """Command, commit, date, device and versions; a checkout without git says its commit in ``BAFT_COMMIT``."""
    return {
        "command": command(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "baft_kernels": baft_kernels.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": collect()["versions"]["triton"],
            "cuda": torch.version.cuda,
        },
    }


def markdown(rows: Sequence[Sequence[str]], about: dict[str, Any], note: str = "") -> str:
    """A table, its first row the header, and a line with ``note`` that says where it comes from."""
    header, *body = rows
    lines = [[cell.replace("|", "\\|") for cell in line] for line in [header, ["---"] * len(header), *body]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
    where = f"commit {about['commit']}, {about['device']}, {threads}, torch {about['versions']['torch']}"
    return f"{table}\n\n{note}`{about['command']}`, {where}, {about['date']}.\n"


def command() -> str:
    """What this process was started with, as one types it."""
    return shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def called(dataset: str) -> str:
    """A data set in the name of a file: ``data/facts.json[:600]`` as facts_0-600."""
    from baft.datasets.loading import split_stretch  # only here: benchmarks of the operator need no baft

    path, first, end = split_stretch(dataset)
    return path.stem if (first, end) == (0, None) else f"{path.stem}_{first}-{'' if end is None else end}"
