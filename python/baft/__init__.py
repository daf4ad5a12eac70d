"""baft: edit facts in Hugging Face language models by changing hidden vectors, not weights.

>>> from baft import BaftConfig, BaftEditor, EditRequest
>>> editor = BaftEditor(model, tokenizer, BaftConfig())
>>> editor.edit([EditRequest(prompt="The president of X is", target="Y")])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baft.config import BaftConfig
    from baft.editing import Editor, EditOutcome
    from baft.editor import BaftEditor
    from baft.engine.options import EngineOptions
    from baft.requests import EditRequest, Probe
    from baft_kernels import __version__

__all__ = ["BaftConfig", "BaftEditor", "EditOutcome", "EditRequest", "Editor", "EngineOptions", "Probe", "__version__"]

_HOMES = {
    "BaftConfig": "baft.config",
    "BaftEditor": "baft.editor",
    "EditOutcome": "baft.editing",
    "EditRequest": "baft.requests",
    "Editor": "baft.editing",
    "EngineOptions": "baft.engine.options",
    "Probe": "baft.requests",
    "__version__": "baft_kernels",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Each name from its home when it is first asked for: torch takes seconds, in which the command already answers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_HOMES[name]), name)
    return found
