"""fastbert: BERT pre-training several times faster, and still BERT.

The names below are imported on first use (PEP 562), so that `import fastbert` and with it the
command's help never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.commands.pretrain import pretrain
    from fastbert.config import ModelConfig, PretrainConfig, model_config
    from fastbert.data.batch import Batch
    from fastbert.data.examples import pack
    from fastbert.data.tokenize import WordPiece
    from fastbert.errors import FastbertError, RunError, UserError
    from fastbert.hf.export import save_pretrained
    from fastbert.hf.models import BertForMaskedLM, BertForPreTraining, BertModel
    from fastbert.model.bert import Bert
    from fastbert.train.build import make_step
    from fastbert.train.callbacks import Callback, PretrainResult
    from fastbert.train.evaluate import Evaluation
    from fastbert.train.step import Metrics, TrainStep

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Bert",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertModel",
    "Callback",
    "Evaluation",
    "FastbertError",
    "Metrics",
    "ModelConfig",
    "PretrainConfig",
    "PretrainResult",
    "RunError",
    "TrainStep",
    "UserError",
    "WordPiece",
    "__version__",
    "make_step",
    "model_config",
    "pack",
    "pretrain",
    "save_pretrained",
]

_HOME = {
    "Batch": "fastbert.data.batch",
    "Bert": "fastbert.model.bert",
    "BertForMaskedLM": "fastbert.hf.models",
    "BertForPreTraining": "fastbert.hf.models",
    "BertModel": "fastbert.hf.models",
    "Callback": "fastbert.train.callbacks",
    "Evaluation": "fastbert.train.evaluate",
    "FastbertError": "fastbert.errors",
    "Metrics": "fastbert.train.step",
    "ModelConfig": "fastbert.config",
    "PretrainConfig": "fastbert.config",
    "PretrainResult": "fastbert.train.callbacks",
    "RunError": "fastbert.errors",
    "TrainStep": "fastbert.train.step",
    "UserError": "fastbert.errors",
    "WordPiece": "fastbert.data.tokenize",
    "make_step": "fastbert.train.build",
    "model_config": "fastbert.config",
    "pack": "fastbert.data.examples",
    "pretrain": "fastbert.commands.pretrain",
    "save_pretrained": "fastbert.hf.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
