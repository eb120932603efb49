"""The commands of the bench: `fastbert bench NAME`, `profile NAME` and `estimate`.

`fastbert` finds them because this package is installed beside it. Suites import torch, so each is
imported only once its request is known to be good.
"""

import os
import re
from argparse import Namespace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from fastbert.commands.checks import check_folder, check_output, check_path
from fastbert.commands.options import Commands, given, typed
from fastbert.config import PretrainConfig, check_positions
from fastbert.errors import UserError
from fastbert.train.interrupts import held_signals
from fastbert_bench.config import (
    ConvergenceBenchConfig,
    DataBenchConfig,
    DropinBenchConfig,
    EstimateConfig,
    FinetuneBenchConfig,
    InferenceBenchConfig,
    KernelBenchConfig,
    ProfileKernelConfig,
    ProfileStepConfig,
    ReportConfig,
    ServeBenchConfig,
    StepBenchConfig,
    check_kernel,
)
from fastbert_bench.measure.places import CHECKOUT

_BENCHMARKS: dict[str, tuple[str, type]] = {
    "step": ("a training step, side by side with Hugging Face's", StepBenchConfig),
    "kernels": ("each op, side by side with its peers", KernelBenchConfig),
    "data": ("how fast batches come when a step costs nothing", DataBenchConfig),
    "inference": (
        "encoding and filling masks, side by side with Hugging Face's",
        InferenceBenchConfig,
    ),
    "convergence": (
        "loss over wall time, side by side with Hugging Face's",
        ConvergenceBenchConfig,
    ),
    "dropin": ("what one line brings to transformers' Trainer", DropinBenchConfig),
    "finetune": ("fine-tuning, side by side with transformers' Trainer", FinetuneBenchConfig),
    "serve": ("a service under load, side by side with Hugging Face's batches", ServeBenchConfig),
}


def add(commands: Commands) -> None:
    """Adds all of them."""
    bench = commands.group("bench", "measure on this machine", "benchmarks", "BENCHMARK")
    profile = commands.group(
        "profile", "where a step's or a kernel's time goes", "profiles", "PROFILE"
    )
    for name, (help, config_class) in _BENCHMARKS.items():
        bench.add(name, help, partial(_bench, name), config_class)
    help = "a training step by layer, op and kernel, beside what the machine could do"
    profile.add("step", help, partial(_run, "profile.step"), ProfileStepConfig)

    help = "one op alone: time over sizes, roofline, registers and occupancy"
    kernel = profile.add("kernel", help, _profile_kernel, ProfileKernelConfig, "NAME")
    kernel.add_argument("name", nargs="?", default="", metavar="NAME", help="e.g. attention")

    help = "result files as one page with pictures"
    report = bench.add("report", help, _report, ReportConfig, "[FILE_OR_FOLDER ...]")
    report.add_argument("paths", nargs="*", metavar="FILE_OR_FOLDER", help="what to show")

    help = "time, money, energy and memory that a pre-training will take"
    commands.add("estimate", help, _estimate, EstimateConfig)

    help = "tokens and time to a fixed loss on a fixed text, by a recipe or settings of your own"
    race = commands.add("speedrun", help, _speedrun, PretrainConfig, "TRACK")
    race.add_argument("track", nargs="?", default="", metavar="TRACK", help="e.g. cpu-tiny")
    race.add_argument("--seeds", type=int, default=3, metavar="N", help="runs (default: 3)")
    race.add_argument(
        "--corpus", default="manuals", help="manuals, or addresses (default: manuals)"
    )
    race.add_argument(
        "--packages", default="", metavar="FOLDER", help="holds the text's packages (else fetched)"
    )
    race.add_argument(
        "--table", default="auto", metavar="FILE",
        help="gets a row (auto = benchmarks/SPEEDRUN.md of a checkout, else below runs/; none)",
    )  # fmt: skip
    race.add_argument("--note", default="", metavar="TEXT", help="what was changed, and why")


def _check(config: Any) -> None:
    """Checks what only files can tell of whichever settings there are."""
    if isinstance(config, FinetuneBenchConfig):  # any family that is accelerated
        check_path("model", config.model, words=())
    elif getattr(config, "model", "auto") != "auto":
        longest = getattr(config, "max_seq_lengths", str(getattr(config, "max_seq_length", 1)))
        check_positions(config.model, max(map(int, longest.split(","))))
    for name, words in (
        ("lengths", ("natural", "full")),
        ("data", ("builtin",)),
        ("tokenizer", ("train",)),
    ):
        if hasattr(config, name):
            check_path(name, getattr(config, name), words)
    written: dict[str, str] = {}
    for name in ("json", "png", "trace"):
        path = getattr(config, name, "")
        check_output(name, path)
        if path and written.setdefault(os.path.realpath(path), name) != name:
            first = written[os.path.realpath(path)]
            raise UserError(f"{name} = {path!r} is the file of {first}: give another")


def _bench(name: str, args: Namespace) -> None:
    """Measures by the suite of that name, prints its table, writes JSON and picture where asked.

    Raises:
        UserError: settings that do not fit.
        RunError: contenders that do not compute the same thing, or a file that cannot be written.
    """
    config = given(args)
    _check(config)
    suite, finish = _room(f"suites.{name}"), _room("measure.result").finish
    result = suite.run(config)
    finish(result, config.json, suite.asked(config, result), suite.table(result))
    if getattr(config, "png", ""):
        suite.draw(result, Path(config.png))


def _run(module: str, args: Namespace) -> None:
    config = given(args)
    _check(config)
    _room(module).main(config)


def _room(module: str) -> Any:
    with held_signals():
        return import_module(f"fastbert_bench.{module}")


_SUFFIXES = {"K": "e3", "M": "e6", "B": "e9", "G": "e9", "T": "e12"}


def _estimate(args: Namespace) -> None:
    for name in ("tokens", "corpus_tokens"):
        typed = getattr(args, name, "")
        if short := re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)([KMBGT])", typed, re.IGNORECASE):
            setattr(args, name, short[1] + _SUFFIXES[short[2].upper()])
    _run("estimate.run", args)


def _speedrun(args: Namespace) -> None:
    from fastbert_bench.speedrun.corpus import corpora
    from fastbert_bench.speedrun.tracks import TRACKS, track

    if not args.track:
        raise UserError(f"speedrun needs a track: {', '.join(TRACKS)}")
    race, known, settings = track(args.track), corpora(), typed(args)
    race.settings(settings)
    if args.corpus not in known:
        raise UserError(f"no corpus {args.corpus!r} (corpora: {', '.join(known)})")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: must be at least 1")
    if args.packages:
        check_path("packages", args.packages, words=())
    check_folder("out", settings.get("out", "auto"))
    beside = CHECKOUT / "benchmarks" if CHECKOUT else Path("runs", "speedrun")
    table = str(beside / "SPEEDRUN.md") if args.table == "auto" else args.table
    _room("speedrun.run").speedrun(
        race, known[args.corpus], settings, seeds=args.seeds, packages=args.packages,
        table="" if table == "none" else table, note=args.note,
    )  # fmt: skip


def _profile_kernel(args: Namespace) -> None:
    name, config = check_kernel(args.name), given(args)
    _check(config)
    _room("profile.kernel").main(name, config)


def _report(args: Namespace) -> None:
    config = given(args)
    if not args.paths and not config.readme:
        raise UserError("bench report needs files or folders: fastbert bench report runs/results")
    for path in args.paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
    check_folder("out", config.out)
    _room("report.build").main(config, args.paths)
