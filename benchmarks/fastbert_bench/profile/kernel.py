"""One op alone: `fastbert profile kernel NAME`.

Its time over several sizes beside what it must move and compute, a roofline picture, and for each
of its Triton kernels in the configuration chosen for the shape: registers, shared memory, spills,
occupancy, and the bound that its machine code sets (`kernels.sass`), compiled ahead of time,
which needs no GPU. Without a GPU the times are those of the op as a CPU runs it, in plain PyTorch.
Where Nsight Compute (`ncu`) is installed beside a GPU, its counters of one call; `python -m
fastbert_bench.profile.kernel NAME SHAPE` is that call.

Letters of sizes are those of `kernels.costs`.
"""

import csv
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastbert.errors import UserError
from fastbert.train.device import choose_device
from fastbert_bench.config import ProfileKernelConfig, check_kernel
from fastbert_bench.kernels import sass
from fastbert_bench.kernels import timings as kernel_timings
from fastbert_bench.kernels.compile_report import cases_of, compile_case
from fastbert_bench.kernels.costs import POSITIONS, WHOLE, cost_of, model_sizes
from fastbert_bench.kernels.timings import Contender, Workload
from fastbert_bench.measure import result, timing
from fastbert_bench.profile.step import ceilings, figures, op_bytes, side_stream
from fastbert_kernels.compile_cases import CompileCase

POINTS, STEP_BETWEEN = 4, 4
FEWEST = 8  # tokens of a sequence that nobody asked for
ROUNDS, SECONDS = 20, 0.5
ARCHS = (80, 90)

