"""A model and its tokenizer from a folder or the hub, for those who only read: nothing drawn, ever.

transformers draws weights that are missing, and makes an empty tokenizer where there is none.
"""

import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils import logging as their_logging

from fastbert.errors import UserError
from fastbert.hf.weights import local_folder
from fastbert.settings import LONGEST, read_json, read_text, show

logger = logging.getLogger("fastbert")


_BROKEN = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError),
    *(SafetensorError, StrictDataclassError),
)
"""What transformers raises of a folder that is damaged, or none of a model."""


def load_model(
    folder: str | os.PathLike[str], *, mlm: bool = False, dtype: torch.dtype | None = None
) -> nn.Module:
    """The model, in evaluation; other heads that were saved with it are left behind.

    Args:
        folder: of a model or of a run; or a name of the hub.
        mlm: with the head that predicts masked words; else the encoder alone, without pooler.
        dtype: None: as it was saved.

    Raises:
        UserError: there is no such model, or one that lacks weights.
    """
    model, lacking = _load(folder, AutoModelForMaskedLM if mlm else AutoModel, {"dtype": dtype})
    if lacking:
        raise UserError(f"{_place(folder)}: lacks {len(lacking)} weights, {lacking[0]} first")
    return model


HEADS = (
    *("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"),
    "MaskedLM",
)
"""What follows `AutoModelFor`: the heads that fastbert trains or uses."""


def saved_head(folder: str | os.PathLike[str]) -> tuple[str, Any]:
    """Which of `HEADS` a folder's model was saved with ("" for another or none), and its config.

    Raises:
        UserError: there is no such model.
    """
    where = _place(folder)
    try:
        config = AutoConfig.from_pretrained(where)
    except _BROKEN as error:
        raise UserError(_complaint(where, "model", error)) from None
    saved = (config.architectures or [""])[0]
    return next((head for head in HEADS if saved.endswith(f"For{head}")), ""), config


def load_head(folder: str | os.PathLike[str], head: str) -> nn.Module:
    """A model with one of `HEADS` as it was saved, in evaluation.

    Raises:
        UserError: there is no such model, or one that lacks weights.
    """
    model, lacking = _load(folder, getattr(transformers, f"AutoModelFor{head}"), {})
    if lacking:
        raise UserError(f"{_place(folder)}: lacks {len(lacking)} weights, {lacking[0]} first")
    return model


def load_whole(folder: str | os.PathLike[str], head: str) -> nn.Module:
    """A model with all that was saved of it, in evaluation, in the dtype that it was saved in.

    Args:
        folder: as in `load_model`.
        head: one of `HEADS`, "PreTraining", or "" for the encoder, with its pooler if it has one.

    Raises:
        UserError: there is no such model, or one that lacks weights.
    """
    if head:
        return load_head(folder, head)
    model, lacking = _load(folder, AutoModel, {}, pooler=True)
    return load_model(folder) if lacking else model


def begin_head(
    folder: str | os.PathLike[str],
    head: str,
    changes: Mapping[str, Any],
    fresh: bool = False,
    *,
    new_head: bool = False,
) -> tuple[nn.Module, list[str]]:
    """A model to train: what its head lacks is drawn from torch's generator, as transformers does.

    Args:
        folder: of a model or of a run; or a name of the hub.
        head: one of `HEADS`; "" for the encoder alone, without pooler.
        changes: of the model's configuration, such as `num_labels`.
        fresh: whether all weights are drawn.
        new_head: whether a head that the folder has is drawn as well; its pooler stays.

    Returns:
        The model, in evaluation, and the names of the weights that were drawn.

    Raises:
        UserError: there is no such model, or one whose encoder lacks weights.
    """
    auto: Any = getattr(transformers, f"AutoModelFor{head}") if head else AutoModel
    if fresh:
        config = AutoConfig.from_pretrained(_place(folder), **changes)
        return auto.from_config(config).eval(), []
    model, lacking = _load(folder, auto, {"ignore_mismatched_sizes": True, **changes})
    # A pooler counts as head: none is saved with masked words alone.
    encoder = f"{model.base_model_prefix}." if head else ""
    inside = [n for n in lacking if n.startswith(encoder) and "pooler." not in n]
    if inside:
        raise UserError(f"{_place(folder)}: lacks {len(inside)} weights, {inside[0]} first")
    if new_head:
        for name in children_with_weights(model):
            part = getattr(model, name)
            for parameter in part.parameters():
                parameter._is_hf_initialized = False  # else transformers draws it no more
            part.apply(model._init_weights)
            lacking += [f"{name}.{inside}" for inside, _ in part.named_parameters()]
    return model, sorted(set(lacking))


