"""The two errors a user of fastbert ever sees, each of them one line.

`UserError` is a bad request and ends the command with exit code 2; `RunError` is a run that failed
and ends it with exit code 1. Everything else that escapes is a bug of ours.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class FastbertError(Exception):
    """Base of the errors that are shown as one line, without a traceback.

    Attributes:
        exit_code: what the `fastbert` command exits with.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class UserError(FastbertError):
    """A bad request: says what was wrong, where (file:line or setting = value), what is right."""

    exit_code = 2


class RunError(FastbertError):
    """A run that failed although the request was fine: disk full, loss not finite, no GPU."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ": did you mean 'x'?" for the nearest of `known`, or "" where none is near.

    An option keeps its dashes, which make it no nearer, and gets no quotes: ": did you mean
    --learning-rate?".
    """
    names = {one.lstrip("-"): one for one in known}
    near = get_close_matches(word.lstrip("-")[:100], names, n=1, cutoff=0.6)
    if not near:
        return ""
    meant = names[near[0]]
    return f": did you mean {meant if meant.startswith('-') else repr(meant)}?"