# Op -> modules of the kernel library, and names of its kernels there.
_KERNELS: dict[str, tuple[tuple[str, str], ...]] = {
    "attention": (("attention", ""),),
    "dropout_add_layer_norm": (("layer_norm", ""), ("reduce", "")),
    "linear_cross_entropy": (("cross_entropy", ""),),
    "adamw": (("optimizer", "square_sums"), ("optimizer", "prepare"), ("optimizer", "adamw")),
    "linear_gelu": (("linear", ""), ("gelu", "bias_gelu"), ("gelu", "gelu_backward")),
    "gelu_layer_norm": (("gelu", "gelu_layer_norm"), ("reduce", "")),
    "bias_gelu": (("gelu", "bias_gelu"), ("gelu", "gelu_backward"), ("reduce", "")),
    "embed_layer_norm": (("embedding", ""), ("reduce", "")),
    "lamb": (("optimizer", "square_sums"), ("optimizer", "prepare"), ("optimizer", "lamb")),
    "mask_tokens": (("mask", ""),),
    "symmetric_product": (("muon", "symmetric_product"),),
}
_TOLD_OF_A_KERNEL = ("registers", "shared", "spills", "stack", "hmma", "hgmma", "instructions")
_NCU_METRICS = (
    "gpu__time_duration.sum", "dram__bytes.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)  # fmt: skip


# Sizes and calls


def sizes_of(op: str, shape: Mapping[str, int], cuda: bool) -> dict[str, int]:
    """BERT-base's sizes (a CPU's: small ones) with those asked for, and what follows from them.

    What was not asked for is made to fit: the longest sequences that fill T, the most heads of at
    least 64 that fill H.

    Raises:
        UserError: sizes that do not fit each other.
    """
    T, S, H = (65_536, 512, 768) if cuda else (1024, 32, 64)
    sees_ends = op in ("attention", "embed_layer_norm")
    if "T" in shape and "S" not in shape:
        S = _divisor(shape["T"], S)
        if sees_ends and S < FEWEST:
            if shape["T"] > POSITIONS:
                raise UserError(
                    f"shape: T = {shape['T']} is no multiple of any length of {FEWEST} to "
                    f"{POSITIONS}: give another, or S as well"
                )
            S = shape["T"]
    S = shape.get("S", S)
    T = shape.get("T", max(S, T // S * S))
    H = shape.get("H", 64 * shape["A"] if "A" in shape else H)
    sizes = model_sizes(H, S, T) | {"A": _divisor(H, max(1, H // 64))}
    sizes |= ({} if cuda else {"V": 1000, "L": 1}) | dict(shape)
    if sees_ends and T % S:
        raise UserError(f"shape: T = {T} must be a multiple of S = {S}")
    if op == "embed_layer_norm" and S > POSITIONS:
        raise UserError(f"shape: S = {S} must be at most {POSITIONS}, the positions of BERT")
    if op == "attention" and H % sizes["A"]:
        raise UserError(f"shape: H = {H} must be a multiple of A = {sizes['A']}")
    return sizes


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def sweep(op: str, sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Growing sizes, the last of which is `sizes`; an update grows with the model's width."""
    found = []
    S = 1 if sizes["T"] % sizes["S"] else sizes["S"]
    for power in reversed(range(POINTS)):
        part = dict(sizes)
        if op in WHOLE:
            part["H"] = max(8, sizes["H"] * (POINTS - power) // POINTS // 8 * 8)
        else:
            part["T"] = max(S, sizes["T"] // STEP_BETWEEN**power // S * S)
            part["M"] = max(1, sizes["M"] * part["T"] // sizes["T"])
        if part not in found:
            found.append(part)
    return found


def workload_of(op: str, device: torch.device, sizes: dict[str, int]) -> Workload:
    """The op alone, our kernel on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    workload = kernel_timings.workload(op, device, dtype, sizes)
    ours = workload.contenders[0]
    if device.type == "cpu":
        ours = Contender("plain PyTorch", workload.by(kernel_timings.cpu_op(op, False)))
    return dataclasses.replace(workload, contenders=[ours])


def measure(workload: Workload, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """(direction, milliseconds) of the workload's one contender, L2 cold on a GPU."""
    sets = workload.sets(device)
    for direction in workload.directions:
        calls = kernel_timings.calls_of(workload.contenders[0], direction, sets)
        replays = {"ours": timing.Replay(calls, device)}
        times = timing.interleaved(replays, device, ROUNDS, SECONDS)["ours"]
        yield direction, timing.quantiles(times) | {"rounds_ms": times}


# Kernels


def fits(case: CompileCase, sizes: Mapping[str, int]) -> bool:
    """Whether a case is that of training in bf16 at these sizes."""
    if case.configuration.startswith("grad "):
        shared = case.name in ("prepare", "lamb_ratios")  # one case for all types
        return case.configuration in ("grad fp32, weights bf16", "grad fp32, weights -") or shared
    known = {"H": str(sizes["H"]), "D": str(sizes["H"] // sizes["A"])}
    known |= {"p": "0.1", "smoothing": "0.0", "gradient": "True"}
    for word in f"{case.name} {case.configuration}".split():
        key, _, value = word.partition("=")
        if word in ("fp32", "fp16", "tanh") or known.get(key, value) != value:
            return False
    return True


def chosen(case: CompileCase, sizes: Mapping[str, int], arch: int) -> bool:
    """Whether the op takes this kernel at these sizes, by its module's own rules."""
    from fastbert_kernels import attention_config, linear

    if {"some", "rows"} & set(case.configuration.split()):  # of the last layer, at few tokens
        return False
    if case.name.startswith("attention"):
        S, D, kind = sizes["S"], sizes["H"] // sizes["A"], case.configuration.split()[0]
        if kind in ("forward", "short"):
            return kind == attention_config.forward_kernel(S, D, torch.bfloat16, arch)
        path = attention_config.backward_path(S, D, torch.bfloat16, arch)
        return kind == path if kind in ("tile", "head") else path == "split"
    fused = ("linear_gelu", "gelu_linear_backward")
    return case.name not in fused or linear.AUTO == "triton"


def compiled_kernels(
    op: str, sizes: Mapping[str, int], archs: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """A row for each kernel and architecture, the chosen ones compiled; and what is missing."""
    from triton.runtime.interpreter import InterpretedFunction

    # Triton reads the variable where a kernel is defined, and again where it is compiled.
    cases = [case for module, _ in _KERNELS[op] for case in cases_of(f"fastbert_kernels.{module}")]
    interpreted = any(isinstance(case.fn, InterpretedFunction) for case in cases)
    if interpreted or os.environ.get("TRITON_INTERPRET", "0") != "0":
        return [], [{"name": "registers", "why": "TRITON_INTERPRET is set: nothing is compiled"}]
    rows: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    for module, start in _KERNELS[op]:
        cases = cases_of(f"fastbert_kernels.{module}")
        cases = [case for case in cases if case.name.startswith(start)]
        for name in dict.fromkeys(case.name.split()[0] for case in cases):
            shipped = [case for case in cases if case.name.split()[0] == name]
            if not any(fits(case, sizes) for case in shipped):
                have = ", ".join(dict.fromkeys(case.configuration for case in shipped))
                missing.append({"name": name, "why": f"no case at this shape: there are {have}"})
            for case, arch in product(shipped, archs):
                if arch in case.archs and fits(case, sizes):
                    row, failures = _kernel_row(case, sizes, arch)
                    rows.append(row)
                    missing += [{"name": f"sound code of {name}", "why": why} for why in failures]
    return rows, missing


def _kernel_row(
    case: CompileCase, sizes: Mapping[str, int], arch: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    row: dict[str, Any] = {
        "kernel": case.name, "configuration": case.configuration, "arch": arch,
        "warps": case.num_warps, "stages": case.num_stages,
        "tiles": {key: value for key, value in case.constexprs.items() if "BLOCK" in key},
        "chosen": chosen(case, sizes, arch),
    }  # fmt: skip
    if not row["chosen"]:
        return row, ()
    found = compile_case(case, arch)
    _, limit = sass.programs(found.registers, found.shared, case.num_warps, arch)
    row |= {
        **{name: getattr(found, name) for name in _TOLD_OF_A_KERNEL}, "programs": found.held,
        "occupancy": found.held * case.num_warps / sass.WARPS, "limited_by": limit,
    }  # fmt: skip
    if found.main and found.cost:
        row |= {"main": dataclasses.asdict(found.main), "cost": dataclasses.asdict(found.cost)}
    return row, found.failures


# ncu


def counters(op: str, shape: str) -> tuple[list[dict[str, Any]], str]:
    """ncu's counters of each kernel of one call, or why there are none."""
    command = shutil.which("ncu")
    if command is None:
        return [], "ncu is not installed"
    done = subprocess.run(
        [command, "--csv", "--page", "raw", "--metrics", ",".join(_NCU_METRICS),
         "--profile-from-start", "off", sys.executable, "-m", "fastbert_bench.profile.kernel", op,
         *([shape] if shape else [])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or len(lines) < 3:  # names, units, and a kernel at least
        said = [line for line in (done.stdout + done.stderr).splitlines() if "ERR" in line.upper()]
        return [], f"ncu failed: {(said or [f'exit code {done.returncode}'])[0].strip()[:200]}"
    units, *rows = list(csv.DictReader(lines))
    told = [
        {"kernel": row["Kernel Name"]}
        | {f"{name} [{units[name]}]": row[name] for name in _NCU_METRICS if name in row}
        for row in rows
    ]
    return told, ""


def once(op: str = "", shape: str = "") -> int:
    """The call that ncu watches; returns the exit code."""
    try:
        _once(check_kernel(op), shape)
    except UserError as error:
        print(f"fastbert: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _once(op: str, shape: str) -> None:
    sizes = sizes_of(op, ProfileKernelConfig(shape=shape).sizes(), cuda=True)
    device = choose_device("cuda")
    workload = workload_of(op, device, sizes)
    direction = "both" if "backward" in workload.directions else workload.directions[0]
    (call,) = kernel_timings.calls_of(workload.contenders[0], direction, [workload.inputs()])
    call()
    torch.cuda.synchronize(device)
    with torch.cuda.profiler.profile():  # what `--profile-from-start off` waits for
        call()
        torch.cuda.synchronize(device)


# The picture


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Times over sizes with their floor, and the roofline (copies: the bandwidth) with its points.

    Raises:
        UserError: the picture cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows, ceiling = found["rows"], found["ceilings"]
    key = found["grows"]
    multiplies = any(row["flops"] for row in rows)
    for direction in dict.fromkeys(row["direction"] for row in rows):
        mine = [row for row in rows if row["direction"] == direction]
        sizes = [row["sizes"][key] for row in mine]
        (line,) = left.plot(sizes, [row["ms"] * 1e3 for row in mine], "o-", label=direction)
        floor = [row["ms"] * 1e3 * row["floor_share"] for row in mine]
        left.plot(sizes, floor, "--", color=line.get_color(), label=f"{direction}: floor")
        if multiplies:
            x = [row["flops"] / row["bytes"] for row in mine]
            y = [row["tflops"] for row in mine]
        else:
            x, y = sizes, [row["gbps"] for row in mine]
        right.plot(x, y, "o", color=line.get_color(), label=direction)
    # A CPU's caches copy faster than its memory: a roof for each size of copy.
    for (size, rate), style in zip(ceiling["copies"].items(), ("-", "--", ":"), strict=False):
        label = f"copy of {int(size) / 2**20:g} MiB"
        if multiplies:
            ridge = ceiling["matrix"] / rate
            far = 10 * max(ridge, *(row["flops"] / row["bytes"] for row in rows))
            roof = [min(x * rate, ceiling["matrix"]) / 1e12 for x in (0.1, ridge, far)]
            right.plot([0.1, ridge, far], roof, "k", linestyle=style, label=label)
        else:
            right.axhline(rate / 1e9, color="k", linestyle=style, label=label)
    if multiplies:
        right.set(xlabel="FLOPs a byte", ylabel="TFLOP/s", title="Roofline")
    else:
        right.set(xlabel=key, ylabel="GB/s", title="Bandwidth (no matrix product here)")
    left.set(xlabel=key, ylabel="µs", title="Time")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    told = found["conditions"]
    figure.suptitle(f"{found['op']}, {found['implementation']}: {told['device']}, {told['date']}")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"png = {str(path)!r}: {error.strerror}") from None
    finally:
        pyplot.close(figure)


# The command


def measured(op: str, kernel: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """FLOPs or bytes a second that the op reached at its largest size, as the kernel's bound is.

    Those of all its kernels in that direction together, and by what the op must compute and move.
    """
    name = kernel["kernel"].split()[0]
    ways = {row["direction"]: row for row in rows}  # later rows are larger
    forward = name in (op, "bias_gelu") or "forward" in name
    row = ways.get("forward" if forward else "backward") or rows[-1]
    return row["tflops"] * 1e12 if kernel["cost"]["flops"] else row["gbps"] * 1e9


def run(op: str, config: ProfileKernelConfig) -> dict[str, Any]:
    """Measures and compiles what `config` says and returns the result."""
    device = choose_device(config.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    shape = config.sizes()
    sizes = sizes_of(op, shape, cuda)
    found = ceilings(device, dtype, [(sizes["T"], sizes["H"], sizes["F"])])
    rows = []
    with side_stream(device):
        for part in sweep(op, sizes):
            workload = workload_of(op, device, part)
            for direction, times in measure(workload, device):
                cost = cost_of(op, direction)
                moved = op_bytes(op, direction, workload.sizes, dtype.itemsize)
                flops = cost.flops_of(workload.sizes)
                rows.append(
                    {
                        "name": f"{op} {direction}",
                        "direction": direction,
                        "sizes": workload.sizes,
                        **times,
                        **figures(times["ms"] / 1e3, moved, flops, 1, found),
                    }
                )
    here = (90 if torch.cuda.get_device_capability(device) >= (9, 0) else 80) if cuda else None
    archs = ARCHS if here is None else (here,)
    if config.arch != "auto":
        archs = (int(config.arch.removeprefix("sm_")),)
    kernels, missing = compiled_kernels(op, sizes_of(op, shape, cuda=True), archs)
    for row in kernels:
        if row["arch"] == here and "cost" in row:
            row["measured"] = measured(op, row, rows)
    if cuda:
        ncu, why = counters(op, config.shape)
    else:
        missing.append({"name": "times of our Triton kernels", "why": "they need a GPU"})
        ncu, why = [], "it needs a GPU"
    if why:
        missing.append({"name": "counters of ncu", "why": why})
    return result.make(
        "profile-kernel", dataclasses.asdict(config), device, rows, missing,
        op=op,
        dtype=str(dtype).removeprefix("torch."),
        implementation="Triton kernels" if cuda else "plain PyTorch, as the step runs it on a CPU",
        grows="T" if op not in WHOLE else "H" if op == "symmetric_product" else "P",
        ceilings=found,
        kernels=kernels,
        ncu=ncu,
    )  # fmt: skip


def _sizes(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the largest row has beside the size that grows, which nobody need have asked for."""
    sizes = rows[-1]["sizes"] if rows else {}
    return "".join(f", {letter} = {sizes[letter]:,}" for letter in "SHAV" if letter in sizes)


def table(found: Mapping[str, Any]) -> str:
    """The result as text."""
    key = found["grows"]
    lines = [
        f"{found['op']}: {found['implementation']}{_sizes(found['rows'])}",
        f"{'direction':<10}{key:>10}{'us':>12}{'p20':>12}{'p80':>12}{'MB':>10}{'GFLOP':>10}"
        f"{'GB/s':>9}{'TFLOP/s':>9}{'of ceiling':>18}{'gap us':>11}",
    ]
    for row in found["rows"]:
        lines.append(
            f"{row['direction']:<10}{row['sizes'][key]:>10}{row['ms'] * 1e3:>12.1f}"
            f"{row['ms_p20'] * 1e3:>12.1f}{row['ms_p80'] * 1e3:>12.1f}{row['bytes'] / 1e6:>10.2f}"
            f"{row['flops'] / 1e9:>10.2f}{row['gbps']:>9.1f}{row['tflops']:>9.3f}"
            f"{row['floor_share']:>8.0%} of {row['bound']:<7}{row['gap_us']:>10.1f}"
        )
    # Without a GPU nobody chooses among kernels: those that none would take are in the JSON alone.
    cuda = found["conditions"]["device_type"] == "cuda"
    kernels = [row for row in found["kernels"] if cuda or row["chosen"]]
    if kernels:
        lines.append(
            f"{'kernel':<36}{'configuration':<38}{'arch':<7}{'tiles':<18}{'warps':>5}{'stages':>7}"
            f"{'regs':>6}{'shared':>8}{'spills':>7}{'occupancy':>10}  limited by"
        )
    for row in kernels:
        tiles = " x ".join(map(str, row["tiles"].values()))
        line = (
            f"{row['kernel']:<36}{row['configuration']:<38}sm_{row['arch']:<4}{tiles:<18}"
            f"{row['warps']:>5}{row['stages']:>7}"
        )
        if row["chosen"]:
            line += (
                f"{row['registers']:>6}{row['shared']:>8}{row['spills']:>7}{row['occupancy']:>10.0%}"
                f"  {row['limited_by']}"
            )
        lines.append(line + ("" if row["chosen"] else "  shipped, not chosen at this shape"))
    lines += bounds(found["kernels"])
    for one in found["ncu"]:
        lines.append("ncu: " + ", ".join(f"{name} {value}" for name, value in one.items()))
    lines += [f"missing: {one['name']}: {one['why']}" for one in found["missing"]]
    return "\n".join(lines)


def bounds(kernels: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the machine code asks of each pipe, as text."""
    counted = [row for row in kernels if "cost" in row]
    if counted:
        yield (
            "machine code, cycles of a multiprocessor for a pass through the main loop "
            "(attention: 128 x 128 scores)"
        )
        yield (
            f"{'kernel':<36}{'configuration':<38}{'arch':<6}{'programs':>9}{'spills':>7}"
            + "".join(f"{pipe:>7}" for pipe in ("issue", "ALU", "FMA", "MUFU", "tensor", "shared"))
            + f"{'memory':>7}{'bars':>5}{'KB':>7}{'cycles':>7}  bound"
        )
    for row in counted:
        cost, main = sass.Cost(**row["cost"]), row["main"]
        reached = f"; the op reached {row['measured'] / 1e12:.3g}" if "measured" in row else ""
        yield (
            f"{row['kernel']:<36}{row['configuration']:<38}sm_{row['arch']:<3}{row['programs']:>9}"
            f"{main['spills']:>4}/{row['spills']:<2}"
            + "".join(f"{cycles:>7.0f}" for cycles in cost.cycles.values())
            + f"{main['barriers']:>5}{cost.bytes / 1024:>7.1f}{cost.total:>7.0f}  {cost}{reached}"
        )


def main(op: str, config: ProfileKernelConfig) -> None:
    """Profiles one op, prints its tables, writes JSON and picture where asked.

    Raises:
        UserError: sizes that do not fit.
        RunError: a file that cannot be written.
    """
    found = run(op, config)
    ceiling = found["ceilings"]
    rates = f"{ceiling['bandwidth'] / 1e9:,.1f} GB/s, {ceiling['matrix'] / 1e12:,.3f} TFLOP/s"
    result.finish(found, config.json, f"ceilings here, now: {rates}", table(found))
    if config.png:
        draw(found, Path(config.png))


if __name__ == "__main__":
    sys.exit(once(*sys.argv[1:3]))
