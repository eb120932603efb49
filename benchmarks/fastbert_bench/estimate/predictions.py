"""What a step on a GPU was expected to take, before one had run: predictions.json.

`python -m fastbert_bench.estimate.predictions --write` computes it by `estimate.run` for every
workload and kernel of `python -m fastbert_bench.gpu`, and writes the tables of benchmarks/LOG.md.
What was predicted of a device stays as it was once a step measured there lies under
benchmarks/results/: a wrong prediction is worth as much as a right one, and the tables say how far
off it was.
"""

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.config import ModelConfig, model_config
from fastbert_bench.estimate.run import DEVICES, Device, Memory
from fastbert_bench.estimate.step_cost import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    PRODUCTS,
    SHORTEST,
    Lengths,
    Paper,
)
from fastbert_bench.kernels.costs import COSTS, Cost, model_sizes
from fastbert_bench.measure.flops import MLM_PROBABILITY, executed_flops_per_token, flops_per_token
from fastbert_bench.measure.marked import with_lines
from fastbert_bench.measure.places import RESULTS, ROOT
from fastbert_bench.measure.workloads import SEED, TINY, WORKLOADS, Workload

FILE = Path(__file__).with_name("predictions.json")
LOG = ROOT / "benchmarks" / "LOG.md"
BEGIN = "<!-- python -m fastbert_bench.estimate.predictions --write -->"
END = "<!-- end of the predictions -->"
TOKENS = 65_536
"""Real tokens of the step that a trace's figures are scaled to."""
TRACED = ("base-512-full", "large-512-natural")
GPUS = ("h100", "h200", "a100-80gb")

Prediction = dict[str, Any]
Table = dict[str, dict[str, Prediction]]
"""Device -> "step", "kernel" or "trace" and a name -> what is predicted of it."""


def device_of(name: str) -> Device | None:
    """What `fastbert estimate` knows of a device by that name."""
    return next((one for one in DEVICES.values() if re.search(one.names, name)), None)


def predict(sizes: ModelConfig, lengths: np.ndarray, tokens: int, device: Device) -> Prediction:
    """A step of `tokens` real tokens, of which sequences of (B,) `lengths` are typical."""
    of = Lengths.of(lengths)
    cost = device.step(sizes, tokens, of)
    rate = tokens / cost.seconds
    masked = round(MLM_PROBABILITY * float(lengths.sum()))
    families = {one.name: one for one in cost.families}
    products = sum(families[name].seconds for name in PRODUCTS)
    memory = Memory.of(sizes, device)
    per_token = flops_per_token(sizes, lengths), executed_flops_per_token(sizes, lengths, masked)
    mfu, executed = (one * rate / (device.peak_flops or math.inf) for one in per_token)
    found = {
        "tokens": tokens,
        "ms": cost.seconds * 1e3,
        "low_ms": cost.low * 1e3,
        "high_ms": cost.high * 1e3,
        "tokens_per_second": rate,
        "sequences_per_second": rate / of.mean,
        "mfu": mfu,
        "mfu_executed": executed,
        "over_products": cost.seconds / products,
        "attention_tflops": [
            families[name].flops / families[name].seconds / 1e12
            for name in (ATTENTION_FORWARD, ATTENTION_BACKWARD)
        ],
        "gib": (memory.state_bytes + tokens * memory.bytes_per_token) / 2**30,
        "families": {name: one.seconds * 1e3 for name, one in families.items()},
    }
    told: Prediction = json.loads(json.dumps(found), parse_float=_rounded)
    return told


