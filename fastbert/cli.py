"""The `fastbert` command: reads a request, checks what needs no GPU, and hands it to its room.

Options come from the fields of the configurations. Rooms that import torch are imported only once
the request is known to be good, so that help and mistakes answer at once. Exit codes: 0 done,
1 failed, 2 bad request, 129 interrupted by SIGHUP (a closed terminal), 130 by SIGINT (Ctrl-C),
143 by SIGTERM (a scheduler), 141 nobody reads the output any more. A training that a signal stops
has saved itself and exits with 1.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, NoReturn

from fastbert import __version__
from fastbert.config import (
    GROUPS,
    ConvergenceBenchConfig,
    DataBenchConfig,
    EstimateConfig,
    InferenceBenchConfig,
    KernelBenchConfig,
    PretrainConfig,
    ProfileKernelConfig,
    ProfileStepConfig,
    ReportConfig,
    Setting,
    StepBenchConfig,
    load_config,
    model_config,
    pattern_text,
    settings,
    to_toml,
)
from fastbert.errors import FastbertError, UserError, did_you_mean
from fastbert.train.interrupts import Interrupted, held_signals, interruptible, raise_lost

BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; every error is one line on stderr.

    Args:
        argv: arguments after the command's name; by default the process's own.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        with interruptible(last=argv is None):
            return _run(args)
    except KeyboardInterrupt as interrupt:  # before the first word, or amid the last one
        if "--debug" in args:
            raise
        return getattr(interrupt, "exit_code", INTERRUPTED)


def _run(args: list[str]) -> int:
    debug = "--debug" in args
    try:
        try:
            status = _dispatch(args)
        except Exception:
            raise_lost()  # what an interrupted import leaves fails later, and anyhow
            raise
        sys.stdout.flush()
    except FastbertError as error:
        if debug:
            raise
        return _fail(f"error: {error}", error.exit_code)
    except Interrupted as interrupt:
        if debug:
            raise
        by = "" if interrupt.exit_code == INTERRUPTED else f" by {interrupt.name}"
        return _fail(f"interrupted{by}", interrupt.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if _output_is_gone(error):
            return BROKEN_PIPE
        if debug:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        if isinstance(error, MemoryError) or "can't allocate memory" in reason:
            return _fail(f"error: out of memory: give smaller sizes ({reason[:300]})", 1)
        return _fail(f"failed: {reason} (run again with --debug for the traceback)", 1)
    except BaseException as error:
        # A library in Rust that meets what it holds for impossible: no Exception, on purpose.
        if debug or type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300]
        return _fail(f"failed: a library broke down: {reason} (--debug shows where)", 1)
    return status


def _fail(line: str, status: int) -> int:
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with suppress(OSError, ValueError):  # nobody hears it
        for bar in list(getattr(tqdm, "_instances", ())):  # an iterator of Rust's may hold one
            bar.close()
        print(f"fastbert: {line}", file=sys.stderr, flush=True)
    return status


def _output_is_gone(error: Exception) -> bool:
    """Tells whether `error` came from a stdout nobody reads, and not from some other pipe.

    Where stdout cannot be written, what is left in its buffer is dropped, or Python would stumble
    over it once more at its exit.
    """
    try:
        if isinstance(error, BrokenPipeError):
            print()
        sys.stdout.flush()
    except OSError as second:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return isinstance(second, BrokenPipeError)
    return False


def _dispatch(argv: list[str]) -> int:
    parser, commands = _build_parsers()
    if not argv:
        parser.print_help()
        return 0
    _check_command(argv, commands)
    try:
        args, unknown = parser.parse_known_args(_join_negative_numbers(argv))
    except SystemExit:  # --help and --version have printed what was asked
        return 0
    if unknown:
        _refuse(unknown[0], args.parser)
    return int(args.run(args))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _check_command(argv: list[str], commands: dict[str, tuple[str, ...]]) -> None:
    """Says in one line which command or benchmark was meant; argparse would list them all."""
    command, *rest = argv
    if command in ("-h", "--help", "--version"):
        return
    if command.startswith("-"):
        raise UserError(f"{command} stands before the command: write fastbert COMMAND {command}")
    if command not in commands:
        known = ", ".join(commands)
        raise UserError(f"unknown command {command!r}{did_you_mean(command, commands)} ({known})")
    below = commands[command]
    if not below or (rest and rest[0] in ("-h", "--help")):
        return
    if not rest or rest[0].startswith("-"):
        raise UserError(f"{command} needs one of {', '.join(below)}: fastbert {command} {below[0]}")
    if rest[0] not in below:
        known = ", ".join(below)
        meant = did_you_mean(rest[0], below)
        raise UserError(f"unknown {command} {rest[0]!r}{meant} ({known})")


def _refuse(argument: str, parser: argparse.ArgumentParser) -> NoReturn:
    if not argument.startswith("-"):
        raise UserError(f"unexpected argument {argument!r}")
    option = argument.split("=")[0]
    known = dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]+", parser.format_help()))
    raise UserError(f"unknown option {option}{did_you_mean(option, known)}")


def _join_negative_numbers(argv: list[str]) -> list[str]:
    """Turns `--x -1e-3` into `--x=-1e-3`: argparse takes -1e-3 for an option."""
    joined: list[str] = []
    for token in argv:
        is_negative = re.fullmatch(r"-(\.?\d.*|inf|nan)", token)
        if is_negative and joined and re.fullmatch(r"--[a-z0-9-]+", joined[-1]):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _build_parsers() -> tuple[_Parser, dict[str, tuple[str, ...]]]:
    """Returns the parser, and by command what may stand below it."""
    parser = _Parser(
        prog="fastbert",
        description="Pre-train BERT several times faster, and still BERT.",
        epilog="fastbert COMMAND --help shows a command's options.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastbert {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    pretrain = _add_command(
        commands,
        "pretrain",
        "train a BERT from raw text",
        "fastbert pretrain [--config FILE] [--SETTING VALUE ...]",
        _pretrain,
    )
    pretrain.add_argument(
        "--config", metavar="FILE", help="TOML file of settings; options override it"
    )
    pretrain.add_argument(
        "--print-config", action="store_true", help="print all settings as TOML and stop"
    )
    _add_settings(pretrain, PretrainConfig)

    bench = commands.add_parser("bench", help="measure on this machine", allow_abbrev=False)
    benches = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK")
    for name, (help, config_class, _) in _BENCHES.items():
        usage = f"fastbert bench {name} [--SETTING VALUE ...]"
        _add_settings(_add_command(benches, name, help, usage, partial(_bench, name)), config_class)

    profile = commands.add_parser(
        "profile", help="where a step's or a kernel's time goes", allow_abbrev=False
    )
    profiles = profile.add_subparsers(title="profiles", metavar="PROFILE")
    step = _add_command(
        profiles,
        "step",
        "a training step by layer, op and kernel, beside what the machine could do",
        "fastbert profile step [--SETTING VALUE ...]",
        _profile_step,
    )
    _add_settings(step, ProfileStepConfig)
    kernel = _add_command(
        profiles,
        "kernel",
        "one op alone: time over sizes, roofline, registers and occupancy",
        "fastbert profile kernel NAME [--SETTING VALUE ...]",
        _profile_kernel,
    )
    kernel.add_argument("name", metavar="NAME", help="the op, e.g. attention")
    _add_settings(kernel, ProfileKernelConfig)

    report = _add_command(
        benches,
        "report",
        "result files as one page with pictures",
        "fastbert bench report [FILE_OR_FOLDER ...] [--SETTING VALUE ...]",
        _report,
    )
    report.add_argument("paths", nargs="*", metavar="FILE_OR_FOLDER", help="what to show")
    _add_settings(report, ReportConfig)

    estimate = _add_command(
        commands,
        "estimate",
        "time, money, energy and memory that a pre-training will take",
        "fastbert estimate [--SETTING VALUE ...]",
        _estimate,
    )
    _add_settings(estimate, EstimateConfig)

    doctor = _add_command(
        commands,
        "doctor",
        "what this machine has and what will run on it",
        "fastbert doctor [--json]",
        _doctor,
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    below = {
        "pretrain": (),
        "bench": (*_BENCHES, "report"),
        "profile": ("step", "kernel"),
        "estimate": (),
        "doctor": (),
    }
    return parser, below


def _add_command(
    commands: Any, name: str, help: str, usage: str, run: Any
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        usage=usage,
        description=help[0].upper() + help[1:] + ".",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run, parser=parser)
    return parser


_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _add_settings(parser: argparse.ArgumentParser, config_class: type) -> None:
    groups: dict[str, Any] = {}
    for setting in settings(config_class):
        if setting.group not in groups:
            title = f"{setting.group}: {GROUPS[setting.group]}"
            groups[setting.group] = parser.add_argument_group(title)
        # Absent options leave no trace, so that a TOML file is overridden only by what was typed.
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(setting)}
        if setting.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif setting.choices:
            allowed = [*setting.choices, *filter(None, [pattern_text(setting)])]
            options["metavar"] = "{" + ",".join(allowed) + "}"
        else:
            options["metavar"] = _METAVARS[setting.type]
        groups[setting.group].add_argument(setting.flag, **options)


def _help(setting: Setting) -> str:
    text = setting.help
    if setting.default not in (None, ""):
        default = setting.default
        text += f" (default: {str(default).lower() if setting.type is bool else default})"
    return text.replace("%", "%%")


def _overrides(config_class: type, args: argparse.Namespace) -> dict[str, Any]:
    given = vars(args)
    return {s.name: _parse(s, given[s.name]) for s in settings(config_class) if s.name in given}


def _parse(setting: Setting, given: str | bool) -> Any:
    if isinstance(given, bool) or setting.type is str:
        return given
    if setting.optional and given == "none":
        return None
    try:
        return setting.type(given)
    except ValueError:
        kind = "an integer" if setting.type is int else "a number"
        raise UserError(f"{setting.flag} {given}: must be {kind}") from None


def _pretrain(args: argparse.Namespace) -> int:
    overrides = _overrides(PretrainConfig, args)
    config = load_config(PretrainConfig, args.config, overrides)
    if config.resume and args.config is None:
        config = _config_of_run(config, overrides)
    if args.print_config:
        print(to_toml(config), end="")
        return 0
    check_pretrain(config)
    with held_signals():
        from fastbert.hf import check_tokenizer, export_run
        from fastbert.train.loop import pretrain

    pretrain(config, export=export_run, check_tokenizer=check_tokenizer)
    return 0


def _config_of_run(config: PretrainConfig, overrides: dict[str, Any]) -> PretrainConfig:
    """A run that goes on keeps its settings; only what was typed changes."""
    _check_path("resume", config.resume, words=("auto",))
    from fastbert.train.prepare import run_folder

    run = run_folder(config)
    if not (run / "config.toml").exists():
        return config
    overrides = overrides | {"out": str(run)}
    return load_config(PretrainConfig, run / "config.toml", overrides, sealed=True)


def check_pretrain(config: PretrainConfig) -> None:
    """Checks what only the file system can tell, before anything slow is imported.

    Raises:
        UserError: a path does not exist, or the model cannot take the sequences.
    """
    _check_model(config.model, config.max_seq_length)
    _check_path("data", config.data, words=("builtin",))
    if not config.resume:  # a run keeps its own
        _check_path("tokenizer", config.tokenizer, words=("train",))
    _check_path("resume", config.resume, words=("", "auto"))
    if os.path.exists(config.out) and not os.path.isdir(config.out):
        raise UserError(f"out = {config.out!r} is a file: give a folder")


def _check_model(model: str, max_seq_length: int) -> None:
    longest = model_config(model).max_position_embeddings
    if max_seq_length > longest:
        raise UserError(
            f"max_seq_length = {max_seq_length} must be at most {longest}, "
            f"max_position_embeddings of model = {model!r}"
        )


def _check_path(name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words and not os.path.exists(value):
        meant = did_you_mean(value, filter(None, words))
        raise UserError(f"{name} = {value!r}: no such file or folder{meant}")


def _check_outputs(config: object, *names: str) -> None:
    """Refuses a file that cannot be written, before it costs the minutes of a measurement."""
    for name in names:
        path: str = getattr(config, name, "")
        if not path:
            continue
        shown = f"{name} = {path!r}"
        folder, file = os.path.split(path)
        if not os.path.isdir(folder or "."):
            raise UserError(f"{shown}: no such folder")
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{shown} is no file: give the path of one")
        probe = os.path.join(folder, f".{file}.tmp")  # as it will be written before it is renamed
        try:
            for place in (probe, path) if os.path.exists(path) else (probe,):
                with open(place, "ab"):
                    pass
        except OSError as error:
            raise UserError(f"{shown}: cannot be written: {error.strerror}") from None
        finally:
            with suppress(OSError):
                os.remove(probe)


_BENCHES: dict[str, tuple[str, type, str]] = {
    "step": ("a training step, side by side with Hugging Face's", StepBenchConfig, "step"),
    "kernels": ("each op, side by side with its peers", KernelBenchConfig, "bench_kernels"),
    "data": ("how fast batches come when a step costs nothing", DataBenchConfig, "data"),
    "inference": (
        "encoding and filling masks, side by side with Hugging Face's",
        InferenceBenchConfig,
        "inference",
    ),
    "convergence": (
        "loss over wall time, side by side with Hugging Face's",
        ConvergenceBenchConfig,
        "convergence",
    ),
}
"""Name -> help, settings, and the module under benchmarks/ whose `main` takes them."""


def _bench(name: str, args: argparse.Namespace) -> int:
    _, config_class, module = _BENCHES[name]
    config: Any = load_config(config_class, None, _overrides(config_class, args))
    if getattr(config, "model", "auto") != "auto":
        longest = getattr(config, "max_seq_lengths", str(getattr(config, "max_seq_length", 1)))
        _check_model(config.model, max(map(int, longest.split(","))))
    if hasattr(config, "lengths"):
        _check_path("lengths", config.lengths, words=("natural", "full"))
    for setting, word in (("data", "builtin"), ("tokenizer", "train")):
        if hasattr(config, setting):
            _check_path(setting, getattr(config, setting), words=(word,))
    _check_outputs(config, "json", "png")
    with held_signals():
        room = import_module(f"benchmarks.{module}")
    room.main(config)
    return 0


def _profile_step(args: argparse.Namespace) -> int:
    config = load_config(ProfileStepConfig, None, _overrides(ProfileStepConfig, args))
    _check_model(config.model, config.max_seq_length)
    _check_path("lengths", config.lengths, words=("natural", "full"))
    _check_outputs(config, "json", "trace")
    with held_signals():
        from benchmarks import profiling

    profiling.main(config)
    return 0


def _profile_kernel(args: argparse.Namespace) -> int:
    from benchmarks.kernels import OPS  # a table: imports nothing slow

    if args.name not in OPS:
        meant = did_you_mean(args.name, OPS)
        raise UserError(f"unknown kernel {args.name!r}{meant} ({', '.join(OPS)})")
    config = load_config(ProfileKernelConfig, None, _overrides(ProfileKernelConfig, args))
    _check_outputs(config, "json", "png")
    with held_signals():
        from benchmarks import profile_kernel

    profile_kernel.main(args.name, config)
    return 0


def _report(args: argparse.Namespace) -> int:
    config = load_config(ReportConfig, None, _overrides(ReportConfig, args))
    if not args.paths and not config.readme:
        raise UserError("bench report needs files or folders: fastbert bench report runs/results")
    for path in args.paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
    if os.path.exists(config.out) and not os.path.isdir(config.out):
        raise UserError(f"out = {config.out!r} is a file: give a folder")
    with held_signals():
        from benchmarks import report

    report.main(config, args.paths)
    return 0


def _estimate(args: argparse.Namespace) -> int:
    config = load_config(EstimateConfig, None, _overrides(EstimateConfig, args))
    _check_model(config.model, config.max_seq_length)
    _check_path("lengths", config.lengths, words=("natural", "full"))
    _check_outputs(config, "json")
    with held_signals():
        from benchmarks import estimate

    estimate.main(config)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    report = diagnose()
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        width = max(map(len, report))
        for item, finding in report.items():
            print(f"{item:<{width}}  {finding}")
    return 0


def diagnose() -> dict[str, str]:
    """Returns what this machine has, one line per item, and which implementation each op takes."""
    report = {
        "fastbert": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    report |= _describe_torch()
    for package in ("triton", "transformers", "tokenizers"):
        report[package] = _version(package) or "not installed"
    report["flash-attn"] = _version("flash-attn") or "not installed (optional, not needed)"
    report["apex"] = "present" if _has_nvidia_apex() else "not installed (optional, not needed)"
    compiler = _cxx_compiler()
    report["C++ compiler"] = compiler or "none (torch.compile cannot run on this CPU)"
    return report | _describe_ops()


def _describe_torch() -> dict[str, str]:
    try:
        import torch

        from fastbert.train.device import fast_bf16
    except ImportError as error:
        return {"torch": f"not usable: {error}"}
    report = {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            report[f"cuda:{i}"] = (
                f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, "
                f"compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}"
            )
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        report["cuda"] = "no GPU" + (f" ({built})" if built else " (torch is built without CUDA)")
    report["cpu"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    hardware = fast_bf16(torch.device("cpu"))
    report["bf16 on CPU"] = "in hardware" if hardware else "emulated (precision = auto takes fp32)"
    return report


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _has_nvidia_apex() -> bool:
    """Tells NVIDIA's apex, which has optimizers, from PyPI's package of that name."""
    spec = find_spec("apex")
    folders = spec.submodule_search_locations if spec else None
    return any(os.path.exists(os.path.join(f, "optimizers", "__init__.py")) for f in folders or ())


def _cxx_compiler() -> str | None:
    return next(filter(None, (shutil.which(name) for name in ("g++", "clang++"))), None)


def _describe_ops() -> dict[str, str]:
    try:
        from fastbert import ops
    except ImportError as error:
        return {"ops": f"not usable: {error}"}
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why_not = ops.why_no_kernels(device, hidden_size=768, intermediate_size=3072, head_size=64)
    compiled = _cxx_compiler() is not None
    bundle = ops.choose_ops(device.type if not why_not else "cpu", compiled)
    found = {field.name: getattr(bundle, field.name) for field in fields(bundle)}
    report = {"Triton kernels": f"not used: {why_not}" if why_not else "used"}
    return report | {f"op {name}": _home(op) for name, op in found.items() if callable(op)}


def _home(op: Any) -> str:
    op = op.func if isinstance(op, partial) else op
    return f"{op.__module__}.{op.__qualname__}"
