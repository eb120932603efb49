"""Progress bars on stderr: live on a terminal, else a line now and then."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

FIRST, EVERY = 10.0, 30.0
"""Seconds until the first line of a log, and between two: a run of a day is some 3,000 lines."""


class _Lines:
    """Takes what tqdm writes over and over in one place, and writes each as a line."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n \x1b[A")
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(iterable: Iterable[Any] | None = None, /, **options: Any) -> Any:
    """A bar of tqdm.

    Args:
        iterable: what is gone through, if not by `update`.
        options: as tqdm has them; where and how often it writes is decided here.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, **options)
    seldom = {"mininterval": EVERY, "maxinterval": EVERY, "delay": FIRST}
    return tqdm(iterable, file=_Lines(), **seldom, **options)
