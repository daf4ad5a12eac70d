"""The editing engine on an NVIDIA GPU: by graphs as without, and what edited models say as on the CPU.

Skipped where there is no GPU, no transformers, or no pydantic.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU on this machine", allow_module_level=True)
pytest.importorskip("transformers")
pytest.importorskip("pydantic")

from tiny import REQUESTS, moved_from_identity, tiny_editor, tiny_model  # after those are known

from baft.engine.options import EngineOptions
from baft_kernels.backends import FUSED

GPU = "cuda"


@pytest.mark.parametrize("mode", ["sequential", "batch", "single"])
@pytest.mark.parametrize("changes", [{}, {"locality_loss": "update", "balance_weight": 0.1, "positions": "subject"}])
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_editing_by_graphs_is_editing(mode: Any, changes: dict[str, Any], backend: str) -> None:
    if backend in FUSED and (reason := FUSED[backend].why_unusable()) is not None:
        pytest.skip(reason)
    width = 768 if backend == "cuda" else 32  # it serves no width that tests take elsewhere
    rate = 6e-2 * 32 / width
    changes = {**changes, "backend": backend, "learning_rate": rate, "gate_learning_rate": rate}
    found = []
    for graphs in (True, False):
        options = EngineOptions(graphs=graphs, slots=2)
        model = tiny_model(hidden_size=width).to(GPU)
        for parameter in model.parameters():  # so that activations are as large as those of the narrow model
            parameter.data *= (32 / width) ** 0.5 if parameter.ndim == 2 else 1
        editor = tiny_editor(model, options=options, max_steps=8, batch_passes=8, **changes)
        curves = [outcome.curve for outcome in editor.edit(REQUESTS, mode)]
        found.append(([curve.steps for curve in curves], [curve.losses[-1] for curve in curves]))
        engine = editor.engine_report()
        report = engine["abreast"]["graphs"] if mode == "single" else engine["graphs"]
        assert re.fullmatch(r"captured [1-9]\d* shapes?", report) if graphs else report == "no: switched off"
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=0.02)  # padding rounds otherwise, and steps add it up


def test_edited_models_say_what_they_say_on_the_cpu() -> None:
    """Side by side, texts that have ended leaving the batch; and so does the unedited one of the edits' subjects."""
    prompts = [request.prompt for request in REQUESTS] * 3
    ids = [k % 2 for k in range(len(prompts))]
    states: list[dict[str, Tensor]] = []
    found = []
    for device in ("cpu", GPU):
        model = tiny_model().to(device)
        model.generation_config.eos_token_id = [2, *range(40, 60)]
        editor = tiny_editor(model, subject_texts=6)
        for seed in (0, 1) if device == "cpu" else ():
            states.append(moved_from_identity(editor, scale=2.0, seed=seed).state())
        said = editor.generate(prompts, adapters=editor.bank(states), adapter_ids=ids, max_new_tokens=12)
        editor.look_ahead(REQUESTS)
        surroundings = editor._begin().surroundings
        found.append((said, [surroundings.of(editor._encode(request)) for request in REQUESTS]))
    assert found[0] == found[1]
