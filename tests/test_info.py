"""The report of what is installed: complete, honest about what can't be used, and readable by machines."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from fake_backend import FakeBackend

import baft_kernels
from baft_kernels import info
from baft_kernels.backends import FUSED, KNOWN_BACKENDS, resolve_backend


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in info.ENVIRONMENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_json_can_hold_the_report() -> None:
    report = info.collect()
    assert json.loads(json.dumps(report)) == report


def test_versions_are_those_that_run() -> None:
    versions = info.collect()["versions"]
    assert versions["baft_kernels"] == baft_kernels.__version__
    assert sys.version.startswith(versions["python"])
    assert versions["torch"] == torch.__version__
    assert versions["cuda"] == torch.version.cuda


def test_triton_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules makes an import fail.
    monkeypatch.setitem(sys.modules, "triton", None)
    assert info.collect()["versions"]["triton"] is None
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    sys.modules["triton"].__version__ = "3.9.9"
    assert info.collect()["versions"]["triton"] == "3.9.9"


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    report = info.collect()
    assert report["gpus"] == ["GPU 0", "GPU 1"]
    assert re.search(r"^gpus +GPU 0, GPU 1$", info.render(report), re.MULTILINE)


def test_a_backend_is_usable_exactly_if_naming_it_works() -> None:
    backends = info.collect()["backends"]
    assert list(backends) == list(KNOWN_BACKENDS)
    assert backends["reference"] == {"usable": True, "reason": None, "serves": "everything", "unproven": None}
    for name, backend in backends.items():
        if backend["usable"]:
            assert resolve_backend(name) == name
        else:
            with pytest.raises(ValueError, match=re.escape(backend["reason"])):
                resolve_backend(name)


def test_auto_is_what_a_call_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert info.collect()["auto"]["cpu"] == {"backend": resolve_backend("auto", torch.ones(1, 1)), "reason": None}
    monkeypatch.setitem(FUSED, "triton", FakeBackend("triton", []))
    monkeypatch.setenv("BAFT_BACKEND", "triton")
    assert info.collect()["auto"]["cpu"] == {"backend": "triton", "reason": None}


def test_auto_passes_over_what_is_unproven_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeBackend("triton", [])
    fake.unproven = "it never ran"
    for name in list(FUSED):
        monkeypatch.delitem(FUSED, name)
    monkeypatch.setitem(FUSED, "triton", fake)
    report = info.collect()
    assert report["auto"]["cpu"]["backend"] == "reference"
    assert re.search(
        r'^backend triton +serves whatever a test wants; not chosen by "auto": it never ran$',
        info.render(report),
        re.MULTILINE,
    )
    assert resolve_backend("triton", torch.ones(1, 1)) == "triton"


def test_a_choice_that_cannot_serve_is_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAFT_BACKEND", "gpu")
    report = info.collect()
    auto = report["auto"]["cpu"]
    assert auto["backend"] is None
    assert auto["reason"].startswith("BAFT_BACKEND: expected auto or one of")
    assert report["environment"]["BAFT_BACKEND"] == "gpu"
    assert re.search(r"^auto on cpu +not usable: BAFT_BACKEND: expected", info.render(report), re.MULTILINE)


def test_every_environment_variable_that_the_source_reads_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(baft_kernels.__file__).parent
    files = [path for path in package.rglob("*.py") if path.name != "info.py"]
    files += (package.parent / "csrc").rglob("*.cpp")
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    read = re.findall(r"(?:environ\W+(?:get\W+)?|getenv\W+)(BAFT_[A-Z_]+)", source)
    assert set(read) == set(info.ENVIRONMENT_VARIABLES)
    monkeypatch.setenv("BAFT_CHECK_FINITE", "1")
    unset = dict.fromkeys(info.ENVIRONMENT_VARIABLES)
    assert info.collect()["environment"] == {**unset, "BAFT_CHECK_FINITE": "1"}


def test_text_has_a_line_for_each_entry() -> None:
    report = {
        "versions": {"torch": "2.13.0", "cuda": None},
        "cpu": "AVX2",
        "gpus": [],
        "backends": {
            "reference": {"usable": True, "reason": None, "serves": "everything", "unproven": None},
            "cuda": {"usable": False, "reason": "no GPU", "serves": "some", "unproven": None},
        },
        "auto": {"cpu": {"backend": "reference", "reason": None}},
        "environment": {"BAFT_BACKEND": None, "BAFT_CHECK_FINITE": "1"},
    }
    assert info.render(report).splitlines() == [
        "torch              2.13.0",
        "cuda               none",
        "cpu                AVX2",
        "gpus               none",
        "backend reference  serves everything",
        "backend cuda       not usable: no GPU",
        "auto on cpu        reference",
        "BAFT_BACKEND       not set",
        "BAFT_CHECK_FINITE  '1'",
    ]


def test_the_command_prints_text_or_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "baft_kernels.info")
    monkeypatch.setattr(sys, "argv", ["info"])
    runpy.run_module("baft_kernels.info", run_name="__main__")
    assert capsys.readouterr().out == info.render(info.collect()) + "\n"
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out) == info.collect()
