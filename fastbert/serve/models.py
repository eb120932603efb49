"""A folder's model with all that it can be asked for: one set of weights, whatever the question."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastbert.errors import UserError
from fastbert.finetune.predict import Pipeline, compute_dtype, make_task, pipeline
from fastbert.hf.encode import TOKENS_PER_BATCH
from fastbert.hf.fill_mask import MaskFiller
from fastbert.hf.load import longest_sequence, saved_head
from fastbert.hf.stack import freeze
from fastbert.hf.together import encoder_of
from fastbert.serve.config import ServeConfig
from fastbert.serve.work import Embed, FillMask, Predict, Work
from fastbert.settings import show
from fastbert.train.device import choose_device

_BATCH_TOKENS = {"cpu": 1024, "cuda": TOKENS_PER_BATCH["cuda"]}


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        name: that clients give.
        works: by their names: "predict", "embed", "fill-mask".
        task: of "predict"; "" where there is none.
        problem: of "classify": transformers' `problem_type`.
        labels: of "classify" and "tag".
        mask_token: of "fill-mask".
        max_seq_length: tokens of a sequence.
        hidden_size: of a vector.
        vocab_size: tokens of the model.
        device, dtype: where and in what it is computed.
        batch_tokens: that are computed at once.
    """

    name: str
    works: dict[str, Work]
    task: str
    problem: str
    labels: tuple[str, ...]
    mask_token: str
    max_seq_length: int
    hidden_size: int
    vocab_size: int
    device: torch.device
    dtype: str
    batch_tokens: int


def load(config: ServeConfig) -> Served:
    """Loads what a folder is for, once.

    Raises:
        UserError: no such model, or one that cannot do what it is asked for.
    """
    where, asked = config.model, config.task
    if not os.path.isdir(where):
        raise UserError(f"model = {show(where)}: no such folder")
    saved, of_model = saved_head(where)
    is_whole = (of_model.architectures or [""])[0] == "BertForPreTraining"
    place = choose_device(config.device)
    dtype = compute_dtype(config.precision, place)
    options: dict[str, Any] = {"max_seq_length": config.max_seq_length, "dtype": dtype}
    options["device"] = config.device
    works: dict[str, Work] = {}
    pipe: Pipeline | None = None
    vectors: Pipeline | None = None
    model: Any = None
    tokenizer: Any = None
    if asked == "fill-mask" or (asked == "auto" and (saved == "MaskedLM" or is_whole)):
        fill = MaskFiller(where)
        model, tokenizer = fill.model.to(place, torch.float32), fill.tokenizer
        freeze(model, dtype)
        works["fill-mask"] = FillMask(fill, dtype)
    elif asked != "embed" and (saved or asked != "auto"):
        task = None if asked == "auto" else asked
        pipe = pipeline(task, where, threshold=config.threshold, **options)
        model, tokenizer = pipe.model, pipe.task.tokenizer
        works["predict"] = Predict(pipe, config.truncate, config.max_text_tokens)
    if config.threshold is not None and pipe is None:
        raise UserError(f"threshold = {config.threshold:g}: {where} gives no several labels")
    if asked in ("auto", "embed"):
        if model is None:
            vectors = pipeline("embed", where, **options)
            model, tokenizer = vectors.model, vectors.task.tokenizer
        else:
            of_vectors = make_task("embed", where, of_model, tokenizer, config.max_seq_length)
            vectors = Pipeline(of_vectors, encoder_of(model), dtype)
        works["embed"] = Embed(vectors, config.truncate)
    folder = Path(os.path.abspath(where))  # a link keeps its name, whatever it leads to
    name = config.served_model_name
    if name == "auto":  # of a run, rather than of its folder hf
        name = folder.parent.name if folder.name == "hf" else folder.name
    one = pipe or vectors
    labelled = pipe is not None and pipe.task.name in ("classify", "tag")
    return Served(
        name=name,
        works=works,
        task=pipe.task.name if pipe else "",
        problem=getattr(pipe.task, "problem", "") if pipe else "",
        labels=tuple(pipe.task.labels) if pipe and labelled else (),
        mask_token=tokenizer.mask_token if "fill-mask" in works else "",
        max_seq_length=one.task.max_length if one else longest_sequence(where, tokenizer),
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        device=place,
        dtype=str(dtype).removeprefix("torch."),
        batch_tokens=config.max_batch_tokens or _BATCH_TOKENS[place.type],
    )
