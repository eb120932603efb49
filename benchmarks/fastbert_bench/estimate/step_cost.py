"""What a training step takes on a GPU, on paper: every launch priced by counts, bytes and waves.

The kernels are those of `estimate.launch_list`. A product takes the time of its tiles, in waves
over the multiprocessors, its sum cut in as many parts as is fastest; attention the cycles of
`kernels.counts` for each tile that the lengths need, dropout included; all else its bytes over
the bandwidth. Muon's launches are not in the list: they follow from its matrices' shapes. None of
this is reached in full: `Shares` says how much of it, likely, at best and at worst. No share was
measured on a GPU yet, but for a product of 8192 x 8192 x 8192.

T tokens in N sequences, M masked tokens, R = M + N rows of the last layer, H hidden size, A heads
of size D.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastbert.config import ModelConfig
from fastbert.train import muon
from fastbert_bench.estimate import launch_list
from fastbert_bench.estimate.launch_list import Kernel
from fastbert_bench.kernels import counts
from fastbert_bench.kernels.costs import Ceilings
from fastbert_bench.kernels.sass import MACHINES, Machine
from fastbert_bench.measure.flops import MLM_PROBABILITY
from fastbert_kernels.attention_config import (
    HEAD_SIZES,
    Tiles,
    backward_path,
    choose_tiles,
    forward_kernel,
)

GEMM_FORWARD, GEMM_BACKWARD, MLM = "GEMM forward", "GEMM dgrad + wgrad", "MLM products"
ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention forward", "attention backward"
PASSES, OPTIMIZER = "memory-bound passes", "optimizer"
RESIDUAL_ADDS, QKV_BIAS = "residual-gradient adds", "sum of dy, QKV bias"
OTHER, GAPS = "everything else", "idle between kernels"
PRODUCTS = (GEMM_FORWARD, GEMM_BACKWARD, MLM)
FAMILIES = (
    GEMM_FORWARD, GEMM_BACKWARD, MLM, ATTENTION_FORWARD, ATTENTION_BACKWARD, PASSES, RESIDUAL_ADDS,
    QKV_BIAS, OPTIMIZER, OTHER, GAPS,
)  # fmt: skip

TRITON = "3.7.1"
"""Whose column of the counts prices attention."""
SHORTEST = 2e-6
"""Seconds of a kernel that does nothing."""
OVERLAP = 3
"""Pipes overlap in part: between their largest and their sum, the root of the sum of cubes."""
RAMP = 1000
"""Cycles until a program's first tile has come from memory."""
TAIL = 64  # columns, as in fastbert_kernels.attention_kernels
PRODUCT_TILES = ((128, 256), (256, 128), (128, 128))
STEP_K = 64
SYMMETRIC_TILE = 128
"""Of a symmetric product of t x t such tiles, Muon's kernels compute t (t + 1) / 2."""
CPU_FP32 = 95 / 430
"""A CPU's rate in fp32, in which it orthogonalizes, over that in bf16: GFLOP/s a core."""
# cub sorts int64 by 8 bits at a time: keys and values read and written eight times.
_SORT_PASSES, _SORT_LAUNCHES = 8, 10


@dataclasses.dataclass(frozen=True)
class Shares:
    """What kernels reach of what counts and data sheets allow."""

    product: float
    attention: float
    bandwidth: float
    gap_seconds: float = 0.0
    """Between one kernel of a CUDA graph and the next."""
    splits: int = 16
    """In how many parts the sum of a product may be cut."""


class Moods(NamedTuple):
    """The same step under three assumptions."""

    likely: Shares
    best: Shares
    worst: Shares


# cuBLAS's 798 TFLOP/s for 8192^3 are 0.89 of what its tiles allow at 1.755 GHz: the clock falls
# under such a load. Attention's are a guess: barriers and the latency of memory are not counted.
HOPPER = Moods(
    Shares(0.82, 0.62, 0.85, 1.0e-6),
    Shares(0.89, 0.80, 0.92, 0.6e-6),
    Shares(0.74, 0.48, 0.75, 2.0e-6, splits=4),
)
AMPERE = Moods(
    Shares(0.82, 0.75, 0.85, 1.0e-6),
    Shares(0.89, 0.95, 0.92, 0.6e-6),
    Shares(0.74, 0.55, 0.75, 2.0e-6, splits=4),
)
# A CPU's rates are of whole steps, and its ops follow each other without a launch.
CPU = Moods(*(Shares(1.0, share, 1.0) for share in (0.5, 0.6, 0.4)))


