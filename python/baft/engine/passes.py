"""The forward pass of training: from texts to the logits that the losses look at, with what can be saved saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from baft.attach import Attachment, LayerRecord
from baft.engine.encoding import Encoded, Encoder
from baft.engine.frozen import FrozenStates
from baft.engine.grid import Grid, lay_out
from baft.engine.options import EngineOptions
from baft.engine.replay import Replay
from baft.engine.unrelated import UnrelatedPool
from baft_kernels import GroupedBaftIntervention

__all__ = ["Passed", "Passes"]

# How different logits may be that should be the same, in standard deviations: they are by 1 where texts are mixed up.
_SAME = 0.1

# Unrelated texts that are computed together by the unedited model.
_COMPANY = 64


@dataclass(frozen=True)
class Passed:
    """What a forward pass gives.

    Attributes:
        grid: where the texts lay.
        answers: logits of the tokens that the edits' answers are predicted by, [M, V].
        edited, unedited: logits at every token of the unrelated texts, of the edited and, without gradient, of the
            unedited model, [K, V] each; None if they weren't asked for.
        records: by layer what the interventions did, if that was asked for.
    """

    grid: Grid
    answers: Tensor
    edited: Tensor | None
    unedited: Tensor | None
    records: Mapping[int, LayerRecord]


class Passes:
    """Forward passes of one model under edit.

    Args:
        model: frozen.
        attachment: the interventions on it.
        encoder: knows the padding.
        unrelated: texts that come again and again.
        options: what is saved.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attachment: Attachment,
        encoder: Encoder,
        unrelated: UnrelatedPool,
        options: EngineOptions,
    ) -> None:
        self.model = model
        self.attachment = attachment
        self.encoder = encoder
        self.options = options
        self._replay = Replay(model, attachment.blocks, min(attachment.interventions))
        self._side_by_side = options.side_by_side and self._keeps_texts_apart()
        self._tokens = self._cells = 0
        self._frozen = FrozenStates(
            self._replay, attachment, self._lay_out, unrelated.in_chunks(_COMPANY), options.memory
        )

    def refresh(self) -> None:
        """Notice if the model's own weights have changed since it was last asked to."""
        self._frozen.forget_if_changed()

    @contextmanager
    def run(
        self,
        edits: Sequence[Encoded],
        unrelated: Sequence[Encoded],
        sets: Sequence[int],
        *,
        grouped: Mapping[int, GroupedBaftIntervention] | None = None,
        predictions: bool,
        records: bool,
    ) -> Iterator[Passed]:
        """Run the edited model on texts; to be left after the backward pass, which may run blocks once more.

        Args:
            edits: prompts with answers.
            unrelated: texts.
            sets: the parameter set of each of ``edits``, then of ``unrelated``.
            grouped: the interventions that hold the sets; None is the attachment's own, one set.
            predictions: give ``edited`` and ``unedited``.
            records: give ``records``.
        """
        texts = [*edits, *unrelated]
        grid = self._lay_out(texts, sets)
        self._tokens += grid.tokens
        self._cells += grid.ids.numel()
        answered = [c for k, t in enumerate(edits) for c in grid.cells(k, t.prompt_length - 1, len(t.ids) - 1)]
        looked_at = [c for k, t in enumerate(unrelated, len(edits)) for c in grid.cells(k, 0, len(t.ids))]
        cells = torch.tensor([*answered, *(looked_at if predictions else [])]).to(grid.ids.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.attachment.rows(grid.edited))
            if grouped is not None:
                stack.enter_context(self.attachment.sets(grouped, grid.sets))
            seen = stack.enter_context(self.attachment.recording()) if records else {}
            if self.options.replay:
                logits, base = self._replay(
                    grid,
                    cells,
                    prefix=self._frozen.prefix(texts, grid),
                    unedited_input=self._frozen.head_input(unrelated) if predictions else None,
                    head_everywhere=not self.options.head_where_needed,
                )
            else:
                logits, _ = self._replay(grid, cells, head_everywhere=not self.options.head_where_needed)
                base = self._predictions(unrelated) if predictions else None
            split = len(answered)
            yield Passed(grid, logits[:split], logits[split:] if predictions else None, base, seen)

    def report(self) -> dict[str, Any]:
        """How texts were laid out so far, for people."""
        padding = 1 - self._tokens / self._cells if self._cells else None
        return {"texts_side_by_side": self._side_by_side, "padding": padding}

    @torch.no_grad()
    def _predictions(self, texts: Sequence[Encoded]) -> Tensor:
        """The unedited model's logits at every token of ``texts``, one text behind the other."""
        grid = self._lay_out(texts)
        cells = [cell for k, text in enumerate(texts) for cell in grid.cells(k, 0, len(text.ids))]
        with self.attachment.disabled():
            return self._replay(
                grid,
                torch.tensor(cells).to(grid.ids.device),
                head_everywhere=not self.options.head_where_needed,
            ).edited

    def _lay_out(self, texts: Sequence[Encoded], sets: Sequence[int] | None = None) -> Grid:
        return lay_out(
            texts,
            [0] * len(texts) if sets is None else sets,
            positions=self.attachment.positions,
            pad_id=self.encoder.pad_id,
            device=self.model.device,
            side_by_side=self._side_by_side,
            masked_in=self.model.dtype if self._takes_mask(max(len(text.ids) for text in texts)) else None,
        )

    def _takes_mask(self, longest: int) -> bool:
        """Whether the model can be given the mask between texts: every layer's mask is then that one."""
        config = self.model.config.get_text_config(decoder=True)
        windows = [value for name, value in vars(config).items() if "window" in name or "chunk" in name]
        sees_all = all(window >= longest for window in windows if isinstance(window, int) and window > 0)
        return sees_all and config._attn_implementation in ("sdpa", "eager")

    @torch.no_grad()
    def _keeps_texts_apart(self) -> bool:
        """Whether the model computes texts that lie side by side as it does each alone: tried, on two of them."""
        one, other = (Encoded(ids, len(ids), subject=(0, 0)) for ids in ((1, 2, 3, 4, 5), (6, 7, 8)))
        self._side_by_side = True
        with self.attachment.disabled():
            together = self._predictions([one, other])
            self._side_by_side = False
            alone = torch.cat((self._predictions([one]), self._predictions([other])))
        return bool((together - alone).abs().max() < _SAME * alone.std())
