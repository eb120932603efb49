"""Is everything right? The stage `smoke` of `python -m fastbert_bench.gpu`, in under a minute.

First every op at one shape: forward and every gradient against the reference in fp64. Then the
training step of a BERT-base cut to two layers: its gradients, parameter by parameter, against plain
PyTorch in fp32; a recorded graph against eager steps, bit for bit; no question to the host; the
optimizers against theirs. Each check is a row {"check", "ok", numbers}, on disk as soon as known.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.config import ModelConfig, PretrainConfig, model_config
from fastbert.data.batch import Batch
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE, MainGrad, Ops, triton_ops
from fastbert.train.flat import FlatParameters
from fastbert.train.graph import launcher
from fastbert.train.optimizer import make_optimizer
from fastbert.train.step import TrainStep
from fastbert_bench.gpu import part
from fastbert_bench.kernels import checks as kernel_checks
from fastbert_bench.kernels.checks import Row
from fastbert_bench.measure import result as results
from fastbert_bench.measure.processes import one_line
from fastbert_bench.suites.contenders import make_batches, make_recipe
from fastbert_kernels.reference_optimizer import MuonHyperparameters

SEED = 7
# Op -> what the labels of its cases begin with, after the dtype; on a CPU every op has few.
SHAPES = {
    "attention": tuple(
        f"D=64 p=0.1 S={lengths}" for lengths in ("512 [129", "512 [512", "128 [7", "128 [128")
    ),  # the second and fourth: some tokens ask
    "dropout_add_layer_norm": ("R=8191 H=768 p=0.1", "R=511 H=1024 p=0.1"),
    "bias_gelu": ("R=257 H=3072 none",),
    "gelu_layer_norm": ("R=8191 H=768 none",),
    "linear_cross_entropy": ("M=511 V=30522 H=768 ",),
    "embed_layer_norm": ("T=8192 V=30522 P=512 H=768 p=0.1",),
}
# Relative errors, in the Euclidean norm. bf16 rounds by 2^-9; a step's gradient, through some
# twenty roundings, is off by about 1% in plain PyTorch too.
ALLOWED_SUM, ALLOWED_UPDATE, ALLOWED_ORDER = 0.01, 1e-5, 1e-3
# Newton-Schulz raises a small singular value, and its rounding, by up to 500: of a random matrix
# 768 x 768, fp32 is off by 6e-6 from fp64, bf16 by 1e-2.
ALLOWED_MATRICES = 1e-4
MUON: dict[str, Any] = {"optim": "muon", "learning_rate": 1e-2, "muon_learning_rate": 1e-2}


def smoke_cases(
    op: str, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Iterator[kernel_checks.Case]:
    """The cases of an op that the smoke test runs on a GPU, with tensors on any device."""
    for case in kernel_checks.CASES[op](device, False):
        plain = case.label.removeprefix(f"{kernel_checks.short(case.dtype)} ")
        # Elsewhere than on a GPU there is no case in bf16: another's stands for it.
        if plain.startswith(SHAPES[op]) and case.dtype == kernel_checks.dtypes(device)[-1]:
            yield dataclasses.replace(case, deep=False, dtype=dtype)


def rehearsed_cases(op: str) -> Iterator[kernel_checks.Case]:
    """One small case, for the interpreter, which has no bf16."""
    device = torch.device("cpu")
    for case in kernel_checks.CASES[op](device, True):
        if case.dtype == torch.float16:
            yield dataclasses.replace(case, deep=False)
            return


def op_checks(device: torch.device) -> Iterator[Row]:
    """Each op, forward and every gradient."""
    for op in SHAPES:
        cases = smoke_cases(op, device) if device.type == "cuda" else rehearsed_cases(op)
        for case in cases:
            for row in kernel_checks.check_case(case, device, trace=False):
                yield row | {"check": f"{op}, {row['check']}"}


def product_checks(device: torch.device) -> Iterator[Row]:
    """A weight gradient straight into an fp32 buffer: over NaN at first, then on top."""
    dtype = kernel_checks.dtypes(device)[-1]
    generator = torch.Generator().manual_seed(SEED)
    R, F, H = (4096, 3072, 768) if device.type == "cuda" else (64, 48, 32)
    dy, x = (torch.randn(R, n, generator=generator).to(device, dtype) for n in (F, H))
    buffer = torch.full((F, H), torch.nan, device=device)
    into = MainGrad(buffer)
    exact = dy.double().t() @ x.double()
    # Sums of 4,096 in fp32 are off by some 1e-5, bf16 would be by 1e-3; a CPU rounds the product
    # before it adds it.
    allowed = 1e-4 if device.type == "cuda" else 1e-3
    for times in (1, 2):
        into.add_product(dy, x)
        yield _within(f"product {times} of {times} into fp32", buffer, times * exact, allowed)


def _within(check: str, found: Tensor, exact: Tensor, allowed: float) -> Row:
    error = _relative(found, exact)
    return {"check": check, "ok": error <= allowed, "error": error, "allowed": allowed}


def _relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||; NaN where anything is NaN, which no comparison passes."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


# The training step


@dataclasses.dataclass(frozen=True)
class Steps:
    """Small training steps of a model that is wide as BERT-base."""

    device: torch.device
    sizes: ModelConfig
    batches: list[Batch]
    dtype: torch.dtype
    count: int
    """How many the graph is compared over."""

    @staticmethod
    @cache
    def on(device: torch.device) -> "Steps":
        """Two layers of BERT-base; in the interpreter a model that takes seconds."""
        rng = np.random.default_rng(SEED)
        if device.type == "cuda":
            sizes, S = dataclasses.replace(model_config("base"), num_hidden_layers=2), 512
            lengths, dtype = np.array([512, 511, 129, 64, 488, 300, 512, 77]), torch.bfloat16
        else:
            sizes = ModelConfig(150, 32, 2, 1, 32, max_position_embeddings=20)
            lengths, S, dtype = np.array([17, 9, 5]), 20, torch.float16
        batches = make_batches(lengths, S, sizes.vocab_size, rng, low=5)[1]
        count = 10 if device.type == "cuda" else 1
        return Steps(device, sizes, [batch.to(device) for batch in batches], dtype, count)

    def step(
        self,
        ops: Ops | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: bool = True,
        main_grads: bool = True,
        **changes: Any,
    ) -> TrainStep:
        """A step whose weights are the same at every call."""
        sizes = self.sizes
        if not dropout:
            sizes = dataclasses.replace(
                sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
        torch.manual_seed(SEED)
        model = Bert(sizes, ops or triton_ops()).to(self.device)
        recipe = dataclasses.replace(make_recipe(SEED), **changes)
        return TrainStep(model, recipe, dtype or self.dtype, main_grads=main_grads)

    def gradient(self, step: TrainStep) -> Tensor:
        """(P,) of the first batch."""
        step.begin(self.batches[:1])
        step.flat.forget_gradients()
        step.accumulate(self.batches[0])
        return step.flat.grad / step.read().loss_scale

    def train(
        self, graph: bool, count: int = 1, **changes: Any
    ) -> tuple[list[float], TrainStep, Callable[[Sequence[Batch]], None]]:
        """Losses of some steps of `count` micro-batches, the state, and what launches a step."""
        step = self.step(**changes, gradient_accumulation_steps=count)
        launch = launcher(step, graph, accumulates=count > 1)
        losses = []
        for index in range(self.count):
            launch([self.batches[(index + i) % len(self.batches)] for i in range(count)])
            losses.append(step.read().loss)
        return losses, step, launch


def gradient_checks(device: torch.device) -> Iterator[Row]:
    """One step's gradient, dropout off: ours, with and without `main_grad`, against plain PyTorch.

    The oracle is plain PyTorch in fp32. For each parameter, ours may err twice as much as plain
    PyTorch in 16 bits does, and 1% more.
    """
    steps = Steps.on(device)

    def gradients(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        step = steps.step(*arguments, dropout=False, **options)
        return {n: g.clone() for n, g in step.flat.views(steps.gradient(step)).items()}

    # By autograd alone: an oracle that added to the flat buffer would err with it.
    exact = gradients(REFERENCE, torch.float32, main_grads=False)
    plain = gradients(REFERENCE, main_grads=False)
    for name, ours in (
        ("main_grad", gradients()),
        ("autograd's gradients", gradients(main_grads=False)),
    ):
        excess, worst = {}, ""
        for parameter, wanted in exact.items():
            allowed = 2 * _relative(plain[parameter], wanted) + ALLOWED_SUM
            error = _relative(ours[parameter], wanted)
            excess[parameter] = error / allowed if error == error else float("inf")
            worst = max(excess, key=lambda key: excess[key])
        whole = [torch.cat([g.flatten() for g in kind.values()]) for kind in (ours, plain, exact)]
        yield {
            "check": f"gradient of a step, {name}: {len(exact)} parameters against fp32",
            "ok": excess[worst] <= 1,
            "error": _relative(whole[0], whole[2]),
            "plain_error": _relative(whole[1], whole[2]),
            "worst": f"{worst}: {excess[worst]:.2f} of what is allowed",
        }


def graph_checks(device: torch.device) -> Iterator[Row]:
    """Eager steps twice, a recorded graph beside them, and no question to the host in either."""
    steps = Steps.on(device)
    n = steps.count
    eager, kept, _ = steps.train(False)
    again, other, _ = steps.train(False)
    same = eager == again and torch.equal(kept.flat.master, other.flat.master)
    yield {"check": f"{n} eager steps twice: the same bits", "ok": same}
    yield {"check": f"{n} eager steps: losses are finite", "ok": bool(np.isfinite(eager).all())}
    fresh = steps.step()
    first = steps.gradient(fresh)
    fresh.abandon()  # the next one draws the same dropout bits
    same = torch.equal(first, steps.gradient(fresh))
    yield {"check": "backward twice: the same bits", "ok": same}
    if device.type != "cuda":
        yield {"check": "CUDA graph", "ok": None, "why": "no GPU"}
        return
    yield from _recorded(steps, eager, kept)
    # The first product of a step overwrites in the eager one and adds to zeros in the graph, for
    # which cuBLAS may choose another split of the sum: rounding, not bits.
    eager, kept, _ = steps.train(False, count=2)
    recorded, _, launch = steps.train(True, count=2)
    error = max(abs(a - b) / a for a, b in zip(recorded, eager, strict=True))
    yield {"check": "two micro-batches: the graph's losses are the eager ones",
           "ok": error <= ALLOWED_ORDER, "error": error, "allowed": ALLOWED_ORDER}  # fmt: skip
    yield _asks_nothing("graph of two micro-batches", launch, steps.batches[:2])


def _recorded(
    steps: Steps, eager: list[float], kept: TrainStep, of: str = "", **changes: Any
) -> Iterator[Row]:
    """A graph's steps against the eager ones, which gave these losses and this state."""
    recorded, graphed, launch = steps.train(True, **changes)
    n = steps.count
    yield {"check": f"{n} graph steps{of}: the eager losses", "ok": recorded == eager,
           "largest": max(abs(a - b) for a, b in zip(recorded, eager, strict=True))}  # fmt: skip
    same = torch.equal(kept.flat.master, graphed.flat.master)
    error = _relative(graphed.flat.master, kept.flat.master)
    yield {"check": f"{n} graph steps{of}: the eager weights", "ok": same, "error": error}
    for name, work in (("eager step", kept), ("graph", launch)):
        yield _asks_nothing(name + of, work, steps.batches[:1])


