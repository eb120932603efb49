"""How requests share batches: tokens, fairness, waiting, failures, and the end."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastbert.errors import RunError, UserError
from fastbert.serve.batcher import Batcher, ClosedError, Observer, QueueFullError
from fastbert.serve.work import Prepared, Work


@dataclass(frozen=True)
class Text:
    length: int
    name: Any


class Fake(Work):
    """Inputs are (name, length); the output of each is its name. A batch waits for the gate."""

    name = "fake"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[Any]] = []
        self.started = threading.Event()
        self.computed: Callable[[list[Any]], None] = lambda names: None

    def prepare(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> Prepared:
        if options.get("refuse"):
            raise UserError("inputs[0]: cannot be read")
        return Prepared([Text(length, name) for name, length in inputs], 0, options)

    def compute(self, sequences: Sequence[Any]) -> list[Any]:
        names = [one.name for one in sequences]
        self.batches.append(names)
        self.started.set()
        assert self.gate.wait(10)
        self.computed(names)
        return names

    def finish(self, prepared: Prepared, outputs: Sequence[Any]) -> list[Any]:
        if prepared.context.get("unfinished"):
            raise ValueError("no answer")
        return list(outputs)


class Seen(Observer):
    def __init__(self) -> None:
        self.batches: list[tuple[int, int, float]] = []

    def batch(self, work: str, sequences: int, tokens: int, fill: float, seconds: float) -> None:
        self.batches.append((sequences, tokens, fill))


def answered(play: Callable[[Batcher, Fake], Awaitable[Any]], **options: Any) -> tuple[Any, Fake]:
    """What a play on an event loop returns, and the fake that it played with."""
    fake = Fake()

    async def main() -> Any:
        batcher = Batcher(options.pop("batch_tokens", 100), **options)
        try:
            return await asyncio.wait_for(play(batcher, fake), 20)
        finally:
            fake.gate.set()
            await asyncio.to_thread(batcher.close)
            assert batcher.inputs == batcher.tokens == 0
            assert not batcher.broken

    return asyncio.run(main()), fake


async def held(batcher: Batcher, fake: Fake, *requests: Sequence[Any]) -> list[Any]:
    """Jobs of requests that came while a batch was computed: the next batches hold them."""
    fake.gate.clear()
    first = batcher.submit(fake, [("first", 1)], {})
    await asyncio.to_thread(fake.started.wait, 10)
    jobs = [batcher.submit(fake, request, {}) for request in requests]
    while batcher.tokens < sum(length for request in requests for _, length in request):
        await asyncio.sleep(0.001)
    fake.gate.set()
    await asyncio.gather(*(job.future for job in [first, *jobs]))
    return jobs


def test_answers_come_in_the_order_of_a_requests_inputs() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        inputs = [(f"{n}", 1 + n % 37) for n in range(200)]
        found = await batcher.submit(fake, inputs, {}).future
        return found, inputs

    (found, inputs), fake = answered(play)
    assert found.answers == [name for name, _ in inputs]
    assert found.tokens == sum(length for _, length in inputs)
    assert len(fake.batches) > 20


def test_what_comes_during_a_batch_is_the_next_one() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        await held(batcher, fake, *([(f"{n}", 10)] for n in range(10)))

    _, fake = answered(play)
    assert fake.batches == [["first"], [f"{n}" for n in range(10)]]


def test_no_batch_has_more_tokens_than_allowed_unless_a_sequence_has() -> None:
    seen = Seen()

    async def play(batcher: Batcher, fake: Fake) -> Any:
        lengths = [1, 60, 41, 99, 100, 250, 7, 93, 30, 30, 30, 30]
        await held(batcher, fake, *([(place, length)] for place, length in enumerate(lengths)))
        return lengths

    lengths, fake = answered(play, observer=seen)
    for batch in fake.batches[1:]:
        assert sum(lengths[place] for place in batch) <= 100 or batch == [5]
    assert sorted(place for batch in fake.batches[1:] for place in batch) == list(range(12))
    assert seen.batches[0][1] == 1
    assert all(fill == tokens / 100 for _, tokens, fill in seen.batches)


def test_a_large_request_does_not_delay_a_small_one() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        large = [(f"large {n}", 10) for n in range(300)]
        await held(batcher, fake, large, [("small", 10)], [("long", 90)])

    _, fake = answered(play)
    where = {name: number for number, batch in enumerate(fake.batches) for name in batch}
    assert where["small"] == 1  # with the large one's first texts
    assert where["long"] <= 3
    assert where["large 299"] == len(fake.batches) - 1


def test_a_huge_text_is_read_after_short_ones_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, read = threading.Event(), []
    prepare = Fake.prepare

    def slowly(self: Fake, inputs: Sequence[Any], options: Mapping[str, Any]) -> Prepared:
        assert free.wait(10)
        read.append(inputs[0][0][0])
        return prepare(self, inputs, options)

    async def play(batcher: Batcher, fake: Fake) -> None:
        monkeypatch.setattr(Fake, "prepare", slowly)
        jobs = [batcher.submit(fake, [(name, 1)], {}) for name in ("a", "b" * 1_000_000, "c")]
        await asyncio.sleep(0.3)
        jobs += [batcher.submit(fake, [(name, 1)], {}) for name in ("d" * 1_000_000, "e")]
        jobs[1].due -= 2.5  # as after so long
        free.set()
        await asyncio.gather(*(job.future for job in jobs))

    answered(play)
    assert read == ["a", "b", "c", "e", "d"]


def test_only_short_requests_are_tokenized_beyond_what_memory_may_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastbert.serve.batcher._MOST_TOKENS", 300)
    most = 0

    async def play(batcher: Batcher, fake: Fake) -> list[Any]:
        nonlocal most
        fake.gate.clear()
        jobs = [batcher.submit(fake, [("a" * 20_000, 200)], {}) for _ in range(9)]
        await asyncio.to_thread(fake.started.wait, 10)
        short = batcher.submit(fake, [("b", 1)], {})
        limit = time.monotonic() + 10
        while not short.prepared.sequences and time.monotonic() < limit:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        most = batcher.tokens
        fake.gate.set()
        return await asyncio.gather(*(job.future for job in [*jobs, short]))

    found, _ = answered(play)
    assert len(found) == 10
    assert 400 <= most <= 401  # two long ones, and the short one if it is not computed yet


def test_short_and_long_requests_get_the_same_tokens() -> None:
    served = {"short": 0, "long": 0}

    async def play(batcher: Batcher, fake: Fake) -> Any:
        short = [("short", 5) for _ in range(200)]
        long = [("long", 50) for _ in range(20)]
        await held(batcher, fake, short, long)

    _, fake = answered(play)
    for batch in fake.batches[1:9]:  # both wait all the while
        for name in batch:
            served[name] += {"short": 5, "long": 50}[name]
        assert abs(served["short"] - served["long"]) <= 200  # what two batches hold


def test_two_kinds_of_work_take_turns() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        other = Fake()
        fake.gate.clear()
        jobs = [batcher.submit(fake, [("first", 1)], {})]
        await asyncio.to_thread(fake.started.wait, 10)
        for number in range(3):
            jobs.append(batcher.submit(other, [(f"other {number}", 1)], {}))
            jobs.append(batcher.submit(fake, [(f"fake {number}", 1)], {}))
        while batcher.tokens < 6:
            await asyncio.sleep(0.001)
        fake.gate.set()
        await asyncio.gather(*(job.future for job in jobs))
        return other

    other, fake = answered(play)
    assert other.batches == [["other 0", "other 1", "other 2"]]
    assert fake.batches[1:] == [["fake 0", "fake 1", "fake 2"]]


@pytest.mark.parametrize("guilty", [[3], [0, 9], [1, 2, 3], list(range(10))])
def test_an_error_inside_a_batch_fails_only_the_guilty(guilty: list[int]) -> None:
    def fail(names: list[Any]) -> None:
        if {*names} & {*guilty}:
            raise RunError("not finite")

    async def play(batcher: Batcher, fake: Fake) -> Any:
        fake.computed = fail
        fake.gate.clear()
        jobs = [batcher.submit(fake, [("first", 1)], {})]
        await asyncio.to_thread(fake.started.wait, 10)
        jobs += [batcher.submit(fake, [(n, 5), (f"more {n}", 5)], {}) for n in range(10)]
        fake.gate.set()
        return await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)

    found, _ = answered(play, batch_tokens=1000)
    for number, one in enumerate(found[1:]):
        if number in guilty:
            assert isinstance(one, RunError)
        else:
            assert one.answers == [number, f"more {number}"]


def test_a_request_that_cannot_be_read_or_finished_fails_alone() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        jobs = [
            batcher.submit(fake, [("a", 5)], {}),
            batcher.submit(fake, [("b", 5)], {"refuse": True}),
            batcher.submit(fake, [("c", 5)], {"unfinished": True}),
            batcher.submit(fake, [("d", 5)], {}),
        ]
        return await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)

    (a, b, c, d), _ = answered(play)
    assert a.answers == ["a"] and d.answers == ["d"]
    assert isinstance(b, UserError) and isinstance(c, ValueError)


class Panic(BaseException):
    """As Rust's panics come to Python."""


