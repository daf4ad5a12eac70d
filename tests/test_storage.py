"""An editor's folder: what is saved comes back bit for bit, and what can't be used is refused by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from looks import assert_same_state, logits
from safetensors.torch import load_file, save_file
from tiny import REQUESTS, UNRELATED, tiny_editor, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from baft import BaftEditor, EditRequest
from baft.engine.options import EngineOptions
from baft.fingerprint import fingerprint_of
from baft_kernels import orthonormality_error

FILES = ["adapter_config.json", "adapter_model.safetensors", "edits.json", "training_state.safetensors"]


def load(folder: Path, **model_options: Any) -> BaftEditor:
    return BaftEditor.from_pretrained(tiny_model(**model_options), tiny_tokenizer(), folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    editor = tiny_editor(max_steps=3)
    editor.edit(REQUESTS[:2])
    editor.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy of a saved editor's folder, to be damaged."""
    return Path(shutil.copytree(saved_once, tmp_path / "adapter"))


# -- what comes back --


def test_the_files_have_the_names_that_peft_gives_them(saved: Path) -> None:
    assert sorted(contents(saved)) == FILES
    description = json.loads((saved / "adapter_config.json").read_text())
    assert description["peft_type"] == "BAFT"
    assert description["baft"]["rank"] == 8
    assert (description["width"], description["layers"]) == (32, [1])


def test_an_editor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    editor = tiny_editor(layers=(0, 2), balance_weight=0.1)
    editor.edit(REQUESTS[:2])
    editor.save_pretrained(str(tmp_path))
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(editor))
    assert_same_state(loaded.state(), editor.state())
    assert loaded.edits == editor.edits == REQUESTS[:2]
    assert loaded.config == editor.config


def test_the_machine_is_no_part_of_what_is_saved(tmp_path: Path) -> None:
    """An adapter that a GPU's kernels have made is loaded where there is no GPU."""
    editor = tiny_editor(backend="reference")
    editor.edit(REQUESTS[:1])
    editor.save_pretrained(tmp_path)
    assert "backend" not in json.loads((tmp_path / "adapter_config.json").read_text())["baft"]
    assert load(tmp_path).config == editor.config.model_copy(update={"backend": "auto"})
    options = EngineOptions(slots=1)
    loaded = BaftEditor.from_pretrained(tiny_model(), tiny_tokenizer(), tmp_path, options=options, backend="reference")
    assert loaded.config == editor.config and loaded._options is options
    assert {intervention.backend for intervention in loaded.interventions.values()} == {"reference"}
    assert torch.equal(logits(loaded), logits(editor))


LONG_RUN = {"grow_every": 2, "grow_by": 3, "consolidate_every": 2, "consolidation_steps": 3, "rehearsal_buffer": 2}


@pytest.mark.parametrize(("mode", "changes"), [("sequential", {}), ("batch", {}), ("sequential", LONG_RUN)])
def test_editing_goes_on_as_if_it_had_never_stopped(tmp_path: Path, mode: Any, changes: dict[str, Any]) -> None:
    editor = tiny_editor(balance_weight=0.1, rehearsal=1, unrelated_per_step=2, max_steps=10, **changes)
    editor.edit(REQUESTS[:3])
    assert editor.attachment.rank == (11 if changes else 8)
    editor.save_pretrained(tmp_path)
    uninterrupted = editor.edit(REQUESTS[3:], mode)
    loaded = load(tmp_path)
    continued = loaded.edit(REQUESTS[3:], mode)
    assert [outcome.curve.losses for outcome in continued] == [outcome.curve.losses for outcome in uninterrupted]
    assert_same_state(loaded.state(), editor.state())
    assert loaded.edits == editor.edits == REQUESTS
    for intervention in loaded.interventions.values():
        assert orthonormality_error(intervention.basis) <= 1e-6


def test_an_editor_without_edits_can_be_saved(tmp_path: Path) -> None:
    editor = tiny_editor(max_steps=3)
    editor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(editor))
    assert loaded.edits == []
    editor.edit(REQUESTS[:1])
    loaded.edit(REQUESTS[:1])
    assert_same_state(loaded.state(), editor.state())


