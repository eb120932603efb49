"""Which column of a table is what: by flags, else by the names that data sets use, else by content.

What was chosen is said in a line; what is ambiguous or missing names the flag to give.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastbert.errors import UserError, did_you_mean
from fastbert.finetune.inputs import Row, Skipped, Table, is_number, listed
from fastbert.settings import show

TASKS = ("classify", "tag", "answer", "choose", "embed")
TEXT, TEXT_PAIR, NEGATIVE, LABEL = "text", "text_pair", "negative", "label"
TOKENS, TAGS, ENTITIES = "tokens", "tags", "entities"
QUESTION, CONTEXT, ANSWERS, ANSWER_START = "question", "context", "answers", "answer_start"
CHOICES, ID = "choices", "id"
_ORDER = (
    *(TEXT, TEXT_PAIR, NEGATIVE, TOKENS, TAGS, ENTITIES, QUESTION, CONTEXT, ANSWERS, ANSWER_START),
    *(LABEL, ID),
)

# Names in tiers: the first tier of which a column has a name decides.
_NAMES: dict[str, tuple[str, ...]] = {
    TEXT: (
        "text",
        "sentence review document content comment tweet title_text body message utterance",
        "question query input headline title",
    ),
    TEXT_PAIR: ("text_pair",),
    LABEL: (
        "label labels gold_label",
        "class category target sentiment polarity topic intent quality is_duplicate emotion",
        "score stars rating similarity",
    ),
    NEGATIVE: ("negative", "hard_negative"),
    TOKENS: ("tokens words", "token word"),
    TAGS: ("tags ner_tags", "ner labels", "pos_tags chunk_tags upos pos tag label"),
    ENTITIES: ("entities", "spans"),
    QUESTION: ("question", "query prompt sent2"),
    CONTEXT: ("context", "passage paragraph article premise ctx sent1 document"),
    ANSWERS: ("answers", "answer answer_text"),
    ANSWER_START: ("answer_start",),
    CHOICES: ("choices", "options endings answers candidates"),
    ID: ("id", "guid idx qid example_id"),
}
_CHOICE_LABEL = ("label labels", "answer_key answer correct gold target")
_SCORE = ("score similarity", "label labels")
_PAIRS = (
    "anchor positive",
    "text text_pair",
    "text1 text2",
    "text_a text_b",
    "sentence1 sentence2",
    "sentence_a sentence_b",
    "premise hypothesis",
    "question1 question2",
    "query passage",
    "query document",
    "query positive",
    "question passage",
    "question sentence",
    "question answer",
    "question context",
    "1_string 2_string",
)
_NUMBERED = ("choice", "ending", "option", "answer", "")  # the last for A, B, C ...
_FLAGS = {
    TEXT: "--text-column NAME",
    TEXT_PAIR: "--text-pair-column NAME",
    LABEL: "--label-column NAME",
    TOKENS: "--tokens-column NAME",
    TAGS: "--tags-column NAME",
    QUESTION: "--question-column NAME",
    CONTEXT: "--context-column NAME",
    ANSWERS: "--answers-column NAME",
    CHOICES: "--choices-columns NAME or A,B,C",
    NEGATIVE: "--negative-column NAME",
}
_PLURAL = (ANSWERS, CHOICES, TOKENS, TAGS)
_ROWS = 1000  # that are looked at, at most
_MANY_CLASSES = 50  # beyond, a column found by its content is not taken for the label
_LONG_LABEL = 40  # characters
_CLEARLY = 1.5  # times as long as the next must a column be to be taken for the text


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are for.

    Attributes:
        task: one of `TASKS`.
        of: names of columns by role: "text", "text_pair", "label" (of classify, choose and, as a
            score, embed), "negative", "tokens" and "tags", or "text" and "entities", "question",
            "context", "answers", "answer_start", "id".
        choices: of choose, one column of lists, or one column a choice.
        among: all columns of the table.
    """

    task: str
    of: Mapping[str, str]
    choices: tuple[str, ...] = ()
    among: tuple[str, ...] = field(default=(), repr=False)

    def __contains__(self, role: str) -> bool:
        return role in self.of

    def value(self, row: Row, role: str) -> Any:
        """What the row holds in this role; None where it has no such value."""
        name = self.of.get(role)
        return None if name is None else row.values.get(name)

    def line(self) -> str:
        """Returns "text = 'sentence', label = 'polarity' (of columns id, sentence, polarity)"."""
        chosen = [f"{role} = {name!r}" for role, name in self.of.items()]
        if self.choices:
            chosen.append("choices = " + ", ".join(map(repr, self.choices)))
        return f"{', '.join(chosen)} (of {_columns(self.among)})"

    def missing(self, row: Row) -> str | None:
        """Why a row is to be skipped, "with an empty text" or the like; None where all is there.

        Raises:
            UserError: a text is no string.
        """
        for role in self.of:
            value = self.value(row, role)
            if role in (ID, ANSWER_START):
                continue
            if role in (ENTITIES, ANSWERS):  # empty ones say that there are none
                if value is None:
                    return f"without {role}"
                continue
            if _is_empty(value) or (role == TOKENS and value == []):
                return "without a label" if role == LABEL else f"with {_empty(role)}"
            if role in (TEXT, TEXT_PAIR, NEGATIVE, QUESTION, CONTEXT) and not isinstance(
                value, str
            ):
                raise UserError(f"{row.where}: {self.of[role]} = {show(value)} must be text")
        if self.choices and _is_empty(row.values.get(self.choices[0])):
            return "without choices"
        return None


