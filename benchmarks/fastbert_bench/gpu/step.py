"""The training step on a GPU: the stages `step` and `rivals` of `python -m fastbert_bench.gpu`.

Every contender of a workload runs in a process of its own, so that a failed capture or a full
memory stays with it: our graph first, then its rivals, then our graph again, which shows how far
the machine has drifted meanwhile. A rival that does not fit the memory with the whole batch gets
the largest part of it that fits, and is compared by the token. `collect` makes of what the
processes leave one result: it admits a rival only where the loss of every masked token agrees.

L layers, H hidden size, F intermediate size, V vocabulary, T tokens, M masked tokens, N sequences.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.config import ModelConfig
from fastbert.data.batch import Batch
from fastbert.errors import RunError
from fastbert.hf.weights import to_hf
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE, Ops, cpu_ops, triton_ops
from fastbert.train.device import is_out_of_memory
from fastbert_bench.estimate import predictions
from fastbert_bench.gpu import part
from fastbert_bench.measure import processes, timing
from fastbert_bench.measure import result as results
from fastbert_bench.measure.flops import executed_flops_per_token, flops_per_token
from fastbert_bench.measure.processes import one_line
from fastbert_bench.measure.workloads import SEED, WORKLOADS, Workload
from fastbert_bench.profile.step import side_stream
from fastbert_bench.suites import contenders as ways
from fastbert_bench.suites import step
from fastbert_bench.suites.contenders import Contender, Evidence, PaddedBatch

OURS, AGAIN = "fastbert", "fastbert again"
PARTS_OF_A_BATCH = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)


# Our step with one saving switched off, or one that is not yet chosen. "model", "attention" and
# "gelu_in_products" change the model, "reference" takes plain PyTorch for every op; the rest as
# `contenders.ours`, or settings of the recipe.
ABLATIONS: dict[str, dict[str, Any]] = {
    "without the CUDA graph": {"graph": False},
    "last layer everywhere": {"model": {"last_layer_masked_only": False}},
    "gradients by autograd, then copied": {"main_grads": False},
    "torch's fused AdamW": {"optim": "adamw_torch_fused"},
    "Muon for the layers' matrices": {"optim": "muon"},
    "gradients in bf16": {"gradient_precision": "bf16"},
    "FlashAttention 2 of PyTorch": {"attention": "torch"},
    "GELU inside the feed-forward's products": {"gelu_in_products": True},
    "layers computed twice (checkpointing)": {"model": {"gradient_checkpointing": True}},
    "plain PyTorch ops": {"reference": True, "graph": False},
}


class Bench:
    """One workload: its batches and weights, made on the CPU and moved when the GPU is ours."""

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        self.workload, self.dtype, self.device = workload, dtype, torch.device("cpu")
        self.sizes = workload.sizes
        rng = np.random.default_rng(SEED)
        self.lengths = workload.draw(rng)
        self.padded: list[PaddedBatch]
        self.packed: list[Batch]
        self.padded, self.packed = ways.make_batches(
            self.lengths, workload.S, self.sizes.vocab_size, rng
        )
        torch.manual_seed(SEED)
        self._initial = Bert(self.sizes).state_dict()

    def to(self, device: torch.device) -> "Bench":
        """Moves the batches."""
        self.device = device
        self.padded = [{k: v.to(device) for k, v in batch.items()} for batch in self.padded]
        self.packed = [batch.to(device) for batch in self.packed]
        return self

    def model(self, ops: Ops | None = None, **options: Any) -> Bert:
        """The same initial weights every time."""
        if ops is None:
            ops = triton_ops() if self.device.type == "cuda" else cpu_ops(False)
        with torch.device("meta"):
            model = Bert(self.sizes, ops, **options)
        model.to_empty(device=self.device)
        sites = torch.arange(len(model.dropout_state), device=self.device)
        model.dropout_state.zero_()[:, 2] = sites
        model.load_state_dict(self._initial)
        return model

    def ours(self, name: str) -> Contender:
        """Our step, whole or as an entry of `ABLATIONS` changes it."""
        options = dict(ABLATIONS.get(name, {}))
        ops, losses_dtype = None, torch.float32
        if options.pop("reference", False):
            ops = REFERENCE
        if options.pop("gelu_in_products", False):
            ops = triton_ops(gelu_in_products=True)
        if "attention" in options:  # FlashAttention has no fp32
            ops, losses_dtype = triton_ops(options.pop("attention")), self.dtype
        model = self.model(ops, **options.pop("model", {}))
        own = {key: options.pop(key) for key in ("graph", "main_grads") if key in options}
        own.setdefault("graph", self.device.type == "cuda")
        recipe = ways.make_recipe(SEED, **options)
        return ways.ours(
            name, model, self.packed, recipe, self.dtype, losses_dtype=losses_dtype, **own
        )

    def rival(self, name: str, share: float) -> tuple[Contender, list[int] | None]:
        """Hugging Face's step on a share of each batch, and which rows of the first those are."""
        count = max(1, round(share * self.workload.B))
        rows = [ways.part_of(batch, count) for batch in self.padded]
        batches = [
            {key: value[row] for key, value in batch.items()}
            for batch, row in zip(self.padded, rows, strict=True)
        ]
        weights = to_hf(self._initial, self.sizes)
        made = ways.rival(
            name, self.sizes, weights, batches, ways.make_recipe(SEED), self.dtype, self.device
        )
        return made, None if count == self.workload.B else rows[0].tolist()


