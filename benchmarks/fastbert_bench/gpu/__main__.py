"""Everything that needs a GPU, in one command and a given time: `python -m fastbert_bench.gpu`.

For any host with a CUDA GPU, torch >= 2.11 and Triton; no network, nothing else that the training
does not need. Runs from the tree, from any folder:
`PYTHONPATH=TREE:TREE/kernels python -m fastbert_bench.gpu --budget 330 --out results`.

The work is a list of parts in the order of what one would miss most. A part begins only if its
estimate fits what is left of the budget, has a process of its own, and leaves what it finds on disk
as it finds it. The last 60 lines printed are the whole story. Exit code 1 where a check failed or
something of ours crashed; a missed target, or a part for which there was no time, is a result.
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastbert_bench.gpu import dropin, gemms
from fastbert_bench.gpu import pretrain as gpu_pretrain
from fastbert_bench.gpu import smoke as gpu_smoke
from fastbert_bench.gpu import step as gpu_step
from fastbert_bench.gpu import trace as gpu_trace
from fastbert_bench.kernels import stage as kernel_stage
from fastbert_bench.kernels.costs import OPS
from fastbert_bench.measure import processes
from fastbert_bench.measure.processes import failed, read_json, write_json
from fastbert_bench.measure.workloads import TINY, WORKLOADS
from fastbert_bench.suites.contenders import ACCELERATED

STAGES = ("smoke", "pretrain", "step", "dropin", "trace", "kernels", "rivals")
LINES, WIDTH = 60, 150
FAULTS = ("fault:raise", "fault:kill", "fault:hang")
"""Stand in for an op of the kernels' stage, to try out what a crash does."""
PATIENCE = 2.5
"""A part is stopped after this many times its estimate, and 20 s more."""
MAIN_OPS = ("attention", "dropout_add_layer_norm", "linear_cross_entropy", "adamw")
RIVALS = ("hf-sdpa-cudnn", "hf-eager", "hf-sdpa-compile", "hf-flash-flat", "hf-flash")

# Seconds on an H100's host whose caches are filled: estimated, none was measured yet.
COMPILE, SMOKE, PRETRAIN = 42.0, 38.0, 85.0
OURS, THEIRS, CEILINGS, TRACE, GEMMS, DROPIN = 14.0, 14.0, 8.0, 22.0, 18.0, 45.0
CHECKS = {"attention": 25.0, "linear_cross_entropy": 20.0, "linear_gelu": 20.0}
CHECKS_OF_OTHERS, TIMINGS, WARM = 12.0, 15.0, 60.0
COMPILED = 75.0


@dataclasses.dataclass(frozen=True)
class Part:
    """One piece of work: a process, or where `action` is given, what that does itself."""

    name: str
    stage: str
    seconds: float
    """How long it is estimated to take."""
    module: str = ""
    arguments: tuple[str, ...] = ()
    path: Path | None = None
    """The file that the process leaves."""
    action: Callable[[float], str | None] | None = None
    """Given the seconds it may take; returns what went wrong."""
    tolerated: bool = False
    """Whether that it cannot run is a finding, not a failure: a rival's."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command was told."""

    out: Path
    device: str = "cuda"
    stages: tuple[str, ...] = STAGES
    ops: tuple[str, ...] = OPS
    quick: bool = False
    commit: str | None = None

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


