"""What no op's backward does: fill zeros that nobody reads, or round the loss's scale to 16 bits.

Two modes watch everything that PyTorch is asked to do, inside our ops too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbert.config import ModelConfig, PretrainConfig
from fastbert.data.batch import Batch
from fastbert.model.bert import Bert
from fastbert.ops import triton_ops
from fastbert.train.step import TrainStep
from fastbert_kernels import linear
from fastbert_kernels.attention import attention
from fastbert_kernels.cross_entropy import linear_cross_entropy
from fastbert_kernels.embedding import embed_layer_norm
from fastbert_kernels.gelu import bias_gelu, gelu_layer_norm
from fastbert_kernels.layer_norm import dropout_add_layer_norm
from fastbert_kernels.linear import linear_gelu
from fastbert_kernels.main_grad import MainGrad

R, H, F, V, P = 6, 16, 24, 11, 7
SEED = torch.tensor([1, 2, 3])
IDS, TYPES, POSITIONS = torch.tensor([[1, 2, 3, 2, 9, 0], [0, 1, 1, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
LABELS = torch.tensor([1, -100, 3, 4, 10, 0])
DROPOUT = (1e-5, 0.1, SEED, 1)

ROWS, ROW = (R, H), (H,)
Leaves = list[Tensor]


def with_main_grad(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight.main_grad = MainGrad(torch.zeros(V, H, dtype=x.dtype))  # type: ignore[attr-defined]
    return linear_cross_entropy(x, weight, bias, LABELS)


# Every op that is differentiated, and the shapes of what it takes.
OPS: dict[str, tuple[Callable[..., Tensor], Sequence[tuple[int, ...]]]] = {
    "attention": (
        lambda qkv: attention(qkv, torch.tensor([0, 4, 6]).int(), 6, 0.1, SEED, 0),
        [(R, 3, 2, 32)],
    ),
    "dropout_add_layer_norm": (
        lambda *tensors: dropout_add_layer_norm(*tensors, *DROPOUT),
        [ROWS, ROW, ROWS, ROW, ROW],
    ),
    "bias_gelu": (bias_gelu, [ROWS, ROW]),
    "gelu_layer_norm": (lambda *tensors: gelu_layer_norm(*tensors, 1e-5), [ROWS, ROW, ROW, ROW]),
    "linear_gelu, triton": (
        lambda *tensors: linear_gelu(*tensors, backend="triton"),
        [ROWS, (F, H), (F,)],
    ),
    "linear_gelu, cublas": (
        lambda *tensors: linear_gelu(*tensors, backend="cublas"),
        [ROWS, (F, H), (F,)],
    ),
    "embed_layer_norm": (
        lambda *tensors: embed_layer_norm(IDS, TYPES, POSITIONS, *tensors, 0, *DROPOUT),
        [(V, H), (2, H), (P, H), ROW, ROW],
    ),
    "linear_cross_entropy": (
        lambda *tensors: linear_cross_entropy(*tensors, LABELS),
        [ROWS, (V, H), (V,)],
    ),
    "linear_cross_entropy, in chunks": (
        lambda *tensors: linear_cross_entropy(*tensors, LABELS, chunk_rows=4),
        [ROWS, (V, H), (V,)],
    ),
    "linear_cross_entropy, into main_grad": (with_main_grad, [ROWS, (V, H), (V,)]),
}
every_op = pytest.mark.parametrize("op", OPS)


def forward(op: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Leaves]:
    function, shapes = OPS[op]
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(shape, generator=generator) for shape in shapes]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    return function(*leaves), leaves


class Watch(TorchDispatchMode):
    """Notes the calls that `found` picks; follows our own ops into what they call."""

    def __init__(self, found: Callable[[Any, list[Any]], bool]) -> None:
        super().__init__()
        self._found, self.calls = found, list[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func.namespace == "fastbert":
            with self:
                return func.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs
                )
        inputs = tree_leaves((args, {name: kwargs[name] for name in kwargs if name != "out"}))
        if self._found(func, inputs):
            self.calls.append(str(func))
        return func(*args, **kwargs)


def fills_zeros(func: Any, _: list[Any]) -> bool:
    return func._schema.name.removeprefix("aten::") in ("zeros", "zeros_like", "new_zeros")


def mixes(func: Any, arguments: list[Any]) -> bool:
    """CUDA computes a 16-bit tensor with one of no dimension as if both had 16 bits; a CPU in fp32.

    (Python's numbers are no tensors here, and CUDA takes those as they are.)
    """
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    half = any(t.dim() and t.dtype in (torch.float16, torch.bfloat16) for t in tensors)
    scalar = any(t.dim() == 0 and t.dtype == torch.float32 for t in tensors)
    return torch.Tag.pointwise in func.tags and half and scalar


@every_op
def test_outputs_that_nobody_uses_get_no_zeros(op: str) -> None:
    """Statistics and saved intermediates are outputs, too, whose gradients would be made."""
    y, leaves = forward(op)
    dy = torch.ones_like(y)
    with Watch(fills_zeros) as watch:
        torch.autograd.grad(y, leaves, dy, allow_unused=True)
    # The tables of the embeddings begin as zeros; rows that no token has stay so.
    assert watch.calls == ["aten.zeros.default"] * (op == "embed_layer_norm")


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):  # type: ignore[no-untyped-def]
        return None


@every_op
def test_no_gradient_gives_none(op: str) -> None:
    y, leaves = forward(op)
    y = _NoGradient.apply(y)
    for gradient in torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True):
        assert gradient is None or not gradient.any()


def test_what_a_gpu_rounds_is_seen() -> None:
    x, scale = torch.ones(3).bfloat16(), torch.tensor(0.37)
    with Watch(mixes) as watch:
        x * scale
        x.mul_(scale)
        x * 0.37, x.float() * scale, x * scale.view(1)
    assert watch.calls == ["aten.mul.Tensor", "aten.mul_.Tensor"]


@every_op
def test_no_scalar_of_the_loss_is_rounded(op: str) -> None:
    with Watch(mixes) as watch:
        y, leaves = forward(op, torch.float16)
        torch.autograd.grad(y.float().sum() * 0.37, leaves, allow_unused=True)
    assert watch.calls == []


BATCH = Batch(
    IDS, TYPES, POSITIONS, torch.tensor([0, 4, 6]).int(), torch.tensor([1, 4]),
    torch.tensor([3, 5]), torch.tensor([1, 0]), 6, 6, 2,
)  # fmt: skip


def train_step(dtype: torch.dtype, *, gelu_in_products: bool = False, **changes: Any) -> TrainStep:
    torch.manual_seed(0)
    ops = triton_ops(gelu_in_products=gelu_in_products)
    model = Bert(ModelConfig(V, 32, 1, 1, 32, max_position_embeddings=P), ops)
    recipe = PretrainConfig(learning_rate=1e-3, warmup_steps=0, max_steps=2, **changes)
    return TrainStep(model, recipe, dtype)


# The first loss scale of fp16 is made for thousands of tokens: shared by two, gradients overflow.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_scalar_of_a_step_is_rounded() -> None:
    step = train_step(torch.float16)
    with Watch(mixes) as watch:
        step([BATCH])
    read = step.read()
    assert watch.calls == [] and read.updates + read.skipped == 1


def test_gelu_in_the_products_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step, dropout on, where the feed-forward's products are our kernels."""
    default, fused = (train_step(torch.float32, gelu_in_products=own) for own in (False, True))
    calls: list[int] = []
    own = linear.gelu_linear_backward
    monkeypatch.setattr(
        linear,
        "gelu_linear_backward",
        lambda *args, **named: calls.append(1) or own(*args, **named),
    )
    for step, made in ((default, 0), (fused, 2)):
        step([BATCH, BATCH])
        assert len(calls) == made
    assert abs(fused.read().loss - default.read().loss) < 1e-5
    views = [step.flat.views(step.flat.grad) for step in (default, fused)]
    for name, want in views[0].items():
        assert (views[1][name] - want).abs().max() < 1e-4 * want.abs().max() + 1e-7, name


@pytest.mark.parametrize("optim", ["adamw", "lamb"])
def test_what_lies_between_the_parameters_stays_zero(optim: str) -> None:
    """The rows of zeros behind the words are part of three products: nobody may ever see them."""
    step = train_step(torch.float32, optim=optim, weight_decay=0.1)
    flat = step.flat
    between = torch.ones_like(flat.master, dtype=torch.bool)
    for start, stop in flat.spans:
        between[start:stop] = False
    last = flat.spans[flat.names.index("embeddings.word")][1]
    assert between[last : last + 5 * 32].all() and V + 5 == 16  # rows, a multiple of 8
    flat.grad[last : last + 5 * 32] = torch.nan  # the product writes them
    before = flat.master.clone()
    for _ in range(2):
        step([BATCH, BATCH])
    assert step.read().updates == 2 and (flat.master != before)[:last].any()
    for buffer in (flat.master, flat.weights, flat.grad, *step.optimizer.moments):
        assert not buffer[between].any()