def measure(bench: Bench, name: str, rounds: int) -> tuple[dict[str, Any], np.ndarray]:
    """What one contender leaves: its row with what shows its work, and the tokens' losses.

    Raises:
        Exception: it cannot run here.
    """
    rows = None
    if name in ways.RIVALS:
        made, rows = _largest_that_fits(bench, name, rounds)
    else:
        made = bench.ours(OURS if name == AGAIN else name)
        step.measure([made], rounds, bench.device)
    row = step.summary([made], bench.sizes, bench.lengths, bench.device)[0]
    labels = bench.padded[0]["labels"]
    return {
        **row,
        "name": name,
        "rows_of_the_batch": rows,
        "real_tokens": made.real_tokens,
        "sequences": made.sequences,
        "losses_dtype": str(made.losses_dtype).removeprefix("torch."),
        "drops": made.drops,
        "masked_of_rows": (labels != -100).sum(1).tolist(),
        "tokens_of_rows": bench.padded[0]["attention_mask"].sum(1).tolist(),
    }, made.token_losses.float().numpy()


def _largest_that_fits(
    bench: Bench, name: str, rounds: int
) -> tuple[Contender, list[int] | None]:
    """The rival, measured on the largest share of the batch that the memory holds."""
    for share in PARTS_OF_A_BATCH:
        try:
            made, rows = bench.rival(name, share)
            step.measure([made], rounds, bench.device)
            return made, rows
        except RuntimeError as error:
            if not is_out_of_memory(error) or share == PARTS_OF_A_BATCH[-1]:
                raise
        # Here, where the exception no longer holds the tensors of what did not fit.
        made = None  # type: ignore[assignment]
        part.free(bench.device)
    raise AssertionError("unreachable")


def floor_seconds(bench: Bench) -> float:
    """The step's linear layers alone, forward and both gradients, as bare cuBLAS products."""
    device = bench.device
    calls: list[Callable[[], object]] = []
    for rows, k, n in _products(bench.sizes, bench.packed[0]):
        x, w, dy = (
            timing.random_like(shape, bench.dtype, device)
            for shape in ((rows, k), (n, k), (rows, n))
        )
        calls += [partial(torch.mm, *pair) for pair in ((x, w.t()), (dy, w), (dy.t(), x))]
    with side_stream(device):
        replay = timing.Replay(calls, device)
        times = timing.interleaved({"floor": replay}, device, rounds=7, seconds=2.0)["floor"]
    return float(np.median(times)) * len(calls) / 1e3


def _products(sizes: ModelConfig, batch: Batch) -> list[tuple[int, int, int]]:
    """(rows, K, N) of every product of a step's forward."""
    H, F, L, V = (
        sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers, sizes.vocab_size,
    )  # fmt: skip
    T, M = batch.num_tokens, batch.masked_labels.numel()
    last = M + batch.num_sequences  # rows of the last layer beyond its keys and values
    shapes = [(T, H, 3 * H)] * (L - 1) + [(T, H, 2 * H), (last, H, H)]
    for rows in [T] * (L - 1) + [last]:
        shapes += [(rows, H, H), (rows, H, F), (rows, F, H)]
    return [*shapes, (M, H, H), (M, H, V + -V % 64)]


# What the processes leave, and what is made of it


def piece(out: Path, workload: str, name: str) -> Path:
    """Where a contender's process leaves its row; the tokens' losses lie beside it, as .npy."""
    plain = "".join(c if c.isalnum() else "-" for c in name)
    return out / "gpu" / f"step-{workload}" / f"{plain}.json"


