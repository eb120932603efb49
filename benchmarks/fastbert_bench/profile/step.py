"""Where a training step's time goes: `fastbert profile step`.

Our step, as `fastbert pretrain` runs it, recorded by torch.profiler after warm-up. Layers and ops
announce themselves as ranges, set up here; the backward finds its layer by autograd's sequence
numbers: each node carries that of the forward op that made it. Kernels of a CUDA graph know
neither, so they are matched with the eager step's, which run in the same order. On a CPU the
kernels are PyTorch's ops, each with the time that is its own.

Ops must move and compute what `kernels.costs` says, matrix products what their shapes say;
the floor is that at the best copy and the best product seen on this machine in the same run.
Letters of sizes are those of `kernels.costs`; S is the length that a token's sequence has.
"""

import contextlib
import dataclasses
import functools
import json
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from fastbert.commands.checks import check_output
from fastbert.config import ModelConfig, model_config
from fastbert.data.batch import Batch
from fastbert.errors import UserError
from fastbert.model.bert import Bert
from fastbert.ops import Ops
from fastbert.train.device import Execution, check_memory, choose_execution
from fastbert.train.graph import WARM_UP, launcher
from fastbert.train.step import TrainStep, compile_model
from fastbert_bench.config import ProfileStepConfig
from fastbert_bench.estimate.predictions import device_of
from fastbert_bench.estimate.step_cost import Lengths
from fastbert_bench.kernels.costs import COSTS, Ceilings, cost_of, rates
from fastbert_bench.measure import result, timing
from fastbert_bench.measure.lengths import lengths_asked
from fastbert_bench.measure.memory import profiler
from fastbert_bench.profile.trace import (
    BETWEEN,
    PRODUCTS,
    Kernel,
    Place,
    Recorded,
    analyse,
    label_like,
)
from fastbert_bench.suites.contenders import make_batches, make_recipe

RECORDED, TIMED = 3, 10
SHOWN, SHOWN_KERNELS = 30, 3
# The first that is found in a kernel's name tells whose it is.
_ORIGINS = (
    ("FlashAttention", r"flash_(fwd|bwd)|pytorch_flash"),
    ("cuDNN", r"cudnn"),
    ("cuBLAS", r"gemm|gemv|cublas|cutlass|nvjet|xmma|splitK"),
    ("copies", r"^Mem(cpy|set)"),
    ("torch", r""),
)

Call = Callable[..., Any]


# Ranges


def _announced(call: Call, name: Callable[..., str]) -> Call:
    def announced(*args: Any, **kwargs: Any) -> Any:
        with record_function(name(*args, **kwargs)):
            return call(*args, **kwargs)

    return announced


def _sizes_of_calls(S: int) -> dict[str, tuple[str, Callable[..., dict[str, int]]]]:
    """Field of the ops -> the op it is, and its sizes from its first arguments."""

    def rows(x: Any, *_: Any) -> dict[str, int]:
        return {"T": x.shape[0], "H": x.shape[1]}

    def linear(x: Any, weight: Any, *_: Any) -> dict[str, int]:
        return {"T": x.shape[0], "H": x.shape[1], "F": weight.shape[0]}

    def qkv_linear(x: Any, positions: Any, weight: Any, *_: Any) -> dict[str, int]:
        return linear(x, weight)

    def attention(q: Any, *_: Any) -> dict[str, int]:  # (T, 3, A, D), or (R, A, D)
        A, D = q.shape[-2:]
        return {"T": q.shape[0], "S": S, "H": A * D, "A": A}

    def embed(ids: Any, types: Any, positions: Any, word: Any, *_: Any) -> dict[str, int]:
        return {"T": ids.shape[0], "H": word.shape[1], "V": word.shape[0]}

    def cross_entropy(x: Any, word: Any, *_: Any) -> dict[str, int]:
        return {"M": x.shape[0], "H": x.shape[1], "V": word.shape[0]}

    return {
        "attention": ("attention", attention),
        "attention_at": ("attention", attention),
        "dropout_add_layer_norm": ("dropout_add_layer_norm", rows),
        "gelu_layer_norm": ("gelu_layer_norm", rows),
        "linear": ("linear", linear),
        "linear_residual": ("linear", linear),
        "qkv_linear_at": ("linear", qkv_linear),
        "linear_gelu_residual": ("linear_gelu", linear),
        "embed_layer_norm": ("embed_layer_norm", embed),
        "linear_cross_entropy": ("linear_cross_entropy", cross_entropy),
    }


