"""Where a step's time goes, by family of kernels, beside what was predicted.

`python -m fastbert_bench.gpu.trace base-512-full --out trace.json` records our step as one CUDA
graph and adds its kernels up by the families of `estimate.step_cost`. Our own kernels are known by
their names; a product or a sum of torch's looks the same wherever it stands, so it is told by its
place, which the eager step gives (see `profile.step`). A kernel that no rule knows keeps its own
name: all lines add up to the step, from its first kernel to the end of its last.
"""

import dataclasses
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.train.device import is_out_of_memory
from fastbert_bench.config import ProfileStepConfig
from fastbert_bench.estimate import predictions
from fastbert_bench.estimate.predictions import TOKENS
from fastbert_bench.estimate.step_cost import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    FAMILIES,
    GAPS,
    GEMM_BACKWARD,
    GEMM_FORWARD,
    MLM,
    OPTIMIZER,
    OTHER,
    PASSES,
    QKV_BIAS,
    RESIDUAL_ADDS,
)
from fastbert_bench.gpu import part
from fastbert_bench.kernels.compile_report import shipped_cases
from fastbert_bench.measure import result, timing
from fastbert_bench.measure.processes import one_line
from fastbert_bench.measure.workloads import SEED, Workload
from fastbert_bench.profile import step as profiling
from fastbert_bench.profile.trace import PRODUCTS, Kernel, Recorded, label_like
from fastbert_kernels.compile_cases import op_of

MODEL_TOKENS = {"cuda": 65_536, "cpu": 512}
QUICK_TOKENS = {"cuda": 16_384, "cpu": 256}
LEAST_TOKENS = 8_192  # on a GPU: less fills no multiprocessor and says nothing
LINES, WIDTH = 22, 110

Found = dict[str, Any]
Library = Mapping[str, str]


# Families


def library_kernels() -> dict[str, str]:
    """Our Triton kernels: name -> family, by the op's module."""
    families = {
        "optimizer": OPTIMIZER, "muon": OPTIMIZER, "mask": OTHER, "linear": GEMM_FORWARD,
    }  # fmt: skip
    found = {}
    for case in shipped_cases():
        module, name = op_of(case.fn), case.fn.fn.__name__
        if module == "attention":
            found[name] = ATTENTION_FORWARD if "forward" in name else ATTENTION_BACKWARD
        else:
            found[name] = families.get(module, PASSES)
    return found


_GEMM = re.compile(r"gemm|gemv|cublas|cutlass|nvjet|xmma|splitk", re.IGNORECASE)
_PEERS_ATTENTION = re.compile(r"flash_(fwd|bwd)|fmha|flash::|sdpa|cudnn.*attention", re.IGNORECASE)
_BACKWARD_NAME = re.compile(r"bwd|backward|dgrad|wgrad", re.IGNORECASE)
_SUM = re.compile(r"reduce_kernel<.*\bsum_functor<")
_ADD = re.compile(r"CUDAFunctor_?[aA]dd<|AddFunctor<")
_HALF_ADD = re.compile(r"CUDAFunctor_?[aA]dd<c10::(BFloat16|Half)>")
_FUSED_UPDATE = re.compile(r"FusedAdam|Adam|LAMB", re.IGNORECASE)
_UNKNOWN_PLACE = "not attributed"
# Ops whose own kernels are memory-bound; a linear_gelu's product is told by its kernel's name.
_PASS_OPS = {
    "embed_layer_norm": "embed_layer_norm",
    "dropout_add_layer_norm": "dropout_add_layer_norm",
    "gelu_layer_norm": "gelu_layer_norm",
    "linear_gelu": "bias_gelu",
    "linear_cross_entropy": "softmax",
}


def family_of(kernel: Kernel, cuda: bool, library: Library) -> str:
    """The family of a kernel; `OTHER` for what no rule knows."""
    if cuda:
        return _family_on_gpu(kernel, library)
    op, direction = kernel.place.op.partition(" ")[0], kernel.place.direction
    backward = direction == "backward"
    if kernel.name in PRODUCTS:
        return _product_family(kernel)
    if not kernel.name.startswith("aten::"):
        return OTHER
    if backward and op in ("linear", "attention") and kernel.name == "aten::sum":
        return QKV_BIAS
    if op == "attention":
        return ATTENTION_BACKWARD if backward else ATTENTION_FORWARD
    if kernel.place.layer == "optimizer":
        return OPTIMIZER
    if backward and kernel.name in ("aten::add", "aten::add_"):
        return RESIDUAL_ADDS
    return PASSES if op in _PASS_OPS else OTHER


