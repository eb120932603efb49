"""Learning a WordPiece vocabulary whose words, letters and order depend on the text alone.

V is the size of the vocabulary. Algorithm: https://arxiv.org/abs/1609.08144.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from threading import Event, Thread
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fastbert.data.tokenizer_files import (
    MAX_WORD,
    SPECIAL_TOKENS,
    Description,
    bert,
    built,
    described,
    normalization,
)
from fastbert.errors import UserError
from fastbert.progress import progress_bar

# Google's English vocabulary knows 997 characters. Where a corpus has more (Chinese, Japanese),
# those beyond the thousandth must be worth their place.
ALPHABET = 1_000
COVERAGE = 0.9999

# In these scripts a mark on a letter is an accent; elsewhere it is a vowel, a tone, or (Japanese)
# makes another letter. What stands on no letter at all is no part of one.
_ACCENTS = (
    r"(?<=[\p{Latin}\p{Greek}\p{Cyrillic}])\p{Mn}+|(?<![\p{L}\p{M}])\p{Mn}+|[\x{FE00}-\x{FE0F}]"
)
_ACCENTED = ("LATIN", "GREEK", "CYRILLIC")

# Written without spaces: a "word" is a phrase. Thai, Lao, Burmese, Khmer, Tai, Balinese, Javanese,
# Cham, kana. Chinese is not here: BERT parts its characters.
_SPACELESS = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f"
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\ua980-\uaaff"
)
_RUN = re.compile(f"[{_SPACELESS}]+")
_PHRASE = 50
"""Letters, each with its marks, of the longest piece of a phrase that is one word to WordPiece."""


def learn(
    chunks: Mapping[str, int],
    vocab_size: int,
    do_lower_case: bool,
    strip_accents: bool | None,
    progress: bool,
) -> Description:
    """Returns a tokenizer learnt from what `count_chunks` counted; see `WordPiece.train`.

    The library's trainer numbers single characters in the order of a randomly seeded hash table and
    breaks ties between merges by these numbers. So the words are counted here, the characters are
    numbered beforehand, and the trainer reads the words in sorted order.

    Thai, Lao, Khmer, Burmese and kana, written without spaces, are parted into words by ICU's
    dictionaries to learn from, others like them into syllables. A text to be encoded is not: its
    phrases become the longest pieces that the vocabulary has, so each word of theirs is there as
    the start of a phrase and as its continuation, and ids need nothing but tokenizer.json.
    """
    state, notes = _normalization(chunks, do_lower_case, strip_accents)
    words = _words(chunks, state)
    room = (vocab_size - len(SPECIAL_TOKENS)) // 2
    if room < 1:
        raise UserError(f"vocab_size = {vocab_size} must be at least 100")
    if not words:
        raise UserError("the text to train a tokenizer on holds no word")
    alphabet = _alphabet(words, room)
    later = {char for word in words for char in word[1:] if char in alphabet}
    later |= {char for char in alphabet if _RUN.match(char)}
    pinned = sorted(alphabet) + [f"##{char}" for char in sorted(later)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *pinned],
        initial_alphabet=sorted(alphabet),
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with _bar(sum(words.values()), progress) as advance:
        learner.train_from_iterator(_repeat(words, alphabet, advance), trainer)
    vocab = learner.get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    state["model"]["vocab"] = {
        token: index for index, token in enumerate(_continued(tokens, vocab_size))
    }
    return described(state, notes)


@contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """Shows the words read, and then that the trainer is still at its merges, which it tells not.

    They take as long as the reading.
    """
    done = Event()

    def tick() -> None:
        while not done.wait(0.5):
            if bar.n >= total:
                bar.set_description("merging", refresh=False)
                bar.refresh()

    with progress_bar(
        total=total,
        unit=" words",
        unit_scale=True,
        desc="learning",
        disable=not progress,
    ) as bar:
        ticking = Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield bar.update
        finally:
            done.set()
            ticking.join()


def count_chunks(sentences: Iterable[str]) -> Counter[str]:
    """Counts what stands between spaces, as it was written."""
    chunks: Counter[str] = Counter()
    for sentence in sentences:
        chunks.update(sentence.split())
    return chunks


def _words(chunks: Mapping[str, int], state: dict[str, Any]) -> dict[str, int]:
    """Counts the words of chunks, normalised; sorted."""
    tokenizer = built(json.dumps(described(_with_special(state)).state), "tokenizer")
    normalize = tokenizer.normalizer.normalize_str
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    lower = normalization(state["normalizer"])["do_lower_case"]
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        if chunk.isascii() and chunk.isalnum():  # most are, and a call takes 15 us
            parts = [chunk.lower() if lower else chunk]
        else:
            parts = [word for word, _ in split(normalize(chunk))]
        for word in parts:
            for part in _segmented(word):
                if len(part) <= MAX_WORD:
                    words[part] += count
    return {word: words[word] for word in sorted(words)}


def _with_special(state: dict[str, Any]) -> dict[str, Any]:
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    return {**state, "model": {**state["model"], "vocab": vocab}}


def _normalization(
    chunks: Mapping[str, int], do_lower_case: bool, strip_accents: bool | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tokenizer's state without its vocabulary, by what the text holds; and what to say of it.

    BERT's own normalizer where it destroys nothing, for every program knows it and it is a third
    faster than the one that looks at the letter under a mark.
    """
    letters = marks = spaceless = 0
    for chunk, count in chunks.items():
        letters += len(chunk) * count
        if not chunk.isascii():
            marks += _letters_changed(chunk) * count
            spaceless += sum(map(len, _RUN.findall(chunk))) * count
    rare = (1 - COVERAGE) * letters
    strips = do_lower_case if strip_accents is None else strip_accents
    notes = []
    state = bert((), do_lower_case=do_lower_case, strip_accents=strip_accents)
    if strips and strip_accents is None and marks > rare:
        plain = {**state["normalizer"], "strip_accents": False}
        accents = {"type": "Replace", "pattern": {"Regex": _ACCENTS}, "content": ""}
        parts = [plain, {"type": "NFD"}, accents, {"type": "NFC"}]
        state["normalizer"] = {"type": "Sequence", "normalizers": parts}
        notes.append(
            "accents are taken off Latin, Greek and Cyrillic letters only: in the other scripts of "
            f"this text {marks:,} marks are vowels, tones or parts of letters"
        )
    elif strips and marks:
        notes.append(
            f"{marks:,} marks ({marks / letters:.3%} of the characters) are lost with the accents, "
            "which are vowels, tones or parts of letters in their scripts; strip_accents = false "
            "keeps them"
        )
    if spaceless > rare:
        phrase = rf"(?:[{_SPACELESS}]\p{{M}}{{0,3}}){{1,{_PHRASE}}}"
        split = {"type": "Split", "pattern": {"Regex": phrase}, "behavior": "Isolated"}
        parts = [{**split, "invert": False}, state["pre_tokenizer"]]
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        state["model"]["max_input_chars_per_word"] = 4 * _PHRASE
        notes.append(
            f"{spaceless:,} characters ({spaceless / letters:.2%}) are of scripts without spaces: "
            "words to learn from are found by ICU's dictionaries"
        )
    return state, tuple(notes)


