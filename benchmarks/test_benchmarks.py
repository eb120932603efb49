"""The pytest-benchmark suite: `pytest benchmarks --benchmark-json=FILE`.

The training step (ours, and Hugging Face's with PyTorch's attention), every op of ours forward and
backward, and the loader, on the GPU if there is one, else on the CPU at small sizes. Ops are timed
by CUDA events with a cold L2 (see `timing`); on a CPU all is wall-clock time. For comparisons of
two runs: `pytest-benchmark compare`. `pytest` alone runs the tests only. Not yet run on a GPU.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastbert.config import PretrainConfig, model_config
from fastbert.data.pack import Packer
from fastbert.data.workers import BatchLoader
from fastbert.train.device import choose_execution, keep_freed_memory
from fastbert_bench.config import StepBenchConfig
from fastbert_bench.kernels import timings as kernel_timings
from fastbert_bench.kernels.costs import COSTS
from fastbert_bench.measure import timing
from fastbert_bench.suites import contenders, data
from fastbert_bench.suites import kernels as bench_kernels
from fastbert_bench.suites.step import drawn_lengths

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
STEP = (
    StepBenchConfig(model="base", batch_size=64, max_seq_length=512)
    if CUDA
    else StepBenchConfig(model="tiny", batch_size=8, max_seq_length=64)
)
ROUNDS = 20 if CUDA else 5


class EventClock:
    """Seconds put forward by `add` alone: what CUDA events measured, not the wall clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def add(self, replay: timing.Replay) -> None:
        """One round of a replay; counts the time of one of its calls."""
        milliseconds = replay.run()
        if CUDA:
            torch.cuda.synchronize(DEVICE)
        self.now += milliseconds() / 1e3


EVENTS = EventClock()


@pytest.fixture(scope="module", autouse=True)
def _stream_and_memory() -> Iterator[None]:
    """A stream that can be captured; on a CPU, our setting of the allocator."""
    if not CUDA:
        keep_freed_memory()
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        yield


@functools.cache
def _step(name: str) -> contenders.Contender:
    sizes, rng = model_config(STEP.model), np.random.default_rng(STEP.seed)
    lengths = drawn_lengths(STEP, rng)
    padded, packed = contenders.make_batches(lengths, STEP.max_seq_length, sizes.vocab_size, rng)
    recipe = contenders.make_recipe(STEP.seed)
    execution = choose_execution(PretrainConfig(torch_compile="off"), sizes)
    model = contenders.seeded(sizes, execution.ops, STEP.seed, DEVICE)
    if name == "fastbert":
        batches = [batch.to(DEVICE) for batch in packed]
        return contenders.ours(name, model, batches, recipe, execution.dtype, graph=execution.graph)
    weights = contenders.weights_of(model, sizes)
    there = [{key: value.to(DEVICE) for key, value in batch.items()} for batch in padded]
    return contenders.rival(name, sizes, weights, there, recipe, execution.dtype, DEVICE)


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("name", ["fastbert", "hf-sdpa"])
def test_step(benchmark: BenchmarkFixture, name: str) -> None:
    contender = _step(name)
    contenders.check_fair(_step("fastbert"), contender, drops=True)

    def step() -> None:
        contender.step(0)
        if CUDA:
            torch.cuda.synchronize(DEVICE)

    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=4)
    benchmark.extra_info["real_tokens"] = contender.real_tokens


@functools.cache
def _workload(op: str) -> kernel_timings.Workload:
    if CUDA:
        return next(kernel_timings.workloads(op, DEVICE, quick=True))
    return bench_kernels.cpu_workload(op, quick=False)


@pytest.mark.benchmark(group="ops", timer=EVENTS)
@pytest.mark.parametrize(
    ("op", "direction"),
    [pytest.param(c.op, c.direction, id=f"{c.op}-{c.direction}") for c in COSTS],
)
def test_op(benchmark: BenchmarkFixture, op: str, direction: str) -> None:
    workload = _workload(op)
    first = workload.inputs()
    bytes = sum(tensor.nbytes for tensor in first.values())
    clones = timing.clones_needed(bytes, DEVICE) - 1
    sets = [first] + [workload.inputs() for _ in range(clones)]
    try:
        calls = kernel_timings.calls_of(workload.contenders[0], direction, sets)
    except kernel_timings.MissingError as error:
        pytest.skip(str(error))
    replay = timing.Replay(calls, DEVICE)
    benchmark.pedantic(EVENTS.add, args=(replay,), rounds=ROUNDS, warmup_rounds=2)
    benchmark.extra_info["sizes"] = workload.sizes


@pytest.mark.benchmark(group="loader")
@pytest.mark.parametrize("max_seq_length", [128, 512])
def test_loader(benchmark: BenchmarkFixture, tmp_path: Path, max_seq_length: int) -> None:
    shards = data.write_shards(tmp_path, 300_000, seed=42)
    packer = Packer(
        shards, data.token_ids(), tokens_per_batch=65_536, max_seq_length=max_seq_length
    )
    with BatchLoader(packer) as loader:
        batch = benchmark.pedantic(next, args=(loader,), rounds=5, warmup_rounds=1)
    benchmark.extra_info["real_tokens"] = batch.num_tokens
