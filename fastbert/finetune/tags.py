"""Tags of tokens: IOB1, IOB2 and IOBES told apart, checked, turned into each other and into spans.

IOB1 (Ramshaw and Marcus 1995) writes B- only where an entity follows one of its type at once, IOB2
at the beginning of each; IOBES, or BILOU, marks ends and single tokens as well (Ratinov and Roth
2009). What follows the first hyphen is the type, hyphens included.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from fastbert.errors import UserError
from fastbert.settings import show

IOB1, IOB2, IOBES, NONE = "IOB1", "IOB2", "IOBES", "none"
Span = tuple[str, int, int]
"""Type, first token, and the one behind the last."""

_LETTERS = {IOB1: "BI", IOB2: "BI", IOBES: "BIESLU"}
_SAME = {"L": "E", "U": "S"}  # BILOU's letters
_SIGN, _MARK, _JOINER, _FLAG = "\ue000\ue001\ue002\ue003"
_ONE_SIGN = f"(?:{_FLAG}{{2}}|[^\\w\\s]){_MARK}*"
_WORD = re.compile(rf"\w[\w{_MARK}{_JOINER}]*|{_ONE_SIGN}(?:{_JOINER}{_ONE_SIGN})*")


class _Kinds(dict[int, str]):
    """What `_WORD` sees of a character, filled as characters are met."""

    def __missing__(self, code: int) -> str:
        found = chr(code)
        is_skin_tone = 0x1F3FB <= code <= 0x1F3FF
        if any(code in block for block in _IDEOGRAPHS):
            found = _SIGN
        elif code == 0x200D:
            found = _JOINER
        elif 0x1F1E6 <= code <= 0x1F1FF:  # letters, of which two are a flag
            found = _FLAG
        elif is_skin_tone or unicodedata.category(found) in ("Mn", "Mc", "Me", "Cf"):
            found = _MARK
        self[code] = found
        return found


_IDEOGRAPHS = (
    range(0x3400, 0x4DC0),
    range(0x4E00, 0xA000),
    range(0xF900, 0xFB00),
    range(0x20000, 0x40000),
)
_KINDS = _Kinds()


def _parts(tag: str) -> tuple[str, str]:
    """Letter and type; ("O", "") for what is no tag of an entity."""
    letter, hyphen, kind = tag.partition("-")
    if hyphen and kind and letter in _LETTERS[IOBES]:
        return _SAME.get(letter, letter), kind
    return "O", ""


def scheme_of(sequences: Iterable[Sequence[str]]) -> str:
    """Tells the scheme of a corpus.

    Args:
        sequences: tags of sentences.

    Returns:
        "IOB1", "IOB2", "IOBES" (or BILOU, which has other letters for the same), or "none" where
        tags are labels of single tokens. Of IOB1 and IOB2 the one that fewer entities contradict;
        IOB2 where none contradicts either.
    """
    letters: set[str] = set()
    plain = False
    begins_with_i = begins_with_b = 0
    for tags in sequences:
        previous = ("O", "")
        for tag in tags:
            letter, kind = _parts(tag)
            plain |= letter == "O" != tag
            letters.add(letter)
            if letter in "BI" and previous[1] != kind:
                begins_with_i += letter == "I"
                begins_with_b += letter == "B"
            previous = (letter, kind)
    letters.discard("O")
    if not letters or (plain and not letters & {"B", "I"}):
        return NONE
    if letters & {"E", "S"}:
        return IOBES
    return IOB1 if begins_with_i > begins_with_b else IOB2


def check(tags: Sequence[str], scheme: str, where: str, lines: Sequence[int] = ()) -> None:
    """Checks a sentence's tags.

    Args:
        tags: of its tokens.
        scheme: as `scheme_of` tells it.
        where: the row's, "file:17".
        lines: of the tokens, where each has its own; the message then names it.

    Raises:
        UserError: a tag that cannot stand where it does, with its place.
    """
    if scheme == NONE:
        return
    for index, tag in enumerate(tags):
        previous = tags[index - 1] if index else None
        following = tags[index + 1] if index + 1 < len(tags) else None
        wrong = _wrong(previous, tag, following, scheme)
        if wrong:
            place = f"{where}: tag {index + 1}"
            if lines:
                place = f"{where.rpartition(':')[0]}:{lines[index]}: tag"
            raise UserError(f"{place} {show(tag)} {wrong}")


def _wrong(previous: str | None, tag: str, following: str | None, scheme: str) -> str:
    letter, kind = _parts(tag)
    if tag != "O" and (letter == "O" or tag[0] not in _LETTERS[scheme]):
        return f"is none of {scheme}: O, {', '.join(f'{one}-TYPE' for one in _LETTERS[scheme])}"
    before, kind_before = _parts(previous or "O")
    goes_on = before != "O" and kind == kind_before
    after = f"stands after {show(previous)}" if previous else "begins its sentence"
    if scheme == IOB1 and letter == "B" and not goes_on:
        return f"{after}: in IOB1 an entity begins with I-{kind}, B- follows its own type"
    if scheme == IOB2 and letter == "I" and not goes_on:
        return f"{after}: in IOB2 an entity begins with B-{kind}"
    if scheme != IOBES:
        return ""
    if letter in ("I", "E") and not (goes_on and before in ("B", "I")):
        return f"{after}: in IOBES an entity begins with B-{kind}, a single token is S-{kind}"
    behind, kind_behind = _parts(following or "O")
    if letter in ("B", "I") and not (behind in ("I", "E") and kind_behind == kind):
        told = f"stands before {show(following)}" if following else "ends its sentence"
        return f"{told}: in IOBES an entity ends with E-{kind}, a single token is S-{kind}"
    return ""


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of a sentence in any scheme.

    Sequences that break their scheme, as models predict them, are read as seqeval does by default:
    what continues nothing begins an entity.

    Args:
        tags: of its tokens; without a letter and a hyphen they belong to no entity.
    """
    found: list[Span] = []
    begin, before, kind_before = 0, "O", ""
    for index, tag in enumerate([*tags, "O"]):
        letter, kind = _parts(tag)
        goes_on = letter in ("I", "E") and before in ("B", "I") and kind == kind_before
        if not goes_on:
            if before != "O":
                found.append((kind_before, begin, index))
            begin = index
        before, kind_before = letter, kind
    return found


