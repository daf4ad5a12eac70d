"""What the Triton kernels become on GPUs that needn't be here: no spills, asynchronous copies, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
# Measured with Triton 3.9 and rounded up; with 128 threads to a program, 168 registers still leave room for three.
MOST_REGISTERS = {
    "forward._sweep_kernel": 136,
    "backward._sweep_kernel": 152,
    "backward._columns_kernel": 152,
    "retraction._retract_kernel": 152,
}
TENSOR_CORES = {"HMMA", "HGMMA", "UTCHMMA"}


def compiled(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The machine code of some cases, from a process whose Triton isn't the interpreter and has nothing cached."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("triton_machine_code.py")
    done = subprocess.run(
        [sys.executable, program, "--json", *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    for result in results:
        print(*(f"{key} {value}" for key, value in result.items()))
    return results


def assert_fit(code: dict[str, Any], shared_memory: int = 99 << 10) -> None:
    assert code["spilled"] == 0, code
    assert code["shared"] <= shared_memory, code


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_main_shape(architecture: int, tmp_path: Path) -> None:
    codes = compiled(tmp_path, "--case", "main", "--case", "float32", str(architecture))
    assert {code["kernel"] for code in codes} == MOST_REGISTERS.keys()
    for code in codes:
        assert_fit(code)
        assert code["registers"] <= MOST_REGISTERS[code["kernel"]], code
        instructions = code["instructions"]
        assert "LDGSTS" in instructions, code
        # float32 isn't to be multiplied as TF32.
        half = code["case"] == "main" and code["kernel"] != "retraction._retract_kernel"
        assert bool(TENSOR_CORES & instructions.keys()) == half, code
        # One chain of additions over all blocks would lose more than plain torch does.
        assert code["case"] == "main" or code["chained"] == 0, code


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 89, 90, 100])
def test_every_case_fits(architecture: int, tmp_path: Path) -> None:
    room = (99 if architecture == 89 else 163) << 10
    for code in compiled(tmp_path, str(architecture)):
        # 64 x 64 matrices in the registers of one program: the only kernel that spills, some hundred words a thread.
        if code["case"] == "default rank" and code["kernel"] == "retraction._retract_kernel":
            continue
        assert_fit(code, room)
