"""Who imports whom: the rooms of CONTRIBUTING.md, read from the code."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
    for base, package in ((ROOT, "baft_kernels"), (ROOT / "python", "baft"))
    for path in sorted((base / package).rglob("*.py"))
}


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that a module of ours imports, wherever in its file; of other packages their names."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {_module_of(name) for name in found if name.split(".")[0] in ("baft", "baft_kernels")}
    return frozenset(ours | {name.split(".")[0] for name in found} - {"baft", "baft_kernels"} - sys.stdlib_module_names)


def _module_of(name: str) -> str:
    return name if name in FILES else name.rpartition(".")[0]


def room_of(module: str) -> str:
    first, *rest = module.split(".")
    return rest[0] if first == "baft" and rest else first


def table() -> dict[str, set[str]]:
    """By room the other packages that it may import, from the bottom up."""
    rows = re.findall(r"^\| (`[^:|]+): [^|]+ \| ([^|]+) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M)
    return {
        room: {*packages.split(", ")} - {"none"} for rooms, packages in rows for room in re.findall(r"`(\w+)`", rooms)
    }


ROOMS = table()


def test_the_table_has_every_room() -> None:
    assert {room_of(module) for module in FILES} - {"baft"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_table_says(room: str) -> None:
    below = list(ROOMS)[: list(ROOMS).index(room) + 1]
    for module in FILES:
        if room_of(module) == room:
            taken = {room_of(name) for name in imports(module)}
            assert taken <= {*below, *ROOMS[room]}, module


def test_every_package_of_the_table_is_imported() -> None:
    for room, packages in ROOMS.items():
        taken = {name for module in FILES if room_of(module) == room for name in imports(module)}
        assert packages <= taken, room


def test_modules_import_each_other_in_no_circle_but_one() -> None:
    graph = {module: imports(module) & FILES.keys() - {module} for module in FILES}
    graph["baft_kernels.stiefel"] -= {"baft_kernels.backends"}
    list(TopologicalSorter(graph).static_order())  # an error if there is one


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_a_backend_knows_no_other(backend: str) -> None:
    others = {"cpu", "cuda", "triton"} - {backend}
    for module in FILES:
        if module.startswith(f"baft_kernels.backends.{backend}"):
            assert not {name.split(".")[2] for name in imports(module) if name.count(".") > 1} & others, module


def test_triton_is_imported_by_its_kernels_alone() -> None:
    takers = {module.rpartition(".")[0] for module in FILES if "triton" in imports(module)}
    assert takers == {"baft_kernels.backends.triton.kernels"}
