"""The matrix products of a step through cuBLAS.

`python -m fastbert_bench.gpu.gemms --out gemms.json`

Forward, dgrad and wgrad of every weight of BERT-base and BERT-large, called as the step calls them
(`fastbert_kernels.main_grad`, `cross_entropy`), wgrad also in the forms that the step could use,
each with cuBLAS and with cuBLASLt preferred. torch 2.11 reads that preference at every product:
`mm` and `addmm` end in `at::cuda::blas::gemm`, which calls cublasLtMatmul where cublaslt is
preferred (and cublasGemmEx where that fails), else cublasGemmEx, which is the default. Only a bias
of one dimension is cublasLtMatmul's in any case: the forward of QKV.

M rows, N columns and K summands of a product; T tokens, H hidden size, F of a weight's outputs,
V vocabulary, L layers.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbert.config import ModelConfig, model_config
from fastbert_bench.estimate import predictions
from fastbert_bench.estimate.predictions import TOKENS
from fastbert_bench.estimate.run import or_dash
from fastbert_bench.estimate.step_cost import GEMM_BACKWARD, GEMM_FORWARD, MLM, PRODUCT_TILES
from fastbert_bench.gpu import part
from fastbert_bench.kernels.sass import MACHINES
from fastbert_bench.measure import result, timing
from fastbert_bench.measure.flops import MLM_PROBABILITY
from fastbert_bench.measure.processes import one_line
from fastbert_bench.profile import step as profiling

Found = dict[str, Any]
Library = str

LIBRARIES = {"cuda": ("cublas", "cublaslt"), "cpu": ("cpu",)}
# Model -> the prediction that its products belong to, and the mean length it assumes: the last
# layer computes masked and [CLS] rows only.
MODELS = {
    "cuda": {"base": ("base-512-full", 512), "large": ("large-512-natural", 278)},
    "cpu": {"tiny": ("", 64)},
}
LINEARS = ("qkv", "attention_out", "up", "down")
WGRAD, WGRAD_ADDS, WGRAD_BF16 = "wgrad", "wgrad beta=1", "wgrad bf16"
"""Into fp32, overwriting; into fp32, adding; into bf16."""
TILE_M, TILE_N = PRODUCT_TILES[0]
MULTIPROCESSORS = MACHINES[90].multiprocessors
SQUARE = 8192
ROUNDS = 12
LINES, WIDTH = 16, 110


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight (F, H) and the rows that it is multiplied with."""

    model: str
    name: str
    rows: int
    H: int
    F: int
    count: float
    """How often a step multiplies so many rows with such a weight, in one direction."""

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """M, N and K by kind of product."""
        forward, dgrad = (self.rows, self.F, self.H), (self.rows, self.H, self.F)
        wgrad = (self.F, self.H, self.rows)
        found = {"forward": forward, "dgrad": dgrad, WGRAD: wgrad}
        if self.name in LINEARS:
            found |= {WGRAD_ADDS: wgrad, WGRAD_BF16: wgrad}
        return found


def weights_of(model: str, sizes: ModelConfig, T: int, mean_length: int) -> list[Weight]:
    """Every weight of a model; the decoder with its vocabulary as it is, and padded twice."""
    L, H, F, V = (
        sizes.num_hidden_layers, sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size,
    )  # fmt: skip
    M = max(1, round(MLM_PROBABILITY * T))
    last = (M + T / mean_length) / T
    shapes = {"qkv": (H, 3 * H), "attention_out": (H, H), "up": (H, F), "down": (F, H)}
    found = [
        # Of the last layer keys and values of every token.
        Weight(model, name, T, *shape, L - 1 + ((2 + last) / 3 if name == "qkv" else last))
        for name, shape in shapes.items()
    ]
    found.append(Weight(model, "transform", M, H, H, 1))
    # As it is, in whole 16 bytes as the step multiplies (`fastbert.train.flat`), in whole 256.
    for width in dict.fromkeys((V, V + -V % 8, V + -V % 128)):
        count = float(width == V + -V % 8)
        found.append(Weight(model, f"decoder N={width}", M, H, width, count))
    return found


