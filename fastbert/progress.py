"""Progress bars on stderr: live on a terminal, else a line now and then."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines of a log: a run of a day leaves some 3,000."""


class _Lines:
    """Takes what tqdm writes over and over in one place, and writes each as a line."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n \x1b[A")
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class _Log(tqdm):
    """Silent at first; a line every `EVERY` seconds, and one at the end."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        seldom = {"mininterval": EVERY, "maxinterval": EVERY, "delay": EVERY}
        super().__init__(iterable, file=_Lines(), **seldom, **options)

    def close(self) -> None:
        self.delay = 0.0  # else one that ends earlier would never be seen
        super().close()


def progress_bar(iterable: Iterable[Any] | None = None, /, **options: Any) -> Any:
    """A bar of tqdm.

    Args:
        iterable: what is gone through, if not by `update`.
        options: as tqdm has them; where and how often it writes is decided here.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, **options)
    return _Log(iterable, **options)
