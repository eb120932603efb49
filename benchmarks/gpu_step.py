"""The training step on a GPU: stage `step` of `python -m benchmarks.gpu`.

Each workload runs in a process of its own and writes one JSON file as it ends: first that our eager
step and our graph give the same losses and that neither waits for the device, then our graph, our
eager step and Hugging Face's variants in interleaved rounds, then our graph with each saving
switched off in turn, then the floor: the step's bare matrix products through cuBLAS.

L layers, H hidden size, F intermediate size, V vocabulary, T tokens, M masked tokens, N sequences.
"""

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contenders as ways
from benchmarks import result as results
from benchmarks import step, timing
from benchmarks.contenders import Contender, PaddedBatch
from fastbert.config import model_config
from fastbert.data.batch import Batch
from fastbert.hf import to_hf
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE, Ops, cpu_ops, triton_ops
from fastbert.train.graph import launcher
from fastbert.train.step import TrainStep

SEED = 42


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the lengths of a batch's sequences."""

    name: str
    model: str
    B: int
    S: int
    lengths: str  # "full", "natural" or "mlperf"
    against: tuple[str, ...]
    targets: dict[str, float]
    """Name of a figure -> the least it should be (`floor`, `memory`: the most)."""

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """(B,) lengths."""
        if self.lengths == "full":
            return np.full(self.B, self.S)
        if self.lengths == "natural":
            return ways.natural_lengths(self.B, self.S, rng)
        # MLPerf's Wikipedia: a mean of 254 of 512, both ends crowded.
        found = np.clip(np.rint(rng.normal(0.5, 0.34, self.B) * self.S), 16, self.S)
        return np.asarray(found, dtype=np.int64)


_RIVALS = ("hf-eager", "hf-sdpa", "hf-sdpa-compile", "hf-sdpa-compile-max")
# In the order of what one would miss most, should the time run out.
WORKLOADS = (
    Workload("base-512-full", "base", 64, 512, "full", _RIVALS,
             {"tokens_per_second": 850e3, "mfu": 0.5, "hf-eager": 3, "hf-sdpa": 2,
              "hf-sdpa-compile": 1.5, "floor": 1.35, "memory": 0.5}),
    Workload("large-512-mlperf", "large", 96, 512, "mlperf", ("hf-sdpa",),
             {"tokens_per_second": 248e3, "sequences_per_second": 975}),
    Workload("base-512-natural", "base", 96, 512, "natural", _RIVALS[:3],
             {"hf-eager": 5, "hf-sdpa": 4, "hf-sdpa-compile": 3}),
    Workload("base-128-full", "base", 256, 128, "full", _RIVALS[1:3],
             {"tokens_per_second": 950e3}),
)  # fmt: skip
_TINY = Workload("tiny-64-natural", "tiny", 8, 64, "natural", ("hf-sdpa",), {})


class Bench:
    """One workload on one device: its batches, and contenders made when they are needed."""

    def __init__(self, workload: Workload, device: torch.device, dtype: torch.dtype) -> None:
        self.workload, self.device, self.dtype = workload, device, dtype
        self.sizes = model_config(workload.model)
        rng = np.random.default_rng(SEED)
        self.lengths = workload.draw(rng)
        padded, packed = ways.make_batches(self.lengths, workload.S, self.sizes.vocab_size, rng)
        self.padded: list[PaddedBatch] = [
            {key: value.to(device) for key, value in batch.items()} for batch in padded
        ]
        self.packed: list[Batch] = [batch.to(device) for batch in packed]
        weights = to_hf(dict(self.model().named_parameters()), self.sizes)
        self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}

    def model(self, ops: Ops | None = None, **options: Any) -> Bert:
        """The same initial weights every time."""
        torch.manual_seed(SEED)
        if ops is None:
            ops = triton_ops() if self.device.type == "cuda" else cpu_ops(False)
        return Bert(self.sizes, ops, **options).to(self.device)

    def ours(self, name: str, model: Bert | None = None, **options: Any) -> Contender:
        """Our step; `options` are those of `step.ours`, others change the recipe."""
        own = {key: options.pop(key) for key in ("graph", "main_grads") if key in options}
        own.setdefault("graph", self.device.type == "cuda")
        return ways.ours(
            name, model or self.model(), self.packed, ways.make_recipe(SEED, **options),
            self.dtype, **own,
        )  # fmt: skip

    def rival(self, name: str) -> Contender:
        """Hugging Face's step."""
        return ways.rival(
            name, self.sizes, self.weights, self.padded, ways.make_recipe(SEED),
            self.dtype, self.device,
        )  # fmt: skip