def parts(asked: Asked) -> Iterator[Part]:
    """All parts, the most wanted first."""
    device = ("--device", asked.device)
    quick = ("--quick",) if asked.quick else ()
    names = [name for name in WORKLOADS if (name == TINY) != asked.cuda]
    names = names[: 2 if asked.quick else None]

    def wanted(stage: str) -> bool:
        return stage in asked.stages

    def contender(workload: str, name: str, seconds: float, stage: str = "step") -> Part:
        path = gpu_step.piece(asked.out, workload, name)
        return Part(
            f"{workload}: {name}", stage, seconds * (1.3 if "large" in workload else 1),
            "fastbert_bench.gpu.step", (workload, name, "--out", str(path), *device, *quick), path,
            tolerated=name not in (gpu_step.OURS, gpu_step.AGAIN, ACCELERATED),
        )  # fmt: skip

    def whole(
        name: str, stage: str, seconds: float, module: str, *arguments: str, file: str = ""
    ) -> Part:
        path = asked.out / f"{file or name}.json"
        told = (*arguments, "--out", str(path), *device)
        return Part(name, stage, seconds, f"fastbert_bench.gpu.{module}", told, path)

    if any(map(wanted, ("smoke", "pretrain", "step", "dropin", "trace", "rivals"))):
        yield Part("compile", "smoke", COMPILE, action=lambda left: compile_steps(asked, left))
    if wanted("smoke"):
        yield whole("smoke", "smoke", SMOKE, "smoke")
    if wanted("pretrain"):
        yield whole("pretrain", "pretrain", PRETRAIN, "pretrain")
    if wanted("step"):
        for name in names:
            yield contender(name, gpu_step.OURS, OURS)
            yield contender(name, "hf-sdpa", THEIRS)
            if name == names[0]:
                yield contender(name, gpu_step.AGAIN, OURS)
    if wanted("dropin"):
        yield whole("dropin", "dropin", DROPIN, "dropin")
        name = "base-512-natural" if "base-512-natural" in names else names[0]
        if not wanted("step"):
            yield contender(name, gpu_step.OURS, OURS, "dropin")
            yield contender(name, "hf-sdpa", THEIRS, "dropin")
        yield contender(name, ACCELERATED, OURS, "dropin")
    if wanted("trace"):
        traced = ("base-512-full", "large-512-natural") if asked.cuda else (TINY,)
        for name in traced[: 1 if asked.quick else None]:
            arguments = (name, *quick)
            file = f"trace-{name}"
            yield whole(f"trace {name}", "trace", TRACE, "trace", *arguments, file=file)
        yield whole("gemms", "trace", GEMMS, "gemms", *quick)
    if wanted("kernels"):
        yield from kernel_parts(asked)
    if wanted("rivals"):
        first = names[0]
        if not wanted("step"):
            yield contender(first, gpu_step.OURS, OURS, "rivals")
        for name in RIVALS if asked.cuda else ():
            seconds = COMPILED if "compile" in name else THEIRS
            yield contender(first, name, seconds, "rivals")
        chosen = list(gpu_step.ABLATIONS) if asked.cuda else list(gpu_step.ABLATIONS)[1:2]
        for name in chosen[: 1 if asked.quick else None]:
            yield contender(first, name, OURS, "rivals")
        for name in names[1:]:
            if not wanted("step"):
                yield contender(name, gpu_step.OURS, OURS, "rivals")
            yield contender(name, "hf-sdpa-cudnn", THEIRS, "rivals")
        if asked.cuda and not asked.quick:
            yield contender(first, "hf-sdpa-compile-max", 3 * COMPILED, "rivals")


def kernel_parts(asked: Asked) -> Iterator[Part]:
    """First whether every op is right in every dtype and size, then how fast."""
    folder = asked.out / "kernels"

    def process(name: str, op: str, seconds: float, *options: str) -> Part:
        path = kernel_stage.path(folder, name.replace(" ", "-"))
        arguments = (op, str(path), asked.device, *options)
        return Part(name, "kernels", seconds, "fastbert_bench.kernels.stage", arguments, path)

    def half_of(op: str, half: str, seconds: float) -> Part:
        quick = ("--quick",) if asked.quick else ()
        return process(f"{op} {half}", op, seconds, "--only", half, *quick)

    def warm(half: str, ops: Sequence[str]) -> Part:
        real = [op for op in ops if op in OPS]

        def action(left: float) -> str | None:
            folder.mkdir(parents=True, exist_ok=True)
            notes = kernel_stage.compile_all(
                real, folder, asked.device, asked.quick, halves=(half,), seconds=left
            )
            return "; ".join(notes)[:500] or None

        return Part(f"compile {half}", "kernels", WARM, action=action, tolerated=True)

    main = [op for op in MAIN_OPS if op in asked.ops]
    rest = [op for op in asked.ops if op not in main]
    if asked.cuda:
        yield warm("checks", asked.ops)
    yield process(kernel_stage.CEILINGS, kernel_stage.CEILINGS, CEILINGS)
    for op in asked.ops:
        yield half_of(op, "checks", CHECKS.get(op, CHECKS_OF_OTHERS))
    if asked.cuda:
        yield warm("timings", asked.ops)
    for op in (*main, *rest):
        if op not in FAULTS:
            yield half_of(op, "timings", TIMINGS)


def compile_steps(asked: Asked, seconds: float) -> str | None:
    """Compiles all kernels of the smoke test, the steps and the run, on all cores at once."""
    count = (os.cpu_count() or 1) if asked.cuda else 1
    running = []
    for index in range(count):
        arguments = ["--share", f"{index}/{count}", "--device", asked.device]
        arguments += ["--out", str(asked.out / "gpu" / "compile" / f"{index}.json")]
        running.append(processes.start("fastbert_bench.gpu.launches", arguments, asked.device))
    return next(filter(None, processes.together(running, seconds)), None)