def _announced_ops(ops: Ops, S: int) -> Ops:
    def named(field: str, op: str, sizes: Callable[..., dict[str, int]]) -> Call:
        def name(*args: Any, **_: Any) -> str:
            return " ".join((op, *(f"{key}={n}" for key, n in sizes(*args).items())))

        return _announced(getattr(ops, field), name)

    calls = _sizes_of_calls(S).items()
    changed: dict[str, Any] = {field: named(field, op, sizes) for field, (op, sizes) in calls}
    return dataclasses.replace(ops, **changed)


def _announce(step: TrainStep) -> None:
    """Makes layers, and the step's own parts, appear in what is recorded."""
    model, P = step.model, step.flat.master.numel()
    parts: list[tuple[Any, str, str]] = [(model.embeddings, "forward", "embeddings")]
    parts += [(layer, "forward", f"layer {i}") for i, layer in enumerate(model.layers)]
    parts += [(model.mlm, "forward", "masked words"), (model.pooler, "forward", "pooler")]
    parts += [(model.next_sentence, "forward", "next sentence"), (step, "begin", "counts")]
    parts += [(step.flat, "collect_gradients", "gradients"), (step, "update", "optimizer")]
    parts += [(step.optimizer, "update", f"{step.config.optim} P={P}")]
    for owner, method, name in parts:
        setattr(owner, method, _announced(getattr(owner, method), lambda *_, name=name, **__: name))


# Rows


def op_bytes(op: str, direction: str, sizes: Mapping[str, int], item: int) -> int:
    """Bytes of `kernels.costs`, whose activations are bf16, for items of another size."""
    moved = cost_of(op, direction).bytes_of(sizes)
    if op in ("adamw", "lamb"):  # fp32 weights need no rounded copy
        return moved - (2 * sizes["P"] if item == 4 else 0)
    return moved if op == "mask_tokens" else moved * item // 2


def figures(
    seconds: float, moved: float, flops: float, calls: float, found: Mapping[str, Any]
) -> dict[str, Any]:
    """How near the time of some calls is to what the machine could do, by its `ceilings`.

    A copy no smaller than what a call moves is the measure of it: caches are faster than memory.
    """
    copies = {int(size): rate for size, rate in found["copies"].items()}
    enough = [rate for size, rate in copies.items() if 2 * size >= moved / calls]
    ceilings = Ceilings(max(enough, default=copies[max(copies)]), found["matrix"])
    floor = ceilings.floor(moved, flops)
    return {
        **rates(moved, flops, seconds),
        "bound": "memory" if moved / ceilings.bandwidth >= flops / ceilings.matrix else "compute",
        "floor_share": floor / seconds,
        "gap_us": (seconds - floor) * 1e6,
    }


_UNKNOWN = dict.fromkeys(
    ("bytes", "flops", "gbps", "tflops", "bound", "floor_share", "gap_us"), None
)  # fmt: skip


def _origin(name: str, cuda: bool, ours: frozenset[str]) -> str:
    if not cuda:
        if name in (BETWEEN, "torch.compile"):
            return "Python and autograd" if name == BETWEEN else name
        return "matrix products" if name in PRODUCTS else "torch"
    if name in ours:
        return "our Triton kernels"
    return next(origin for origin, pattern in _ORIGINS if re.search(pattern, name))


def our_kernels() -> frozenset[str]:
    """Names of the Triton kernels of the kernel library."""
    from fastbert_bench.kernels.compile_report import shipped_cases

    return frozenset(case.fn.fn.__name__ for case in shipped_cases())


