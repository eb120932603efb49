"""The stage `kernels` of `python -m fastbert_bench.gpu`: every op checked and timed on this GPU.

Each op has a process of its own, so that a crash or a hang costs that op's results only; what it
found is on disk as soon as it is found. One process at a time uses the GPU, while the next one only
imports. Before anything is measured, all kernels and peers are compiled by many processes at once,
into the caches of Triton and torch, where the measuring processes find them.

Under `out`: kernels/<op>.json while it runs, kernels.json with everything so far.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastbert_bench.kernels import checks as kernel_checks
from fastbert_bench.kernels import timings as kernel_timings
from fastbert_bench.kernels.costs import OPS
from fastbert_bench.measure import processes, timing
from fastbert_bench.measure import result as results
from fastbert_bench.measure.processes import failed, one_line, write_json

CEILINGS = "ceilings"
FAULTS = ("fault:raise", "fault:kill", "fault:hang")  # stand in for an op, to try the above out
PARTS = {"attention": 4, "linear_gelu": 2}  # processes that compile an op's kernels
WARM_SECONDS = 90.0
HALVES = ("checks", "timings")

Found = dict[str, Any]


# The process of one op


def work(
    op: str,
    path: Path,
    device_type: str,
    quick: bool,
    part: str | None,
    asked: Found,
    halves: Sequence[str],
    waits: bool,
) -> None:
    """Checks and times one op, or compiles what a share (part) of that needs."""
    import triton  # noqa: F401  so that no import is left for the time on the GPU

    if device_type == "cuda":
        importlib.import_module("torch._inductor.compile_fx")
    if waits:
        processes.wait()
    device = torch.device(device_type, 0) if device_type == "cuda" else torch.device("cpu")
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            # The default stream cannot be captured, and a backward runs where its forward ran.
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        if part is not None:
            index, parts = map(int, part.split("/"))
            if "checks" in halves:
                kernel_checks.warm_up(op, device, quick, index, parts)
            if "timings" in halves:
                wanted = kernel_timings.Asked(**asked)
                kernel_timings.warm_up(op, device, quick, index, parts, wanted)
        elif op == CEILINGS:
            found: Found = {"conditions": results.conditions(device)}
            write_json(path, found)
            found["ceilings"] = timing.ceilings(device)
            if device.type == "cuda":
                found["conditions"]["nvidia_smi_after_load"] = results.nvidia_smi()
            write_json(path, found)
        else:
            for found in measured(op, device, quick, asked, halves):
                write_json(path, found)


def measured(
    op: str, device: Any, quick: bool, asked: Found, halves: Sequence[str] = HALVES
) -> Iterator[Found]:
    """What is known of `op`, again and again as more is found."""
    found: Found = {"checks": [], "timings": []}
    if op in FAULTS:
        yield found | {"checks": [{"check": "before the fault", "ok": True}]}
        fail(op)
    groups = kernel_checks.checks_of(op, device, quick) if "checks" in halves else ()
    for name, rows in groups:
        try:
            found["checks"] += list(rows)
        except Exception as error:
            found["checks"].append({"check": name, "ok": False, "why": one_line(error)})
        yield found
    if "timings" not in halves:
        return
    wanted = kernel_timings.Asked(**asked)
    cuda = device.type == "cuda"
    rounds = kernel_timings.ROUNDS if cuda and not quick else 3
    for workload in kernel_timings.workloads(op, device, quick, wanted):
        try:
            for timed in kernel_timings.measure(workload, device, rounds, asked=wanted, peaks=cuda):
                found["timings"] += timed
                yield found
        except Exception as error:
            row = {"op": op, "direction": workload.directions[0], "sizes": workload.sizes}
            found["timings"].append(row | {"contender": "ours", "why": one_line(error)})
            yield found


def fail(fault: str) -> None:
    if fault == "fault:raise":
        raise RuntimeError("a fault that was asked for")
    if fault == "fault:kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


# The process that starts them


def start(
    op: str,
    path: Path,
    device_type: str,
    quick: bool,
    part: str | None = None,
    asked: Mapping[str, Any] | None = None,
    halves: Sequence[str] = HALVES,
) -> processes.Process:
    """A waiting process of one op."""
    arguments = [op, str(path.resolve()), device_type, *["--quick"] * quick]
    arguments += ["--part", part] if part else []
    arguments += ["--only", halves[0]] if len(halves) == 1 else []
    arguments += ["--asked", json.dumps(asked or {})]
    # As many of them compile at once as there are cores.
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} if part else {}
    return processes.start("fastbert_bench.kernels.stage", arguments, device_type, **threads)


def compile_all(
    ops: Sequence[str],
    folder: Path,
    device_type: str,
    quick: bool,
    asked: Mapping[str, Any] | None = None,
    halves: Sequence[str] = HALVES,
    seconds: float = WARM_SECONDS,
) -> list[str]:
    """Fills the caches, as many processes at once as there are cores; says what did not work."""
    shares = [(op, f"{i}/{PARTS.get(op, 1)}") for op in ops for i in range(PARTS.get(op, 1))]
    deadline = time.monotonic() + seconds
    notes = []
    cores = os.cpu_count() or 1
    for first in range(0, len(shares), cores):
        now = shares[first : first + cores]
        running = [
            start(op, folder / "unused", device_type, quick, part, asked, halves)
            for op, part in now
        ]
        said = processes.together(running, deadline - time.monotonic())
        notes += [
            f"compiling {op} {part}: {why}"
            for (op, part), why in zip(now, said, strict=True)
            if why
        ]
    return notes


def run(
    out: Path,
    quick: bool,
    *,
    ops: Sequence[str] = OPS,
    device_type: str = "cuda",
    timeout: float = 90.0,
    commit: str | None = None,
    asked: Mapping[str, Any] | None = None,
) -> int:
    """Checks and times `ops`, prints a table last; 1 where anything failed, else 0.

    Args:
        out: folder for the JSON files.
        quick: fewer and smaller cases.
        ops: which, in this order.
        device_type: "cuda", or "cpu" to rehearse in Triton's interpreter at small sizes.
        timeout: seconds that an op may take.
        commit: what the tree is, where it has no .git.
        asked: fields of `kernel_timings.Asked` that differ from the stage's own.
    """
    started = time.monotonic()
    folder = out / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    (out / "kernels.json").unlink(missing_ok=True)
    stage: Found = {"stage": "kernels", "quick": quick, "conditions": {}, "ops": {}, "rows": []}
    if device_type == "cuda":
        real = [op for op in ops if op in OPS]
        stage["compile_notes"] = compile_all(real, folder, device_type, quick, asked)
        stage["compile_seconds"] = time.monotonic() - started
        print(f"compiled in {stage['compile_seconds']:.0f} s", flush=True)
    jobs = [CEILINGS, *ops]
    waiting: list[processes.Process] = []
    try:
        for index, op in enumerate(jobs):
            for later in jobs[index + len(waiting) : index + 2]:  # this one and the next
                path(folder, later).unlink(missing_ok=True)
                waiting.append(start(later, path(folder, later), device_type, quick, asked=asked))
            process, began = waiting.pop(0), time.monotonic()
            error = processes.finish(process, timeout)
            found = processes.read_json(path(folder, op))
            add(stage, op, found, error, time.monotonic() - began, commit)
            stage["seconds"] = time.monotonic() - started
            write_json(out / "kernels.json", stage)
            print(f"{op}: {time.monotonic() - began:.0f} s{f', {error}' if error else ''}"[:300],
                  flush=True)  # fmt: skip
    finally:
        for process in waiting:
            processes.stop(process)
    print(table(stage))
    return 1 if failures(stage) else 0


def path(folder: Path, op: str) -> Path:
    return folder / f"{op.replace(':', '-')}.json"


def add(
    stage: Found, op: str, found: Found, error: str | None, seconds: float, commit: str | None
) -> None:
    """Takes one process's findings into the whole."""
    if op == CEILINGS:
        stage |= found
        if commit and stage["conditions"].get("commit") == "unknown":
            stage["conditions"]["commit"] = commit
        if error or "ceilings" not in stage:
            stage["ops"][op] = {"error": error or "no ceilings", "checks": [], "seconds": seconds}
        return
    told = stage["ops"].setdefault(op, {"error": None, "checks": [], "seconds": 0.0})
    told["error"] = error or told["error"]
    told["checks"] += found.get("checks", [])
    told["seconds"] = round(told["seconds"] + seconds, 1)
    rows = found.get("timings", [])
    if "ceilings" in stage:
        hopper = (stage["conditions"].get("gpu") or {}).get("capability", 90) >= 90
        rows = kernel_timings.finish(rows, stage["ceilings"], hopper)
    stage["rows"] += rows


