"""What a model would say for each mask of a text; only the masks are scored.

T tokens of a batch, M masks, V vocabulary.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from fastbert.errors import UserError
from fastbert.hf.accelerate import accelerate
from fastbert.hf.load import load_model, load_tokenizer
from fastbert.hf.models import Encoder
from fastbert.hf.stack import freeze
from fastbert.hf.together import end_to_end

Guesses = tuple[np.ndarray, np.ndarray]
"""Of one mask: (k,) ids and their probabilities, the best first."""
_ROWS = 256
"""Masks whose logits are held at once: 31 MB at V = 30,522."""


@dataclass(frozen=True)
class Filled:
    """One mask of a text."""

    text: str
    mask: int  # its number in the text, from 1
    of: int  # masks of the text
    guesses: tuple[tuple[str, int, float], ...]  # word, id, probability; the best first

    def __str__(self) -> str:
        which = f" (mask {self.mask} of {self.of})" if self.of > 1 else ""
        guesses = ", ".join(f"{word} {probability:.1%}" for word, _, probability in self.guesses)
        return f"{self.text}{which}: {guesses}"


class MaskFiller:
    """A folder's model and tokenizer.

    Args:
        folder: of a BERT or a relative with the head for masked words, and its tokenizer.

    Raises:
        UserError: one of these is missing, or the model is none that fastbert accelerates.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.tokenizer = load_tokenizer(folder)
        if self.tokenizer.mask_token_id is None:
            raise UserError(f"{os.fspath(folder)}: its tokenizer knows no mask")
        self.model: Any = load_model(folder, mlm=True)
        try:
            accelerate(self.model)
        except ValueError as error:
            raise UserError(f"{os.fspath(folder)}: {error}") from None
        freeze(self.model)
        self.encoder: Any = next(m for m in self.model.modules() if isinstance(m, Encoder))

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.encoder.embeddings.word_embeddings.weight.device

    def __call__(self, texts: Sequence[str], top_k: int = 5, first: int = 1) -> list[Filled]:
        """Fills every mask of every text, each with the others still masked.

        Args:
            texts: at least one mask in each.
            top_k: guesses for each mask.
            first: what number the first text has in a complaint.

        Raises:
            UserError: a text without a mask or with more tokens than the model takes, or a `top_k`
                that the vocabulary does not hold.
        """
        V = self.model.config.vocab_size
        if not 1 <= top_k <= V:
            raise UserError(f"--top-k {top_k}: must be from 1 to {V}, the words of the model")
        names = [f"text {number}" for number in range(first, first + len(texts))]
        found = self.guesses(self.tokens(texts, names), top_k)
        return [
            Filled(text, number, len(masks), self.words(guesses))
            for text, masks in zip(texts, found, strict=True)
            for number, guesses in enumerate(masks, 1)
        ]

    def tokens(self, texts: Sequence[str], names: Sequence[str]) -> list[list[int]]:
        """Of each text its tokens, masks among them.

        Args:
            texts: any number.
            names: what each is called in a complaint.

        Raises:
            UserError: a text without a mask, or with more tokens than the model takes.
        """
        found: list[list[int]] = self.tokenizer(
            list(texts), return_attention_mask=False, verbose=False
        )["input_ids"]
        most = self.encoder.positions()
        for name, text, ids in zip(names, texts, found, strict=True):
            if self.tokenizer.mask_token_id not in ids:
                raise UserError(f"{name} holds no {self.tokenizer.mask_token}: {text[:60]!r}")
            if len(ids) > most:
                raise UserError(f"{name} has {len(ids)} tokens: the model takes {most}")
        return found

    @torch.inference_mode()
    def guesses(self, tokens: Sequence[Sequence[int]], top_k: int) -> list[list[Guesses]]:
        """The best words for each mask of each text.

        Args:
            tokens: as `tokens` gives them.
            top_k: at most the vocabulary's size.
        """
        plan, given = end_to_end(self.encoder, tokens)
        holes = (given["input_ids"][0] == self.tokenizer.mask_token_id).nonzero().squeeze(1)
        states = self.encoder.last_states(plan, given, holes)
        found: list[Guesses] = []
        for rows in states.split(_ROWS):
            best = self.model._scores(rows[None])[0].float().softmax(-1).topk(top_k)
            found += zip(best.indices.cpu().numpy(), best.values.cpu().numpy(), strict=True)
        each = iter(found)
        masks = [ids.count(self.tokenizer.mask_token_id) for ids in tokens]
        return [list(islice(each, count)) for count in masks]

    def words(self, guesses: Guesses) -> tuple[tuple[str, int, float], ...]:
        """Word, id and probability of each."""
        ids, chances = (one.tolist() for one in guesses)
        words = [self.tokenizer.decode([index]) for index in ids]
        return tuple(zip(words, ids, chances, strict=True))
