"""Shards in memory whose token ids tell their position: id = 5 + position in the split."""

from collections.abc import Callable

import numpy as np
import pytest

from fastbert.data.shards import Shards
from fastbert.data.tokenize import TokenIds, WordPiece

PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="session")
def make_shards() -> Callable[[list[list[int]]], Shards]:
    """From the sentence lengths of each document."""

    def make(documents: list[list[int]]) -> Shards:
        lengths = [length for document in documents for length in document]
        counts = [len(document) for document in documents]
        total = sum(lengths)
        return Shards(
            folder="memory",
            split="train",
            vocab_size=5 + total,
            sentence_offsets=np.cumsum([0, *lengths]),
            document_offsets=np.cumsum([0, *counts]),
            meta={},
            _shards=[np.arange(5, 5 + total, dtype=np.uint32)],
            _starts=[0],
        )

    return make


@pytest.fixture(scope="session")
def make_ids() -> Callable[..., TokenIds]:
    """For a vocabulary of V, in which every id divisible by `every` continues a word."""

    def make(V: int, every: int = 0) -> TokenIds:
        continues = np.zeros(V, dtype=bool)
        if every:
            continues[5:] = np.arange(5, V) % every == 0
        return TokenIds(V, PAD, UNK, CLS, SEP, MASK, np.arange(5), continues)

    return make


@pytest.fixture(scope="session")
def wordpiece() -> WordPiece:
    return WordPiece.train(["the quick brown fox jumps over the lazy dog, again and again."], 100)
