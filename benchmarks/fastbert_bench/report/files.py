"""Result files of every kind as one shape, for `fastbert bench report`.

A file fits `schema.json`, or is a stage of `python -m fastbert_bench.gpu` (kernels.json and
step-<workload>.json), which is older than the schema and is turned into the same shape here.
"""

import contextlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.errors import UserError
from fastbert_bench.measure.places import ROOT
from fastbert_bench.measure.result import Row
from fastbert_bench.measure.schema import SCHEMA, MisfitError, check
from fastbert_bench.suites.kernels import from_stage

TITLES = {
    "step": "Training step",
    "kernels": "Kernels",
    "inference": "Inference",
    "data": "Data loader",
    "convergence": "Loss over wall time",
    "dropin": "One line in Trainer",
    "finetune": "Fine-tuning",
    "serve": "Service under load",
    "profile-step": "Where a step's time goes",
    "profile-kernel": "One kernel over sizes",
    "estimate": "Estimates: computed, not measured",
}
_PARTS = ("settings", "conditions", "rows", "missing")
# What may differ between two runs of one measurement.
_INCIDENTAL = {"against", "device", "json", "op", "png", "rounds", "seconds", "seed", "trace"}


@dataclass(frozen=True)
class Result:
    """One file: `rows` have a `name`, `missing` is a list of {"name", "why"}."""

    file: str
    kind: str
    settings: Mapping[str, Any]
    conditions: Mapping[str, Any]
    rows: Sequence[Row]
    missing: Sequence[Mapping[str, str]]
    more: Mapping[str, Any] = field(default_factory=dict)
    """Figures that belong to no row: ceilings, ablations, floor_ms, curves, …"""

    @property
    def device(self) -> str:
        return str(self.conditions["device"])

    @property
    def on_gpu(self) -> bool:
        return bool(self.conditions["device_type"] == "cuda")

    @property
    def date(self) -> str:
        """Day of the measurement."""
        return str(self.conditions["date"])[:10]

    @property
    def stem(self) -> str:
        """For names of pictures."""
        return Path(self.file).stem

    @property
    def label(self) -> str:
        """What was measured, and on what."""
        return f"{self.workload}, {self.device}"

    @property
    def workload(self) -> str:
        """What was measured, in words; the file's name where the settings do not say."""
        asked = self.settings
        known = [str(Path(str(asked["model"])).name)] if "model" in asked else []
        if "batch_size" in asked:
            known.append(f"{asked['batch_size']} sequences")
        if "max_seq_length" in asked:
            known.append(f"at most {asked['max_seq_length']} tokens")
        if "lengths" in asked:
            known.append(f"{Path(str(asked['lengths'])).name} lengths")
        if self.kind == "serve":
            known.append(f"{asked['texts']} texts")
        if self.kind == "finetune":
            known.append(f"{asked['seeds']} seed{'s' * (asked['seeds'] != 1)}")
        if "dtype" in self.more:
            known.append(self.more["dtype"])
        return ", ".join(known) or self.stem

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for two runs of the same measurement on the same kind of device."""
        settings = {key: self.settings[key] for key in self.settings if key not in _INCIDENTAL}
        return self.kind, self.device, json.dumps(settings, sort_keys=True)


def parsed(text: str, file: str) -> Result:
    """A file's text as a result.

    Raises:
        UserError: it does not fit, and why.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a result: must be one JSON object")
    stage = content.get("stage")
    if stage is None and "format" not in content:
        raise UserError(f"{file}: not a result: it has no format (see schema.json)")
    try:
        if stage is None:
            check(content)
            if content["benchmark"] == "profile-kernel":  # one name for all its sizes
                letter = content["grows"]
                for row in content["rows"]:
                    row["name"] += f", {letter} = {row['sizes'][letter]}"
            parts = {key: content.pop(key) for key in _PARTS}
            del content["format"]
            return Result(file, content.pop("benchmark"), **parts, more=content)
        if stage not in _STAGES:
            raise UserError(f"{file}: not a result: stage {stage!r} is not one of kernels, step")
        return _STAGES[stage](content, file)
    except MisfitError as error:
        raise UserError(f"{file}: does not fit the schema: {error}") from None


def timed(row: Row) -> Row:
    """The row's times; for a row that has each round's rate only, of a million tokens."""
    rates = row.get("rounds_tokens_per_second")
    if "ms" in row or not rates:
        return row
    times = [1e9 / rate for rate in rates]
    low, middle, high = (float(x) for x in np.percentile(times, (20, 50, 80)))
    return {"ms": middle, "ms_p20": low, "ms_p80": high, "rounds_ms": times}


# Stages of `python -m fastbert_bench.gpu`