def rows_of(
    recorded: Recorded,
    found: Mapping[str, Any],
    dtype: torch.dtype,
    cuda: bool,
    ours: frozenset[str] = frozenset(),
) -> list[dict[str, Any]]:
    """One row for each op of each layer and direction, what is worth attacking first."""
    by_place: dict[Place, list[Kernel]] = defaultdict(list)
    for kernel in recorded.kernels:
        by_place[kernel.place].append(kernel)
    total = sum(kernel.us for kernel in recorded.kernels)
    rows = []
    for place, kernels in by_place.items():
        us = sum(kernel.us for kernel in kernels) / recorded.steps
        op, sizes = _op_and_sizes(place.op)
        called = recorded.calls[place] or recorded.calls[place._replace(direction="forward")]
        calls = (called or len(kernels)) / recorded.steps
        moved = sum(kernel.bytes for kernel in kernels) / recorded.steps
        flops = sum(kernel.flops for kernel in kernels) / recorded.steps
        known = (op, place.direction) in {(cost.op, cost.direction) for cost in COSTS}
        if known:
            moved = calls * op_bytes(op, place.direction, sizes, dtype.itemsize)
            flops = calls * cost_of(op, place.direction).flops_of(sizes)
        rows.append(
            {
                "name": " ".join(filter(None, place)),
                "layer": place.layer,
                "op": op,
                "sizes": sizes,
                "direction": place.direction,
                "calls": calls,
                "ms": us / 1e3,
                "share": us * recorded.steps / total,
                **(
                    figures(us / 1e6, moved, flops, calls if op else 1, found)
                    if moved
                    else _UNKNOWN
                ),
                "kernels": kernel_rows(kernels, recorded.steps, cuda, ours),
            }
        )
    return sorted(rows, key=_worth, reverse=True)


def _op_and_sizes(text: str) -> tuple[str, dict[str, int]]:
    op, *sizes = text.split() or [""]
    return op, {key: int(value) for key, _, value in (size.partition("=") for size in sizes)}


def _worth(row: Mapping[str, Any]) -> float:
    """The gap; all of its time where nothing is known of what it must do."""
    gap: float | None = row["gap_us"]
    return row["ms"] * 1e3 if gap is None else gap


def kernel_rows(
    kernels: Sequence[Kernel], steps: int, cuda: bool, ours: frozenset[str]
) -> list[dict[str, Any]]:
    """One row for each name, the longest time first."""
    times: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times[kernel.name].append(kernel.us)
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "origin": _origin(name, cuda, ours),
            "calls": len(us) / steps,
            "ms": sum(us) / steps / 1e3,
        }
        for name, us in times.items()
    ]
    return sorted(found, key=lambda row: -row["ms"])


def idle(recorded: Recorded) -> dict[str, Any]:
    """The device's time with nothing to do between a step's first kernel and its last."""
    spans, gaps = [], []
    for step in range(recorded.steps):
        kernels = [kernel for kernel in recorded.kernels if kernel.step == step]
        kernels.sort(key=lambda kernel: kernel.start)
        busy_until, before = kernels[0].start, kernels[0]
        for kernel in kernels:
            if kernel.start > busy_until:
                gaps.append((kernel.start - busy_until, before, kernel))
            if kernel.start + kernel.us > busy_until:
                busy_until, before = kernel.start + kernel.us, kernel
        spans.append(busy_until - kernels[0].start)
    longest: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for us, before, after in gaps:
        longest[before.name, after.name, " ".join(filter(None, after.place))].append(us)
    table: list[dict[str, Any]] = [
        {"us": sum(us) / recorded.steps, "gaps": len(us) / recorded.steps,
         "after": after, "before": before, "where": where}
        for (after, before, where), us in longest.items()
    ]  # fmt: skip
    return {
        "span_ms": sum(spans) / recorded.steps / 1e3,
        "idle_ms": sum(us for us, _, _ in gaps) / recorded.steps / 1e3,
        "gaps": len(gaps) / recorded.steps,
        "longest": sorted(table, key=lambda row: -row["us"])[:10],
    }


