"""AdamW and LAMB over flat buffers against plain PyTorch, over many steps."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastbert_kernels import optimizer, reference_optimizer
from fastbert_kernels.optimizer import adamw_step, lamb_step, lamb_table
from fastbert_kernels.reference_optimizer import Buffers, Hyperparameters

SPANS = [(0, 5000), (5008, 5108), (5120, 5121), (5136, 5236)]
EMBEDDING_END, DECAY_END, P = 5008, 5120, 5248
HYPER = Hyperparameters(DECAY_END)


def state(dtype: torch.dtype | None = torch.float16, size: int = P) -> dict[str, Any]:
    inside = torch.zeros(size)
    for start, stop in SPANS:
        inside[start:stop] = 1
    return {
        "master": torch.randn(size) * inside,
        "exp_avg": torch.zeros(size),
        "exp_avg_sq": torch.zeros(size),
        "weights": None if dtype is None else torch.zeros(size, dtype=dtype),
        "lr": torch.tensor(0.02),
        "step": torch.tensor(0),
        "skipped": torch.tensor(0),
        "grad_scale": torch.tensor(8.0),
        "grad_norm": torch.tensor(torch.nan),
    }


def widened(buffers: dict[str, Any]) -> dict[str, Any]:
    return {
        name: t.double() if t is not None and t.is_floating_point() else copy.deepcopy(t)
        for name, t in buffers.items()
    }


def gradient(buffers: dict[str, Any], dtype: torch.dtype, size: float) -> Tensor:
    """Of random size, so that some steps are clipped and some are not; 0 in the gaps."""
    noise = torch.randn_like(buffers["master"]) * (buffers["master"] != 0)
    return (noise * size * 8.0).to(dtype)


def close(found: dict[str, Any], want: dict[str, Any], rtol: float) -> None:
    for name in ("master", "exp_avg", "exp_avg_sq", "grad_norm"):
        a, b = found[name].double(), want[name].double()
        assert (a - b).abs().max() <= rtol * b.abs().max(), name
    assert found["step"] == want["step"] and found["skipped"] == want["skipped"]
    if found["weights"] is not None:
        assert torch.equal(found["weights"], found["master"].to(found["weights"].dtype))


def side_by_side(
    step: Callable[..., None],
    oracle: Callable[..., None],
    dtype: torch.dtype,
    own: tuple[Any, ...],
    theirs: tuple[Any, ...],
) -> None:
    """50 steps in fp32, 12 with gradients in fp16; steps 7 and 9 hold an inf and a nan.

    The first parameter has a learning rate of its own.
    """
    hyper = HYPER._replace(embedding_end=EMBEDDING_END, embedding_lr_factor=1.5)
    steps = 50 if dtype == torch.float32 else 12
    found = state(torch.float16)
    want = widened(found)
    clipped = 0
    for i in range(steps):
        found["lr"].fill_(0.02 * (1 - i / steps))
        want["lr"].copy_(found["lr"])
        grad = gradient(found, dtype, 0.004 if i % 3 else 0.1)
        if i == 7:
            grad[5] = torch.inf
        if i == 9:
            grad[-20] = torch.nan
        before = {name: copy.deepcopy(t) for name, t in found.items()}
        step(Buffers(grad=grad, **found), hyper, *own)
        oracle(Buffers(grad=grad, **want), hyper, *theirs)
        if i in (7, 9):
            for name in ("master", "exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(found[name], before[name]), name
            assert torch.equal(found["weights"], before["weights"])
            assert not found["grad_norm"].isfinite()
            want["grad_norm"].zero_()
            found["grad_norm"].zero_()
        clipped += int(found["grad_norm"] > 1.0)
        close(found, want, 2e-6 * (i + 5))
    assert found["skipped"] == 2 and found["step"] == steps - 2
    assert steps / 5 < clipped < steps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("poisoned")
def test_adamw_over_many_steps(dtype: torch.dtype) -> None:
    side_by_side(adamw_step, reference_optimizer.adamw_step, dtype, (), ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("poisoned")
def test_lamb_over_many_steps(dtype: torch.dtype) -> None:
    table = lamb_table(SPANS, "cpu")
    side_by_side(lamb_step, reference_optimizer.lamb_step, dtype, (table,), (SPANS,))


def test_the_reference_is_torch_adamw() -> None:
    """The embeddings, which have a learning rate of their own, are a group of torch's."""
    ours = state(None)
    sizes = [EMBEDDING_END, DECAY_END - EMBEDDING_END, P - DECAY_END]
    theirs = [torch.nn.Parameter(part.clone()) for part in ours["master"].split(sizes)]
    groups = [
        {"params": theirs[:1], "weight_decay": 0.01, "lr": 0.05},
        {"params": theirs[1:2], "weight_decay": 0.01},
        {"params": theirs[2:], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.999), eps=1e-6)
    hyper = HYPER._replace(embedding_end=EMBEDDING_END, embedding_lr_factor=2.5)
    for i in range(50):
        grad = gradient(ours, torch.float32, 0.004 if i % 3 else 0.1)
        for parameter, part in zip(theirs, grad.split(sizes), strict=True):
            parameter.grad = part / 8.0
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        adamw.step()
        reference_optimizer.adamw_step(Buffers(grad=grad, **ours), hyper)
        assert torch.allclose(ours["grad_norm"], norm)
    assert torch.allclose(ours["master"], torch.cat([p.detach() for p in theirs]), atol=1e-6)


