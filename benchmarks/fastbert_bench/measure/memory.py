"""The most memory that a call holds beside what was there before it."""

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
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or each trace writes two lines to stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    alive = most = 0
    for _, size in sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree())):
        alive += size
        most = max(most, alive)
    return int(most)


def _allocations(events: Any) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation, bytes negative for what is freed."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)
