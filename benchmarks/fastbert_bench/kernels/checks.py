"""Is every kernel right on this device? Forward and every gradient against the reference in fp64.

The rule: max|ours - fp64| <= 2 max|PyTorch in the same dtype - fp64| + tiny. A kernel may err twice
as much as PyTorch does; tiny is one unit in the last place of the largest value (8 in fp32, where
sums in another order differ so much), because with few elements PyTorch's own error can be 0 by
luck. Besides: fresh memory holds NaN, dropout bits are compared, the backward is repeated, and runs
inside a CUDA graph and under torch.compile must give the same.

Each check is a row: {"check": name, "ok": true | false | null (not possible here), numbers}.
"""

import contextlib
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert_bench.kernels.costs import VOCABULARY
from fastbert_kernels import reference, reference_optimizer
from fastbert_kernels.philox import keep_mask, keep_threshold, score_mask
from fastbert_kernels.reference_optimizer import (
    Buffers,
    Hyperparameters,
    MuonGroup,
    MuonHyperparameters,
)

Row = dict[str, Any]
Op = Callable[..., Tensor]

TINY = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
EPS = 1e-12
REPEATS = 50


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape in one dtype."""

    label: str
    dtype: torch.dtype
    op: Op
    oracle: Op
    tensors: Callable[[], dict[str, Tensor]]
    """What `op` takes, in any dtype; all get gradients."""
    tail: int = 0
    """Last rows of output, and of gradients of so many rows, that must be 0."""
    zeros: bool = False
    """Whether output 0 means dropped, so that dropout's bits can be read off it."""
    deep: bool = False
    """Whether to repeat the backward, and to run in a CUDA graph and under torch.compile."""
    exact: bool = True
    """Whether a graph must give the same bits; cuBLAS may choose otherwise there."""


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """bf16 is garbage in Triton's interpreter."""
    both = (torch.float32, torch.float16)
    return (*both, torch.bfloat16) if device.type == "cuda" else both


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer: what a kernel leaves unwritten shows."""

    def fill(allocate: Any) -> Any:
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(
                torch.nan if out.dtype.is_floating_point else torch.iinfo(out.dtype).max
            )

        return poison

    before = torch.empty, torch.empty_like
    torch.empty, torch.empty_like = map(fill, before)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = before


def results(
    op: Op, tensors: dict[str, Tensor], case_dtype: torch.dtype, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and all gradients, in `dtype`, of inputs that were rounded to the case's dtype."""
    leaves = [t.detach().to(case_dtype).to(dtype).requires_grad_() for t in tensors.values()]
    out = op(*leaves)
    dout = _dout(out, case_dtype)
    gradients = torch.autograd.grad(out, leaves, dout)
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(tensors, gradients, strict=True)}