@dataclasses.dataclass(frozen=True)
class Muon:
    """How Muon takes the layers' matrices, where it does."""

    split_qkv: bool = True
    ns_steps: int = 5


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What the lengths of the sequences come down to."""

    mean: float
    attended: float
    """s: by tokens, not by sequences."""
    drawn: np.ndarray = dataclasses.field(repr=False, compare=False)
    """(B,) which stand for any number of sequences."""

    @classmethod
    def of(cls, lengths: np.ndarray) -> "Lengths":  # (B,)
        values = lengths.astype(float)
        return cls(float(values.mean()), float((values**2).sum() / values.sum()), lengths)


class Priced(NamedTuple):
    """What all launches of one kernel of the list take."""

    family: str
    op: str
    """Of a pass: the op it belongs to, as in `kernels.costs`."""
    direction: str
    launches: int
    seconds: float
    """Without what lies between launches."""
    limit: str
    """What it waits for: tensor, L2, shared, issue, ALU ..., memory, or launch."""
    filled: float | None
    """The share of its tiles' work that exists; None where nothing is cut in tiles."""
    bytes: float
    flops: float


def family_of(kernel: Kernel, masked_rows: int) -> str:
    """Where a step books a kernel, as `gpu.trace` does with what it records.

    Args:
        kernel: of the list.
        masked_rows: M, by which the products of the masked-word head are known.
    """
    module = kernel.name.partition(".")[0]
    backward = kernel.direction == "backward"
    if kernel.product:
        if masked_rows in kernel.product:
            return MLM
        return GEMM_BACKWARD if backward else GEMM_FORWARD
    if module == "attention":
        return ATTENTION_BACKWARD if backward else ATTENTION_FORWARD
    if module == "reduce" and len(kernel.outputs[0].shape) == 3:  # (3, A, D), from attention
        return QKV_BIAS
    if module in ("optimizer", "muon"):
        return OPTIMIZER
    if module == "aten":
        return OTHER
    return PASSES


# The first that begins a kernel's name; `reduce` belongs to the op before it.
_OPS = {
    "embedding.": "embed_layer_norm", "layer_norm.": "dropout_add_layer_norm",
    "gelu._gelu_layer_norm": "gelu_layer_norm", "gelu.": "bias_gelu", "cross_entropy.": "softmax",
}  # fmt: skip


def bytes_of(kernel: Kernel) -> float:
    """What a kernel must move: its arrays, but of a gather or scatter the rows that are named, and
    nothing of what LayerNorm keeps for weights and betas that are rare, or attention in the L2."""
    if kernel.name.startswith("attention."):  # (A, R + 64 N, D) in fp32, where dQ is added up
        scratch = [one for one in kernel.outputs if len(one.shape) == 3 and one.dtype.itemsize == 4]
        return float(kernel.bytes - sum(one.bytes for one in scratch))
    if kernel.name == "layer_norm._forward_kernel":  # y and the sum before the norm
        return float(kernel.bytes - kernel.outputs[1].bytes)
    if kernel.name == "layer_norm._backward_kernel":  # dy, y and that sum
        return float(kernel.bytes - kernel.inputs[2].bytes)
    if kernel.name == "aten.index_select":
        return 2.0 * kernel.outputs[0].bytes + kernel.inputs[1].bytes
    if kernel.name == "aten.index_add_":
        return 3.0 * kernel.inputs[2].bytes
    if kernel.name == "aten.sort":
        return 2.0 * _SORT_PASSES * sum(array.bytes for array in kernel.outputs)
    if kernel.name == "embedding._sum_pieces_kernel":  # each row for its word and its position
        return 2.0 * kernel.inputs[0].bytes + sum(array.bytes for array in kernel.outputs)
    if kernel.name == "embedding._join_pieces_kernel":  # what its neighbours cut in two
        return 3.0 * kernel.inputs[2].bytes + kernel.inputs[0].bytes
    return float(kernel.bytes)


