"""General ability by EleutherAI's lm-eval: its tasks, put to a model under edit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from baft.config import BaftConfig
from baft.editing import Editor
from baft.engine.modes import evaluating

__all__ = ["check_tasks", "general_ability", "side_by_side"]


def check_tasks(tasks: Sequence[str], config: BaftConfig, *, include: str | Path | None = None) -> None:
    """Make sure that ``general_ability`` can be asked of an editor with this ``config``; it takes lm-eval some seconds.

    Raises:
        ValueError: for no tasks or unknown ones, if lm-eval isn't installed, or with ``positions="subject"``: tasks
            name no subjects.
    """
    _known(tasks, config, include)


def _known(tasks: Sequence[str], config: BaftConfig, include: str | Path | None) -> Any:
    """lm-eval's ``TaskManager``, which knows these tasks."""
    if not tasks:
        raise ValueError("tasks: expected at least one, got none")
    if config.positions == "subject":
        raise ValueError('general_ability: expected positions that need no subject, got "subject"')
    if find_spec("lm_eval") is None:
        raise ValueError("general_ability: expected lm-eval to be installed: pip install 'baft-kernels[lm-eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"tasks: expected some of lm-eval's (lm-eval ls tasks), got {', '.join(unknown)}")
    return manager


def general_ability(
    editor: Editor,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    batch_size: int = 16,
    **options: Any,
) -> dict[str, float]:
    """Scores of the model as it is now on lm-eval's tasks; under ``editor.disabled()``, of the unedited one.

    lm-eval is handed the model object, on which the edits are: it needs to know nothing of them.

    Args:
        tasks: lm-eval's names ("hellaswag").
        include: a folder of YAML files with more tasks.
        batch_size: texts at once.
        options: others of ``lm_eval.simple_evaluate``, such as ``limit`` and ``num_fewshot``.

    Returns:
        Scores by task and measure ("hellaswag/acc"), and the standard errors that lm-eval has.

    Raises:
        ValueError: as ``check_tasks``.
    """
    manager = _known(tasks, editor.config, include)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(editor.model), torch.random.fork_rng():  # lm-eval seeds it
        # A tokenizer of its own, as it is given a padding token where it has none.
        model = HFLM(pretrained=editor.model, tokenizer=copy.deepcopy(editor.tokenizer), batch_size=batch_size)
        found = simple_evaluate(model, tasks=list(tasks), task_manager=manager, log_samples=False, **options)
    return {
        f"{task}/{measure.removesuffix(',none')}": float(score)
        for task, measures in found["results"].items()
        for measure, score in measures.items()
        if "," in measure and isinstance(score, int | float)  # beside scores there are names and counts
    }


def side_by_side(asked: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float, float]]:
    """Each score ``before`` and ``after``, as a run's results have them, without standard errors."""
    before, after = (asked.get(moment, {}) for moment in ("before", "after"))
    return [(name, score, after[name]) for name, score in before.items() if name in after and "_stderr" not in name]