def _check_stage(content: Any, rows: str, row_needs: Sequence[str], needs: Row) -> None:
    """Their figures are the schema's; their conditions lack what was added later."""
    row = dict(SCHEMA["properties"]["rows"]["items"], required=row_needs)
    needs = {"conditions": ("device", "device_type", "torch", "commit", "date"), **needs}
    properties = {key: {"type": "object", "required": list(of)} for key, of in needs.items()}
    check(
        content,
        {
            "$defs": SCHEMA["$defs"],
            "required": [rows, *needs],
            "properties": {rows: {"type": "array", "items": row}, **properties},
        },
    )


def _gap(name: str, why: object) -> dict[str, str]:
    return {"name": name, "why": "does not hold" if why is False else str(why)}


def _gpu_step(content: Any, file: str) -> Result:
    _check_stage(
        content, "contenders", ("name", "ms", "ms_p20", "ms_p80", "ratio"),
        {"workload": ("model", "B", "S", "lengths")},
    )  # fmt: skip
    asked, ablations = content["workload"], content.get("ablations") or []
    missing = [_gap(*line.partition(": ")[::2]) for line in content.get("failed", ())]
    missing += [_gap(*one) for one in content.get("checks", {}).items() if one[1] is not True]
    missing += [_gap(row["name"], row["failed"]) for row in ablations if "failed" in row]
    names = {"model": "model", "batch_size": "B", "max_seq_length": "S", "lengths": "lengths"}
    settings = {name: asked[key] for name, key in names.items()}
    more = {key: content[key] for key in content if key not in ("workload", "contenders")}
    rows, conditions = content["contenders"], content["conditions"]
    return Result(file, "step", settings, conditions, rows, missing, more)


def _gpu_kernels(content: Any, file: str) -> Result:
    _check_stage(content, "rows", ("op", "direction", "sizes", "contender"), {"ops": ()})
    try:
        found = from_stage(content)
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: not a stage of fastbert_bench.gpu.__main__: {error!r}") from None
    rows, missing, conditions = found.pop("rows"), found.pop("missing"), content["conditions"]
    settings = {"quick": content.get("quick", False)}
    # Without a GPU the kernels run in Triton's interpreter.
    found["rehearsal"] = conditions["device_type"] == "cpu"
    return Result(file, "kernels", settings, conditions, rows, missing, found)


_STAGES = {"step": _gpu_step, "kernels": _gpu_kernels}
_CHECKS = ("gpu", "smoke", "pretrain", "dropin")
"""Stages that tell what held and what ran, not how fast."""


# Where files come from


def load(paths: Sequence[str]) -> tuple[list[Result], list[str]]:
    """The results in files and folders, and a line for each file of a folder that is none.

    Raises:
        UserError: a file that was named is no result, or there is none at all.
    """
    found: list[Result] = []
    refused: list[str] = []
    for path in map(Path, paths):
        if path.is_file():
            found.append(parsed(_text(path), str(path)))
        else:
            results, lines = in_folder(path)
            found, refused = found + results, refused + lines
    for line in refused:
        print(f"refused: {line}", file=sys.stderr)
    if not found:
        raise UserError(f"{', '.join(paths)}: no result file that fits schema.json")
    return list({one.file: one for one in found}.values()), refused


def in_folder(folder: Path) -> tuple[list[Result], list[str]]:
    """The results below a folder, and a line for each file that is none."""
    found: list[Result] = []
    refused: list[str] = []
    for file in sorted(folder.rglob("*.json")):
        # The pieces of a stage lie in a folder beside the whole; a trace is no result.
        inside = [above for above in file.parents if above.is_relative_to(folder)]
        piece = any(above.name and above.with_suffix(".json").exists() for above in inside)
        if piece or file.name.endswith(".trace.json"):
            continue
        try:
            text = _text(file)
            if not _is_of_checks(text):
                found.append(parsed(text, str(file)))
        except UserError as error:
            refused.append(str(error))
    return found, refused


def _is_of_checks(text: str) -> bool:
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        return isinstance(content, dict) and content.get("stage") in _CHECKS
    return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise UserError(f"{path}: cannot be read: {reason}") from None


def load_commit(commit: str, paths: Sequence[str]) -> tuple[list[Result], list[str]]:
    """The same files and folders as they were committed.

    Raises:
        UserError: there is no such commit, or it holds no result there.
    """
    here = [str(Path(path).resolve().relative_to(ROOT)) for path in paths
            if Path(path).resolve().is_relative_to(ROOT)]  # fmt: skip
    if len(here) < len(paths):
        raise UserError(f"against = {commit!r}: a commit needs files of this repository to compare")
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, "--", *here]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"against = {commit!r} is no folder, and as a commit: {' '.join(why)}")
    found: list[Result] = []
    refused: list[str] = []
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive.getmembers():
            held = archive.extractfile(member) if member.name.endswith(".json") else None
            if held is not None:
                try:
                    text = held.read().decode(errors="replace")
                    found.append(parsed(text, f"{commit}:{member.name}"))
                except UserError as error:
                    refused.append(str(error))
    if not found:
        raise UserError(f"against = {commit!r}: {'; '.join(refused) or 'no result file there'}")
    return found, refused
