"""What a run leaves for transformers: its model and its tokenizer, which is tried there first."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbert.config import ModelConfig
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError, UserError
from fastbert.hf.weights import save_folder
from fastbert.model.bert import Bert
from fastbert.train.step import TrainStep

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
_PROBES = (
    "er m\u00f6chte f\u00fcr die Caf\u00e9s",
    "UPPER lower \u0130stanbul \u039f\u0394\u039f\u03a3",
    "1,234.5 \u20ac -- (perhaps) 99%",
    "\u4e2d\u6587\u5b57 \u65e5\u672c\u8a9e\u304c \ud55c\uad6d\uc5b4",
    "\u0e44\u0e21\u0e48\u0e21\u0e35 \u0939\u093f\u0928\u094d\u0926\u0940 \u0645\u064f\u062d\u064e",
    "tabs\tand\u00a0spaces\u200b \x01 \u2028 \U0001f600 \u2764\ufe0f 1\ufe0f\u20e3",
    "x" * 101 + " " + "the" * 33,
    "[MASK] in [SEP]",
    "",
)


def check_tokenizer(tokenizer: WordPiece, folder: str | os.PathLike[str]) -> None:
    """Makes sure that transformers gives the ids which the model will be trained on.

    Args:
        tokenizer: what encodes the corpus.
        folder: where it was saved.

    Raises:
        UserError: transformers cannot load it, or gives other ids.
    """
    from transformers import PreTrainedTokenizerFast  # what AutoTokenizer finds there

    refused = "cannot be exported: give one with another normalizer or pre-tokenizer"
    try:
        theirs = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        texts = [*_PROBES, *tokenizer.tokens[-200:]]
        found = theirs(texts, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(
            f"the tokenizer {refused}: transformers cannot load it ({reason})"
        ) from None
    wanted = tokenizer.encode_batch(texts, parse_special=True)
    trained = tokenizer.encode_batch(texts)
    roles = {tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id}
    for text, a, b, c in zip(texts, wanted, found, trained, strict=True):
        if a != b or (a != c and not {*roles, tokenizer.mask_id} & set(a)):
            raise UserError(f"the tokenizer {refused}: transformers reads {text!r} otherwise")


def save_pretrained(
    model: TrainStep | Bert, folder: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """Writes a model for transformers' `from_pretrained`, in the class that has its heads.

    Args:
        model: a training step, whose fp32 weights are written, or a model.
        folder: made if missing; files of the same names are replaced.
        tokenizer: written beside it: a `WordPiece`, or one of transformers.

    Raises:
        RunError: the folder cannot be written.
    """
    bert = model.model if isinstance(model, TrainStep) else model
    weights: Mapping[str, Tensor] = dict(bert.named_parameters())
    if isinstance(model, TrainStep):
        weights = model.flat.views(model.flat.master)
    save_folder(folder, weights, bert.config, _architecture(weights))
    try:
        if isinstance(tokenizer, WordPiece):
            tokenizer.save(folder, bert.config.max_position_embeddings)
        elif tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise RunError(f"{folder}: cannot write the tokenizer: {error}") from None


def _architecture(named: Mapping[str, Tensor]) -> str:
    """The class of transformers that has the heads of these weights."""
    if any(name.startswith("next_sentence.") for name in named):
        return "BertForPreTraining"
    return "BertForMaskedLM" if any(name.startswith("mlm.") for name in named) else "BertModel"


def export_run(
    folder: str | os.PathLike[str],
    named: Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer_folder: str | os.PathLike[str],
) -> None:
    """Writes a run's `hf/` folder: the model in the class it was trained as, and its tokenizer.

    Args:
        folder: where to.
        named: fp32 weights under `Bert`'s parameter names.
        config: the model's sizes.
        tokenizer_folder: holds tokenizer.json and its companions.

    Raises:
        RunError: the folder cannot be written.
    """
    save_folder(folder, named, config, _architecture(named))
    try:
        for name in _TOKENIZER_FILES:
            source = Path(tokenizer_folder) / name
            if source.exists():
                shutil.copyfile(source, Path(folder) / name)
    except OSError as error:
        raise RunError(f"{folder}: cannot write the tokenizer: {error}") from None