def _family_on_gpu(kernel: Kernel, library: Library) -> str:
    name, place = kernel.name, kernel.place
    op, backward = place.op.partition(" ")[0], place.direction == "backward"
    in_layer = place.layer.startswith("layer ")
    if name in library:
        found = library[name]
        # The only sums of a linear's and of attention's gradient are those for a bias.
        sums = found == PASSES and backward and op in ("linear", "attention")
        return QKV_BIAS if sums else found
    if _PEERS_ATTENTION.search(name):
        return ATTENTION_BACKWARD if _BACKWARD_NAME.search(name) else ATTENTION_FORWARD
    if _GEMM.search(name):
        return _product_family(kernel)
    if place.layer == _UNKNOWN_PLACE:
        # Nothing else in a step adds in 16 bits.
        return RESIDUAL_ADDS if _HALF_ADD.search(name) else OTHER
    if in_layer and backward and _ADD.search(name):
        return RESIDUAL_ADDS
    if in_layer and backward and op in ("linear", "attention") and _SUM.search(name):
        return QKV_BIAS
    if place.layer == "optimizer" and _FUSED_UPDATE.search(name):
        return OPTIMIZER
    return OTHER


def _product_family(kernel: Kernel) -> str:
    place = kernel.place
    if place.layer == _UNKNOWN_PLACE:
        return OTHER
    if place.layer == "optimizer":  # Muon's
        return OPTIMIZER
    if place.layer == "masked words":
        return MLM
    backward = place.direction == "backward"
    if place.op.startswith("attention"):
        return ATTENTION_BACKWARD if backward else ATTENTION_FORWARD
    return GEMM_BACKWARD if backward else GEMM_FORWARD


def detail_of(kernel: Kernel, family: str) -> str:
    """The line below its family's that a kernel is counted in."""
    op, _, sizes = kernel.place.op.partition(" ")
    if family == PASSES and op in _PASS_OPS:
        direction = "backward" if kernel.place.direction == "backward" else "forward"
        return f"{_PASS_OPS[op]} {direction}"
    if family in (GEMM_FORWARD, GEMM_BACKWARD, MLM):
        widths = (size for size in sizes.split() if size[0] in "HF")
        return " ".join([op or kernel.place.layer, *widths, kernel.place.direction])
    return short_name(kernel.name)


def short_name(name: str) -> str:
    """A C++ kernel's name without its namespaces, and with the functor that tells it apart."""
    if re.fullmatch(r"\w+::\w+", name):
        return name  # an op's, not a kernel's
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    plain = re.sub(r"\w+::(?=\w)", "", plain)
    base = re.match(r"Mem(cpy|set).*|[\w ]+", plain)
    if not base or base[0] == plain:
        return plain[:60]
    functors = re.findall(r"\w*(?:[fF]unctor|_kernel_cuda|_kernel_impl)\w*", plain[len(base[0]) :])
    types = re.findall(r"\b(?:BFloat16|Half|float|double|long|int|bool)\b", plain)
    told = [base[0], *functors[:1], *types[:1]]
    return " ".join(told)[:60]


# Rows


def rows_of(
    recorded: Recorded,
    cuda: bool,
    real_tokens: int,
    library: Library,
    predicted: Mapping[str, float],
    estimated: Mapping[str, float],
) -> tuple[list[Found], Found]:
    """Rows of the families, then of what lies below each, and the whole step's figures.

    Args:
        recorded: a device's kernels (on a CPU: ops) with their places.
        cuda: whether it is a GPU's.
        real_tokens: of the step.
        library: as of `library_kernels`.
        predicted, estimated: milliseconds of a step of `TOKENS`, by family or line.
    """
    kinds = [family for family in FAMILIES if family != GAPS]
    groups: dict[str, dict[str, list[Kernel]]] = {family: defaultdict(list) for family in kinds}
    for kernel in recorded.kernels:
        family = family_of(kernel, cuda, library)
        groups[family][detail_of(kernel, family)].append(kernel)
    busy = sum(kernel.us for kernel in recorded.kernels) / recorded.steps / 1e3
    gaps = profiling.idle(recorded) if cuda else {"span_ms": busy, "idle_ms": 0.0}
    span, idle = gaps["span_ms"], gaps["idle_ms"]
    scale = TOKENS / real_tokens

    def row(name: str, kernels: Sequence[Kernel], family: str) -> Found:
        milliseconds = sum(kernel.us for kernel in kernels) / recorded.steps / 1e3
        # The update's work is a parameter's, not a token's.
        scaled = milliseconds * (1.0 if family == OPTIMIZER else scale)
        found: Found = {"name": name, "family": family, "ms_per_65536_tokens": scaled}
        if milliseconds > 0:
            found |= {
                "calls": len(kernels) / recorded.steps, "ms": milliseconds,
                "share": min(1.0, milliseconds / span),
            }  # fmt: skip
        found |= {"predicted_ms": predicted.get(name), "estimated_ms": estimated.get(name)}
        if predicted.get(name):
            found["over_predicted"] = scaled / predicted[name]
        return found

    families = [
        row(family, [kernel for kernels in below.values() for kernel in kernels], family)
        for family, below in groups.items()
    ]
    details = []
    ours = frozenset(library)
    for family, below in groups.items():
        for name, kernels in below.items():
            where = Counter(kernel.place.layer for kernel in kernels).most_common(1)[0][0]
            more = {
                "name": f"{family}: {name}", "line": name, "below": family, "where": where,
                "kernels": profiling.kernel_rows(kernels, recorded.steps, cuda, ours),
            }  # fmt: skip
            details.append(row(name, kernels, family) | more)
    idle_row: Found = {
        "name": GAPS, "family": GAPS, "ms_per_65536_tokens": idle * scale,
        "predicted_ms": predicted.get(GAPS), "estimated_ms": estimated.get(GAPS),
    }  # fmt: skip
    if idle > 0:
        idle_row |= {"calls": gaps["gaps"], "ms": idle, "share": idle / span}
    total: Found = {
        "ms": span,
        "busy_ms": busy,
        "idle_ms": idle if cuda else None,
        # Kernels that begin before the one ahead ends are counted in both lines.
        "overlap_ms": max(0.0, busy + idle - span),
        "ms_per_65536_tokens": sum(one["ms_per_65536_tokens"] for one in [*families, idle_row])
        - max(0.0, busy + idle - span) * scale,
        "real_tokens_per_second": real_tokens / span * 1e3,
        "predicted_ms": sum(predicted.values()) if predicted else None,
        "estimated_ms": sum(estimated[name] for name in FAMILIES) if estimated else None,
    }
    families.sort(key=_telling, reverse=True)
    details.sort(key=lambda one: -one["ms_per_65536_tokens"])
    return [*families, *[idle_row] * cuda, *details], total


