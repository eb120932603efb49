"""What SIGINT (Ctrl-C), SIGTERM (a scheduler) and SIGHUP (a closed terminal) do to a command.

The first one is raised as `Interrupted`, so that everything cleans up behind itself, or, where a
run can save itself, noted. Those after it change nothing for a while: no cleaning up is torn by
them, and none ends in a traceback. One that comes later still ends the process at once. Signals
that were ignored when the command began, as nohup ignores SIGHUP, stay so. Signals are the main
thread's: in any other, everything here does nothing. Standard library only.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE = 5
"""Seconds after the first signal in which the next ones wait for the cleaning up."""


TOGETHER = 1
"""Seconds in which signals are one request: a closing session sends SIGHUP and SIGTERM."""


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command.

    Attributes:
        name: "SIGTERM" or the like.
        exit_code: what a shell reports of a process that the signal ended.
    """

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number
        super().__init__(self.name)


class _Signals:
    """The process's one state: handlers belong to processes."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.raised_at: float | None = None
        self.noted: list[str] | None = None  # a list where the first signal is to be noted
        self.noted_at = 0.0
        self.number = 0  # of the first signal that was raised, or is to be
        self.holding = False
        self.terminals: list[int] = []
        self.hook: Callable[[Any], Any] = sys.__unraisablehook__

    def handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self.let_go_of_terminals()
        if self.noted is not None and not self.noted:
            self.noted.append(signal.Signals(number).name)
            self.noted_at = time.monotonic()
        elif self.raised_at is None:
            if self.noted and time.monotonic() - self.noted_at < TOGETHER:
                return
            self.raised_at, self.number = time.monotonic(), number
            if not self.holding:
                raise Interrupted(number)
        elif time.monotonic() - self.raised_at > PATIENCE:
            with suppress(OSError):
                os.write(
                    2, f"\nfastbert: ended at once by {signal.Signals(number).name}\n".encode()
                )
            os._exit(128 + number)

    def let_go_of_terminals(self) -> None:
        """What is still said must not fail on a terminal that was closed."""
        for descriptor in self.terminals:
            if not os.isatty(descriptor):
                with suppress(OSError):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, descriptor)
                    os.close(null)

    def unraisable(self, unraisable: Any) -> None:
        """An interrupt inside a destructor or callback is lost there: it comes again."""
        if issubclass(unraisable.exc_type, Interrupted):
            again = threading.Timer(0.01, self.again)  # not here, where it would be lost as well
            again.daemon = True
            again.start()
        else:
            self.hook(unraisable)

    def again(self) -> None:
        number, self.raised_at, self.number = self.number, None, 0
        if self.before and number:
            # To the thread itself, which may sleep.
            signal.pthread_kill(threading.main_thread().ident or 0, number)


_signals = _Signals()


def _handled_elsewhere() -> bool:
    """Whether this is not the main thread, to which alone Python delivers signals."""
    return threading.current_thread() is not threading.main_thread()


@contextmanager
def interruptible(*, last: bool = False) -> Iterator[None]:
    """Raises the first signal that comes inside as `Interrupted`.

    Outside the main thread, and inside another of these, it does nothing: whoever is there handles
    them.

    Args:
        last: the process ends right after: signals that come then are ignored, rather than met by
            Python's own handler amid its exit.
    """
    state = _signals
    if state.before or _handled_elsewhere():
        yield
        return
    state.raised_at, state.noted, state.number = None, None, 0
    state.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    state.hook, sys.unraisablehook = sys.unraisablehook, state.unraisable
    try:
        for number in SIGNALS:
            found = signal.getsignal(number)
            if found is not signal.SIG_IGN:
                state.before[number] = signal.signal(number, state.handle)
        yield
    finally:
        if state.raised_at is None:
            state.raised_at = time.monotonic()  # none may tear this
        for handled, old in state.before.items():
            signal.signal(handled, signal.SIG_IGN if last else old)
        state.before = {}
        sys.unraisablehook = state.hook


def raise_lost() -> None:
    """Raises once more what was raised before, where it has not ended the command.

    Raises:
        Interrupted: a signal came.
    """
    if _signals.before and _signals.number and not _handled_elsewhere():
        raise Interrupted(_signals.number)


@contextmanager
def held_signals() -> Iterator[None]:
    """Raises a signal that comes inside at its end: for what must be done whole or not at all.

    Imports are so: libraries catch more than they should amid them, and go on without half of it.
    """
    if _handled_elsewhere():
        yield
        return
    with interruptible():
        before, _signals.holding = _signals.holding, True
        try:
            yield
        finally:
            _signals.holding = before
        if not before:
            raise_lost()


@contextmanager
def noting_signals() -> Iterator[Callable[[], str]]:
    """Yields a function that names the first signal received inside; a later one is raised.

    Raises:
        Interrupted: one was raised before and somebody has caught it, as a library's import may.
    """
    if _handled_elsewhere():
        yield lambda: ""
        return
    with interruptible():
        raise_lost()
        noted: list[str] = []
        _signals.noted = noted
        try:
            yield lambda: noted[0] if noted else ""
        finally:
            _signals.noted = None
