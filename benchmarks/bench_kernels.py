"""Each op beside its peers: `fastbert bench kernels`.

On a GPU this is the stage `kernels` of `benchmarks.gpu`: every op in a process of its own, checked
against the reference before it is timed, L2 cold, by events. Where a check of an op fails, its
times are not admitted. On a CPU it times what runs there: our ops for a CPU, the reference that
says what they compute, plain PyTorch, and the reference under torch.compile; their outputs are
compared first. Bytes are those of the table in `benchmarks.kernels`, with storage in bf16; a CPU
computes in fp32 and so moves up to twice as much.

T tokens, S sequence length, H hidden size, A heads, V vocabulary, M masked tokens, P parameters.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import gpu_kernels, kernel_timings, timing
from benchmarks import result as results
from benchmarks.kernel_timings import DROPOUT_P, EPS, PAD, Built, Contender, Inputs, Workload
from benchmarks.kernels import cost_of, model_sizes
from benchmarks.result import Row
from fastbert.config import KERNEL_OPS, KernelBenchConfig
from fastbert.errors import RunError
from fastbert.ops import REFERENCE, cpu_ops
from fastbert.train.device import can_compile, choose_device, keep_freed_memory
from fastbert_kernels import reference, reference_optimizer

TOLERANCE = 1e-4  # of an output in fp32, relative to its largest element
ROUNDS, SECONDS = 20, 1.0

Missing = dict[str, str]


# On a CPU


def cpu_sizes(quick: bool) -> dict[str, int]:
    """BERT-mini's width on 2,048 tokens; `quick`: a toy's."""
    H, S, T, V = (64, 16, 48, 1000) if quick else (256, 128, 2048, 8192)
    P = sum(kernel_timings.parameter_sizes(H, 1, V))
    return model_sizes(H, S, T) | {"V": V, "P": P}


def _call_of(
    op: str, sizes: dict[str, int]
) -> tuple[tuple[str, ...], Callable[[Callable[..., Any], Inputs, Sequence[Tensor]], Any]]:
    """Names of an op's leaves, and how it is called with them."""
    T, S = sizes["T"], sizes["S"]
    cu_seqlens = torch.arange(0, T + 1, S, dtype=torch.int32)
    positions = torch.arange(T) % S
    random = (DROPOUT_P, torch.tensor([1, 2, 3]), 1)
    known: dict[str, Any] = {
        "attention": (("qkv",), lambda f, i, x: f(*x, cu_seqlens, S, *random)),
        "dropout_add_layer_norm": (
            ("x", "bias", "residual", "weight", "beta"), lambda f, i, x: f(*x, EPS, *random),
        ),
        "linear_cross_entropy": (("x", "weight", "bias"), lambda f, i, x: f(*x, i["labels"])),
        "linear_gelu": (("x", "weight", "bias"), lambda f, i, x: f(*x)),
        "bias_gelu": (("x", "bias"), lambda f, i, x: f(*x)),
        "gelu_layer_norm": (("x", "bias", "weight", "beta"), lambda f, i, x: f(*x, EPS)),
        "embed_layer_norm": (
            ("word", "token_type", "position", "weight", "beta"),
            lambda f, i, x: f(i["ids"], i["types"], positions, *x, PAD, EPS, *random),
        ),
    }  # fmt: skip
    names, call = known[op]
    return names, call


def _missing(why: str) -> Contender:
    return Contender("ours", kernel_timings.missing(why))


def cpu_workload(op: str, quick: bool) -> Workload:
    """One op with everybody who can do it on a CPU; ours first."""
    sizes, device = cpu_sizes(quick), torch.device("cpu")
    torch._dynamo.reset()
    # Its peers read the same inputs; those that need a GPU are left out.
    theirs = kernel_timings.WORKLOADS[op](device, torch.float32, sizes)
    plain = [c for c in theirs.contenders if c.name in ("eager", "torch fused", "torch foreach")]
    if op in ("adamw", "lamb"):
        step = cpu_ops(False).adamw_step if op == "adamw" else _lamb(sizes)
        ours = Contender("ours", functools.partial(_optimizer, step, sizes))
        same = Contender("reference", kernel_timings.missing("on a CPU, ours is the reference"))
        return dataclasses.replace(theirs, contenders=[ours, same, *plain])
    if op == "mask_tokens":
        ours = _missing("on a CPU, words are masked while they are packed: see bench data")
        masked = Contender("reference", functools.partial(_masked, sizes["V"]))
        return dataclasses.replace(theirs, contenders=[ours, masked, *plain])
    names, call = _call_of(op, sizes)

    def by(function: Callable[..., Any]) -> Callable[[Inputs], Built]:
        def build(inputs: Inputs) -> Built:
            leaves = [kernel_timings.leaf(inputs[name]) for name in names]
            return leaves, lambda: call(function, inputs, leaves)

        return build

    law: Any = reference.bias_gelu if op == "bias_gelu" else getattr(REFERENCE, op)
    compiler = can_compile(device)
    ours = (
        _missing("on a CPU, the bias is added by the product before it: see linear_gelu")
        if op == "bias_gelu"
        else Contender("ours", by(getattr(cpu_ops(compiler), op)))
    )
    compiled = (
        by(torch.compile(law, dynamic=False))
        if compiler
        else kernel_timings.missing("torch.compile needs a C++ compiler here")
    )
    rest = [Contender("reference", by(law)), *plain, Contender("compile", compiled)]
    return dataclasses.replace(theirs, contenders=[ours, *rest])