def check(bench: Bench) -> dict[str, bool | str]:
    """Our step in its forms: same losses, same weights, no question to the host."""
    found: dict[str, bool | str] = {}
    cuda = bench.device.type == "cuda"
    kinds: dict[str, dict[str, Any]] = {"one micro-batch": {}}
    if cuda:
        kinds |= {
            "two micro-batches": {"gradient_accumulation_steps": 2},
            "LAMB": {"optim": "lamb"},
        }
    for kind, changes in kinds.items():
        eager, kept, _ = _trained(bench, False, **changes)
        again, other, _ = _trained(bench, False, **changes)
        same = eager == again and torch.equal(kept.flat.master, other.flat.master)
        found[f"{kind}: same bits twice"] = same
        found[f"{kind}: losses are finite and fall"] = bool(
            np.isfinite(eager).all() and eager[-1] < eager[0]
        )
        del again, other
        if not cuda:
            continue
        recorded, graphed, launch = _trained(bench, True, **changes)
        found[f"{kind}: the graph's losses are the eager ones"] = recorded == eager
        found[f"{kind}: the graph's weights are the eager ones"] = torch.equal(
            kept.flat.master, graphed.flat.master
        )
        batches = bench.packed[: changes.get("gradient_accumulation_steps", 1)]
        for name, work in (("eager step", kept), ("graph", launch)):
            found[f"{kind}: the {name} asks the host nothing"] = _asks_nothing(work, batches)
    return found


def _trained(
    bench: Bench, graph: bool, steps: int = 6, **changes: Any
) -> tuple[list[float], TrainStep, Callable[[Sequence[Batch]], None]]:
    """Losses of some steps, the trained state, and what launches a step."""
    train_step = TrainStep(bench.model(), ways.make_recipe(SEED, **changes), bench.dtype)
    count = changes.get("gradient_accumulation_steps", 1)
    launch = launcher(train_step, graph, accumulates=count > 1)
    losses = []
    for index in range(steps):
        launch([bench.packed[(index + i) % ways.NUM_BATCHES] for i in range(count)])
        losses.append(train_step.read().loss)
    return losses, train_step, launch


def _asks_nothing(
    launch: Callable[[Sequence[Batch]], None], batches: Sequence[Batch]
) -> bool | str:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(batches)
    except RuntimeError as error:
        return f"failed: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def floor_seconds(bench: Bench) -> float:
    """The step's linear layers alone, forward and both gradients, as bare cuBLAS products."""
    sizes, batch, device = bench.sizes, bench.packed[0], bench.device
    H, F, L, V = (
        sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers, sizes.vocab_size,
    )  # fmt: skip
    T, M = batch.num_tokens, batch.masked_labels.numel()
    last = M + batch.num_sequences  # rows of the last layer beyond its attention
    shapes = [(T, H, 3 * H)] * L
    for rows in [T] * (L - 1) + [last]:
        shapes += [(rows, H, H), (rows, H, F), (rows, F, H)]
    shapes += [(M, H, H), (M, H, V + -V % 64)]
    calls: list[Callable[[], object]] = []
    for rows, k, n in shapes:
        x, w, dy = (
            timing.random_like(shape, bench.dtype, device)
            for shape in ((rows, k), (n, k), (rows, n))
        )
        calls += [partial(torch.mm, *pair) for pair in ((x, w.t()), (dy, w), (dy.t(), x))]
    with _side_stream(device):
        replay = timing.Replay(calls, device)
        times = timing.interleaved({"floor": replay}, device, rounds=7, seconds=2.0)["floor"]
    return float(np.median(times)) * len(calls) / 1e3


def _side_stream(device: torch.device) -> Any:
    if device.type == "cuda":
        return torch.cuda.stream(torch.cuda.Stream(device))
    return torch.autograd.profiler.record_function("floor")


# Name -> changes; "model" and "ops" change the model, the rest as `Bench.ours`.
ABLATIONS: dict[str, dict[str, Any]] = {
    "without the CUDA graph": {"graph": False},
    "last layer everywhere": {"model": {"last_layer_masked_only": False}},
    "gradients by autograd, then copied": {"main_grads": False},
    "torch's fused AdamW": {"optim": "adamw_torch_fused"},
    "gradients in bf16": {"gradient_precision": "bf16"},
    "FlashAttention 2 of PyTorch": {"attn_implementation": "torch"},
    "layers computed twice (checkpointing)": {"model": {"gradient_checkpointing": True}},
    "plain PyTorch ops": {"reference": True, "graph": False},
}
_CPU_ABLATIONS = ("last layer everywhere", "gradients by autograd, then copied")


def ablations(bench: Bench, rounds: int, chosen: Sequence[str]) -> list[dict[str, Any]]:
    """Our step with one saving switched off, beside the whole, pair by pair."""
    whole, rows = bench.ours("whole"), []
    for name in chosen:
        try:
            rows.append({"name": name, **_ablation(bench, whole, name, rounds)})
        except Exception as error:  # a variant that fails is a finding, not the end
            rows.append({"name": name, "failed": _one_line(error)})
        _free(bench.device)
    return rows


