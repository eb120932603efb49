"""How fast is every kernel here, beside what a user could have had instead?

Ours and its peers work on the same inputs, in one process, replayed in turn (see `timing`): PyTorch
eager, the same function under torch.compile, and where present FlashAttention 2, 3 and 4, cuDNN,
Liger, torch's fused AdamW, and bare cuBLAS products. A peer that is missing or fails is a row that
says why. Peers that read separate q, k, v get them as separate leaves, so that no copy of packed
gradients is charged to them.

T tokens, S sequence length, H hidden size, A heads, D head size, F = 4 H, M masked tokens,
V vocabulary, P parameters, L layers. Names of contenders tell dropout where there is a choice.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.attention as torch_attention
import torch.nn.functional as F
from torch import Tensor

from fastbert.config import model_config
from fastbert.ops import cpu_ops
from fastbert_bench.kernels.checks import with_rest
from fastbert_bench.kernels.costs import (
    TOKENS,
    WHOLE,
    Ceilings,
    cost_of,
    model_sizes,
    rates,
    target_of,
)
from fastbert_bench.measure.energy import EnergyMeter
from fastbert_bench.measure.flops import mfu
from fastbert_bench.measure.lengths import lengths_asked
from fastbert_bench.measure.memory import peak_of
from fastbert_bench.measure.processes import one_line
from fastbert_bench.measure.timing import (
    Call,
    Replay,
    clones_needed,
    interleaved,
    quantiles,
    random_like,
)
from fastbert_kernels import reference, reference_optimizer
from fastbert_kernels.reference_optimizer import Buffers, Hyperparameters

Row = dict[str, Any]
Inputs = dict[str, Tensor]
Sizes = dict[str, int]
Built = tuple[Sequence[Tensor], Callable[[], Any]]
"""Leaves whose gradients are asked for (none: a step in place), and the forward."""
Build = Callable[[Inputs], Built]
Op = Callable[..., Any]

DROPOUT_P, EPS, PAD = 0.1, 1e-12, 0
ROUNDS, SECONDS = 40, 0.6


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    build: Build
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Workload:
    """One op at one shape, with everybody who can do it."""

    op: str
    sizes: Sizes
    inputs: Callable[[], Inputs]
    contenders: list[Contender]
    by: Callable[[Op], Build]
    """Makes a contender's of any function that takes what the reference takes."""
    directions: tuple[str, ...] = ("forward", "backward")

    def sets(self, device: torch.device) -> list[Inputs]:
        """So many clones of the inputs that no call finds its own in the L2."""
        first = self.inputs()
        bytes = sum(tensor.nbytes for tensor in first.values())
        return [first] + [self.inputs() for _ in range(clones_needed(bytes, device) - 1)]


class MissingError(Exception):
    """Why a peer cannot take part."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `bench kernels` can be told, beyond the sizes and peers of the stage."""

    model: str = "auto"
    lengths: str = "full"
    against: str = "auto"
    seconds_of_energy: float = 0.0
    """How long each is repeated to measure its energy; 0: not at all."""

    def admits(self, contender: str) -> bool:
        """Whether a contender is ours or one of the peers asked for."""
        if contender.split()[0] == "ours" or self.against == "auto":
            return True
        return peer_of(contender) in self.against.split(",")


def peer_of(contender: str) -> str:
    """A contender's name on the command line: of "fa2 p=0.1" fa2, of "torch's own" torch-own."""
    plain = contender.partition(" p=")[0].partition(" (")[0]
    return plain.replace("'s", "").replace(" ", "-")


STAGE = Asked()


def sizes_of(model: str, S: int, T: int) -> Sizes:
    """Sizes of a model's ops on T tokens in sequences of at most S."""
    config = model_config(model)
    H, V, L, width = (
        config.hidden_size, config.vocab_size, config.num_hidden_layers, config.intermediate_size,
    )  # fmt: skip
    own = {"A": config.num_attention_heads, "F": width, "V": V, "L": L}
    own["P"] = sum(parameter_sizes(H, L, V, width))
    return model_sizes(H, min(S, config.max_position_embeddings), T) | own