def _asks_nothing(
    name: str, launch: Callable[[Sequence[Batch]], None], batches: Sequence[Batch]
) -> Row:
    check = f"the {name} asks the host nothing"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(batches)
    except RuntimeError as error:
        return {"check": check, "ok": False, "why": one_line(error)}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"check": check, "ok": True}


def optimizer_checks(device: torch.device) -> Iterator[Row]:
    """AdamW and LAMB on the model's own buffers against plain PyTorch; and do they learn?"""
    steps = Steps.on(device)
    for optim in ("adamw", "lamb"):
        ours, theirs = (
            make_optimizer(step.flat, step.config, ops)
            for ops in (triton_ops(), REFERENCE)
            for step in [steps.step(ops, optim=optim)]
        )
        begun = steps.step().flat
        generator = torch.Generator(device).manual_seed(SEED)
        for _ in range(3):  # the first one hides what the moments decay by
            gradient = torch.randn(ours.flat.grad.shape, generator=generator, device=device)
            for rule in (ours, theirs):
                rule.flat.grad.copy_(gradient)
                rule.lr.fill_(1e-2)
                rule.update(torch.ones((), device=device))
        # Parameters only: what lies between them in the buffers is nobody's.
        ours_moved, theirs_moved = (
            torch.cat([
                (flat.views(flat.master)[name] - view).flatten()
                for name, view in begun.views(begun.master).items()
            ])
            for flat in (ours.flat, theirs.flat)
        )  # fmt: skip
        check = f"{optim}: three updates against plain PyTorch"
        yield _within(check, ours_moved, theirs_moved, ALLOWED_UPDATE)
        yield _learns(steps, optim)


