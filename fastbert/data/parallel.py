"""A function mapped over items by worker processes, its results in the order of the items.

Workers are plain subprocesses of the interpreter: unlike those of `multiprocessing` they do not run
the user's main module again, and unlike those of its pools they end when their owner is killed.
"""

import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from fastbert.errors import RunError

MAX_WORKERS = 32
"""Beyond these the owner, which joins the results, is the slower."""
IN_FLIGHT = 2
"""Items that a worker has at most: one in work, one that waits."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_CODE = """import sys
sys.path[:] = {path!r}
from fastbert.data.parallel import _serve
_serve({fd})"""
_BLOCKED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def available_cores() -> int:
    """Returns the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Iterator[_Result]:
    """Yields `function` of each item, in order; what comes does not depend on `workers`.

    Args:
        function: of the top level of a module, as `pickle` wants it, or a partial of one.
        items: taken as they are needed, at most `IN_FLIGHT` for each worker ahead.
        workers: processes; 0 calls the function here.

    Raises:
        RunError: a worker cannot be started, or died.
        Exception: what `function` raised.
    """
    if not workers:
        yield from map(function, items)
        return
    pool: list[_Worker] = []
    waiting: deque[_Worker] = deque()
    try:
        for index, item in enumerate(items):
            if len(pool) < workers:
                pool.append(_Worker())
            if len(waiting) == IN_FLIGHT * workers:
                yield waiting.popleft().receive()
            worker = pool[index % workers]
            worker.send((function, item))
            waiting.append(worker)
        while waiting:
            yield waiting.popleft().receive()
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        code = _CODE.format(path=sys.path, fd=theirs.fileno())
        # Ctrl-C goes to the whole group but is for the owner alone: a mask is inherited.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        except OSError as error:
            self._connection.close()
            raise RunError(f"a worker cannot be started ({error.strerror or error})") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()  # or its death would not close the pipe

    def send(self, work: tuple[Callable[[Any], Any], Any]) -> None:
        """Hands over a function and an item. A worker always reads, so it never waits for work."""
        try:
            self._connection.send(work)
        except OSError:
            raise self._died() from None

    def receive(self) -> Any:
        try:
            done, result = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if not done:
            raise result
        return result

    def _died(self) -> RunError:
        code = self._process.wait()
        fate = f"ended with exit code {code}"
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            fate = f"was ended by {_signal_name(-code)}{hint}"
        return RunError(f"a worker that reads the data {fate}; start again")

    def end(self) -> None:
        self._process.kill()  # it owns nothing that a kill would leave behind
        self._process.wait()
        self._connection.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _serve(fd: int) -> None:
    """A worker's life: it ends with its owner."""
    gc.disable()  # sentences by the million, and no cycles among them
    connection = Connection(fd)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def fetch() -> None:
        with suppress(EOFError, OSError):
            while True:
                inbox.put(connection.recv_bytes())
        inbox.put(b"")

    threading.Thread(target=fetch, daemon=True).start()
    with suppress(ConnectionError):
        while message := inbox.get():
            connection.send(_answer(message))


def _answer(message: bytes) -> tuple[bool, Any]:
    """Returns (True, result) or (False, the exception)."""
    try:
        function, item = pickle.loads(message)
        return True, function(item)
    except Exception as error:
        return False, _portable(error)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RunError(f"a worker that reads the data failed: {type(error).__name__}: {error}")
    return error
