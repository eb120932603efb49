"""Checkpoints of a run: whole or not there, no pickle, checked before they are trusted.

    checkpoints/step-000010/
        weights.safetensors     fp32 masters under the model's parameter names
        optimizer.safetensors   AdamW's moments
        state.json              step, data position, counters, the recipe, size and SHA-256 of both

A checkpoint is written under a temporary name, flushed to the disk, and renamed. What a resume
needs beside it is the run's `config.toml`, `data/` and `tokenizer/`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastbert.errors import RunError, UserError

FORMAT = 1
_FILES = ("weights.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """JSON: `updates`, `data` (the packer's state), `tokens`, `recipe`."""


def folder_of(run: Path, step: int) -> Path:
    """Where a run's checkpoint of that step lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes a checkpoint and deletes all but the newest `keep` of the run.

    Raises:
        RunError: it cannot be written (disk full, no permission); nothing half-written stays.
    """
    final = folder_of(run, checkpoint.step)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in zip(_FILES, (checkpoint.weights, checkpoint.optimizer), strict=True):
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / name)
        state = {
            "format": FORMAT,
            "step": checkpoint.step,
            "files": {name: _fingerprint(temporary / name) for name in _FILES},
            **checkpoint.state,
        }
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (*(temporary / name for name in _FILES), temporary / "state.json", temporary):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        newest = newest_folder(run)
        kept = f"; the newest whole checkpoint is {newest}" if newest else ""
        raise RunError(f"{final}: cannot write the checkpoint: {_reason(error)}{kept}") from None
    for old in list(_folders(run))[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _folders(run: Path) -> Iterator[Path]:
    """The run's checkpoints, newest first; temporary ones do not match."""
    found = [
        path
        for path in (run / "checkpoints").glob("step-*")
        if path.is_dir() and path.name.removeprefix("step-").isdigit()
    ]
    yield from sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest_folder(run: Path) -> Path | None:
    """The newest checkpoint of a run, unread."""
    return next(_folders(run), None)


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint after checking sizes and digests.

    Raises:
        UserError: the folder is not a checkpoint, or is damaged.
    """
    if not (folder / "state.json").is_file():
        raise UserError(f"resume = {str(folder)!r} is not a checkpoint: it holds no state.json")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UserError(f"{folder}: has format {state['format']}, this version reads {FORMAT}")
        for name in _FILES:
            if _fingerprint(folder / name) != state["files"][name]:
                raise _damaged(folder, f"{name} is cut short or changed")
        weights, optimizer = (load_file(folder / name) for name in _FILES)
        return Checkpoint(int(state["step"]), weights, optimizer, state)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, str(error)) from None


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder}: damaged checkpoint ({what}): delete it and resume from another (--resume auto "
        "takes the newest whole one)"
    )


def load_newest(run: Path, warn: Any) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where it has none at all.

    Args:
        run: the run's folder.
        warn: called with one line for each damaged checkpoint passed over.

    Raises:
        UserError: checkpoints are there, but every one is damaged.
    """
    last_error: UserError | None = None
    for folder in _folders(run):
        try:
            return load(folder)
        except UserError as error:
            last_error = error
            warn(f"{folder.name} is damaged and was passed over: {error}")
    if last_error is not None:
        raise last_error
    return None


# What may differ between a checkpoint and the run that goes on from it.
_FREE = {
    *("out", "device", "precision", "torch_compile", "num_threads", "resume", "stop_at_step"),
    *("data", "tokenizer"),  # their content is checked by fingerprint
    *("max_steps", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
    *("max_eval_batches", "report_to"),
}


def check_recipe(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Compares two recipes; returns a line for each free setting that changed what is trained.

    Raises:
        UserError: a setting differs that a run cannot change half-way.
    """
    for name, value in saved.items():
        if name in now and name not in _FREE and now[name] != value:
            raise UserError(
                f"{name} = {now[name]!r} differs from {value!r} in {where}: leave it out to go on, "
                "or start a new run with another --out"
            )
    return [
        f"{name} is now {now[name]!r}, was {saved[name]!r}"
        for name in ("max_steps", "precision", "device")
        if name in saved and now[name] != saved[name]
    ]
