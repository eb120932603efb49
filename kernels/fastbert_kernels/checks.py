"""Checks that every op makes before a launch: one clear line instead of a device-side fault.

None of them reads device memory, so none synchronizes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.triton_import import triton

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_ALWAYS = {"seed_ptr": "*i64", "eps": "fp32"} | dict.fromkeys(
    ("mean_ptr", "rstd_ptr", "partials_ptr"), "*fp32"
)


def capability(device: torch.device) -> int:
    """Compute capability, 90 for sm_90, of what launches choose their tiles by."""
    if device.type != "cuda":
        return 90  # the interpreter
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected ({wanted})")
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} is {tensor.dtype}, expected {names}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} is not contiguous: call .contiguous() first")


def require_seed(op: str, seed: Tensor, device: torch.device, stream: int = 0) -> None:
    """The (3,) int64 tensor that dropout bits are drawn from, and which of a layer's four draws."""
    require_tensor(op, "seed", seed, (3,), torch.int64, device)
    if not 0 <= stream < 4:
        raise ValueError(f"{op}: stream = {stream}, expected 0, 1, 2 or 3")


def require_launchable(
    op: str,
    kernel: Any,
    device: torch.device,
    reference: str | None = None,  # what serves a CPU, if not reference.<op>
) -> None:
    """Triton kernels run on the current GPU, or on CPU tensors under Triton's interpreter."""
    if device.type == "cuda":
        current = torch.cuda.current_device()
        if device.index != current:
            raise ValueError(
                f"{op}: the tensors are on {device}, Triton launches on cuda:{current}: "
                f"wrap the call in torch.cuda.device({device.index})"
            )
    elif device.type != "cpu" or isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"{op}: the Triton kernel needs CUDA tensors, these are on {device}: use "
            f"fastbert_kernels.{reference or f'reference.{op}'}, "
            "or set TRITON_INTERPRET=1 before the import"
        )


def triton_name(dtype: torch.dtype) -> str:
    """How a kernel's signature spells a dtype: "bf16"."""
    return _TRITON_NAMES[dtype]


def kernel_signature(
    kernel: Any,
    constexprs: Mapping[str, Any],
    dtype: torch.dtype,
    **others: str,  # what is neither, e.g. labels_ptr="*i64"
) -> dict[str, str]:
    """For a compile case: a kernel's pointers are to `dtype`, its numbers i32."""
    types = _ALWAYS | others
    storage = f"*{triton_name(dtype)}"
    return {
        name: types.get(name, storage if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constexprs
    }