def test_what_is_no_exception_fails_only_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*args: Any) -> Any:
        raise Panic("of a text")

    async def play(batcher: Batcher, fake: Fake) -> list[Any]:
        found = []
        for step in ("prepare", "compute", "finish"):
            with monkeypatch.context() as patch:
                patch.setattr(fake, step, panic)
                job = batcher.submit(fake, [("a", 5)], {})
                found += await asyncio.gather(job.future, return_exceptions=True)
        fake.computed = lambda names: next(iter([]))
        job = batcher.submit(fake, [("a", 5)], {})
        found += await asyncio.gather(job.future, return_exceptions=True)
        fake.computed = lambda names: None
        return [*found, await batcher.submit(fake, [("b", 5)], {}).future]

    (*failed, fine), _ = answered(play)
    assert [str(one) for one in failed] == ["failed: Panic"] * 3 + ["failed: StopIteration"]
    assert fine.answers == ["b"]


def test_where_memory_is_short_batches_become_smaller_and_nothing_is_lost() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        def short(names: list[Any]) -> None:
            if len(names) > 3:
                raise torch.OutOfMemoryError("memory is full")

        fake.computed = short
        jobs = await held(batcher, fake, *([(n, 10)] for n in range(40)))
        return [job.future.result().answers for job in jobs], batcher.batch_tokens

    (answers, tokens), fake = answered(play)
    assert answers == [[n] for n in range(40)]
    assert tokens < 60
    assert max(map(len, fake.batches[-4:])) <= 5


