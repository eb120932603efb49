"""Watts and joules of calls, by the engine's reading of a GPU's energy counter."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastbert.train.energy import EnergyCounter


@dataclass(frozen=True)
class Spent:
    """Energy of some repetitions of a call."""

    joules: float  # of one
    watts: float


class EnergyMeter(EnergyCounter):
    """The counter of a GPU, read around repetitions of a call."""

    def measure(self, call: Callable[[int], object], seconds: float, once: float) -> Spent | None:
        """Energy of call(0), call(1), ... for about `seconds`; `once` is how long one takes."""
        if self._read is None:
            return None
        count = max(3, round(seconds / once))
        torch.cuda.synchronize(self._device)
        joules, started = self.joules(), time.perf_counter()
        for index in range(count):
            call(index)
        torch.cuda.synchronize(self._device)
        spent = self.joules() - joules
        if self.why_not:
            return None
        return Spent(spent / count, spent / (time.perf_counter() - started))