@contextlib.contextmanager
def preferred(library: Library) -> Iterator[None]:
    """Products are cuBLAS's or cuBLASLt's, where there is a choice."""
    if library == "cpu":
        yield
        return
    choose: Callable[..., Any] = torch.backends.cuda.preferred_blas_library
    before = choose()
    choose(library)
    try:
        yield
    finally:
        choose(before)


# Calls


def calls_of(
    weight: Weight, dtype: torch.dtype, device: torch.device
) -> dict[str, list[timing.Call]]:
    """By kind of product: one call for each clone of its tensors."""
    T, H, F = weight.rows, weight.H, weight.F
    smallest = dtype.itemsize * min(T * (H + F), H * (F + T), F * (H + T))
    calls: dict[str, list[timing.Call]] = {kind: [] for kind in weight.shapes()}
    for _ in range(timing.clones_needed(smallest, device)):
        for kind, call in _calls_of_one(weight, dtype, device).items():
            calls[kind].append(call)
    return calls


def _calls_of_one(
    weight: Weight, dtype: torch.dtype, device: torch.device
) -> dict[str, timing.Call]:
    T, H, F = weight.rows, weight.H, weight.F
    decoder = weight.name.startswith("decoder")
    x, w = timing.random_like((T, H), dtype, device), timing.random_like((F, H), dtype, device)
    # Rows of logits start on 128 bytes, whatever the vocabulary.
    y, dy = (timing.random_like((T, F + -F % 64), dtype, device)[:, :F] for _ in range(2))
    dw = torch.zeros(F, H, device=device)
    calls: dict[str, timing.Call] = {
        "forward": partial(torch.mm, x, w.t(), out=y),
        "dgrad": partial(torch.mm, dy, w, out=torch.empty_like(x)),
        WGRAD: partial(_addmm_fp32, dw, dy.t(), x, 0),
    }
    if weight.name == "qkv":
        bias = timing.random_like((F,), dtype, device)
        calls["forward"] = partial(torch.addmm, bias, x, w.t(), out=y)
    if decoder:
        calls["dgrad"] = partial(_mm_fp32, dy, w, torch.empty(T, H, device=device))
    if weight.name in LINEARS:
        calls[WGRAD_ADDS] = partial(_addmm_fp32, dw, dy.t(), x, 1)
        calls[WGRAD_BF16] = partial(torch.mm, dy.t(), x, out=torch.empty_like(w))
    return calls


def _mm_fp32(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
        return out
    return torch.mm(a.float(), b.float(), out=out)  # a CPU has no such product


def _addmm_fp32(out: Tensor, a: Tensor, b: Tensor, beta: int) -> Tensor:
    if a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=beta, out=out)
        return out
    return torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


# Figures


def waves(M: int, N: int, multiprocessors: int = MULTIPROCESSORS) -> tuple[int, float]:
    """Tiles of 128 x 256, and the share of the multiprocessors' time that they fill."""
    tiles = math.ceil(M / TILE_M) * math.ceil(N / TILE_N)
    return tiles, tiles / (math.ceil(tiles / multiprocessors) * multiprocessors)


def row_of(
    weight: Weight, kind: str, library: Library, milliseconds: Sequence[float], matrix: float
) -> Found:
    """One product's figures; `matrix` is the FLOPs a second of the large square."""
    M, N, K = weight.shapes()[kind]
    times = timing.quantiles(milliseconds)
    tiles, filled = waves(M, N)
    rate = 2.0 * M * N * K / (times["ms"] / 1e3)
    return {
        "name": f"{weight.model} {weight.name} {kind}, {library}", "contender": library,
        "model": weight.model, "weight": weight.name, "kind": kind, "library": library,
        "M": M, "N": N, "K": K,
        "per_step": weight.count, **times, "rounds_ms": list(milliseconds),
        "flops": 2 * M * N * K, "tflops": rate / 1e12, "matrix_share": rate / matrix,
        "tiles": tiles, "waves_share": filled,
    }  # fmt: skip


def family_of(row: Found) -> str | None:
    """Where a step books a product; None for one that it does not make."""
    if not row["per_step"] or row["kind"] in (WGRAD_ADDS, WGRAD_BF16):
        return None
    if row["weight"] not in LINEARS:
        return MLM
    return GEMM_FORWARD if row["kind"] == "forward" else GEMM_BACKWARD