def _learns(steps: Steps, optim: str) -> Row:
    """On one batch without dropout any optimizer that works must get better."""
    step = steps.step(optim=optim, dropout=False, learning_rate=2e-3)
    turns = 8 if steps.device.type == "cuda" else 2
    losses = []
    for _ in range(turns):
        step(steps.batches[:1])
        losses.append(step.read().loss)
    return {
        "check": f"{optim}: the loss of one batch falls in {turns} steps",
        "ok": losses[-1] < losses[0] - 0.01, "first": losses[0], "last": losses[-1],
    }  # fmt: skip


def muon_checks(device: torch.device) -> Iterator[Row]:
    """Muon on the model's own buffers against torch's Muon and AdamW; does it learn, and recorded?

    In fp32 to rounding; in bf16 ours may err twice as much as torch's does, and 1% more.
    """
    steps, found = Steps.on(device), {}
    cuda = device.type == "cuda"
    turns = 3 if cuda else 2  # the first one hides what the moments decay by
    for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
        step = steps.step(muon_in(triton_ops(), dtype), **MUON, muon_weight_decay=0.1)
        flat, generator = step.flat, torch.Generator(device).manual_seed(SEED)
        begun, gradients = flat.master.clone(), []
        for _ in range(turns):
            gradients.append(torch.zeros_like(flat.master))
            for view in flat.views(gradients[-1]).values():
                view.normal_(generator=generator)
        theirs = _by_torch(flat, step.config, gradients, dtype)
        for gradient in gradients:
            flat.grad.copy_(gradient)
            step.optimizer.lr.fill_(MUON["learning_rate"])
            step.optimizer.update(torch.ones((), device=device))
        found[dtype] = flat.master - begun, theirs - begun
    ours, exact = found[torch.float32]
    begin, check = flat.last_begin, f"muon: {turns} updates against torch's"
    yield _within(f"{check}, fp32", ours[begin:], exact[begin:], ALLOWED_MATRICES)
    yield _within(f"{check}, AdamW's part", ours[:begin], exact[:begin], ALLOWED_UPDATE)
    if not cuda:
        yield {"check": "Muon in bf16, and in a CUDA graph", "ok": None, "why": "no GPU"}
        return
    error, plain = (_relative(one[begin:], exact[begin:]) for one in found[torch.bfloat16])
    yield {"check": f"{check}, bf16", "ok": error <= 2 * plain + ALLOWED_SUM,
           "error": error, "torchs_error": plain}  # fmt: skip
    yield _learns(steps, "muon")
    losses, kept, _ = steps.train(False, **MUON)
    yield from _recorded(steps, losses, kept, " with Muon", **MUON)


