"""Requests in flight share batches: their sequences are laid together as a batch's tokens allow.

Nothing waits for a timer unless asked: while a batch is computed, what comes is collected for the
next one. A batch is taken by deficit round robin (Shreedhar and Varghese 1995): requests stand in a
ring, and each visit grants one the same number of tokens, so that a request of a thousand texts
delays one of a single text by a batch, and a long text waits in proportion to its length.

Two threads take the steps of requests as they become ready: preparing, computing and finishing may
overlap, but a request that is alone goes through all three in one thread, without a handover.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Condition, Thread
from typing import Any

import torch

from fastbert.errors import FastbertError, RunError
from fastbert.serve.work import Prepared, Work
from fastbert.train.device import is_out_of_memory

logger = logging.getLogger("fastbert.serve")

QUANTUM = 64
"""Tokens that a visit grants a request: a sixteenth of a CPU's batch."""
_CHARACTERS_OF_TOKEN = 4  # about, of text that is not tokenized yet
_MOST_TOKENS = 2**19  # that wait tokenized, which takes 440 bytes each where windows overlap
_SHORT = 16_384  # characters of a request that is tokenized beyond them
_READING = 2.5e-6  # seconds that tokenizing a character takes at most, as of punctuation
_LONGEST_WAIT = 60  # seconds that a client is told to wait at most
_CPU = torch.device("cpu")


