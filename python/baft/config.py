"""How an editor edits: every choice that the method leaves open, with its default and where the default comes from."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from baft.positions import Positions

__all__ = ["BaftConfig"]

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


class BaftConfig(BaseModel):
    """Configuration of a ``BaftEditor``.

    The method's authors published no code, so each choice here is ours. The defaults were found by trials on FactWorld
    edits, not all of which are on file: in bench/results, ``factworld_editing_*.md`` has what 100 edits gave,
    ``factworld_tuning_batch.md`` a grid of learning rates and locality weights, and ``factworld_ablations_batch.md``
    what changing one of them does to a batch. ``factworld-large_capacity_200.md`` takes the defaults away one at a time
    from a sequence, ``factworld-paragraphs_long_targets.md`` has ``chunk_tokens`` and ``smoothing``, and ``long_run_*``
    have a thousand edits, with settings that are said there. No larger model was at hand: for one, ``layers``, ``rank``
    and ``learning_rate`` are the first to tune.

    Attributes:
        rank: r, the number of bases in each edited block.
        layers: the edited blocks, counted from 0; None spreads four evenly (all, if there are fewer).
        positions: the edited tokens: ``all``, ``prompt``, ``last``, ``subject``, or a form like ``f3+l2``.
        gate_fn: ``sigmoid``, ``softmax``, or ``none``, which is LoReFT.
        gate_scale: standard deviation of a new gate's logit over unrelated texts (``baft.engine.calibration``).
            Small, and the gates are half open everywhere and the edit is nearly linear in h; large, and they are on
            or off.
        gate_bias: mean of a new gate's logit over unrelated texts; negative starts the gates closed.
        blocks: module path of the decoder blocks ("model.layers"), where they can't be found by structure.
        prompt_template: what stands around each prompt, in editing and in measuring; ``{prompt}`` is the prompt.
        backend: of the op: ``auto``, ``reference``, or another that ``baft info`` lists.
        seed: of the first bases and gates and of every draw in training.

        learning_rate: AdamW's rate for basis, source and source bias, in a model of width ``rate_width``.
        gate_learning_rate: AdamW's rate for the gates, likewise. They hardly move: random gates already make the edit
            depend on the input in many different ways, and at 0 generality loses but 0.01.
        rate_width: the width that both rates are for. In a model of width d they are multiplied by
            sqrt(rate_width / d), so that a step moves a basis vector as far there, at most by 0.064: as they are, a
            first step would take 64 bases of width 4,096 too far from orthonormal ones for the fast retraction. None
            takes the rates as they are.
        weight_decay: AdamW's.
        project_gradients: project the gradient of each basis to the tangent space before the step.
        append_eos: end each target with EOS, so that generation learns to stop after it.
        locality_weight: of the locality loss; 0 draws no unrelated texts for one.
        locality_loss: ``kl``, the divergence of the edited from the unedited model's predictions at every token of the
            unrelated texts; or ``update``, the mean of ||u||^2 / ||h||^2 over them. ``kl`` lets an edit do what doesn't
            matter, and there is much of that.
        locality_margin: with ``update``, the ratio up to which a change costs nothing.
        unrelated_per_step: texts drawn for the locality loss of a step, at most.
        unrelated_per_edit: so many at most for each request in a step: what one edit alone does to other texts, a few
            of them show.
        subject_texts: so many texts the unedited model writes about the edit's subject. Those that don't tell the fact
            are among the texts of each step, and one of each rehearsed request's, as far as half of a step's texts go
            (of more, some are drawn); 0 looks at none.
        retellings: of those texts that do tell of the fact, so many at most are learned with the edit in a step, the
            target in the old answer's place: the model's own rephrasings. What is rehearsed comes as one of them half
            the time. 0 learns none, and the model writes none without ``subject_texts`` or a request's ``subject``.
        contexts: so many times the prompt itself and each retelling, behind the whole sentences of an unrelated text of
            at most 200 characters, join the retellings that ``retellings`` are drawn from: for a model that shall be
            asked in the middle of a text. What is counted from a prompt's beginning ("f3") is then counted from the
            text's. None of targets in chunks; where there is a ``prompt_template``, the prompt alone.
        balance_weight: of the incremental load balancing of the bases.

        smoothing: share of the model's own prediction in the target of a token that it predicts already, from 0 (none)
            to 1: see ``baft.objective.smoothed_nll``.
        stop_below: an edit is done when its loss (mean over the target's tokens) is below this, a single edit not
            before ``min_steps``.
        max_steps: steps for a request in single and sequential mode, at most; None is 20 for a single edit, 10 for one
            of a sequence.
        min_steps: as far as ``max_steps`` allows, steps that a single edit takes at least where there is a locality
            loss. Its own loss is soon low enough, but what it did to other texts nothing mends later, as rehearsal,
            consolidation and settling do in a sequence. By default they are all that it takes.
        rehearsal: earlier requests drawn into each of these steps.
        rehearsal_buffer: how many requests (or chunks) these are drawn from, a sample of all so far; None takes all.
        consolidate_every: in sequential mode, after every so many edits, go over earlier ones again; 0 never does.
        consolidation_steps: how many steps each time, at most; the learning rates fall along a cosine meanwhile. Those
            edited since the last time come first, then all others in rounds, each of which goes on where the last
            consolidation left it. It ends early with a whole round that finds all losses below ``stop_below``.
        settling_rounds: a sequential run (``baft run``; ``edit`` by itself doesn't) ends with so many rounds over all
            its edits, at most, over which the learning rates fall along one cosine:
            ``baft.trained.TrainedEditor.settle``.
        chunk_tokens: longer targets are edited in chunks of so many tokens, each behind those before it; ``max_steps``
            and ``min_steps`` are then for each chunk. None edits each target whole.
        grow_every: in sequential mode, after every so many edits, add ``grow_by`` bases to each block, orthogonal to
            the old ones and with gates that start closed; 0 never does.
        grow_by: how many bases each time.
        max_rank: a rank beyond which nothing grows; None grows up to the model's width.
        growth_gate_bias: ``gate_bias`` of the gates of added bases.
        batch_size: requests in a step of batch mode, of consolidation and of settling.
        batch_passes: passes over all requests in batch mode, at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: AtLeastOne = 64
    layers: tuple[Count, ...] | None = None
    positions: str = "all"
    gate_fn: Literal["sigmoid", "softmax", "none"] = "sigmoid"
    gate_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    gate_bias: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    blocks: str | None = None
    prompt_template: str = "{prompt}"
    backend: str = "auto"
    seed: int = 0

    learning_rate: Weight = 4e-3
    gate_learning_rate: Weight = 5e-4
    rate_width: AtLeastOne | None = 256
    weight_decay: Weight = 0.0
    project_gradients: bool = False
    append_eos: bool = True
    locality_weight: Weight = 15.0
    locality_loss: Literal["kl", "update"] = "kl"
    locality_margin: Weight = 0.0
    unrelated_per_step: Count = 48
    unrelated_per_edit: AtLeastOne = 16
    subject_texts: Count = 12
    retellings: Count = 3
    contexts: Count = 0
    balance_weight: Weight = 0.0

    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.0
    stop_below: Weight = 0.05
    max_steps: AtLeastOne | None = None
    min_steps: Count = 20
    rehearsal: Count = 31
    rehearsal_buffer: AtLeastOne | None = None
    consolidate_every: Count = 25
    consolidation_steps: Count = 40
    settling_rounds: Count = 8
    chunk_tokens: AtLeastOne | None = None
    grow_every: Count = 0
    grow_by: AtLeastOne = 16
    max_rank: AtLeastOne | None = None
    growth_gate_bias: Annotated[float, Field(allow_inf_nan=False)] = -4.0
    batch_size: AtLeastOne = 32
    batch_passes: AtLeastOne = 60

    def rates(self, width: int) -> tuple[float, float]:
        """AdamW's rates in a model of this width: of basis, source and source bias; of the gates."""
        factor = 1.0 if self.rate_width is None else math.sqrt(self.rate_width / width)
        return factor * self.learning_rate, factor * self.gate_learning_rate

    def steps_of_an_edit(self, *, alone: bool) -> tuple[int, int]:
        """How many steps a request (or a chunk of its target) takes: at least, at most.

        Args:
            alone: whether it is a single edit, and not one of a sequence.
        """
        most = self.max_steps or (20 if alone else 10)
        is_local = self.locality_weight > 0 and self.unrelated_per_step > 0
        return (min(self.min_steps, most) if alone and is_local else 0), most

    @field_validator("positions")
    @classmethod
    def _known_positions(cls, value: str) -> str:
        return Positions(value).spec

    @field_validator("prompt_template")
    @classmethod
    def _template_has_prompt(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError(f"prompt_template: expected {{prompt}} once in it, got {value!r}")
        return value

    @model_validator(mode="after")
    def _contexts_are_retellings(self) -> BaftConfig:
        if self.contexts and not self.retellings:
            raise ValueError(f"contexts: expected 0 without retellings, which they join, got {self.contexts}")
        return self

    @model_validator(mode="after")
    def _can_grow(self) -> BaftConfig:
        if self.max_rank is not None and self.max_rank < self.rank:
            raise ValueError(f"max_rank: expected at least rank = {self.rank}, got {self.max_rank}")
        if self.grow_every and self.gate_fn == "softmax":
            raise ValueError(
                "grow_every: expected 0 with softmax gates, which share a sum of 1: new ones would take from the old, "
                f"got {self.grow_every}"
            )
        return self