def run_contender(
    workload: str, name: str, device_type: str, quick: bool, path: Path, *, waits: bool = False
) -> None:
    """The child's work: measures, and writes what it found or why it found nothing."""
    cuda = device_type == "cuda"
    bench = Bench(WORKLOADS[workload], torch.bfloat16 if cuda else torch.float32)
    if waits:
        processes.wait()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    try:
        row, losses = measure(bench.to(device), name, 3 if quick else 5)
    except Exception as error:
        processes.write_json(path, {"name": name, "why": one_line(error)})
        raise
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_suffix(".npy"), losses)
    row["conditions"] = results.conditions(device)
    processes.write_json(path, row)
    if name == OURS:  # what any implementation needs for its products, beside our step
        part.free(device)
        row["floor_ms"] = floor_seconds(bench) * 1e3
        processes.write_json(path, row)


def collect(
    out: Path, workload: Workload, told: Mapping[str, str | None], commit: str | None = None
) -> dict[str, Any] | None:
    """One result of what the processes of a workload have left so far.

    Args:
        out: the folder of the run.
        workload: whose.
        told: contender -> what its process died of, or None; in the order in which they ran.
        commit: what the tree is, where it has no .git.

    Returns:
        The result in the common form; None where our own step has left nothing.
    """
    found = {name: processes.read_json(piece(out, workload.name, name)) for name in told}
    missing = [
        {"name": name, "why": str(row.get("why") or told[name] or "left nothing")}
        for name, row in found.items()
        if "ms" not in row
    ]
    rows: dict[str, dict[str, Any]] = {name: row for name, row in found.items() if "ms" in row}
    ours = rows.get(OURS)
    if ours is None:
        return None
    lengths = np.array(ours["tokens_of_rows"])
    again = rows.pop(AGAIN, None)
    drift = None
    if again is not None:
        drift, before = again["ms"] / ours["ms"], ours["ms"]
        ours["rounds_ms"] = [*ours["rounds_ms"], *again["rounds_ms"]]
        ours |= timing.quantiles(ours["rounds_ms"])
        for rate in ("real_tokens_per_second", "sequences_per_second", "mfu"):
            ours[rate] = ours[rate] and ours[rate] * before / ours["ms"]
    evidence = _evidence(out, workload.name, ours)
    for name in [name for name in rows if name in ways.RIVALS]:
        try:
            other = _evidence(out, workload.name, rows[name])
            part = _restricted(evidence, ours, rows[name]["rows_of_the_batch"])
            ways.check_fair(part, other, workload.sizes.hidden_dropout_prob > 0)
        except RunError as error:
            missing.append({"name": name, "why": str(error)})
            del rows[name]
    for row in rows.values():
        per_token = [one["ms"] / one["real_tokens"] for one in (row, ours)]
        row["ratio"] = per_token[0] / per_token[1]
        row["memory_of_first_over_this"] = ours["peak_memory_bytes"] / row["peak_memory_bytes"]
    result: dict[str, Any] = {
        "format": results.FORMAT,
        "benchmark": "step",
        "settings": dataclasses.asdict(workload) | {"targets": dict(workload.targets)},
        "conditions": ours["conditions"],
        "rows": [_told(row, ours, lengths, workload) for name, row in rows.items()
                 if name not in ABLATIONS],
        "missing": missing,
        "dtype": "bfloat16" if ours["conditions"]["device_type"] == "cuda" else "float32",
        "model": dataclasses.asdict(workload.sizes),
        "real_tokens": ours["real_tokens"],
        "padded_tokens": workload.B * workload.S,
        "sequences": ours["sequences"],
        "lengths": lengths.tolist(),
        "ablations": [{"name": name, **{k: row[k] for k in ("ms", "ratio", "peak_memory_bytes")}}
                      for name, row in rows.items() if name in ABLATIONS],
        "floor_ms": ours.get("floor_ms"),
        "drift": drift,
        "predicted": predictions.of(ours["conditions"]["device"], "step", workload.name),
    }  # fmt: skip
    if commit and result["conditions"]["commit"] == "unknown":
        result["conditions"]["commit"] = commit
    result["targets"] = judged(result)
    return result


def _evidence(out: Path, workload: str, row: Mapping[str, Any]) -> Evidence:
    losses = np.load(piece(out, workload, row["name"]).with_suffix(".npy"), allow_pickle=False)
    return Evidence(
        row["name"], torch.from_numpy(losses), getattr(torch, row["losses_dtype"]),
        row["drops"], row["real_tokens"], row["sequences"],
    )  # fmt: skip


