"""Lengths of sequences: as in a natural corpus, as in MLPerf's, or out of a file.

B sequences, S the longest of them, in tokens.
"""

import re
from pathlib import Path

import numpy as np

from fastbert.errors import UserError


def natural_lengths(B: int, S: int, rng: np.random.Generator) -> np.ndarray:
    """(B,) lengths as in a shuffled corpus cut at S: normal around 0.55 S, clipped to [8, S]."""
    return np.clip(np.rint(rng.normal(0.55 * S, 0.25 * S, B)), min(8, S), S).astype(np.int64)


def mlperf_lengths(B: int, S: int, rng: np.random.Generator) -> np.ndarray:
    """(B,) lengths as in MLPerf's Wikipedia: a mean of 254 of 512, both ends crowded."""
    return np.clip(np.rint(rng.normal(0.5, 0.34, B) * S), 16, S).astype(np.int64)


def lengths_asked(lengths: str, B: int, S: int, rng: np.random.Generator) -> np.ndarray:
    """(B,) lengths of at most S as `--lengths` names them: natural, full, or drawn from a file.

    Raises:
        UserError: a file that cannot be read, or that holds something else.
    """
    if lengths == "full":
        return np.full(B, S)
    if lengths == "natural":
        return natural_lengths(B, S, rng)
    found = np.minimum(file_lengths(lengths), S)
    return np.asarray(rng.choice(found, B, replace=B > len(found)))


def file_lengths(path: str) -> np.ndarray:
    """The lengths in a file, one a line, in its order.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"lengths = {path!r}: cannot be read: {reason}") from None
    if not lines:
        raise UserError(f"lengths = {path!r}: the file is empty")
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch("[0-9]{1,9}", line.strip()) or int(line) < 3:
            raise UserError(f"{path}:{number}: {line[:80]!r} is not a length of at least 3 tokens")
    return np.array([int(line) for line in lines])
