"""What tests of this room share."""

import logging
from collections.abc import Iterator

import pytest

from fastbert.hf import layers


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the log says, as if in a new process. (pytest's own would catch torch's traces, too.)"""
    layers._say.cache_clear()
    handler, logger = _Lines(), logging.getLogger("fastbert")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.setLevel(before)
    logger.removeHandler(handler)