def failures(stage: Found) -> list[str]:
    """Crashes, failed checks, and timings of ours that could not be taken. Not missed targets."""
    lines = []
    for op, found in stage["ops"].items():
        if found["error"]:
            lines.append(f"{op}: {found['error']}")
        lines += [f"{op}: {line}" for line in failed(found["checks"])]
    for row in stage["rows"]:
        if row["contender"].startswith("ours") and "why" in row:
            lines.append(f"{row['op']} {row['direction']}, {row['contender']}: {row['why']}")
    return lines


def table(stage: Found, limit: int = 11_000) -> str:
    """Conditions, a line for each of our timings, and what failed: at most `limit` characters."""
    told = stage["conditions"]
    lines = [
        f"{told.get('device', 'device unknown')}, torch {told.get('torch')}, triton "
        f"{told.get('triton')}, {told.get('commit')}, {stage['seconds']:.0f} s"
    ]
    if "ceilings" in stage:
        best = stage["ceilings"]
        lines.append(
            f"ceilings: copy {best['bandwidth'] / 1e12:.2f} TB/s, "
            f"bf16 product {best['matrix'] / 1e12:.0f} TFLOP/s"
        )
    lines.append("time (p20 to p80); share of the floor; target; how many times as fast as others")
    for op, found in stage["ops"].items():
        lines.append(f"{op}: {summary_of_checks(found['checks'])}")
        rows = [row for row in stage["rows"] if row["op"] == op]
        lines += [timing_line(row) for row in rows if row["contender"] == "ours" and "ms" in row]
        absent = {r["contender"]: r["why"] for r in rows
                  if "why" in r and not r["contender"].startswith("ours")}  # fmt: skip
        lines += [f"  no {name}: {why[:70]}" for name, why in absent.items()]
    wrong = failures(stage)
    bottom = [f"FAILED {line}"[:220] for line in wrong[:15]]
    if len(wrong) > 15:
        bottom.append(f"… and {len(wrong) - 15} more in kernels.json")
    bottom.append(verdict(stage, len(wrong)))
    end = "\n".join(bottom)
    body = "\n".join(lines)
    if len(body) + len(end) >= limit:
        body = body[: limit - len(end) - 40] + "\n… cut; all is in kernels.json"
    return f"{body}\n{end}"


