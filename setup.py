"""Builds csrc/ where there are torch's headers and a compiler: C++ for the CPU, nvcc for CUDA.

Everything static is in pyproject.toml. The builds are ninja's, since each file has flags of its own, and what hasn't
changed isn't compiled again. What a machine can't build is left out, and the package installs all the same, without
that backend: ``python -m baft_kernels.info`` says so. Without torch or ninja, which every machine can have, nothing is
installed, unless no kernels are wanted.

BAFT_BUILD_CPU=1 makes a failing build of the CPU kernels an error, 0 builds none. BAFT_BUILD_CUDA likewise; unset, the
CUDA kernels are built if torch is a CUDA build and nvcc is there. Neither needs a GPU, and any torch from 2.11 on does.
BAFT_CUDA_ARCHITECTURES names some to build for, such as 90a alone, which takes half the time. A CUDA library that is
there and was built from these sources, here or elsewhere, isn't built again: it says what it was built from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

# What the oldest torch that we support has; see torch/csrc/stable/version.h.
TORCH_TARGET_VERSION = "0x020b000000000000"
PYTHON_TARGET_VERSION = "0x030A0000"

# -- what is compiled, and how --

CPU, CUDA = "baft_kernels._cpu", "baft_kernels._cuda"
SWITCHES = {CPU: "BAFT_BUILD_CPU", CUDA: "BAFT_BUILD_CUDA"}

COMMON = ["-O3", "-fPIC", "-fvisibility=hidden"]
# GCC warns about its own AVX-512 headers (its bug 105593).
CXX = ["-std=c++17", "-ffp-contract=fast", "-g0", "-Wall", "-Wextra"]
CXX += ["-Wno-maybe-uninitialized", "-Wno-missing-field-initializers"]
NVCC = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Werror=all-warnings"]

# Of which a file of the build folder is made, for the library.
MARKS = "marks.cpp"

# Those that nvcc knows of them. Clusters of CTAs, and copies that run on their own, begin with sm_90.
ARCHITECTURES = ("90a", "100a")

VARIANTS = {
    "csrc/cpu/avx512bf16.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma"],
    "csrc/cpu/avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma"],
    "csrc/cpu/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}
SOURCES = {
    CPU: [
        "csrc/cpu_bindings.cpp",
        *(f"csrc/cpu/{name}.cpp" for name in ("forward", "backward", "dispatch")),
        *(f"csrc/cpu/{name}.cpp" for name in ("avx512bf16", "avx512", "avx2", "portable")),
    ],
    CUDA: ["csrc/cuda_bindings.cpp", *(f"csrc/cuda/{name}.cu" for name in ("forward", "backward", "pack", "retract"))],
}


class BuildWithNinja(build_ext):
    """Compiles an extension by a build.ninja made for it."""

    def run(self) -> None:
        if self.extensions:
            _torch()
            _ninja()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            if os.environ.get(SWITCHES[ext.name]) == "1":
                raise
            print(f"baft-kernels: {ext.name} isn't built: {error}", file=sys.stderr)

    def _build(self, ext: Extension) -> None:
        folder = Path(self.build_temp).absolute() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        if ext.name == CUDA:
            if not self.force and _is_there(ext.name, target):
                print(f"baft-kernels: {ext.name} is up to date: it was built from these sources", file=sys.stderr)
                return
            marks = "".join(_cuda_marks())
            (folder / MARKS).write_text(f'__attribute__((used)) static const char marks[] = "{marks}";\n')
        (folder / "build.ninja").write_text("\n".join(_build_file(ext.name, target)) + "\n")
        subprocess.run([_ninja(), "-C", str(folder), "--quiet"], check=True)


class Wheel(bdist_wheel):
    """Without a library in it, it runs on every platform, and is tagged so."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = not any(Path(self.bdist_dir).rglob("*.so"))
        return super().get_tag()


