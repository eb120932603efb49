"""How fast batches come when a step costs nothing: `fastbert bench data`.

Random documents with sentence and document lengths of an encyclopedia are written as shards to a
temporary folder, beyond the size of a processor's caches. Then batches are taken as fast as they
come, with each number of workers in turn, round by round. Only real tokens count, and a core counts
by the CPU time that the caller and its workers spent: where workers outnumber the cores they share
them, and the figure per core tells what one more core would bring.

S longest sequence, T tokens of a batch, V vocabulary.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import result as results_file
from fastbert.config import DataBenchConfig, integers
from fastbert.data.pack import Packer
from fastbert.data.shards import FORMAT, Shards, _SplitWriter
from fastbert.data.tokenize import TokenIds
from fastbert.data.workers import BatchLoader

V = 30522
"""Tokens in the vocabulary of BERT, uncased; from `CONTINUATIONS` on they stand for "##" pieces."""
CONTINUATIONS = 24694
TARGET, TARGET_PER_CORE = 3e6, 4e5
"""Real tokens a second at S = 512: what 4 workers shall deliver, and each core for itself."""
SETTLING = 3
"""Rounds of all prefetched batches taken before the clock starts, as they cost nothing."""


def write_shards(folder: Path, tokens: int, seed: int) -> Shards:
    """Writes about so many random tokens: sentences of 25 on average, documents of 30 sentences."""
    rng = np.random.default_rng(seed)
    writer = _SplitWriter(os.fspath(folder), "train", np.dtype(np.uint16))
    while writer.tokens < tokens:
        counts = np.clip(np.rint(rng.lognormal(3.08, 0.53, rng.geometric(1 / 30))), 2, 256)
        ids = rng.integers(1000, V, int(counts.sum())).tolist()
        ends = np.cumsum(counts).astype(int).tolist()
        starts = [0, *ends[:-1]]
        writer.add([ids[start:end] for start, end in zip(starts, ends, strict=True)])
    writer.finish()
    stats = {
        kind: {"train": getattr(writer, kind)} for kind in ("documents", "sentences", "tokens")
    }
    meta = {
        "format": FORMAT,
        "dtype": "uint16",
        "shards": {"train": writer.shards},
        "vocab_size": V,
        "fingerprint": "",
        "stats": stats,
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return Shards.open(folder, "train")


def token_ids() -> TokenIds:
    """What packing needs to know of BERT's uncased vocabulary."""
    special = np.array([0, 100, 101, 102, 103])
    return TokenIds(V, 0, 100, 101, 102, 103, special, np.arange(V) >= CONTINUATIONS)


def cpu_seconds(loader: BatchLoader) -> float:
    """CPU time that this process and the loader's workers have spent, in all their threads."""
    # Linux numbers the CPU clock of another process so (clock_getcpuclockid).
    clocks = [(~pid << 3) | 2 for pid in loader.pids]
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def one_round(loader: BatchLoader, settle: int, seconds: float) -> tuple[float, float, float]:
    """Takes batches for so long; returns real tokens, wall seconds and CPU seconds."""
    for _ in range(settle):
        next(loader)
    tokens = 0
    spent, started = cpu_seconds(loader), time.perf_counter()
    while (wall := time.perf_counter() - started) < seconds:
        tokens += next(loader).num_tokens
    return tokens, wall, cpu_seconds(loader) - spent


def run(config: DataBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns the result."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
        shards = write_shards(Path(folder), config.corpus_tokens, config.seed)
        for S in integers("max_seq_lengths", config.max_seq_lengths, 8):
            for W, results in _measure(shards, S, config).items():
                tokens, wall, cpu = (list(column) for column in zip(*results, strict=True))
                rates = [n / s for n, s in zip(tokens, wall, strict=True)]
                per_core = [n / s for n, s in zip(tokens, cpu, strict=True)]
                rows.append(
                    {
                        "name": f"length {S}, {W} workers",
                        "max_seq_length": S,
                        "num_workers": W,
                        "real_tokens_per_second": statistics.median(rates),
                        "real_tokens_per_second_and_core": statistics.median(per_core),
                        "cores_used": sum(cpu) / sum(wall),
                        "rounds_tokens_per_second": rates,
                        "rounds_tokens_per_second_and_core": per_core,
                    }
                )
    cores = len(os.sched_getaffinity(0))
    return results_file.make(
        "data", dataclasses.asdict(config), torch.device("cpu"), rows, cores=cores
    )


def _measure(
    shards: Shards, S: int, config: DataBenchConfig
) -> dict[int, list[tuple[float, float, float]]]:
    results: dict[int, list[tuple[float, float, float]]] = {}
    with ExitStack() as stack:
        loaders = {}
        for W in integers("num_workers", config.num_workers, 0):
            packer = Packer(
                shards,
                token_ids(),
                tokens_per_batch=config.tokens_per_batch,
                max_seq_length=S,
                seed=config.seed,
            )
            loaders[W] = stack.enter_context(
                BatchLoader(packer, W, config.dataloader_prefetch_factor)
            )
            loaders[W].start()
        for round_index in tqdm(range(config.rounds), f"length {S}", file=sys.stderr):
            # Every other round runs backwards, so that a drift of the machine favours nobody.
            order = list(loaders) if round_index % 2 == 0 else list(reversed(loaders))
            for W in order:
                settle = SETTLING * max(1, W * config.dataloader_prefetch_factor)
                results.setdefault(W, []).append(one_round(loaders[W], settle, config.seconds))
    return dict(sorted(results.items()))


def table(rows: Sequence[dict[str, Any]], cores: int) -> str:
    """The rows as text, one line each."""
    lines = [f"{'length':>6}{'workers':>9}{'tokens/s':>13}{'cores used':>12}{'tokens/s/core':>15}"]
    for row in rows:
        lines.append(
            f"{row['max_seq_length']:>6}{row['num_workers']:>9}"
            f"{row['real_tokens_per_second']:>13,.0f}{row['cores_used']:>12.2f}"
            f"{row['real_tokens_per_second_and_core']:>15,.0f}"
            + ("   more processes than cores" if row["num_workers"] >= cores else "")
        )
    return "\n".join(lines)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Whether the target is met, where it was measured."""
    for row in rows:
        if (row["max_seq_length"], row["num_workers"]) == (512, 4):
            met = row["real_tokens_per_second"] >= TARGET
            met &= row["real_tokens_per_second_and_core"] >= TARGET_PER_CORE
            return (
                f"target, 4 workers at length 512: {TARGET:,.0f} tokens/s and "
                f"{TARGET_PER_CORE:,.0f} per core: {'met' if met else 'missed'}"
            )
    return "target: not measured (4 workers at length 512)"


def main(config: DataBenchConfig) -> None:
    """Runs the benchmark, prints its table, writes JSON where asked."""
    result = run(config)
    told = result["conditions"]
    print(
        f"{told['device']}, {result['cores']} cores, torch {told['torch']}; "
        f"{config.tokens_per_batch} tokens a batch, a step that costs nothing"
    )
    print(table(result["rows"], result["cores"]))
    print(verdict(result["rows"]))
    if config.json:
        results_file.write(result, Path(config.json))
