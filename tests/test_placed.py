"""Models spread over devices, memory and disk, and quantised ones: edits train on them, and leave them as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import REQUESTS, one_thread, tiny_editor, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from baft import BaftEditor
from baft.fingerprint import hash_of_weights
from baft.placement import device_of
from baft.runs.inputs import load_model

__all__ = ["one_thread"]

LIBRARIES = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate isn't installed: pip install 'baft-kernels[large]'",
)
CPU = torch.device("cpu")


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A tiny model as a person has it, on disk."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_model(), tmp_path / "model")


def said(editor: BaftEditor) -> list[str]:
    return [text.strip() for text in editor.generate([r.prompt for r in REQUESTS[:3]], max_new_tokens=6)]


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=torch.tensor([[1, 20, 30, 40, 50]])).logits


TARGETS = [request.target for request in REQUESTS[:3]]


# -- offloaded --


@needs_accelerate
def test_where_an_offloaded_model_computes() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(tiny_model(), CPU)
    block = model.get_submodule("model.layers.1")
    assert {weight.device.type for weight in block.parameters()} == {"meta"}
    assert device_of(block) == device_of(model) == CPU
    assert device_of(tiny_model()) == CPU


def offloaded(folder: Path, where: str) -> PreTrainedModel:
    """The model in ``folder`` with all its weights in memory, or most of them on disk."""
    from accelerate import cpu_offload

    if where == "memory":
        return cpu_offload(AutoModelForCausalLM.from_pretrained(folder).eval(), CPU)
    of_blocks = {f"model.layers.{block}": "disk" if block else "cpu" for block in range(3)}
    others = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=of_blocks | others, offload_folder=str(folder / "offloaded")
    ).eval()


@needs_accelerate
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_offloaded_model_is_known_by_all_its_weights(tmp_path: Path, where: str) -> None:
    """Those that are elsewhere, too: two models that differ in them alone are two models."""
    hashes = []
    for name, change in (("model", 0.0), ("other", 1e-3)):
        plain = tiny_model()
        with torch.no_grad():
            plain.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] += change
        hashes.append(hash_of_weights(plain))
        model = offloaded(saved(plain, tmp_path / name), where)
        assert hash_of_weights(model) == hashes[-1]
        assert {weight.device.type for weight in model.get_submodule("model.layers.1").parameters()} == {"meta"}
    assert hashes[0] != hashes[1]


def test_weights_that_are_nowhere_are_not_passed_over() -> None:
    model = tiny_model()
    model.get_submodule("model.layers.1").to("meta")
    with pytest.raises(
        ValueError, match=r"^model: expected weights that can be read, got model\.layers\.1\.\S+ on the"
    ):
        hash_of_weights(model)


@needs_accelerate
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_offloaded_model_is_edited_like_any(folder: Path, where: str) -> None:
    model = offloaded(folder, where)
    assert {weight.device.type for weight in model.get_submodule("model.layers.1").parameters()} == {"meta"}
    before = logits(model)
    editor = tiny_editor(model, layers=(1, 2))
    editor.edit(REQUESTS[:3])
    plain = tiny_editor(tiny_model(), layers=(1, 2))
    plain.edit(REQUESTS[:3])
    assert said(editor) == said(plain) == TARGETS
    assert all(torch.equal(value, plain.state()[name]) for name, value in editor.state().items())
    with editor.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(before, logits(tiny_model()))


@needs_accelerate
def test_a_device_map_is_passed_on(folder: Path) -> None:
    model, _ = load_model(str(folder), device_map="auto")
    editor = tiny_editor(model)
    editor.edit(REQUESTS[:3])
    assert said(editor) == TARGETS


# -- quantised --


def wide_model() -> PreTrainedModel:
    """One whose matrices are as wide as bitsandbytes' blocks."""
    return tiny_model(hidden_size=64, intermediate_size=128)


@pytest.fixture(params=LIBRARIES)
def quantised(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    library = LIBRARIES[request.param]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} isn't installed: pip install 'baft-kernels[quantised]'")
    model, _ = load_model(str(saved(wide_model(), tmp_path / "model")), quantise=request.param)
    return model


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_edits_train_on_a_quantised_model_that_stays_as_it_is(quantised: PreTrainedModel) -> None:
    editor = tiny_editor(quantised)
    with editor.disabled():
        before, weights = logits(quantised), hash_of_weights(quantised)
    assert not torch.equal(before, logits(wide_model())), "the model isn't quantised"
    assert said(editor) != TARGETS
    editor.edit(REQUESTS[:3])
    assert said(editor) == TARGETS
    assert {parameter.dtype for parameter in editor.interventions.parameters()} == {torch.float32}
    with editor.disabled():
        assert torch.equal(logits(quantised), before)
    assert hash_of_weights(quantised) == weights
    edited = logits(quantised)
    state = editor.state()
    editor.edit(REQUESTS[3:4])
    assert not torch.equal(logits(quantised), edited)
    editor.load_state(state)
    assert torch.equal(logits(quantised), edited)
    (alone,) = editor.edit_each(REQUESTS[4:5])
    assert alone.curve.losses[-1] < alone.curve.losses[0]


def test_gradients_go_through_quantised_matrices(quantised: PreTrainedModel) -> None:
    editor = tiny_editor(quantised)  # which sees to it
    embedded = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    linear = quantised.get_submodule("model.layers.2.mlp.up_proj")
    with editor.disabled(), torch.no_grad():
        logits(quantised)
        matrix = linear(torch.eye(64)).T
    linear(embedded).sum().backward()
    assert embedded.grad is not None
    torch.testing.assert_close(embedded.grad, matrix.sum(0).expand_as(embedded), rtol=0.02, atol=0.02)


def test_packed_weights_are_refused() -> None:
    model = tiny_model()
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    model.get_submodule("model.layers.0.mlp.up_proj").support_avx512bf16_for_cpu = True
    weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(ValueError, match="got ones that bitsandbytes has packed"):
        tiny_editor(model)


def test_what_a_quantised_model_is_told_apart_by(quantised: PreTrainedModel) -> None:
    before = hash_of_weights(quantised)
    weight = quantised.get_submodule("model.layers.0.mlp.up_proj").weight
    inner = weight.qdata if hasattr(weight, "qdata") else weight.data
    inner[0, 0] += 1
    assert hash_of_weights(quantised) != before


# -- bad input --


def test_bad_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^quantise: expected one of bnb-4bit, bnb-8bit, torchao-int8, got 'gptq'"):
        load_model(str(folder), quantise="gptq")
    with pytest.raises(ValueError, match="tensor_parallel: expected several processes, started by torchrun, got one"):
        load_model(str(folder), tensor_parallel=True)
    with pytest.raises(ValueError, match="tensor_parallel: expected no device_map and no quantise beside it"):
        load_model(str(folder), tensor_parallel=True, device_map="auto")
    monkeypatch.setattr("baft.runs.placed.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^device_map: .*accelerate to be installed: .*'baft-kernels\[large\]'"):
        load_model(str(folder), device_map="auto")


def test_a_model_whose_file_is_cut_off(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^model: expected a folder, .*, got '{folder}' \(.*not fully covered"):
        load_model(str(folder))


def test_a_tokenizer_whose_library_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str) -> None:
        raise ImportError("\nLlamaTokenizer requires the SentencePiece library but it was not found.\nInstall it")

    monkeypatch.setattr("baft.runs.inputs.AutoTokenizer.from_pretrained", load)
    with pytest.raises(ValueError, match=rf"^model: .*, got '{folder}' \(LlamaTokenizer requires .* not found\.\)$"):
        load_model(str(folder))
