"""The forward pass of training: from texts to the logits that the losses look at, with what can be saved saved."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from baft import objective
from baft.attach import Attachment, LayerRecord
from baft.engine.buckets import rounded_up
from baft.engine.company import Company, LooseCompany
from baft.engine.divergence import divergence_in_pieces, rows_of_a_piece
from baft.engine.encoding import Encoded, Encoder
from baft.engine.frozen import FrozenStates
from baft.engine.grid import Grid, lay_out
from baft.engine.modes import evaluating
from baft.engine.options import EngineOptions
from baft.engine.replay import Replay
from baft.engine.surroundings import Surroundings
from baft.engine.unrelated import UnrelatedPool
from baft.placement import device_of
from baft.transfer import sent
from baft_kernels import GroupedBaftIntervention

__all__ = ["PassInputs", "Passed", "Passes"]

# How far a token's logits may be from what they should be, as a root mean square, in standard deviations of all logits.
# Rounding to bfloat16 put random models of 24 and 32 blocks 0.02 to 0.04 off, and texts that are mixed up 1.4.
_SAME = 0.2

# By these names configurations say how many tokens back a layer sees that doesn't see all.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")

# Unrelated texts that are computed together by the unedited model.
_COMPANY = 64

# What is computed for a cell that a loss looks at is little beside what the blocks compute for a row.
_CELL_BUCKETS = 1


@dataclass(frozen=True)
class PassInputs:
    """All that a forward pass needs to know of its texts, on the device.

    Where few shapes are asked for, cells and rows are more than the texts have: the last ones are padding.

    Attributes:
        grid: where the texts lie.
        answer_cells: cells of the tokens that the edits' answers are predicted by, [M].
        edit_cells: cells of all tokens of the edits, [N].
        unrelated_cells: likewise of the unrelated texts, [K].
        prefix: the first edited block's output, [G, W, d], before its edit; None has it computed.
        head_input: of each of ``unrelated_cells`` what the unedited model's head is given, [K, d], or None.
        unedited: or its logits, [K, V]; None if they aren't asked for, or come from ``head_input``.
    """

    grid: Grid
    answer_cells: Tensor
    edit_cells: Tensor
    unrelated_cells: Tensor
    prefix: Tensor | None
    head_input: Tensor | None
    unedited: Tensor | None

    @property
    def predictions(self) -> bool:
        """Whether logits of the unrelated texts are asked for."""
        return self.head_input is not None or self.unedited is not None


@dataclass(frozen=True)
class Passed:
    """What a forward pass gives.

    Attributes:
        answers: logits at the inputs' ``answer_cells``, [M, V].
        divergence: of the predictions at its ``unrelated_cells`` from the unedited model's, as
            ``objective.kl_to_base`` has it, [K]; None if predictions weren't asked for.
        records: by layer what the interventions did, if that was asked for.
    """

    answers: Tensor
    divergence: Tensor | None
    records: Mapping[int, LayerRecord]


class Passes:
    """Forward passes of one model under edit.

    Args:
        model: frozen.
        attachment: the interventions on it.
        encoder: knows the padding.
        unrelated: texts that come again and again.
        surroundings: others, that come with what was written together with them.
        options: what is saved.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attachment: Attachment,
        encoder: Encoder,
        unrelated: UnrelatedPool,
        surroundings: Surroundings,
        options: EngineOptions,
    ) -> None:
        self.model = model
        self.attachment = attachment
        self.encoder = encoder
        self.options = options
        self._replay = Replay(model, attachment.blocks, min(attachment.interventions))
        self._why_alone = self._why_not_side_by_side() if options.side_by_side else "switched off"
        self._side_by_side = self._why_alone is None
        self._tokens = self._cells = 0
        # A GPU computes a subject's texts as fast as one of them; a CPU does no more than what a step asks for.
        all_about = surroundings.all_about if device_of(model).type == "cuda" else None
        self._company, self._loose = (
            kind(unrelated.in_chunks(_COMPANY), all_about) for kind in (Company, LooseCompany)
        )
        self._frozen = FrozenStates(
            self._replay, attachment, self._lay_out, self._company.frequent_tokens, options.memory
        )

    def refresh(self) -> bool:
        """Notice if the model's own weights have changed since it was last asked to; returns whether they have."""
        return self._frozen.forget_if_changed()

    def arrange(
        self,
        edits: Sequence[Encoded],
        unrelated: Sequence[Encoded],
        sets: Sequence[int],
        *,
        predictions: bool,
        few_shapes: bool = False,
    ) -> PassInputs:
        """Lay texts out for ``run``: all of a pass that the host does.

        Args:
            edits: prompts with answers.
            unrelated: texts.
            sets: the parameter set of each of ``edits``, then of ``unrelated``.
            predictions: ask for ``Passed.divergence``, if there are unrelated texts.
            few_shapes: pad so that different texts come out in the same shapes.
        """
        texts = [*edits, *unrelated]
        grid = self._lay_out(texts, sets, few_shapes)
        self._tokens += grid.tokens
        self._cells += grid.ids.numel()

        def sent_cells(cells: list[int]) -> Tensor:
            # Cell 0 is as good as any other, since nothing looks at what comes of padding.
            padding = rounded_up(len(cells), _CELL_BUCKETS) - len(cells) if few_shapes else 0
            return sent(cells + [0] * padding, grid.ids.device)

        unrelated_cells = sent_cells(_all_cells(grid, unrelated, len(edits)))
        replayed = self.options.replay
        predictions = predictions and bool(unrelated)
        # Edits that share passes have given up on being the same bits whatever else is edited.
        company = self._loose if len({*sets}) > 1 else self._company
        # First: of what is computed for its prefix alone, the head's input isn't known.
        head_input = None
        if replayed and predictions:
            head_input = self._frozen.head_input(unrelated, company, len(unrelated_cells))
        return PassInputs(
            grid=grid,
            answer_cells=sent_cells(
                [c for k, t in enumerate(edits) for c in grid.cells(k, t.answer_start - 1, len(t.ids) - 1)]
            ),
            edit_cells=sent_cells(_all_cells(grid, edits, 0)),
            unrelated_cells=unrelated_cells,
            prefix=self._frozen.prefix(texts, grid, company) if replayed else None,
            head_input=head_input,
            unedited=None if replayed or not predictions else self._predictions(unrelated, len(unrelated_cells)),
        )

    @contextmanager
    def run(
        self, inputs: PassInputs, *, grouped: Mapping[int, GroupedBaftIntervention] | None = None, records: bool
    ) -> Iterator[Passed]:
        """Run the edited model; to be left after the backward pass, which may run blocks once more.

        Nothing here depends on values that the host would have to wait for.

        Args:
            inputs: what was arranged.
            grouped: the interventions that hold the sets; None is the attachment's own, one set.
            records: give ``records``.
        """
        grid = inputs.grid
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.attachment.rows(grid.edited))
            if grouped is not None:
                stack.enter_context(self.attachment.sets(grouped, grid.sets))
            seen = stack.enter_context(self.attachment.recording()) if records else {}
            answers, divergence = stack.enter_context(self._looked_at(inputs))
            yield Passed(answers, divergence, seen)

    @contextmanager
    def _looked_at(self, inputs: PassInputs) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What the losses look at: ``Passed.answers`` and ``Passed.divergence``."""
        run = partial(
            self._replay.run,
            inputs.grid,
            prefix=inputs.prefix,
            head_everywhere=not self.options.head_where_needed,
        )
        answers = inputs.answer_cells
        if not inputs.predictions:
            with run(answers) as ran:
                yield ran.logits, None
        elif inputs.head_input is not None and self._replay.ends_with_head and self.options.head_where_needed:
            with run(answers, further=inputs.unrelated_cells) as ran:
                assert ran.head_input is not None
                rows = rows_of_a_piece(ran.logits.shape[-1], ran.head_input.device)
                yield ran.logits, divergence_in_pieces(self._replay.head, ran.head_input, inputs.head_input, rows)
        else:
            with run(torch.cat((answers, inputs.unrelated_cells)), unedited_input=inputs.head_input) as ran:
                # Split, not sliced: the gradient is then put together once, not summed of parts filled up with zeros.
                logits, edited = ran.logits.split((len(answers), len(inputs.unrelated_cells)))
                unedited = inputs.unedited if ran.unedited is None else ran.unedited
                assert unedited is not None
                yield logits, objective.kl_to_base(edited, unedited)

    def report(self) -> dict[str, Any]:
        """How texts were laid out so far, and why not side by side, for people."""
        return {
            "texts_side_by_side": self._side_by_side,
            "why_one_a_row": self._why_alone,
            "padding": 1 - self._tokens / self._cells if self._cells else None,
            "remembered_bytes": self._frozen.written_bytes,
        }

    @torch.no_grad()
    def _predictions(
        self,
        texts: Sequence[Encoded],
        rows: int | None = None,
        *,
        sets: Sequence[int] | None = None,
        masked: bool = True,
    ) -> Tensor:
        """The unedited model's logits at every token of ``texts``, one text behind the other; up to ``rows`` padded."""
        grid = self._lay_out(texts, sets, masked=masked)
        cells = _all_cells(grid, texts, 0)
        padding = 0 if rows is None else rows - len(cells)
        wanted = sent(cells + [0] * padding, grid.ids.device)
        everywhere = not self.options.head_where_needed
        with self.attachment.disabled(), self._replay.run(grid, wanted, head_everywhere=everywhere) as ran:
            return ran.logits

    def _lay_out(
        self,
        texts: Sequence[Encoded],
        sets: Sequence[int] | None = None,
        few_shapes: bool = False,
        *,
        masked: bool = True,
    ) -> Grid:
        masked = masked and self._takes_mask(max(len(text.ids) for text in texts))
        return lay_out(
            texts,
            [0] * len(texts) if sets is None else sets,
            positions=self.attachment.positions,
            pad_id=self.encoder.pad_id,
            device=device_of(self.model),
            side_by_side=self._side_by_side,
            masked_in=self.model.dtype if masked else None,
            few_shapes=few_shapes,
        )

    def _takes_mask(self, longest: int) -> bool:
        """Whether the model can be given the mask between texts: every layer's mask is then that one."""
        config = self.model.config.get_text_config(decoder=True)
        sees_all = all(window >= longest for window in _windows(config))
        return sees_all and config._attn_implementation in ("sdpa", "eager")

    @torch.no_grad()
    def _why_not_side_by_side(self) -> str | None:
        """None if the model computes texts that lie side by side as it does each alone: tried, on some that do.

        On two rows of them: of a single row, and of no other, FlashAttention finds by the positions where texts begin.
        """
        texts = [Encoded(tuple(range(k, k + 4)), 4, subject=(0, 0)) for k in (1, 5, 9, 13)]
        rows, sets = [*texts, *reversed(texts)], [0] * 4 + [1] * 4  # a row has texts of one set
        ways = {self._takes_mask(length) for length in (4, sys.maxsize)}  # of short texts, of long ones
        with evaluating(self.model), self.attachment.disabled():
            self._side_by_side = False
            alone = torch.cat([self._predictions([text]) for text in rows])
            self._side_by_side = True
            together = [self._predictions(rows, sets=sets, masked=masked) for masked in ways]
        distance = torch.stack([_distance(logits, alone) for logits in together]).max().item()
        if distance < _SAME:
            return None
        attention = self.model.config.get_text_config(decoder=True)._attn_implementation
        return (
            f"with {attention} attention {type(self.model).__name__} mixes texts up: their logits are {distance:.2g} "
            f"standard deviations from what they are alone, where at most {_SAME} may be rounding"
        )


def _windows(config: PreTrainedConfig) -> Iterator[int]:
    """How many tokens back layers see that don't see all."""
    for name in _WINDOWS:
        window = getattr(config, name, None)
        used = getattr(config, f"use_{name}", None) is not False
        if used and isinstance(window, int) and not isinstance(window, bool) and window > 0:
            yield window


def _distance(logits: Tensor, expected: Tensor) -> Tensor:
    """How far the worst token's logits are from what they should be, as ``_SAME`` counts it: [M, V] twice -> []."""
    off = (logits.float() - expected.float()).square().mean(-1).sqrt()
    return off.max() / expected.float().std()


def _all_cells(grid: Grid, texts: Sequence[Encoded], first: int) -> list[int]:
    """The cells of all tokens of ``texts``, the first of which has number ``first`` on the grid."""
    return [cell for k, text in enumerate(texts, first) for cell in grid.cells(k, 0, len(text.ids))]
