"""Each op beside its peers: `fastbert bench kernels`.

On a GPU this is the stage `kernels` of `python -m fastbert_bench.gpu`: every op in a process of its
own, checked against the reference before it is timed, L2 cold, by events. Where a check of an op
fails, its times are not admitted. On a CPU it times what runs there: our ops for a CPU, the
reference that says what they compute, plain PyTorch, and the reference under torch.compile; their
outputs are compared first. Bytes are those of the table in `kernels.costs`, with storage in bf16; a
CPU computes in fp32 and so moves up to twice as much.

Real tokens a second are those of the batch that an op serves; sequences a second are attention's,
which alone sees where one ends. Peers that cannot take packed sequences get them padded where
lengths differ, and their pads are no work. Peak memory is what one call holds beside its inputs.

T tokens, S longest sequence, H hidden size, A heads, F width inside the MLP, V vocabulary, M masked
tokens, P parameters, L layers, N sequences, s mean length of the sequence that a token stands in.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.config import PRESETS, model_config
from fastbert.errors import RunError
from fastbert.progress import progress_bar
from fastbert.train.device import (
    can_compile,
    check_weights,
    choose_device,
    keep_freed_memory,
)
from fastbert_bench.config import KERNEL_OPS, KernelBenchConfig
from fastbert_bench.kernels import stage as kernel_stage
from fastbert_bench.kernels import timings as kernel_timings
from fastbert_bench.kernels.costs import WHOLE, model_sizes, rates
from fastbert_bench.kernels.timings import (
    Asked,
    Contender,
    Workload,
    costs,
    missing,
    peer_of,
)
from fastbert_bench.measure import result as results
from fastbert_bench.measure.energy import EnergyMeter
from fastbert_bench.measure.lengths import file_lengths
from fastbert_bench.measure.result import Row, gaps

TOLERANCE = 1e-4  # of an output in fp32, relative to its largest element
ROUNDS, SECONDS = 20, 1.0
SECONDS_OF_ENERGY, SECONDS_OF_AN_OP = 0.5, 300.0
ON_CPU = ("eager", "bare gemm", "bare gemms", "torch's own", "torch fused", "torch foreach")
"""Peers of the GPU's that a CPU runs as well; "compile" has a backend of its own here."""
ON_GPU = ("fa2", "fa3", "fa4", "cudnn", "liger")

Missing = dict[str, str]


# On a CPU


def cpu_sizes(quick: bool, model: str = "auto") -> dict[str, int]:
    """A model's widths on 2,048 tokens and one layer's parameters; auto: those of BERT-mini.

    `quick`: few tokens, and auto is a toy.
    """
    H, S, T, V = (64, 16, 48, 1000) if quick else (256, 128, 2048, 8192)
    sizes = model_sizes(H, S, T) | {"V": V}
    if model != "auto":
        sizes = kernel_timings.sizes_of(model, S, T) | {"L": 1}
    numels = kernel_timings.parameter_sizes(sizes["H"], 1, sizes["V"], sizes["F"])
    return sizes | {"L": 1, "P": sum(numels)}


