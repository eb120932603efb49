"""What a row says for a task: words and tags, answers, choices; each checked where it is read.

Of rows that `Columns.missing` has let through.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastbert.errors import UserError
from fastbert.finetune import columns as roles
from fastbert.finetune.columns import Columns
from fastbert.finetune.inputs import Row
from fastbert.finetune.tags import of_entities, words_of
from fastbert.settings import show

_PYTHON = re.compile(r"""(?s)\s*(?:\[\s*(?:['"].*['"]|None\b.*)\s*\]|\{\s*'.*\})\s*""")


@dataclass(frozen=True, slots=True)
class Tagged:
    """A sentence in words.

    Attributes:
        text: as given, or its tokens with a space between.
        words: where each stands in `text`, as (first character, the one behind the last).
        tags: of the words; None where the row has none.
        lines: of the words in a CoNLL file, else empty.
        where: the row's.
    """

    text: str
    words: list[tuple[int, int]]
    tags: list[str] | None
    lines: Sequence[int]
    where: str


def read_tagged(row: Row, columns: Columns) -> Tagged:
    """Words and tags of a row: from lists of tokens and tags, or a text and its entities.

    Lists may be given as JSON, or with spaces between. Of entities the tags are IOB2.

    Raises:
        UserError: as many tokens as tags are not there, or one of them is no text; an entity that
            is not where it says.
    """
    if roles.TOKENS not in columns:
        text = columns.value(row, roles.TEXT)
        if roles.ENTITIES not in columns:
            return Tagged(text, words_of(text), None, (), row.where)
        entities = decoded(columns.value(row, roles.ENTITIES), row.where)
        words, tags = of_entities(text, entities if entities is not None else [], row.where)
        return Tagged(text, words, tags, (), row.where)
    tokens = _strings(row, columns, roles.TOKENS)
    tags_given = None
    if roles.TAGS in columns:
        tags_given = _strings(row, columns, roles.TAGS)
        if len(tags_given) != len(tokens):
            raise UserError(
                f"{row.where}: {len(tokens)} tokens and {len(tags_given)} tags: must be as many"
            )
    words, begin = [], 0
    for token in tokens:
        words.append((begin, begin + len(token)))
        begin += len(token) + 1
    return Tagged(" ".join(tokens), words, tags_given, row.values.get("lines", ()), row.where)


def _strings(row: Row, columns: Columns, role: str) -> list[str]:
    value = decoded(columns.value(row, role), row.where)
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list):
        raise UserError(f"{row.where}: {columns.of[role]} = {show(value)} must be a list")
    for place, one in enumerate(value):
        is_number = role == roles.TAGS and type(one) is int
        if not is_number and (not isinstance(one, str) or not one.strip()):
            where = row.where
            if lines := row.values.get("lines"):
                where = f"{where.rpartition(':')[0]}:{lines[place]}"
            raise UserError(f"{where}: {show(one)} among the {role} must be text, not empty")
    return [str(one) for one in value]


def decoded(value: Any, where: str) -> Any:
    """What JSON in a field of CSV or TSV stands for; other values stay.

    Raises:
        UserError: a list or an object in Python's notation.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            if _PYTHON.fullmatch(value):
                raise UserError(
                    f"{where}: {show(value)} is in Python's notation: write it as JSON, with "
                    "json.dumps"
                ) from None
    return value


def read_answers(row: Row, columns: Columns) -> list[tuple[str, int]]:
    """Texts of a question's answers and their first characters in the context; none: no answer.

    They are given as SQuAD's flattened {"text": [...], "answer_start": [...]}, as a list of objects
    with `text` and `answer_start`, or a text beside a column `answer_start`.

    Raises:
        UserError: another form, or the context holds something else at that place.
    """
    value = decoded(columns.value(row, roles.ANSWERS), row.where)
    if isinstance(value, str) and roles.ANSWER_START in columns:
        value = {"text": value, "answer_start": columns.value(row, roles.ANSWER_START)}
        value = None if not value["text"].strip() else value
    context = columns.value(row, roles.CONTEXT)
    answers = []
    for text, start in _pairs(value, row.where):
        if start < 0 or context[start : start + len(text)] != text or not text:
            there = context[start : start + len(text)] if start >= 0 else ""
            found = f"where {show(there)} stands" if there else f"for it has {len(context)}"
            raise UserError(
                f"{row.where}: the answer {show(text)} is not at character {start} of the "
                f"context, {found}"
            )
        answers.append((text, start))
    return answers


def _pairs(value: Any, where: str) -> list[tuple[str, int]]:
    if value is None or value == "":
        return []
    texts: Any = None
    starts: Any = None
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
    elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        texts = [one.get("text") for one in value]
        starts = [one.get("answer_start") for one in value]
    texts, starts = ([one] if isinstance(one, str | int) else one for one in (texts, starts))
    if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
        places = [_whole(start) for start in starts]
        if all(isinstance(t, str) for t in texts) and all(type(s) is int for s in places):
            return list(zip(texts, places, strict=True))
    raise UserError(
        f"{where}: answers = {show(value)} must hold as many texts as answer_start, integers"
    )


def _whole(start: Any) -> Any:
    """A number of CSV, which tables write as 4.0 where others are missing."""
    if isinstance(start, str) and re.fullmatch(r"\s*[0-9]{1,15}(\.0+)?\s*", start):
        return int(float(start))
    return start


def read_choices(row: Row, columns: Columns) -> tuple[list[str], int | None]:
    """The choices of a row, and which is right, counted from 0; None where labels are not read.

    Choices are a list of texts, of objects with `text` (and `label`), {"text": [...], "label":
    [...]}, or columns, of which the last may be empty. The label is a number from 0, a letter, the
    label or the text of a choice.

    Raises:
        UserError: fewer than two choices, an empty one, or a label that is none of them.
    """
    if len(columns.choices) > 1:
        given: Any = [row.values.get(name) for name in columns.choices]
        while given and (given[-1] is None or given[-1] == ""):
            given.pop()
    else:
        given = decoded(row.values.get(columns.choices[0]), row.where)
    names: list[Any] = []
    if isinstance(given, Mapping):
        names, given = given.get("label") or [], given.get("text")
    elif isinstance(given, list) and all(isinstance(one, Mapping) for one in given):
        names = [one.get("label") for one in given]
        given = [one.get("text") for one in given]
    if not isinstance(given, list) or len(given) < 2:
        raise UserError(f"{row.where}: choices = {show(given)} must be a list of two or more")
    for number, text in enumerate(given):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{row.where}: choice {number} is {show(text)}: it must be a text")
    if roles.LABEL not in columns:
        return given, None
    return given, _which(columns.value(row, roles.LABEL), given, names, row.where)


def _which(label: Any, texts: list[str], names: list[Any], where: str) -> int:
    if names and label in names:
        return names.index(label)
    number = -1
    if isinstance(label, str):
        sign = label.strip().upper()
        if sign.isdecimal():
            number = int(sign) if len(sign) < 10 else -1
        elif len(sign) == 1 and "A" <= sign <= "Z":
            number = ord(sign) - ord("A")
    elif isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
        number = int(label)
    found = {number} if 0 <= number < len(texts) else set()
    if texts.count(label) == 1:
        found.add(texts.index(label))
    if len(found) > 1:
        one, other = sorted(found)
        raise UserError(
            f"{where}: label = {show(label)} may be choice {one} or choice {other}, for it is the "
            f"text of one of them and the number or letter of the other: give an integer in JSON"
        )
    if not found:
        last = chr(ord("A") + len(texts) - 1)
        raise UserError(
            f"{where}: label = {show(label)} is none of {len(texts)} choices: it must be 0 to "
            f"{len(texts) - 1}, A to {last}, or the text of one"
        )
    return found.pop()