def muon_in(ops: Ops, dtype: torch.dtype) -> Ops:
    """The same ops, but for the precision of Newton-Schulz."""

    def muon_step(*args: Any, muon: MuonHyperparameters, **named: Any) -> None:
        ops.muon_step(*args, muon=muon._replace(dtype=dtype), **named)

    return dataclasses.replace(ops, muon_step=muon_step)


def _by_torch(
    flat: FlatParameters, config: PretrainConfig, gradients: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """(P,) the masters after updates by torch.optim.Muon and AdamW.

    torch's Muon orthogonalizes in bf16; in fp32, once its rounding copies only.
    """
    master, grad = flat.master.clone(), torch.zeros_like(flat.master)
    decayed, end = flat.decay_end, flat.last_begin

    def pieces(buffer: Tensor) -> list[Tensor]:
        matrices = [
            matrix
            for (name, view), (start, _) in zip(flat.views(buffer).items(), flat.spans, strict=True)
            if start >= end
            for matrix in view.chunk(3 if name.endswith("qkv.weight") else 1)
        ]
        return [buffer[:decayed], buffer[decayed:end], *matrices]

    parameters = [nn.Parameter(piece) for piece in pieces(master)]
    for parameter, piece in zip(parameters, pieces(grad), strict=True):
        parameter.grad = piece
    adamw = torch.optim.AdamW(
        [
            {"params": parameters[:1], "weight_decay": config.weight_decay},
            {"params": parameters[1:2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate or 0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    muon = torch.optim.Muon(
        parameters[2:],
        lr=config.muon_learning_rate,
        weight_decay=config.muon_weight_decay,
        momentum=config.muon_momentum,
    )
    wide = mock.patch.object(Tensor, "bfloat16", Tensor.clone)
    with wide if dtype == torch.float32 else contextlib.nullcontext():
        for gradient in gradients:
            grad.copy_(gradient)
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            adamw.step()
            muon.step()
    return master


CHECKS: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    "products": product_checks,
    "gradients": gradient_checks,
    "graph": graph_checks,
    "optimizers": optimizer_checks,
    "muon": muon_checks,
    "ops": op_checks,
}


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """What is known, again and again as more is found."""
    found: dict[str, Any] = {
        "stage": "smoke", "conditions": results.conditions(device), "checks": [],
    }  # fmt: skip
    for name, checks in CHECKS.items():
        try:
            for row in checks(device):
                found["checks"].append(row)
                yield found
        except Exception as error:  # the checks after it are still worth having
            found["checks"].append({"check": name, "ok": False, "why": one_line(error)})
            yield found


def table(found: dict[str, Any]) -> list[str]:
    """One line, and one for each failure."""
    line, failures = part.verdict("smoke", found["checks"])
    gradient = next((row for row in found["checks"] if "plain_error" in row), None)
    if gradient:
        line += (
            f"; gradient off by {gradient['error']:.2%}, "
            f"plain PyTorch's by {gradient['plain_error']:.2%}"
        )
    return [line, *failures]


def main(argv: Sequence[str] | None = None) -> int:
    args = part.parser("smoke").parse_args(argv)
    return part.checked(measure(part.device_of(args)), args.out)


if __name__ == "__main__":
    sys.exit(main())