# Ceilings


def side_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A stream to capture on, which CUDA does not allow on the default one."""
    if device.type == "cuda":
        return torch.cuda.stream(torch.cuda.Stream(device))
    return contextlib.nullcontext()


def ceilings(
    device: torch.device, dtype: torch.dtype, products: Sequence[tuple[int, int, int]]
) -> dict[str, Any]:
    """The fastest copies and matrix products seen here, in bytes and FLOPs a second.

    Args:
        device, dtype: where, and of what.
        products: (rows, K, N) of the model's own, beside one large square.

    Returns:
        `matrix` and `bandwidth`, the latter of the largest copy; `copies`, by the bytes of what
        was copied; `products`, by shape.
    """
    # A CPU's caches copy faster than its memory, and a small model lives in them.
    sizes = (2**30,) if device.type == "cuda" else (2**18, 2**22, 2**26)
    n = 8192 if device.type == "cuda" else 512
    calls: dict[str, list[timing.Call]] = {}
    work: dict[str, float] = {}
    with side_stream(device):
        for size in sizes:
            source = timing.random_like((size // dtype.itemsize,), dtype, device)
            calls[str(size)] = [functools.partial(torch.empty_like(source).copy_, source)] * 4
            work[str(size)] = 2 * source.nbytes
        for rows, k, width in ((n, n, n), *dict.fromkeys(products)):
            a, b = (timing.random_like(shape, dtype, device) for shape in ((rows, k), (k, width)))
            out = torch.empty(rows, width, dtype=dtype, device=device)
            calls[f"{rows} x {k} x {width}"] = [functools.partial(torch.mm, a, b, out=out)] * 4
            work[f"{rows} x {k} x {width}"] = 2.0 * rows * k * width
        replays = {name: timing.Replay(repeated, device) for name, repeated in calls.items()}
        times = timing.interleaved(replays, device, rounds=10, seconds=3.0)
    rates = {name: work[name] / (min(times[name]) / 1e3) for name in work}
    copies = {str(size): rates.pop(str(size)) for size in sizes}
    return {
        "bandwidth": copies[str(max(sizes))],
        "matrix": max(rates.values()),
        "copies": copies,
        "products": rates,
    }


def model_products(sizes: ModelConfig, batch: Batch) -> list[tuple[int, int, int]]:
    """(rows, K, N) of the forward's matrix products."""
    T, M = batch.num_tokens, batch.masked_labels.numel()
    H, F, V = sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size
    return [(T, H, 3 * H), (T, H, H), (T, H, F), (T, F, H), (M, H, H), (M, H, V + -V % 64)]


# The command


