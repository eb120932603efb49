"""Where a run computes and how: each choice with its reason, said in the log's first lines."""

import ctypes
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from fastbert.config import ModelConfig, PretrainConfig
from fastbert.data.parallel import available_cores
from fastbert.errors import UserError
from fastbert.ops import REFERENCE, Ops, cpu_ops, triton_ops, why_no_kernels
from fastbert.train import muon
from fastbert.train.flat import FlatParameters
from fastbert.train.optimizer import described

# On 2 cores the compiled pieces cost 15 s at the start and then save a quarter of the time.
_COMPILE_WORTH_FLOPS = {"cpu": 1e13, "cuda": 1e16}
_BATCH_BYTES = 43  # of a token in a batch: 5 int64 and what belongs to sequences
_WORKER_BYTES = 300 * 2**20  # of a data worker, which imports torch
_GIB = 2**30


@dataclass(frozen=True)
class Execution:
    """The device, dtype, ops and launching of a run."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    graph: bool
    """Whether a step is launched as one CUDA graph."""
    ops: Ops
    reasons: tuple[str, ...]
    """One line each, for the log."""


def training_flops(model: ModelConfig, config: PretrainConfig) -> float:
    """FLOPs of a whole run, a multiply-add counted as 2: 3 x forward (formula: CONTRIBUTING.md)."""
    hidden, begin, masked = model.hidden_size, 0, 0.0
    for phase in config.phases():
        masked += phase.mlm_probability * (phase.end - begin) / config.max_steps
        begin = phase.end
    per_token = (
        72 * model.num_hidden_layers * hidden**2
        + 12 * model.num_hidden_layers * hidden * config.max_seq_length
        + 6 * masked * (hidden**2 + hidden * model.vocab_size)
    )
    steps = config.max_steps * config.gradient_accumulation_steps
    return per_token * config.tokens_per_batch * steps


def choose_execution(config: PretrainConfig, model: ModelConfig) -> Execution:
    """Resolves `device`, `precision`, `kernels`, `torch_compile` and `step`, which may be "auto".

    The choice depends on settings and hardware only, never on a timing, so that two runs compute
    the same numbers.

    Raises:
        UserError: settings that do not fit the device or each other, or a GPU that is not there.
    """
    device = choose_device(config.device)
    dtype, precision_reason = choose_dtype(config.precision, device)
    # The process's, which an earlier run may have set.
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    why_not = _why_no_kernels(config, model, device)
    compiled, compile_reason = _compile(config, model, device, kernels=not why_not)
    if why_not:
        ops = cpu_ops(compiled) if device.type == "cpu" else REFERENCE
        if config.kernels == "reference":
            ops = REFERENCE
    else:
        tf32 = config.precision == "tf32"
        ops = triton_ops(config.attn_implementation, "tf32" if tf32 else "ieee")
    graph, step_reason = _graph(config, device, ops)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if device.type == "cpu":
        keep_freed_memory()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Execution(
        device,
        dtype,
        compiled,
        graph,
        ops,
        (
            f"device: {device} ({name}{threads})",
            f"precision: {precision_reason}",
            f"ops: {ops.name}" + (f" ({why_not})" if why_not else ""),
            f"torch.compile: {compile_reason}",
            f"step: {step_reason}",
            f"optimizer: {described(config, model, ops)}",
        ),
    )


def _why_no_kernels(config: PretrainConfig, model: ModelConfig, device: torch.device) -> str:
    if config.kernels == "reference":
        return "asked for"
    why_not = why_no_kernels(device, model.hidden_size, model.intermediate_size, model.head_size)
    if why_not and config.kernels == "triton":
        raise UserError(f"kernels = 'triton': {why_not}; use kernels = 'auto'")
    if why_not and config.attn_implementation != "auto":
        raise UserError(
            f"attn_implementation = {config.attn_implementation!r} belongs to our Triton kernels: "
            f"{why_not}; use attn_implementation = 'auto'"
        )
    if config.attn_implementation in ("fa3", "fa4") and _drops_attention(config, model):
        raise UserError(
            f"attn_implementation = {config.attn_implementation!r} has no dropout: give "
            "--attention-probs-dropout-prob 0, or use 'torch'"
        )
    return f"Triton kernels: {why_not}" if why_not else ""


def _drops_attention(config: PretrainConfig, model: ModelConfig) -> bool:
    """Whether it does in any phase."""
    asked = (phase.attention_probs_dropout_prob for phase in config.phases())
    return any((model.attention_probs_dropout_prob if p is None else p) > 0 for p in asked)


def _graph(config: PretrainConfig, device: torch.device, ops: Ops) -> tuple[bool, str]:
    obstacle = ""
    if device.type != "cuda":
        obstacle = "CUDA graphs need a GPU"
    elif not ops.kernels:
        obstacle = f"{ops.name} asks the host in every layer"
    elif config.optim.endswith("_apex_fused"):
        obstacle = f"{config.optim} asks the host at every step"
    if config.step == "graph" and obstacle:
        raise UserError(f"step = 'graph': {obstacle}; use step = 'auto' or 'eager'")
    if config.step == "eager":
        return False, "eager (asked for)"
    return (False, f"eager ({obstacle})") if obstacle else (True, "one CUDA graph")


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one.

    Raises:
        UserError: a GPU was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(re.sub(":0+(?=[0-9])", ":", name))
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device = {name!r}: this torch sees no GPU; use device = 'cpu' or 'auto'")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise UserError(f"device = {name!r}: there are only {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(index)  # Triton launches, and graphs are recorded, on the current one
    return torch.device("cuda", index)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is full, be it torch's, CUDA's or cuBLAS's."""
    signs = (
        "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation",
        "cudaErrorStreamCaptureInvalidated",  # what a capture ends with after it
    )  # fmt: skip
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def what_fits(
    model: ModelConfig,
    dtype: torch.dtype,
    flat: FlatParameters,
    device: torch.device,
    too_many: int,
) -> str:
    """Advice where `too_many` tokens do not fit, with the number that would."""
    buffers = {b.data_ptr(): b for b in (flat.master, flat.weights, flat.grad)}
    state = sum(b.numel() * b.element_size() for b in buffers.values())
    state += 4 * (flat.master.numel() + flat.last_begin)  # the moments
    per_token = _activations(model, dtype) * model.num_hidden_layers
    if device.type == "cuda":  # what others hold on this GPU is not ours to use
        free, total = torch.cuda.mem_get_info(device)
        total = free + torch.cuda.memory_reserved(device)
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tokens = min(too_many - 1, max(0, int(0.9 * (total - state) / per_token)))
    return (
        f"{device} has {_gib(total)} GiB for us, of which weights, gradients and moments take "
        f"{_gib(state)}, which leaves room for about {tokens} tokens: lower --max-seq-length "
        "and --tokens-per-batch to fit, or use --gradient-checkpointing or a smaller --model"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a new process could take there: of a CPU, within its control group's limit."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        free = sum(int(lines[key].split()[0]) for key in ("MemAvailable", "SwapFree")) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for room in _control_groups():
        free = min(free, room)
    return free


def _control_groups(
    root: Path = Path("/sys/fs/cgroup"), process: str = "/proc/self/cgroup"
) -> list[int]:
    """Bytes left under each memory limit that the process stands under: a container's, a job's."""
    try:
        lines = [line.strip().split(":", 2) for line in Path(process).read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            top, limit, used, cache = root, "memory.max", "memory.current", "file "
        elif "memory" in controllers.split(","):
            top = root / "memory"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache "
        else:
            continue
        own = top / path.lstrip("/")
        # Inside a container, its group is the root that is seen, whatever the path says.
        for group in {own, *own.parents, top}:
            if group != top and top not in group.parents:
                continue
            try:
                room = int((group / limit).read_text()) - int((group / used).read_text())
                stat = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # none there, or "max"
                continue
            room += sum(int(line.split()[1]) for line in stat if line.startswith(cache))
            found.append(max(room, 0))
    return found


def check_memory(
    config: PretrainConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuses what cannot fit, from its sizes alone: nothing is allocated.

    Counted is the least that a run takes. A GPU where a batch does not fit halves it, a CPU cannot.

    Raises:
        UserError: the model's weights, gradients and moments, the activations of a batch, or the
            data workers need more memory than is free.
    """
    free = free_memory(device)
    # Master and two moments, and the gradient.
    each: float = 12 + (2 if config.gradient_precision == "bf16" else 4)
    each += dtype.itemsize if dtype != torch.float32 else 0
    if config.optim == "muon":  # one moment of its matrices
        each -= 4 * muon.num_parameters(model) / model.num_parameters(nsp=config.nsp)
    state = check_weights(config.sizes_from, model, device, each, nsp=config.nsp)
    T, L = config.tokens_per_batch, model.num_hidden_layers
    batches = (config.gradient_accumulation_steps + 1) * T * _BATCH_BYTES
    step = batches
    if device.type == "cpu":
        layers = 1 if config.gradient_checkpointing else L
        # 0.6 GiB are counted so where BERT tiny took 0.8 (2**15 tokens in sequences of 128).
        step += T * _activations(model, dtype) * layers
        masked = max(phase.mlm_probability for phase in config.phases())
        step += int(T * masked) * model.vocab_size * 8  # logits, their gradient
        if _drops_attention(config, model):
            # The bits of a whole score matrix, a byte each, and in 8 bytes while they are drawn.
            step += T * config.max_seq_length * model.num_attention_heads * (layers + 8)
    if config.optim == "muon":  # when activations have gone
        item = 2 if device.type == "cuda" else 4
        step = max(step, muon.scratch_bytes(model, config.muon_split_qkv, item))
    if state + step > free:
        raise UserError(
            f"tokens_per_batch = {T} with gradient_accumulation_steps = "
            f"{config.gradient_accumulation_steps} and max_seq_length = {config.max_seq_length} "
            f"needs {_gib(step)} GiB a step beside the model's {_gib(state)}, but only "
            f"{_gib(free)} GiB are free on {device}: lower them"
        )
    check_workers("dataloader_num_workers", config.dataloader_num_workers or 0)


def check_weights(
    name: str, model: ModelConfig, device: torch.device, each: float = 16, *, nsp: bool = True
) -> int:
    """Bytes of a model's parameters with what belongs to each, once they are known to fit.

    Args:
        name: what the user called the model.
        model: its sizes.
        device: where it goes.
        each: bytes for a parameter; 16 are a weight, a gradient and two moments in fp32.
        nsp: whether it has pooler and next-sentence head.

    Raises:
        UserError: they need more memory than is free.
    """
    free, count = free_memory(device), model.num_parameters(nsp=nsp)
    if count * each > free:
        whole = "weights" if each == 4 else "weights, gradients and moments"
        raise UserError(
            f"model = {name!r} needs {_gib(count * each)} GiB ({count / 1e6:,.1f}M parameters x "
            f"{each:.3g} bytes of {whole}), but only {_gib(free)} GiB are free on {device}: give a "
            "smaller --model"
        )
    return round(count * each)


def check_workers(name: str, workers: int) -> None:
    """Refuses more data workers than the machine has a use or memory for.

    Raises:
        UserError: they are too many.
    """
    _check_count(name, workers)
    free = free_memory(torch.device("cpu"))
    if workers * _WORKER_BYTES > free:
        raise UserError(
            f"{name} = {workers} needs {_gib(workers * _WORKER_BYTES)} GiB, but only "
            f"{_gib(free)} GiB are free: at most {free // _WORKER_BYTES} fit"
        )


def check_threads(num_threads: int) -> None:
    """Refuses more threads than the machine has a use for: OpenMP spins on each.

    Raises:
        UserError: they are too many.
    """
    _check_count("num_threads", num_threads)


def _check_count(name: str, count: int) -> None:
    cores = available_cores()
    most = max(16, 4 * cores)
    if count > most:
        raise UserError(f"{name} = {count} must be at most {most} on {cores} CPU cores")


def _activations(model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that a layer keeps for a token between forward and backward.

    8 tensors of hidden_size and 2 of intermediate_size: inputs of the matrix products and norms, Q,
    K and V, the GELU's both sides.
    """
    return (8 * model.hidden_size + 2 * model.intermediate_size) * dtype.itemsize


def _gib(count: float) -> str:
    return f"{count / _GIB:,.1f}"


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """What activations are computed in, and why: fp32, bf16 or fp16.

    Raises:
        UserError: TF32 was asked for on a CPU.
    """
    hardware = fast_bf16(device)
    if precision == "tf32":
        if device.type != "cuda":
            raise UserError("precision = 'tf32' needs a GPU: use fp32")
        return torch.float32, "fp32, matrix products in TF32 (asked for)"
    if precision == "auto":
        if hardware:
            return torch.bfloat16, "bf16 with fp32 masters (hardware)"
        if device.type == "cuda":
            return torch.float16, "fp16 with fp32 masters (this GPU has no bf16 multiplication)"
        return torch.float32, "fp32 (this device has no bf16 multiplication)"
    if precision == "fp32":
        return torch.float32, "fp32 (asked for)"
    if precision == "fp16":
        return torch.float16, "fp16 with fp32 masters and dynamic loss scaling (asked for)"
    emulated = "" if hardware else ", emulated: slower than fp32 here"
    return torch.bfloat16, f"bf16 with fp32 masters (asked for{emulated})"


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


def _compile(
    config: PretrainConfig, model: ModelConfig, device: torch.device, kernels: bool
) -> tuple[bool, str]:
    compiler = can_compile(device)
    if config.torch_compile == "on":
        if not compiler:
            raise UserError("torch_compile = 'on' needs a C++ compiler: install g++, or use auto")
        return True, "on (asked for)"
    if config.torch_compile == "off":
        return False, "off (asked for)"
    if kernels:
        return False, "off (the Triton kernels are fused already)"
    if config.kernels == "reference" and device.type == "cpu":
        return False, "off (reference ops are not compiled)"
    if not compiler:
        return False, "off (no C++ compiler found)"
    flops = training_flops(model, config)
    if flops < _COMPILE_WORTH_FLOPS[device.type]:
        return False, f"off (the whole run is {flops:.1e} FLOPs: compiling would not pay)"
    return True, f"on (the whole run is {flops:.1e} FLOPs)"
