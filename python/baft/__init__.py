"""baft: edit facts in Hugging Face language models by changing hidden vectors, not weights.

>>> from baft import BaftConfig, BaftEditor, EditRequest
>>> editor = BaftEditor(model, tokenizer, BaftConfig())
>>> editor.edit([EditRequest(prompt="The president of X is", target="Y")])
"""

from baft.config import BaftConfig
from baft.editing import Editor, EditOutcome
from baft.editor import BaftEditor
from baft.engine.options import EngineOptions
from baft.requests import EditRequest, Probe
from baft_kernels import __version__

__all__ = ["BaftConfig", "BaftEditor", "EditOutcome", "EditRequest", "Editor", "EngineOptions", "Probe", "__version__"]