def test_requests_and_texts_are_kept_in_any_script(tmp_path: Path) -> None:
    request = EditRequest(
        prompt="The capital of Norland is",
        target="Ebor",
        target_aliases=["Эбор", "エボル", "é\u2028"],
        locality={"near": [("Paris is in", "Norland")]},
        id="7",
    )
    editor = tiny_editor(max_steps=1)
    editor.edit([request])
    editor.save_pretrained(tmp_path)
    assert load(tmp_path).edits == [request]
    assert json.loads((tmp_path / "edits.json").read_text("utf-8"))["unrelated"] == UNRELATED


def test_a_folder_can_be_saved_over(saved: Path) -> None:
    editor = load(saved)
    editor.edit(REQUESTS[2:3])
    editor.save_pretrained(saved)
    assert sorted(contents(saved)) == FILES
    assert load(saved).edits == REQUESTS[:3]


# -- what model it is for --


def changed_model(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """The tiny model, of which one weight in a module of this name is another."""
    model = tiny_model(**options)
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] += 1e-3
    return model.to(dtype)


@pytest.mark.parametrize(
    ("module", "part"), [("model.embed_tokens", "the embedding"), ("model.layers.1.mlp.up_proj", "block 1")]
)
def test_an_adapter_of_another_model_is_refused_unless_it_is_asked_for(saved: Path, module: str, part: str) -> None:
    model = changed_model(module)
    model.config._name_or_path = "a/variant"
    expected = (
        f"{saved}: expected the model that it was saved for, '', got 'a/variant', with other weights in {part}: any"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        BaftEditor.from_pretrained(model, tiny_tokenizer(), saved)
    loaded = BaftEditor.from_pretrained(model, tiny_tokenizer(), saved, any_model=True)  # nothing was left on it
    assert loaded.edits == REQUESTS[:2]
    loaded.save_pretrained(saved)  # from now on it is this one's
    loaded.remove()
    assert BaftEditor.from_pretrained(model, tiny_tokenizer(), saved).edits == REQUESTS[:2]


def test_an_adapter_of_another_architecture_is_refused_whatever_the_weights_are_in(saved: Path) -> None:
    model = tiny_model(intermediate_size=80, num_key_value_heads=1).to(torch.bfloat16)
    expected = r"with intermediate_size 80 in place of \d+; num_key_value_heads 1 in place of \d+: any_model takes"
    with pytest.raises(ValueError, match=expected):
        BaftEditor.from_pretrained(model, tiny_tokenizer(), saved)


def test_weights_in_another_dtype_are_not_compared(saved: Path) -> None:
    model = changed_model("model.layers.1.mlp.up_proj", torch.bfloat16)
    assert BaftEditor.from_pretrained(model, tiny_tokenizer(), saved).edits == REQUESTS[:2]


def test_weights_that_are_not_plain_are_not_compared() -> None:
    """A quantised matrix is of integers; the other parts of the model are compared all the same."""
    known = tiny_editor()._fingerprint()
    for other, found in (
        ("model.layers.1.mlp.down_proj", []),
        ("model.embed_tokens", ["other weights in the embedding"]),
    ):
        model = changed_model(other)
        linear = model.get_submodule("model.layers.1.mlp.up_proj")
        linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
        assert known.differences(tiny_editor(model)._fingerprint()) == found
        assert not fingerprint_of(model, {"a matrix": linear}).weights
    block = tiny_model().get_submodule("model.layers.1")
    block.get_submodule("input_layernorm").to(torch.bfloat16)  # as some models are loaded
    assert not fingerprint_of(model, {"a block": block}).weights


def test_what_a_model_is_not_saved_with_makes_no_difference(saved: Path) -> None:
    """A mask in each block, say, as some versions of transformers have, and no other reason to know the block less."""
    for change, expected in ((0.0, nullcontext()), (1e-3, pytest.raises(ValueError, match="other weights in block 1"))):
        model = tiny_model()
        block = model.get_submodule("model.layers.1")
        block.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool).tril(), persistent=False)
        with torch.no_grad():
            block.get_submodule("mlp.up_proj").weight[0, 0] += change
        with expected:
            assert BaftEditor.from_pretrained(model, tiny_tokenizer(), saved).edits == REQUESTS[:2]


def test_a_folder_of_an_older_version_knows_no_model(saved: Path) -> None:
    path = saved / "adapter_config.json"
    description = json.loads(path.read_text())
    del description["fingerprint"]
    path.write_text(json.dumps(description))
    model = changed_model("model.layers.1.mlp.up_proj")
    assert BaftEditor.from_pretrained(model, tiny_tokenizer(), saved).edits == REQUESTS[:2]