def test_a_sequence_for_which_memory_lacks_fails_in_one_line() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        def short(names: list[Any]) -> None:
            if "large" in names:
                raise torch.OutOfMemoryError("memory is full")

        fake.computed = short
        jobs = [batcher.submit(fake, [(name, 10)], {}) for name in ("a", "large", "b")]
        return await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)

    (a, large, b), _ = answered(play)
    assert a.answers == ["a"] and b.answers == ["b"]
    assert str(large) == "out of memory with 10 tokens at once"


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        fake.gate.clear()
        job = batcher.submit(fake, [("first", 1)] * 5, {})
        with pytest.raises(QueueFullError) as full:
            batcher.submit(fake, [("more", 1)] * 6, {})
        batcher.cancel(batcher.submit(fake, [("more", 1)] * 5, {}))
        fake.gate.set()
        await job.future
        again = await batcher.submit(fake, [("more", 1)] * 10, {}).future
        return full.value.retry_after, again.answers

    (retry_after, answers), _ = answered(play, max_queue=10)
    assert retry_after >= 1
    assert answers == ["more"] * 10


def test_a_request_that_is_cancelled_frees_its_place_and_is_not_computed() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        fake.gate.clear()
        first = batcher.submit(fake, [("first", 1)], {})
        await asyncio.to_thread(fake.started.wait, 10)
        gone = [batcher.submit(fake, [(f"gone {n}", 50)], {}) for n in range(4)]
        kept = batcher.submit(fake, [("kept", 50)], {})
        while batcher.tokens < 250:
            await asyncio.sleep(0.001)
        for job in (*gone, first):  # the last one is being computed
            batcher.cancel(job)
            batcher.cancel(job)
        assert (batcher.inputs, batcher.tokens) == (1, 50)
        fake.gate.set()
        return (await kept.future).answers, first.future.done()

    (answers, done), fake = answered(play)
    assert answers == ["kept"] and not done
    assert fake.batches == [["first"], ["kept"]]


