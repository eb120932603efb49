"""Sentences of a text, by its language or its script.

Latin and Cyrillic text is split by rules of our own; other scripts, and every language that is
named, by Wikimedia's sentencex (https://github.com/wikimedia/sentencex), which knows their marks
and abbreviations.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from fastbert.errors import UserError

AUTO, LINE, OURS = "auto", "line", ""
"""Splitters beside a language's code: by each line's script; none, a line is a sentence; ours."""

# A sentence ends after .!? and closing quotes, before whitespace; or after its CJK counterpart.
# Possessive repeats and the look-behind keep this linear on a megabyte of dots.
_QUOTES = "\"'\u201c\u2018\u00ab"
_CLOSING = "\"'\u201d\u2019\u00bb"
_OPENING = _QUOTES + "([\u00bf\u00a1"
_END = re.compile(
    rf"(?<![.!?\u2026])[.!?\u2026]++[{_CLOSING})\]]*+\s++"
    rf"|[\u3002\uff01\uff1f]++[{_CLOSING}\u300d\u300f\uff09]*+\s*+"
)
_ABBREVIATION = re.compile(
    rf"(?:^|[\s(\[{_QUOTES}])(?:[^\W\d_]|(?:[^\W\d_]\.)+[^\W\d_]|"
    r"Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Rev|Hon|vs|cf|al|Fig|Eq|No|Vol|pp)\.$"
)

# Where each script begins, the language whose rules fit it, and its name; "" where our rules do.
_BLOCKS: tuple[tuple[int, str, str], ...] = (
    (0x0000, "", ""),
    (0x0370, "el", "Greek"),
    (0x0400, "", ""),
    (0x0530, "hy", "Armenian"),
    (0x0590, "he", "Hebrew"),
    (0x0600, "ar", "Arabic"),
    (0x0700, "ar", "Syriac"),
    (0x0750, "ar", "Arabic"),
    (0x0780, "ar", "Thaana"),
    (0x07C0, "ar", "N'Ko"),
    (0x0860, "ar", "Arabic"),
    (0x0900, "hi", "Devanagari"),
    (0x0980, "bn", "Bengali"),
    (0x0A00, "pa", "Gurmukhi"),
    (0x0A80, "gu", "Gujarati"),
    (0x0B00, "or", "Odia"),
    (0x0B80, "ta", "Tamil"),
    (0x0C00, "te", "Telugu"),
    (0x0C80, "kn", "Kannada"),
    (0x0D00, "ml", "Malayalam"),
    (0x0D80, "si", "Sinhala"),
    (0x0E00, "th", "Thai"),
    (0x0E80, "lo", "Lao"),
    (0x0F00, "bo", "Tibetan"),
    (0x1000, "my", "Burmese"),
    (0x10A0, "ka", "Georgian"),
    (0x1100, "ko", "Korean"),
    (0x1200, "am", "Ethiopic"),
    (0x13A0, "", ""),
    (0x1780, "km", "Khmer"),
    (0x1800, "mn", "Mongolian"),
    (0x18B0, "", ""),
    (0x1C90, "ka", "Georgian"),
    (0x1CC0, "", ""),
    (0x1F00, "el", "Greek"),
    (0x2000, "", ""),
    (0x2E80, "zh", "Chinese"),
    (0x3000, "", ""),
    (0x3040, "ja", "Japanese"),
    (0x3100, "zh", "Chinese"),
    (0x3130, "ko", "Korean"),
    (0x3190, "zh", "Chinese"),
    (0x31F0, "ja", "Japanese"),
    (0x3200, "", ""),
    (0x3400, "zh", "Chinese"),
    (0xA000, "", ""),
    (0xA8E0, "hi", "Devanagari"),
    (0xA900, "", ""),
    (0xA960, "ko", "Korean"),
    (0xA980, "", ""),
    (0xA9E0, "my", "Burmese"),
    (0xAA00, "", ""),
    (0xAA60, "my", "Burmese"),
    (0xAA80, "", ""),
    (0xAC00, "ko", "Korean"),
    (0xD7B0, "", ""),
    (0xF900, "zh", "Chinese"),
    (0xFB00, "", ""),
    (0xFB1D, "he", "Hebrew"),
    (0xFB50, "ar", "Arabic"),
    (0xFE00, "", ""),
    (0xFE70, "ar", "Arabic"),
    (0xFF00, "", ""),
    (0xFF66, "ja", "Japanese"),
    (0xFFA0, "", ""),
    (0x1B000, "ja", "Japanese"),
    (0x1B170, "", ""),
    (0x20000, "zh", "Chinese"),
    (0x32000, "", ""),
)
_STARTS = [start for start, _, _ in _BLOCKS]
_FOREIGN = re.compile(
    "["
    + "".join(
        f"{chr(start)}-{chr(end - 1)}"
        for (start, language, _), (end, _, _) in pairwise(_BLOCKS)
        if language
    )
    + "]"
)
_SAMPLE, _SLICES = 32, 8
"""Characters, from as many places, that decide a line's script; a line has rarely two."""

# Marks that end a sentence wherever they stand. Texts are cut at them beforehand: the time that
# sentencex takes grows with the square of a text without spaces (1 MB of Chinese: 25 s).
_HARD = re.compile(
    r"(?:[\u3002\uff01\uff1f\u0964\u0965\u1362\u1367\u104b\u17d4\u17d5\u06d4\u0589\u061f]|\u1361\u1361)"
    rf"[\u3002\uff01\uff1f\u061f!?.]*+[{_CLOSING})\]\u300d\u300f\uff09\u201d]*+\s*+"
)
_LONGEST = 2_000
"""Characters that sentencex gets at once where there is no such mark."""

