"""Muon's kernels against plain PyTorch in fp64, its reference against torch's own optimizers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from fastbert_kernels import muon, reference_optimizer
from fastbert_kernels.muon import Tiles, muon_step, newton_schulz, symmetric_product
from fastbert_kernels.reference_optimizer import (
    Buffers,
    Hyperparameters,
    MuonGroup,
    MuonHyperparameters,
)

# AdamW: a table [0, 496), a decayed matrix up to 700, biases up to 720. Then matrices, and gaps.
BEGIN, P = 720, 4096
GROUPS = (MuonGroup(24, 40, (720, 2720)), MuonGroup(32, 17, (1696,)))
HYPER = Hyperparameters(700, weight_decay=0.1, embedding_end=496, embedding_lr_factor=2.0)
MUON = MuonHyperparameters(BEGIN, GROUPS, lr_ratio=3.0, ns_steps=2, dtype=torch.float32)
SHAPES = [(1, 1, 1), (2, 17, 33), (3, 64, 64), (1, 33, 130), (2, 130, 17)]


def of_matrices() -> Tensor:
    """(P,) bool: what Muon updates."""
    mine = torch.zeros(P, dtype=torch.bool)
    for rows, columns, starts in GROUPS:
        for start in starts:
            mine[start : start + rows * columns] = True
    return mine


def state(weights: torch.dtype | None = torch.float16) -> dict[str, Any]:
    master = torch.randn(P)
    return {
        "master": master,
        "exp_avg": torch.zeros(P),
        "exp_avg_sq": torch.zeros(BEGIN),
        "weights": None if weights is None else master.to(weights),
        "lr": torch.tensor(0.02),
        "step": torch.tensor(0),
        "skipped": torch.tensor(0),
        "grad_scale": torch.tensor(8.0),
        "grad_norm": torch.tensor(torch.nan),
    }


def copied(buffers: dict[str, Any], wide: bool = False) -> dict[str, Any]:
    return {
        name: t if t is None else t.double() if wide and t.is_floating_point() else t.clone()
        for name, t in buffers.items()
    }


def near(found: Tensor, plain: Tensor, want: Tensor) -> None:
    """Ours may err twice as much as PyTorch in the same dtype, and two roundings."""
    assert found.shape == want.shape and found.dtype == plain.dtype
    rounding = 2 * torch.finfo(plain.dtype).eps * want.abs().max()
    assert (found - want).abs().max() <= 2 * (plain - want).abs().max() + rounding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("poisoned")
def test_symmetric_product(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    gram = torch.randn(shape[0], shape[1], shape[1]).to(dtype)
    gram = gram + gram.mT
    oracle = reference_optimizer.symmetric_product
    for call in (
        {"x": x},
        {"x": x.mT.contiguous(), "transposed": True, "alpha": -0.5},
        {"x": x, "add": gram, "alpha": 2.0, "beta": -3.0},
    ):
        wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in call.items()}
        found = symmetric_product(**call)
        near(found, oracle(**call), oracle(**wide))
        assert torch.equal(found, found.mT)


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.usefixtures("poisoned")
def test_every_tile_is_computed_once(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added above the diagonal is not read: each value below it is stored twice."""
    monkeypatch.setitem(muon.TILES, (90, True), Tiles(16, 16, 4, 1))
    x, add = torch.randn(2, 16 * n - 5, 16).half(), torch.randn(2, 16 * n - 5, 16 * n - 5).half()
    programs: list[int] = []
    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, grid: tuple[int], **kwargs: Any) -> Any:
        programs.append(grid[0])
        return run(self, *args, grid=grid, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    found = symmetric_product(x, add=add, beta=1.0)
    assert programs == [2 * n * (n + 1) // 2]
    want = (x.double() @ x.double().mT + add.double()).tril()
    want += want.tril(-1).mT
    near(found, want.half(), want)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize(("rows", "columns"), [(20, 70), (70, 20), (33, 33), (1, 8)])
@pytest.mark.usefixtures("poisoned")
def test_newton_schulz(rows: int, columns: int) -> None:
    x = torch.randn(3, rows, columns)
    x[1] = 0.0
    found, plain, want = (
        newton_schulz(x),
        reference_optimizer.newton_schulz(x),
        reference_optimizer.newton_schulz(x.double()),
    )
    near(found, plain, want)
    assert not found[1].any()
    singular = torch.linalg.svdvals(found[0])
    assert singular.max() < 1.3
    if rows != columns:  # a square one has a singular value near 0
        assert singular.min() > 0.6


@pytest.mark.parametrize(
    ("changes", "grad_dtype"),
    [
        ({"weight_decay": 0.1, "ns_steps": 5}, torch.float32),
        ({"nesterov": False, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}, torch.float16),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_muon_over_some_steps(changes: dict[str, Any], grad_dtype: torch.dtype) -> None:
    """Some are clipped; one holds an inf and changes nothing."""
    settings = MUON._replace(**changes)
    found = state()
    first, want = copied(found), copied(found, wide=True)
    gaps = ~of_matrices()
    gaps[:BEGIN] = False
    for i in range(4):
        grad = (torch.randn(P) * (0.1 if i % 2 else 0.01)).to(grad_dtype)
        if i == 1:
            grad[3000] = torch.inf
        before = copied(found)
        muon_step(Buffers(grad=grad, **found), HYPER, settings)
        wide = settings._replace(dtype=torch.float64)
        reference_optimizer.muon_step(Buffers(grad=grad, **want), HYPER, wide)
        if i == 1:
            assert not found["grad_norm"].isfinite() and found["skipped"] == 1
            for name in ("master", "exp_avg", "exp_avg_sq", "weights", "step"):
                assert torch.equal(found[name], before[name]), name
            continue
        for name in ("exp_avg", "exp_avg_sq", "grad_norm"):
            assert torch.allclose(found[name].double(), want[name], rtol=1e-5, atol=1e-8), name
        change, wanted = found["master"] - first["master"], want["master"] - first["master"]
        assert (change - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert torch.equal(found["weights"][~gaps], found["master"][~gaps].half())
    assert found["step"] == 3
    for name in ("master", "exp_avg", "weights"):
        assert torch.equal(found[name][gaps], first[name][gaps]), name


def test_without_adamw_and_without_rounded_weights() -> None:
    found = state(None)
    found["exp_avg_sq"] = torch.zeros(0)
    want = copied(found, wide=True)
    grad, alone = torch.randn(P), MUON._replace(begin=0, groups=GROUPS[1:])
    muon_step(Buffers(grad=grad, **found), HYPER, alone)
    oracle = alone._replace(dtype=torch.float64)
    reference_optimizer.muon_step(Buffers(grad=grad, **want), HYPER, oracle)
    assert (found["master"] - want["master"]).abs().max() < 1e-5


def test_spread_is_given_each_group() -> None:
    shapes: list[tuple[int, ...]] = []

    def half(orthogonalize: Any, x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return torch.cat([orthogonalize(part.contiguous()) for part in x.split(1)]) / 2

    spread, whole = state(), state()
    whole["master"].copy_(spread["master"])
    grad = torch.randn(P)
    muon_step(Buffers(grad=grad, **spread), HYPER, MUON, half)
    twice = MUON._replace(lr_ratio=MUON.lr_ratio / 2)
    muon_step(Buffers(grad=grad, **whole), HYPER, twice)
    assert shapes == [(len(g.starts), g.rows, g.columns) for g in GROUPS]
    assert torch.allclose(spread["master"], whole["master"], atol=1e-6)
    with pytest.raises(ValueError, match="muon_step: spread's result has shape"):
        muon_step(Buffers(grad=grad, **whole), HYPER, MUON, lambda f, x: x[:1])


def test_how_many_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of matrices; of PyTorch's own, a norm and a product a step."""
    launches: list[object] = []
    buffers = Buffers(grad=torch.randn(P), **state())
    muon_step(buffers, HYPER, MUON)
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: launches.append(args))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        muon_step(buffers, HYPER, MUON)
    assert len(launches) == 3 + len(GROUPS) * (2 + 2 * MUON.ns_steps)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert not {"aten::item", "aten::_local_scalar_dense"} & counts.keys()
    assert counts["aten::baddbmm"] == len(GROUPS) * MUON.ns_steps
    assert counts["aten::linalg_vector_norm"] == counts["aten::div"] == len(GROUPS)


def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    x, starts, scalars = torch.randn(2, 8, 12), [16, 128], torch.ones(5)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (muon._symmetric_product, (x, False, None, 1.0, 0.0)),
        (muon._symmetric_product, (x, True, torch.randn(2, 12, 12), 1.0, 0.0)),
        (
            muon._momentum,
            (torch.randn(256), torch.randn(256), scalars, starts, 8, 12, 0.9, True, torch.float16),
        ),
        (
            muon._apply,
            (torch.randn(256), torch.randn(256).half(), x, scalars, starts, 1.0, 1.0, 0.0),
        ),
    ]
    for op, call in calls:
        torch.library.opcheck(op, call, test_utils=tests)


def test_compiles_without_a_graph_break() -> None:
    grad, found = torch.randn(P), state()
    want, short = copied(found), MUON._replace(groups=GROUPS[1:], ns_steps=1)

    def step(grad: Tensor, buffers: dict[str, Any]) -> None:
        muon_step(Buffers(grad=grad, **buffers), HYPER, short)

    step(grad, want)
    torch.compile(step, backend="aot_eager", fullgraph=True)(grad, found)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_bad_arguments() -> None:
    good = Buffers(grad=torch.zeros(P), **state())
    long = good._replace(exp_avg_sq=torch.zeros(P))
    cases: list[tuple[Buffers, dict[str, Any], str]] = [
        (long, {}, r"muon_step: exp_avg_sq has shape \(4096,\), expected \(720\)"),
        (good, {"dtype": torch.int32}, "muon_step: dtype = torch.int32"),
        (good, {"adjust_lr_fn": "none"}, "adjust_lr_fn = 'none' must be"),
    ]
    for starts, why in (
        ((), "no matrices of 8 x 8"),
        ((704,), r"\(704, 768\) is not between 720 and 4096"),
        ((4048,), r"\(4048, 4112\) is not between 720 and 4096"),
        ((736, 752), r"\(752, 816\) is not between 800 and 4096"),
        ((724,), "a matrix starts at 724, no multiple of 16"),
    ):
        cases.append((good, {"groups": (MuonGroup(8, 8, starts),)}, f"muon_step: .*{why}"))
    for buffers, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            muon_step(buffers, HYPER, MUON._replace(**changes))


# The reference


@pytest.mark.parametrize(
    ("changes", "rounded"),
    [
        ({}, False),
        ({"nesterov": False, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}, False),
        ({}, True),
    ],
)
def test_the_reference_is_torchs_muon_and_adamw(
    changes: dict[str, Any], rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch orthogonalizes in bf16 only: in fp32, once its rounding does nothing."""
    if not rounded:
        monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # it divides its copy in place
    dtype = torch.bfloat16 if rounded else torch.float32
    settings = MUON._replace(dtype=dtype, ns_steps=5, **changes)
    ours = state(None)
    ours["master"].mul_(of_matrices() | (torch.arange(P) < BEGIN))
    first = ours["master"].clone()

    def parts(flat: Tensor) -> list[Tensor]:
        adamw = [flat[0:496], flat[496:700], flat[700:BEGIN]]
        return adamw + [
            flat[start : start + rows * columns].view(rows, columns)
            for rows, columns, starts in GROUPS
            for start in starts
        ]

    theirs = [torch.nn.Parameter(part.clone()) for part in parts(first)]
    matrices = theirs[3:]
    adamw = torch.optim.AdamW(
        [
            {"params": theirs[:1], "lr": 0.04, "weight_decay": 0.1},
            {"params": theirs[1:2], "weight_decay": 0.1},
            {"params": theirs[2:3], "weight_decay": 0.0},
        ],
        lr=0.02,
        eps=1e-6,
    )
    torchs = torch.optim.Muon(
        matrices,
        lr=0.06,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        adjust_lr_fn=settings.adjust_lr_fn,
    )
    for i in range(10):
        grad = torch.randn(P) * (first != 0) * (0.1 if i % 2 else 0.01)
        for parameter, part in zip(theirs, parts(grad), strict=True):
            parameter.grad = part / 8.0
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        adamw.step()
        torchs.step()
        reference_optimizer.muon_step(Buffers(grad=grad, **ours), HYPER, settings)
        assert torch.allclose(ours["grad_norm"], norm)
    for mine, parameter, before in zip(
        parts(ours["master"]), theirs, parts(first), strict=True
    ):  # fmt: skip
        change, wanted = mine - before, parameter.detach() - before
        atol = 1e-5 if not rounded or parameter.dim() == 1 else 0.02 * float(wanted.abs().max())
        assert torch.allclose(change, wanted, atol=atol, rtol=0)
