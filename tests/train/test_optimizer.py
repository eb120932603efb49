"""AdamW over flat buffers against torch's, parameter by parameter, and what it does with NaN."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastbert.config import ModelConfig, PretrainConfig
from fastbert.errors import UserError
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE
from fastbert.train.checkpoint import check_recipe
from fastbert.train.flat import FlatParameters
from fastbert.train.optimizer import FlatOptimizer, flat_parameters, make_optimizer
from fastbert.train.report import read_metrics
from fastbert.train.step import TrainStep

from .test_recipes import apex

__all__ = ["apex"]  # the fixture
SIZES = ModelConfig(97, 16, 2, 2, 24, max_position_embeddings=16)
CONFIG = PretrainConfig(weight_decay=0.1, adam_beta2=0.98, adam_epsilon=1e-8)


def build(config: PretrainConfig, dtype: torch.dtype = torch.float32) -> FlatOptimizer:
    return make_optimizer(FlatParameters(Bert(SIZES), dtype), config, REFERENCE)


def update(optimizer: FlatOptimizer, learning_rate: float) -> bool:
    """Makes one update and returns whether it was made."""
    skipped = int(optimizer.skipped)
    optimizer.lr.fill_(learning_rate)
    optimizer.update(torch.ones(()))
    return int(optimizer.skipped) == skipped


def random_gradients(optimizer: FlatOptimizer, generator: torch.Generator) -> None:
    """Only where a parameter lies: the gaps between them are never touched by a backward."""
    for view in optimizer.flat.views(optimizer.flat.grad).values():
        view.copy_(torch.randn(view.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 100.0])
def test_equals_torch_parameter_by_parameter(max_grad_norm: float) -> None:
    config = PretrainConfig(
        weight_decay=0.1, adam_beta2=0.98, adam_epsilon=1e-8, max_grad_norm=max_grad_norm
    )
    ours = build(config)
    masters = ours.flat.views(ours.flat.master)
    theirs = {name: view.clone().requires_grad_() for name, view in masters.items()}
    rule = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.values() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        eps=1e-8,
        fused=False,
        foreach=False,
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(50):
        random_gradients(ours, generator)
        for name, view in ours.flat.views(ours.flat.grad).items():
            theirs[name].grad = view.clone()
        for group in rule.param_groups:
            group["lr"] = 1e-3 * (1 + math.sin(step))
        updated = update(ours, 1e-3 * (1 + math.sin(step)))
        norm = ours.grad_norm.item()
        want = torch.nn.utils.get_total_norm([p.grad for p in theirs.values()])  # type: ignore
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), max_grad_norm)
        rule.step()
        assert updated and math.isclose(norm, want.item(), rel_tol=1e-5)
        assert norm > 1  # so that clipping to 1 is at work, and clipping to 100 is not
    for name, view in masters.items():
        assert (view - theirs[name]).abs().max() < 1e-6, name
    assert int(ours.updates) == 50
    decayed = {name for name, view in masters.items() if view.dim() > 1}
    assert not {name for name in decayed if "norm" in name or name.endswith("bias")}
    assert {"embeddings.word", "layers.0.qkv.weight", "pooler.weight"} < decayed


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float, dtype: torch.dtype) -> None:
    optimizer = build(CONFIG, dtype)
    generator = torch.Generator().manual_seed(1)
    random_gradients(optimizer, generator)
    assert update(optimizer, 1e-3)
    weights = {n: p.clone() for n, p in optimizer.flat.views(optimizer.flat.weights).items()}
    masters = optimizer.flat.master.clone()
    moments = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    random_gradients(optimizer, generator)
    optimizer.flat.views(optimizer.flat.grad)["layers.1.up.bias"][3] = poison
    assert not update(optimizer, 1e-3)
    assert not math.isfinite(optimizer.grad_norm.item())
    assert int(optimizer.updates) == 1
    assert torch.equal(optimizer.flat.master, masters)
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, moments[name]), name
    for name, view in optimizer.flat.views(optimizer.flat.weights).items():
        assert torch.equal(view, weights[name]), name
    random_gradients(optimizer, generator)
    assert update(optimizer, 1e-3) and int(optimizer.updates) == 2
    assert optimizer.flat.master.isfinite().all()


def test_bf16_weights_are_the_rounded_masters() -> None:
    optimizer = build(CONFIG, torch.bfloat16)
    start = optimizer.flat.master.clone()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        random_gradients(optimizer, generator)
        update(optimizer, 1e-5)  # far below what bf16 could take up
    moved = (optimizer.flat.master - start).abs()
    assert moved[optimizer.flat.grad != 0].min() > 0
    assert torch.equal(optimizer.flat.weights, optimizer.flat.master.bfloat16())


def test_rows_behind_a_matrix_are_seen_by_nobody() -> None:
    optimizer = build(CONFIG)
    flat, parameters = optimizer.flat, dict(Bert(SIZES).named_parameters())
    start, stop = flat.spans[flat.names.index("embeddings.word")]
    following = min(begin for begin, _ in flat.spans if begin > start)
    assert stop - start == 97 * 16 and following - start == 104 * 16
    for found in (flat.views(flat.master), flat.views(flat.grad)):
        assert {n: v.shape for n, v in found.items()} == {n: p.shape for n, p in parameters.items()}
    assert optimizer.state_dict()["exp_avg.embeddings.word"].shape == (97, 16)
    random_gradients(optimizer, torch.Generator().manual_seed(1))
    assert update(optimizer, 1e-3)
    assert not flat.master[stop:following].any() and flat.master[start:stop].all()


@pytest.mark.parametrize(
    ("optim", "gradient_precision"),
    [
        *(("adamw", "fp32"), ("adamw", "bf16"), ("lamb", "fp32"), ("muon", "fp32")),
        *(("muon", "bf16"), ("adamw_torch_fused", "fp32"), ("adamw_apex_fused", "fp32")),
        ("lamb_apex_fused", "fp32"),
    ],
)
@pytest.mark.usefixtures("apex")
def test_embeddings_have_a_rate_of_their_own(optim: str, gradient_precision: str) -> None:
    """The tables move as at three times the rate, and all else as at the rate itself."""

    def masters(factor: float, learning_rate: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        config = dataclasses.replace(
            CONFIG, optim=optim, gradient_precision=gradient_precision, embedding_lr_factor=factor,
            learning_rate=1e-3, muon_learning_rate=1e-2,
        )  # fmt: skip
        optimizer = make_optimizer(flat_parameters(Bert(SIZES), config), config, REFERENCE)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            random_gradients(optimizer, generator)
            assert update(optimizer, learning_rate)
        return optimizer.flat.views(optimizer.flat.master)

    ours, slow, fast = masters(3.0, 2.0**-9), masters(1.0, 2.0**-9), masters(1.0, 3 * 2.0**-9)
    tables = {f"embeddings.{name}" for name in ("word", "position", "token_type")}
    for name, weight in ours.items():
        wanted, other = (fast, slow) if name in tables else (slow, fast)
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-7, msg=name)
        assert not torch.equal(weight, other[name]), name


def test_a_run_from_before_that_rate_goes_on_without_it() -> None:
    saved = {"optim": "adamw"}
    assert check_recipe(saved, {"optim": "adamw", "embedding_lr_factor": 1.0}, "here") == []
    with pytest.raises(UserError, match=r"^embedding_lr_factor = 3\.0 differs from 1\.0 in"):
        check_recipe(saved, {"optim": "adamw", "embedding_lr_factor": 3.0}, "here")


def poison_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """NaN in the gradient of these steps, counted from 1."""
    update = TrainStep.update

    def poisoned(self: TrainStep) -> None:
        if int(self._step) + 1 in steps:
            self.flat.grad[5] = math.nan
        update(self)

    monkeypatch.setattr(TrainStep, "update", poisoned)


def test_skipped_steps_are_counted(
    pretrain: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison_steps(monkeypatch, {3, 4, 6, 7})
    run = pretrain("run", "--max-steps 8")
    shown = capsys.readouterr().err
    assert shown.count("the gradient was not finite, update skipped") == 4
    assert "step 3: the gradient was not finite" in shown
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "skipped_steps" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 3, 4, 4]
    assert ["loss" in row for row in rows] == [True, True, False, False, True, False, False, True]
    state = (run / "checkpoints/step-000008/state.json").read_text()
    assert '"updates": 4' in state and '"skipped": 4' in state


def test_three_in_a_row_stop_the_run(
    pretrain: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison_steps(monkeypatch, set(range(7, 21)))
    run = pretrain("run", exit_code=1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "fastbert: error: the gradient was not finite in 3 steps in a row, up to step 9: start a "
        "new run with a lower --learning-rate; the last good checkpoint is "
        f"{run}/checkpoints/step-000005"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000005"]
