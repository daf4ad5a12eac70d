"""What nvcc made of the CUDA kernels, read from the built library: registers, no spills, the instructions that matter.

No GPU is needed. ``python tests/test_cuda_machine_code.py`` writes the table of registers anew, after a change that is
meant to change it.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

TABLE = Path(__file__).parent / "data/cuda_registers.json"
DRIFT = 8  # registers that a kernel may take more than the table says: what compilers differ by
SPILLS = {"LDL", "STL"}
# By kernel: copies that run on their own, stores to other CTAs, barriers, matrices from shared memory, tensor cores.
NEEDED = {
    "forward_stream": {"UBLKCP", "STAS", "SYNCS", "LDSM", "HMMA"},
    "forward_decode": {"STAS", "SYNCS", "HMMA"},
    "backward_stream": {"UBLKCP", "STAS", "SYNCS", "LDSM", "HMMA"},
    "retract": {"STAS", "SYNCS", "FFMA"},
}

# By type of number: what tensor cores multiply.
PRODUCTS = {
    "Bfloat16": {"HMMA.16816.F32.BF16", "HMMA.1688.F32.BF16"},
    "Float16": {"HMMA.16816.F32", "HMMA.1688.F32"},
    "Float32": {"HMMA.1688.F32.TF32"},
}


class Kernel(NamedTuple):
    """One instance for one architecture."""

    architecture: str
    name: str  # without its arguments
    instance: str  # its template's
    registers: int
    stack: int


def library() -> Path:
    spec = find_spec("baft_kernels._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("the CUDA library isn't built: BAFT_BUILD_CUDA=1")
    return Path(spec.origin)


def dumped(*options: str) -> str:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("triton, whose cuobjdump is used, isn't installed")
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *options, library()], capture_output=True, text=True, check=True).stdout


def named(symbol: str) -> tuple[str, str]:
    """The kernel's name and the numbers and types of its template, from a mangled symbol."""
    lengths = re.match(r"_ZN4baft4cuda(\d+)", symbol)
    assert lengths is not None, symbol
    start = lengths.end()
    name = symbol[start : start + int(lengths[1])]
    types = re.findall("|".join(PRODUCTS), symbol)
    return name, " ".join([*types, *re.findall(r"Li(\d+)E", symbol)])


@functools.cache
def kernels() -> list[Kernel]:
    found = []
    architecture = symbol = ""
    for line in dumped("--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ")
        elif "Function" in line:
            symbol = line.split()[1].rstrip(":")
        elif usage := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found.append(Kernel(architecture, *named(symbol), int(usage[1]), int(usage[2])))
    return found


@functools.cache
def listings() -> dict[tuple[str, str, str], list[str]]:
    """Each kernel's instructions in their order, without operands, by architecture, name and instance."""
    found: dict[tuple[str, str, str], list[str]] = {}
    architecture = ""
    for line in dumped("-sass").splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ")
        elif "Function : " in line:
            kernel = found[(architecture, *named(line.split()[-1]))] = []
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            kernel.append(sys.intern(instruction[1]))
    return found


@functools.cache
def instructions() -> dict[tuple[str, str], Counter[str]]:
    """How often each instruction stands in the kernels of an architecture, by architecture and the kernel's name."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for (architecture, name, _), listing in listings().items():
        counts[architecture, name].update(instruction.partition(".")[0] for instruction in listing)
    return counts


def table() -> dict[str, dict[str, int]]:
    """Registers by architecture and instance."""
    result: dict[str, dict[str, int]] = defaultdict(dict)
    for kernel in kernels():
        result[kernel.architecture][f"{kernel.name} {kernel.instance}"] = kernel.registers
    return {architecture: dict(sorted(of.items())) for architecture, of in sorted(result.items())}


def test_nothing_is_kept_in_local_memory() -> None:
    assert kernels()
    assert [kernel for kernel in kernels() if kernel.stack] == []
    spilling = {where: SPILLS & counts.keys() for where, counts in instructions().items() if SPILLS & counts.keys()}
    assert spilling == {}


def test_registers_are_those_of_the_table() -> None:
    expected = json.loads(TABLE.read_text())
    found = table()
    assert {a: list(of) for a, of in found.items()} == {a: list(of) for a, of in expected.items()}
    more = {
        (architecture, instance): (registers, expected[architecture][instance])
        for architecture, of in found.items()
        for instance, registers in of.items()
        if registers > expected[architecture][instance] + DRIFT
    }
    assert more == {}


@pytest.mark.parametrize("number", PRODUCTS)
def test_numbers_are_multiplied_as_what_they_are(number: str) -> None:
    of_number = [listing for (_, _, instance), listing in listings().items() if instance.startswith(number)]
    assert {i for listing in of_number for i in listing if i.startswith("HMMA")} == PRODUCTS[number]


def _needs() -> Iterator[tuple[str, str]]:
    yield from ((architecture, name) for architecture in ("sm_90a", "sm_100a") for name in NEEDED)


@pytest.mark.parametrize(("architecture", "name"), list(_needs()))
def test_the_instructions_that_matter_are_there(architecture: str, name: str) -> None:
    counts = instructions()
    if architecture not in {a for a, _ in counts}:
        pytest.skip(f"built without {architecture}, which this nvcc doesn't know")
    missing = NEEDED[name] - counts[architecture, name].keys()
    assert missing == set()


def test_few_rows_wait_for_the_previous_kernel_between_parameters_and_all_else() -> None:
    for (architecture, name, instance), listing in listings().items():
        if name != "forward_decode":
            continue
        where = f"{architecture} {instance}"
        strip, rank = map(int, instance.split()[3:5])
        # The first wait is for parameters that aren't settled, the second for everything else.
        first, second = (place for place, instruction in enumerate(listing) if instruction == "ACQBULK")
        ahead, between, after = (
            [i for i in some if i.startswith("LDG")]
            for some in (listing[:first], listing[first:second], listing[second:])
        )
        assert ahead == [], where
        wide = [int(i.rpartition(".")[2]) // 32 for i in between if re.fullmatch(r"LDG\.E\.(64|128)", i)]
        assert len(wide) == len(between), where
        # An adapter, and 16 columns of D, G and R at a time; if they have 32 bits, R comes when the sums are sent.
        early, late = (rank, rank // 2) if instance.startswith("Float32") else (3 * rank // 4, 0)
        assert sum(wide) == 2 + strip // 16 * early, where
        assert 4 * after.count("LDG.E.128") == strip // 16 * late, where
        assert {"LDG.E", "LDG.E.U8"} < {*after} - {"LDG.E.128"} <= {"LDG.E", "LDG.E.U8", "LDG.E.64"}, where
        assert listing.index("PREEXIT") > second, where


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=1) + "\n")
    print(f"{sum(map(len, table().values()))} kernels in {TABLE}")
