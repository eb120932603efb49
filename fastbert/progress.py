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
        line = text.replace("\x1b[A", "").strip()  # where tqdm moves up a line
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class _Log(tqdm):
    """Silent at first; a line every `EVERY` seconds, and one at the end."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        seldom = {"mininterval": EVERY, "maxinterval": EVERY, "delay": EVERY}
        self.last_print_t = 0.0  # tqdm sets it to now
        super().__init__(iterable, file=_Lines(), **seldom, **options)

    def refresh(self, *args: Any, **options: Any) -> bool:
        """Whoever asks for a line sooner (a postfix, a new description) is seen with the next."""
        if self.disable or (now := self._time()) - self.last_print_t < EVERY:
            return False
        self.last_print_t = now
        return bool(super().refresh(*args, **options))

    def close(self) -> None:
        self.delay = 0.0  # else one that ends earlier would never be seen
        super().close()


def progress_bar(iterable: Iterable[Any] | None = None, /, **options: Any) -> Any:
    """A bar of tqdm.

    Args:
        iterable: what is gone through, if not by `update`.
        options: as tqdm has them; where and how often it writes is decided here.
    """
    if sys.stderr is None:  # closed by who started us
        return tqdm(iterable, **options | {"disable": True})
    if sys.stderr.isatty():
        return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, **options)
    return _Log(iterable, **options)