def detect(
    table: Table, task: str, named: Mapping[str, str], *, with_labels: bool = True
) -> Columns:
    """Finds the columns that a task needs.

    Args:
        table: of which up to a thousand rows from all of it are looked at.
        task: one of `TASKS`.
        named: what flags say, by role; "choices" may be several names with commas between.
        with_labels: whether labels, tags or answers must be there; else none are looked for.

    Raises:
        UserError: a named column does not exist, or one that is needed is ambiguous or missing.
    """
    return _Search(table, task, dict(named), with_labels).columns()


def usable(table: Table, columns: Columns) -> tuple[list[Row], Skipped]:
    """Leaves out rows with an empty text or label.

    Returns:
        The others, and how many were left out for which reason.

    Raises:
        UserError: a text is no string, or no row is left.
    """
    rows, skipped = [], Skipped()
    for row in table.rows:
        reason = columns.missing(row)
        if reason is None:
            rows.append(row)
        else:
            skipped.skip(reason, row.where)
    if not rows:
        raise UserError(f"{table.path}: no row is left: {skipped.line(table.path)}")
    return rows, skipped


def _is_empty(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def _empty(role: str) -> str:
    return f"empty {role}" if role in _PLURAL else f"an empty {role}"


def _columns(names: tuple[str, ...]) -> str:
    return f"column{'' if len(names) == 1 else 's'} {listed(names)}"


def _plain(name: str) -> str:
    return "".join(char for char in name.casefold() if char.isalnum())


class _Search:
    """Roles found so far, and the columns that are still free."""

    def __init__(self, table: Table, task: str, named: dict[str, str], with_labels: bool) -> None:
        self.table, self.task, self.with_labels = table, task, with_labels
        step = len(table.rows) // _ROWS + 1  # not the first: files may be sorted by class
        self.rows = table.rows[::step]
        self.of: dict[str, str] = {}
        self.choices: tuple[str, ...] = ()
        for role, name in named.items():
            names = name.split(",") if role == CHOICES and name not in table.columns else [name]
            for one in names:
                if one not in table.columns:
                    flag = self._flag(role).split()[0] or f"{role} ="
                    near = did_you_mean(one, table.columns)
                    raise UserError(
                        f"{flag} {name}: {table.path} has no column {one!r}"
                        f"{near or f', but {_columns(table.columns)}'}"
                    )
            if role == CHOICES:
                self.choices = tuple(names)
            else:
                self.of[role] = name
        twice = [c for c, n in Counter([*self.of.values(), *self.choices]).items() if n > 1]
        if twice:
            raise UserError(f"column {twice[0]!r} is named for two things at once")

    def _flag(self, role: str) -> str:
        of_embed = "--score-column NAME" if self.task == "embed" else ""
        return (of_embed if role == LABEL else "") or _FLAGS.get(role, "")

    def columns(self) -> Columns:
        getattr(self, f"_{self.task}")()
        self._optional(ID)
        of = {role: self.of[role] for role in _ORDER if role in self.of}
        return Columns(self.task, of, self.choices, self.table.columns)

    def _classify(self) -> None:
        self._pair()
        if self.with_labels:
            self._optional(LABEL)
        self._text()
        if self.with_labels and LABEL not in self.of:
            self._label_by_content()

    def _tag(self) -> None:
        if TOKENS not in self.of and TEXT in self.of:
            if TAGS in self.of:
                self.of[ENTITIES] = self.of.pop(TAGS)
        else:
            self._optional(TOKENS)
        if TOKENS in self.of:
            if self.with_labels:
                self._needed(TAGS)
            return
        if self.with_labels and ENTITIES not in self.of:
            self._optional(ENTITIES)
            if ENTITIES not in self.of:
                raise self._missing(TOKENS)
        self._text()

    def _answer(self) -> None:
        self._needed(QUESTION)
        self._needed(CONTEXT)
        if self.with_labels:
            self._needed(ANSWERS)
            self._optional(ANSWER_START)

    def _choose(self) -> None:
        if not self.choices:
            self.choices = self._numbered()
        if not self.choices and (name := self._by_name(CHOICES)):
            self.choices = (name,)
        if not self.choices:
            raise self._missing(CHOICES)
        if self.with_labels and LABEL not in self.of:
            self._take(LABEL, self._by_name(LABEL, _CHOICE_LABEL))
            if LABEL not in self.of:
                raise self._missing(LABEL)
        self._optional(CONTEXT)
        self._optional(QUESTION)
        if CONTEXT not in self.of and QUESTION not in self.of:
            self._needed(QUESTION)

    def _embed(self) -> None:
        self._pair()
        if self.with_labels:
            self._needed(TEXT)
            self._needed(TEXT_PAIR)
            self._optional(NEGATIVE)
            if LABEL not in self.of:
                self._take(LABEL, self._by_name(LABEL, _SCORE))
        else:
            self._text()

    def _free(self) -> list[str]:
        taken = {*self.of.values(), *self.choices}
        return [name for name in self.table.columns if name not in taken]

    def _by_name(self, role: str, tiers: tuple[str, ...] = ()) -> str | None:
        for tier in tiers or _NAMES[role]:
            names = {_plain(name) for name in tier.split()}
            found = [name for name in self._free() if _plain(name) in names]
            if len(found) > 1:
                raise self._ambiguous(role, found)
            if found:
                return found[0]
        return None

    def _take(self, role: str, name: str | None) -> None:
        if name is not None:
            self.of[role] = name

    def _optional(self, role: str) -> None:
        if role not in self.of:
            self._take(role, self._by_name(role))

    def _needed(self, role: str) -> None:
        self._optional(role)
        if role not in self.of:
            raise self._missing(role)

    def _pair(self) -> None:
        if TEXT in self.of or TEXT_PAIR in self.of:
            return
        plain = {_plain(name): name for name in self._free()}
        for pair in _PAIRS:
            first, second = map(_plain, pair.split())
            if first in plain and second in plain:
                self.of |= {TEXT: plain[first], TEXT_PAIR: plain[second]}
                return

    def _text(self) -> None:
        if TEXT in self.of:
            return
        self._take(TEXT, self._by_name(TEXT))
        if TEXT in self.of:
            return
        lengths = {name: self._length(name) for name in self._free()}
        order = sorted((name for name in lengths if lengths[name]), key=lambda n: -lengths[n])
        if not order:
            raise self._missing(TEXT)
        order = [name for name in order if self._has_spaces(name)] or order
        if len(order) > 1 and lengths[order[0]] < _CLEARLY * lengths[order[1]]:
            raise self._ambiguous(TEXT, order[:2])
        self.of[TEXT] = order[0]

    def _length(self, name: str) -> float:
        """Mean characters of a column of free text; 0 of numbers, of other things and of none."""
        values = [v for v in self._values(name) if not _is_empty(v)]
        if not values or not all(isinstance(value, str) for value in values):
            return 0.0
        if all(is_number(value) for value in values):
            return 0.0
        return sum(map(len, values)) / len(values)

    def _has_spaces(self, name: str) -> bool:
        return sum(" " in (value or "") for value in self._values(name)) > len(self.rows) / 2

    def _label_by_content(self) -> None:
        found = [name for name in self._free() if self._is_label(name)]
        if len(found) > 1:
            raise self._ambiguous(LABEL, found)
        if not found:
            raise self._missing(LABEL)
        self.of[LABEL] = found[0]

    def _is_label(self, name: str) -> bool:
        values = [value for value in self._values(name) if not _is_empty(value)]
        if not all(
            isinstance(value, str | int) and len(str(value)) <= _LONG_LABEL for value in values
        ):
            return False
        distinct = len(set(values))
        return 2 <= distinct <= min(_MANY_CLASSES, len(values) // 2)

    def _values(self, name: str) -> Iterator[Any]:
        return (row.values.get(name) for row in self.rows)

    def _numbered(self) -> tuple[str, ...]:
        plain = {_plain(name): name for name in self._free()}
        for stem in _NUMBERED:
            for marks in ("0123456789", "123456789", "abcdefghij"):
                if not stem and marks[0].isdigit():
                    continue
                found = []
                for mark in marks:
                    if stem + mark not in plain:
                        break
                    found.append(plain[stem + mark])
                if len(found) > 1:
                    return tuple(found)
        return ()

    def _missing(self, role: str) -> UserError:
        what = role if role in _PLURAL else f"the {role}"
        is_conll = self.task == "tag" and self.table.format in ("text", "csv", "tsv")
        return UserError(
            f"{self.table.path}: no column for {what} among {_columns(self.table.columns)}: "
            f"name it with {self._flag(role)}{', or give --format conll' if is_conll else ''}"
        )

    def _ambiguous(self, role: str, found: list[str]) -> UserError:
        flag = self._flag(role)
        return UserError(
            f"{self.table.path}: {role} could be {' or '.join(map(repr, found))} (of "
            f"{_columns(self.table.columns)}): {f'name it with {flag}' if flag else 'rename one'}"
        )
