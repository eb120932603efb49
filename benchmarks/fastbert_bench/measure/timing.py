"""Times of GPU calls with a cold L2.

A contender is a list of calls, one for each clone of its inputs. All clones together exceed three
times the L2, so that no call finds its inputs there. The calls are captured in one CUDA graph,
which leaves launches out of the time. Contenders are replayed in turn, round after round, so that
drift of clocks and temperature favours nobody. On a CPU the calls are timed by the wall clock.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastbert.progress import progress_bar
from fastbert_bench.measure.energy import Spent

One = TypeVar("One")
Call = Callable[[], object]
SPIN_CYCLES = 1_000_000  # ~0.6 ms: longer than the host needs to queue a replay of 400 calls
L2_WHERE_UNKNOWN = 50 * 2**20


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[int], object], indices: Sequence[int], device: torch.device) -> float:
    """Seconds of one of call(index), ..., until the device is done with all."""
    started = time.perf_counter()
    for index in indices:
        call(index)
    synchronize(device)
    return (time.perf_counter() - started) / len(indices)


def in_turn(
    contenders: Sequence[One], rounds: int, desc: str = "measuring"
) -> Iterator[tuple[int, One]]:
    """Every contender in every round, with the round's number.

    Every other round runs backwards, so that a drift of the machine favours nobody.
    """
    for index in progress_bar(range(rounds), desc=desc, unit="round"):
        for contender in contenders[:: -1 if index % 2 else 1]:
            yield index, contender


def clones_needed(bytes: int, device: torch.device) -> int:
    """How many sets of inputs of `bytes` exceed three times the L2; at least 2, at most 400."""
    if device.type == "cpu":
        return 2
    properties = torch.cuda.get_device_properties(device)
    l2 = getattr(properties, "L2_cache_size", L2_WHERE_UNKNOWN)
    return min(400, max(2, math.ceil(3 * l2 / bytes)))


class Replay:
    """A list of calls, recorded once and run together."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self.count = len(calls)
        self.calls = calls
        self.cuda = device.type == "cuda"
        for call in calls[:2]:
            call()  # compiles kernels and makes library handles, which a capture cannot
        if self.cuda:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            self.graph = torch.cuda.CUDAGraph()
            # On the stream that is current: autograd runs a backward where its forward ran.
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.kept = [call() for call in calls]  # alive: each call writes memory of its own

    def run(self) -> Callable[[], float]:
        """Runs all calls; the result, once the device is idle, tells the milliseconds of one."""
        if not self.cuda:
            started = time.perf_counter()
            for call in self.calls:
                call()
            milliseconds = (time.perf_counter() - started) * 1e3 / self.count
            return lambda: milliseconds
        torch.cuda._sleep(SPIN_CYCLES)
        self.start.record()
        self.graph.replay()
        self.end.record()
        return lambda: self.start.elapsed_time(self.end) / self.count


def interleaved(
    replays: Mapping[str, Replay],
    device: torch.device,
    rounds: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Milliseconds of a call, for each contender and round.

    Two rounds more, in which clocks settle, are not counted. Past `seconds`, 5 rounds suffice.
    """
    times: dict[str, list[float]] = {name: [] for name in replays}
    started = time.perf_counter()
    for index in range(rounds + 2):
        names = list(replays)[:: 1 if index % 2 else -1]
        results = {name: replays[name].run() for name in names}
        synchronize(device)
        if index >= 2:
            for name, result in results.items():
                times[name].append(result())
        if index >= 6 and time.perf_counter() - started > seconds:
            break
    return times


def quantiles(milliseconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(milliseconds, (20, 50, 80))
    return {"ms": float(middle), "ms_p20": float(low), "ms_p80": float(high)}


def figures(
    seconds: Sequence[float], tokens: int, sequences: int, spent: Spent | None
) -> dict[str, Any]:
    """Times, rates and energy of a batch of so many real tokens, measured in some rounds."""
    rounds = [1e3 * one for one in seconds]
    times = quantiles(rounds)
    return {
        **times,
        "rounds_ms": rounds,
        "real_tokens_per_second": tokens / times["ms"] * 1e3,
        "sequences_per_second": sequences / times["ms"] * 1e3,
        "watts": spent.watts if spent else None,
        "joules_per_million_tokens": spent.joules / tokens * 1e6 if spent else None,
    }


def random_like(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers: a product of zeros would be 13% too fast."""
    return torch.randn(tuple(shape), device=device).to(dtype)


def ceilings(device: torch.device) -> dict[str, Any]:
    """What a device copy and a bf16 product reach here, in bytes and FLOPs a second."""
    elements, n = (2**29, 8192) if device.type == "cuda" else (2**16, 64)
    source = random_like((elements,), torch.bfloat16, device)
    target = torch.empty_like(source)
    a, b = (random_like((n, n), torch.bfloat16, device) for _ in range(2))
    out = torch.empty_like(a)
    replays = {
        "copy": Replay([lambda: target.copy_(source)] * 4, device),
        "gemm": Replay([lambda: torch.mm(a, b, out=out)] * 4, device),
    }
    times = interleaved(replays, device, rounds=20, seconds=2.0)
    copy, gemm = quantiles(times["copy"]), quantiles(times["gemm"])
    return {
        "copy": copy,
        "gemm": gemm,
        "bandwidth": 2 * source.nbytes / (copy["ms"] / 1e3),
        "matrix": 2 * n**3 / (gemm["ms"] / 1e3),
    }
