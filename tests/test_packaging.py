"""What is handed out: sdists with all of the source, wheels with the kernels or tagged as having none."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MADE = shutil.ignore_patterns(
    ".git", ".venv", ".*cache", "__pycache__", "build", "dist", "*.egg-info", "*.so", "results", "runs"
)

# setup.py as where no torch is installed: None in sys.modules makes an import fail, and nothing is found.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_path("setup.py", run_name="__main__")
"""

# A compiler that makes empty files of what it is asked for.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -o | -MF) : >"$2" ;; esac
  shift
done
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, for setup.py leaves traces where it runs."""
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=MADE))


def setup_py(
    checkout: Path, *arguments: str, torch: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BAFT_")}
    return subprocess.run(
        [sys.executable, *(("setup.py",) if torch else ("-c", WITHOUT_TORCH)), "-q", *arguments],
        cwd=checkout,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_sdist_has_all_that_building_testing_and_measuring_need(checkout: Path) -> None:
    """On a machine without nvcc, too; and it can be made without torch, as by pip under build isolation."""
    (checkout / "bench" / "results").mkdir()
    (checkout / "bench" / "results" / "figures.md").touch()
    done = setup_py(checkout, "sdist", torch=False)
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").iterdir()
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    folders = ("csrc", "baft_kernels", "python/baft", "tests", "bench")
    files = {str(path.relative_to(ROOT)) for folder in folders for path in _sources(ROOT / folder)}
    assert {"csrc/cpu/kernels.inl", "csrc/cuda/tiles.cuh", "csrc/cuda/forward.cu"} <= files
    assert files <= packed
    assert not [name for name in packed if name.startswith("bench/results")]
    assert {"LICENSE", "Makefile", "constraints.txt", ".ci/setup_venv.sh"} <= packed


def _sources(folder: Path) -> Iterator[Path]:
    """The files of a folder that no tool has made."""
    for path in folder.iterdir():
        if path.name in MADE(str(folder), [path.name]):
            continue
        yield from _sources(path) if path.is_dir() else (path,)


def test_without_torch_nothing_is_installed_unless_no_kernels_are_wanted(checkout: Path) -> None:
    done = setup_py(checkout, "build", torch=False)
    assert done.returncode != 0
    assert "torch isn't installed where baft-kernels is built" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr and "Traceback" not in done.stderr
    assert setup_py(checkout, "build", torch=False, BAFT_BUILD_CPU="0", BAFT_BUILD_CUDA="1").returncode != 0
    done = setup_py(checkout, "build", torch=False, BAFT_BUILD_CPU="0")
    assert done.returncode == 0, done.stderr


def test_a_wheel_without_a_library_is_for_every_platform(checkout: Path) -> None:
    done = setup_py(checkout, "bdist_wheel", BAFT_BUILD_CUDA="0", CXX="/nowhere/c++")
    assert done.returncode == 0 and "baft_kernels._cpu isn't built: no C++ compiler" in done.stderr
    (wheel,) = (checkout / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")


def test_a_wheel_with_a_library_is_for_its_platform(checkout: Path) -> None:
    compiler = checkout / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    done = setup_py(checkout, "bdist_wheel", BAFT_BUILD_CUDA="0", BAFT_BUILD_CPU="1", CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").iterdir()
    assert "-cp310-abi3-" in wheel.name and not wheel.name.endswith("-any.whl")


def test_whatever_is_imported_is_required() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    names = {_normalised(re.split(r"[^\w.-]", requirement)[0]) for requirement in required}
    distributions = packages_distributions()
    ours = {"baft", "baft_kernels", *sys.stdlib_module_names}
    for package in ("baft_kernels", "python/baft"):
        for path in (ROOT / package).rglob("*.py"):
            for module in _imported(path) - ours:
                assert names & {_normalised(name) for name in distributions.get(module, [module])}, f"{path}: {module}"


def _imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _normalised(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