def _telling(row: Found) -> float:
    """How far a family is from its prediction; its time where there is none."""
    return float(abs(row["ms_per_65536_tokens"] - (row["predicted_ms"] or 0.0)))


# One workload


def measure(
    name: str,
    device: torch.device,
    quick: bool,
    keep: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Records the step of a workload; a result that fits the common schema.

    Args:
        name: as of `Workload`.
        device: what to run on.
        quick: fewer tokens.
        keep: given what is known so far, each time that more is.

    Raises:
        UserError: there is no such workload.
        RuntimeError: the eager step does not run.
    """
    workload = Workload.of(name)
    tokens = (QUICK_TOKENS if quick else MODEL_TOKENS)[device.type]
    notes: list[str] = []
    while True:
        try:
            return _measured(workload, device, tokens, notes, keep)
        except RuntimeError as error:
            if not is_out_of_memory(error) or tokens // 2 < LEAST_TOKENS:
                raise
            notes.append(f"{tokens:,} tokens do not fit: {one_line(error)}")
        tokens //= 2
        part.free(device)  # here, where no traceback holds the failed step any more


def _measured(
    workload: Workload,
    device: torch.device,
    tokens: int,
    notes: list[str],
    keep: Callable[[Found], None],
) -> Found:
    lengths = workload.draw_tokens(tokens)
    config = ProfileStepConfig(
        device=str(device), model=workload.model, batch_size=len(lengths),
        max_seq_length=workload.S, lengths=workload.lengths, seed=SEED,
    )  # fmt: skip
    # A compiled chain has no op's name.
    runner = profiling.Runner(config, lengths, torch_compile="off")
    with tempfile.TemporaryDirectory() as folder:
        launch = runner.launch(graph=False)
        times = runner.seconds(launch)
        eager = runner.record(launch, Path(folder) / "eager.json")
        found = _described(workload, runner, lengths, eager, times, "eager", eager, notes)
        keep(found)
        if not runner.execution.graph:
            return found
        del launch
        part.free(device)
        try:
            launch = runner.launch(graph=True)
            times = runner.seconds(launch)
            recorded = runner.record(launch, Path(folder) / "graph.json")
            placed = label_like(recorded, eager)
            found = _described(workload, runner, lengths, placed, times, "graph", eager, notes)
        except Exception as error:
            # Any failure: what the eager step showed must not be lost to it.
            why = one_line(error)
            found["notes"].append(f"eager, because the step as one graph failed: {why}")
        keep(found)
    return found


def _described(
    workload: Workload,
    runner: profiling.Runner,
    lengths: np.ndarray,
    recorded: Recorded,
    seconds: Sequence[float],
    launched: str,
    eager: Recorded,
    notes: Sequence[str],
) -> Found:
    """The result; where the families cannot be told, the kernels by their names alone."""
    cuda = runner.device.type == "cuda"
    real_tokens = int(lengths.sum())
    told = [*notes]
    missing = []
    total: Found = {}
    device_name = torch.cuda.get_device_name(runner.device) if cuda else ""
    known = predictions.device_of(device_name) if cuda else None
    said = predictions.of(device_name, "trace", workload.name) or {}
    predicted = said.get("families", {})
    try:
        estimated = predictions.estimated(runner.sizes, lengths, known) if known else {}
        rows, total = rows_of(
            recorded, cuda, real_tokens, library_kernels() if cuda else {}, predicted, estimated
        )
    except Exception as error:
        told.append(f"the kernels could not be told apart: {one_line(error)}")
        rows = profiling.kernel_rows(recorded.kernels, max(1, recorded.steps), cuda, frozenset())
    if not recorded.kernels:
        missing.append({"name": "kernels", "why": "the profiler saw none"})
    milliseconds = timing.quantiles([1e3 * second for second in seconds])
    return result.make(
        "profile-step", dataclasses.asdict(runner.config) | {"name": workload.name}, runner.device,
        rows, missing,
        workload=workload.name,
        launched=launched,
        execution=list(runner.execution.reasons),
        dtype=str(runner.execution.dtype).removeprefix("torch."),
        real_tokens=real_tokens,
        sequences=len(lengths),
        step=milliseconds | {
            "recorded_steps": recorded.steps, "launched": launched,
            "real_tokens_per_second": real_tokens / milliseconds["ms"] * 1e3,
        },
        total=total,
        predicted_range_ms=[said["low_ms"], said["high_ms"]] if said else None,
        host_syncs=eager.host_syncs(),
        notes=told,
    )  # fmt: skip


# The table


def table(found: Found) -> list[str]:
    """At most 22 lines of at most 110 characters, the most telling first."""
    told, step, total = found["conditions"], found["step"], found["total"]
    says = (
        f"{found['launched']} step of {found['real_tokens']:,} tokens in {found['sequences']} "
        f"sequences: {step['ms']:.2f} ms unrecorded, {step['real_tokens_per_second']:,.0f} tokens/s"
    )
    if found["predicted_range_ms"]:
        low, high = found["predicted_range_ms"]
        says += f"; predicted {low:.0f}-{high:.0f} ms"
    lines = [f"{found['workload']}, {told['device']}, {found['dtype']}", says]
    lines += [f"note: {note}" for note in found["notes"]]
    rows = found["rows"]
    if not total:
        lines += [f"{row['ms']:9.3f} ms {row['calls']:7.0f} x {short_name(row['name'])}"
                  for row in rows]  # fmt: skip
        return [line[:WIDTH] for line in lines[:LINES]]
    lines.append(
        f"{'family (ms of a step)':<49}{'launches':>9}{'ms':>9}{'share':>7}{'/65,536':>10}"
        f"{'predicted':>10}{'estimate':>10}{'m/p':>6}"
    )
    whole = {"name": "recorded, first kernel to last", "share": 1.0} | total
    if total["predicted_ms"]:
        whole["over_predicted"] = total["ms_per_65536_tokens"] / total["predicted_ms"]
    lines.append(_line(whole))
    lines += [_line(row) for row in rows if "below" not in row]
    if total["overlap_ms"] > 0.0005:
        twice = {"name": "overlap of kernels, counted twice", "ms": -total["overlap_ms"]}
        lines.append(_line(twice))
    below = [row for row in rows if row.get("below") in (PASSES, OTHER)]
    room = LINES - len(lines) - 1
    lines += [_line(row, "  ") for row in below[:room]]
    if len(below) > room:
        rest = sum(row.get("ms", 0.0) for row in below[room:])
        lines.append(f"  and {len(below) - room} more, {rest:.3f} ms together, in the JSON")
    return [line[:WIDTH] for line in lines[:LINES]]


def _line(row: Found, indent: str = "") -> str:
    def cell(key: str, width: int, form: str) -> str:
        value = row.get(key)
        return f"{'-' if value is None else format(value, form):>{width}}"

    name = f"{indent}{row.get('line', row['name'])}"
    if row.get("below") == OTHER:
        name += f" ({row['where']})"
    return (
        f"{name[:48]:<49}{cell('calls', 9, ',.0f')}{cell('ms', 9, '.3f')}{cell('share', 7, '.1%')}"
        f"{cell('ms_per_65536_tokens', 10, '.3f')}{cell('predicted_ms', 10, '.1f')}"
        f"{cell('estimated_ms', 10, '.1f')}{cell('over_predicted', 6, '.2f')}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = part.parser("trace", quick="fewer tokens")
    parser.add_argument("name", help="base-512-full, large-512-natural, tiny-64-natural, ...")
    args = parser.parse_args(argv)
    Workload.of(args.name)
    if args.device == "cuda":
        import triton  # noqa: F401  so that no import is left for the time on the GPU

        library_kernels()
    device = part.device_of(args)
    return part.kept(partial(measure, args.name, device, args.quick), args.out, table)


if __name__ == "__main__":
    sys.exit(main())