def children_with_weights(model: Any) -> list[str]:
    """The parts of a head: modules with weights beside the encoder; none where it is alone."""
    if not hasattr(model, model.base_model_prefix):
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


_DISTILBERT = {
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_HEAD_DROPOUT = {
    "distilbert": {
        "SequenceClassification": "seq_classif_dropout",
        "MultipleChoice": "seq_classif_dropout",
        "QuestionAnswering": "qa_dropout",
    },
    "electra": {
        "SequenceClassification": "classifier_dropout",
        "TokenClassification": "classifier_dropout",
        "MultipleChoice": "summary_last_dropout",
    },
}
_DROPOUT_OF_HEADS = dict.fromkeys(
    ("SequenceClassification", "TokenClassification", "MultipleChoice"), "classifier_dropout"
)


def dropout_changes(model_type: str, head: str, **asked: float | None) -> dict[str, float]:
    """Changes of a configuration for these dropouts, by the family's names; None: as it is.

    Raises:
        UserError: a dropout before a head that has none of its own.
    """
    names = dict(_DISTILBERT) if model_type == "distilbert" else {}
    of_head = _HEAD_DROPOUT.get(model_type, _DROPOUT_OF_HEADS).get(head)
    if of_head is not None:
        names["classifier_dropout"] = of_head
    elif asked.get("classifier_dropout") is not None:
        raise UserError(
            f"classifier_dropout: {model_type} has none of its own before "
            f"{f'its head for {head}' if head else 'its vectors'}: leave it out"
        )
    return {names.get(name, name): value for name, value in asked.items() if value is not None}


def add_markers(model: Any, tokenizer: Any, markers: Sequence[str]) -> None:
    """Makes each mark one token, whose row is drawn as transformers draws it."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(markers)}, replace_extra_special_tokens=False
    )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        with quiet():
            model.resize_token_embeddings(len(tokenizer))


def _load(
    folder: str | os.PathLike[str], auto: Any, options: dict[str, Any], *, pooler: bool = False
) -> tuple[nn.Module, list[str]]:
    """A model, and the names of the weights that its folder lacks; of encoders with a pooler?"""
    where = _place(folder)
    try:
        config = AutoConfig.from_pretrained(where)
        kind: Any = auto._model_mapping.get(type(config), None)
        if kind is None:
            raise UserError(f"{where}: {config.model_type} has no {auto.__name__[9:]} head")
        if auto is AutoModel and "add_pooling_layer" in inspect.signature(kind).parameters:
            options = options | {"add_pooling_layer": pooler}
        with quiet():  # of what is left behind
            model, found = auto.from_pretrained(where, output_loading_info=True, **options)
    except _BROKEN as error:
        raise UserError(_complaint(where, "model", error)) from None
    lacking = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    return model.eval(), sorted(lacking)


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer, which lower-cases where sentence-transformers would, and gives no token types
    to a model that has none.

    Raises:
        UserError: there is none, or it cannot lower-case as its folder asks.
    """
    where = _place(folder)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(where)
            if _asks_for_lower_case(where) and not _lowers(tokenizer):
                strip = bool(getattr(tokenizer, "strip_accents", None))
                tokenizer = AutoTokenizer.from_pretrained(
                    where, do_lower_case=True, strip_accents=strip
                )
    except _BROKEN as error:
        raise UserError(_complaint(where, "tokenizer", error)) from None
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise UserError(f"{where}: holds no tokenizer (tokenizer.json or vocab.txt)")
    if _asks_for_lower_case(where) and not _lowers(tokenizer):
        raise UserError(
            f"{where}: {_SENTENCES} asks for lower-cased text, which its "
            f"{type(tokenizer).__name__} cannot do"
        )
    _note_capitals(where, tokenizer)
    with suppress(*_BROKEN), quiet():  # a tokenizer may stand alone
        config = AutoConfig.from_pretrained(where)
        if config.model_type == "distilbert" or getattr(config, "type_vocab_size", 2) < 2:
            names = tokenizer.model_input_names
            tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
    return tokenizer


_SENTENCES = "sentence_bert_config.json"


def _asks_for_lower_case(where: str) -> bool:
    path = os.path.join(where, _SENTENCES)
    return os.path.exists(path) and read_json(path).get("do_lower_case") is True


def _lowers(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)  # of a fast one
    normalizer = getattr(backend, "normalizer", None)
    return normalizer is not None and normalizer.normalize_str("A") == "a"


def _note_capitals(where: str, tokenizer: Any) -> None:
    """Says that a cased vocabulary is lower-cased because nothing beside it says otherwise."""
    beside = os.path.join(where, "tokenizer_config.json")
    if (
        not os.path.exists(os.path.join(where, "vocab.txt"))
        or os.path.exists(os.path.join(where, "tokenizer.json"))
        or (os.path.exists(beside) and "do_lower_case" in read_json(beside))
        or not _lowers(tokenizer)
    ):
        return
    vocabulary = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    cased = sum(token.lower() != token for token in vocabulary if not token.startswith("["))
    if cased > 0.05 * len(vocabulary):
        logger.warning(
            '%s: %d of its %d tokens have capitals, which lower-cased text never meets: "do_lower_'
            'case": false in its tokenizer_config.json keeps the text as it is',
            where, cased, len(vocabulary),
        )  # fmt: skip


def sentence_layout(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What sentence-transformers' modules do with an encoder's states; {}: there are none.

    Returns:
        `pooling`, "mean" or "cls"; `normalize`; and `max_seq_length` where that is said.

    Raises:
        UserError: they are damaged, or do something else.
    """
    root = Path(_place(folder))
    path = root / "modules.json"
    if not path.exists():
        return {}
    try:
        modules = json.loads(read_text(str(path), "JSON", 2**24))
        kinds = {one["type"].rpartition(".")[2]: one["path"] for one in modules}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is none of sentence-transformers: {error}") from None
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown or "Pooling" not in kinds or kinds.get("Transformer") != "":
        raise UserError(
            f"{path}: {', '.join(kinds)}: only a Transformer in the folder itself, Pooling and "
            "Normalize are known"
        )
    pooled = read_json(str(root / kinds["Pooling"] / "config.json"))
    modes = [name for name, on in pooled.items() if name.startswith("pooling_mode_") and on is True]
    mode = pooled.get("pooling_mode") or "+".join(sorted(modes))
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    pooling = names.get(mode, mode)
    if pooling not in ("mean", "cls"):
        raise UserError(f"{path}: pooling {show(mode)} is not known: it must be mean or cls")
    found: dict[str, Any] = {"pooling": pooling, "normalize": "Normalize" in kinds}
    beside = root / _SENTENCES
    if beside.exists() and (longest := read_json(str(beside)).get("max_seq_length")):
        found["max_seq_length"] = longest
    return found


def longest_sequence(folder: str | os.PathLike[str], tokenizer: Any) -> int:
    """Tokens that a folder's model and its tokenizer take, special ones included."""
    return min(positions(saved_head(folder)[1]), tokenizer.model_max_length)


def positions(config: Any) -> int:
    """Tokens that a model of this configuration takes."""
    found: int = getattr(config, "max_position_embeddings", LONGEST)
    return found - (config.pad_token_id + 1 if config.model_type in _COUNT_FROM_PADDING else 0)


_COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")


def _place(folder: str | os.PathLike[str]) -> str:
    return os.fspath(local_folder(folder) if os.path.isdir(folder) else folder)


def _complaint(where: str, what: str, error: Exception) -> str:
    if os.path.isdir(where):
        for path in sorted(Path(where).glob("*")):  # safetensors says that they are not there
            if path.exists() and not os.access(path, os.R_OK):
                return f"{path}: this user may not read it"
        why = f"no {what} to load: "
    else:
        why = "not a folder, and not to be had from a hub: "
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{where}: {why}{' '.join([first, *more[: first.endswith(':')]])}"


@contextmanager
def quiet() -> Iterator[None]:
    before, bars = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.set_verbosity(before)
        if bars:
            their_logging.enable_progress_bar()
