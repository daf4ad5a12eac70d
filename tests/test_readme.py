"""Every Python example of the README runs as it is written, and its environment variables are those that are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example {number}" for number in range(1, len(EXAMPLES) + 1)])
def test_example(code: str, testbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # it saves to a folder
    exec(compile(code.replace('"MODEL"', repr(str(testbed))), "README.md", "exec"), {})


def test_the_environment_variables_are_those_that_are_read() -> None:
    rows = re.findall(r"^\| `(BAFT_\w+)` \| .*? \| `(.*?)` \|", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    folders = ("baft_kernels", "python", "csrc", "bench")
    files = [ROOT / "setup.py", ROOT / "tests" / "conftest.py"]
    files += [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in (".py", ".cpp", ".cu")]
    read = {name for path in files for name in _variables(path)}
    assert {name for name, _ in rows} == read and len(rows) == len(read)
    for name, file in rows:
        assert name in _variables(ROOT / file)


def _variables(path: Path) -> list[str]:
    """Our environment variables stand in quotes, where a file reads or sets them; macros of that prefix don't."""
    return re.findall(r'"(BAFT_[A-Z_]+)"', path.read_text(encoding="utf-8"))
