"""``baft eval`` and ``baft generate``: use what was edited."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from baft.cli.options import Adapter, AnswerTokens, AnyModel, DeviceMap, Edits, Json, Model, Quantise
from baft.console import Console

__all__ = ["evaluate", "generate"]


def evaluate(
    model: Model,
    adapter: Adapter,
    dataset: Annotated[str | None, typer.Option(help="Measure these requests instead of the adapter's own.")] = None,
    edits: Edits = None,
    answer_tokens: AnswerTokens = None,
    device_map: DeviceMap = None,
    quantise: Quantise = None,
    any_model: AnyModel = False,
    as_json: Json = False,
) -> None:
    """Measure a saved adapter: on the requests that were edited, or on those of a data set.

    Processes that torchrun started share the questions.
    """
    from baft.datasets import load_dataset
    from baft.distributed import launched
    from baft.editor import BaftEditor
    from baft.evaluation.measures import Evaluator, summarise
    from baft.evaluation.room import check_room, tokens_needed
    from baft.runs.conflicts import can_hold, conflicts
    from baft.runs.inputs import load_model
    from baft.runs.watcher import watched

    with launched() as world:
        console = Console(quiet=as_json, silent=not world.writes)
        with console.progress() as watcher:
            loaded, tokenizer = load_model(
                model, device_map=device_map, quantise=quantise, on_training=watcher.training, world=world
            )
            editor = BaftEditor.from_pretrained(loaded, tokenizer, adapter, any_model=any_model)
            edited = load_dataset(dataset)[:edits] if dataset else editor.edits
            standing = can_hold(conflicts(edited), range(len(edited)))
            requests = [edited[position] for position in standing][:edits]
            superseded = len(edited) - len(standing)
            answer_tokens = answer_tokens or tokens_needed(editor.encoder, edited)
            evaluator = Evaluator(editor, max_new_tokens=answer_tokens, world=world, say=watcher.say)
            check_room(editor, requests, evaluator.max_new_tokens)
            evaluator.record_base(requests, watched(watcher, "asking the unedited model"))
            metrics = summarise(evaluator.measure(requests, watched(watcher, "measuring")))
    if not world.writes:
        return
    if as_json:
        found = {"requests": len(requests), "superseded": superseded, "metrics": metrics}
        typer.echo(json.dumps({"protocol": evaluator.protocol, **found}))
    else:
        if superseded:
            console.say(f"Left out, as later requests contradict them: {superseded}")
        console.metrics({"now": metrics}, f"{len(requests)} requests")


def generate(
    model: Model,
    adapter: Adapter,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    device_map: DeviceMap = None,
    quantise: Quantise = None,
    any_model: AnyModel = False,
    as_json: Json = False,
) -> None:
    """Continue prompts with the unedited and with the edited model."""
    from baft.editor import BaftEditor
    from baft.runs.inputs import load_model

    console = Console(quiet=as_json)
    with console.progress() as watcher:
        loaded, tokenizer = load_model(model, device_map=device_map, quantise=quantise, on_training=watcher.training)
        editor = BaftEditor.from_pretrained(loaded, tokenizer, adapter, any_model=any_model)
        after = editor.generate(prompts, max_new_tokens=max_new_tokens)
        with editor.disabled():
            before = editor.generate(prompts, max_new_tokens=max_new_tokens)
    rows = [{"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)]
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        console.continuations(rows)
