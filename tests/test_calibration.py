"""Calibration: each gate cuts what a model has for inputs in two, whatever their scale and a few outliers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import attach, tiny_model, tiny_tokenizer
from tiny import one_thread as one_thread
from torch import Tensor

from baft.attach import Attachment
from baft.engine import calibration
from baft.engine.calibration import calibrate_gates
from baft.engine.encoding import Encoded, Encoder

TEXTS = ["the red house of Ada", "Bob is king of Norland and Ebor", "one text", "Ada likes the house of Bob"]
LAYER, BIAS, SCALE = 1, -0.5, 2.0


def calibrated(factor: float = 1.0, **changes: Any) -> tuple[Tensor, Tensor]:
    """Logits of a layer's gates [T, r] over the tokens of TEXTS, calibrated on them, and whether each begins its text.

    The first token of each text is ``factor`` times as long as the model makes it.
    """
    model, encoder = tiny_model(), Encoder(tiny_tokenizer(), append_eos=False)
    attachment: Attachment = attach(model, layers=(LAYER,))
    texts = [encoder.prompt(text) for text in TEXTS]
    seen: list[Tensor] = []

    def lengthen(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        h = (output if isinstance(output, Tensor) else output[0]).clone()
        h[:, 0] *= factor
        return h if isinstance(output, Tensor) else (h, *output[1:])

    with model.model.layers[LAYER].register_forward_hook(lengthen):
        calibrate_gates(model, attachment, encoder, texts, **{"scale": SCALE, "bias": BIAS, **changes})
        with (
            attachment.disabled(),
            torch.no_grad(),
            model.model.layers[LAYER].register_forward_hook(
                lambda _, __, output: seen.append((output if isinstance(output, Tensor) else output[0])[0])
            ),
        ):
            for text in texts:
                model(input_ids=torch.tensor([text.ids]))
    intervention = attachment.interventions[LAYER]
    begins = torch.cat([torch.arange(len(text.ids)) == 0 for text in texts])
    return (torch.cat(seen) @ intervention.gate.T + intervention.gate_bias).detach(), begins


def assert_in_two(logits: Tensor) -> None:
    torch.testing.assert_close(logits.mean(0), torch.full((logits.shape[1],), BIAS))
    torch.testing.assert_close(logits.std(0), torch.full((logits.shape[1],), SCALE))


def test_logits_have_the_mean_and_the_deviation_asked_for() -> None:
    assert_in_two(calibrated()[0])


def test_attention_sinks_do_not_count() -> None:
    logits, begins = calibrated(factor=300.0)
    assert_in_two(logits[~begins])


def test_texts_in_several_passes_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    together = calibrated()[0]
    monkeypatch.setattr(calibration, "_CELLS", 16)
    torch.testing.assert_close(calibrated()[0], together)


def test_a_part_is_no_larger_than_a_pass_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tiny_tokenizer(), append_eos=False)
    texts = [encoder.prompt(text) for text in TEXTS]
    most = max(len(text.ids) for text in texts)
    monkeypatch.setattr(calibration, "_CELLS", 2 * most)
    parts = list(calibration._parts(texts))
    assert [text for part in parts for text in part] == texts
    assert len(parts) == 2 and all(len(part) * max(len(text.ids) for text in part) <= 2 * most for part in parts)


def test_one_token_is_too_few() -> None:
    model, encoder = tiny_model(), Encoder(tiny_tokenizer(), append_eos=False)
    attachment = attach(model, layers=(LAYER,))
    text = Encoded((3,), 1, None)
    with pytest.raises(ValueError, match=r"^unrelated: expected texts of two tokens or more .*, got 1$"):
        calibrate_gates(model, attachment, encoder, [text], scale=SCALE, bias=BIAS)
