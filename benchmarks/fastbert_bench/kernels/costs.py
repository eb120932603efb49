"""What each kernel must move and compute: the one table from which floors and shares are made.

`python -m fastbert_bench.kernels.costs --readme` writes it into kernels/README.md, beside what the
files under benchmarks/results/<device>/kernels.json measured.

Bytes count every input once and every output once, in bf16 where the op is free to choose, and what
the forward must keep for the backward; vectors of H or F elements are left out. FLOPs are those of
matrix products (a multiply-add is 2). T tokens, S sequence length, H hidden size, A heads, F = 4 H,
M masked tokens, V vocabulary, L layers, P parameters.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert_bench.measure.marked import with_lines
from fastbert_bench.measure.places import RESULTS, ROOT

README = ROOT / "kernels" / "README.md"
BEGIN, END = "<!-- python -m fastbert_bench.kernels.costs --readme -->", "<!-- end of the table -->"

Sizes = Mapping[str, int]

TOKENS, VOCABULARY, POSITIONS = 65_536, 30_522, 512


@dataclasses.dataclass(frozen=True)
class Cost:
    """One direction of one op: formulas over sizes, as Python writes them."""

    op: str
    direction: str
    """forward, backward, both (where the forward does work of the backward) or step."""
    equation: str
    bytes: str
    flops: str = "0"

    def bytes_of(self, sizes: Sizes) -> int:
        return value_of(self.bytes, sizes)

    def flops_of(self, sizes: Sizes) -> int:
        return value_of(self.flops, sizes)


def value_of(formula: str, sizes: Sizes) -> int:
    """What a formula, which is ours and never a user's, says for these sizes."""
    return int(eval(formula, {"__builtins__": {}}, dict(sizes)))


_LAYER_NORM = "LayerNorm(dropout(x + b) + r)"
_EMBED = "dropout(LayerNorm(word[i] + type[j] + position[k]))"
COSTS = (
    # q, k, v in, o out, and the log-sum-exp; back: q, k, v, do in, dq, dk, dv out. O is not needed:
    # rowsum(do o) = rowsum(p dp).
    Cost("attention", "forward", "dropout(softmax(q kᵀ / √D)) v",
         "8 * T * H + 4 * A * T", "4 * T * S * H"),
    Cost("attention", "backward", "dq, dk, dv", "14 * T * H + 4 * A * T", "10 * T * S * H"),
    # The backward reads y. The sum before the norm is kept only where weight and beta ask for it.
    Cost("dropout_add_layer_norm", "forward", _LAYER_NORM, "6 * T * H + 8 * T"),
    Cost("dropout_add_layer_norm", "backward", "dx, dr, db, dweight, dbeta", "8 * T * H + 8 * T"),
    Cost("linear_cross_entropy", "both", "Σ -log softmax(x Wᵀ + b)[label]; dx, dW, db",
         "4 * M * H + 4 * V * H", "6 * M * V * H"),
    # The norm reads g; the update reads g, m, v, w and writes m, v, w and w in bf16.
    Cost("adamw", "step", "clipped AdamW, fp32 masters, bf16 weights", "34 * P"),
    # The pre-activation is kept.
    Cost("linear_gelu", "forward", "GELU(x Wᵀ + b)",
         "2 * T * H + 2 * F * H + 4 * T * F", "2 * T * H * F"),
    Cost("linear_gelu", "backward", "dx, dW, db",
         "4 * T * H + 4 * F * H + 4 * T * F", "4 * T * H * F"),
    Cost("gelu_layer_norm", "forward", "LayerNorm(GELU(x + b))", "4 * T * H + 8 * T"),
    Cost("gelu_layer_norm", "backward", "dx, db, dweight, dbeta", "6 * T * H + 8 * T"),
    Cost("bias_gelu", "forward", "GELU(x + b)", "4 * T * F"),
    Cost("bias_gelu", "backward", "dx, db", "6 * T * F"),
    Cost("embed_layer_norm", "forward", _EMBED, "4 * T * H + 32 * T"),
    # A sum in a fixed order needs the rows' gradient written once and read once for each of the two
    # tables. The sort of the ids is not counted.
    Cost("embed_layer_norm", "backward", "dword, dtype, dposition, dweight, dbeta",
         "10 * T * H + 2 * (V + 512) * H + 48 * T"),
    # The norm of a parameter's update must be known before the parameter moves: m, v, w twice.
    Cost("lamb", "step", "clipped LAMB, fp32 masters, bf16 weights", "46 * P"),
    Cost("mask_tokens", "step", "80 / 10 / 10 of 15% of the tokens", "24 * T"),
    # Of a feed-forward's matrix in each layer: what lies on and below the diagonal is computed.
    Cost("symmetric_product", "step", "X Xᵀ, in Muon's Newton-Schulz",
         "2 * L * H * (F + H)", "L * H * (H + 1) * F"),
)  # fmt: skip
OPS = tuple(dict.fromkeys(cost.op for cost in COSTS))
WHOLE = ("adamw", "lamb", "symmetric_product")
"""Ops of an update, which take as long for every batch."""


def cost_of(op: str, direction: str) -> Cost:
    return next(cost for cost in COSTS if (cost.op, cost.direction) == (op, direction))


def rates(moved: float, flops: float, seconds: float) -> dict[str, float]:
    """What was moved and computed in so many seconds, in all and a second."""
    return {
        "bytes": moved,
        "flops": flops,
        "gbps": moved / seconds / 1e9,
        "tflops": flops / seconds / 1e12,
    }


