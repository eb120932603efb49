"""The file of every benchmark: what was asked, under which conditions, what was measured.

`schema.json` beside this file is its published form. What does not fit it, or finds no room, is
kept elsewhere and said: a measured figure is never lost.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastbert.config import ModelConfig
from fastbert.errors import RunError
from fastbert_bench.measure.energy import EnergyMeter
from fastbert_bench.measure.places import CHECKOUT
from fastbert_bench.measure.schema import MisfitError, check

FORMAT = 1
_SMI_FIELDS = (
    "driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "temperature.gpu",
)  # fmt: skip

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
"""Heading -> cell."""


def make(
    benchmark: str,
    settings: Mapping[str, Any],
    device: torch.device,
    rows: Sequence[Row],
    missing: Sequence[Mapping[str, str]] = (),
    **more: Any,
) -> dict[str, Any]:
    """A result under the present conditions.

    Args:
        benchmark: the command's name, e.g. "step".
        settings: what was asked for.
        device: what was measured.
        rows: figures, one contender, kernel or size each.
        missing: {"name", "why"} of what could not be measured.
        more: figures that belong to no row.
    """
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        # Not where the files went: that is this machine's business.
        "settings": {k: v for k, v in settings.items() if k not in ("json", "png", "trace")},
        "conditions": conditions(device),
        "rows": list(rows),
        "missing": [dict(one) for one in missing],
        **more,
    }


def of_model(
    benchmark: str,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    sizes: ModelConfig,
    rows: Sequence[Row],
    missing: Sequence[Mapping[str, str]],
    unread: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A result of contenders that run a model, with what no row has among what is missing.

    Args:
        benchmark, device, rows, missing, more: as for `make`.
        config: its settings, a dataclass.
        dtype, sizes: of the model.
        unread: figure -> why no row has it, beyond those that any device may lack.
    """
    why = {"mfu": "the peak of this device is not known", **(unread or {})}
    why["watts"] = EnergyMeter(device).why_not
    told = dict(dtype=str(dtype).removeprefix("torch."), **more, model=asdict(sizes))
    return make(benchmark, asdict(config), device, rows, [*missing, *gaps(rows, why)], **told)


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result that fits the schema, whole or not at all.

    One that does not is kept as `path` + ".unfit", which `bench report` takes for no result; where
    nothing can be written there, among the temporary files; else it is printed.

    Raises:
        RunError: it does not fit, or cannot be written there; says where the figures are.
    """
    try:
        text = json.dumps(result, indent=1)
        check(json.loads(text))
    except (MisfitError, TypeError) as error:  # TypeError: JSON has no such thing
        text = json.dumps(_plain(result), indent=1)
        kept = _kept(text, path.with_name(f"{path.name}.unfit"))
        raise RunError(f"the result does not fit schema.json: {error}; {kept}") from None
    try:
        _replace(path, text)
    except OSError as error:
        kept = _kept(text, path)
        raise RunError(f"json = {str(path)!r}: {error.strerror}; {kept}") from None


def finish(result: Mapping[str, Any], json: str, asked: str, table: str) -> None:
    """Ends any benchmark: writes its file where asked, says what was measured, prints its table.

    Args:
        result: as `make` gives it.
        json: the file's path; empty: none.
        asked: the settings that matter, in words.
        table: what follows.

    Raises:
        RunError: see `write`.
    """
    if json:
        write(result, Path(json))
    told = result["conditions"]
    cores = f"{result['cores']} cores" if "cores" in result else f"{told['threads']} threads"
    dtype = f", {result['dtype']}" if "dtype" in result else ""
    print(f"{told['device']}, {cores}, torch {told['torch']}{dtype}; {asked}\n{table}")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(f"{text}\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _kept(text: str, path: Path) -> str:
    """Writes `text` where it can, and says where that was."""
    with suppress(OSError):
        _replace(path, text)
        return f"its figures are in {path}"
    with suppress(OSError):
        folder = tempfile.mkdtemp(prefix="fastbert-bench-")
        _replace(Path(folder, path.name), text)
        return f"its figures are in {Path(folder, path.name)}"
    print(text)
    return "its figures are what was printed last"


def _plain(value: Any) -> Any:
    """As JSON can hold it: arrays and numbers of other packages as Python's, the rest in words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str | int | float | None):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else repr(value)


def conditions(device: torch.device) -> dict[str, Any]:
    """Device, its state, versions, commit and date."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": COMMIT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": _gpu(device) if cuda else None,
    }


# Heading -> key, format, unit.
_COLUMNS = {
    "ms": ("ms", ".3f", 1), "p20": ("ms_p20", ".3f", 1), "p80": ("ms_p80", ".3f", 1),
    "real tok/s": ("real_tokens_per_second", ",.0f", 1),
    "seq/s": ("sequences_per_second", ",.0f", 1), "MFU": ("mfu", ".1%", 1),
    "peak MiB": ("peak_memory_bytes", ",.1f", 2**20), "W": ("watts", ".0f", 1),
    "J/Mtok": ("joules_per_million_tokens", ".2f", 1),
}  # fmt: skip


def _figures(row: Row) -> list[str]:
    """What every benchmark prints; "-" where a figure is not known or has no meaning."""
    return [
        "-" if row.get(key) is None else format(row[key] / unit, form)
        for key, form, unit in _COLUMNS.values()
    ]


def table(
    result: Mapping[str, Any],
    what: str,
    more: Columns,
    remarks: tuple[str, Callable[[Row], str]],
) -> str:
    """The rows as text, one line each, and a line for each that is missing.

    Args:
        result: as `make` gives it.
        what: a row is.
        more: columns beyond those that every benchmark has.
        remarks: heading and text of what stands behind a row.
    """
    heading, remark = remarks
    lines = [[what, *_COLUMNS, *more, heading]]
    for row in result["rows"]:
        own = (cell(row) for cell in more.values())
        lines.append([row["name"], *_figures(row), *own, remark(row)])
    first, *widths, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    first = max([first, *(len(one["name"]) for one in result["missing"])])
    text = []
    for name, *cells, end in lines:
        aligned = (f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        text.append(f"{name:<{first}}{''.join(aligned)}   {end}".rstrip())
    text += [f"{one['name']:<{first}}  missing: {one['why']}" for one in result["missing"]]
    return "\n".join(text)


def metric(row: Row) -> str:
    """What a fine-tuned model is worth, as text: 88.3 ± 0.4% accuracy."""
    deviation = row["metric_deviation"]
    spread = "" if deviation is None else f" ± {deviation:.1f}"
    return f"{row['metric_mean']:.1f}{spread}% {row['metric']}"


def gaps(rows: Sequence[Row], why: Mapping[str, str]) -> list[dict[str, str]]:
    """{"name", "why"} of each figure of `why` that no row has; watts stand for all of energy."""
    return [
        {"name": "energy" if key == "watts" else key, "why": reason or "it could not be read"}
        for key, reason in why.items()
        if all(row.get(key) is None for row in rows)
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": 10 * properties.major + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str] | str:
    """Driver, power limit and clocks of the first GPU, or why they are not known."""
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader", "-i0"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return dict(zip(_SMI_FIELDS, said.strip().split(", "), strict=False))


def commit() -> str:
    """Of the tree that holds this file; "unknown" where that is no git checkout."""
    if CHECKOUT is None:  # a repository around the environment is another project's
        return "unknown"
    try:
        head = subprocess.run(
            ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip()


# Read as the process starts: files may change during a long run, but not the code that runs.
COMMIT = commit()
