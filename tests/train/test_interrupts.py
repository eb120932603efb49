"""Signals to the process itself, at any moment: one line, a documented exit code, nothing torn."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fastbert.train import interrupts
from fastbert.train.interrupts import (
    SIGNALS,
    Interrupted,
    held_signals,
    interruptible,
    noting_signals,
    raise_lost,
)
from fastbert.train.report import read_metrics

ROOT = Path(__file__).parent.parent.parent


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.001)  # until the handler has run


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_the_first_is_raised_and_the_next_tear_nothing(
    number: signal.Signals, exit_code: int
) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    cleaned = False

    @interruptible()
    def work() -> None:
        nonlocal cleaned
        try:
            send(number)
        finally:
            send(*SIGNALS)
            cleaned = True

    with pytest.raises(Interrupted) as raised:
        work()
    assert cleaned
    assert (raised.value.name, raised.value.exit_code) == (number.name, exit_code)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_one_that_comes_later_still_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)

    @interruptible()
    def work() -> None:
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            assert ended == []
            monkeypatch.setattr(interrupts, "PATIENCE", 0)
            send(signal.SIGINT)

    with pytest.raises(Interrupted):
        work()
    assert ended == [130]
    assert capfd.readouterr().err == "\nfastbert: ended at once by SIGINT\n"


def test_noted_where_a_run_saves_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with noting_signals() as stop:
        assert stop() == ""
        send(signal.SIGTERM)
        assert stop() == "SIGTERM"
        send(signal.SIGHUP, signal.SIGTERM)  # with the first: one request
        monkeypatch.setattr(interrupts, "TOGETHER", 0)
        with pytest.raises(Interrupted, match="SIGHUP"):
            send(signal.SIGHUP)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with noting_signals() as stop:
            send(signal.SIGHUP)
            assert stop() == ""
        with interruptible():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_exit_after_the_last_line_is_quiet() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with interruptible(last=True):
            pass
        send(*SIGNALS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_import_is_not_torn() -> None:
    imported = False

    @held_signals()
    def work() -> None:
        nonlocal imported
        send(signal.SIGTERM, signal.SIGINT)
        imported = True

    with pytest.raises(Interrupted, match="SIGTERM"):
        work()
    assert imported


def test_one_that_somebody_has_caught_is_raised_again() -> None:
    with interruptible():
        with suppress(BaseException):
            send(signal.SIGTERM)
        for again in (raise_lost, noting_signals().__enter__):
            with pytest.raises(Interrupted, match="SIGTERM"):
                again()
    raise_lost()  # outside, there is none


def test_one_that_a_destructor_swallows_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Slow:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    @interruptible()
    def work() -> None:
        slow = Slow()
        del slow
        time.sleep(5)

    with pytest.raises(Interrupted, match="SIGTERM"):
        work()
    assert capsys.readouterr().err == ""


def test_outside_the_main_thread_nothing_is_touched() -> None:
    import threading

    found: list[Any] = []

    def work() -> None:
        with interruptible(), held_signals(), noting_signals() as stop:
            raise_lost()
            found.append((stop(), sys.unraisablehook, interrupts._signals.holding))

    def in_a_thread() -> Any:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found.pop()

    before = [signal.getsignal(number) for number in SIGNALS]
    hook = sys.unraisablehook
    assert in_a_thread() == ("", hook, False)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with noting_signals() as stop:  # nor what the main thread does meanwhile
        send(signal.SIGTERM)
        assert in_a_thread() == ("", sys.unraisablehook, False)
        assert stop() == "SIGTERM"


# As a user meets it


@contextmanager
def command(*argv: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(
        [sys.executable, "-m", "fastbert", "pretrain", *argv],
        env=env,
        text=True,
        start_new_session=True,  # a process group of its own, with the data workers in it
        **streams,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def test_three_signals_while_preparing(settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "a/run"
    with command(*settings, "--out", str(run)) as process:
        wait_for(run / "run.lock", process)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.killpg(process.pid, number)
            time.sleep(0.01)
        _, shown = process.communicate(timeout=60)
    lines = {  # Python meets those that have come together in the order of their numbers
        129: "fastbert: interrupted by SIGHUP",
        130: "fastbert: interrupted",
        143: "fastbert: interrupted by SIGTERM",
    }
    assert shown.splitlines()[-1] == lines[process.returncode]
    assert "Traceback" not in shown and "Exception ignored" not in shown
    assert not (tmp_path / "a").exists()


def test_a_terminal_that_is_closed(settings: list[str], tmp_path: Path) -> None:
    """The whole group gets SIGHUP, a data worker as well, and nothing can be said any more."""
    run = tmp_path / "run"
    ours, theirs = pty.openpty()
    workers = ("--dataloader-num-workers", "1", "--max-steps", "100000")
    argv = (*settings, *workers, "--out", str(run))
    with command(*argv, stdout=theirs, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        wait_for(run / "checkpoints/step-000005", process)
        os.close(ours)
        os.killpg(process.pid, signal.SIGHUP)
        process.wait(timeout=60)
    assert process.returncode == 1
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()]
    assert max(steps) == read_metrics(run / "metrics.jsonl")[-1]["step"]  # it was stopped there
    assert not (run / "run.lock").exists() and not list((run / "checkpoints").glob(".*"))
