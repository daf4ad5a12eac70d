"""Builds csrc/ where there is a C++ compiler and torch's headers; everything static is in pyproject.toml.

The build is ninja's, since the kernels are compiled once for each instruction set and each file has flags of its own;
what hasn't changed isn't compiled again. If it can't be built the package installs all the same, without the backend:
``python -m baft_kernels.info`` then says so. BAFT_BUILD_CPU=1 makes that an error, BAFT_BUILD_CPU=0 builds nothing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# What the oldest torch that we support has; see torch/csrc/stable/version.h.
TORCH_TARGET_VERSION = "0x020b000000000000"
PYTHON_TARGET_VERSION = "0x030A0000"

COMMON = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
# GCC warns about its own AVX-512 headers (its bug 105593).
QUIET = ["-Wno-maybe-uninitialized", "-Wno-missing-field-initializers"]
VARIANTS = {
    "csrc/cpu/avx512bf16.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma"],
    "csrc/cpu/avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma"],
    "csrc/cpu/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}
SOURCES = [
    "csrc/bindings.cpp",
    *(
        f"csrc/cpu/{name}.cpp"
        for name in ("forward", "backward", "dispatch", "avx512bf16", "avx512", "avx2", "portable")
    ),
]


class BuildWithNinja(build_ext):
    """Compiles an extension by a build.ninja made for it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            if os.environ.get("BAFT_BUILD_CPU") == "1":
                raise
            print(f"baft-kernels: {ext.name} isn't built: {error}", file=sys.stderr)

    def _build(self, ext: Extension) -> None:
        folder = Path(self.build_temp).absolute() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(_build_file(target))
        subprocess.run([_ninja(), "-C", str(folder), "--quiet"], check=True)


def _build_file(target: Path) -> str:
    """Rules and one line for each source, with the flags of its instruction set."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0]
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(f"no C++ compiler ({compiler}); set CXX")
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    flags = " ".join([*COMMON, *QUIET, *(f"-isystem {folder}" for folder in _headers())])
    lines = [
        f"flags = {flags} -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -DPy_LIMITED_API={PYTHON_TARGET_VERSION}",
        "rule compile",
        f"  command = {compiler} $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        f"  command = {compiler} {shared} $in -o $out -L{_torch() / 'lib'} -ltorch_cpu -lc10",
        "  description = $out",
    ]
    objects = [f"{Path(source).stem}.o" for source in SOURCES]
    for source, built in zip(SOURCES, objects, strict=True):
        lines.append(f"build {built}: compile {_escaped(ROOT.absolute() / source)}")
        if X86 and source in VARIANTS:
            lines.append(f"  more = {' '.join(VARIANTS[source])}")
    # No run path: torch's libraries are found by name, since torch is imported, from wherever it is then, before.
    lines.append(f"build {_escaped(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch isn't installed here: install it first, then this with pip's --no-build-isolation")
    return Path(spec.origin).parent


def _headers() -> list[Path | str]:
    return [_torch() / "include", _torch() / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]


def _ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise RuntimeError("ninja isn't installed")
    return found


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


extensions = (
    []
    if os.environ.get("BAFT_BUILD_CPU") == "0"
    else [Extension("baft_kernels._cpu", SOURCES, py_limited_api=True, optional=True)]
)
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
