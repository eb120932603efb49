"""Texts to embeddings, as sentence-transformers makes them, without padding: `fastbert.encode`.

Texts are taken a window at a time, sorted by length there and laid end to end, as many in a batch
as its tokens allow. No padded batch is built: a plan is made of the lengths. Reimers and Gurevych
2019.

N texts, T tokens of a batch, H hidden size.
"""

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.hf.accelerate import accelerate, decelerate
from fastbert.hf.load import load_model, load_tokenizer
from fastbert.hf.models import Encoder
from fastbert.hf.stack import freeze
from fastbert.hf.together import end_to_end, means
from fastbert.progress import progress_bar

logger = logging.getLogger("fastbert")

WINDOW = 4096
"""Texts that are sorted together: the next ones wait in no list."""
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65536}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def encode(
    texts: Iterable[str],
    model: Any,
    tokenizer: Any = None,
    *,
    pooling: Literal["mean", "cls"] = "mean",
    normalize: bool = False,
    tokens_per_batch: int | None = None,
    max_length: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    show_progress: bool | None = None,
) -> np.ndarray | Iterator[np.ndarray]:
    """One vector for each text: the mean of its last hidden states, or the first of them.

    Args:
        texts: a list, or whatever has a length; or an iterator, of any number of texts, which is
            read and answered in windows of `WINDOW`.
        model: a folder or a name of transformers' hub; or a model with one BERT (or relative)
            inside, which is accelerated and in evaluation for the time of the call, and then as
            it was.
        tokenizer: of transformers, fast; a folder or name; None: that of the folder `model`.
        pooling: "mean" over all tokens, [CLS] and [SEP] included, or "cls": the first token's.
        normalize: whether vectors get length 1.
        tokens_per_batch: what is computed at once. A number of texts would be either too few short
            ones or too many long ones: time and memory follow the tokens. Longer texts are alone.
        max_length: tokens of a text at most, special ones included; None: what model and tokenizer
            allow. The rest is cut off, and a line says of how many texts.
        dtype: that the model is computed in: "fp32", "bf16", "fp16" or torch's; None: its own. A
            model of another dtype or on another device is copied for the call.
        device: None: where a model is; a folder's goes to the GPU where there is one.
        show_progress: None: where it takes more than a window.

    Returns:
        (N, H) float32 in the order of `texts`; for an iterator, an iterator of such arrays, each of
        a window.

    Raises:
        TypeError: a text, or a whole list of them, that is no string; a slow tokenizer.
        ValueError: an option out of its range, a model without a BERT or with several.
        UserError: a folder without a model, or one that lacks weights.
    """
    if isinstance(texts, str | bytes):
        raise TypeError("texts is one string: give a list, [text]")
    if pooling not in ("mean", "cls"):
        raise ValueError(f'pooling = {pooling!r}: must be "mean" or "cls"')
    for name, value in (("tokens_per_batch", tokens_per_batch), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    dtype = _dtype(dtype)
    folder = model if isinstance(model, str | os.PathLike) else None
    if folder is not None:
        model = load_model(folder, dtype=dtype)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        freeze(accelerate(model.to(device)))
    if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
        source = folder if tokenizer is None else tokenizer
        if source is None:
            raise ValueError("tokenizer = None: a model that is no folder needs one beside it")
        tokenizer = load_tokenizer(source)
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"{type(tokenizer).__name__} is no fast tokenizer of transformers")
    work = _Encode(
        _moved(model, dtype, device), tokenizer, pooling, normalize, tokens_per_batch, max_length
    )
    if not isinstance(texts, Sized):
        return work.windows(texts, None, bool(show_progress))
    show = len(texts) > WINDOW if show_progress is None else show_progress
    out = np.empty((len(texts), work.width), dtype=np.float32)
    done = 0
    for vectors in work.windows(texts, len(texts), show):
        out[done : done + len(vectors)] = vectors
        done += len(vectors)
    return out


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _moved(model: Any, dtype: torch.dtype | None, device: str | torch.device | None) -> nn.Module:
    """The model, or a copy where it is of another dtype or elsewhere."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a folder or a torch module, not a {type(model).__name__}")
    there = next(model.parameters())
    wanted = torch.device(device) if device is not None else there.device
    same = wanted.type == there.device.type and wanted.index in (None, there.device.index)
    if same and (dtype is None or dtype == there.dtype):
        return model
    return copy.deepcopy(model).to(wanted, dtype)


class _Use:
    """A model made ready, and what it was before."""

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        self.threads = 0
        self.swapped = not any(isinstance(module, Encoder) for module in modules)
        if self.swapped:
            accelerate(model)
        self.encoders: list[Any] = [module for module in modules if isinstance(module, Encoder)]
        self.training = [module for module in modules if module.training]
        for module in self.training:
            module.training = False

    def end(self, model: nn.Module) -> None:
        if self.swapped:
            decelerate(model)
        for module in self.training:
            module.training = True


_USES: dict[nn.Module, _Use] = {}  # of models that a thread computes with just now
_LOCK = Lock()


class _Encode:
    """What a call keeps."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        pooling: str,
        normalize: bool,
        tokens_per_batch: int | None,
        max_length: int | None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.modules = list(model.modules())  # once: of a short text it is 5% of the time
        self.pooling, self.normalize = pooling, normalize
        with self._ready() as encoder:
            self.device, self.width = next(encoder.parameters()).device, encoder.config.hidden_size
            allowed = tokenizer.model_max_length, encoder.positions()
        self.tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH.get(self.device.type, 16384)
        self.longest = min(*allowed, max_length or allowed[0])
        least = tokenizer.num_special_tokens_to_add() + 1
        if self.longest < least:
            raise ValueError(f"max_length = {self.longest}: must be at least {least}")
        self.cut = 0

    @contextmanager
    def _ready(self) -> Iterator[Any]:
        """The encoder, accelerated and in evaluation, until the last thread is done with it."""
        with _LOCK:
            use = _USES.get(self.model)
            if use is None:
                use = _USES[self.model] = _Use(self.model, self.modules)
            use.threads += 1
        try:
            if len(use.encoders) > 1:
                raise ValueError(f"{type(self.model).__name__} holds {len(use.encoders)} encoders")
            yield use.encoders[0]
        finally:
            with _LOCK:
                use.threads -= 1
                if not use.threads:
                    del _USES[self.model]
                    use.end(self.model)

    def windows(self, texts: Iterable[str], total: int | None, show: bool) -> Iterator[np.ndarray]:
        """(n, H) float32 of each window in turn."""
        texts = iter(texts)
        bar = progress_bar(total=total, desc="encode", unit="text") if show else None
        begin = 0
        try:
            while window := list(islice(texts, WINDOW)):
                for index, text in enumerate[Any](window, begin):
                    if not isinstance(text, str):
                        raise TypeError(f"texts[{index}] is no string: {type(text).__name__}")
                begin += len(window)
                yield self._window(window, bar)
        finally:
            if bar is not None:
                bar.close()
            if self.cut:
                logger.warning(
                    "%d of %d texts were cut to %d tokens", self.cut, begin, self.longest
                )

    def _window(self, texts: list[str], bar: Any) -> np.ndarray:
        tokens = self._tokens(texts)
        lengths = np.array([len(ids) for ids in tokens])
        out = torch.empty(len(texts), self.width)
        # The longest first: if memory lacks, it lacks at once.
        order = np.argsort(-lengths, kind="stable")
        with torch.inference_mode(), self._ready() as encoder:
            for rows in self._batches(order, lengths):
                vectors = self._vectors(encoder, [tokens[row] for row in rows])
                out[torch.from_numpy(rows)] = vectors.to("cpu", torch.float32)
                if bar is not None:
                    bar.update(len(rows))
        return out.numpy()

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        found = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.longest,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        tokens: list[list[int]] = found["input_ids"]
        full = (i for i, ids in enumerate(tokens) if len(ids) >= self.longest)
        self.cut += sum(bool(found.encodings[i].overflowing) for i in full)
        empty = next((i for i, ids in enumerate(tokens) if not ids), None)
        if empty is not None:
            raise ValueError(f"the tokenizer gives no token for {texts[empty]!r}")
        return tokens

    def _batches(self, order: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        begin = total = 0
        for end, length in enumerate(lengths[order].tolist()):
            if total + length > self.tokens_per_batch and end > begin:
                yield order[begin:end]
                begin, total = end, 0
            total += length
        yield order[begin:]

    def _vectors(self, encoder: Any, tokens: list[list[int]]) -> Tensor:  # (n, H)
        plan, given = end_to_end(encoder, tokens)
        only_first = self.pooling == "cls"
        states = encoder.last_states(plan, given, plan.first if only_first else None)
        vectors = states if only_first else means(states, plan)
        return F.normalize(vectors.float(), dim=1) if self.normalize else vectors
