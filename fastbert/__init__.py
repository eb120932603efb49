"""fastbert: BERT pre-training several times faster, and still BERT.

The names below are imported on first use (PEP 562), so that `import fastbert` and with it the
command's help never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.data.batch import Batch
    from fastbert.hf.accelerate import accelerate, decelerate
    from fastbert.hf.encode import encode
    from fastbert.hf.models import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
    )

__version__ = "0.1.0"

_HOME = {
    "fastbert.data.batch": ("Batch",),
    "fastbert.hf.accelerate": ("accelerate", "decelerate"),
    "fastbert.hf.encode": ("encode",),
    "fastbert.hf.models": (
        *("BertForMaskedLM", "BertForMultipleChoice", "BertForNextSentencePrediction"),
        *("BertForPreTraining", "BertForQuestionAnswering", "BertForSequenceClassification"),
        *("BertForTokenClassification", "BertModel"),
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Batch",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "__version__",
    "accelerate",
    "decelerate",
    "encode",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
