"""From the words that a run is started with to all that it works with; the same words make the same run again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from baft.baselines.methods import METHODS, make_editor
from baft.config import BaftConfig
from baft.datasets.factworld import WORLDS
from baft.datasets.loading import NAMED_DATASETS
from baft.distributed import ALONE, World
from baft.editing import Editor, LooksAhead, Mode
from baft.engine.options import EngineOptions
from baft.evaluation.harness import check_tasks
from baft.evaluation.room import check_room, tokens_needed
from baft.requests import EditRequest
from baft.runs.folder import RunFolder
from baft.runs.identity import identify
from baft.runs.inputs import load_assignment, load_held_out, load_model
from baft.runs.run import RunPlan
from baft.testbed.training import OnProgress
from baft.trained import TrainedEditor
from baft_kernels.backends import resolve_backend

__all__ = ["RunWords", "StartedRun", "start"]


class RunWords(BaseModel):
    """What a person says to start a run; ``run.json`` keeps it, with the places of files from the root.

    Where the model, the data set and the held-out texts are may be said anew when the run goes on: what is in them
    makes it the same run.

    Attributes:
        model, dataset: names or paths.
        method: how to edit.
        config: all fields of ``BaftConfig``, the defaults too, so that later defaults don't change the run.
        edits: how many requests; None is all.
        slots: single edits trained at a time.
        remember: MiB that the engine may remember texts in; None is the default of ``EngineOptions``.
        device_map, tensor_parallel, quantise: see ``load_model``.
        held_out: a file of texts for general ability, one a line; None takes some of the data set.
        measure_every, retained, final, answer_tokens, checkpoint_every: see ``RunPlan``.
        lm_eval: its ``tasks``, with commas between; "" are none any more.
        log: where figures go as they come, of ``baft.runs.logs.LOGS``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    dataset: str
    mode: Mode
    method: str = "baft"
    config: BaftConfig
    edits: int | None = None
    slots: int | None = None
    remember: int | None = None
    device_map: str | None = None
    tensor_parallel: bool = False
    quantise: str | None = None
    held_out: Path | None = None
    measure_every: int | None = None
    retained: int = 100
    final: int | None = None
    answer_tokens: int | None = None
    checkpoint_every: int | None = None
    lm_eval: str | None = None
    log: str | None = None

    def located(self) -> RunWords:
        """The same, with the places of files from the root: they hold wherever the run is gone on with."""
        is_file = self.dataset not in NAMED_DATASETS
        is_folder = self.model not in WORLDS and Path(self.model).is_dir()  # and no Hugging Face name
        return self.model_copy(
            update={
                "model": str(Path(self.model).absolute()) if is_folder else self.model,
                "dataset": str(Path(self.dataset).absolute()) if is_file else self.dataset,
                "held_out": None if self.held_out is None else self.held_out.absolute(),
            }
        )


@dataclass(frozen=True)
class StartedRun:
    """All that a run works with."""

    words: RunWords
    editor: Editor
    requests: list[EditRequest]
    plan: RunPlan

    @property
    def description(self) -> dict[str, Any]:
        """What ``results.json`` says at its top."""
        return {"model": self.words.model, "dataset": self.words.dataset, "method": self.editor.name}


def start(
    words: RunWords, folder: RunFolder | None, *, on_training: OnProgress | None = None, world: World = ALONE
) -> StartedRun:
    """Load what ``words`` name, and make ``folder``, in the process that has it, the run's, or make sure that it is.

    Raises:
        ValueError: if something can't be loaded, if a request can't be edited or the model has no room for a question
            about it, or if ``folder`` is another run's.
    """
    _check_method(words, world)
    tasks = _tasks(words)
    assignment = load_assignment(words.dataset, words.edits, words.config.seed)
    held_out = assignment.held_out if words.held_out is None else load_held_out(words.held_out)
    model, tokenizer = load_model(
        words.model,
        device_map=words.device_map,
        tensor_parallel=words.tensor_parallel,
        quantise=words.quantise,
        on_training=on_training,
        world=world,
    )
    options = None
    if METHODS[words.method].options is EngineOptions:
        memory = EngineOptions.memory if words.remember is None else words.remember << 20
        options = EngineOptions(slots=words.slots, memory=memory, world=world)
    editor = make_editor(words.method, model, tokenizer, words.config, unrelated=assignment.unrelated, options=options)
    if isinstance(editor, LooksAhead):
        editor.check(assignment.requests)  # and not when their turn comes, some day
    answer_tokens = words.answer_tokens or tokens_needed(editor.encoder, assignment.requests)
    check_room(editor, assignment.requests, answer_tokens, fluency=words.mode != "single")
    identity = identify(
        method=editor.name,
        mode=words.mode,
        config=words.config.model_dump(mode="json"),
        model=model,
        requests=assignment.requests,
        unrelated=assignment.unrelated,
        held_out=held_out,
        tokenizer=tokenizer,
        backend=resolve_backend(words.config.backend),
    )
    said, kept = words.model_dump(mode="json"), None
    if folder and folder.begun:
        folder.go_on(identity, said)
        kept = folder.journal.self_written()
    kept = world.first_ones(kept)  # from where it stands: written anew, texts may come out otherwise
    written = editor.fill_unrelated(assignment.requests, kept) if isinstance(editor, TrainedEditor) else []
    if folder and not folder.begun:
        folder.begin(identity, said)
    if folder and kept is None:
        folder.journal.add_self_written(written)
    plan = RunPlan(
        held_out=held_out,
        measure_every=words.measure_every,
        retained=words.retained,
        final=words.final,
        answer_tokens=answer_tokens,
        tasks=tasks,
        checkpoint_every=words.checkpoint_every,
    )
    return StartedRun(words, editor, assignment.requests, plan)


def _check_method(words: RunWords, world: World) -> None:
    """Refuse what is said to the engine, for a method that has none: it isn't passed over."""
    if METHODS[words.method].options is EngineOptions:
        return
    if world.size > 1:
        raise ValueError(
            f"method: expected one that several processes share, got {words.method}, which works in one: "
            "start it without torchrun"
        )
    for name in ("slots", "remember"):
        if getattr(words, name) is not None:
            raise ValueError(
                f"{name}: expected no number with method {words.method}, which BaFT's engine has no part in, "
                f"got {getattr(words, name)}"
            )


def _tasks(words: RunWords) -> list[str]:
    """The tasks of lm-eval, which know nothing of prompts: what isn't edited into the model they don't see."""
    if not words.lm_eval:
        return []
    if words.mode == "single" or words.method == "in-context":
        raise ValueError(
            f"lm-eval: expected edits that a model holds together at the end, got {words.mode} ones by {words.method}"
        )
    tasks = [task.strip() for task in words.lm_eval.split(",")]
    check_tasks(tasks, words.config)
    return tasks
