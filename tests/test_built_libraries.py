"""The compiled libraries: one build for every torch from 2.11 on, and no CUDA needed to load it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

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
