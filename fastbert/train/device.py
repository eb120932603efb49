"""Where a run computes and how: each choice with its reason, said in the log's first lines."""

import ctypes
import shutil
from dataclasses import dataclass

import torch

from fastbert.config import ModelConfig, PretrainConfig
from fastbert.errors import RunError, UserError
from fastbert.ops import Ops, choose_ops

# On 2 cores the compiled pieces cost 15 s at the start and then save a quarter of the time.
_COMPILE_WORTH_FLOPS = {"cpu": 1e13, "cuda": 1e16}


@dataclass(frozen=True)
class Execution:
    """The device, dtype and compilation of a run."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    ops: Ops
    reasons: tuple[str, ...]
    """One line each, for the log."""


def training_flops(model: ModelConfig, config: PretrainConfig) -> float:
    """FLOPs of a whole run, a multiply-add counted as 2: 3 x forward (formula: CONTRIBUTING.md)."""
    hidden = model.hidden_size
    per_token = (
        72 * model.num_hidden_layers * hidden**2
        + 12 * model.num_hidden_layers * hidden * config.max_seq_length
        + 6 * config.mlm_probability * (hidden**2 + hidden * model.vocab_size)
    )
    steps = config.max_steps * config.gradient_accumulation_steps
    return per_token * config.tokens_per_batch * steps


def choose_execution(config: PretrainConfig, model: ModelConfig) -> Execution:
    """Resolves `device`, `precision` and `torch_compile`, all of which may be "auto".

    The choice depends on settings and hardware only, never on a timing, so that two runs compute
    the same numbers.

    Raises:
        UserError: torch_compile = on without a C++ compiler on a CPU.
        RunError: CUDA was asked for and is not there.
    """
    device = choose_device(config.device)
    dtype, precision_reason = choose_dtype(config.precision, device)
    compiled, compile_reason = _compile(config, model, device)
    ops = choose_ops(device.type, compiled)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if device.type == "cpu":
        keep_freed_memory()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Execution(
        device,
        dtype,
        compiled,
        ops,
        (
            f"device: {device} ({name}{threads})",
            f"precision: {precision_reason}",
            f"ops: {ops.name}, plain PyTorch",
            f"torch.compile: {compile_reason}",
        ),
    )


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one.

    Raises:
        RunError: a GPU was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunError(f"device = {name!r}: this torch sees no GPU; use device = 'cpu' or 'auto'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"device = {name!r}: there are only {torch.cuda.device_count()} GPUs")
    return device


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """What activations are computed in, and why: fp32 or bf16."""
    hardware = fast_bf16(device)
    if precision == "fp32" or (precision == "auto" and not hardware):
        why = "asked for" if precision == "fp32" else "this device has no bf16 multiplication"
        return torch.float32, f"fp32 ({why})"
    why = "hardware" if hardware else "asked for, emulated: slower than fp32 here"
    return torch.bfloat16, f"bf16 with fp32 masters ({why})"


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: on a CPU it needs a C++ compiler."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++"))


def keep_freed_memory(keep: bool = True) -> bool:
    """Lets glibc keep the memory of freed tensors instead of giving it back to the system.

    A large tensor is otherwise mapped, zeroed page by page and unmapped at every use: a step of
    BERT-tiny took 119 ms so, and 80 ms with the memory kept (2 cores).

    Args:
        keep: False brings back glibc's own policy, as it is once tensors of 32 MB have been freed.

    Returns:
        Whether there is a glibc to tell.
    """
    try:
        glibc = ctypes.CDLL(None)
        mallopt, malloc_trim = glibc.mallopt, glibc.malloc_trim
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    done = bool(
        mallopt(m_mmap_threshold, 2**30 if keep else 2**25)
        and mallopt(m_trim_threshold, 2**31 - 1 if keep else 2**26)
    )
    if not keep:
        malloc_trim(0)
    return done


def _compile(config: PretrainConfig, model: ModelConfig, device: torch.device) -> tuple[bool, str]:
    compiler = can_compile(device)
    if config.torch_compile == "on":
        if not compiler:
            raise UserError("torch_compile = 'on' needs a C++ compiler: install g++, or use auto")
        return True, "on (asked for)"
    if config.torch_compile == "off":
        return False, "off (asked for)"
    if not compiler:
        return False, "off (no C++ compiler found)"
    flops = training_flops(model, config)
    if flops < _COMPILE_WORTH_FLOPS[device.type]:
        return False, f"off (the whole run is {flops:.1e} FLOPs: compiling would not pay)"
    return True, f"on (the whole run is {flops:.1e} FLOPs)"