def _optimizer(step: Callable[..., None], sizes: dict[str, int], inputs: Inputs) -> Built:
    numels = kernel_timings.parameter_sizes(sizes["H"], 1, sizes["V"])
    spans = kernel_timings.aligned_spans(numels)
    arguments: dict[str, Any] = inputs | {
        "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.01, "max_grad_norm": 1.0,
        "decay_end": spans[3 + 6 + 3][0],  # embeddings, a layer's matrices, the heads'
        "weights": None,  # on a CPU the masters are the weights
    }  # fmt: skip
    return [], functools.partial(step, **arguments)


def _lamb(sizes: dict[str, int]) -> Callable[..., None]:
    numels = kernel_timings.parameter_sizes(sizes["H"], 1, sizes["V"])
    spans = kernel_timings.aligned_spans(numels)
    return functools.partial(cpu_ops(False).lamb_step, spans=spans)


def _masked(V: int, inputs: Inputs) -> Built:
    is_special = torch.arange(V) < 5
    seed = torch.tensor([1, 2, 3])
    masked = reference_optimizer.mask_tokens
    return [], lambda: masked(inputs["ids"], is_special, seed, 0.15, 4)


def check_same(workload: Workload) -> None:
    """Compares those that draw the same dropout bits.

    Raises:
        RunError: outputs differ by more than rounding.
    """
    inputs = workload.inputs()
    found: dict[str, Tensor] = {}
    if workload.directions == ("step",):
        return
    for contender in workload.contenders:
        if contender.name not in ("ours", "reference", "compile"):
            continue
        with contextlib.suppress(kernel_timings.MissingError):
            found[contender.name] = contender.build(inputs)[1]().detach()
    law = found["reference"]
    for name, out in found.items():
        difference = float((out - law).abs().max() / law.abs().max())
        if not difference <= TOLERANCE:
            raise RunError(
                f"not comparable: {workload.op} by {name} and by reference differ by "
                f"{difference:.2g} of the largest element; rounding leaves less than {TOLERANCE:g}"
            )


def measure(workload: Workload, rounds: int) -> Iterator[tuple[list[Row], list[Missing]]]:
    """Rows of each direction, ours first, and who is missing."""
    device = torch.device("cpu")
    sets = [workload.inputs() for _ in range(timing.clones_needed(1, device))]
    for direction in workload.directions:
        replays: dict[str, timing.Replay] = {}
        missing: list[Missing] = []
        for contender in workload.contenders:
            name = f"{workload.op} {direction}, {contender.name}"
            try:
                calls = kernel_timings.calls_of(contender, direction, sets)
                replays[contender.name] = timing.Replay(calls, device)
            except kernel_timings.MissingError as error:
                missing.append({"name": name, "why": str(error)})
        times = timing.interleaved(replays, device, rounds, seconds=SECONDS)
        told = {"op": workload.op, "direction": direction, "sizes": workload.sizes}
        rows = [
            told | {"contender": name, "rounds_ms": ms} | timing.quantiles(ms)
            for name, ms in times.items()
        ]
        yield common(rows), missing


