"""Results in order, errors as they were raised, and no process that outlives its owner."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastbert.data.parallel import ordered_map
from fastbert.errors import RunError, UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    items = ["x" * length for length in (300_000, 3, 0, 500_000, 1, 2, 900_000, 7)]
    assert list(ordered_map(len, items, workers)) == [len(item) for item in items]
    assert list(ordered_map(len, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_are_those_of_the_function(workers: int) -> None:
    results = ordered_map(int, ["1", "2", "x", "4"], workers)
    assert (next(results), next(results)) == (1, 2)
    with pytest.raises(ValueError, match="invalid literal for int"):
        next(results)


def test_errors_of_the_items_end_the_workers() -> None:
    def items() -> Iterator[str]:
        yield from "123"
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        list(ordered_map(int, items(), 2))


def test_a_worker_that_is_killed() -> None:
    results = ordered_map(signal.raise_signal, [signal.SIGKILL], 1)
    with pytest.raises(RunError, match=r"was ended by SIGKILL \(out of memory\?\); start again"):
        list(results)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


OWNER = """
from itertools import islice, repeat
from time import sleep
from fastbert.data.parallel import ordered_map
pids = ordered_map(eval, repeat("__import__('os').getpid()"), 2)
try:
    print(*islice(pids, 2), flush=True)
    for _ in pids:
        sleep(0.01)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_owner_and_say_nothing(number: signal.Signals) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2
    if number == signal.SIGINT:
        os.killpg(owner.pid, number)  # as a terminal does
    else:
        owner.kill()
    assert owner.communicate(timeout=30)[1] == ""
    assert owner.returncode == (0 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))
