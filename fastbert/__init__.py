"""fastbert: BERT pre-training several times faster, and still BERT.

The names below are imported on first use (PEP 562), so that `import fastbert` and with it the
command's help never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.data.batch import Batch
    from fastbert.hf.models import BertForMaskedLM, BertForPreTraining, BertModel

__version__ = "0.1.0"

__all__ = ["Batch", "BertForMaskedLM", "BertForPreTraining", "BertModel", "__version__"]

_HOME = {
    "Batch": "fastbert.data.batch",
    "BertForMaskedLM": "fastbert.hf.models",
    "BertForPreTraining": "fastbert.hf.models",
    "BertModel": "fastbert.hf.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
