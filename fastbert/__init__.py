"""fastbert: BERT pre-training several times faster, and still BERT.

The names below are imported on first use (PEP 562), so that `import fastbert` and with it the
command's help never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.commands.finetune import fine_tune
    from fastbert.commands.pretrain import pretrain
    from fastbert.config import ModelConfig, PretrainConfig, model_config
    from fastbert.data.batch import Batch
    from fastbert.data.examples import pack
    from fastbert.data.tokenize import WordPiece
    from fastbert.errors import FastbertError, RunError, UserError
    from fastbert.finetune.config import (
        AnswerConfig,
        ChooseConfig,
        ClassifyConfig,
        EmbedConfig,
        TagConfig,
    )
    from fastbert.finetune.explain import Explanation, explain
    from fastbert.finetune.loop import FinetuneResult
    from fastbert.finetune.predict import Pipeline, pipeline
    from fastbert.hf.accelerate import accelerate, decelerate
    from fastbert.hf.attention import register_attention
    from fastbert.hf.encode import encode
    from fastbert.hf.export import save_pretrained
    from fastbert.hf.initial import load_pretrained
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
    from fastbert.model.bert import Bert
    from fastbert.train.build import make_step
    from fastbert.train.callbacks import Callback, PretrainResult
    from fastbert.train.evaluate import Evaluation
    from fastbert.train.step import Metrics, TrainStep

__version__ = "0.1.0"

__all__ = [
    "AnswerConfig",
    "Batch",
    "Bert",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "Callback",
    "ChooseConfig",
    "ClassifyConfig",
    "EmbedConfig",
    "Evaluation",
    "Explanation",
    "FastbertError",
    "FinetuneResult",
    "Metrics",
    "ModelConfig",
    "Pipeline",
    "PretrainConfig",
    "PretrainResult",
    "RunError",
    "TagConfig",
    "TrainStep",
    "UserError",
    "WordPiece",
    "__version__",
    "accelerate",
    "decelerate",
    "encode",
    "explain",
    "fine_tune",
    "load_pretrained",
    "make_step",
    "model_config",
    "pack",
    "pipeline",
    "pretrain",
    "register_attention",
    "save_pretrained",
]

_HOME = {
    "commands.finetune": ("fine_tune",),
    "commands.pretrain": ("pretrain",),
    "config": ("ModelConfig", "PretrainConfig", "model_config"),
    "data.batch": ("Batch",),
    "data.examples": ("pack",),
    "data.tokenize": ("WordPiece",),
    "errors": ("FastbertError", "RunError", "UserError"),
    "finetune.explain": ("Explanation", "explain"),
    "finetune.config": (
        *("AnswerConfig", "ChooseConfig", "ClassifyConfig", "EmbedConfig", "TagConfig"),
    ),
    "finetune.loop": ("FinetuneResult",),
    "finetune.predict": ("Pipeline", "pipeline"),
    "hf.accelerate": ("accelerate", "decelerate"),
    "hf.attention": ("register_attention",),
    "hf.encode": ("encode",),
    "hf.export": ("save_pretrained",),
    "hf.initial": ("load_pretrained",),
    "hf.models": (
        *("BertForMaskedLM", "BertForMultipleChoice", "BertForNextSentencePrediction"),
        *("BertForPreTraining", "BertForQuestionAnswering", "BertForSequenceClassification"),
        *("BertForTokenClassification", "BertModel"),
    ),
    "model.bert": ("Bert",),
    "train.build": ("make_step",),
    "train.callbacks": ("Callback", "PretrainResult"),
    "train.evaluate": ("Evaluation",),
    "train.step": ("Metrics", "TrainStep"),
}
_ROOM_OF = {name: room for room, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    value = getattr(import_module(f"fastbert.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