class Paper:
    """Prices of kernels on one machine, under one assumption.

    Args:
        ceilings: bandwidth; the matrix rate is used on a CPU alone.
        shares: what is reached.
        arch: 80 or 90; None for a CPU.
    """

    def __init__(self, ceilings: Ceilings, shares: Shares, arch: int | None) -> None:
        self.ceilings, self.shares, self.arch = ceilings, shares, arch
        self.machine: Machine | None = MACHINES[arch] if arch else None

    def memory(self, moved: float) -> float:
        """Seconds of so many bytes."""
        return moved / (self.ceilings.bandwidth * self.shares.bandwidth)

    def product(
        self,
        m: int,
        n: int,
        k: int,
        moved: float,  # bytes
        item: int = 2,  # bytes of an element of the result
        *,
        batch: int = 1,
        symmetric: bool = False,
    ) -> tuple[float, str, float | None]:
        """(seconds, limit, share of the multiprocessors' time that tiles fill) of a product.

        Args:
            m, n, k, moved, item: the sizes.
            batch: how many such products one launch makes.
            symmetric: whether it computes one half of a symmetric result only.
        """
        machine = self.machine
        if machine is None:
            by_rate = 2.0 * batch * m * n * k / (self.ceilings.matrix * self.shares.product)
            return max(by_rate, self.memory(moved)), "tensor", None
        found = []
        for rows, columns in [(SYMMETRIC_TILE,) * 2] if symmetric else PRODUCT_TILES:
            result = math.ceil(m / rows) * math.ceil(n / columns)
            if symmetric:
                result = (result + math.ceil(m / rows)) // 2
            tensor = 2 * rows * columns * STEP_K / machine.tensor
            # Two neighbours share the longer side's operand where a copy can reach both (sm_90).
            sides = rows + columns - (max(rows, columns) / 2 if self.arch == 90 else 0)
            l2 = 2 * STEP_K * sides / machine.l2
            for splits in range(1, self.shares.splits + 1):
                if splits > 1 and k < 1024 * splits:
                    break
                tiles = batch * result * splits
                waves = math.ceil(tiles / machine.multiprocessors)
                steps = math.ceil(math.ceil(k / splits) / STEP_K)
                out = rows * columns * (item if splits == 1 else 4) / machine.l2
                cycles = waves * (steps * max(tensor, l2) + RAMP + out)
                seconds = cycles / machine.clock / self.shares.product
                if splits > 1:  # parts are written, read and added
                    seconds += self.memory(2.0 * splits * batch * m * n * 4)
                limit = "L2" if l2 > tensor else "tensor"
                found.append((seconds, limit, tiles / (waves * machine.multiprocessors)))
        seconds, limit, filled = min(found)
        if self.memory(moved) > seconds:
            return self.memory(moved), "memory", filled
        return seconds, limit, filled

    def attention(
        self,
        direction: str,
        queries: np.ndarray,  # (B,) of each sequence
        lengths: np.ndarray,  # (B,) keys
        sizes: ModelConfig,
        scale: float,
        moved: float,  # bytes
    ) -> tuple[float, str, float | None, int]:
        """(seconds, limit, share of the tiles' scores that exist, kernels) of one layer.

        Args:
            direction, queries, lengths, sizes, moved: of what, and how much.
            scale: how many times over the sequences stand for those of the batch.
        """
        A, H = sizes.num_attention_heads, sizes.hidden_size
        if self.machine is None or self.arch is None:
            scores = scale * float((queries * lengths).sum())
            flops = (4 if direction == "forward" else 10) * scores * H
            # bf16: 23 bytes a score for product, mask, softmax, dropout, product, and 20 back.
            written = (23 if direction == "forward" else 20) * A * scores
            by_rate = flops / (self.ceilings.matrix * self.shares.attention)
            return by_rate + self.memory(written + moved), "memory", None, 1
        D = next((size for size in HEAD_SIZES if size >= H // A), HEAD_SIZES[-1])
        dropout, some = sizes.attention_probs_dropout_prob > 0, bool((queries < lengths).any())
        kinds = _kinds(direction, int(lengths.max()), D, self.arch)
        seconds, limits, computed = 0.0, [], 0.0
        for kind, tiles in kinds:
            one = _counted(_case(kind, D, dropout, some, self.arch))
            blocks, asked, keys = _programs(kind, tiles, queries, lengths)
            computed = tiles.block_m * tiles.block_n * float(blocks.sum())
            passes = blocks * (tiles.block_m * tiles.block_n / 128**2)
            of_row, of_key = _AROUND[kind]
            around = D * (of_row * asked + of_key * keys) / self.machine.l2
            pipes = {pipe: passes * one[pipe] for pipe in counts.COLUMNS[1:-1]}
            pipes["L2"] = pipes.pop("memory") + around
            slowest = max(pipes, key=lambda name: float(pipes[name].sum()))
            cycles = sum(pipe**OVERLAP for pipe in pipes.values()) ** (1 / OVERLAP)
            # Programs that share a multiprocessor each take as many times their own cycles.
            places = one["held"] * self.machine.multiprocessors
            took = _makespan(one["held"] * cycles + RAMP, scale * A, places)
            took /= self.machine.clock * self.shares.attention
            seconds += took
            limits.append((took, slowest))
        filled = float((queries * lengths).sum()) / computed
        launches = len(kinds)
        if launches > 1:  # delta is made by a pass of its own
            launches += 1
            seconds += self.memory(scale * A * float(queries.sum()) * (4 * D + 4))
        if self.memory(moved) > seconds:
            return self.memory(moved), "memory", filled, launches
        return seconds, max(limits)[1], filled, launches


# What a program moves through the L2 beside its tiles, bytes an element of a row that asks and of
# a key: q, o, do, the scratch of dQ (zeros, its sum), dq; k twice, v, dk, dv; what it wrote, read
# again for the bias. The counts of "short" and "tile" are of whole programs.
_AROUND = {
    "forward": (4, 0), "short": (0, 0), "tile": (0, 0), "head": (16, 12), "columns": (0, 12),
    "query": (8, 0),
}  # fmt: skip


def _kinds(direction: str, S: int, D: int, arch: int) -> list[tuple[str, Tiles]]:
    """The kernels with tiles that a layer's attention launches."""
    bf16 = torch.bfloat16
    if direction == "forward":
        kinds = [forward_kernel(S, D, bf16, arch)]
    else:
        path = backward_path(S, D, bf16, arch)
        kinds = ["columns", "query"] if path == "split" else [path]
    return [(kind, choose_tiles(kind, D, bf16, arch)) for kind in kinds]


def _programs(
    kind: str, tiles: Tiles, queries: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tiles, rows that ask, keys) of each program of a head."""
    rows, columns = -(-queries // tiles.block_m), -(-lengths // tiles.block_n)
    if kind in ("short", "tile", "head"):
        return rows * columns, queries, lengths
    none = np.zeros(1)
    if kind == "columns":
        return np.repeat(rows, columns), none, np.full(1, tiles.block_n)
    # What is left of the columns goes by `TAIL` at a time.
    whole, rest = np.divmod(lengths, tiles.block_n)
    last = min(tiles.block_n, TAIL)
    columns = whole + -(-rest // last) * last / tiles.block_n
    return np.repeat(columns, rows), np.full(1, tiles.block_m), none


def _makespan(programs: np.ndarray, times: float, places: int) -> float:
    """Cycles until all programs are done, `places` at once: whole waves where all are equal. The
    longest first, as a batch has them, natural lengths leave a tenth of a mean program idle."""
    longest, mean, count = float(programs.max()), float(programs.mean()), times * len(programs)
    if longest == programs.min():
        return math.ceil(count / places) * longest
    return max(longest, (count / places + 0.1) * mean)


def _case(kind: str, D: int, dropout: bool, some: bool, arch: int) -> str:
    kernel = {
        "forward": "attention_forward_kernel", "short": "attention_forward_kernel",
        "query": "attention_backward_query_kernel",
    }.get(kind, "attention_backward_kernel")  # fmt: skip
    # Without dropout all tokens ask at head size 64: other cases are not shipped, and dropout's
    # stand for them.
    p = "0.0" if not dropout and D == 64 and not some else "0.1"
    return f"{kernel} [{kind} bf16 D={D} p={p}{' some' * some}] sm_{arch}"


@functools.cache
def _table() -> counts.Table:
    return counts.read()


def _counted(case: str) -> dict[str, int]:
    """`counts.COLUMNS` of a case; raises KeyError where none are committed."""
    return dict(zip(counts.COLUMNS, _table()[case][TRITON], strict=True))


def price(
    sizes: ModelConfig,
    tokens: float,
    lengths: Lengths,
    ceilings: Ceilings,
    shares: Shares,
    arch: int | None,
    of_muon: Muon | None = None,
) -> list[Priced]:
    """Every kernel of a step in bf16 on `tokens` real tokens, and what it takes.

    AdamW updates everything, or what Muon leaves.
    """
    paper = Paper(ceilings, shares, arch)
    T, N = round(tokens), max(1, round(tokens / lengths.mean))
    M = max(1, round(MLM_PROBABILITY * T))
    drawn = lengths.drawn.astype(np.int64)
    asking = np.maximum(1, np.rint(MLM_PROBABILITY * drawn)).astype(np.int64) + 1  # and [CLS]
    scale = tokens / float(drawn.sum())
    found, op = muon_launches(paper, sizes, of_muon) if of_muon else [], ""
    rest = 1 - muon.num_parameters(sizes) / launch_list.sizes_of(sizes, T, N, M)["P"]
    for times, kernel in launch_list.read(launch_list.sizes_of(sizes, T, N, M)):
        if not kernel.name.startswith("reduce."):
            op = next((_OPS[start] for start in _OPS if kernel.name.startswith(start)), "")
        moved, flops = bytes_of(kernel), float(kernel.flops)
        if of_muon and kernel.name == "optimizer._adamw_kernel":
            moved *= rest
        launches, limit, filled = 1, "memory", None
        if kernel.product:
            item = kernel.outputs[0].dtype.itemsize
            seconds, limit, filled = paper.product(*kernel.product, moved, item)
        elif kernel.name.startswith("attention."):
            every = kernel.inputs[0].shape[0] == T
            queries = drawn if every else asking
            seconds, limit, filled, launches = paper.attention(
                kernel.direction, queries, drawn, sizes, scale, moved
            )
            flops = (4.0 if kernel.direction == "forward" else 10.0) * sizes.hidden_size
            flops *= scale * float((queries * drawn).sum())
        else:
            seconds = paper.memory(moved)
            launches = _SORT_LAUNCHES if kernel.name == "aten.sort" else 1
        if arch and seconds < SHORTEST * launches:
            seconds, limit = SHORTEST * launches, "launch"
        found.append(
            Priced(
                family_of(kernel, M), op, kernel.direction, times * launches, times * seconds,
                limit, filled, times * moved, times * flops,
            )
        )  # fmt: skip
    return found


def muon_launches(paper: Paper, sizes: ModelConfig, of_muon: Muon) -> list[Priced]:
    """What Muon's update launches for each shape of matrices, booked as the optimizer's.

    Momentum (g and m read, m and X written), X's norms, their clamp, X by them, three products a
    step of Newton-Schulz, and the update (w and X read, w and its rounded copy written). X, A and B
    are bf16, on a CPU fp32; a product reads its operands once, and what it adds to.
    """
    item = 2 if paper.machine else 4
    found: list[tuple[int, float, str, float | None, float, float]] = []
    for shape, count in muon.shapes(sizes, of_muon.split_qkv).items():
        (m, n), elements = sorted(shape), count * math.prod(shape)
        for touched in (12 + item, item, 0, 2 * item, 8 + item + 2):
            moved = float(elements * touched)
            found.append((1, paper.memory(moved), "memory", None, moved, 0.0))
        products = (
            (m, n, True, m * n + m * m), (m, m, True, 2 * m * m), (n, m, False, m * m + 2 * m * n),
        )  # fmt: skip
        for columns, k, symmetric, touched in products:
            moved = float(item * count * touched)
            seconds, limit, filled = paper.product(
                m, columns, k, moved, item, batch=count, symmetric=symmetric
            )
            flops = 2.0 * count * m * columns * k
            if paper.machine is None:
                seconds /= CPU_FP32
            elif symmetric:
                tiles = math.ceil(m / SYMMETRIC_TILE)
                flops *= (tiles + 1) / (2 * tiles)
            found.append((of_muon.ns_steps, seconds, limit, filled, moved, flops))
    shortest = SHORTEST if paper.arch else 0.0
    return [
        Priced(
            OPTIMIZER, "", "step", times, times * max(seconds, shortest),
            limit if seconds >= shortest else "launch", filled, times * moved, times * flops,
        )
        for times, seconds, limit, filled, moved, flops in found
    ]  # fmt: skip


class Family(NamedTuple):
    """A line of the table; seconds of a step."""

    name: str
    launches: int
    seconds: float
    low: float
    high: float
    limit: str
    """What most of the time waits for, and the share of it."""
    filled: float | None
    bytes: float
    flops: float


@dataclasses.dataclass(frozen=True)
class StepCost:
    """A step on paper."""

    families: tuple[Family, ...]
    passes: dict[str, float]
    """Seconds of each op's passes, as "bias_gelu forward"."""
    backward_seconds: float

    @property
    def seconds(self) -> float:
        return sum(family.seconds for family in self.families)

    @property
    def low(self) -> float:
        """Seconds where everything is at its best."""
        return sum(family.low for family in self.families)

    @property
    def high(self) -> float:
        return sum(family.high for family in self.families)

    def family(self, name: str) -> Family:
        """Its line of that name."""
        return next(family for family in self.families if family.name == name)

    @property
    def launches(self) -> int:
        return sum(family.launches for family in self.families)


def step_cost(
    sizes: ModelConfig,
    tokens: float,
    lengths: Lengths,
    ceilings: Ceilings,
    moods: Moods,
    arch: int | None,
    of_muon: Muon | None = None,
) -> StepCost:
    """A step by family, each at its likely shares and between its best and its worst."""
    priced = [
        price(sizes, tokens, lengths, ceilings, shares, arch, of_muon) for shares in moods
    ]
    rows = [
        _family(name, *([one for one in every if one.family == name] for every in priced))
        for name in FAMILIES[:-1]
    ]
    launches = sum(row.launches for row in rows)
    gaps = [launches * shares.gap_seconds for shares in moods]
    likely, low, high = gaps
    limit = "launch" if likely else "-"
    rows.append(Family(GAPS, 0, likely, low, high, limit, None, 0.0, 0.0))
    backward = [one for one in priced[0] if one.direction == "backward"]
    between = sum(one.launches for one in backward) * moods.likely.gap_seconds
    passes: dict[str, float] = {}
    for one in priced[0]:
        if one.family == PASSES:
            name = f"{one.op} {one.direction}"
            passes[name] = passes.get(name, 0.0) + one.seconds
    return StepCost(tuple(rows), passes, sum(one.seconds for one in backward) + between)


def _family(
    name: str, likely: Sequence[Priced], best: Sequence[Priced], worst: Sequence[Priced]
) -> Family:
    spent: dict[str, float] = {}
    for one in likely:
        spent[one.limit] = spent.get(one.limit, 0.0) + one.seconds
    whole = sum(spent.values())
    limit = "-"
    if whole:
        slowest = max(spent, key=lambda key: spent[key])
        limit = f"{slowest} {spent[slowest] / whole:.0%}"
    tiled = [one for one in likely if one.filled is not None]
    filled = None
    if tiled:  # of the time of all tiles, what the tiles that exist would take
        time = sum(one.seconds for one in tiled)
        filled = sum(one.seconds * (one.filled or 0.0) for one in tiled) / time
    return Family(
        name, sum(one.launches for one in likely), whole, sum(one.seconds for one in best),
        sum(one.seconds for one in worst), limit, filled, sum(one.bytes for one in likely),
        sum(one.flops for one in likely),
    )  # fmt: skip