def filled(lengths: str, T: int, S: int) -> np.ndarray:
    """(N,) lengths as asked for that add up to T, the last one cut to fit."""
    rng = np.random.default_rng(42)
    drawn = lengths_asked(lengths, T // min(S, 3) + 1, S, rng)  # else none is shorter than 3
    ends = np.minimum(np.cumsum(drawn), T)
    return np.diff(ends[: int(np.searchsorted(ends, T)) + 1], prepend=0)


def shapes(op: str, device: torch.device, quick: bool, model: str = "auto") -> list[Sizes]:
    """Sizes to time `op` at. Rows know nothing of S, except in attention and the embeddings."""
    if device.type == "cpu":
        if model != "auto":
            return [sizes_of(model, 16, T=48)]
        few = {"V": 1000, "L": 1, "P": sum(parameter_sizes(64, 1, 1000))}
        return [model_sizes(64, 16, T=48) | few]
    lengths = (128, 512) if op in ("attention", "embed_layer_norm") and not quick else (512,)
    if model != "auto":
        return [sizes_of(model, S, TOKENS) for S in lengths]
    widths = (768,) if quick or op == "mask_tokens" else (768, 1024)
    return [model_sizes(H, S) for H in widths for S in lengths]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def differentiable(*names: str, then: Sequence[str] = ()) -> Callable[[Op], Build]:
    """Makes of an op what is built of the named inputs, all of them leaves but those of `then`."""

    def of(op: Op) -> Build:
        def build(inputs: Inputs) -> Built:
            leaves = [leaf(inputs[name]) for name in names]
            return leaves, lambda: op(*leaves, *(inputs[name] for name in then))

        return build

    return of


def in_place(*names: str) -> Callable[[Op], Build]:
    """Makes of a step without gradients what is built of the named inputs."""
    return lambda op: lambda inputs: ([], lambda: op(*(inputs[name] for name in names)))


def eager_and_compiled(
    function: Op, device: torch.device, build: Callable[[Op], Build]
) -> list[Contender]:
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    label = "compile" if device.type == "cuda" else "compile (aot_eager)"
    traced = torch.compile(function, dynamic=False, backend=backend)
    return [Contender("eager", build(function)), Contender(label, build(traced))]


def liger_layer_norm() -> Callable[..., Tensor]:
    apply: Callable[..., Tensor] = importlib.import_module(
        "liger_kernel.ops.layer_norm"
    ).LigerLayerNormFunction.apply
    return apply


def missing(why: str) -> Build:
    def build(inputs: Inputs) -> Built:
        raise MissingError(why)

    return build


# Attention


@contextlib.contextmanager
def flash_implementation(name: str) -> Iterator[None]:
    """torch's _flash_attention_forward and its backward by FA3 or FA4, where installed."""
    activate = getattr(torch_attention, "activate_flash_attention_impl", None)
    restore = getattr(torch_attention, "restore_flash_attention_impl", None)
    if activate is None or restore is None:
        raise MissingError(f"torch {torch.__version__} cannot exchange FlashAttention")
    activate(name)
    try:
        yield
    finally:
        restore()


def attention(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    lengths: np.ndarray | None = None,  # (N,), None: all S
) -> Workload:
    from fastbert_kernels.attention import attention as ours

    T, S, A = sizes["T"], sizes["S"], sizes["A"]
    if lengths is None:
        lengths = np.full(T // S, S)
    D, N = sizes["H"] // A, len(lengths)
    real = torch.from_numpy(np.arange(S) < lengths[:, None]).to(device)  # (N, S)
    mask = None if bool(real.all()) else real[:, None, None]
    ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    cu_seqlens = torch.from_numpy(ends).to(device)
    s = round(float((lengths.astype(float) ** 2).sum() / T))
    sizes = sizes | {"N": N, "s": s}
    seed = torch.tensor([1, 2, 3], device=device)

    def by(op: Op, p: float = DROPOUT_P) -> Build:
        return differentiable("qkv")(with_rest(op, cu_seqlens, S, p, seed, 1))

    def by_flash(p: float) -> Build:
        def build(inputs: Inputs) -> Built:
            if device.type != "cuda":
                raise MissingError("needs a GPU")
            leaves = [leaf(part) for part in inputs["qkv"].unbind(1)]
            flash = torch.ops.aten._flash_attention_forward
            rest = (cu_seqlens, cu_seqlens, S, S, p, False, False)
            return leaves, lambda: flash(*leaves, *rest)[0]

        return build

    def padded(op: Op) -> Build:
        """`op` of q, k, v (N, A, S, D), views of the packed ones; padded where lengths differ."""

        def build(inputs: Inputs) -> Built:
            qkv = inputs["qkv"]
            if mask is not None:
                qkv = qkv.new_zeros(N, S, 3, A, D)
                qkv[real] = inputs["qkv"]
            parts = qkv.view(N, S, 3, A, D).permute(2, 0, 3, 1, 4).unbind(0)
            leaves = [leaf(part) for part in parts]
            return leaves, lambda: op(*leaves)

        return build

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * D**-0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return F.dropout(torch.softmax(scores, dim=-1), DROPOUT_P) @ v

    def cudnn(p: float) -> Build:
        def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch_attention.sdpa_kernel(torch_attention.SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)

        return padded(op)

    contenders = [
        Contender("ours", by(ours)),
        Contender("ours p=0", by(ours, 0.0)),
        Contender("fa2 p=0.1", by_flash(DROPOUT_P)),
        Contender("fa2 p=0", by_flash(0.0)),
        Contender("cudnn p=0.1", cudnn(DROPOUT_P)),
        Contender("cudnn p=0", cudnn(0.0)),
        *(
            Contender(f"{n.lower()} p=0", by_flash(0.0), functools.partial(flash_implementation, n))
            for n in ("FA3", "FA4")
        ),
        *eager_and_compiled(plain, device, padded),
    ]

    def inputs() -> Inputs:
        return {"qkv": random_like((T, 3, A, D), dtype, device)}

    return Workload("attention", sizes, inputs, contenders, by)


# Rows


def row_inputs(
    device: torch.device, dtype: torch.dtype, R: int, H: int, *rows: str
) -> Callable[[], Inputs]:
    """`rows` of (R, H), and the vectors bias, weight and beta, these as in training."""

    def inputs() -> Inputs:
        bias, weight, beta = (random_like((H,), dtype, device) for _ in range(3))
        vectors = {"bias": bias, "weight": 1 + weight / 8, "beta": beta / 8}
        return {n: random_like((R, H), dtype, device) for n in rows} | vectors

    return inputs


def dropout_add_layer_norm(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Workload:
    from fastbert_kernels.layer_norm import dropout_add_layer_norm as ours

    H = sizes["H"]
    rest = (EPS, DROPOUT_P, torch.tensor([1, 2, 3], device=device), 1)
    build = differentiable("x", "bias", "residual", "weight", "beta")

    def by(op: Op) -> Build:
        return build(with_rest(op, *rest))

    def plain(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
        return F.layer_norm(F.dropout(x + bias, DROPOUT_P) + residual, (H,), weight, beta, EPS)

    def liger(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
        return liger_layer_norm()(F.dropout(x + bias, DROPOUT_P) + residual, weight, beta, EPS)

    contenders = [
        Contender("ours", by(ours)),
        *eager_and_compiled(plain, device, build),
        Contender("liger", build(liger)),
    ]
    inputs = row_inputs(device, dtype, sizes["T"], H, "x", "residual")
    return Workload("dropout_add_layer_norm", sizes, inputs, contenders, by)


def bias_gelu(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Workload:
    from fastbert_kernels.gelu import bias_gelu as ours

    build = differentiable("x", "bias")
    contenders = [
        Contender("ours", build(ours)),
        *eager_and_compiled(lambda x, bias: F.gelu(x + bias), device, build),
        Contender("liger", missing("Liger has GELU only times a gate")),
    ]
    inputs = row_inputs(device, dtype, sizes["T"], sizes["F"], "x")
    return Workload("bias_gelu", sizes, inputs, contenders, build)


def gelu_layer_norm(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Workload:
    from fastbert_kernels.gelu import gelu_layer_norm as ours

    H = sizes["H"]
    build = differentiable("x", "bias", "weight", "beta")

    def by(op: Op) -> Build:
        return build(with_rest(op, EPS))

    def plain(x: Tensor, bias: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
        return F.layer_norm(F.gelu(x + bias), (H,), weight, beta, EPS)

    def liger(x: Tensor, bias: Tensor, weight: Tensor, beta: Tensor) -> Tensor:
        return liger_layer_norm()(F.gelu(x + bias), weight, beta, EPS)

    contenders = [
        Contender("ours", by(ours)),
        *eager_and_compiled(plain, device, build),
        Contender("liger", build(liger)),
    ]
    inputs = row_inputs(device, dtype, sizes["T"], H, "x")
    return Workload("gelu_layer_norm", sizes, inputs, contenders, by)


def embed_layer_norm(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Workload:
    from fastbert_kernels.embedding import embed_layer_norm as ours

    T, S, H, V = (sizes[n] for n in "TSHV")
    positions = torch.arange(T, device=device) % S
    rest = (PAD, EPS, DROPOUT_P, torch.tensor([1, 2, 3], device=device), 1)
    names = ("word", "token_type", "position", "weight", "beta")

    def build(op: Op) -> Build:
        def built(inputs: Inputs) -> Built:
            leaves = [leaf(inputs[name]) for name in names]
            return leaves, lambda: op(inputs["ids"], inputs["types"], positions, *leaves)

        return built

    def by(op: Op) -> Build:
        return build(with_rest(op, *rest))

    def plain(
        ids: Tensor, types: Tensor, positions: Tensor, word: Tensor, token_type: Tensor,
        position: Tensor, weight: Tensor, beta: Tensor,
    ) -> Tensor:  # fmt: skip
        total = F.embedding(ids, word, PAD) + F.embedding(types, token_type)
        total = total + F.embedding(positions, position)
        return F.dropout(F.layer_norm(total, (H,), weight, beta, EPS), DROPOUT_P)

    contenders = [
        Contender("ours", by(ours)),
        *eager_and_compiled(plain, device, build),
    ]

    def inputs() -> Inputs:
        # As in text: few words make up most of it (ids fall off as 1 / rank), 12% are [MASK].
        ids = torch.exp(torch.rand(T, device=device) * torch.tensor(float(V)).log()).long()
        ids[torch.rand(T, device=device) < 0.12] = V // 2
        made = {"ids": ids.clamp(max=V - 1), "types": torch.randint(2, (T,), device=device)}
        for name, shape in zip(names, ((V, H), (2, H), (512, H), (H,), (H,)), strict=True):
            made[name] = random_like(shape, dtype, device)
        return made

    return Workload("embed_layer_norm", sizes, inputs, contenders, by)


# Products


def linear_gelu(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Workload:
    from fastbert_kernels.linear import linear_gelu as ours

    T, H, width = sizes["T"], sizes["H"], sizes["F"]
    build = differentiable("x", "weight", "bias")

    contenders = [
        Contender("ours", build(with_rest(ours, backend="auto"))),
        Contender("ours triton", build(with_rest(ours, backend="triton"))),
        Contender("ours cublas", build(with_rest(ours, backend="cublas"))),
        Contender("bare gemm", differentiable("x", "weight")(F.linear)),
        *eager_and_compiled(lambda x, w, b: F.gelu(F.linear(x, w, b)), device, build),
    ]

    def inputs() -> Inputs:
        return {
            "x": random_like((T, H), dtype, device),
            "weight": random_like((width, H), dtype, device) * H**-0.5,
            "bias": random_like((width,), dtype, device),
        }

    return Workload("linear_gelu", sizes, inputs, contenders, build)


def linear_cross_entropy(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Workload:
    from fastbert_kernels.cross_entropy import linear_cross_entropy as ours
    from fastbert_kernels.main_grad import MainGrad

    M, H, V = sizes["M"], sizes["H"], sizes["V"]
    build = differentiable("x", "weight", "bias", then=["labels"])

    def plain(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias).float(), labels, reduction="sum")

    def by_torch(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        op: Any = getattr(F, "linear_cross_entropy", None)
        if op is None:
            raise MissingError(f"torch {torch.__version__} has no F.linear_cross_entropy")
        loss: Tensor = op(x, weight, labels, linear_bias=bias, reduction="sum")
        return loss

    def by_liger(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        module = importlib.import_module("liger_kernel.transformers")
        loss: Tensor = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")(
            weight, x, labels, bias
        )
        return loss

    def gemms(inputs: Inputs) -> Built:
        # V rounded up to a multiple of 64: rows that start at odd addresses would slow cuBLAS down.
        leaves = [leaf(inputs["x"]), leaf(F.pad(inputs["weight"], (0, 0, 0, -V % 64)))]
        return leaves, lambda: F.linear(*leaves)

    def in_training(inputs: Inputs) -> Built:
        """The path of a training step: the weight's gradient goes to its place in fp32."""
        into = MainGrad(torch.empty_like(inputs["weight"], dtype=torch.float32))
        x, bias = leaf(inputs["x"]), leaf(inputs["bias"])
        weight = leaf(inputs["weight"])
        weight.main_grad = into  # type: ignore[attr-defined]

        def forward() -> Tensor:
            into.empty = True
            return ours(x, weight, bias, inputs["labels"])

        return [x, bias], forward

    contenders = [
        Contender("ours", build(ours)),
        Contender("ours main_grad", in_training),
        Contender("bare gemms", gemms),
        *eager_and_compiled(plain, device, build),
        Contender("torch's own", build(by_torch)),
        Contender("liger", build(by_liger)),
    ]

    def inputs() -> Inputs:
        return {
            "x": random_like((M, H), dtype, device),
            "weight": random_like((V, H), dtype, device) * H**-0.5,
            "bias": random_like((V,), dtype, device),
            "labels": torch.randint(V, (M,), device=device),
        }

    return Workload("linear_cross_entropy", sizes, inputs, contenders, build, ("both",))


def extra_memory(workload: Workload) -> dict[str, int]:
    """Bytes that ours holds at its peak beside inputs and gradients, and those of one chunk."""
    from fastbert_kernels.cross_entropy import CHUNK_ROWS

    inputs = workload.inputs()
    leaves, forward = workload.contenders[0].build(inputs)
    torch.autograd.grad(forward(), leaves)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(forward(), leaves)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)
    M, V = workload.sizes["M"], workload.sizes["V"]
    chunk = min(M, CHUNK_ROWS) * (V + -V % 64) * inputs["x"].element_size()
    return {"extra_bytes": extra, "chunk_bytes": chunk}


# Optimizers


def parameter_sizes(H: int, layers: int, V: int, width: int | None = None) -> list[int]:
    """Elements of each of BERT's parameters, those with weight decay (matrices) first."""
    width = width or 4 * H
    layer = [H * H] * 4 + [width * H] * 2
    matrices = [V * H, 512 * H, 2 * H, *layer * layers, H * H, H * H, 2 * H]
    vectors = [H, H, *([H] * 9 + [width]) * layers, H, H, H, H, V, 2]
    return matrices + vectors


def aligned_spans(numels: Sequence[int]) -> list[tuple[int, int]]:
    """Places in a flat buffer, each starting at a multiple of 64 elements."""
    starts = itertools.accumulate((n + -n % 64 for n in numels), initial=0)
    return [(start, start + n) for start, n in zip(starts, numels)]  # noqa: B905


def optimizer(name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Workload:
    from fastbert_kernels.optimizer import adamw_step, lamb_step, lamb_table

    H = sizes["H"]
    layers = sizes["L"]
    numels = parameter_sizes(H, layers, sizes["V"], sizes["F"])
    spans = aligned_spans(numels)
    count = 3 + 6 * layers + 3
    P, decay_end = spans[-1][1] + -spans[-1][1] % 64, spans[count][0]
    hyper = Hyperparameters(decay_end)
    table = lamb_table(spans, device)

    def inputs() -> Inputs:
        return {
            "master": random_like((P,), torch.float32, device),
            "grad": random_like((P,), torch.float32, device),
            "exp_avg": random_like((P,), torch.float32, device) * 1e-3,
            "exp_avg_sq": random_like((P,), torch.float32, device) ** 2,
            "weights": torch.empty(P, dtype=dtype, device=device),
            "lr": torch.tensor(1e-4, device=device),
            "step": torch.tensor(10, device=device),
            "skipped": torch.tensor(0, device=device),
            "grad_scale": torch.tensor(1.0, device=device),
            "grad_norm": torch.tensor(0.0, device=device),
        }

    def lamb(buffers: Buffers, hyper: Hyperparameters, spans: object) -> None:
        lamb_step(buffers, hyper, table)

    def by(step: Op, name: str = name) -> Build:
        rest = (hyper, spans) if name == "lamb" else (hyper,)
        return lambda inputs: ([], functools.partial(step, Buffers(**inputs), *rest))

    def by_torch(inputs: Inputs, **kind: Any) -> Built:
        """fp32 parameters with views of the same gradient; no bf16 copy is written."""
        parameters = [torch.nn.Parameter(inputs["master"][a:b]) for a, b in spans]
        for parameter, (a, b) in zip(parameters, spans, strict=True):
            parameter.grad = inputs["grad"][a:b]
        groups = [
            {"params": parameters[:count], "weight_decay": 0.01},
            {"params": parameters[count:], "weight_decay": 0.0},
        ]
        # Capturable: the step counts live on the device, as a CUDA graph needs.
        made = torch.optim.AdamW(
            groups, lr=1e-4, eps=1e-6, capturable=device.type == "cuda", **kind
        )

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            made.step()

        step()  # makes the moments
        return [], step

    adamw = by(adamw_step, "adamw")
    contenders = [
        Contender("ours", adamw),
        Contender("torch fused", functools.partial(by_torch, fused=True)),
        Contender("torch foreach", functools.partial(by_torch, foreach=True)),
    ]
    if name == "lamb":
        contenders = [Contender("ours", by(lamb)), Contender("adamw", adamw)]
    return Workload(name, sizes | {"P": sum(numels)}, inputs, contenders, by, ("step",))


def mask_tokens(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Workload:
    from fastbert_kernels.mask import mask_tokens as ours

    T, V = sizes["T"], sizes["V"]
    is_special = torch.zeros(V, dtype=torch.bool, device=device)
    is_special[:5] = True
    seed = torch.tensor([1, 2, 3], device=device)

    def plain(ids: Tensor) -> tuple[Tensor, Tensor]:
        chosen = (torch.rand(ids.shape, device=device) < 0.15) & ~is_special[ids]
        kind = torch.rand(ids.shape, device=device)
        replaced = torch.where(kind < 0.9, torch.randint(V, ids.shape, device=device), ids)
        replaced = torch.where(kind < 0.8, 4, replaced)
        return torch.where(chosen, replaced, ids), torch.where(chosen, ids, -100)

    def by(op: Op) -> Build:
        return in_place("ids")(with_rest(op, is_special, seed, 0.15, 4))

    contenders = [Contender("ours", by(ours)), Contender("eager", in_place("ids")(plain))]

    def inputs() -> Inputs:
        return {"ids": torch.randint(V, (T,), device=device)}

    return Workload("mask_tokens", sizes, inputs, contenders, by, ("step",))


def symmetric_product(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Workload:
    from fastbert_kernels.muon import symmetric_product as ours

    by = in_place("x")
    contenders = [Contender("ours", by(ours)), Contender("bare gemm", by(lambda x: x @ x.mT))]

    def inputs() -> Inputs:
        return {"x": random_like((sizes["L"], sizes["H"], sizes["F"]), dtype, device)}

    return Workload("symmetric_product", sizes, inputs, contenders, by, ("step",))


WORKLOADS: dict[str, Callable[[torch.device, torch.dtype, Sizes], Workload]] = {
    "attention": attention,
    "dropout_add_layer_norm": dropout_add_layer_norm,
    "linear_cross_entropy": linear_cross_entropy,
    "adamw": functools.partial(optimizer, "adamw"),
    "linear_gelu": linear_gelu,
    "gelu_layer_norm": gelu_layer_norm,
    "bias_gelu": bias_gelu,
    "embed_layer_norm": embed_layer_norm,
    "lamb": functools.partial(optimizer, "lamb"),
    "mask_tokens": mask_tokens,
    "symmetric_product": symmetric_product,
}


def cpu_op(op: str, compiled: bool) -> Op:
    """An op as a training step runs it on a CPU: by a way of its own, or as the reference does."""
    law = law_of(op)
    if op in ("adamw", "lamb"):  # on a CPU the masters are the weights
        return lambda buffers, *rest: law(buffers._replace(weights=None), *rest)
    return getattr(cpu_ops(compiled), op, None) or law


def law_of(op: str) -> Op:
    """The reference that says what an op computes."""
    module = reference if hasattr(reference, op) else reference_optimizer
    found: Op = getattr(module, f"{op}_step" if op in ("adamw", "lamb") else op)
    return found


def workload(
    op: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, lengths: str = "full"
) -> Workload:
    """An op on sequences of such lengths; only attention sees where one ends."""
    if op == "attention":
        return attention(device, dtype, sizes, filled(lengths, sizes["T"], sizes["S"]))
    return WORKLOADS[op](device, dtype, sizes)


def workloads(
    op: str, device: torch.device, quick: bool, asked: Asked = STAGE
) -> Iterator[Workload]:
    # Timing a backward alone runs it many times, for which its buffers may not be given away.
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for sizes in shapes(op, device, quick, asked.model):
        torch._dynamo.reset()
        found = workload(op, device, dtype, sizes, asked.lengths)
        contenders = [one for one in found.contenders if asked.admits(one.name)]
        yield dataclasses.replace(found, contenders=contenders)


def _both_ways(forward: Callable[[], Tensor], leaves: Sequence[Tensor], dout: Tensor) -> object:
    return torch.autograd.grad(forward(), leaves, dout)


def calls_of(contender: Contender, direction: str, sets: Sequence[Inputs]) -> list[Call]:
    """One call for each set of inputs."""
    calls: list[Call] = []
    for inputs in sets:
        leaves, forward = contender.build(inputs)
        if direction in ("forward", "step"):
            calls.append(forward)
            continue
        out = forward()
        dout = random_like(out.shape, out.dtype, out.device)
        if direction == "both":
            del out
            calls.append(functools.partial(_both_ways, forward, leaves, dout))
        else:
            gradients = torch.autograd.grad
            calls.append(functools.partial(gradients, out, leaves, dout, retain_graph=True))
    return calls


def costs(op: str, direction: str, sizes: Mapping[str, int]) -> tuple[int, int, int]:
    """Bytes, FLOPs, and the FLOPs that are the model's: in a backward twice those of the forward.

    Attention's work is that of sequences of `s`, the mean length of what a token attends to.
    """
    sizes = dict(sizes) | {"S": sizes.get("s", sizes["S"])}
    cost = cost_of(op, direction)
    flops = cost.flops_of(sizes)
    model = 2 * cost_of(op, "forward").flops_of(sizes) if direction == "backward" else flops
    return cost.bytes_of(sizes), flops, model


def figures(row: Row, device: torch.device) -> Row:
    """What a row's time says of the batch of T tokens; None where there is nothing to say."""
    sizes, seconds = row["sizes"], row["ms"] / 1e3
    model = costs(row["op"], row["direction"], sizes)[2]
    return {
        "real_tokens_per_second": sizes["T"] / seconds if row["op"] not in WHOLE else None,
        "sequences_per_second": sizes["N"] / seconds if "N" in sizes else None,
        "mfu": mfu(model / seconds, device) if model else None,
    }


def measure(
    workload: Workload,
    device: torch.device,
    rounds: int,
    seconds: float = SECONDS,
    asked: Asked = STAGE,
    *,
    peaks: bool = True,
    must: Sequence[str] = (),
) -> Iterator[list[Row]]:
    """Rows of each direction: one a contender, with its times or the reason for having none.

    Args:
        workload, device: what to time, and where.
        rounds, seconds: as of `timing.interleaved`.
        asked: how long energy is measured.
        peaks: whether to measure what a call holds, too.
        must: contenders whose failure is raised.
    """
    meter, sets = EnergyMeter(device), workload.sets(device)
    for direction in workload.directions:
        replays: dict[str, Replay] = {}
        rows: list[Row] = []
        for contender in workload.contenders:
            told = {"op": workload.op, "direction": direction, "sizes": workload.sizes}
            rows.append(told | {"contender": contender.name})
            try:
                with contender.context():
                    calls = calls_of(contender, direction, sets)
                    replays[contender.name] = Replay(calls, device)
                    if peaks:
                        rows[-1]["peak_memory_bytes"] = peak_of(calls[0], device)
            except MissingError as error:
                rows[-1]["why"] = str(error)
            except Exception as error:  # a missing package, no memory, a shape it cannot do, …
                if contender.name in must:
                    raise
                rows[-1]["why"] = one_line(error)
        times = interleaved(replays, device, rounds, seconds)
        for row in rows:
            if row["contender"] in times:
                row |= quantiles(times[row["contender"]])
                row |= {"rounds_ms": times[row["contender"]], "sets": len(sets)}
                row |= figures(row, device)
                row |= energy(replays[row["contender"]], row, meter, asked.seconds_of_energy)
        del replays
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            if workload.op == "linear_cross_entropy" and "ms" in rows[0]:
                rows[0] |= extra_memory(workload)
        yield rows


def energy(replay: Replay, row: Row, meter: EnergyMeter, seconds: float) -> Row:
    """Watts of a call, and joules for a million of the batch's tokens."""
    once, spent = row["ms"] / 1e3 * replay.count, None
    if seconds:
        spent = meter.measure(lambda _: replay.graph.replay(), seconds, once)
    if spent is None:
        return {"watts": None, "joules_per_million_tokens": None}
    counts = row["real_tokens_per_second"] is not None
    joules = spent.joules / replay.count / row["sizes"]["T"] * 1e6
    return {"watts": spent.watts, "joules_per_million_tokens": joules if counts else None}


def warm_up(
    op: str, device: torch.device, quick: bool, part: int, parts: int, asked: Asked = STAGE
) -> None:
    """Compiles what the part-th of `parts` shares of the timings needs; failures come up later."""
    if op in (*WHOLE, "mask_tokens"):
        return
    for workload in workloads(op, device, quick, asked):
        inputs = workload.inputs()
        for contender in workload.contenders[part::parts]:
            with contextlib.suppress(Exception), contender.context():
                calls_of(contender, "backward", [inputs])[0]()


def finish(rows: Sequence[Row], measured: Mapping[str, float], hopper: bool) -> list[Row]:
    """Rows with what follows from the ceilings measured in the same run.

    `ratios` are our time over the others'; `bandwidth_share` and `floor_share` compare with the
    measured copy, and with the larger of the two floors.
    """
    ceilings = Ceilings(measured["bandwidth"], measured["matrix"])
    finished = []
    for row in rows:
        if "ms" not in row:
            finished.append(row)
            continue
        sizes, seconds = row["sizes"], row["ms"] / 1e3
        moved, flops, _ = costs(row["op"], row["direction"], sizes)
        floor = ceilings.floor(moved, flops)
        row = row | rates(moved, flops, seconds)
        row |= {
            "bandwidth_share": moved / seconds / ceilings.bandwidth,
            "floor_ms": floor * 1e3,
            "floor_share": floor / seconds,
        }
        if row["contender"] == "ours":
            same = ("op", "direction", "sizes")
            row["ratios"] = {
                other["contender"]: row["ms"] / other["ms"]
                for other in rows
                if other["contender"] != "ours"
                and "ms" in other
                and all(other[key] == row[key] for key in same)
            }
            target = target_of(row["op"], row["direction"], sizes["S"], hopper)
            full = sizes.get("s", sizes["S"]) == sizes["S"]  # what the targets are for
            if target is not None and full:
                row |= {"target": str(target), "target_met": target.met(row)}
        finished.append(row)
    return finished