def _build_file(name: str, target: Path) -> Iterable[str]:
    """Rules, and one line for each source, with the flags of its instruction set."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0]
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(f"no C++ compiler ({compiler}); set CXX")
    versions = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION} -DPy_LIMITED_API={PYTHON_TARGET_VERSION}"
    headers = " ".join(f"-isystem {folder}" for folder in _headers())
    flags = f"{' '.join(COMMON + CXX)} {headers} {versions} $more"
    yield from _rule("cxx", f"{compiler} {flags} -MMD -MF $out.d -c $in -o $out")
    if name == CUDA:
        nvcc = f"{_nvcc()} -ccbin {compiler}"
        targets = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in _architectures())
        yield from _rule("nvcc", f"{nvcc} {' '.join(NVCC)} {targets} -MMD -MF $out.d -c $in -o $out")
        linker = f"{nvcc} -shared -cudart=static"
    else:
        linker = f"{compiler} {'-bundle -undefined dynamic_lookup' if sys.platform == 'darwin' else '-shared'}"
    # No run path: torch's libraries are found by name, since torch is imported, from wherever it is then, before.
    yield from _rule("link", f"{linker} $in -o $out -L{_torch() / 'lib'} -ltorch_cpu -lc10", depends=False)
    objects = []
    if name == CUDA:
        objects.append("marks.o")
        yield f"build marks.o: cxx {MARKS}"
    for source in SOURCES[name]:
        objects.append(f"{Path(source).stem}.o")
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        yield f"build {objects[-1]}: {rule} {_escaped(ROOT.absolute() / source)}"
        if X86 and source in VARIANTS:
            yield f"  more = {' '.join(VARIANTS[source])}"
    yield f"build {_escaped(target)}: link {' '.join(objects)}"


def _rule(name: str, command: str, *, depends: bool = True) -> Iterable[str]:
    yield from (f"rule {name}", f"  command = {command}", "  description = $out")
    if depends:
        yield from ("  depfile = $out.d", "  deps = gcc")


# -- what there is --


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SetupError(
            "torch isn't installed where baft-kernels is built (pip's build isolation hides it), so there would be no "
            "kernels; install torch, then: pip install setuptools ninja && pip install --no-build-isolation . "
            "(BAFT_BUILD_CPU=0 installs without kernels)"
        )
    return Path(spec.origin).parent


def _headers() -> list[Path | str]:
    return [_torch() / "include", _torch() / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if found is None:
        raise RuntimeError("nvcc isn't installed; set CUDA_HOME")
    return found


def _is_there(name: str, target: Path) -> bool:
    """Whether ``target`` is a CUDA library of these sources, or one lies in place, which then becomes ``target``."""
    in_place = ROOT.absolute() / f"{name.replace('.', '/')}.abi3.so"
    for there in (target, in_place):
        if there.exists() and all(mark.encode() in there.read_bytes() for mark in _cuda_marks()):
            if there != target:
                shutil.copy2(there, target)
            return True
    return False


def _cuda_marks() -> list[str]:
    """What a CUDA library says of itself: its sources and how they were compiled, once for each architecture."""
    more = os.environ.get("NVCC_APPEND_FLAGS", "")  # which nvcc reads by itself
    digest = hashlib.sha256(repr([COMMON, CXX, NVCC, more, TORCH_TARGET_VERSION, PYTHON_TARGET_VERSION]).encode())
    for path in (ROOT / "csrc/cuda_bindings.cpp", *sorted((ROOT / "csrc/cuda").iterdir())):
        digest.update(path.name.encode() + path.read_bytes())
    return [f"{CUDA} {digest.hexdigest()} for {architecture};" for architecture in _architectures()]


def _architectures() -> list[str]:
    if asked := os.environ.get("BAFT_CUDA_ARCHITECTURES", "").split():
        if unknown := [a for a in asked if a not in ARCHITECTURES]:
            known = ", ".join(ARCHITECTURES)
            raise RuntimeError(f"BAFT_CUDA_ARCHITECTURES: expected some of {known}, got {', '.join(unknown)}")
        return asked
    known = subprocess.run([_nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [a for a in ARCHITECTURES if f"compute_{a.rstrip('a')}" in known]


def _ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise SetupError("ninja isn't installed where baft-kernels is built: pip install ninja")
    return found


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _wanted(name: str) -> bool:
    asked = os.environ.get(SWITCHES[name])
    if name == CPU or asked:
        return asked != "0"
    try:
        return runpy.run_path(str(_torch() / "version.py"))["cuda"] is not None and bool(_nvcc())
    except (OSError, RuntimeError, KeyError, SetupError):
        return False


extensions = [Extension(name, SOURCES[name], py_limited_api=True, optional=True) for name in SOURCES if _wanted(name)]
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildWithNinja, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
