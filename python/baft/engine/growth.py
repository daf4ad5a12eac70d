"""Bases that are added while editing goes on, and the gates of bases that are new."""

from __future__ import annotations

import torch

from baft.engine.calibration import calibrate_gates
from baft.engine.modes import evaluating
from baft.engine.trainer import Trainer

__all__ = ["grow", "set_new_gates"]

_CALIBRATION_TEXTS = 256


def grow(trainer: Trainer, highest: int) -> None:
    """Add ``grow_by`` bases to each edited block, orthogonal to the old ones, with gates that start closed.

    What was learned stays as it is: the new ones change nothing until they are trained, and gates that are hardly open
    let training move them first where it needs them. Of a rank of ``highest`` nothing more is added.
    """
    config, interventions = trainer.config, trainer.passes.attachment.interventions
    rank = trainer.passes.attachment.rank
    extra = min(config.grow_by, highest - rank)
    if extra <= 0:
        return
    for intervention in interventions.values():
        intervention.grow(extra, generator=trainer.generator)
    set_new_gates(trainer, config.growth_gate_bias, first=rank)
    trainer.renew()


def set_new_gates(trainer: Trainer, bias: float, *, first: int = 0) -> None:
    """Calibrate the gates from number ``first`` on, on unrelated texts."""
    passes, config = trainer.passes, trainer.config
    # By a generator of its own: always the same texts, and none of training's draws.
    texts = trainer.unrelated.draw(_CALIBRATION_TEXTS, torch.Generator().manual_seed(config.seed))
    with evaluating(passes.model):
        calibrate_gates(
            passes.model, passes.attachment, passes.encoder, texts, scale=config.gate_scale, bias=bias, first=first
        )
    # Processes on unlike machines may have calibrated by a rounding differently.
    interventions = passes.attachment.interventions.values()
    passes.options.world.copy_first_([value for i in interventions for value in i.parameters()])