def common(rows: Sequence[Row]) -> list[Row]:
    """Rows of one op, direction and size as the schema has them.

    Each is compared with ours, without dropout where it has none, or with the first where ours is
    missing. Ratios are medians of the rounds' own ratios where each round is known.
    """
    made = []
    by_name = {row["contender"]: row for row in rows}
    for row in rows:
        cost, sizes, seconds = cost_of(row["op"], row["direction"]), row["sizes"], row["ms"] / 1e3
        moved, flops = cost.bytes_of(sizes), cost.flops_of(sizes)
        base = by_name.get("ours", rows[0])
        if row["contender"].endswith(" p=0"):
            base = by_name.get("ours p=0", base)
        ratio = row["ms"] / base["ms"]
        if "rounds_ms" in row:
            ratio = float(np.median(np.array(row["rounds_ms"]) / np.array(base["rounds_ms"])))
        kept = ("op", "direction", "contender", "sizes", "ms", "ms_p20", "ms_p80", "rounds_ms",
                "floor_ms", "floor_share", "target", "target_met")  # fmt: skip
        shape = f"H={sizes['H']} S={sizes['S']}"
        made.append(
            {"name": f"{row['op']} {row['direction']} {shape}, {row['contender']}"}
            | {key: row[key] for key in kept if key in row}
            | {"bytes": moved, "flops": flops, "gbps": moved / seconds / 1e9}
            | {"tflops": flops / seconds / 1e12}
            | {"ratio": ratio, "compared_with": base["contender"]}
        )
    return made


def on_cpu(ops: Sequence[str], quick: bool) -> dict[str, Any]:
    """Times `ops` here; returns `rows` and `missing`."""
    keep_freed_memory()  # for everybody
    rows: list[Row] = []
    missing: list[Missing] = []
    bar = tqdm(ops, desc="ops", unit="op", file=sys.stderr)
    for op in bar:
        bar.set_postfix_str(op)
        torch.manual_seed(0)
        workload = cpu_workload(op, quick)
        check_same(workload)
        for found, absent in measure(workload, 3 if quick else ROUNDS):
            rows += found
            missing += absent
    return {"rows": rows, "missing": missing}


# On a GPU


def on_gpu(ops: Sequence[str], quick: bool, device_type: str = "cuda") -> dict[str, Any]:
    """Runs the stage and returns `rows`, `missing`, and its ceilings and checks."""
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
        with contextlib.redirect_stdout(sys.stderr):
            gpu_kernels.run(Path(folder), quick, ops=ops, device_type=device_type)
        stage = json.loads((Path(folder) / "kernels.json").read_text(encoding="utf-8"))
    return from_stage(stage)


def from_stage(stage: dict[str, Any]) -> dict[str, Any]:
    """The stage's findings in the common form: a row with its times, or who is missing and why."""
    rows: list[Row] = []
    missing: list[Missing] = []
    for op, found in stage["ops"].items():
        failed = [check["check"] for check in found["checks"] if check["ok"] is False]
        if found["error"]:
            missing.append({"name": op, "why": found["error"]})
        if failed:
            why = f"not comparable: {len(failed)} checks against the reference fail: {failed[0]}"
            missing.append({"name": op, "why": why})
            continue
        of_op = [row for row in stage["rows"] if row["op"] == op]
        for row in of_op:
            if "why" in row:
                name = f"{op} {row['direction']}, {row['contender']}"
                missing.append({"name": name, "why": row["why"]})
        timed = [row for row in of_op if "ms" in row]
        for _, same in itertools.groupby(timed, lambda row: (row["direction"], row["sizes"])):
            rows += common(list(same))
    checks = {op: found["checks"] for op, found in stage["ops"].items()}
    return {
        "rows": rows, "missing": missing, "ceilings": stage.get("ceilings"), "checks": checks,
    }  # fmt: skip


def run(config: KernelBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns the result."""
    device = choose_device(config.device)
    ops = KERNEL_OPS if config.op == "all" else config.op.split(",")
    found = on_gpu(ops, config.quick) if device.type == "cuda" else on_cpu(ops, config.quick)
    return results.make("kernels", dataclasses.asdict(config), device, **found)


def table(result: dict[str, Any]) -> str:
    """The rows as text, one line each, and a line for each that is missing."""
    lines = [f"{'op':<58}{'ms':>9}{'p20':>9}{'p80':>9}{'GB/s':>8}{'TFLOP/s':>9}"]
    for row in result["rows"]:
        rate = f"{row['tflops']:.2f}" if row["flops"] else "-"
        compared = f"   {row['compared_with']} is {row['ratio']:.2f}x as fast"
        lines.append(
            f"{row['name']:<58}{row['ms']:>9.3f}{row['ms_p20']:>9.3f}{row['ms_p80']:>9.3f}"
            f"{row['gbps']:>8.1f}{rate:>9}{compared if row['ratio'] != 1 else ''}"
        )
    lines += [f"{one['name']:<58}missing: {one['why']}" for one in result["missing"]]
    return "\n".join(lines)


def main(config: KernelBenchConfig) -> None:
    """Runs the benchmark, prints its table, writes JSON where asked.

    Raises:
        RunError: contenders that do not compute the same thing.
    """
    result = run(config)
    told = result["conditions"]
    print(f"{told['device']}, {told['threads']} threads, torch {told['torch']}")
    print(table(result))
    if config.json:
        results.write(result, Path(config.json))