class Run:
    """What was asked, what came of it; on disk after every part."""

    def __init__(self, asked: Asked, budget: float) -> None:
        self.asked, self.budget = asked, budget
        self.began = time.monotonic()
        self.done: dict[str, dict[str, Any]] = {}
        self.not_run: list[str] = []
        self._kernels: dict[str, Any] = {
            "stage": "kernels", "quick": asked.quick, "conditions": {}, "ops": {}, "rows": [],
        }  # fmt: skip

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def go(self, todo: Sequence[Part]) -> None:
        """Runs what fits the budget, in order; the next process imports while one works."""
        ahead: tuple[Part, processes.Process] | None = None
        try:
            for index, part in enumerate(todo):
                if part.seconds > self.left():
                    self.not_run.append(part.name)
                    continue
                process = None
                if ahead is not None and ahead[0] is part:
                    process, ahead = ahead[1], None
                elif part.module:
                    process = self._start(part)
                following = next((p for p in todo[index + 1 :] if p.module), None)
                if ahead is not None and ahead[0] is not following:
                    processes.stop(ahead[1])
                    ahead = None
                if ahead is None and following is not None:
                    ahead = following, self._start(following)
                self._run(part, process)
        finally:
            if ahead is not None:
                processes.stop(ahead[1])

    def _start(self, part: Part) -> processes.Process:
        return processes.start(part.module, part.arguments, self.asked.device)

    def _run(self, part: Part, process: processes.Process | None) -> None:
        started = time.monotonic()
        limit = min(self.left(), PATIENCE * part.seconds + 20)
        if process is not None:
            assert part.path is not None
            part.path.unlink(missing_ok=True)  # what an earlier run found is not this one's
            why = processes.finish(process, limit)
        else:
            assert part.action is not None
            why = part.action(limit)
        took = time.monotonic() - started
        self.done[part.name] = {
            "stage": part.stage, "seconds": round(took, 1), "estimate": part.seconds, "why": why,
            "tolerated": part.tolerated,
        }  # fmt: skip
        print(f"{part.name}: {took:.0f} s{f', {why}' if why else ''}"[:300], flush=True)
        try:
            self._take(part, why, took)
        except Exception as error:  # what it found stays in its own file
            self.done[part.name]["why"] = f"not taken in: {processes.one_line(error)}"
            print(self.done[part.name]["why"], flush=True)
        self.save()

    def _take(self, part: Part, why: str | None, seconds: float) -> None:
        """Makes one result of what the processes of a stage have left."""
        if part.module == "fastbert_bench.gpu.step":
            workload = WORKLOADS[part.arguments[0]]
            told = {
                name.partition(": ")[2]: one["why"]
                for name, one in self.done.items()
                if name.startswith(f"{workload.name}: ")
            }
            found = gpu_step.collect(self.asked.out, workload, told, self.asked.commit)
            path = self.asked.out / f"step-{workload.name}.json"
            if found is not None:
                write_json(path, found)
            else:  # an earlier run's figures must not stand for this one's
                path.unlink(missing_ok=True)
        elif part.module == "fastbert_bench.kernels.stage":
            assert part.path is not None
            left = read_json(part.path)
            kernel_stage.add(
                self._kernels, part.arguments[0], left, why, seconds, self.asked.commit
            )
            self._kernels["seconds"] = time.monotonic() - self.began
            write_json(self.asked.out / "kernels.json", self._kernels)

    def save(self) -> None:
        """What ran, how long it took beside its estimate, and what did not."""
        write_json(
            self.asked.out / "gpu.json",
            {
                "stage": "gpu", "budget": self.budget, "seconds": time.monotonic() - self.began,
                "device": self.asked.device, "parts": self.done, "not_run": self.not_run,
                "failures": self.failures(),
            },
        )  # fmt: skip

    def failures(self) -> list[str]:
        """A line for each thing that is wrong."""
        checks: dict[str, list[str]] = {
            stage: failed(read_json(self.asked.out / f"{stage}.json").get("checks", ()))
            for stage in ("smoke", "pretrain", "dropin")
            if stage in self.done
        }
        lines = []
        for name, one in self.done.items():
            # A process whose checks do not hold ends with 1; the kernels' are told of below.
            told = checks.get(name) or one["stage"] == "kernels"
            if one["why"] and not one["tolerated"] and not told:
                lines.append(f"{name}: {one['why']}")
        lines += [f"{stage}: {line}" for stage, found in checks.items() for line in found]
        return lines + kernel_stage.failures(self._kernels)

    def story(self) -> list[str]:
        """At most 60 lines: every stage's table, what did not run, what is wrong."""
        out, sections = self.asked.out, []
        tables: dict[str, Callable[[Any], list[str]]] = {
            "smoke": gpu_smoke.table, "pretrain": gpu_pretrain.table,
            **{f"step-{name}": gpu_step.table for name in WORKLOADS},
            "dropin": dropin.table,
            "trace-base-512-full": gpu_trace.table, "trace-large-512-natural": gpu_trace.table,
            f"trace-{TINY}": gpu_trace.table,
            "gemms": gemms.table,
            "kernels": lambda stage: [line for line in kernel_stage.table(stage).splitlines()
                                      if not line.startswith("FAILED")],
        }  # fmt: skip
        seen = {name.removeprefix("trace ") for name in self.done}
        for name, table in tables.items():
            kind, _, workload = name.partition("-")
            ran = {
                "step": any(one.startswith(f"{workload}: ") for one in self.done),
                "trace": workload in seen,
                "kernels": bool(self._kernels["ops"] or "ceilings" in self._kernels),
            }.get(kind, name in self.done)
            found = read_json(out / f"{name}.json") if ran else {}
            if not found:
                continue
            try:
                sections.append(table(found))
            except Exception as error:
                sections.append([f"{name}.json: no table: {processes.one_line(error)}"])
        wrong = [f"FAILED {line}" for line in self.failures()]
        more = [f"… and {len(wrong) - 8} more failures in gpu.json"] if len(wrong) > 9 else []
        end = [*wrong[: 8 if more else None], *more]
        if self.not_run:
            end.append(f"not run, for want of time: {', '.join(self.not_run)}")
        end.append(
            f"{len(self.done)} parts in {time.monotonic() - self.began:.0f} of {self.budget:.0f} s,"
            f" {len(self.not_run)} not run, {len(wrong)} failures; all of it is in {out.name}/"
        )
        sections = cut(sections, LINES - len(end))
        return [line[:WIDTH] for section in [*sections, end] for line in section]


