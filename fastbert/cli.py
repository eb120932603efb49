"""The `fastbert` command: finds who owns the request, and turns every error into one line.

Rooms that import torch are imported only once the request is known to be good, so that help and
mistakes answer at once. Exit codes: 0 done, 1 failed, 2 bad request, 129 interrupted by SIGHUP (a
closed terminal), 130 by SIGINT (Ctrl-C), 143 by SIGTERM (a scheduler), 141 nobody reads the output
any more. A training that a signal stops has saved itself and exits with 1.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

from fastbert import __version__
from fastbert.commands import (
    doctor,
    explain,
    export,
    fill_mask,
    finetune,
    glue,
    options,
    predict,
    pretrain,
    serve,
)
from fastbert.errors import FastbertError
from fastbert.train.interrupts import Interrupted, interruptible, raise_lost

BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended
INTERRUPTED = 130
BENCH = "fastbert_bench"
OURS = (
    *("pretrain", "finetune", "predict", "glue", "explain", "fill-mask", "serve", "export"),
    "doctor",
)


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
            _dispatch(args)
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
    return 0


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


def _dispatch(argv: list[str]) -> None:
    parser = options.Parser(
        prog="fastbert",
        description="Pre-train BERT several times faster, and still BERT.",
        epilog="fastbert COMMAND --help shows a command's options.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastbert {__version__}")
    commands = options.Commands(parser, "commands", "COMMAND")
    pretrain.add(commands)
    finetune.add(commands)
    predict.add(commands)
    glue.add(commands)
    fill_mask.add(commands)
    explain.add(commands)
    serve.add(commands)
    export.add(commands)
    ours = argv[:1] in ([name] for name in OURS)  # whatever befalls the bench
    missing = {} if ours else _add_bench(commands)
    doctor.add(commands)
    if not argv:
        parser.print_help()
        return
    if argv[0] not in ("-h", "--help", "--version"):
        commands.check(argv, missing)
    try:
        args, unknown = parser.parse_known_args(options.join_negative_numbers(argv))
    except SystemExit:  # --help and --version have printed what was asked
        return
    if unknown:
        options.refuse(unknown[0], args)
    args.run(args)


def _add_bench(commands: options.Commands) -> dict[str, str]:
    """Adds the bench's commands where it stands beside the engine; else says what is missing."""
    spec = find_spec(BENCH)
    if spec is not None and spec.origin is not None:  # else a folder of that name, and no package
        import_module(f"{BENCH}.commands").add(commands)
        return {}
    return dict.fromkeys(
        ("bench", "profile", "estimate", "speedrun"),
        f"needs the package {BENCH}, which is not installed",
    )