def test_closing_answers_what_was_taken_and_takes_no_more() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        fake.gate.clear()
        jobs = [batcher.submit(fake, [(n, 30)], {}) for n in range(20)]
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        await asyncio.sleep(0.05)
        with pytest.raises(ClosedError):
            batcher.submit(fake, [("late", 1)], {})
        fake.gate.set()
        await closing
        return [job.future.result().answers for job in jobs]

    answers, _ = answered(play)
    assert answers == [[n] for n in range(20)]


def test_a_batch_waits_for_more_as_long_as_asked() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        began = time.perf_counter()
        jobs = []
        for number in range(3):
            jobs.append(batcher.submit(fake, [(number, 10)], {}))
            await asyncio.sleep(0.02)
        await asyncio.gather(*(job.future for job in jobs))
        alone = time.perf_counter() - began
        full = batcher.submit(fake, [(number, 10) for number in range(10)], {})
        began = time.perf_counter()
        await full.future
        return alone, time.perf_counter() - began

    (alone, full), fake = answered(play, max_wait=0.5)
    assert fake.batches == [[0, 1, 2], list(range(10))]
    assert alone >= 0.5
    assert full < 0.4  # a full batch waits for nothing


def test_a_request_that_is_alone_waits_for_no_timer() -> None:
    async def play(batcher: Batcher, fake: Fake) -> Any:
        best = 1.0
        for _ in range(20):
            began = time.perf_counter()
            await batcher.submit(fake, [("a", 10)], {}).future
            best = min(best, time.perf_counter() - began)
        return best

    best, _ = answered(play)
    assert best < 0.02


def test_many_requests_of_many_kinds_all_come_back() -> None:
    """Random sizes, cancellations and failures from several tasks at once."""

    async def play(batcher: Batcher, fake: Fake) -> Any:
        def fail(names: list[Any]) -> None:
            if any(isinstance(name, str) and name.startswith("bad") for name in names):
                raise ValueError("bad")

        fake.computed = fail

        async def client(number: int) -> int:
            right = 0
            for turn in range(25):
                kind = (number * 7 + turn * 3) % 11
                count = 1 + (number * turn) % 9
                begin = f"{'ok' if kind else 'bad'} {number} {turn}"
                names = [f"{begin} {n}" for n in range(count)]
                job = batcher.submit(fake, [(n, 1 + len(n) * kind) for n in names], {})
                if kind == 1:
                    batcher.cancel(job)
                    continue
                try:
                    right += (await job.future).answers == names
                except ValueError:
                    right += kind == 0
            return right

        return await asyncio.gather(*(client(number) for number in range(30)))

    found, _ = answered(play, batch_tokens=300, max_queue=10_000)
    for number, right in enumerate(found):
        assert right == sum((number * 7 + turn * 3) % 11 != 1 for turn in range(25))
