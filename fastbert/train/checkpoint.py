"""Checkpoints of a run: whole or not there, no pickle, checked before they are trusted.

    checkpoints/step-000010/
        weights.safetensors     fp32 masters under the model's parameter names
        optimizer.safetensors   the optimizer's moments
    state.json              step, data position, counters, recipe, SHA-256 of all three

A checkpoint is written under a temporary name, flushed to the disk, and renamed. What a resume
needs beside it is the run's `config.toml`, `data/` and `tokenizer/`.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastbert.config import ModelConfig, PretrainConfig
from fastbert.errors import RunError, UserError
from fastbert.settings import checked, settings
from fastbert.train.interrupts import held_signals

FORMAT = 2
_FILES = ("weights.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """JSON: `updates`, `data` (the packer's state), `tokens`, `skipped`, `recipe`, `sizes`."""


def folder_of(run: Path, step: int) -> Path:
    """Where a run's checkpoint of that step lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(run: Path, checkpoint: Checkpoint, keep: int, again: str = "--resume auto") -> Path:
    """Writes a checkpoint and deletes all but the newest `keep` of the run.

    Later ones, of a run that went on from an earlier checkpoint, belong to a past that this run no
    longer has: they are deleted as well.

    Args:
        run: the run's folder.
        checkpoint: what is written.
        keep: how many stay.
        again: what is typed to go on.

    Raises:
        RunError: it cannot be written (disk full, no permission); nothing half-written stays.
    """
    final = folder_of(run, checkpoint.step)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        for left_over in final.parent.glob(".step-*.tmp"):  # of a run that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in zip(_FILES, (checkpoint.weights, checkpoint.optimizer), strict=True):
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / name)
        state = {
            "format": FORMAT,
            "step": checkpoint.step,
            "files": {name: _fingerprint(temporary / name) for name in _FILES},
            **checkpoint.state,
        }
        state["sha256"] = _digest(state)
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (*(temporary / name for name in _FILES), temporary / "state.json", temporary):
            _flush(path)
        with held_signals():
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        newest = newest_folder(run)
        kept = (
            f"the newest whole checkpoint is {newest}" if newest else "no checkpoint is there yet"
        )
        raise RunError(
            f"{final}: cannot write the checkpoint: {_reason(error)}; make room and go on with "
            f"{again} ({kept})"
        ) from None
    except BaseException:  # a second signal
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    earlier = [folder for folder in _folders(run) if _step_of(folder) < checkpoint.step]
    kept_folders = {final, *earlier[: keep - 1]}
    for folder in list(_folders(run)):
        if folder not in kept_folders:
            shutil.rmtree(folder, ignore_errors=True)
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


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(run: Path) -> Iterator[Path]:
    """The run's checkpoints, newest first; temporary ones do not match."""
    found = [
        path
        for path in (run / "checkpoints").glob("step-*")
        if path.is_dir() and path.name.removeprefix("step-").isdecimal()
    ]
    yield from sorted(found, key=_step_of, reverse=True)


def newest_folder(run: Path, last: int | None = None) -> Path | None:
    """The newest checkpoint of a run, or the newest up to step `last`, unread."""
    found = _folders(run)
    return next((folder for folder in found if last is None or _step_of(folder) <= last), None)


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint of pre-training after checking sizes and digests.

    Raises:
        UserError: the folder is not a checkpoint, or is damaged.
    """
    try:
        return _read(folder, what_is_wrong)
    except UserError as error:
        raise UserError(f"{error}; --resume auto takes the newest whole one") from None


def _read(folder: Path, what_is_wrong: Callable[[dict[str, Any]], str]) -> Checkpoint:
    if not (folder / "state.json").is_file():
        raise _damaged(folder, "it holds no state.json")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            shown = repr(state["format"])[:50]
            raise UserError(f"{folder}: has format {shown}, this version reads {FORMAT}")
        if state.pop("sha256") != _digest(state):
            raise _damaged(folder, "state.json is changed")
        for name in _FILES:
            if _fingerprint(folder / name) != state["files"][name]:
                raise _damaged(folder, f"{name} is cut short or changed")
        wrong = what_is_wrong(state)
        if wrong:
            raise _damaged(folder, f"state.json: {wrong}")
        weights, optimizer = (load_file(folder / name) for name in _FILES)
        return Checkpoint(state["step"], weights, optimizer, state)
    except OSError as error:
        raise _damaged(folder, f"{Path(error.filename or folder).name}: {error.strerror}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(folder, "state.json is cut short or changed") from None


_COUNT = range(2**63)


def what_is_wrong(state: dict[str, Any]) -> str:
    """What no checkpoint of pre-training says, whatever its digest; empty: nothing is."""
    for name in ("step", "updates", "skipped", "tokens", "streak", "micro_batches"):
        if not _is_count(state.get(name)):
            return f"{name} must be a count"
    if state["updates"] + state["skipped"] != state["step"]:
        return "updates and skipped must add up to step"
    if not _is_count(state.get("split")) or state["split"] & (state["split"] - 1):
        return "split must be a power of 2"
    window: Any = state.get("window")
    scale: Any = state.get("loss_scale")
    if not (_is_list(window, 2) and _is_number(window[0]) and _is_count(window[1])):
        return "window must be a sum and a count"
    if scale is not None and not (
        _is_list(scale, 2) and _is_number(scale[0]) and scale[0] > 0 and _is_count(scale[1])
    ):
        return "loss_scale must be a factor and a count"
    for name, config in (("recipe", PretrainConfig), ("sizes", ModelConfig)):
        given, known = state.get(name), {setting.name: setting for setting in settings(config)}
        if not isinstance(given, dict) or (config is ModelConfig and given.keys() != known.keys()):
            return f"{name} must be settings"
        try:
            for key in given.keys() & known.keys():
                checked(known[key], given[key])
        except UserError as error:
            return f"{name} must be settings ({error})"
    return _what_is_wrong_with_data(state.get("data"))


def _what_is_wrong_with_data(data: Any) -> str:
    shape = data.get("shape") if isinstance(data, dict) else None
    shape = dict(shape) if isinstance(shape, dict) else {}
    digest = shape.pop("data", "0" * 64)  # checkpoints once had none
    whole = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
    if not whole or not all(map(_is_count, shape.values())):
        return "data.shape must be sizes and a digest"
    names = {"tokens_per_batch", "num_slots", "max_masked", "max_seq_length", "seed"}
    if shape.keys() != names | {"documents", "tokens"}:
        return "data.shape must be sizes and a digest"
    for name in ("batches", "real_tokens", "room"):
        if not _is_count(data.get(name)):
            return f"data.{name} must be a count"
    planner, pending = data.get("planner"), data.get("pending")
    if not isinstance(planner, dict) or not isinstance(pending, list):
        return "data.planner and data.pending must be there"
    for spans in pending:
        if not (_is_list(spans, 5) and all(map(_is_count, spans[:4]))):
            return "data.pending must be spans"
        a_start, a_end, b_start, b_end, label = spans
        length = a_end - a_start + b_end - b_start
        if not (a_start < a_end <= shape["tokens"] and b_start <= b_end <= shape["tokens"]):
            return "data.pending must be spans of the data"
        if length > shape["max_seq_length"] or type(label) is not int or label not in (0, 1, -100):
            return "data.pending must be sequences with a label"
    for name in ("epoch", "position"):
        if not _is_count(planner.get(name)):
            return f"data.planner.{name} must be a count"
    if planner["position"] > shape["documents"] or type(planner.get("balance")) is not int:
        return "data.planner must stand in the data"
    if abs(planner["balance"]) > 2**31:
        return "data.planner must stand in the data"
    opened = planner.get("open")
    if not (isinstance(opened, list) and opened) or not all(
        _is_list(cursor, 2) and all(map(_is_count, cursor)) and cursor[0] < shape["documents"]
        for cursor in opened
    ):
        return "data.planner.open must be documents and places"
    rng: Any = planner.get("rng")
    try:
        np.random.PCG64(0).state = rng
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError):
        return "data.planner.rng must be a PCG64"
    return ""


def _is_count(value: Any) -> bool:
    return type(value) is int and value in _COUNT


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2.0**1000


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: damaged checkpoint: {what}")


def load_newest(
    run: Path,
    warn: Callable[[str], None],
    what_is_wrong: Callable[[dict[str, Any]], str] = what_is_wrong,
) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None where it has none at all.

    Args:
        run: the run's folder.
        warn: called with one line for each damaged checkpoint passed over.
        what_is_wrong: tells what no such run's state.json says; empty where there is nothing.

    Raises:
        UserError: checkpoints are there, but every one is damaged.
    """
    passed_over: list[UserError] = []
    for folder in _folders(run):
        try:
            found = _read(folder, what_is_wrong)
        except UserError as error:
            passed_over.append(error)
            continue
        for reason in passed_over:
            warn(f"passed over: {reason}")
        return found
    if passed_over:
        raise UserError(
            f"resume: none of the {len(passed_over)} checkpoints in {run} is whole "
            f"({passed_over[0]}): start a new run with another --out"
        )
    return None


# What may differ between a checkpoint and the run that goes on from it.
_FREE = {
    *("out", "device", "precision", "torch_compile", "num_threads", "resume", "stop_at_step"),
    *("step", "kernels", "attn_implementation", "gradient_checkpointing", "last_layer_masked_only"),
    *("dataloader_num_workers", "dataloader_prefetch_factor"),
    *("data", "tokenizer", "do_lower_case", "strip_accents"),  # checked by fingerprint
    *("max_steps", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
    *("max_eval_batches", "report_to"),
}


def check_recipe(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Compares two recipes; returns a line for each free setting that changed what is trained.

    Raises:
        UserError: a setting differs that a run cannot change half-way.
    """
    once_absent = {one.name: one.default for one in settings(PretrainConfig)}
    for name, value in {**once_absent, **saved}.items():
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