def test_lamb_by_hand() -> None:
    ours = state(None)
    grad = gradient(ours, torch.float32, 0.01)
    before = ours["master"].clone()
    lamb_step(Buffers(grad=grad, **ours), HYPER, lamb_table(SPANS, "cpu"))
    g = grad / 8.0
    g = g / max(1.0, float(g.norm()) + 1e-6)
    for start, stop in SPANS:
        w = before[start:stop]
        update = g[start:stop].sign() * (g[start:stop].abs() / (g[start:stop].abs() + 1e-6))
        if start < DECAY_END:
            update += 0.01 * w
            update *= w.norm() / update.norm()
        assert torch.allclose(ours["master"][start:stop], w - 0.02 * update, atol=1e-5)


@pytest.mark.parametrize("size", [1, 15, 1023, 1025, 9000])
@pytest.mark.usefixtures("poisoned")
def test_any_number_of_elements(size: int) -> None:
    found = state(torch.float16, 9000)
    found = {n: t[:size].clone() if t is not None and t.dim() else t for n, t in found.items()}
    want = widened(found)
    hyper = Hyperparameters(size // 2)
    for _ in range(3):
        grad = torch.randn(size)
        adamw_step(Buffers(grad=grad, **found), hyper)
        reference_optimizer.adamw_step(Buffers(grad=grad, **want), hyper)
    close(found, want, 1e-5)


def test_no_clipping_and_no_weights() -> None:
    found = state(None)
    want = widened(found)
    grad = gradient(found, torch.float32, 0.1)
    hyper = HYPER._replace(max_grad_norm=0.0)
    adamw_step(Buffers(grad=grad, **found), hyper)
    reference_optimizer.adamw_step(Buffers(grad=grad, **want), hyper)
    assert found["grad_norm"] > 1.0
    close(found, want, 1e-5)


def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for weights in (None, torch.float16):
        buffers = state(weights)
        grad = gradient(buffers, torch.float32, 0.1)
        lamb = lamb_table(SPANS, "cpu")
        for table in ([], [lamb.bounds, lamb.parameter, lamb.first_block]):
            call = buffers | HYPER._asdict() | {"grad": grad, "table": table, "end": P}
            torch.library.opcheck(optimizer.flat_update, (), call, test_utils=tests)


def test_compiles_without_a_graph_break() -> None:
    table = lamb_table(SPANS, "cpu")

    def both_steps(grad: Tensor, first: dict[str, Any], second: dict[str, Any]) -> None:
        adamw_step(Buffers(grad=grad, **first), HYPER)
        lamb_step(Buffers(grad=grad, **second), HYPER, table)

    eager = [state(torch.float16), state(torch.float16)]
    traced = [{n: t.clone() for n, t in buffers.items()} for buffers in eager]
    grad = gradient(eager[0], torch.float32, 0.1)
    both_steps(grad, *eager)
    torch.compile(both_steps, backend="aot_eager", fullgraph=True)(grad, *traced)
    for found, want in zip(traced, eager, strict=True):
        assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("step", "own", "most"),
    [(adamw_step, (), 3), (lamb_step, (lamb_table(SPANS, "cpu"),), 5)],
)
def test_how_many_launches(
    step: Callable[..., None], own: tuple[Any, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of parameters; and nothing of PyTorch's own in between."""
    launches: list[object] = []
    buffers = state(torch.float16)
    grad = gradient(buffers, torch.float32, 0.1)
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: launches.append(args))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(Buffers(grad=grad, **buffers), HYPER, *own)
    assert len(launches) == most
    names = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert names == {"aten::empty"}


def test_bad_arguments() -> None:
    good = Buffers(grad=torch.zeros(P), **state(torch.float16))
    bad = {
        "grad has shape": (good._replace(grad=torch.zeros(P - 1)), HYPER),
        "exp_avg has shape": (good._replace(exp_avg=torch.zeros(P + 1)), HYPER),
        "betas": (good, HYPER._replace(beta1=1.0)),
        "decay_end": (good, HYPER._replace(decay_end=P + 1)),
    }
    table = lamb_table(SPANS, "cpu")
    for message, call in bad.items():
        with pytest.raises(ValueError, match=f"adamw_step: {message}"):
            adamw_step(*call)
        with pytest.raises(ValueError, match=f"lamb_step: {message}"):
            lamb_step(*call, table)
    with pytest.raises(ValueError, match="table needs 6016 elements"):
        lamb_step(good, HYPER, lamb_table([(0, 6001)], "cpu"))
    for spans in ([], [(0, 5), (1, 7)], [(8, 16)], [(16, 16)], [(0, 17), (16, 20)]):
        with pytest.raises(ValueError, match="lamb_table"):
            lamb_table(spans, "cpu")
