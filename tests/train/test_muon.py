"""Muon in the trainer: against torch.optim.Muon, resumed, in bf16, recorded, in two processes."""

import dataclasses
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbert.config import PRESETS, ModelConfig, PretrainConfig
from fastbert.errors import UserError
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE, cpu_ops
from fastbert.train import muon
from fastbert.train.device import check_memory
from fastbert.train.graph import GraphedStep
from fastbert.train.optimizer import described, flat_parameters, make_optimizer
from fastbert.train.schedule import learning_rate
from fastbert.train.step import TrainStep

from .test_graph import Repeat
from .test_graph import batches as graph_batches
from .test_step import SIZES, packed, sequences

MUON = PretrainConfig(
    optim="muon", learning_rate=2e-3, warmup_steps=2, max_steps=8, weight_decay=0.1,
    muon_learning_rate=0.02, muon_weight_decay=0.05,
)  # fmt: skip
CPU = torch.device("cpu")


def build(config: PretrainConfig = MUON, sizes: ModelConfig = SIZES) -> TrainStep:
    torch.manual_seed(3)
    return TrainStep(Bert(sizes), config)


def batches(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [[packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)] for _ in range(count)]


def masters(step: TrainStep) -> dict[str, torch.Tensor]:
    return step.flat.views(step.flat.master)


def alike(one: TrainStep, other: TrainStep) -> None:
    assert torch.equal(one.flat.master, other.flat.master)
    for mine, theirs in zip(one.optimizer.moments, other.optimizer.moments, strict=True):
        assert torch.equal(mine, theirs)


# The layout


def test_matrices_lie_behind_everything_else() -> None:
    flat, plain = build().flat, build(dataclasses.replace(MUON, optim="adamw")).flat
    behind = {
        name for name, (start, _) in zip(flat.names, flat.spans, strict=True)
        if start >= flat.last_begin
    }  # fmt: skip
    ours = {
        f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("qkv", "attention_out", "up", "down")
    }
    assert behind == ours | {"mlm.transform.weight"}
    assert flat.names[:3] == [f"embeddings.{n}" for n in ("word", "position", "token_type")]
    assert flat.embedding_end == plain.embedding_end == flat.spans[3][0]
    assert plain.last_begin == len(plain.master) == len(flat.master)
    assert len(build().optimizer.exp_avg_sq) == flat.last_begin < flat.spans[-1][0]


@pytest.mark.parametrize("split", [True, False])
def test_groups_are_what_the_sizes_say(split: bool) -> None:
    flat = build().flat
    found = muon.groups(flat, split)
    assert {(rows, columns): len(starts) for rows, columns, starts in found} == muon.shapes(
        SIZES, split
    )
    elements = sum(rows * columns * len(starts) for rows, columns, starts in found)
    assert elements == muon.num_parameters(SIZES) == len(flat.master) - flat.last_begin
    every = sorted(start for group in found for start in group.starts)
    assert every[0] == flat.last_begin and len(set(every)) == len(every)


# The update


