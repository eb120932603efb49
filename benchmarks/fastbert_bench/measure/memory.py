"""The most memory that a call holds beside what was there before it."""

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors alive during `step` beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    # Alive: torch warns where a tensor is freed whose making it did not record.
    kept = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    with profiler(profile_memory=True) as profile:
        step()
    alive = most = 0
    for _, size in sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree())):
        alive += size
        most = max(most, alive)
    del kept
    return int(most)


def profiler(cuda: bool = False, **options: Any) -> Any:
    """torch's profiler, of the CPU and where asked of the GPU, which writes nothing to stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or each trace writes two lines there
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU]
    return torch.profiler.profile(activities=activities, **options)


def _allocations(events: Any) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation, bytes negative for what is freed."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)