def _ablation(bench: Bench, whole: Contender, name: str, rounds: int) -> dict[str, Any]:
    options = dict(ABLATIONS[name])
    ops = REFERENCE if options.pop("reference", False) else None
    if "attn_implementation" in options:
        ops = triton_ops(options.pop("attn_implementation"))
    model = bench.model(ops, **options.pop("model", {}))
    pair = [dataclasses.replace(whole, seconds=[]), bench.ours(name, model, **options)]
    able, failed = step.measure(pair, rounds, bench.device)
    if failed:
        return {"failed": failed[0]["why"]}
    row = step.summary(able, bench.sizes, bench.lengths, bench.device)[1]
    return {key: row[key] for key in ("ms", "ratio", "peak_memory_bytes")}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


class Record:
    """What is known of a workload, on disk after every part: a cut-off run loses nothing."""

    def __init__(self, bench: Bench, path: Path | None, commit: str | None, more: bool) -> None:
        self._device, self._path = bench.device, path
        if more and path is not None and path.exists():
            self.result = json.loads(path.read_text(encoding="utf-8"))
            return
        lengths, batch = bench.lengths, bench.packed[0]
        self.result = results.make(
            "step",
            dataclasses.asdict(bench.workload),
            bench.device,
            rows=[],
            dtype=str(bench.dtype).removeprefix("torch."),
            model=dataclasses.asdict(bench.sizes),
            real_tokens=batch.num_tokens,
            padded_tokens=bench.workload.B * bench.workload.S,
            sequences=batch.num_sequences,
            lengths=lengths.tolist(),
            checks={},
            ablations=[],
            floor_ms=None,
            seconds={},
        )
        if commit and self.result["conditions"]["commit"] == "unknown":
            self.result["conditions"]["commit"] = commit

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Does one part; one that fails is noted as missing, and the others go on."""
        started = time.perf_counter()
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.result["missing"].append({"name": name, "why": _one_line(error)})
            return None
        finally:
            _free(self._device)
            self.result["seconds"][name] = time.perf_counter() - started

    def keep(self, **found: Any) -> None:
        """Takes findings in, and writes the file anew."""
        self.result |= found
        self.result["targets"] = judged(self.result)
        if self._path is not None:
            write(self.result, self._path)


def measure(
    workload: Workload,
    device: torch.device,
    quick: bool,
    path: Path | None = None,
    commit: str | None = None,
    parts: Sequence[str] = ("first", "more"),
) -> dict[str, Any]:
    """Everything about one workload, written to `path` as it is found.

    "first" is what matters most: checks, our step beside the rivals that need no compiler, and the
    floor. "more" adds to its file: the compiled rivals, and our step with each saving switched off.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = Bench(workload, device, dtype)
    record = Record(bench, path, commit, more="first" not in parts)
    rounds = 3 if quick else 5
    rivals = workload.against[: 2 if quick else None]
    compiled = [name for name in rivals if "compile" in name]
    if "first" in parts:
        record.keep(checks=record.part("check", lambda: check(bench)) or {})
        plain = [name for name in rivals if name not in compiled]
        rows = record.part("contest", lambda: contest(bench, plain, rounds, record)) or []
        record.keep(rows=rows)
        floor = record.part("floor", lambda: floor_seconds(bench))
        record.keep(floor_ms=floor * 1e3 if floor else None)
    if "more" in parts:
        for name in compiled:  # each takes a minute and more to compile
            work = partial(contest, bench, [name], rounds, record, eager=False)
            found = record.part(name, work) or []
            record.keep(rows=record.result["rows"] + found[1:])
        if workload is WORKLOADS[0] or device.type == "cpu":
            chosen = _CPU_ABLATIONS if device.type == "cpu" else tuple(ABLATIONS)
            rows = record.part("ablations", lambda: ablations(bench, rounds, chosen))
            record.keep(ablations=rows or [])
    return record.result


def contest(
    bench: Bench, rivals: Sequence[str], rounds: int, record: Record, *, eager: bool = True
) -> list[dict[str, Any]]:
    """Rows of our step and of the rivals that can run, in interleaved rounds."""
    contenders = [bench.ours("fastbert")]
    if eager and bench.device.type == "cuda":
        contenders.append(bench.ours("fastbert-eager", graph=False))
    for name in rivals:
        try:
            made = bench.rival(name)
            ways.check_fair(contenders[0], made, drops=True)
            contenders.append(made)
        except Exception as error:
            record.result["missing"].append({"name": name, "why": _one_line(error)})
    able, failed = step.measure(contenders, rounds, bench.device)
    record.result["missing"] += failed
    return step.summary(able, bench.sizes, bench.lengths, bench.device)