class QueueFullError(FastbertError):
    """The queue takes no more.

    Attributes:
        retry_after: seconds until there may be room again, at least 1.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(FastbertError):
    """The service is shutting down."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What a request gets.

    Attributes:
        answers: to its inputs, in order.
        tokens: of all of them, special ones included.
        truncated: texts that were cut.
        waited, computed: seconds from its coming to its first batch, and in batches.
    """

    answers: list[Any]
    tokens: int
    truncated: int
    waited: float
    computed: float


class Job:
    """A request on its way; `future` is of the event loop that submitted it.

    Requests are tokenized in the order of `due`: one of 1 MB as if it had come 2.5 s later, as so
    long those behind it may have to wait.
    """

    __slots__ = (
        *("work", "inputs", "options", "size", "future", "loop", "came", "began", "computed"),
        *("prepared", "next", "credit", "outputs", "missing", "ended", "characters", "due"),
    )

    def __init__(self, work: Work, inputs: Sequence[Any], options: Mapping[str, Any]) -> None:
        self.work, self.inputs, self.options, self.size = work, inputs, options, len(inputs)
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Answered] = self.loop.create_future()
        self.came = time.perf_counter()
        self.characters = _characters(inputs)
        self.due = self.came + _READING * self.characters
        self.began = self.computed = 0.0
        self.prepared: Prepared = Prepared(())
        self.next = self.credit = self.missing = 0
        self.outputs: list[Any] = []
        self.ended = False


class Observer:
    """Is told what happens; all it does is nothing."""

    def batch(self, work: str, sequences: int, tokens: int, fill: float, seconds: float) -> None:
        """A batch was computed, of which `fill` is the share of the tokens allowed."""


class Batcher:
    """Answers requests of any number of clients.

    Args:
        batch_tokens: that are computed at once at most, unless one sequence alone has more.
        max_wait: seconds for which a batch that is not full waits for more.
        max_queue: inputs that may wait or be computed; more are refused.
        observer: is told of batches.
        device: of the model: each thread's kernels are launched on one that it has chosen.
    """

    def __init__(
        self,
        batch_tokens: int,
        *,
        max_wait: float = 0.0,
        max_queue: int = 4096,
        observer: Observer | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self.batch_tokens, self.max_wait, self.max_queue = batch_tokens, max_wait, max_queue
        self.observer, self.device = observer or Observer(), device
        self.inputs = 0
        """That wait or are computed."""
        self.tokens = 0
        """Of them, those that no batch has taken, where it is known."""
        self.broken = False
        """Whether a thread has ended that should not: nothing is answered any more."""
        self._rate = 0.0  # tokens a second
        self._changed = Condition()
        self._new: deque[Job] = deque()
        self._ring: deque[Job] = deque()
        self._done: deque[Job] = deque()
        self._preparing = self._computing = self._closed = False
        self._threads = [Thread(target=self._run, name=f"fastbert-{n}") for n in range(2)]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    # What an event loop calls

    def submit(self, work: Work, inputs: Sequence[Any], options: Mapping[str, Any]) -> Job:
        """Takes a request; `job.future` gets an `Answered`, or what was raised.

        Raises:
            QueueFullError: `max_queue` inputs wait already.
            ClosedError: after `close`.
        """
        job = Job(work, inputs, options)
        with self._changed:
            if self._closed:
                raise ClosedError("the service is shutting down")
            if self.inputs + job.size > self.max_queue:
                raise QueueFullError(self._until_room())
            self.inputs += job.size
            self._new.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Forgets a request that nobody waits for; what is computed of it just now is lost."""
        with self._changed:
            if job.ended:
                return
            self._end(job)
            for queue in (self._new, self._ring, self._done):
                if job in queue:
                    queue.remove(job)
            self.tokens -= _waiting(job)

    def close(self) -> None:
        """Ends the threads once what was submitted is answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _until_room(self) -> int:
        waiting = self.tokens + sum(job.characters for job in self._new) // _CHARACTERS_OF_TOKEN
        seconds = waiting / self._rate if self._rate else 1.0
        return min(max(math.ceil(seconds / 2), 1), _LONGEST_WAIT)  # half of it makes room

    # Threads

    def _run(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        while True:
            with self._changed:
                step = self._step()
                while step is None:
                    if self._closed and not self.inputs:
                        self._changed.notify_all()
                        return
                    self._changed.wait(self._patience())
                    step = self._step()
                if self._new or self._ring or self._done:
                    self._changed.notify()
            try:
                step()
            except BaseException:  # a mistake of ours: requests would wait for ever in silence
                logger.exception("the batcher broke down")
                self.broken = True
                return

    def _step(self) -> Callable[[], None] | None:
        """What is to be done next. Preparing comes first, until a batch is full."""
        full = self.tokens >= self.batch_tokens
        may_prepare = not self._preparing and not (full and not self._computing)
        if may_prepare and (job := self._next_to_prepare()):
            self._preparing = True
            self._new.remove(job)
            return partial(self._prepare, job)
        if self._ring and not self._computing and self._patience() is None:
            self._computing = True
            work, batch = self._take()
            return lambda: self._compute(work, batch)
        if self._done:
            job = self._done.popleft()
            return lambda: self._finish(job)
        return None

    def _next_to_prepare(self) -> Job | None:
        has_room = self.tokens < max(_MOST_TOKENS, 2 * self.batch_tokens)
        jobs = (job for job in self._new if has_room or job.characters <= _SHORT)
        return min(jobs, key=lambda job: job.due, default=None)

    def _patience(self) -> float | None:
        """Seconds for which a batch waits for more; None: for none."""
        if not self._ring or self._closed or not self.max_wait:
            return None
        if self.tokens >= self.batch_tokens:
            return None
        left = min(job.came for job in self._ring) + self.max_wait - time.perf_counter()
        return left if left > 0 else None

    def _prepare(self, job: Job) -> None:
        failed = None
        prepared = job.prepared
        try:
            prepared = job.work.prepare(job.inputs, job.options)
        except BaseException as error:
            failed = _ordinary(error)
        with self._changed:
            self._preparing = False
            if failed is not None:
                self._fail(job, failed)
            if job.ended:
                return
            job.inputs, job.prepared = (), prepared
            job.outputs = [None] * len(prepared.sequences)
            job.missing = len(job.outputs)
            self.tokens += prepared.tokens
            (self._ring if job.missing else self._done).append(job)

    def _take(self) -> tuple[Work, list[tuple[Job, int]]]:
        """Sequences of the next batch, by job and place."""
        work, room = self._ring[0].work, self.batch_tokens
        batch: list[tuple[Job, int]] = []
        passed: deque[Job] = deque()  # of another kind, or with a sequence for which room lacks
        while self._ring and room > 0:
            job = self._ring.popleft()
            if job.work is not work:
                passed.append(job)
                continue
            job.credit += QUANTUM
            sequences, fits = job.prepared.sequences, True
            while (
                job.next < len(sequences) and (length := sequences[job.next].length) <= job.credit
            ):
                fits = length <= room or not batch
                if not fits:
                    break
                batch.append((job, job.next))
                job.next += 1
                job.credit -= length
                room -= length
            if not fits:
                passed.append(job)
            elif job.next < len(sequences):
                self._ring.append(job)
        self._ring.extendleft(reversed(passed))
        self.tokens -= self._tokens(batch)
        now = time.perf_counter()
        for job, _ in batch:
            job.began = job.began or now
        return work, batch

    @staticmethod
    def _tokens(batch: Sequence[tuple[Job, int]]) -> int:
        return sum(job.prepared.sequences[place].length for job, place in batch)

    def _compute(self, work: Work, batch: list[tuple[Job, int]]) -> None:
        began = time.perf_counter()
        tokens = self._tokens(batch)
        outputs = self._outputs(work, batch)
        seconds = time.perf_counter() - began
        self.observer.batch(work.name, len(batch), tokens, tokens / self.batch_tokens, seconds)
        with self._changed:
            self._computing = False
            rate = tokens / max(seconds, 1e-9)
            self._rate += (rate - self._rate) / (4 if self._rate else 1)
            for (job, place), output in zip(batch, outputs, strict=True):
                if job.ended:
                    continue
                if isinstance(output, Exception):
                    self._fail(job, output)
                    continue
                job.outputs[place] = output
                job.computed += seconds / len(batch)
                job.missing -= 1
                if not job.missing:
                    self._done.append(job)

    def _outputs(self, work: Work, batch: Sequence[tuple[Job, int]]) -> list[Any]:
        """Of each sequence its output, or why it has none: halves, until the guilty is alone."""
        try:
            return work.compute([job.prepared.sequences[place] for job, place in batch])
        except BaseException as error:
            short = is_out_of_memory(error)
            if short and self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(batch) == 1:
                failed = _ordinary(error)
                if short:
                    failed = RunError(f"out of memory with {self._tokens(batch)} tokens at once")
                return [failed]
        if short:
            self.batch_tokens = max(self._tokens(batch) // 2, 1)
            logger.warning("out of memory: going on with %d tokens at once", self.batch_tokens)
        half = len(batch) // 2
        return self._outputs(work, batch[:half]) + self._outputs(work, batch[half:])

    def _finish(self, job: Job) -> None:
        try:
            answers = job.work.finish(job.prepared, job.outputs)
        except BaseException as error:
            with self._changed:
                self._fail(job, _ordinary(error))
            return
        prepared = job.prepared
        waited = (job.began or job.came) - job.came
        answered = Answered(answers, prepared.tokens, prepared.truncated, waited, job.computed)
        with self._changed:
            if not job.ended:
                self._end(job)
                _post(job, answered)

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.ended:
            self._end(job)
            if job in self._ring:
                self._ring.remove(job)
            self.tokens -= _waiting(job)
            _post(job, error)

    def _end(self, job: Job) -> None:
        job.ended = True
        self.inputs -= job.size


def _ordinary(error: BaseException) -> Exception:
    # A panic of Rust (tokenizers) is no Exception, and a future takes no StopIteration.
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RunError(f"failed: {type(error).__name__}")


def _waiting(job: Job) -> int:
    """Tokens that no batch has taken."""
    return sum(one.length for one in job.prepared.sequences[job.next :])


def _characters(inputs: Any) -> int:
    if isinstance(inputs, str):
        return len(inputs)
    if isinstance(inputs, Mapping):
        inputs = inputs.values()
    elif not isinstance(inputs, Sequence):
        return 0
    return sum(map(_characters, inputs))


def _post(job: Job, found: Answered | Exception) -> None:
    with suppress(RuntimeError):  # its loop was closed: nobody waits
        job.loop.call_soon_threadsafe(_give, job.future, found)


def _give(future: "asyncio.Future[Answered]", found: Answered | Exception) -> None:
    if future.done():
        return
    if isinstance(found, Exception):
        future.set_exception(found)
    else:
        future.set_result(found)