def kinds(tags: Sequence[str]) -> list[str]:
    """The types of a sentence's entities, or the labels of single tokens, but for "O"."""
    return sorted({_parts(tag)[1] or tag for tag in tags} - {"O"})


def of_spans(entities: Iterable[Span], count: int, scheme: str) -> list[str]:
    """The tags of `count` tokens that hold these entities, in the order of their tokens.

    Args:
        entities: none overlaps another.
        count: of tokens.
        scheme: "IOB1", "IOB2" or "IOBES".
    """
    tags = ["O"] * count
    behind: tuple[str, int] | None = None
    for kind, begin, end in entities:
        first = "I" if scheme == IOB1 and behind != (kind, begin) else "B"
        letters = [first, *"I" * (end - begin - 1)]
        if scheme == IOBES:
            letters[-1] = "S" if len(letters) == 1 else "E"
        tags[begin:end] = [f"{letter}-{kind}" for letter in letters]
        behind = (kind, end)
    return tags


def to_iob2(tags: Sequence[str], scheme: str) -> list[str]:
    """A checked sequence of `scheme` in IOB2; labels of single tokens stay."""
    return list(tags) if scheme == NONE else of_spans(spans(tags), len(tags), IOB2)


def words_of(text: str, cuts: Iterable[int] = ()) -> list[tuple[int, int]]:
    """Where the words and signs of a text stand, as (first character, the one behind the last).

    An ideograph is a word, as BERT's tokenizer has it. Marks, joiners and what is not seen belong
    to the character before: no letter is parted from its accent, no emoji from its colour.

    Args:
        text: any.
        cuts: characters at which a word begins anew: where entities begin and end.
    """
    places = sorted({0, len(text), *cuts})
    if not text.isascii():
        text = text.translate(_KINDS)
    return [
        match.span()
        for begin, end in pairwise(places)
        for match in _WORD.finditer(text, begin, end)
    ]


def of_entities(text: str, entities: Any, where: str) -> tuple[list[tuple[int, int]], list[str]]:
    """Words of a text, and their IOB2 tags.

    Args:
        text: any.
        entities: a list of objects with `start`, `end` (characters, the end behind the last),
            `type` or `label`, and perhaps `text`, which must then stand there; or of lists, [start,
            end, type].
        where: the row's.

    Returns:
        The words as `words_of` gives them, and a tag for each.

    Raises:
        UserError: entities that are no such objects, lie outside the text, hold no word or overlap.
    """
    found = sorted(_entity(text, entity, where) for entity in _list_of(entities, where))
    words = words_of(text, (place for begin, end, _ in found for place in (begin, end)))
    tags = ["O"] * len(words)
    behind, index = 0, 0
    for begin, end, kind in found:
        if begin < behind:
            raise UserError(f"{where}: the entity {show(text[begin:end])} overlaps the one before")
        behind = end
        while index < len(words) and words[index][0] < begin:
            index += 1
        first = index
        while index < len(words) and words[index][1] <= end:
            tags[index] = f"{'I' if index > first else 'B'}-{kind}"
            index += 1
        if index == first:
            raise UserError(f"{where}: the entity {show(text[begin:end])} holds no word")
    return words, tags


def _list_of(entities: Any, where: str) -> list[Any]:
    if not isinstance(entities, list):
        raise UserError(f"{where}: entities = {show(entities)} must be a list of objects")
    return entities


def _entity(text: str, entity: Any, where: str) -> tuple[int, int, str]:
    if isinstance(entity, list) and len(entity) == 3:
        entity = dict(zip(("start", "end", "type"), entity, strict=True))
    if not isinstance(entity, dict):
        entity = {}
    begin, end = entity.get("start"), entity.get("end")
    kind = entity.get("type", entity.get("label"))
    if type(begin) is not int or type(end) is not int or not isinstance(kind, str) or not kind:
        raise UserError(f"{where}: an entity must have integers start and end, and a type")
    if not 0 <= begin < end <= len(text):
        raise UserError(
            f"{where}: the entity of characters {begin} to {end} is not within the text, "
            f"which has {len(text)}"
        )
    told = entity.get("text")
    if told is not None and told != text[begin:end]:
        raise UserError(
            f"{where}: the entity {show(told)} is not at character {begin}, "
            f"where {show(text[begin:end])} stands"
        )
    return begin, end, kind