# Where it ends a sentence and should not: at a full stop inside a number or an abbreviation, after
# a single letter with its marks (a title, an initial), and between the numbers of a date.
_STOP = re.compile(rf"\.[{_CLOSING})\]]*$")
_INITIAL = re.compile(r"(?:^|[\s(\[])[^\W\d_]\W?\.\s+$")
_NUMBER = re.compile(r"\d\.\s+$")
_ENDED = re.compile(rf"[.!?\u2026][{_CLOSING})\]]*\s+$")

# What it does not end a sentence at: the marks of Tibetan, and the space, which in Thai and Lao
# stands between sentences and not between words.
_ENDS_BESIDE = {
    "th": re.compile(r"(?<=[\u0e00-\u0e7f])\s+(?=[\u0e00-\u0e7f])"),
    "lo": re.compile(r"(?<=[\u0e80-\u0eff])\s+(?=[\u0e80-\u0eff])"),
    "bo": re.compile(r"(?<=[\u0f0d\u0f0e])\s+(?![\s\u0f0d\u0f0e])"),
}
LANGUAGES = (
    *("am", "ar", "bg", "bn", "ca", "da", "de", "el", "en", "es", "fi", "fr", "gu", "hi", "hy"),
    *("it", "ja", "kk", "kn", "ml", "mr", "my", "nl", "pa", "pl", "pt", "ru", "sk", "ta", "te"),
    "uk",
)
"""Those that sentencex has rules for; it takes others to be like one of them, or like English."""


def split_sentences(text: str, splitter: str = AUTO) -> list[str]:
    """Returns the sentences of a text, each stripped and non-empty.

    By our own rules a sentence ends after `.`, `!` or `?` and closing quotes, where whitespace and
    a capital, a digit or an opening quote follow, unless that full stop belongs to an abbreviation.

    Args:
        text: a line, or several joined to one.
        splitter: `AUTO`, `LINE`, `OURS`, or the code of a language ("de").

    Raises:
        UserError: sentencex is needed and not installed.
    """
    if splitter == LINE:
        found = [text.strip()]
    else:
        language = script_of(text)[0] if splitter == AUTO else splitter
        found = _by_library(text, language) if language else _by_our_rules(text)
    return [sentence for sentence in found if sentence]


def script_of(text: str) -> tuple[str, str]:
    """Returns the language whose rules fit the script of a text, and the script's name.

    Both are "" for Latin and Cyrillic, and for a text with a few foreign letters.
    """
    if text.isascii():
        return "", ""
    sample = text
    if len(text) > _SAMPLE * _SLICES:
        places = range(0, len(text), len(text) // _SLICES)
        sample = "".join(text[place : place + _SAMPLE] for place in places)
    foreign = _FOREIGN.findall(sample)
    if not foreign or 3 * len(foreign) < sum(map(str.isalpha, sample)):
        return "", ""
    counts = Counter(_BLOCKS[bisect_right(_STARTS, ord(char)) - 1][1:] for char in foreign)
    if ("ja", "Japanese") in counts and 10 * counts["ja", "Japanese"] > len(foreign):
        return "ja", "Japanese"  # whatever its share of Chinese characters
    return max(counts, key=counts.__getitem__)


def _by_library(text: str, language: str) -> list[str]:
    try:
        from sentencex import segment
    except ImportError:
        raise UserError(
            f"the text needs sentences of the language {language!r}: pip install sentencex, or "
            "give --sentence-splitter line where each line is one"
        ) from None
    sentences: list[list[str]] = []
    tail = ""
    for piece, begins in _pieces(text):
        for number, part in enumerate(segment(language, piece)):
            ends = begins or _ENDED.search(tail) if not number else True
            if sentences and (not ends or _goes_on(tail, part)):
                sentences[-1].append(part)
            else:
                sentences.append([part])
            tail = (tail + part)[-16:]
    found = ["".join(parts) for parts in sentences]
    beside = _ENDS_BESIDE.get(language)
    if beside is not None:
        found = [part for sentence in found for part in beside.split(sentence)]
    return [sentence.strip() for sentence in found]


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts a text behind each hard mark, and what is still too long at a space.

    Yields a piece, and whether it begins behind a mark.
    """
    start, begins = 0, True
    for stop in (*(end.end() for end in _HARD.finditer(text)), len(text)):
        while stop - start > _LONGEST:
            cut = text.rfind(" ", start, start + _LONGEST) + 1 or start + _LONGEST
            yield text[start:cut], begins
            start, begins = cut, False
        if stop > start:
            yield text[start:stop], begins
        start, begins = stop, True


def _goes_on(tail: str, after: str) -> bool:
    """Whether a sentence goes on behind a full stop that is at the end of `tail`."""
    if _STOP.search(tail):
        return not after[0].isspace()
    if _INITIAL.search(tail):
        return True
    return bool(_NUMBER.search(tail)) and after[0].isdigit()


def _by_our_rules(text: str) -> list[str]:
    sentences = []
    start = 0
    for end in _END.finditer(text):
        stop = end.end()
        if stop < len(text) and end.group()[0] in ".!?\u2026":
            following = text[stop]
            if not (following.isupper() or following.isdigit() or following in _OPENING):
                continue
            before = text[max(start, end.start() - 12) : end.start() + 1]
            if end.group().rstrip() == "." and _ABBREVIATION.search(before):
                continue
        sentences.append(text[start:stop].strip())
        start = stop
    sentences.append(text[start:].strip())
    return sentences