def _dout(out: Tensor, case_dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(out.device).manual_seed(1)
    dout = torch.randn(out.shape, device=out.device, generator=generator)
    return dout.to(case_dtype).to(out.dtype)


def compare(
    label: str,
    found: dict[str, Tensor],
    plain: dict[str, Tensor],
    want: dict[str, Tensor],
    dtype: torch.dtype,
) -> Iterator[Row]:
    """The rule above, for the output and every gradient."""
    for name, exact in want.items():
        ours, theirs = found[name], plain[name]
        if ours.shape != exact.shape or ours.dtype != theirs.dtype:
            told = f"{tuple(ours.shape)} {ours.dtype}, not {tuple(exact.shape)} {theirs.dtype}"
            yield {"check": f"{label}: {name}", "ok": False, "why": told}
            continue
        error, allowed = (float((t.double() - exact).abs().max()) for t in (ours, theirs))
        allowed = 2 * allowed + TINY[dtype] * float(exact.abs().max())
        yield {
            "check": f"{label}: {name}", "ok": error <= allowed, "error": error, "allowed": allowed,
        }  # fmt: skip


def check_case(case: Case, device: torch.device, trace: bool) -> Iterator[Row]:
    """All checks of one case, under torch.compile only if `trace`: that takes seconds."""
    torch.manual_seed(zlib.crc32(case.label.encode()))
    tensors = case.tensors()
    with poisoned():
        found = results(case.op, tensors, case.dtype, case.dtype)
    plain = results(case.oracle, tensors, case.dtype, case.dtype)
    want = results(case.oracle, tensors, case.dtype, torch.float64)
    yield from compare(case.label, found, plain, want, case.dtype)
    if case.tail:
        rows = [t for t in found.values() if len(t) == len(found["out"])]
        empty = not any(bool(t[-case.tail :].any()) for t in rows)
        yield {"check": f"{case.label}: rows of no sequence are 0", "ok": empty}
    if case.zeros:
        same = torch.equal(found["out"] == 0, want["out"] == 0)
        yield {"check": f"{case.label}: dropout bits", "ok": same}
    if not case.deep:
        return
    leaves = [t.detach().to(case.dtype).requires_grad_() for t in tensors.values()]
    dout = _dout(found["out"], case.dtype)

    def run(op: Op) -> dict[str, Tensor]:
        out = op(*leaves)
        gradients = torch.autograd.grad(out, leaves, dout)
        return {"out": out.detach(), **{f"d{n}": g for n, g in zip(tensors, gradients)}}  # noqa: B905

    yield repeat_backward(case, leaves, dout, device)
    others: list[tuple[str, Callable[[], dict[str, Tensor]]]] = []
    if trace:
        others.append(("torch.compile", lambda: run(compiled(case.op, device))))
    if device.type == "cuda":
        others.append(("CUDA graph", lambda: in_graph(lambda: run(case.op))))
    else:
        yield {"check": f"{case.label}: CUDA graph", "ok": None, "why": "no GPU"}
    for name, other in others:
        again = other()
        if case.exact:
            same = all(torch.equal(again[key], found[key]) for key in found)
            yield {"check": f"{case.label}: {name}", "ok": same}
        else:
            yield from compare(f"{case.label}: {name}", again, plain, want, case.dtype)


def repeat_backward(
    case: Case, leaves: Sequence[Tensor], dout: Tensor, device: torch.device
) -> Row:
    out = case.op(*leaves)
    times = REPEATS if device.type == "cuda" else 2
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    same = all(
        torch.equal(a, b)
        for _ in range(times - 1)
        for a, b in zip(
            first, torch.autograd.grad(out, leaves, dout, retain_graph=True), strict=True
        )
    )
    return {"check": f"{case.label}: backward {times} times the same bits", "ok": same}


def compiled(op: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """In one graph; by Inductor on a GPU, only traced on a CPU."""
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    result: Callable[..., Any] = torch.compile(op, fullgraph=True, backend=backend)
    return result


def in_graph(run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a replay of the captured `run` writes; its kernels must have run before.

    The current stream is captured (it may not be the default one), because autograd runs a
    backward on the stream of its forward.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        written = run()
    for tensor in written.values():
        tensor.fill_(torch.nan if tensor.dtype.is_floating_point else -1)
    graph.replay()
    torch.cuda.synchronize()
    return {name: tensor.clone() for name, tensor in written.items()}


# Cases, op by op


def seed_on(device: torch.device) -> Tensor:
    return torch.tensor([2**40 + 12345, 7, 3], device=device)


def bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def with_rest(
    op: Callable[..., Tensor], *rest: Any, before: Sequence[Any] = (), **named: Any
) -> Op:
    """`op` of the arguments before, the tensors, and the rest."""
    return lambda *tensors: op(*before, *tensors, *rest, **named)


def normal(
    device: torch.device, of_weight: float = 1.0, **shapes: tuple[int, ...]
) -> Callable[[], dict[str, Tensor]]:
    """Makes the named tensors; weights of products are scaled, those of a LayerNorm lie near 1."""

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        made = torch.randn(shape, device=device)
        if name != "weight":
            return made
        return made + 1 if len(shape) == 1 else of_weight * made

    return lambda: {name: one(name, shape) for name, shape in shapes.items()}


def attention_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    from fastbert_kernels.attention import attention, attention_at

    seed = seed_on(device)

    def biased(op: Op, *rest: Any, **named: Any) -> Op:
        """The last tensor is the bias that the others contain, which gets a gradient only."""
        return lambda *tensors: op(*tensors[:-1], *rest, qkv_bias=tensors[-1], **named)

    def some(
        lengths: Sequence[int], S: int, A: int, D: int, dtype: torch.dtype, deep: bool = False
    ) -> Case:
        """Every fifth token asks, two queries are unused."""
        T, start = sum(lengths), bounds(lengths, device)
        positions = torch.arange(0, T, 5, device=device)
        cu_queries = torch.searchsorted(positions, start.long()).int()
        positions = torch.cat((positions, positions.new_full((2,), T)))
        rest = (positions, cu_queries, start, S, 0.1, seed, 1)
        return Case(
            label=f"{short(dtype)} D={D} p=0.1 S={S} {list(lengths)} some tokens ask",
            dtype=dtype,
            op=biased(attention_at, *rest),
            oracle=biased(reference.attention_at, *rest),
            tensors=normal(device, q=(len(positions), A, D), kv=(T, 2, A, D), bias=(3, A, D)),
            tail=2,
            deep=deep,
        )

    def case(
        lengths: Sequence[int], S: int, A: int, D: int, p: float, dtype: torch.dtype,
        unused: int = 0, deep: bool = False, backend: str = "triton",
    ) -> Case:  # fmt: skip
        rest = (bounds(lengths, device), S, p, seed, 1)
        shown = list(lengths) if len(lengths) < 10 else f"{len(lengths)} of {min(lengths)} to "
        shown = shown if isinstance(shown, list) else shown + str(max(lengths))
        return Case(
            label=f"{short(dtype)} D={D} p={p} S={S} {shown}"
            + ("" if backend == "triton" else f" {backend}"),
            dtype=dtype,
            op=biased(attention, *rest, backend=backend),
            oracle=biased(reference.attention, *rest),
            tensors=normal(device, qkv=(sum(lengths) + unused, 3, A, D), bias=(3, A, D)),
            tail=unused,
            deep=deep,
        )

    if quick and device.type == "cpu":
        for dtype in dtypes(device):
            yield case([7, 33, 1, 0], 40, 1, 32, 0.1, dtype, 3, deep=dtype == torch.float16)
        yield some([7, 33, 1, 0], 40, 1, 32, torch.float16)
        return
    many = torch.randint(1, 129, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    heads = (64,) if quick else (32, 64, 128)
    for dtype, D in itertools.product(dtypes(device), heads):
        for p in (0.0, 0.1):
            yield case([7, 1, 63, 64, 65, 127, 0, 0], 128, 2, D, p, dtype, 5)
        yield case([129, 1, 512, 511, 0], 512, 2, D, 0.1, dtype, 200)
        yield case([1300, 129, 0], 1300, 2, D, 0.1, dtype, 7, deep=D == 64)
        for S in (128, 512, 1300):
            yield some([S, 1, 0, S - 1, 3], S, 2, D, dtype, deep=D == 64 and S == 512)
    for dtype in dtypes(device):
        yield case([8192], 8192, 1, 64, 0.1, dtype)
        yield case(many, 128, 12, 64, 0.1, dtype, deep=True)
        yield case([length * 4 for length in many[:16]], 512, 12, 64, 0.1, dtype, deep=True)
    if device.type == "cuda":
        for dtype in (torch.float16, torch.bfloat16):
            yield case([129, 1, 512, 511, 0], 512, 2, 64, 0.0, dtype, 9, backend="torch")


def rows_and_widths(device: torch.device, quick: bool) -> list[tuple[int, int, bool]]:
    """(R, H, deep)."""
    if quick and device.type == "cpu":
        return [(5, 128, True), (3, 384, False)]
    shapes = [(1, 128), (7, 8), (63, 384), (64, 768), (65, 1024), (127, 384), (129, 768)]
    shapes += [(511, 1024), (512, 128), (5, 1032), (3, 4096), (257, 3072)]
    return [*((R, H, False) for R, H in shapes[: 4 if quick else None]), (8191, 768, True)]


def dropout_add_layer_norm_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    from fastbert_kernels.layer_norm import dropout_add_layer_norm

    for dtype, p, (R, H, deep) in itertools.product(
        dtypes(device), (0.0, 0.1), rows_and_widths(device, quick)
    ):
        rest = (EPS, p, seed_on(device), 1)

        def tensors(R: int = R, H: int = H) -> dict[str, Tensor]:
            """Half of the columns as in training, whose sum is not kept; of most others it is."""
            made = normal(
                device, x=(R, H), bias=(H,), residual=(R, H), weight=(H,), beta=(H,)
            )()  # fmt: skip
            half = torch.arange(H, device=device) < H // 2
            made["weight"] = torch.where(half, 1 + made["weight"] / 8, made["weight"])
            made["beta"] = torch.where(half, made["beta"] / 8, made["beta"])
            return made

        yield Case(
            label=f"{short(dtype)} R={R} H={H} p={p}",
            dtype=dtype,
            op=with_rest(dropout_add_layer_norm, *rest),
            oracle=with_rest(reference.dropout_add_layer_norm, *rest),
            tensors=tensors,
            deep=deep and p > 0,
        )


def gelu_cases(name: str, device: torch.device, quick: bool) -> Iterator[Case]:
    from fastbert_kernels import gelu

    for dtype, approximate, (R, H, deep) in itertools.product(
        dtypes(device), ("none", "tanh"), rows_and_widths(device, quick)
    ):
        shapes: dict[str, tuple[int, ...]] = {"x": (R, H), "bias": (H,)}
        rest: tuple[Any, ...] = (approximate,)
        if name == "gelu_layer_norm":
            shapes |= {"weight": (H,), "beta": (H,)}
            rest = (EPS, approximate)
        yield Case(
            label=f"{short(dtype)} R={R} H={H} {approximate}",
            dtype=dtype,
            op=with_rest(getattr(gelu, name), *rest),
            oracle=with_rest(getattr(reference, name), *rest),
            tensors=normal(device, 1.0, **shapes),
            deep=deep and approximate == "none",
        )


class _GeluLinear(torch.autograd.Function):
    """GELU(x + bias) Wᵀ by the reference, through `gelu_linear_backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.backend = backend
        return reference.gelu_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from fastbert_kernels.linear import gelu_linear_backward

        x, weight, bias = ctx.saved_tensors
        dx, dbias = gelu_linear_backward(dy.contiguous(), weight, x, bias, backend=ctx.backend)
        return dx, dy.t() @ reference.bias_gelu(x, bias), dbias, None


def linear_gelu_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Both fused products of the feed-forward: its first, and what comes back to it."""
    from fastbert_kernels.linear import linear_gelu

    shapes = [(65, 768, 3072, False), (1, 128, 512, False), (127, 384, 1536, False)]
    shapes += [(511, 1024, 4096, True), (129, 768, 768, False)]
    if quick:
        shapes = [(5, 64, 136, True)] if device.type == "cpu" else shapes[:1]
    for dtype, backend, (R, H, F, deep) in itertools.product(
        dtypes(device), ("triton", "cublas"), shapes
    ):
        for approximate in ("none", "tanh") if R == 65 else ("none",):
            yield Case(
                label=f"{short(dtype)} R={R} H={H} F={F} {approximate} {backend}",
                dtype=dtype,
                op=with_rest(linear_gelu, approximate, backend=backend),
                oracle=with_rest(reference.linear_gelu, approximate),
                tensors=normal(device, H**-0.5, x=(R, H), weight=(F, H), bias=(F,)),
                deep=deep and dtype != torch.float32,
                exact=False,
            )
        yield Case(
            label=f"{short(dtype)} R={R} H={H} F={F} backward of GELU and a product, {backend}",
            dtype=dtype,
            op=with_rest(_GeluLinear.apply, backend),
            oracle=reference.gelu_linear,
            tensors=normal(device, F**-0.5, x=(R, F), weight=(H, F), bias=(F,)),
            exact=False,
        )


def linear_cross_entropy_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    from fastbert_kernels.cross_entropy import linear_cross_entropy

    V = VOCABULARY
    shapes = [(1, V, 768, 4096), (7, V, 128, 4096), (63, V, 384, 4096), (129, V, 1024, 4096)]
    shapes += [(511, V, 768, 4096), (1025, V, 768, 512), (40, 129, 64, 4096), (33, 1000, 32, 16)]
    if quick:
        shapes = [(9, 1000, 32, 4096), (11, 130, 16, 4)] if device.type == "cpu" else shapes[-4:]
    for dtype, (M, V, H, chunk_rows) in itertools.product(dtypes(device), shapes):
        labels = torch.randint(V, (M,), generator=torch.Generator().manual_seed(M)).to(device)
        labels[::3] = -100
        labels[-1:] = V - 1
        # Label smoothing and z-loss where the vocabulary is small and they weigh most.
        rest = (labels, 0.1, 1e-3) if V < 2000 else (labels, 0.0, 0.0)
        yield Case(
            label=f"{short(dtype)} M={M} V={V} H={H} chunks of {chunk_rows}",
            dtype=dtype,
            op=with_rest(linear_cross_entropy, *rest, chunk_rows=chunk_rows),
            oracle=with_rest(reference.linear_cross_entropy, *rest),
            tensors=normal(device, 3 * H**-0.5, x=(M, H), weight=(V, H), bias=(V,)),
            deep=M in (511, 1025, 9, 11) and dtype != torch.float32,
            exact=False,
        )


def embed_layer_norm_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    from fastbert_kernels.embedding import embed_layer_norm

    V = VOCABULARY
    shapes = [(1, 9, 4, 128), (63, V, 64, 384), (130, V, 512, 768), (511, V, 512, 1024)]
    shapes += [(257, 5, 2, 136), (8192, V, 512, 768)]
    if quick:
        shapes = [(70, 9, 8, 128)] if device.type == "cpu" else shapes[-3:]
    pad = 3
    for dtype, p, (T, V, P, H) in itertools.product(dtypes(device), (0.0, 0.1), shapes):
        generator = torch.Generator().manual_seed(T)
        ids = torch.randint(V, (T,), generator=generator)
        ids[torch.rand(T, generator=generator) < 0.3] = V - 1  # a frequent word, as [MASK] is
        ids[::5] = pad
        types = torch.randint(2, (T,), generator=generator)
        indices = [t.to(device) for t in (ids, types, torch.arange(T) % P)]
        rest = (pad, EPS, p, seed_on(device), 1)
        yield Case(
            label=f"{short(dtype)} T={T} V={V} P={P} H={H} p={p}",
            dtype=dtype,
            op=with_rest(embed_layer_norm, *rest, before=indices),
            oracle=with_rest(reference.embed_layer_norm, *rest, before=indices),
            tensors=normal(
                device, word=(V, H), token_type=(2, H), position=(P, H), weight=(H,), beta=(H,)
            ),
            # In fp16 a value may round to 0 without being dropped.
            zeros=p > 0 and dtype != torch.float16,
            deep=p > 0 and T in (8192, 70),
        )  # fmt: skip


CASES: dict[str, Callable[[torch.device, bool], Iterator[Case]]] = {
    "attention": attention_cases,
    "dropout_add_layer_norm": dropout_add_layer_norm_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "linear_gelu": linear_gelu_cases,
    "gelu_layer_norm": lambda device, quick: gelu_cases("gelu_layer_norm", device, quick),
    "bias_gelu": lambda device, quick: gelu_cases("bias_gelu", device, quick),
    "embed_layer_norm": embed_layer_norm_cases,
}


# Dropout bits where the output does not show them


def attention_bits(device: torch.device) -> Iterator[Row]:
    """With equal scores, and unit vectors for rows of v, the output shows which columns stayed."""
    from fastbert_kernels.attention import attention

    seed, D = seed_on(device), 128
    lengths = (127, 512) if device.type == "cuda" else (40,)
    for length, dtype in itertools.product(lengths, dtypes(device)):
        kept = []
        for first in range(0, length, D):
            qkv = torch.zeros(2 * length, 3, 2, D, dtype=dtype, device=device)
            for sequence in range(2):
                here = torch.arange(first, min(first + D, length), device=device)
                qkv[sequence * length + here, 2, :, here - first] = 1.0
            out = attention(qkv, bounds([length] * 2, device), length, 0.1, seed, 2)
            kept.append(out.view(2, length, 2, D).transpose(1, 2) > 0)
        found = torch.cat(kept, dim=-1)[..., :length]
        shape, site = (2, 2, length, length), seed[2] * 4 + 2
        same = torch.equal(found, score_mask(shape, keep_threshold(0.1), seed, site))
        yield {"check": f"{short(dtype)} length {length}: dropout bits", "ok": same}


def layer_norm_bits(device: torch.device) -> Iterator[Row]:
    """What is dropped has no gradient; what is kept has one that is 0 by chance only."""
    from fastbert_kernels.layer_norm import dropout_add_layer_norm

    for H in (264, 768, 1024):
        x = torch.ones(13, H, device=device, requires_grad=True)
        parameters = [torch.zeros(H, device=device) for _ in range(2)]
        residual, scale = torch.randn(13, H, device=device), torch.ones(H, device=device)
        seed = seed_on(device)
        out = dropout_add_layer_norm(
            x, parameters[0], residual, scale, parameters[1], 1e-5, 0.3, seed, 2
        )
        (dx,) = torch.autograd.grad(out, x, torch.randn_like(x))
        same = torch.equal(dx != 0, keep_mask((13, H), 0.3, seed, 2))
        yield {"check": f"fp32 H={H}: dropout bits", "ok": same}


# Optimizers and masking

SPANS = [(0, 50_000), (50_016, 50_116), (50_128, 50_129), (50_144, 51_000)]
DECAY_END, ELEMENTS = 50_128, 51_008
HYPER = Hyperparameters(DECAY_END)


def optimizer_state(device: torch.device, weights: torch.dtype) -> dict[str, Tensor]:
    inside = torch.zeros(ELEMENTS, device=device)
    for start, stop in SPANS:
        inside[start:stop] = 1
    return {
        "master": torch.randn(ELEMENTS, device=device) * inside,
        "exp_avg": torch.zeros(ELEMENTS, device=device),
        "exp_avg_sq": torch.zeros(ELEMENTS, device=device),
        "weights": torch.zeros(ELEMENTS, device=device, dtype=weights),
        "lr": torch.tensor(0.02, device=device),
        "step": torch.tensor(0, device=device),
        "skipped": torch.tensor(0, device=device),
        "grad_scale": torch.tensor(8.0, device=device),
        "grad_norm": torch.tensor(torch.nan, device=device),
    }


def copied(state: dict[str, Tensor], wide: bool = False) -> dict[str, Tensor]:
    return {n: t.double() if wide and t.is_floating_point() else t.clone()
            for n, t in state.items()}  # fmt: skip


def optimizer_checks(name: str, device: torch.device, quick: bool) -> Iterator[Row]:
    """Many steps beside the oracle in fp64, some clipped, steps 3 and 5 holding inf and nan."""
    from fastbert_kernels import optimizer

    table = [optimizer.lamb_table(SPANS, device)] if name == "lamb" else []
    spans = [SPANS] if name == "lamb" else []
    kernel, oracle = (
        getattr(optimizer, f"{name}_step"),
        getattr(reference_optimizer, f"{name}_step"),
    )
    steps = 8 if quick else 50
    for dtype in dtypes(device):
        torch.manual_seed(1)
        found = optimizer_state(device, torch.float16 if device.type == "cpu" else torch.bfloat16)
        want = copied(found, wide=True)
        inside = found["master"] != 0
        worst = dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "grad_norm"), 0.0)
        unchanged = written_back = True
        for i in range(steps):
            size = 8.0 * (0.002 if i % 3 else 0.1)
            grad = (torch.randn(ELEMENTS, device=device) * inside * size).to(dtype)
            if i in (3, 5):
                grad[7 if i == 3 else -30] = torch.inf if i == 3 else torch.nan
            before = copied(found)
            with poisoned():
                kernel(Buffers(grad=grad, **found), HYPER, *table)
            oracle(Buffers(grad=grad, **want), HYPER, *spans)
            if i in (3, 5):
                kept = ("master", "exp_avg", "exp_avg_sq", "weights", "step")
                unchanged &= all(torch.equal(found[n], before[n]) for n in kept)
                unchanged &= not bool(found["grad_norm"].isfinite())
                continue
            written_back &= torch.equal(
                found["weights"], found["master"].to(found["weights"].dtype)
            )
            for buffer in worst:
                exact = want[buffer]
                error = float((found[buffer].double() - exact).abs().max() / exact.abs().max())
                # Steps add up their roundings; NaN stays NaN, which no comparison passes.
                error /= i + 5
                worst[buffer] = error if not error <= worst[buffer] else worst[buffer]
        label = f"gradient {short(dtype)}, {steps} steps"
        for buffer, error in worst.items():
            yield {
                "check": f"{label}: {buffer}", "ok": error <= 2e-6, "error": error, "allowed": 2e-6
            }  # fmt: skip
        yield {"check": f"{label}: inf and nan change nothing", "ok": unchanged}
        yield {"check": f"{label}: weights are the rounded masters", "ok": written_back}
        counted = int(found["step"]) == steps - 2 and int(found["skipped"]) == 2
        yield {"check": f"{label}: steps are counted", "ok": counted}

        def step(state: dict[str, Tensor], grad: Tensor) -> None:
            kernel(Buffers(grad=grad, **state), HYPER, *table)

        grad = (torch.randn(ELEMENTS, device=device) * inside).to(dtype)
        trace = dtype == dtypes(device)[-1]
        yield from mutating_checks(label, step, found, grad, device, trace)


def symmetric_product_checks(device: torch.device, quick: bool) -> Iterator[Row]:
    """X Xᵀ and XᵀX + C beside the oracle: symmetric, and the same in a CUDA graph."""
    from fastbert_kernels.muon import symmetric_product

    shapes = [(12, 768, 3072), (3, 1024, 1024), (1, 129, 8), (5, 77, 1000), (1, 1, 1)]
    if quick:
        shapes = [(2, 33, 40)] if device.type == "cpu" else shapes[:3]
    for dtype, (B, m, k) in itertools.product(dtypes(device), shapes):
        torch.manual_seed(m)
        x, c = (torch.randn(B, m, n, device=device).to(dtype) for n in (k, m))
        calls: dict[str, dict[str, Any]] = {
            "XXᵀ": {"x": x},
            "XᵀX + C": {"x": x.mT.contiguous(), "transposed": True, "add": c + c.mT, "beta": -2.0},
        }
        for name, call in calls.items():
            told = f"{short(dtype)} {B} of {m} x {k} {name}"
            wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in call.items()}

            def run(call: dict[str, Any] = call) -> dict[str, Tensor]:
                return {"product": symmetric_product(**call)}

            with poisoned():
                found = run()
            oracle = reference_optimizer.symmetric_product
            plain, want = ({"product": oracle(**one)} for one in (call, wide))
            yield from compare(told, found, plain, want, dtype)
            symmetric = torch.equal(found["product"], found["product"].mT)
            yield {"check": f"{told}: symmetric", "ok": symmetric}
            again = in_graph(run) if device.type == "cuda" else run()
            same = torch.equal(again["product"], found["product"])
            yield {"check": f"{told}: the same bits again", "ok": same}


def muon_checks(device: torch.device, quick: bool) -> Iterator[Row]:
    """Some steps beside the oracle in fp64, Newton-Schulz in fp32; then in bf16, repeated."""
    from fastbert_kernels.muon import muon_step

    groups = (MuonGroup(64, 192, (1024, 13_312)), MuonGroup(160, 96, (32_768,)))
    steps = 1 if quick else 5
    muon = MuonHyperparameters(1024, groups, ns_steps=steps, dtype=torch.float32)
    hyper = HYPER._replace(decay_end=512)
    found = optimizer_state(device, dtypes(device)[-1])
    found["exp_avg_sq"] = found["exp_avg_sq"][: muon.begin].clone()
    first, want = copied(found), copied(found, wide=True)
    grad = torch.randn(ELEMENTS, device=device)
    for i in range(steps + 1):
        grad = torch.randn(ELEMENTS, device=device)
        if i == 1:
            grad[20_000] = torch.inf
        with poisoned():
            muon_step(Buffers(grad=grad, **found), hyper, muon)
        oracle = muon._replace(dtype=torch.float64)
        reference_optimizer.muon_step(Buffers(grad=grad, **want), hyper, oracle)
    change, wanted = found["master"] - first["master"], want["master"] - first["master"]
    error = float((change - wanted).abs().max() / wanted.abs().max())
    yield {"check": "muon_step", "ok": error <= 1e-4, "error": error, "allowed": 1e-4}
    counted = int(found["step"]) == int(want["step"]) and int(found["skipped"]) == 1
    yield {"check": "muon_step: an inf changes nothing", "ok": counted}
    half = muon._replace(dtype=dtypes(device)[-1])

    def step(state: dict[str, Tensor], grad: Tensor) -> None:
        muon_step(Buffers(grad=grad, **state), hyper, half)

    yield from mutating_checks("muon_step", step, found, torch.ones_like(grad), device, False)


def mutating_checks(
    label: str,
    step: Callable[[dict[str, Tensor], Tensor], None],
    state: dict[str, Tensor],
    grad: Tensor,
    device: torch.device,
    trace: bool,
) -> Iterator[Row]:
    """Three steps from one state give the same bits again, compiled, and from a CUDA graph."""

    def after(run: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
        buffers = copied(state)
        run(buffers)
        return buffers

    def three(one: Callable[[], None]) -> None:
        for _ in range(3):
            one()

    def captured(buffers: dict[str, Tensor]) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step(buffers, grad)
        three(graph.replay)
        torch.cuda.synchronize()

    eager = after(lambda buffers: three(lambda: step(buffers, grad)))
    ways = {
        "the same bits again": lambda buffers: three(lambda: step(buffers, grad)),
        "CUDA graph": captured,
    }
    if trace:
        traced = compiled(step, device)
        ways["torch.compile"] = lambda buffers: three(lambda: traced(buffers, grad))
    for name, way in ways.items():
        if way is captured and device.type != "cuda":
            yield {"check": f"{label}: {name}", "ok": None, "why": "no GPU"}
            continue
        again = after(way)
        same = all(torch.equal(again[key], eager[key]) for key in eager)
        yield {"check": f"{label}: {name}", "ok": same}


def mask_checks(device: torch.device, quick: bool) -> Iterator[Row]:
    """The reference bit for bit."""
    from fastbert_kernels.mask import mask_tokens

    V, seed = VOCABULARY, seed_on(device)
    is_special = torch.zeros(V, dtype=torch.bool, device=device)
    is_special[:5] = True
    for T, probability in itertools.product((1, 511, 513) if quick else (0, 1, 511, 513, 65_536),
                                            (0.0, 0.15, 1.0)):  # fmt: skip
        ids = torch.randint(V, (T,), device=device)
        ids[5:7] = torch.tensor([-1, V], device=device)[: max(0, T - 5)]
        arguments = (ids, is_special, seed, probability, 4)
        want = reference_optimizer.mask_tokens(*arguments)

        def run(arguments: tuple[Any, ...] = arguments) -> dict[str, Tensor]:
            return dict(zip(("ids", "labels"), mask_tokens(*arguments), strict=True))

        ways = {"": run}
        if T == 513 and probability == 0.15:
            ways[", torch.compile"] = compiled(run, device)
            if device.type == "cuda":
                ways[", CUDA graph"] = functools.partial(in_graph, run)
        for name, way in ways.items():
            with poisoned() if not name else contextlib.nullcontext():
                found = way()
            same = all(torch.equal(a, b) for a, b in zip(found.values(), want, strict=True))
            yield {"check": f"T={T} {probability:.0%}{name}", "ok": same}


def checks_of(op: str, device: torch.device, quick: bool) -> Iterator[tuple[str, Iterator[Row]]]:
    """All checks of an op: groups by name, each of which does its work when read."""
    if op == "mask_tokens":
        yield "all", mask_checks(device, quick)
    elif op in ("adamw", "lamb"):
        yield "all", optimizer_checks(op, device, quick)
    elif op == "symmetric_product":
        yield "products", symmetric_product_checks(device, quick)
        yield "muon_step", muon_checks(device, quick)
    else:
        traced = False
        for case in CASES[op](device, quick):
            trace = case.deep and case.dtype == dtypes(device)[-1] and not traced
            traced |= trace
            yield case.label, check_case(case, device, trace)
        if op == "attention":
            yield "dropout bits", attention_bits(device)
        if op == "dropout_add_layer_norm":
            yield "dropout bits", layer_norm_bits(device)


def warm_up(op: str, device: torch.device, quick: bool, part: int, parts: int) -> None:
    """Compiles what the part-th of `parts` shares of the checks needs."""
    if op not in CASES:
        for _, rows in checks_of(op, device, True):
            list(rows)
        return
    for case in itertools.islice(CASES[op](device, quick), part, None, parts):
        with contextlib.suppress(Exception):  # it will fail again where it is checked
            results(case.op, case.tensors(), case.dtype, case.dtype)