class Runner:
    """Our step at the shape asked for, made anew for each way of launching it.

    Args:
        config: what is asked for.
        lengths: (B,) of the sequences, in place of those that `config` names.
        changes: settings of the recipe that are not the usual ones.
    """

    def __init__(
        self, config: ProfileStepConfig, lengths: np.ndarray | None = None, **changes: Any
    ) -> None:
        self.config, self.sizes = config, model_config(config.model)
        recipe = make_recipe(
            config.seed, device=config.device, precision=config.precision, step=config.step,
            model=config.model, max_seq_length=config.max_seq_length,
            tokens_per_batch=config.batch_size * config.max_seq_length, **changes,
        )  # fmt: skip
        self.recipe = recipe
        self.execution: Execution = choose_execution(recipe, self.sizes)
        # What depends on the length of a run is chosen for one of many steps.
        told, long = r"\(the whole run is .*", f"(as in a run of {recipe.max_steps:,} steps)"
        self.reasons = [re.sub(told, long, line) for line in self.execution.reasons]
        self.device = self.execution.device
        check_memory(recipe, self.sizes, self.device, self.execution.dtype)
        rng = np.random.default_rng(config.seed)
        if lengths is None:
            B, S = config.batch_size, config.max_seq_length
            lengths = lengths_asked(config.lengths, B, S, rng)
        _, packed = make_batches(lengths, config.max_seq_length, self.sizes.vocab_size, rng)
        self.batches = [batch.to(self.device) for batch in packed]
        self.lengths = Lengths.of(lengths)
        self.mean_length = round(self.lengths.attended)

    def launch(self, graph: bool) -> Callable[[Sequence[Batch]], None]:
        """A step that announces its parts, warmed up."""
        torch.manual_seed(self.config.seed)
        ops = _announced_ops(self.execution.ops, self.mean_length)
        model = Bert(self.sizes, ops).to(self.device)
        compiled = self.execution.compile and self.device.type == "cuda"
        step = TrainStep(model, self.recipe, self.execution.dtype, main_grads=not compiled)
        if compiled:
            compile_model(model)
        _announce(step)
        launch = launcher(step, graph, accumulates=False)
        for index in range(WARM_UP + 2):
            launch([self.batches[index % len(self.batches)]])
        self.wait()
        return launch

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, launch: Callable[[Sequence[Batch]], None]) -> list[float]:
        """Of each of some steps, not recorded."""
        times = []
        for index in range(TIMED):
            started = time.perf_counter()
            launch([self.batches[index % len(self.batches)]])
            self.wait()
            times.append(time.perf_counter() - started)
        return times

    def record(self, launch: Callable[[Sequence[Batch]], None], path: Path) -> Recorded:
        """Records steps, host and device waiting for each other in between."""
        cuda = self.device.type == "cuda"
        with profiler(cuda, record_shapes=True) as recorded:
            launch([self.batches[0]])  # the profiler's own first costs
            self.wait()
            for index in range(RECORDED):
                with record_function(f"step {index}"):
                    launch([self.batches[index % len(self.batches)]])
                self.wait()
        try:
            recorded.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, RuntimeError) as error:
            raise UserError(f"trace = {str(path)!r}: cannot be written: {error}") from None
        return analyse(trace, cuda)


def trace_path(config: ProfileStepConfig) -> Path:
    return Path(config.trace) if config.trace else Path(config.json).with_suffix(".trace.json")


def run(config: ProfileStepConfig) -> dict[str, Any]:
    """Records a step as `config` says and returns the result."""
    runner = Runner(config)
    device, execution = runner.device, runner.execution
    cuda = device.type == "cuda"
    found = ceilings(device, execution.dtype, model_products(runner.sizes, runner.batches[0]))
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "eager.json" if execution.graph else trace_path(config)
        launch = runner.launch(graph=False)
        recorded = runner.record(launch, path)
        times = runner.seconds(launch)
    if execution.graph:
        del launch  # and its weights
        launch = runner.launch(graph=True)
        recorded = label_like(runner.record(launch, trace_path(config)), recorded)
        times = runner.seconds(launch)
    if not cuda:
        missing = [
            {"name": "idle time between kernels", "why": "a CPU has no queue of kernels"},
            {"name": "our Triton kernels", "why": "they need a GPU"},
        ]
    ours = our_kernels() if cuda and execution.ops.kernels else frozenset[str]()
    rows = rows_of(recorded, found, execution.dtype, cuda, ours)
    origins: Counter[str] = Counter()
    for row in rows:
        for kernel in row["kernels"]:
            origins[kernel["origin"]] += kernel["ms"]
    milliseconds = [1e3 * seconds for seconds in times]
    batch = runner.batches[0]
    made = result.make(
        "profile-step", dataclasses.asdict(config), device, rows, missing,
        execution=runner.reasons,
        dtype=str(execution.dtype).removeprefix("torch."),
        real_tokens=batch.num_tokens,
        sequences=batch.num_sequences,
        attribution="kernels matched with the eager step's, in their order" if execution.graph
        else "forward by ranges, backward by autograd's sequence numbers",
        step=timing.quantiles(milliseconds) | {
            "recorded_ms": sum(row["ms"] for row in rows), "recorded_steps": recorded.steps,
            "launched": "graph" if execution.graph else "eager",
        },
        ceilings=found,
        idle=idle(recorded) if cuda else None,
        host_syncs=recorded.host_syncs(),
        origins=dict(origins.most_common()),
        trace=str(trace_path(config)),
    )  # fmt: skip
    made["on_paper"] = on_paper(
        made["conditions"]["device"], runner.sizes, batch.num_tokens, runner.lengths
    )
    return made