def cut(sections: Sequence[list[str]], room: int, least: int = 2) -> list[list[str]]:
    """The sections, of which the longest lose their last lines until all fit into `room` lines."""
    kept = [list(section) for section in sections]
    while sum(map(len, kept)) > room and max(map(len, kept)) > least:
        longest = max(kept, key=len)
        marked = longest[-1].startswith("  … ")
        missing = int(longest[-1].split()[1]) if marked else 0
        longest[-2 if marked else -1 :] = []
        if not marked:  # the mark itself takes a line
            longest.pop()
            missing += 1
        longest.append(f"  … {missing + 1} lines more, in the JSON")
    return kept


def stages(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r}: expected some of {', '.join(STAGES)}")
    return chosen


def op(text: str) -> str:
    if text not in (*OPS, *FAULTS):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(OPS)}")
    return text


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastbert_bench.gpu", description="Checks and measures everything on a GPU."
    )
    parser.add_argument(
        "--stage", type=stages, default=STAGES, metavar="NAME,...",
        help="smoke: is everything right? pretrain: does the main job train? step: against Hugging "
        "Face's; dropin: Hugging Face's models after our line; trace: where a step's time goes; "
        "kernels: every op in every dtype, and its peers; rivals: more of them, and our step "
        "without each saving; default all",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=seconds, default=540.0, metavar="SECONDS",
        help="parts that do not fit are listed as not run; default %(default).0f",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="default %(default)s")
    parser.add_argument(
        "--op", action="append", type=op, help="repeatable; of the stage kernels, default all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer workloads, sizes and rounds")
    parser.add_argument("--commit", help="of a tree without .git")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a rehearsal at tiny sizes, kernels in Triton's interpreter",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    args = parser.parse_args(argv)
    out = args.out.resolve()  # processes run in the tree, whatever the folder we were called from
    asked = Asked(
        out, args.device, args.stage, tuple(args.op or OPS), args.quick, args.commit
    )  # fmt: skip
    if args.list:
        for part in parts(asked):
            print(f"{part.seconds:6.0f} s  {part.stage:<9} {part.name}")
        return 0
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("no CUDA GPU here: use one, or rehearse by --device cpu")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be made: {error.strerror}: name another folder")
    run = Run(asked, args.budget)
    try:
        run.go(list(parts(asked)))
    finally:
        run.save()
        print("\n".join(run.story()), flush=True)
    return 1 if run.failures() else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    sys.exit(main())
