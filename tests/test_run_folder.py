"""A run's folder: one process at a time, and nothing but the run that it knows itself to be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from baft.fingerprint import hash_of_weights
from baft.runs.environment import commit_of
from baft.runs.folder import RunFolder
from baft.runs.identity import differences, hash_of_configuration


def test_differences_name_what_differs() -> None:
    before = {"mode": "batch", "config": {"rank": 4, "layers": None}, "code": "abc"}
    now = {"mode": "batch", "config": {"rank": 8, "layers": None}, "code": "abd"}
    assert differences(before, now) == ["config.rank was 4 and is 8", "the code of baft changed"]
    assert differences(before, before) == []


def test_differences_of_what_is_known_by_a_hash_are_told_in_words() -> None:
    def identity(requests: int, texts: int | None, hashed: str) -> dict[str, Any]:
        return {
            "requests": {"number": requests, "sha256": hashed},
            "unrelated texts": None if texts is None else {"number": texts, "sha256": hashed},
            "model": {"class": "LlamaForCausalLM", "configuration": hashed, "sha256": hashed},
        }

    called = {"model": "tiny", "dataset": "facts.json"}
    assert differences(identity(1000, 2, "a"), identity(1000, 3, "b"), **called) == [
        "the requests of facts.json changed (1,000 before and now, but with other contents)",
        "the unrelated texts of facts.json changed (2 before, 3 now)",
        "the configuration of tiny changed",
        "the weights of tiny changed",
    ]
    assert differences(identity(2, None, "a"), identity(1, 3, "a")) == [
        "the requests of the data set changed (2 before, 1 now)",
        "the unrelated texts of the data set changed (0 before, 3 now)",
    ]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_code_is_that_of_its_own_checkout(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("x = 1\n")

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    assert commit_of(package) is None
    git("init")
    git("commit", "--allow-empty", "-m", "something else")
    assert commit_of(package) is None  # as an environment in a project's folder
    git("add", ".")
    git("commit", "-m", "code")
    commit = git("rev-parse", "HEAD").strip()
    assert commit_of(package) == commit
    (package / "code.py").write_text("x = 2\n")
    assert commit_of(package) == f"{commit}-dirty"


def test_a_model_is_known_by_its_weights() -> None:
    model = tiny_model()
    known = hash_of_weights(model)
    assert hash_of_weights(tiny_model()) == known
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        kept_bits = weight.clone()
        weight[0, 0] += 1e-3
        assert hash_of_weights(model) != known
        weight.copy_(kept_bits)
        weight[[0, 1]] = weight[[1, 0]]  # the same numbers in other places
        assert hash_of_weights(model) != known
        weight[[0, 1]] = weight[[1, 0]]
    assert hash_of_weights(model) == known


@pytest.mark.parametrize("size", [0, 1, 7, 8, 29])
def test_every_byte_counts_wherever_it_lies(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are summed eight at a time, and of a large weight in pieces."""
    monkeypatch.setattr("baft.fingerprint._PIECE", 16)

    def hash_of(values: Tensor) -> str:
        module = torch.nn.Module()
        module.register_buffer("values", values)
        return hash_of_weights(module)

    values = torch.arange(size, dtype=torch.uint8)
    seen = {hash_of(values)}
    assert hash_of(torch.cat((torch.ones(3, dtype=torch.uint8), values))[3:]) in seen
    for place in range(size):
        changed = values.clone()
        changed[place] += 1
        seen.add(hash_of(changed))
    if size > 24:
        seen.add(hash_of(torch.cat((values[16:24], values[8:16], values[:8], values[24:]))))
    assert len(seen) == 1 + size + (size > 24)


def test_a_model_is_known_by_what_its_weights_do_not_show() -> None:
    model = tiny_model()
    known = hash_of_configuration(model)
    model.config._name_or_path = "elsewhere"
    assert hash_of_configuration(model) == known
    model.config.rms_norm_eps *= 10
    assert hash_of_configuration(model) != known


def test_a_lost_journal_is_not_begun_anew(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.begin({}, {})
        assert folder.journal.positions() == []
        folder.checkpoints().write(7, {"weight": torch.ones(1)})
    (tmp_path / "journal.sqlite").unlink()
    with RunFolder(tmp_path) as folder, pytest.raises(ValueError, match="checkpoints up to 7, got none"):
        _ = folder.journal
    assert not (tmp_path / "journal.sqlite").exists()


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="expected to be the only process that writes to"):
        RunFolder(tmp_path)
    first.close()
    RunFolder(tmp_path).close()


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"expected a new or empty folder.* holds other files"):
        RunFolder(tmp_path)
    with pytest.raises(ValueError, match=r"expected a new or empty folder.* is a file"):
        RunFolder(tmp_path / "thesis.tex")
