"""Whole words for a vocabulary that has only their pieces: given in a file, or learnt from text.

What a word is worth is the WordPieces it saves: its count times its pieces less one.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping

from fastbert.data.tokenize import WordPiece
from fastbert.errors import UserError
from fastbert.settings import read_text, show

_AT_ONCE = 10_000
"""Words that are cut together: what the library keeps of each takes 1 KB."""
_SHOWN = 5


def with_words_of_file(tokenizer: WordPiece, path: str) -> tuple[WordPiece, str]:
    """Returns the tokenizer with the words of a file, and a line for the log.

    Args:
        tokenizer: what they are added to.
        path: a word a line, UTF-8. Blank lines do not count; what is there already is skipped.

    Raises:
        UserError: the file cannot be read, a line is no word that can be added, or none is new.
    """
    content = read_text(path, "a list of words", 2**26)
    known = {*tokenizer.tokens}
    new: dict[str, tuple[int, str]] = {}  # the line, and the word as it stands there
    skipped = 0
    for number, line in enumerate(content.split("\n"), start=1):
        given = line.strip()
        if not given:
            continue
        words = [given] if given in known else tokenizer.words(given)
        shown = f"{path}:{number}: {show(given)}"
        if len(given.split()) > 1:
            raise UserError(f"{shown} holds spaces: give a word a line")
        if not words:
            raise UserError(f"{shown} is empty once it is normalised: leave it out")
        if len(words) > 1:
            parts = ", ".join(map(repr, words[:_SHOWN]))
            raise UserError(f"{shown} is parted into {parts}, which no token can span")
        (word,) = words
        if word in known or word in new:
            skipped += 1
            continue
        why = tokenizer.why_no_word(word)
        if why:
            raise UserError(f"{shown} {why}")
        new[word] = number, given
    note = f" ({skipped:,} skipped: in the vocabulary, or there twice)" if skipped else ""
    if not new:
        raise UserError(f"{path}: holds no word that is new to the vocabulary{note}")
    extended = tokenizer.with_words(new)
    ids = extended.encode_batch([given for _, given in new.values()])
    for index, (number, given), found in zip(
        range(tokenizer.vocab_size, extended.vocab_size), new.values(), ids, strict=True
    ):
        if found != [index]:
            raise UserError(
                f"{path}:{number}: {show(given)} does not become one token: an added token of the "
                "tokenizer stands in the way"
            )
    return extended, f"{_added(list(new))} of {os.fspath(path)}{note}"


def with_words_of_text(
    tokenizer: WordPiece, chunks: Mapping[str, int], count: int
) -> tuple[WordPiece, str]:
    """Returns the tokenizer with the words of a text that save most, and a line for the log.

    Args:
        tokenizer: what they are added to.
        chunks: the text, as `count_chunks` counts it.
        count: how many words.

    Raises:
        UserError: every word is one token already.
    """
    words = _count_words(tokenizer, chunks)
    before, known = 0, {*tokenizer.tokens}
    saved: dict[str, int] = {}
    for word, times, pieces in _cut(tokenizer, words):
        before += times * len(pieces)
        if len(pieces) > 1 and word not in known and not tokenizer.why_no_word(word):
            saved[word] = times * (len(pieces) - 1)
    chosen = sorted(saved, key=lambda word: (-saved[word], word))[:count]
    if not chosen:
        raise UserError(f"add_tokens = {count}: every word of the data is one token already")
    extended = tokenizer.with_words(chosen)
    after = sum(times * len(pieces) for _, times, pieces in _cut(extended, words))
    fewer = f" of {count:,} asked for: the text has no more" if len(chosen) < count else ""
    return extended, (
        f"{_added(chosen)}{fewer}; the text has {after:,} tokens, {before:,} without them "
        f"({after / before - 1:+.1%})"
    )


def _added(words: list[str]) -> str:
    first = ", ".join(map(show, words[:_SHOWN]))
    return f"{len(words):,} words added, {first}{', ...' if len(words) > _SHOWN else ''}"


def _count_words(tokenizer: WordPiece, chunks: Mapping[str, int]) -> dict[str, int]:
    """Counts the words of chunks, normalised; sorted."""
    lower, words = tokenizer.lower_cases_alone, Counter[str]()
    for chunk, times in chunks.items():
        if (
            lower is not None and chunk.isascii() and chunk.isalnum()
        ):  # most are; a call takes 15 us
            words[chunk.lower() if lower else chunk] += times
        else:
            for word in tokenizer.words(chunk):
                words[word] += times
    return {word: words[word] for word in sorted(words)}


def _cut(tokenizer: WordPiece, words: dict[str, int]) -> Iterator[tuple[str, int, list[int]]]:
    """Each word, its count and its pieces."""
    listed = list(words)
    for start in range(0, len(listed), _AT_ONCE):
        some = listed[start : start + _AT_ONCE]
        for word, pieces in zip(some, tokenizer.pieces(some), strict=True):
            yield word, words[word], pieces
