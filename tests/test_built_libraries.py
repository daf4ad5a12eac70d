"""The compiled libraries: one build for every torch from 2.11 on, and no CUDA needed to load it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

LIBRARIES = ("_cpu", "_cuda")
# Symbols of torch's C++ interface, which changes with every version. Its stable one is plain C.
UNSTABLE = re.compile(r"^_ZNK?(2at|3c10|5torch|8caffe2)")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    spec = find_spec(f"baft_kernels.{request.param}")
    if spec is None or spec.origin is None:
        pytest.skip(f"baft_kernels.{request.param} isn't built")
    return spec.origin


def test_nothing_of_an_unstable_interface_is_used(library: str) -> None:
    if shutil.which("nm") is None or not sys.platform.startswith("linux"):
        pytest.skip("no nm here that knows shared libraries")
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [symbol for symbol in symbols if UNSTABLE.match(symbol)] == []
    assert [symbol for symbol in symbols if re.match(r"^(cuda|cu[A-Z])", symbol)] == []


def test_it_loads_by_itself(library: str) -> None:
    name = library.rpartition("/")[2].partition(".")[0]
    code = f"import torch, baft_kernels; from baft_kernels import {name}; print({name}.INTERFACE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


def test_a_cuda_library_of_these_sources_is_not_built_again(tmp_path: Path) -> None:
    """Not even where there is no nvcc; but one that was compiled otherwise is."""
    if find_spec("baft_kernels._cuda") is None:
        pytest.skip("baft_kernels._cuda isn't built")

    def build(**settings: str) -> subprocess.CompletedProcess[str]:
        asked = {
            "BAFT_BUILD_CPU": "0",
            "BAFT_BUILD_CUDA": "1",
            "BAFT_CUDA_ARCHITECTURES": "90a",
            "NVCC_APPEND_FLAGS": "",
        }
        nowhere = {"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
        folders = ["--build-lib", f"{tmp_path}/lib", "--build-temp", f"{tmp_path}/temp"]
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", *folders],
            cwd=Path(__file__).parents[1], env=os.environ | asked | nowhere | settings, capture_output=True, text=True,
        )  # fmt: skip

    again = build()
    assert again.returncode == 0 and "is up to date" in again.stderr, again.stderr
    assert (tmp_path / "lib/baft_kernels/_cuda.abi3.so").exists()
    for settings in ({"NVCC_APPEND_FLAGS": "-DOTHER"}, {"BAFT_CUDA_ARCHITECTURES": "80"}):
        otherwise = build(**settings)
        assert otherwise.returncode != 0 and "is up to date" not in otherwise.stderr
    assert "expected some of 90a, 100a, got 80" in otherwise.stderr
