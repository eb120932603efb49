"""Kernels run on CPU tensors in Triton's interpreter here.

Triton reads TRITON_INTERPRET where a kernel is defined and at its first launch, so it is set while
these modules are collected and while their tests run; other tests in this process do not see it.
"""

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_BEFORE = os.environ.get("TRITON_INTERPRET")
if _BEFORE != "1" and "fastbert_kernels.triton_import" in sys.modules:
    raise RuntimeError("kernels were imported before tests/kernels: run the tests by pytest")
os.environ["TRITON_INTERPRET"] = "1"

import triton.language  # noqa: E402, F401  its library functions are kernels, too
from triton.runtime import interpreter  # noqa: E402

_SHORTCUTS = runpy.run_path(str(Path(__file__).parents[1] / "interpreter.py"))
_REPLACED: dict[str, Any] = _SHORTCUTS["shorten"](interpreter)


def _restore() -> None:
    if _BEFORE is None:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = _BEFORE


def pytest_collection_finish() -> None:
    _restore()


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    os.environ["TRITON_INTERPRET"] = "1"
    yield
    _restore()


@pytest.fixture
def tritons_own(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the shortcuts back for the rest of the test."""

    def undo() -> None:
        for name, value in _REPLACED.items():
            owner = interpreter.interpreter_builder if name == "options" else interpreter
            assert getattr(owner, name) is not value
            monkeypatch.setattr(owner, name, value)

    return undo


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (the largest value, if integer): what a kernel leaves unwritten shows.

    `torch.empty` and `torch.empty_like` are patched; a test may not rely on `Tensor.new_empty`.
    """

    def fill(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poison(*args: object, **kwargs: object) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            if out.dtype.is_floating_point:
                return out.fill_(torch.nan)
            return out.fill_(torch.iinfo(out.dtype).max)

        return poison

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