def cpu_workload(op: str, quick: bool, asked: Asked = kernel_timings.STAGE) -> Workload:
    """One op with everybody who can do it on a CPU, or why not; ours first."""
    sizes, device = cpu_sizes(quick, asked.model), torch.device("cpu")
    torch._dynamo.reset()
    # Its peers read the same inputs.
    theirs = kernel_timings.workload(op, device, torch.float32, sizes, asked.lengths)
    plain = [c for c in theirs.contenders if c.name in ON_CPU]
    needs = missing("needs a GPU")
    there = {peer_of(c.name): c for c in theirs.contenders if peer_of(c.name) in ON_GPU}
    # Liger has no GELU of this kind anywhere, which its contender says.
    plain += [c if op == "bias_gelu" else Contender(name, needs) for name, c in there.items()]
    compiler, law, by = can_compile(device), kernel_timings.law_of(op), theirs.by
    why_not = {
        "bias_gelu": "on a CPU, the bias is added by the product before it: see linear_gelu",
        "mask_tokens": "on a CPU, words are masked while they are packed: see bench data",
    }.get(op)
    ours = missing(why_not) if why_not else by(kernel_timings.cpu_op(op, compiler))
    same, compiled = by(law), missing("torch.compile needs a C++ compiler here")
    if op in WHOLE:
        same = missing("on a CPU, ours is the reference")
    elif compiler:
        compiled = by(torch.compile(law, dynamic=False))
    if op == "lamb":
        adamw = kernel_timings.workload("adamw", device, torch.float32, sizes)
        plain.append(Contender("adamw", adamw.by(kernel_timings.cpu_op("adamw", compiler))))
    if theirs.directions != ("step",):
        plain.append(Contender("compile", compiled))
    rest = [Contender("reference", same), *plain]
    return dataclasses.replace(theirs, contenders=[Contender("ours", ours), *rest])


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


def common(rows: Sequence[Row]) -> list[Row]:
    """Rows of one op, direction and size as the schema has them.

    Each is compared with ours, without dropout where it has none, or with the first where ours is
    missing. Ratios are medians of the rounds' own ratios where each round is known.
    """
    made = []
    by_name = {row["contender"]: row for row in rows}
    for row in rows:
        sizes, seconds = row["sizes"], row["ms"] / 1e3
        moved, flops, _ = costs(row["op"], row["direction"], sizes)
        base = by_name.get("ours", rows[0])
        if row["contender"].endswith(" p=0"):
            base = by_name.get("ours p=0", base)
        ratio = row["ms"] / base["ms"]
        if "rounds_ms" in row:
            ratio = float(np.median(np.array(row["rounds_ms"]) / np.array(base["rounds_ms"])))
        kept = ("op", "direction", "contender", "sizes", "ms", "ms_p20", "ms_p80", "rounds_ms",
                "real_tokens_per_second", "sequences_per_second", "mfu", "peak_memory_bytes",
                "watts", "joules_per_million_tokens", "floor_ms", "floor_share", "target",
                "target_met")  # fmt: skip
        shape = f"H={sizes['H']} S={sizes['S']}"
        made.append(
            {"name": f"{row['op']} {row['direction']} {shape}, {row['contender']}"}
            | {key: row[key] for key in kept if key in row}
            | rates(moved, flops, seconds)
            | {"ratio": ratio, "compared_with": base["contender"]}
        )
    return made


def on_cpu(ops: Sequence[str], quick: bool, asked: Asked = kernel_timings.STAGE) -> dict[str, Any]:
    """Times `ops` here; returns `rows` and `missing`."""
    keep_freed_memory()  # for everybody
    rows: list[Row] = []
    absent: list[Missing] = []
    bar = progress_bar(ops, desc="ops", unit="op")
    for op in bar:
        bar.set_postfix_str(op)
        torch.manual_seed(0)
        workload = cpu_workload(op, quick, asked)
        check_same(workload)
        timed = [one for one in workload.contenders if asked.admits(one.name)]
        for found in kernel_timings.measure(
            dataclasses.replace(workload, contenders=timed), torch.device("cpu"),
            3 if quick else ROUNDS, SECONDS, asked, must=("ours", "reference"),
        ):  # fmt: skip
            rows += common([row for row in found if "ms" in row])
            absent += _absent(found)
    return {"rows": rows, "missing": absent}


def _absent(rows: Sequence[Row]) -> list[Missing]:
    """Who has no time, and why."""
    return [
        {"name": f"{row['op']} {row['direction']}, {row['contender']}", "why": row["why"]}
        for row in rows
        if "why" in row
    ]


# On a GPU


