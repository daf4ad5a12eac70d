"""Compiles what the Triton backend would launch on a GPU that needn't be here, and reads the machine code.

``python tests/triton_machine_code.py [--case CASE] [ARCHITECTURE]...`` prints a line for each kernel, or with
``--json`` the same for machines. It is a program of its own since the tests' Triton may be the interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baft_kernels.backends.triton import TritonPack, launch
from baft_kernels.backends.triton.kernels import backward, forward, retraction

# Bytes of shared memory that a program can have.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
# Tensor cores of three generations, multiplications without them, asynchronous copies to shared memory, spills.
COUNTED = ("HMMA", "HGMMA", "UTCHMMA", "FFMA", "LDGSTS", "LDL", "STL")


class Case(NamedTuple):
    """A forward pass, a backward pass, and a retraction."""

    dtype: torch.dtype
    total: int
    dim: int
    rank: int
    gate_fn: str = "sigmoid"
    rows: str = "all"
    sets: int = 1


CASES = {
    "main": Case(torch.bfloat16, 32768, 4096, 16),
    "few rows": Case(torch.bfloat16, 16, 4096, 16),
    "on chip": Case(torch.bfloat16, 32768, 1024, 16),
    "default rank": Case(torch.bfloat16, 32768, 4096, 64),
    "float32": Case(torch.float32, 32768, 4096, 16),
    "grouped, masked": Case(torch.float16, 32768, 4096, 16, "softmax", "mask", 4),
    "listed, ungated": Case(torch.bfloat16, 32768, 4096, 16, "none", "list"),
}


@dataclasses.dataclass(frozen=True)
class Code:
    """What one kernel became."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    chained: int  # products that go on adding to what a loop carries
    instructions: dict[str, int]


# -- what would be launched --


@contextmanager
def recorded() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Collects the launches of the backend's kernels, with their arguments by name. None of them happens."""
    launches: list[tuple[Any, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Any:
            return self.record

        def record(self, *values: Any, **named: Any) -> None:
            launches.append((self.kernel, dict(zip(self.kernel.arg_names, values, strict=False)) | named))

    with ExitStack() as stack:
        for module in (forward, backward, retraction):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name))))
        yield launches


def launches_of(case: Case, architecture: int) -> list[tuple[Any, dict[str, Any]]]:
    """What a case launches on a GPU of some architecture, with the H100's number of multiprocessors."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    dtype, total, dim, rank, gate_fn, kind, sets = case
    count = rank if gate_fn == "none" else 2 * rank
    h, low = empty(total, dim, dtype=dtype), empty(total, rank)
    pack = TritonPack(empty(sets, count, dim, dtype=dtype), empty(sets, rank, dim, dtype=dtype), empty(sets, count))
    call = {
        "gate_fn": gate_fn,
        "rows": {"all": None, "mask": empty(total, dtype=torch.bool), "list": empty(total, dtype=torch.int64)}[kind],
        "adapters": empty(2 * sets, dtype=torch.int64) if sets > 1 else None,
    }
    device = launch.Device(132, SHARED_MEMORY[architecture])
    with mock.patch.object(launch, "_device", lambda _: device), recorded() as launches:
        forward.forward(h, pack, **call)
        backward.backward(h, low, low, h, low, low, pack, **call)
        if rank <= launch.MAX_RETRACTION_RANK:
            retraction.retract([empty(rank, dim)])
    return launches


# -- what it becomes --


def compile_launch(kernel: Any, arguments: dict[str, Any], architecture: int) -> Code:
    """The machine code of a launch, with tensors and strides taken for multiples of 16, as is usual."""
    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or name.endswith("stride"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={**options, "enable_fp_fusion": True},
    )
    usage, assembly = disassembled(compiled.asm["cubin"])
    mnemonics = Counter(re.findall(r"^\s+(?:/\*\w+\*/)?\s*(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)", assembly, re.MULTILINE))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Code(
        kernel=f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}",
        registers=int(registers[1]),
        spilled=mnemonics["LDL"] + mnemonics["STL"],
        shared=compiled.metadata.shared,
        chained=chained(compiled.asm["ttgir"]),
        instructions={name: mnemonics[name] for name in COUNTED if mnemonics[name]},
    )


def chained(code: str) -> int:
    """How many products of Triton's intermediate ``code`` have a sum that a loop carries as what they add to."""
    loops = " ".join(re.findall(r"iter_args\((.*?)\)", code))
    carried = set(re.findall(r"(%\w+) = ", loops))
    return sum(added_to in carried for added_to in re.findall(r"tt\.dot %\S+, %\S+, (%\w+)", code))


def disassembled(cubin: bytes) -> tuple[str, str]:
    """The resources and the instructions of a compiled kernel, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([tools / "cuobjdump", "--dump-resource-usage", file.name], [tools / "nvdisasm", "-c", file.name])
        usage, assembly = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, assembly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("architectures", nargs="*", type=int, choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; all by default")
    options = parser.parse_args()
    results = [
        {"case": case, "architecture": architecture, **dataclasses.asdict(compile_launch(*launch_, architecture))}
        for case in options.case or CASES
        for architecture in options.architectures
        for launch_ in launches_of(CASES[case], architecture)
    ]
    if options.json:
        print(json.dumps(results))
        return
    for result in results:
        print(*(f"{key} {value}" for key, value in result.items()), sep="  ")


if __name__ == "__main__":
    main()
