"""Batches made in the background: worker processes pack and mask, a side stream copies to the GPU.

T tokens packed, N sequences packed, M masked tokens. Every worker plans all batches, which decides
the stream, but makes only every W-th, so that W changes nothing but the speed. Measured on an AMD
EPYC core at T = 65,536, planning takes 1.6 of a batch's 4.7 ms at length 512, 3.6 of 6.9 at 128.
"""

import ctypes
import json
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch

from fastbert.data.batch import Batch
from fastbert.data.pack import Packer
from fastbert.data.shards import Shards
from fastbert.errors import RunError

PATIENCE = 300
"""Seconds without a batch after which a worker counts as stuck; a batch takes milliseconds."""

_HINTS = {
    signal.SIGKILL: " (out of memory?)",
    signal.SIGBUS: " (a data file cut short, or no room for shared memory?)",
}
_WITHOUT = "go on without workers: --resume auto --dataloader-num-workers 0"
# A fork of ours would copy locks that threads of OpenMP or CUDA hold; one of a process that has
# imported and no more copies none, and is there at once.
_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])
# A packer goes to the workers without its tokens, which each maps for itself.
ForkingPickler.register(Shards, lambda shards: (Shards.open, (shards.folder, shards.split)))

_Made = tuple[int, int, int, bytes]
"""A batch's max_seqlen, num_tokens and num_sequences, and the position after it."""


class _Stream:
    """What a source of batches tells beside them, whoever makes them.

    Attributes:
        T, N, M: the constant shapes of the batches.
        notes: what the user should know of how the data is used.
    """

    T: int
    N: int
    M: int
    notes: list[str]

    def __init__(self, source: "Packer | _Stream") -> None:
        self.T, self.N, self.M = source.T, source.N, source.M
        self.notes = source.notes

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def position(self) -> bytes:
        """The state as JSON, cheap to keep for every batch."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Returns the packer's state after the batch last handed out, those ahead not counted."""
        state: dict[str, Any] = json.loads(self.position)
        return state

    @property
    def fill(self) -> float:
        """Share of the tokens handed out so far that are not [PAD]; 1 before the first batch."""
        state = self.state_dict()
        return state["real_tokens"] / state["room"] if state["room"] else 1.0


