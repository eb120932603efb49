"""Shared fixtures: nothing reaches for a hub, and every test starts from the same random state."""

import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# A shell that runs the tests in the background has them ignore Ctrl-C, and their processes as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# More than 20 s of CPU time each, the longest first: two workers that take file by file end
# together.
LONGEST = (
    *("bench/gpu/test_main.py", "bench/suites/test_step.py", "data/test_workers.py"),
    *("train/test_resume.py", "bench/report/test_report.py", "kernels/test_attention.py"),
    *("train/test_recipes.py", "test_fuzz.py", "data/test_pack.py"),
    *("bench/test_benchmarks.py", "data/test_tokenizer_export.py", "test_bad_data.py"),
    *("bench/estimate/test_launches.py", "kernels/test_cpu.py", "bench/gpu/test_step.py"),
    *("bench/profile/test_profile.py", "kernels/test_properties.py", "test_bad_input.py"),
    *("bench/suites/test_kernels.py", "bench/test_host_packages.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    rank = {tests / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in rank)
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """What imports and collection have made stays: the collector need not look at it again.

    That is a tenth of the time of a kernel in Triton's interpreter, which makes many objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no loss.png, which takes a quarter of a small one; test_loop.py looks at it."""
    monkeypatch.setattr("fastbert.train.report.draw_loss", lambda run: run / "loss.png")
