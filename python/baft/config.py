"""How an editor edits: every choice that the method leaves open, with its default and where the default comes from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from baft.positions import Positions

__all__ = ["BaftConfig"]

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


class BaftConfig(BaseModel):
    """Configuration of a ``BaftEditor``.

    The method's authors published no code, so each choice here is ours. The defaults were found by trials on 100
    FactWorld edits: in bench/results, ``factworld_editing_*.md`` has what they give, ``factworld_tuning_batch.md`` the
    grid of learning rates and locality weights, and ``factworld_ablations_batch.md`` what changing one of them does. No
    larger model was at hand: for one, ``layers``, ``rank`` and ``learning_rate`` are the first to tune.

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

        learning_rate: AdamW's rate for basis, source and source bias.
        gate_learning_rate: AdamW's rate for the gates. They hardly move: random gates already make the edit depend on
            the input in many different ways. At 0 generality loses 0.02; at ``learning_rate`` a batch comes out alike.
        weight_decay: AdamW's.
        project_gradients: project the gradient of each basis to the tangent space before the step.
        append_eos: end each target with EOS, so that generation learns to stop after it.
        locality_weight: of the locality loss; 0 uses no unrelated texts.
        locality_loss: ``kl``, the divergence of the edited from the unedited model's predictions at every token of the
            unrelated texts; or ``update``, the mean of ||u||^2 / ||h||^2 over them. ``kl`` lets an edit do what doesn't
            matter, and there is much of that.
        locality_margin: with ``update``, the ratio up to which a change costs nothing.
        unrelated_per_step: texts drawn for the locality loss of a step.
        balance_weight: of the incremental load balancing of the bases.

        stop_below: an edit is done when its loss (mean over the target's tokens) is below this.
        max_steps: steps for a request in single and sequential mode.
        rehearsal: earlier requests drawn into each of these steps.
        consolidate_every: in sequential mode, after every so many edits, go over all of them again; 0 never does.
        consolidation_passes: how often each time; the learning rates fall along a cosine meanwhile.
        batch_size: requests in a step of batch mode and of consolidation.
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
    weight_decay: Weight = 0.0
    project_gradients: bool = False
    append_eos: bool = True
    locality_weight: Weight = 40.0
    locality_loss: Literal["kl", "update"] = "kl"
    locality_margin: Weight = 0.0
    unrelated_per_step: Count = 48
    balance_weight: Weight = 0.0

    stop_below: Weight = 0.05
    max_steps: AtLeastOne = 10
    rehearsal: Count = 31
    consolidate_every: Count = 25
    consolidation_passes: Count = 20
    batch_size: AtLeastOne = 32
    batch_passes: AtLeastOne = 60

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
