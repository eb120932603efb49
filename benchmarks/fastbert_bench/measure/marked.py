"""Sections of a README that a command writes, between two lines of comment that stay."""

from collections.abc import Iterable
from pathlib import Path


def with_lines(text: str, path: Path, begin: str, end: str, lines: Iterable[str]) -> str:
    """`text`, which is that of `path`, with what lies between the two marks replaced by `lines`.

    Raises:
        ValueError: a mark is missing.
    """
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"{path}: needs the lines {begin} and {end}")
    return "\n".join((f"{before}{begin}", *lines, f"{end}{after}"))
