"""Checks that every op makes before a launch: one clear line instead of a device-side fault.

None of them reads device memory, so none synchronizes.
"""

from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],  # None: any size
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """One tensor argument of `op`: its shape, dtype, device, and that it is contiguous."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    require(fits, f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({wanted})")
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    require(tensor.dtype in dtypes, f"{op}: {name} is {tensor.dtype}, expected {names}")
    require(tensor.device == device, f"{op}: {name} is on {tensor.device}, expected {device}")
    require(tensor.is_contiguous(), f"{op}: {name} is not contiguous: call .contiguous() first")


def require_seed(op: str, seed: Tensor, device: torch.device) -> None:
    """The (3,) int64 tensor that dropout bits are drawn from."""
    require_tensor(op, "seed", seed, (3,), torch.int64, device)


def require_launchable(op: str, kernel: Any, device: torch.device) -> None:
    """Triton kernels run on the current GPU, or on CPU tensors under Triton's interpreter."""
    if device.type != "cuda" and not isinstance(kernel, InterpretedFunction):
        raise ValueError(
            f"{op}: the Triton kernel needs CUDA tensors, these are on {device}: "
            f"use fastbert_kernels.reference.{op}, or set TRITON_INTERPRET=1 before the import"
        )
    if device.type == "cuda":
        current = torch.cuda.current_device()
        require(
            device.index == current,
            f"{op}: the tensors are on {device}, Triton launches on cuda:{current}: "
            f"wrap the call in torch.cuda.device({device.index})",
        )


def triton_name(dtype: torch.dtype) -> str:
    """How a kernel's signature spells a dtype: "bf16"."""
    return _TRITON_NAMES[dtype]