def sums_of(rows: Sequence[Found], T: int, device_name: str = "") -> list[Found]:
    """Of a step of `TOKENS`: milliseconds of each model, family and library, and what was predicted
    of the device that its driver names so."""
    found: dict[tuple[str, str], Found] = {}
    for row in rows:
        family = family_of(row)
        if family is None:
            continue
        workload = {**MODELS["cuda"], **MODELS["cpu"]}[row["model"]][0]
        predicted = predictions.of(device_name, "trace", workload) or {"families": {}}
        one = found.setdefault(
            (row["model"], family),
            {"model": row["model"], "family": family, "ms_per_65536_tokens": {},
             "predicted_ms": predicted["families"].get(family)},
        )  # fmt: skip
        by_library = one["ms_per_65536_tokens"]
        spent = row["ms"] * row["per_step"] * TOKENS / T
        by_library[row["library"]] = by_library.get(row["library"], 0.0) + spent
    return list(found.values())


def measure(
    device: torch.device,
    quick: bool,
    seconds: float = 25.0,
    T: int | None = None,
    keep: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Times every product; a result that fits the common schema.

    Args:
        device: what to run on; on a CPU a tiny model, to rehearse.
        quick: fewer tokens, unless `T` says how many.
        seconds: that it may take; products that find no time are listed as missing.
        T: rows of a linear's input.
        keep: given what is known so far, after each weight.
    """
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else ""
    tokens = T or ((16_384 if quick else TOKENS) if cuda else 128)
    dtype, began = torch.bfloat16, time.perf_counter()
    weights = [
        weight
        for model, (_, mean) in MODELS[device.type].items()
        for weight in weights_of(model, model_config(model), tokens, mean)
    ]
    rows: list[Found] = []
    missing: list[dict[str, str]] = []
    with profiling.side_stream(device):
        matrix = _square(device, dtype)
        # Once: asking the driver for its state takes half a second.
        settings = {"quick": quick, "tokens": tokens}
        found = result.make("kernels", settings, device, (), matrix=matrix)
        for done, weight in enumerate(weights):
            left = seconds - (time.perf_counter() - began)
            if left <= 0:
                missing.append({"name": f"{weight.model} {weight.name}", "why": "no time was left"})
            else:
                share = left / (len(weights) - done)
                more, failed = _timed(weight, dtype, device, share, matrix)
                rows, missing = rows + more, missing + failed
                if cuda:
                    torch.cuda.empty_cache()  # the next weight's tensors have other sizes
            found |= {"rows": rows, "missing": missing, "sums": sums_of(rows, tokens, name),
                      "seconds": time.perf_counter() - began}  # fmt: skip
            keep(found)
    found["conditions"] = result.conditions(device)  # at the end: the clocks under load
    keep(found)
    return found


def _square(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square product."""
    n = SQUARE if device.type == "cuda" else 128
    a, b = (timing.random_like((n, n), dtype, device) for _ in range(2))
    call = partial(torch.mm, a, b, out=torch.empty_like(a))
    times = timing.interleaved({"": timing.Replay([call] * 4, device)}, device, ROUNDS, 1.0)
    return 2.0 * n**3 / (timing.quantiles(times[""])["ms"] / 1e3)


def _timed(
    weight: Weight, dtype: torch.dtype, device: torch.device, seconds: float, matrix: float
) -> tuple[list[Found], list[dict[str, str]]]:
    """Rows of one weight, and what of it could not be timed."""
    replays: dict[tuple[str, Library], timing.Replay] = {}
    missing = []
    try:
        for kind, calls in calls_of(weight, dtype, device).items():
            for library in LIBRARIES[device.type]:
                try:
                    with preferred(library):
                        replays[kind, library] = timing.Replay(calls, device)
                except RuntimeError as error:
                    name = f"{weight.model} {weight.name} {kind}, {library}"
                    missing.append({"name": name, "why": one_line(error)})
        named = {" by ".join(key): replay for key, replay in replays.items()}
        times = timing.interleaved(named, device, ROUNDS, seconds)
        rows = [
            row_of(weight, kind, library, times[" by ".join((kind, library))], matrix)
            for kind, library in replays
        ]
    except RuntimeError as error:
        missing.append({"name": f"{weight.model} {weight.name}", "why": one_line(error)})
        return [], missing
    return rows, missing


# The table


def table(found: Found) -> list[str]:
    """At most 16 lines of at most 110 characters, the most telling first."""
    rows, told = found["rows"], found["conditions"]
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    lines = [
        f"products on {told['device']}, {found['settings']['tokens']:,} rows, bf16: "
        f"{found['matrix'] / 1e12:,.1f} TFLOP/s by {SQUARE}^3, {found['seconds']:.1f} s",
        f"{'ms of 65,536 tokens':<34}" + "".join(f"{name:>12}" for name in libraries)
        + f"{'predicted':>12}",
    ]  # fmt: skip
    for one in found["sums"]:
        by_library = one["ms_per_65536_tokens"]
        cells = [by_library.get(name) for name in libraries]
        lines.append(
            f"{one['model'] + ' ' + one['family']:<34}"
            + "".join(f"{or_dash(value, '.2f'):>12}" for value in cells)
            + f"{or_dash(one['predicted_ms'], '.1f'):>12}"
        )
    if not rows:
        return lines
    lines += _choices(rows, libraries[0])
    lines.append(f"{'furthest from that rate, times a step':<44}{'M':>7}{'N':>7}{'K':>7}{'ms':>9}"
                 f"{'TFLOP/s':>9}{'of rate':>8}{'tiles':>7}{'waves':>7}")  # fmt: skip
    best = _best(rows)
    best.sort(key=lambda row: -row["ms"] * row["per_step"] * (1 - row["matrix_share"]))
    lines += [_line(row) for row in best]
    return [line[:WIDTH] for line in lines[:LINES]]


def _best(rows: Sequence[Found]) -> list[Found]:
    """The faster library's row of each product that a step makes."""
    found: dict[tuple[str, str, str], Found] = {}
    for row in rows:
        key = row["model"], row["weight"], row["kind"]
        if family_of(row) and (key not in found or row["ms"] < found[key]["ms"]):
            found[key] = row
    return list(found.values())


def _choices(rows: Sequence[Found], library: Library) -> list[str]:
    """What fp32 and beta cost a layer's weight gradients, what padding saves the decoder."""
    here = [row for row in rows if row["library"] == library]
    spent: dict[str, dict[tuple[str, str], float]] = {"wgrad": {}, "decoder": {}}
    for row in here:
        linear = row["weight"] in LINEARS
        if linear and row["kind"] in (WGRAD, WGRAD_ADDS, WGRAD_BF16):
            sums, key = spent["wgrad"], (row["model"], row["kind"])
        elif row["weight"].startswith("decoder"):
            sums, key = spent["decoder"], (row["model"], row["weight"])
        else:
            continue
        sums[key] = sums.get(key, 0.0) + row["ms"]
    heads = {
        "wgrad": f"ms of wgrads, fp32 / beta=1 / bf16, {library}: ",
        "decoder": f"ms of the decoder, N as it is / padded, {library}: ",
    }
    lines = []
    for what, sums in spent.items():
        models = dict.fromkeys(model for model, _ in sums)
        told = [
            f"{model} " + " / ".join(f"{ms:.3f}" for (of, _), ms in sums.items() if of == model)
            for model in models
        ]
        lines.append(heads[what] + ", ".join(told))
    return lines


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"  {row['name'][:41]:<42}{row['M']:>7}{row['N']:>7}{row['K']:>7}{row['ms']:>9.3f}"
        f"{row['tflops']:>9,.1f}{row['matrix_share']:>8.0%}{row['tiles']:>7}"
        f"{row['waves_share']:>7.0%}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = part.parser("gemms", quick="fewer tokens")
    parser.add_argument("--seconds", type=float, default=25.0, help="default %(default)s")
    parser.add_argument("--tokens", type=int, help="rows of a linear's input")
    args = parser.parse_args(argv)
    asked = part.device_of(args), args.quick, args.seconds, args.tokens
    return part.kept(partial(measure, *asked), args.out, table)


if __name__ == "__main__":
    sys.exit(main())