def on_gpu(
    ops: Sequence[str],
    quick: bool,
    asked: Asked = kernel_timings.STAGE,
    device_type: str = "cuda",
) -> dict[str, Any]:
    """Runs the stage and returns `rows`, `missing`, and its ceilings and checks."""
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
        with contextlib.redirect_stdout(sys.stderr):
            kernel_stage.run(
                Path(folder), quick, ops=ops, device_type=device_type, timeout=SECONDS_OF_AN_OP,
                asked=dataclasses.asdict(asked),
            )  # fmt: skip
        stage = json.loads((Path(folder) / "kernels.json").read_text(encoding="utf-8"))
    return from_stage(stage)


def from_stage(stage: dict[str, Any]) -> dict[str, Any]:
    """The stage's findings in the common form: a row with its times, or who is missing and why."""
    rows: list[Row] = []
    absent: list[Missing] = []
    for op, found in stage["ops"].items():
        failed = [check["check"] for check in found["checks"] if check["ok"] is False]
        if found["error"]:
            absent.append({"name": op, "why": found["error"]})
        if failed:
            why = f"not comparable: {len(failed)} checks against the reference fail: {failed[0]}"
            absent.append({"name": op, "why": why})
            continue
        of_op = [row for row in stage["rows"] if row["op"] == op]
        absent += _absent(of_op)
        timed = [row for row in of_op if "ms" in row]
        for _, same in itertools.groupby(timed, lambda row: (row["direction"], row["sizes"])):
            rows += common(list(same))
    checks = {op: found["checks"] for op, found in stage["ops"].items()}
    return {
        "rows": rows, "missing": absent, "ceilings": stage.get("ceilings"), "checks": checks,
    }  # fmt: skip


def run(config: KernelBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns the result."""
    device = choose_device(config.device)
    ops = KERNEL_OPS if config.op == "all" else config.op.split(",")
    model, lengths = config.model, config.lengths
    if model != "auto":  # two layers' worth: operands, results and their gradients
        sizes = dataclasses.replace(model_config(model), num_hidden_layers=2)
        check_weights(model, sizes, device)
    # The processes of a GPU's ops work in another folder.
    if model not in ("auto", *PRESETS):
        model = os.path.abspath(model)
    if lengths not in ("natural", "full"):
        lengths = os.path.abspath(lengths)
        file_lengths(lengths)  # refused before the work
    asked = Asked(model, lengths, config.against, SECONDS_OF_ENERGY)
    found = (on_gpu if device.type == "cuda" else on_cpu)(ops, config.quick, asked)
    found["missing"] += _not_there(found, config.against)
    found["missing"] += gaps(
        found["rows"],
        {
            "real_tokens_per_second": "an optimizer's step does not depend on the batch",
            "sequences_per_second": "of attention only: no other op sees where a sequence ends",
            "mfu": "the peak of this device is not known, or no op here multiplies matrices",
            "watts": EnergyMeter(device).why_not or "no op with a time",
        },
    )
    return results.make("kernels", dataclasses.asdict(config), device, **found)


def _not_there(found: dict[str, Any], against: str) -> list[Missing]:
    """Peers that were asked for by name and are none of any op measured."""
    told = {row["contender"] for row in found["rows"]}
    told |= {one["name"].rpartition(", ")[2] for one in found["missing"]}
    peers = {peer_of(name) for name in told}
    names = against.split(",") if against not in ("auto", "none") else []
    return [
        {"name": name, "why": "is no peer of the ops that were measured"}
        for name in names
        if name not in peers
    ]


def table(result: dict[str, Any]) -> str:
    """The rows as text, one line each, and a line for each that is missing."""

    def compared(row: Row) -> str:
        ratio = row["ratio"]
        return f"{row['compared_with']} is {ratio:.2f}x as fast" if ratio != 1 else ""

    more = {
        "GB/s": lambda row: f"{row['gbps']:.1f}",
        "TFLOP/s": lambda row: f"{row['tflops']:.2f}" if row["flops"] else "-",
    }
    return results.table(result, "op", more, ("", compared))


def asked(config: KernelBenchConfig, result: dict[str, Any]) -> str:
    """The settings that matter, in words."""
    return f"model {config.model}, {Path(config.lengths).name} lengths"