def model_sizes(H: int, S: int, T: int = TOKENS) -> dict[str, int]:
    """Sizes of BERT-base's (H = 768) or BERT-large's ops (H = 1024) on T tokens."""
    layers = 24 if H == 1024 else 12
    P = (VOCABULARY + POSITIONS + 4 + layers * 13) * H + layers * 12 * H * H
    P += 2 * H * H + 6 * H + VOCABULARY + 2  # pooler, masked-word transform, both heads
    return {
        "T": T, "S": S, "H": H, "A": max(1, H // 64), "F": 4 * H, "V": VOCABULARY,
        "M": max(1, round(0.15 * T)), "L": layers, "P": P,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a GPU reaches at best, in bytes and FLOPs a second."""

    bandwidth: float
    matrix: float

    def floor(self, bytes: float, flops: float) -> float:
        """Seconds that no version can beat."""
        return max(bytes / self.bandwidth, flops / self.matrix)


H100 = Ceilings(3.0e12, 798e12)
"""Measured: a large device copy (read + write), and a bf16 product of 8192 x 8192 x 8192."""
A100 = Ceilings(0.9 * 2.04e12, 0.85 * 312e12)
"""Assumed: 90% and 85% of the datasheet of the 80 GB SXM part. Not measured."""


# Targets: which number of a finished row must reach what.


@dataclasses.dataclass(frozen=True)
class Target:
    """`key` of a row, at least or at most `value`; a peer's ratio is ours over theirs."""

    key: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, row: Mapping[str, Any]) -> bool | None:
        """None where the number was not measured."""
        found: Any = row
        for part in self.key.split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None:
            return None
        if self.at_least is not None:
            return bool(found >= self.at_least)
        return bool(found <= (self.at_most or 0.0))

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"{self.key} ≥ {self.at_least:g}"
        return f"{self.key} ≤ {self.at_most:g}"


def target_of(op: str, direction: str, S: int, hopper: bool) -> Target | None:
    """What the op is to reach; on an Ampere GPU attention is to reach FlashAttention-2."""
    if op == "attention" and S <= 128:
        return Target("bandwidth_share", at_least=0.80)
    if op == "attention" and not hopper:
        return Target("ratios/fa2 p=0.1", at_most=1.0)
    if op == "attention":
        return Target("tflops", at_least=333 if direction == "forward" else 272)
    if op == "lamb":
        return Target("ratios/adamw", at_most=1.3)
    if op == "symmetric_product":
        return Target("ratios/bare gemm", at_most=1.0)
    if op == "linear_gelu":
        return Target("ratios/bare gemm", at_most=1 / 0.95) if direction == "forward" else None
    if op == "linear_cross_entropy":
        return Target("ratios/bare gemms", at_most=1.15)
    return None if op == "mask_tokens" else Target("bandwidth_share", at_least=0.85)


# The table of kernels/README.md


def _readable(formula: str) -> str:
    return "-" if formula == "0" else formula.replace(" * ", " ")


def _amount(value: float, unit: str) -> str:
    if not value:
        return "-"
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.3g}" if seconds < 1e-4 else f"{seconds * 1e6:,.0f}"


def measured(results: Path = RESULTS) -> dict[tuple[str, str, int, int], str]:
    """(op, direction, H, S) -> "device: time (share of the floor)", from committed files."""
    found: dict[tuple[str, str, int, int], list[str]] = {}
    for path in sorted(results.glob("*/kernels.json")):
        stage = json.loads(path.read_text(encoding="utf-8"))
        if stage["conditions"]["device_type"] != "cuda":
            raise ValueError(f"{path}: not measured on a GPU")
        for row in stage["rows"]:
            if row["contender"] == "ours" and row.get("ms"):
                sizes = row["sizes"]
                key = row["op"], row["direction"], sizes["H"], sizes["S"]
                text = f"{path.parent.name}: {_microseconds(row['ms'] / 1e3)}"
                found.setdefault(key, []).append(f"{text} ({row['floor_share']:.0%})")
    return {key: "; ".join(texts) for key, texts in found.items()}


def table_lines(results: Path = RESULTS) -> Iterator[str]:
    """The table as Markdown, for BERT-base's shapes."""
    times = measured(results)
    yield (
        "| op | equation | bytes | FLOPs | bytes | FLOPs | H100 floor, µs | A100 floor, µs "
        "| measured, µs (floor ÷ time) |"
    )
    yield "|---|---|---|---|--:|--:|--:|--:|---|"
    for cost in COSTS:
        for S in (128, 512) if cost.op == "attention" else (512,):
            sizes = model_sizes(768, S)
            moved, flops = cost.bytes_of(sizes), cost.flops_of(sizes)
            shape = f", S = {S}" if cost.op == "attention" else ""
            cells = (
                f"`{cost.op}` {cost.direction}{shape}", cost.equation, _readable(cost.bytes),
                _readable(cost.flops), _amount(moved, "B"), _amount(flops, "FLOP"),
                _microseconds(H100.floor(moved, flops)), _microseconds(A100.floor(moved, flops)),
                times.get((cost.op, cost.direction, 768, S), "not yet run on a GPU"),
            )  # fmt: skip
            yield f"| {' | '.join(cells)} |"


def with_table(readme: str, results: Path = RESULTS) -> str:
    """`readme` with what lies between the two marks replaced by the table.

    Raises:
        ValueError: a mark is missing.
    """
    return with_lines(readme, README, BEGIN, END, table_lines(results))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastbert_bench.kernels.costs")
    parser.add_argument("--readme", action="store_true", help=f"write the table into {README.name}")
    args = parser.parse_args(argv)
    if args.readme:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n".join(table_lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