def on_paper(
    device_name: str, sizes: ModelConfig, tokens: int, lengths: Lengths
) -> dict[str, Any] | None:
    """What `fastbert estimate` expects of such a step; None where it does not know the device."""
    device = device_of(device_name)
    if device is None:
        return None
    cost = device.step(sizes, tokens, lengths)
    return {
        "ms": cost.seconds * 1e3, "low_ms": cost.low * 1e3, "high_ms": cost.high * 1e3,
        "families": {one.name: one.seconds * 1e3 for one in cost.families},
    }  # fmt: skip


def _merged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ in the encoder layer only, added up."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kind = "layer" if row["layer"].startswith("layer ") else row["layer"]
        groups[kind, row["op"], tuple(row["sizes"].items()), row["direction"]].append(row)
    merged = []
    for same in groups.values():
        total = dict(same[0])
        for key in ("calls", "ms", "share", "bytes", "flops", "gap_us"):
            total[key] = sum(row[key] for row in same) if same[0][key] is not None else None
        seconds = total["ms"] / 1e3
        if total["bytes"] is not None:
            total["gbps"] = total["bytes"] / seconds / 1e9
            total["tflops"] = total["flops"] / seconds / 1e12
            total["floor_share"] = 1 - total["gap_us"] / 1e6 / seconds
        numbers = sorted(int(row["layer"].split()[1]) for row in same) if len(same) > 1 else []
        if numbers:
            total["layer"] = f"layers {numbers[0]}-{numbers[-1]}"
        kernels: dict[str, dict[str, Any]] = {}
        for kernel in (kernel for row in same for kernel in row["kernels"]):
            added = kernels.setdefault(kernel["name"], kernel | {"calls": 0, "ms": 0.0})
            added["calls"] += kernel["calls"]
            added["ms"] += kernel["ms"]
        total["kernels"] = sorted(kernels.values(), key=lambda kernel: -kernel["ms"])
        merged.append(total)
    return sorted(merged, key=_worth, reverse=True)


def _cell(value: float | None, scale: float = 1.0, form: str = ".1f") -> str:
    return "-" if value is None else format(value / scale, form)


def _is_whole(calls: float) -> bool:
    return abs(calls - round(calls)) < 1e-6


def _calls(calls: float) -> str:
    """How often a step does something; with a decimal where not every step does it as often."""
    return format(calls, ".0f" if _is_whole(calls) else ".1f")


def table(found: Mapping[str, Any]) -> str:
    """The result as text: encoder layers that do the same are one line."""
    rows = _merged(found["rows"])
    lines = [
        f"{'layer':<17}{'op':<46}{'':<9}{'calls':>6}{'ms/step':>9}{'share':>7}{'MB':>9}{'GFLOP':>8}"
        f"{'GB/s':>8}{'TFLOP/s':>8}{'of ceiling':>19}{'gap us':>9}"
    ]
    for row in rows[:SHOWN]:
        op = " ".join((row["op"] or "other", *(f"{k}={v}" for k, v in row["sizes"].items())))
        share = "-" if row["gap_us"] is None else f"{row['floor_share']:.0%} of {row['bound']}"
        lines.append(
            f"{row['layer']:<17}{op:<46}{row['direction']:<9}{_calls(row['calls']):>6}{row['ms']:>9.3f}"
            f"{row['share']:>7.1%}{_cell(row['bytes'], 1e6):>9}{_cell(row['flops'], 1e9):>8}"
            f"{_cell(row['gbps']):>8}{_cell(row['tflops'], 1, '.3f'):>8}{share:>19}"
            f"{_cell(row['gap_us'], 1, ',.0f'):>9}"
        )
        for kernel in row["kernels"][:SHOWN_KERNELS]:
            if kernel["ms"] < 0.1 * row["ms"]:
                break
            name = f"  {kernel['name']}"[:60]
            lines.append(
                f"{name:<72}{_calls(kernel['calls']):>6}{kernel['ms']:>9.3f}  {kernel['origin']}"
            )
    if len(rows) > SHOWN:
        rest = sum(row["ms"] for row in rows[SHOWN:])
        lines.append(f"... {len(rows) - SHOWN} more rows, {rest:.3f} ms together, in the JSON")
    return "\n".join(lines)