# -- what is refused --


def test_an_adapter_for_another_width(saved: Path) -> None:
    with pytest.raises(ValueError, match="expected an adapter for hidden vectors of width 48, got one for 32"):
        load(saved, hidden_size=48)


def test_an_adapter_for_a_deeper_model(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"^layers: expected different blocks from 0 to 0, got \[1\]"):
        load(saved, num_hidden_layers=1)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_state.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_a_damaged_tensor_file(saved: Path, name: str, damage: str) -> None:
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes({"truncated": whole[:-9], "empty": b"", "noise": b"\xff" * 99}[damage])
    with pytest.raises(ValueError, match=f"{name}: expected a whole safetensors file"):
        load(saved)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_state.safetensors"])
def test_a_pickle_under_a_safe_name_is_not_opened(saved: Path, tmp_path: Path, name: str) -> None:
    sprung = tmp_path / "sprung"
    (saved / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=f"{name}: expected a whole safetensors file"):
        load(saved)
    assert not sprung.exists()


def test_pickled_weights_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=r"found only adapter_model\.bin, and pickled files are never loaded"):
        load(saved)
    assert not sprung.exists()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: expected .*, found none"):
        load(saved)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json: expected an adapter's file, found none"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_config.json", "edits.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected JSON"),
        (b'{"edits": [', "expected JSON"),
        (b"\xff\xfe{}", "expected JSON"),
        (b"[1, 2]", "expected a JSON object, got list"),
    ],
)
def test_corrupted_json(saved: Path, name: str, text: bytes, message: str) -> None:
    (saved / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        load(saved)


@pytest.mark.parametrize("change", [{"peft_type": "LORA"}, {"format": 99}])
def test_another_kind_of_adapter(saved: Path, change: dict[str, Any]) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=r"adapter_config\.json: expected peft_type 'BAFT', format 1, got"):
        load(saved)


@pytest.mark.parametrize("field", ["width", "layers", "baft", "base_model_name_or_path"])
def test_a_description_with_a_field_missing(saved: Path, field: str) -> None:
    path = saved / "adapter_config.json"
    description = json.loads(path.read_text())
    del description[field]
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=f"expected an adapter as save_pretrained writes it, got KeyError.'{field}'"):
        load(saved)


@pytest.mark.parametrize(
    "change", [{"rank": 4}, {"rank": 0}, {"gate_fn": "none"}, {"positions": "nowhere"}, {"unheard_of": 1}]
)
def test_a_configuration_that_does_not_fit_its_tensors(saved: Path, change: dict[str, Any]) -> None:
    path = saved / "adapter_config.json"
    description = json.loads(path.read_text())
    description["baft"].update(change)
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="adapter"):
        load(saved)


def test_a_tensor_that_would_fit_by_broadcasting(saved: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    save_file({**tensors, "layers.1.source_bias": torch.ones(1)}, saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="expected the tensors of 1 layers, got others"):
        load(saved)


def test_an_adapter_that_could_not_be_loaded_leaves_nothing_on_the_model(saved: Path) -> None:
    shutil.copy(saved / "training_state.safetensors", saved / "adapter_model.safetensors")
    model = tiny_model()
    with pytest.raises(ValueError, match="expected the tensors of 1 layers, got others"):
        BaftEditor.from_pretrained(model, tiny_tokenizer(), saved)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# -- a disk that is full --


@pytest.mark.parametrize("files_written", range(len(FILES)))
def test_a_full_disk_leaves_the_earlier_files_as_they_were(
    saved: Path, monkeypatch: pytest.MonkeyPatch, files_written: int
) -> None:
    before = contents(saved)
    editor = load(saved)
    editor.edit(REQUESTS[2:3])
    synced = iter(range(len(FILES)))

    def full(_: int) -> None:
        if next(synced) == files_written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{saved}/({'|'.join(FILES)})'"):
        editor.save_pretrained(saved)
    assert contents(saved) == before


@pytest.mark.parametrize("method", ["write_bytes", "write_text"])
def test_a_file_that_was_written_in_part_is_cleared_away(
    saved: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    before = contents(saved)
    editor = load(saved)

    def full(path: Path, *_: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(OSError, match="No space left"):
        editor.save_pretrained(saved)
    assert contents(saved) == before


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        tiny_editor().save_pretrained(tmp_path / "file" / "adapter")
