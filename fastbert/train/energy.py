"""What a GPU spends, by its own counter of all the energy it has spent (NVML)."""

from collections.abc import Callable

import torch


class EnergyCounter:
    """Reads the counter of a GPU, where nvidia-ml-py and the driver give one.

    Attributes:
        why_not: what is missing; empty where energy can be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._read: Callable[[], float] | None = None
        self.why_not = "a CPU has no energy counter that we read"
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            self._read()
        except ModuleNotFoundError:
            self._without("nvidia-ml-py is not installed")
        except Exception as error:  # of NVML's own, or an old package that lacks a function
            self._without(f"NVML: {error}")
        else:
            self.why_not = ""

    def _without(self, why: str) -> None:
        self._read, self.why_not = None, why

    def joules(self) -> float:
        """The counter as it stands; 0 where there is none, or none any more (see `why_not`)."""
        if self._read is None:
            return 0.0
        try:
            return self._read()
        except Exception as error:  # the times that were measured beside it are worth more
            self._without(f"NVML: {error}")
            return 0.0