class BatchLoader(_Stream):
    """Iterator over a packer's batches, made by worker processes ahead of their use.

    The batches are the packer's own, bit for bit, whatever the number of workers, and a resume may
    change that number. They are copied out of shared memory (0.5 ms at T = 65,536), so they stay
    valid for as long as they are kept. An error comes where the packer itself would have raised it.
    After an error, `next` starts anew behind the batch last handed out.
    """

    def __init__(self, packer: Packer, num_workers: int = 0, prefetch_factor: int = 2) -> None:
        """Takes over a packer, which nobody else may advance from now on.

        Args:
            packer: over shards that lie on disk, if there are workers.
            num_workers: processes; 0 makes each batch when it is asked for, in the caller's thread.
            prefetch_factor: batches that each worker has ready at most.
        """
        super().__init__(packer)
        self._packer = packer
        self._num_workers = num_workers
        self._prefetch_factor = prefetch_factor
        self._workers: list[_Worker] = []
        self._position = b""  # of the workers' batch last handed out
        self._index = 0  # of the workers' next batch

    def start(self) -> None:
        """Starts the workers; `next` does it where nobody did. The first ones take some 2 s."""
        if self._workers or not self._num_workers:
            return
        self._packer.load_state_dict(self.state_dict())
        self._position, self._index = self.position, self._packer.batch_index
        packer = bytes(ForkingPickler.dumps(self._packer))
        record = _record(self.T, self.N, self.M)
        # A signal to the process group, as Ctrl-C sends it, is for the caller alone: a mask is
        # inherited. The tracker's start lifts that of the two signals which it ignores.
        ours = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
        try:
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, ours)
            with _without_main():
                for number in range(self._num_workers):
                    turn = (number, self._num_workers)
                    self._workers.append(_Worker(packer, turn, record, self._prefetch_factor))
        except OSError as error:
            self.close()
            raise RunError(
                f"data workers cannot be started ({error.strerror or error}); {_WITHOUT}"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __next__(self) -> Batch:
        if not self._num_workers:
            return next(self._packer)
        self.start()
        try:
            batch, self._position = self._worker.receive(self._index)
        except Exception:
            self.close()
            raise
        self._index += 1
        return batch

    @property
    def _worker(self) -> "_Worker":
        return self._workers[self._index % self._num_workers]

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, for who wants to watch them."""
        return [worker.pid for worker in self._workers]

    def ready(self) -> bool:
        """Whether `next` would return, or raise, without waiting for a worker."""
        return not self._workers or self._worker.connection.poll()

    @property
    def position(self) -> bytes:
        return self._position or json.dumps(self._packer.state_dict()).encode()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, which may come from any number of workers or from a packer.

        Raises:
            UserError: it belongs to other data or other shapes.
        """
        self.close()
        self._packer.load_state_dict(state)
        self._position = b""

    def close(self) -> None:
        """Ends the workers. The position stays, and `next` would go on from it."""
        for worker in self._workers:
            worker.end()
        self._workers = []


class DevicePrefetcher(_Stream):
    """Iterator over a loader's batches, copied to the device up to `depth` batches ahead.

    On a GPU the copies run on a stream of their own beside the step. Both memories come from
    PyTorch's caching allocators, which do not hand them out again before the copy has read the
    pinned one (an event that every non-blocking copy leaves) and the consumer's stream has passed
    the end of the device's one (`record_stream`). So a batch stays valid for as long as it is kept.
    On a CPU the batches are the loader's own.
    """

    def __init__(self, loader: BatchLoader, device: torch.device | str, depth: int = 2) -> None:
        """Takes over a loader.

        Args:
            loader: of batches on the CPU.
            device: where the batches go.
            depth: batches that are on the device beside the one handed out, at most.
        """
        super().__init__(loader)
        self._loader = loader
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._depth = depth
        self._ahead: deque[tuple[Batch, bytes, torch.cuda.Event | None]] = deque()
        self._error: Exception | None = None  # comes after the batches ahead
        self._position = loader.position

    def start(self) -> None:
        """Starts the loader's workers."""
        self._loader.start()

    def __next__(self) -> Batch:
        """Returns the next batch, to be used on the stream that is current now."""
        if not self._ahead:
            self._fetch()
        if not self._ahead:
            assert self._error is not None
            raise self._error
        batch, self._position, copied = self._ahead.popleft()
        while len(self._ahead) < self._depth and self._error is None and self._loader.ready():
            self._fetch()
        if copied is not None:
            consumer = torch.cuda.current_stream(self._device)
            consumer.wait_event(copied)
            for _, tensor in batch.tensors():
                tensor.record_stream(consumer)
        return batch

    def _fetch(self) -> None:
        if self._error is not None:
            return
        try:
            batch = next(self._loader)
        except Exception as error:
            self._error = error
            return
        copied = None
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                batch = batch.pin_memory().to(self._device, non_blocking=True)
                copied = self._stream.record_event()
        self._ahead.append((batch, self._loader.position, copied))

    @property
    def position(self) -> bytes:
        return self._position

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, as `BatchLoader.load_state_dict` does."""
        self._loader.load_state_dict(state)
        self._ahead.clear()
        self._error = None
        self._position = self._loader.position

    def close(self) -> None:
        """Drops what is ahead and ends the workers. `next` would go on from the position."""
        self.load_state_dict(self.state_dict())


class _Worker:
    """A process that makes every W-th batch, as its owner sees it."""

    def __init__(
        self,
        packer: bytes,
        turn: tuple[int, int],  # number, W
        record: np.dtype[Any],
        prefetch_factor: int,
    ) -> None:
        # Memory without a name: the file behind it is unlinked before anybody uses it, so nothing
        # stays in /dev/shm however the processes end.
        memory: Any = _FORKS.RawArray(ctypes.c_byte, prefetch_factor * record.itemsize)
        self.connection, theirs = _FORKS.Pipe()
        self._process = _FORKS.Process(
            target=_work,
            args=(theirs, memory, record, packer, turn, prefetch_factor),
            name=f"fastbert-data-{turn[0]}",
            daemon=True,
        )
        self._process.start()
        theirs.close()  # or its death would not close the pipe
        self._name = f"data worker {turn[0] + 1} of {turn[1]}"
        self._slots = np.frombuffer(memory, record)
        self._received = 0
        self.end = Finalize(self, _end, (self._process, self.connection), exitpriority=0)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def receive(self, index: int) -> tuple[Batch, bytes]:
        """Returns its next batch, number `index` of the stream, and the position after it."""
        if not wait([self.connection, self._process.sentinel], PATIENCE):
            raise RunError(f"{self._name} is stuck at batch {index}; {_WITHOUT}")
        try:
            message: _Made | Exception = self.connection.recv()
        except (EOFError, OSError):
            raise RunError(f"{self._name} {self._fate()} at batch {index}; {_WITHOUT}") from None
        if isinstance(message, Exception):
            raise message
        max_seqlen, num_tokens, num_sequences, position = message
        slots, slot = self._slots, self._received % len(self._slots)
        tensors: dict[str, Any] = {
            name: torch.from_numpy(slots[name][slot].copy()) for name in slots.dtype.names or ()
        }
        self._received += 1
        with suppress(OSError):  # it is dead: told when its next batch is due
            self.connection.send_bytes(b"free")
        batch = Batch(
            **tensors, max_seqlen=max_seqlen, num_tokens=num_tokens, num_sequences=num_sequences
        )
        return batch, position

    def _fate(self) -> str:
        self._process.join()
        code = self._process.exitcode
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        number = signal.Signals(-code)
        return f"was ended by {number.name}{_HINTS.get(number, '')}"


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes spawned inside do not run the user's script again, of which they need nothing.

    Else one without `if __name__ == "__main__":` would begin another run in each worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end(process: Any, connection: Connection) -> None:
    process.kill()  # it owns nothing that a kill would leave behind
    process.join()
    connection.close()


def _record(T: int, N: int, M: int) -> np.dtype[Any]:
    """Returns a batch's tensors one after another, as they lie in shared memory."""
    lengths = {
        "input_ids": T,
        "token_type_ids": T,
        "position_ids": T,
        "cu_seqlens": N + 1,
        "masked_positions": M,
        "masked_labels": M,
        "next_sentence_labels": N,
    }
    dtypes = {"cu_seqlens": np.int32}
    return np.dtype([(name, dtypes.get(name, np.int64), (n,)) for name, n in lengths.items()], True)


def _work(
    connection: Connection,
    memory: Any,
    record: np.dtype[Any],
    pickled_packer: bytes,
    turn: tuple[int, int],  # number, W
    prefetch_factor: int,
) -> None:
    """A worker's life: it ends with the data, with an error, or with its owner."""
    try:
        slots = np.frombuffer(memory, record)
        packer: Packer = pickle.loads(pickled_packer)
        for made, batch in enumerate(_every(packer, *turn)):
            if made >= prefetch_factor:
                connection.recv_bytes()  # the batch in this slot has been copied out
            for name, tensor in batch.tensors():
                slots[name][made % prefetch_factor] = tensor.numpy()
            position = json.dumps(packer.state_dict()).encode()
            connection.send((batch.max_seqlen, batch.num_tokens, batch.num_sequences, position))
        connection.send(StopIteration())
    except (EOFError, ConnectionError):  # the owner is gone
        return
    except Exception as error:
        with suppress(ConnectionError):
            connection.send(_portable(error))


def _every(packer: Packer, number: int, W: int) -> Iterator[Batch]:
    """Yields the batches whose index is `number` modulo W, and only plans the others."""
    for index in count(packer.batch_index):
        if index % W == number:
            batch = next(packer, None)
            if batch is None:
                return
            yield batch
        elif not packer.skip():
            return


def _portable(error: Exception) -> Exception:
    """Returns the error, or its text where it cannot be pickled, with the traceback as a note."""
    trace = traceback.format_exc()
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RunError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a data worker:\n{trace}")
    return error