def verdict(stage: Found, wrong: int) -> str:
    checks = [check for found in stage["ops"].values() for check in found["checks"]]
    targets = [row["target_met"] for row in stage["rows"] if "target_met" in row]
    return (
        f"{summary_of_checks(checks)}; {targets.count(True)} of {len(targets)} targets met, "
        f"{targets.count(None)} without a number; {wrong} failures"
    )


def summary_of_checks(checks: Sequence[Mapping[str, Any]]) -> str:
    held = sum(check["ok"] is True for check in checks)
    impossible = sum(check["ok"] is None for check in checks)
    also = f" ({impossible} not possible here)" if impossible else ""
    return f"{held} of {len(checks) - impossible} checks hold{also}"


def timing_line(row: Mapping[str, Any]) -> str:
    sizes = row["sizes"]
    line = (
        f"  {row['direction']:<8} H={sizes['H']:<4} S={sizes['S']:<4}{row['ms']:>7.3f} ms "
        f"({row['ms_p20']:.3f} to {row['ms_p80']:.3f})"
    )
    if "floor_share" not in row:
        return line
    rate = f"{row['tflops']:.0f} TFLOP/s" if row["flops"] else f"{row['gbps']:.0f} GB/s"
    line += f" {rate} {row['floor_share']:.0%}"
    said = {True: "met", False: "MISSED", None: "?"}
    if "target" in row:
        line += f" [{row['target']}: {said[row['target_met']]}]"
    if "extra_bytes" in row:
        line += f" [extra {row['extra_bytes'] >> 20} MiB, chunk {row['chunk_bytes'] >> 20} MiB]"
    return line + "".join(f" {name} {1 / ratio:.2f}x" for name, ratio in row["ratios"].items())


def main(argv: Sequence[str] | None = None) -> int:
    """One op's process; see `run` for the stage."""
    parser = argparse.ArgumentParser(prog="python -m fastbert_bench.kernels.stage")
    parser.add_argument("op")
    parser.add_argument("path", type=Path)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part")
    parser.add_argument("--asked", type=json.loads, default={})
    parser.add_argument("--only", choices=HALVES)
    parser.add_argument("--wait", action="store_true")
    args = parser.parse_args(argv)
    halves = (args.only,) if args.only else HALVES
    work(
        args.op, args.path, args.device, args.quick, args.part, args.asked, halves, args.wait
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
