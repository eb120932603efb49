"""Curriculum, batch ramp, out of memory, workers, optimizers: whole runs of the command."""

import json
import math
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert.config import PretrainConfig
from fastbert.data.batch import Batch
from fastbert.model.bert import Bert
from fastbert.train.report import read_metrics
from fastbert.train.step import TrainStep

pytestmark = pytest.mark.usefixtures("undrawn")
Pretrain = Callable[..., Path]
Losses = Callable[[Path], list[tuple[int, float]]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[Batch]]:
    """The batches of each step."""
    steps: list[list[Batch]] = []
    call = TrainStep.eager

    def spy(self: TrainStep, batches: Sequence[Batch]) -> None:
        call(self, batches)
        steps.append(list(batches))

    monkeypatch.setattr(TrainStep, "eager", spy)
    return steps


def state(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (run / f"checkpoints/step-{step:06d}/state.json").read_text()
    )
    return found


# Curriculum


def test_short_sequences_come_first(
    pretrain: Pretrain, seen: list[list[Batch]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain("run", "--curriculum 16:0.6 --max-steps 10")
    assert [step[0].max_seqlen for step in seen] == [16] * 6 + [32] * 4
    longest = [int(step[0].cu_seqlens.diff().max()) for step in seen]
    assert max(longest[:6]) <= 16 < max(longest[6:]) <= 32
    assert "step 6: sequences of up to 32 tokens from here" in capsys.readouterr().err
    assert state(run, 10)["data"]["batches"] == 10
    assert "eval/mlm_loss" in read_metrics(run / "metrics.jsonl")[-1]


def test_a_curriculum_resumes_bit_for_bit(
    pretrain: Pretrain, resume: Pretrain, losses: Losses
) -> None:
    options = "--curriculum 16:0.6 --max-steps 10 --save-steps 2"
    whole = losses(pretrain("whole", options))
    for stop in (4, 6, 8):
        pretrain(f"until-{stop}", f"{options} --stop-at-step {stop}")
        assert losses(resume(f"until-{stop}", f"--resume auto {options}")) == whole, stop


@pytest.mark.parametrize(("stop", "max_steps"), [(12, 30), (10, 16), (6, 16)])
def test_another_max_steps_moves_the_phases(
    pretrain: Pretrain, resume: Pretrain, seen: list[list[Batch]], stop: int, max_steps: int
) -> None:
    """`max_steps` may change at a resume, and a phase is a share of it."""
    pretrain("run", f"--curriculum 16:0.5 --max-steps 20 --stop-at-step {stop}")
    seen.clear()
    resume("run", f"--resume auto --curriculum 16:0.5 --max-steps {max_steps} --eval-steps 0")
    lengths = [16 if step < max_steps // 2 else 32 for step in range(stop, max_steps)]
    assert [step[0].max_seqlen for step in seen] == lengths


# Batch ramp


def test_the_batch_grows(pretrain: Pretrain, seen: list[list[Batch]], losses: Losses) -> None:
    options = "--gradient-accumulation-steps 3 --batch-ramp-steps 6 --max-steps 8 --eval-steps 0"
    run = pretrain("run", options)
    assert [len(step) for step in seen] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert state(run, 8)["micro_batches"] == 18
    config = PretrainConfig(gradient_accumulation_steps=3, batch_ramp_steps=6)
    assert [config.accumulation_at(step) for step in range(8)] == [1, 1, 2, 2, 3, 3, 3, 3]


# Out of memory


def limit_memory(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    error: type[RuntimeError] = torch.OutOfMemoryError,
    said: str = "CUDA out of memory",
) -> None:
    accumulate = TrainStep.accumulate

    def limited(self: TrainStep, batch: Batch) -> None:
        accumulate(self, batch)  # it fails late, with gradients half added up
        if batch.input_ids.numel() > tokens:
            raise error(said)

    monkeypatch.setattr(TrainStep, "accumulate", limited)


def test_out_of_memory_halves_the_micro_batch(
    pretrain: Pretrain,
    resume: Pretrain,
    losses: Losses,
    seen: list[list[Batch]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = "--max-steps 4 --save-steps 2 --gradient-accumulation-steps 2"
    plain = pretrain("plain", options)
    seen.clear()
    limit_memory(monkeypatch, 64)
    run = pretrain("run", options)
    shown = capsys.readouterr().err
    assert "out of memory with 256 tokens in a micro-batch: going on with 128" in shown
    assert "out of memory with 128 tokens in a micro-batch: going on with 64" in shown
    assert [[b.input_ids.numel() for b in step] for step in seen] == [[64] * 8] * 4
    for (_, ours), (_, theirs) in zip(losses(run), losses(plain), strict=True):
        assert math.isclose(ours, theirs, rel_tol=0.03)  # other sequences meet in a step
    # A resume goes on with the parts that fit, without trying the whole again.
    pretrain("parts", f"{options} --stop-at-step 2")
    monkeypatch.undo()
    parts = resume("parts", f"--resume auto {options}")
    assert losses(parts) == losses(run)
    assert state(parts, 4)["split"] == 4


def test_cublas_may_be_what_finds_no_memory(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    limit_memory(monkeypatch, 128, RuntimeError, said)
    pretrain("run", "--max-steps 2")
    assert "going on with 128, and twice as many in a step" in capsys.readouterr().err
    limit_memory(monkeypatch, 0, RuntimeError, "CUDA error: an illegal memory access")
    pretrain("other", "--max-steps 2", exit_code=1)
    assert "an illegal memory access" in capsys.readouterr().err


def test_at_the_smallest_size_it_says_what_would_fit(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_memory(monkeypatch, 31)
    pretrain("run", exit_code=1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"fastbert: error: out of memory with 32 tokens in a micro-batch, which cannot be halved: "
        r"cpu has [0-9.]+ GiB for us, of which weights, gradients and moments take 0\.0, which "
        r"leaves room for about 31 tokens: lower --max-seq-length",
        last,
    )


def test_an_evaluation_that_does_not_fit_is_halved(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict = Bert.predict

    def limited(self: Bert, input_ids: torch.Tensor, *others: Any) -> Any:
        if input_ids.numel() > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, input_ids, *others)

    monkeypatch.setattr(Bert, "predict", limited)
    run = pretrain("run", "--max-steps 10")
    shown = capsys.readouterr().err
    assert (
        shown.count("out of memory in the evaluation of 256 tokens at a time: going on with") == 1
    )
    found = [row for row in read_metrics(run / "metrics.jsonl") if "eval/mlm_loss" in row]
    assert [row["step"] for row in found] == [10]


# What is written


def test_no_checkpoint_with_a_number_that_is_not_finite(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = TrainStep.update

    def broken(self: TrainStep) -> None:
        update(self)
        if int(self._step) == 8:
            self.flat.master[3] = math.inf

    monkeypatch.setattr(TrainStep, "update", broken)
    run = pretrain("run", "--stop-at-step 8", exit_code=1)
    assert "no checkpoint is written" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000005"]


# Workers


def test_workers_change_nothing(pretrain: Pretrain, resume: Pretrain, losses: Losses) -> None:
    alone = pretrain("alone", "--max-steps 10")
    workers = pretrain("workers", "--max-steps 10 --dataloader-num-workers 2 --stop-at-step 5")
    resume("workers", "--resume auto --max-steps 10 --dataloader-num-workers 1")
    assert losses(alone) == losses(workers)


# Optimizers


class _Fused(torch.optim.Optimizer):
    """apex's interface (its arguments, where it keeps state and steps), torch's arithmetic."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, adam_w_mode: bool,
                 max_grad_norm: float | None = None) -> None:  # fmt: skip
        assert adam_w_mode and (max_grad_norm is not None) == self.lamb
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.max_grad_norm = max_grad_norm

    lamb = False

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        every = [p for group in self.param_groups for p in group["params"]]
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(every, self.max_grad_norm)
        for group in self.param_groups:
            group["step"] += 1
            (beta1, beta2), t = group["betas"], group["step"]
            for p in group["params"]:
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
                u += group["weight_decay"] * p
                if self.lamb and group["weight_decay"]:
                    u *= p.norm() / u.norm()
                p -= group["lr"] * u


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    module.FusedAdam = _Fused  # type: ignore[attr-defined]
    module.FusedLAMB = type("FusedLAMB", (_Fused,), {"lamb": True})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)


@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_optimizers_agree(
    pretrain: Pretrain, resume: Pretrain, losses: Losses, apex: None, rule: str
) -> None:
    options = "--max-steps 10 --weight-decay 0.1 --max-grad-norm 0.5 --optim "
    ours = losses(pretrain("ours", options + rule))
    others = [f"{rule}_apex_fused"] + ["adamw_torch_fused"] * (rule == "adamw")
    for name in others:
        pretrain(name, f"{options}{name} --stop-at-step 5")
        for (_, theirs), (_, wanted) in zip(
            losses(resume(name, f"--resume auto {options}{name}")), ours, strict=True
        ):
            assert math.isclose(theirs, wanted, rel_tol=1e-5)
    assert ours[-1][1] < ours[0][1]


def test_the_other_apex_is_not_taken_for_nvidias(
    pretrain: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    pretrain("run", "--optim adamw_apex_fused", exit_code=2)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "fastbert: error: optim = 'adamw_apex_fused' needs NVIDIA's apex (its module "
        "apex.optimizers): install it, or use optim = 'adamw'"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--step graph", "step = 'graph': CUDA graphs need a GPU; use step = 'auto' or 'eager'"),
        ("--kernels triton", "kernels = 'triton': they need a GPU; use kernels = 'auto'"),
        ("--attn-implementation torch", "attn_implementation = 'torch' belongs to our Triton"),
        ("--precision tf32", "precision = 'tf32' needs a GPU: use fp32"),
        ("--optim adamw_torch_fused --gradient-precision bf16", "takes gradients in fp32: use"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(
    pretrain: Pretrain, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    pretrain("run", options, exit_code=2)
    assert message in capsys.readouterr().err.splitlines()[-1]
