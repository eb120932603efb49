"""What the processes of `python -m fastbert_bench.gpu` have in common: options, device, file."""

import argparse
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastbert.errors import RunError
from fastbert_bench.measure import processes, result

Found = dict[str, Any]


def parser(stage: str, quick: str = "") -> argparse.ArgumentParser:
    """The options of a stage's process; `quick` says what --quick leaves out, "" that it has none.

    All but `--out` have defaults: a process can be run by hand.
    """
    made = argparse.ArgumentParser(prog=f"python -m fastbert_bench.gpu.{stage}")
    made.add_argument("--out", type=Path, required=True, help="JSON file to write")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    if quick:
        made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--wait", action="store_true", help="begin when a line comes on stdin")
    return made


def device_of(args: argparse.Namespace) -> torch.device:
    """The device, once it is ours."""
    if args.wait:
        processes.wait()
    return torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")


def free(device: torch.device) -> None:
    """Frees what nobody uses: a step that announces its parts is a cycle of references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def checked(found: Iterable[Found], path: Path) -> int:
    """Writes what is known each time that more is; the exit code: 1 where a check does not hold."""
    last: Mapping[str, Any] = {}
    for last in found:
        processes.write_json(path, last)
    return 1 if processes.failed(last.get("checks", ())) else 0


def verdict(stage: str, checks: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """How many checks hold of those possible here, and a line for each that does not."""
    held = sum(row["ok"] is True for row in checks)
    possible = sum(row["ok"] is not None for row in checks)
    lines = [f"  FAILED {line}"[:160] for line in processes.failed(checks)]
    return f"{stage}: {held} of {possible} checks hold", lines


def kept(
    measure: Callable[[Callable[[Found], None]], Found],
    path: Path,
    table: Callable[[Found], list[str]],
) -> int:
    """Writes what `measure` keeps, prints its table; the exit code: 1 where it was not written.

    That it could not be written stops no measurement: its figures are said to be elsewhere.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []

    def keep(found: Found) -> None:
        failures.clear()
        try:
            result.write(found, path)
        except RunError as error:
            failures.append(str(error))

    print("\n".join([*table(measure(keep)), *failures]))
    return 1 if failures else 0