def _summary(found: Mapping[str, Any]) -> str:
    step, idle_time = found["step"], found["idle"]
    total = step["recorded_ms"]
    lines = [
        f"{step['launched']} step: {step['ms']:.3f} ms "
        f"({step['ms_p20']:.3f}-{step['ms_p80']:.3f}); recorded {total:.3f} ms of "
        f"{'kernels' if idle_time else 'ops'} a step, mean of {step['recorded_steps']}",
        "ceilings here, now: "
        + ", ".join(
            f"{rate / 1e9:,.1f} GB/s (copy of {int(size) / 2**20:g} MiB)"
            for size, rate in found["ceilings"]["copies"].items()
        )
        + f", {found['ceilings']['matrix'] / 1e12:,.3f} TFLOP/s multiplied",
        f"layers: {found['attribution']}",
        "whose: " + ", ".join(f"{name} {ms / total:.1%}" for name, ms in found["origins"].items()),
    ]
    if paper := found["on_paper"]:
        longest = sorted(paper["families"].items(), key=lambda item: -item[1])[:4]
        lines.append(
            f"on paper (fastbert estimate): {paper['ms']:.3f} ms in bf16 ({paper['low_ms']:.3f} to "
            f"{paper['high_ms']:.3f}): "
            + ", ".join(f"{name} {ms:.3f}" for name, ms in longest)
            + f"; the step took {step['ms'] / paper['ms']:.2f} times as long"
        )
    if idle_time:
        lines.append(
            f"idle: {idle_time['idle_ms']:.3f} of {idle_time['span_ms']:.3f} ms a step, in "
            f"{_calls(idle_time['gaps'])} gaps between kernels"
        )
        lines += [
            f"  {gap['us']:8.1f} us in {_calls(gap['gaps'])}: {gap['after'][:50]} -> "
            f"{gap['before'][:50]} ({gap['where']})"
            for gap in idle_time["longest"][:5]
        ]
    questions = sum(sync["calls"] for sync in found["host_syncs"])
    free = "" if idle_time else " (free on a CPU; on a GPU each makes the host wait)"
    lines.append(f"host syncs: {_calls(questions)} a step{free if questions else ''}")
    for sync in found["host_syncs"]:
        calls, steps = sync["calls"], step["recorded_steps"]
        often = f"{calls:.0f}" if _is_whole(calls) else f"in {steps} steps {calls * steps:.0f}"
        lines.append(f"  {often} x {sync['name']} in {sync['where']}")
    return "\n".join(lines)


def main(config: ProfileStepConfig) -> None:
    """Records the step, prints its table, writes the trace and the JSON.

    Raises:
        UserError: settings that do not fit, or no trace can be written.
        RunError: a file that cannot be written.
    """
    check_output("trace", str(trace_path(config)))
    found = run(config)
    asked = (
        f"{config.model}, {found['sequences']} sequences of at most {config.max_seq_length}, "
        f"{found['real_tokens']} real tokens"
    )
    lines = [
        *found["execution"],
        table(found),
        _summary(found),
        *(f"missing: {one['name']}: {one['why']}" for one in found["missing"]),
        f"table: {config.json}; trace: {found['trace']} (opens in ui.perfetto.dev)",
    ]
    result.finish(found, config.json, asked, "\n".join(lines))