def oracle(config: PretrainConfig, steps: list[Any]) -> dict[str, torch.Tensor]:
    """torch's Muon, AdamW and clipping, on weights of their own; gradients are a step's."""
    source = build(config)
    theirs = {n: v.clone().requires_grad_() for n, v in masters(source).items()}
    taken, parts = muon.names(source.model), {}
    for name in taken:
        parts[name] = [theirs[name]]
        if config.muon_split_qkv and "qkv" in name:  # three parameters, each of its own
            parts[name] = [part.detach().clone().requires_grad_() for part in theirs[name].chunk(3)]
    matrices = [part for name in taken for part in parts[name]]
    rest = [n for n in theirs if n not in taken]
    tables = [theirs[n] for n in rest if n.startswith("embeddings.") and theirs[n].dim() > 1]
    others = [theirs[n] for n in rest if not any(theirs[n] is table for table in tables)]
    peak = config.learning_rate
    adamw = torch.optim.AdamW(
        [
            {"params": tables, "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon,
    )  # fmt: skip
    rule = torch.optim.Muon(
        matrices, weight_decay=config.muon_weight_decay, momentum=config.muon_momentum,
        nesterov=config.muon_nesterov, adjust_lr_fn=config.muon_adjust_lr_fn,
    )  # fmt: skip
    for index, step in enumerate(steps):
        source.set_weights({n: torch.cat([*parts.get(n, [w])]).detach() for n, w in theirs.items()})
        source.begin(step)
        source.flat.forget_gradients()
        source.accumulate(step[0])
        for name, gradient in source.flat.views(source.flat.grad).items():
            pieces = parts.get(name, [theirs[name]])
            for piece, one in zip(pieces, gradient.chunk(len(pieces)), strict=True):
                piece.grad = one.clone()
        every = [*matrices, *(theirs[n] for n in rest)]
        torch.nn.utils.clip_grad_norm_(every, config.max_grad_norm)
        rate = learning_rate(config, index)
        for group, factor in zip(
            adamw.param_groups, (config.embedding_lr_factor, 1, 1), strict=True
        ):
            group["lr"] = rate * factor
        rule.param_groups[0]["lr"] = rate / peak * config.muon_learning_rate
        adamw.step()
        rule.step()
    return {n: torch.cat([*parts.get(n, [w])]).detach() for n, w in theirs.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"muon_split_qkv": False, "muon_nesterov": False, "embedding_lr_factor": 3.0},
        {"muon_adjust_lr_fn": "match_rms_adamw", "muon_weight_decay": 0.0, "max_grad_norm": 0.5},
    ],
)
def test_weights_are_those_of_torchs_muon_and_adamw(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, steps = dataclasses.replace(MUON, **changes), batches(6)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Muon in fp32
    wanted = oracle(config, steps)
    monkeypatch.undo()
    step, start = build(config), {n: w.clone() for n, w in masters(build(config)).items()}
    for one in steps:
        step(one)
    for name, weight in masters(step).items():
        assert (weight - wanted[name]).abs().max() < 1e-5, name
        assert (weight - start[name]).abs().max() > 1e-3, name
    assert step.read().updates == 6


def test_bf16_gradients_and_weights() -> None:
    """The reference, on rounded gradients, lands where the fused form does."""
    half = dataclasses.replace(MUON, gradient_precision="bf16")
    torch.manual_seed(3)
    narrow, wide = TrainStep(Bert(SIZES), half, torch.bfloat16), build()
    for one in batches(4):
        narrow(one)
        wide(one)
    assert narrow.flat.grad.dtype == torch.bfloat16
    assert torch.equal(narrow.flat.weights, narrow.flat.master.bfloat16())
    moved = (wide.flat.master - build().flat.master).norm()
    assert 0 < (narrow.flat.master - wide.flat.master).norm() < 0.2 * moved


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    step, (first, second) = build(), batches(2)
    step(first)
    before = [t.clone() for t in (step.flat.master, *step.optimizer.moments)]
    step.begin(second)
    step.flat.forget_gradients()
    step.accumulate(second[0])
    step.flat.views(step.flat.grad)["layers.1.up.weight"][3, 5] = torch.inf
    step.update()
    for now, then in zip((step.flat.master, *step.optimizer.moments), before, strict=True):
        assert torch.equal(now, then)
    assert step.read().skipped == 1 and step.read().updates == 1


def test_a_learning_rate_that_fp32_cannot_scale_is_refused() -> None:
    """Where their ratio were inf in fp32, warm-up's first step would be 0 x inf."""
    said = r"^learning_rate = 1e-40 must be at least 2e-22 beside muon_learning_rate = 0\.02"
    with pytest.raises(UserError, match=said):
        build(dataclasses.replace(MUON, learning_rate=1e-40))
    step = build(dataclasses.replace(MUON, learning_rate=2e-22))
    start = step.flat.master.clone()
    for one in batches(2):  # the first at a rate of 0
        step(one)
    moved = step.flat.master - start
    assert moved[: step.flat.last_begin].abs().max() < 1e-20 and moved.isfinite().all()
    assert moved[step.flat.last_begin :].abs().max() > 1e-3


def test_recorded_steps_are_the_eager_ones() -> None:
    eager, recorded = build(), build()
    graphed = GraphedStep(recorded, False, Repeat())
    for one in graph_batches(5, 1):
        eager(one)
        graphed(one)
    alike(eager, recorded)


# Checkpoints


@pytest.mark.usefixtures("undrawn")
def test_killed_and_resumed_ends_with_the_same_bits(
    pretrain: Callable[..., Path], resume: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--optim muon --max-steps 8 --save-steps 4 --eval-steps 0"
    whole = pretrain("whole", options)
    assert "optimizer: Muon for 13 matrices (0.0M parameters; q, k, v each; plain PyTorch), " in (
        capsys.readouterr().err
    )
    pretrain("parts", f"{options} --stop-at-step 4")
    resume("parts")
    for name in ("weights.safetensors", "optimizer.safetensors"):
        one, other = (
            load_file(run / "checkpoints/step-000008" / name)
            for run in (whole, whole.parent / "parts")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert "exp_avg.layers.0.up.weight" in one and "exp_avg_sq.layers.0.up.weight" not in one
    assert "exp_avg_sq.layers.0.up.bias" in one and "exp_avg_sq.embeddings.word" in one
    resume("parts", "--resume auto --optim adamw", exit_code=2)
    assert "optim = 'adamw' differs from 'muon'" in capsys.readouterr().err.splitlines()[-1]


def test_a_state_of_another_optim_is_refused_by_name() -> None:
    step, other = build(), build(dataclasses.replace(MUON, optim="lamb"))
    for one in batches(1):
        step(one)
    with pytest.raises(UserError, match=r"^optim = 'lamb' needs exp_avg_sq\.layers\.0\.qkv\.wei"):
        other.load_state_dict(step.state_dict())
    again = build()
    again.load_state_dict(step.state_dict())
    alike(step, again)


# Processes


def _in_one_of(count: int, rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count
    )
    torch.save(_updated(torch.distributed.group.WORLD), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _updated(group: Any) -> torch.Tensor:
    torch.manual_seed(3)
    model = Bert(ModelConfig(61, 32, 2, 2, 48, max_position_embeddings=16))
    flat = flat_parameters(model, MUON)
    optimizer = make_optimizer(flat, MUON, REFERENCE, group)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for view in flat.views(flat.grad).values():
            view.copy_(torch.randn(view.shape, generator=generator))
        optimizer.lr.fill_(1e-2)
        optimizer.update(torch.ones(()))
    return flat.master


@pytest.mark.parametrize("count", [2, 3])
def test_processes_divide_the_matrices_and_change_no_bit(count: int, tmp_path: Path) -> None:
    """9 matrices of H x H and 2 of each other shape: of 3 processes, one has none of those."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    every = [
        context.Process(target=_in_one_of, args=(count, rank, str(tmp_path)))
        for rank in range(count)
    ]
    for process in every:
        process.start()
    for process in every:
        process.join(60)
        assert process.exitcode == 0
    alone = _updated(None)
    for rank in range(count):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone)


# What it costs


def test_flops_are_those_of_the_papers_sums() -> None:
    """1.63 and 1.52 TFLOP at base, 7.73 and 7.22 at large: of the layers, beside the transform."""
    for name, split, wanted in (
        ("base", True, 1.631), ("base", False, 1.522), ("large", True, 7.731),
        ("large", False, 7.216),
    ):  # fmt: skip
        sizes = PRESETS[name]
        transform = 5 * 6 * sizes.hidden_size**3
        assert muon.newton_schulz_flops(sizes, split) - transform == pytest.approx(
            wanted * 1e12, rel=1e-3
        )
    assert muon.newton_schulz_flops(PRESETS["base"], ns_steps=10) == 2 * muon.newton_schulz_flops(
        PRESETS["base"]
    )


def test_memory_knows_of_one_moment_and_of_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(**changes: Any) -> str:
        with pytest.raises(UserError) as raised:
            check_memory(PretrainConfig(**changes), PRESETS["base"], CPU, torch.float32)
        return str(raised.value)

    room = "fastbert.train.device.free_memory"
    monkeypatch.setattr(room, lambda device: 2**30)
    assert "x 16 bytes of weights" in refusal()
    assert "needs 1.3 GiB (110.1M parameters x 12.9 bytes of weights" in refusal(optim="muon")
    scratch = muon.scratch_bytes(PRESETS["base"], True, 4)
    assert scratch == 4 * 49 * 4 * 768**2
    state = 16 * PRESETS["base"].num_parameters() - 4 * muon.num_parameters(PRESETS["base"])
    small = PretrainConfig(optim="muon", tokens_per_batch=128, max_seq_length=8)
    monkeypatch.setattr(room, lambda device: state + scratch)
    check_memory(small, PRESETS["base"], CPU, torch.float32)
    monkeypatch.setattr(room, lambda device: state + scratch - 1)
    with pytest.raises(UserError, match=r"needs 0\.4 GiB a step"):
        check_memory(small, PRESETS["base"], CPU, torch.float32)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "AdamW (torch's, fused)"),
        ({"gradient_precision": "bf16"}, "AdamW (plain PyTorch)"),
        ({"optim": "lamb", "embedding_lr_factor": 3.0},
         "LAMB (plain PyTorch), embedding tables at 3 x its rate"),
        ({"optim": "adamw_apex_fused"}, "AdamW (apex's, fused)"),
        ({"optim": "muon", "muon_split_qkv": False},
         "Muon for 49 matrices (85.5M parameters; q, k, v joined; plain PyTorch), AdamW for the "
         "rest (torch's, fused)"),
    ],
)  # fmt: skip
def test_a_run_says_its_optimizer(changes: dict[str, Any], line: str) -> None:
    assert described(PretrainConfig(**changes), PRESETS["base"], cpu_ops(False)) == line