def _letters_changed(chunk: str) -> int:
    """Counts the marks that are no accents and that BERT's own normalizer would take away.

    And the Korean syllables, which it would take apart.
    """
    changed, base = sum("\uac00" <= char <= "\ud7a3" for char in chunk), ""
    for char in unicodedata.normalize("NFD", chunk):
        if unicodedata.category(char) != "Mn":
            base = char
        elif base and unicodedata.category(base)[0] in "LM" and not _takes_accents(base):
            changed += not 0xFE00 <= ord(char) <= 0xFE0F  # variation selectors of emoji
    return changed


@lru_cache(maxsize=4096)
def _takes_accents(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(_ACCENTED)


def _segmented(word: str) -> Iterator[str]:
    """Parts a word of a script without spaces by ICU's dictionary of it."""
    if not _RUN.match(word):
        yield word
        return
    try:
        from icu4py.breakers import WordBreaker
    except ImportError:
        raise UserError(
            f"the text holds words like {word[:20]!r}, of a script without spaces: to learn a "
            "tokenizer from it, pip install icu4py"
        ) from None
    for start, end in WordBreaker(word, "en").segments():
        yield word[start:end]


def _continued(tokens: list[str], vocab_size: int) -> Iterator[str]:
    """Adds to each word of a script without spaces its form inside a phrase, up to V tokens."""
    seen: set[str] = set()
    for token in tokens:
        for form in (token, f"##{token}") if _RUN.match(token) else (token,):
            if form not in seen and len(seen) < vocab_size:
                seen.add(form)
                yield form


def _alphabet(words: dict[str, int], room: int) -> set[str]:
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    ranked = sorted(counts, key=lambda char: (-counts[char], char))
    covered = np.cumsum([counts[char] for char in ranked])
    worthy = int(np.searchsorted(covered, COVERAGE * covered[-1])) + 1
    return set(ranked[: min(room, max(ALPHABET, worthy))])


def _repeat(
    words: dict[str, int], alphabet: set[str], advance: Callable[[int], object]
) -> Iterator[str]:
    """Yields each word as often as it was counted, a thousand at a time."""
    for word, count in words.items():
        if alphabet.issuperset(word):
            for done in range(0, count, 1_000):
                yield " ".join([word] * min(1_000, count - done))
        advance(count)