def judged(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each target with what was measured, and whether it holds; None where it was not measured."""
    rows = {row["name"]: row for row in result["rows"]}
    ours = rows.get("fastbert", {})
    measured: dict[str, float | None] = {
        "tokens_per_second": ours.get("real_tokens_per_second"),
        "sequences_per_second": ours.get("sequences_per_second"),
        "mfu": ours.get("mfu"),
        "memory": rows.get("hf-sdpa", {}).get("memory_of_first_over_this"),
        "floor": ours["ms"] / result["floor_ms"] if ours and result["floor_ms"] else None,
    }
    measured |= {name: row["ratio"] for name, row in rows.items()}
    told = {}
    for name, wanted in result["settings"]["targets"].items():
        found = measured.get(name)
        most = name in ("memory", "floor")
        holds = None if found is None else found <= wanted if most else found >= wanted
        told[name] = {"target": wanted, "measured": found, "holds": holds}
    return told


def table(result: dict[str, Any]) -> str:
    """The result of one workload as text."""
    settings = result["settings"]
    lines = [
        f"{settings['name']}: {result['sequences']} sequences, {result['real_tokens']} real "
        f"tokens, mean length {np.mean(result['lengths']):.0f}; {result['conditions']['device']}"
    ]
    lines += [f"  {'ok  ' if ok is True else 'FAIL'} {name}" + ("" if ok is True else f": {ok}")
              for name, ok in result["checks"].items()]  # fmt: skip
    if result["rows"]:
        lines += [f"  {line}" for line in step.table(result).splitlines()]
    else:
        lines += [f"  missing {one['name']}: {one['why']}" for one in result["missing"]]
    if result["floor_ms"]:
        lines.append(f"  floor (bare products) {result['floor_ms']:.2f} ms")
    for row in result["ablations"]:
        told = row.get("failed") or f"{row['ms']:8.2f} ms, x{row['ratio']:.3f}"
        lines.append(f"  - {row['name']:<40}{told}")
    for name, target in result["targets"].items():
        verdict = {True: "holds", False: "MISSED", None: "not measured"}[target["holds"]]
        found = f"{target['measured']:.4g}" if target["measured"] is not None else "-"
        lines.append(f"  target {name} {target['target']:g}: {found} {verdict}")
    return "\n".join(lines)


def write(result: dict[str, Any], path: Path) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def run(
    out: Path,
    quick: bool,
    *,
    device_type: str = "cuda",
    seconds: float = 300.0,
    commit: str | None = None,
) -> int:
    """All workloads, each in a process; 1 where one crashed, failed a check, or time ran out.

    Args:
        out: folder for step-<workload>.json.
        quick: fewer workloads, rivals and rounds.
        device_type: "cuda", or "cpu" to rehearse on a tiny model.
        seconds: that all of them may take together.
        commit: what the tree is, where it has no .git.
    """
    deadline = time.monotonic() + seconds
    workloads = (WORKLOADS if device_type == "cuda" else (_TINY,))[: 2 if quick else None]
    code = 0
    for part in ("first", "more"):  # of all workloads, before any is compared with a compiler
        for workload in workloads:
            command = [
                sys.executable, "-m", "benchmarks.gpu_step", workload.name, "--out", str(out),
                "--device", device_type, "--part", part, *(["--quick"] if quick else []),
                *(["--commit", commit] if commit else []),
            ]  # fmt: skip
            left = deadline - time.monotonic()
            if left < 5:
                print(f"{workload.name}, part {part!r}: no time left, not run", flush=True)
                code = 1
                continue
            try:
                done = subprocess.run(command, timeout=left, check=False).returncode
            except subprocess.TimeoutExpired:
                print(f"{workload.name}, part {part!r}: the time is up", flush=True)
                done = 1
            code = max(code, min(abs(done), 1))
    for workload in workloads:
        path = out / f"step-{workload.name}.json"
        if path.exists():
            print(table(json.loads(path.read_text(encoding="utf-8"))), flush=True)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """One workload's process; see `run` for the stage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step")
    known = {workload.name: workload for workload in (*WORKLOADS, _TINY)}
    parser.add_argument("workload", choices=known)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer rivals and rounds")
    parser.add_argument("--commit", help="of a tree without .git")
    parser.add_argument("--part", choices=("first", "more"), action="append")
    args = parser.parse_args(argv)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    path = args.out / f"step-{args.workload}.json"
    parts = args.part or ("first", "more")
    result = measure(known[args.workload], device, args.quick, path, args.commit, parts)
    bad = not all(ok is True for ok in result["checks"].values())
    return 1 if bad or not result["checks"] or not result["rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
