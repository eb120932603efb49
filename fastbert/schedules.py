"""Settings that change on the way, as VALUE:SHARE of the steps, and the phases they make together.

"0.30:0.6,0.15" is 0.30 for 60% of the steps, then 0.15. Standard library only.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from fastbert.errors import UserError
from fastbert.settings import Setting, check_number, show

MOST_PHASES = 100  # of one schedule: each may be recorded, or compiled, anew
_ROUNDING = 1e-6  # of a sum of shares

Value = TypeVar("Value")
Schedule = Sequence[tuple[Value, int]]
"""(value, the step it ends before), in order; the last ends with the run."""


class Phase(NamedTuple):
    """Steps between which no schedule changes anything."""

    max_seq_length: int
    mlm_probability: float
    hidden_dropout_prob: float | None  # None: the model's own
    attention_probs_dropout_prob: float | None
    end: int  # the step it ends before


def numbers(setting: Setting, value: float | str | None, max_steps: int) -> Schedule[float | None]:
    """What a setting is at each step: one number throughout, or as its schedule says.

    Args:
        setting: whose bounds every number must keep.
        value: a number, None, or "NUMBER:SHARE,NUMBER:SHARE"; the last may stand without a share.
        max_steps: what shares are of.

    Raises:
        UserError: it cannot be read, is out of bounds, or its shares make no whole.
    """
    if not isinstance(value, str):
        return [(value, max_steps)]
    shown = f"{setting.name} = {show(value)}"

    def number(text: str) -> float:
        found = float(text)
        check_number(setting, found, f"{shown}: {text[:20]}")
        return found

    form = "a number, or NUMBER:SHARE of the steps as in 0.2:0.6,0.1"
    return _ends(shown, _entries(shown, value, number, form, open_end=True), max_steps)


def lengths(curriculum: str, max_seq_length: int, max_steps: int) -> Schedule[int]:
    """The longest sequence at each step: those of a curriculum, then `max_seq_length`.

    Args:
        curriculum: "LENGTH:SHARE,LENGTH:SHARE", or empty. A length is in tokens, or a fraction as
            in "1/2:0.3", which is rounded down to a multiple of 8.
        max_seq_length: what fractions are of.
        max_steps: what shares are of.

    Raises:
        UserError: it cannot be read, or does not fit `max_seq_length`.
    """
    shown = f"curriculum = {show(curriculum)}"

    def length(text: str) -> int:
        match = re.fullmatch("([0-9]{1,9})|([1-9][0-9]{0,8})/([1-9][0-9]{0,8})", text)
        if not match:
            raise ValueError
        if match[1]:
            found = int(match[1])
        else:
            found = max(8, max_seq_length * int(match[2]) // int(match[3]) // 8 * 8)
        if not 8 <= found <= max_seq_length:
            raise UserError(
                f"{shown}: length {text} must be at least 8 and at most max_seq_length = "
                f"{max_seq_length}"
            )
        return found

    form = "LENGTH:SHARE, e.g. 128:0.9"
    shorter = _entries(shown, curriculum, length, form) if curriculum else []
    return _ends(shown, [*shorter, (max_seq_length, None)], max_steps)


def _entries(
    shown: str, text: str, read: Callable[[str], Value], form: str, *, open_end: bool = False
) -> list[tuple[Value, float | None]]:
    """Each value with its share; None for the last where `open_end` lets it go without."""
    parts = text.split(",")
    if len(parts) > MOST_PHASES:
        raise UserError(f"{shown}: has {len(parts)} phases: at most {MOST_PHASES}")
    found = []
    for left, part in zip(reversed(range(len(parts))), parts, strict=True):
        match = re.fullmatch(r"\s*([^\s:]+)(?::([0-9]*\.?[0-9]+))?\s*", part)
        try:
            if not match or (match[2] is None and (left or not open_end)):
                raise ValueError
            found.append((read(match[1]), None if match[2] is None else float(match[2])))
        except ValueError:
            raise UserError(f"{shown}: {show(part)} must be {form}") from None
    return found


def _ends(shown: str, entries: list[tuple[Value, float | None]], max_steps: int) -> Schedule[Value]:
    shares = [share for _, share in entries if share is not None]
    total, whole = sum(shares), len(shares) == len(entries)
    fits = abs(total - 1) <= _ROUNDING if whole else total < 1
    if not fits or not all(share > 0 for share in shares):
        wanted = "1" if whole else "less than 1"
        raise UserError(f"{shown}: shares must be more than 0 and sum to {wanted}")
    found: list[tuple[Value, int]] = []
    share, begin = 0.0, 0
    for index, (value, part) in enumerate(entries, start=1):
        share += part or 0.0
        end = max_steps if index == len(entries) else round(share * max_steps)
        if end <= begin:
            raise UserError(
                f"{shown}: {value} has not one step of max_steps = {max_steps}: give it a larger "
                "share, or more steps"
            )
        found.append((value, end))
        begin = end
    return found


def united(*schedules: Schedule[Any]) -> tuple[Phase, ...]:
    """The phases between all boundaries of the schedules, which stand in the order of `Phase`."""
    found: list[Phase] = []
    for end in sorted({end for schedule in schedules for _, end in schedule}):
        values = [next(value for value, last in one if end <= last) for one in schedules]
        if found and found[-1][:-1] == tuple(values):
            found.pop()
        found.append(Phase._make((*values, end)))
    return tuple(found)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of a step, counted from 0; beyond the end, the last."""
    return next((phase for phase in phases if step < phase.end), phases[-1])


def changes(before: Phase, now: Phase) -> str:
    """What another phase changes, for the log."""
    return ", ".join(_changed(before, now))


def _changed(before: Phase, now: Phase) -> Iterator[str]:
    if now.max_seq_length != before.max_seq_length:
        yield f"sequences of up to {now.max_seq_length} tokens"
    if now.mlm_probability != before.mlm_probability:
        yield f"{100 * now.mlm_probability:g}% masked"
    hidden, attention = now.hidden_dropout_prob, now.attention_probs_dropout_prob
    hidden_changed = hidden != before.hidden_dropout_prob
    attention_changed = attention != before.attention_probs_dropout_prob
    if hidden_changed and attention_changed and hidden == attention:
        yield f"dropout {hidden:g}"
    else:
        if hidden_changed:
            yield f"dropout of hidden states {hidden:g}"
        if attention_changed:
            yield f"dropout of attention {attention:g}"