def _restricted(whole: Evidence, row: Mapping[str, Any], kept: list[int] | None) -> Evidence:
    """What of our evidence belongs to some sequences of the first batch."""
    if kept is None:
        return whole
    parts = whole.token_losses.split(row["masked_of_rows"])
    return dataclasses.replace(
        whole,
        token_losses=torch.cat([parts[index] for index in kept]),
        real_tokens=sum(row["tokens_of_rows"][index] for index in kept),
        sequences=len(kept),
    )


_TOLD = (
    "name", "ms", "ms_p20", "ms_p80", "real_tokens_per_second", "sequences_per_second", "mfu",
    "peak_memory_bytes", "watts", "joules_per_million_tokens", "ratio", "rounds_ms", "first_loss",
    "memory_of_first_over_this",
)  # fmt: skip


def _told(
    row: Mapping[str, Any], ours: Mapping[str, Any], lengths: np.ndarray, workload: Workload
) -> dict[str, Any]:
    """What of a contender's row a reader needs."""
    told = {key: row[key] for key in _TOLD}
    if row["rows_of_the_batch"] is not None:
        told["batch_size"] = row["sequences"]
    if row is ours and row["mfu"] is not None:
        masked = sum(row["masked_of_rows"])
        executed = executed_flops_per_token(workload.sizes, lengths, masked)
        whole = flops_per_token(workload.sizes, lengths)
        told["mfu_executed"] = row["mfu"] * executed / whole
    return told


def judged(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each target with what was measured, and whether it holds; None where it was not measured."""
    rows = {row["name"]: row for row in result["rows"]}
    ours = rows.get(OURS, {})
    measured: dict[str, float | None] = {
        "tokens_per_second": ours.get("real_tokens_per_second"),
        "sequences_per_second": ours.get("sequences_per_second"),
        "mfu": ours.get("mfu"),
        # Where the rival had only a part of the batch, the true share is smaller still.
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


def table(result: Mapping[str, Any]) -> list[str]:
    """The result of one workload in lines of at most 110 characters."""
    lines = [
        f"{result['settings']['name']}: {result['sequences']} sequences, {result['real_tokens']} "
        f"real tokens" + (f"; drift {result['drift'] - 1:+.1%}" if result["drift"] else "")
        + (f"; bare products {result['floor_ms']:.1f} ms" if result["floor_ms"] else "")
    ]
    ours = next(row for row in result["rows"] if row["name"] == OURS)
    if said := result["predicted"]:
        lines.append(
            f"  predicted: {said['ms']:.1f} ms ({said['low_ms']:.1f} to {said['high_ms']:.1f}), "
            f"{said['tokens_per_second']:,.0f} tok/s, MFU {said['mfu']:.1%} (executed "
            f"{said['mfu_executed']:.1%}); measured {ours['ms'] / said['ms'] - 1:+.0%}"
        )
    for row in result["rows"]:
        rates = f"{row['real_tokens_per_second']:>9,.0f} tok/s {row['sequences_per_second']:>7,.0f}"
        line = f"  {row['name']:<20}{row['ms']:>8.2f} ms {rates} seq/s"
        line += f" {row['peak_memory_bytes'] / 2**30:>5.1f} GiB"
        if row["joules_per_million_tokens"] is not None:
            line += f" {row['joules_per_million_tokens']:,.0f} J/Mtok"
        if row["mfu"] is not None:
            line += f" MFU {row['mfu']:.1%}"
        if "mfu_executed" in row:
            line += f" (executed {row['mfu_executed']:.1%})"
        if row["name"] != OURS:
            line += f" {row['ratio']:.2f}x"
        if "batch_size" in row:
            line += f", fits {row['batch_size']} sequences"
        lines.append(line)
    lines += [
        f"  - {row['name']:<38}{row['ms']:>8.2f} ms, x{row['ratio']:.3f}"
        for row in result["ablations"]
    ]
    lines += [f"  no {one['name']}: {one['why']}"[:110] for one in result["missing"]]
    said = {True: "holds", False: "MISSED"}
    judged_ones = [
        f"{name} {target['measured']:.4g} ({target['target']:g}: {said[target['holds']]})"
        for name, target in result["targets"].items()
        if target["holds"] is not None
    ]
    if judged_ones:
        lines.append("  targets: " + ", ".join(judged_ones))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """One contender's process."""
    parser = part.parser("step", quick="fewer rounds")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("contender", choices=[OURS, AGAIN, *ABLATIONS, *ways.RIVALS])
    args = parser.parse_args(argv)
    run_contender(
        args.workload, args.contender, args.device, args.quick, args.out, waits=args.wait
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