def predict_kernel(cost: Cost, S: int, device: Device) -> Prediction:
    """One op of BERT-base on `TOKENS` tokens in full sequences of S, dropout where it has any."""
    sizes = model_sizes(768, S)
    moved, flops = cost.bytes_of(sizes), cost.flops_of(sizes)
    lengths = np.full(TOKENS // S, S)
    seconds = []
    for shares in device.moods:
        paper = Paper(device.ceilings, shares, device.arch)
        if cost.op == "attention":
            base = model_config("base")
            one = paper.attention(cost.direction, lengths, lengths, base, 1.0, moved)[0]
        else:
            one = paper.memory(moved)
        seconds.append(max(SHORTEST, one))
    likely, low, high = seconds
    return {
        key: _rounded(str(value))
        for key, value in {
            "ms": likely * 1e3, "low_ms": low * 1e3, "high_ms": high * 1e3,
            "tflops": flops / likely / 1e12, "gbps": moved / likely / 1e9,
        }.items()
    }  # fmt: skip


def _rounded(text: str) -> float:
    return float(f"{float(text):.4g}")


def estimated(sizes: ModelConfig, lengths: np.ndarray, device: Device) -> dict[str, float]:
    """Milliseconds of a step of `TOKENS` as `fastbert estimate` says today: by family, and for the
    passes also by op and direction, as "bias_gelu forward"."""
    cost = device.step(sizes, TOKENS, Lengths.of(lengths))
    found = {one.name: one.seconds * 1e3 for one in cost.families}
    return found | {name: seconds * 1e3 for name, seconds in cost.passes.items()}


@functools.cache
def committed(path: Path = FILE) -> Table:
    """What was predicted."""
    found: Table = json.loads(path.read_text(encoding="utf-8"))
    return found


def of(device_name: str, kind: str, workload: str) -> Prediction | None:
    """What was predicted of a workload on the device that its driver names so; None: nothing.

    Args:
        device_name: such as "NVIDIA H200".
        kind: "step" or "trace".
        workload: its name.
    """
    for name, found in committed().items():
        if re.search(DEVICES[name].names, device_name):
            return found.get(f"{kind} {workload}")
    return None


def make(found: Mapping[str, Any], before: Table) -> Table:
    """The whole table as of now; of devices in `found` what there was `before` stays as it was."""
    table: Table = {}
    for gpu in GPUS:
        device, here = DEVICES[gpu], table.setdefault(gpu, {})
        for step in WORKLOADS.values():
            if step.name != TINY:
                lengths = step.draw(np.random.default_rng(SEED))
                tokens = int(lengths.sum())
                here[f"step {step.name}"] = predict(step.sizes, lengths, tokens, device)
        for cost in COSTS:
            if cost.op == "attention" or cost.flops == "0":  # no product that cuBLAS makes
                for S in (128, 512) if cost.op == "attention" else (512,):
                    here[f"kernel {cost.op} {cost.direction} {S}"] = predict_kernel(cost, S, device)
        for name in TRACED:
            traced = Workload.of(name)
            lengths = traced.draw_tokens(TOKENS)
            here[f"trace {name}"] = predict(model_config(traced.model), lengths, TOKENS, device)
        if gpu in found:
            kept = before.get(gpu, {})
            table[gpu] = {name: kept.get(name, one) for name, one in here.items()}
    return table


def measured(results: Path = RESULTS) -> dict[str, dict[str, Prediction]]:
    """Device -> "step" or "kernel" and what -> our row in what the GPU command left there."""
    found: dict[str, dict[str, Prediction]] = {}
    for path in sorted(results.glob("*/step-*.json")) + sorted(results.glob("*/kernels.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        told = content["conditions"]
        gpu = next((g for g in GPUS if re.search(DEVICES[g].names, told["device"])), None)
        if gpu is None or told["device_type"] != "cuda":
            continue
        rows = found.setdefault(gpu, {})
        for row in content["rows"]:
            if path.stem != "kernels" and row["name"] == "fastbert":
                rows[f"step {path.stem.removeprefix('step-')}"] = row
            elif row.get("contender") == "ours" and row.get("ms"):
                sizes = row["sizes"]
                full = sizes.get("s", sizes["S"]) == sizes["S"]
                if full and (sizes["H"], sizes["T"]) == (768, TOKENS):
                    rows[f"kernel {row['op']} {row['direction']} {sizes['S']}"] = row
    return found


def table_lines(table: Table, found: Mapping[str, Mapping[str, Prediction]]) -> Iterator[str]:
    """The predictions as Markdown, steps and then kernels, each with what came of it."""
    yield (
        "| device | workload | ms (range) | tokens/s | MFU | executed | over products "
        "| attention, TFLOP/s | GiB | measured ms | off |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for device, workload, one, row in _rows("step", table, found):
        yield _line(
            device, workload, f"{one['ms']:.1f} ({one['low_ms']:.1f} to {one['high_ms']:.1f})",
            f"{one['tokens_per_second'] / 1e3:,.0f}k", f"{one['mfu']:.1%}",
            f"{one['mfu_executed']:.1%}", f"{one['over_products']:.2f}",
            " / ".join(f"{rate:.0f}" for rate in one["attention_tflops"]), f"{one['gib']:.1f}",
            f"{row['ms']:.1f}" if row else "not yet run", _off(one, row),
        )  # fmt: skip
    yield ""
    yield _line("kernel, direction, S: µs (range); measured, off", *table)
    yield "|---|" + "---|" * len(table)
    kernels: dict[str, list[str]] = {}
    for _, kernel, one, row in _rows("kernel", table, found):
        likely, low, high = (f"{one[key] * 1e3:,.0f}" for key in ("ms", "low_ms", "high_ms"))
        came = f"; {row['ms'] * 1e3:,.0f}, {_off(one, row)}" if row else "; not yet run"
        kernels.setdefault(kernel, []).append(f"{likely} ({low} to {high}){came}")
    for kernel, cells in kernels.items():
        yield _line(kernel, *cells)


def _rows(
    kind: str, table: Table, found: Mapping[str, Mapping[str, Prediction]]
) -> Iterator[tuple[str, str, Prediction, Prediction | None]]:
    """(device, name, what was predicted, what was measured) of each of a kind."""
    for device, predicted in table.items():
        for name, one in predicted.items():
            if name.startswith(f"{kind} "):
                row = found.get(device, {}).get(name)
                yield device, name.removeprefix(f"{kind} "), one, row


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _off(predicted: Prediction, row: Prediction | None) -> str:
    return f"{row['ms'] / predicted['ms'] - 1:+.0%}" if row else "-"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastbert_bench.estimate.predictions")
    parser.add_argument(
        "--write", action="store_true", help=f"write {FILE.name} and the table of {LOG.name}"
    )
    args = parser.parse_args(argv)
    found = measured()
    table = make(found, committed() if FILE.exists() else {})
    lines = list(table_lines(table, found))
    if args.write:
        FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        text = with_lines(LOG.read_text(encoding="utf-8"), LOG, BEGIN, END, lines)
        LOG.write_text(text, encoding="utf-8")
    else:
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
