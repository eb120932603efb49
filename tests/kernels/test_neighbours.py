"""How the kernel library behaves where it cannot run: one clear line, before any launch."""

import dataclasses
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.runtime.interpreter
from torch import Tensor

from fastbert_kernels import (
    attention,
    cross_entropy,
    embedding,
    gelu,
    layer_norm,
    linear,
    mask,
    muon,
    optimizer,
    reference,
    reference_optimizer,
)
from fastbert_kernels.cpu import CpuOps
from fastbert_kernels.reference_optimizer import (
    Buffers,
    Hyperparameters,
    MuonGroup,
    MuonHyperparameters,
)

ROOT = Path(__file__).parent.parent.parent
LIBRARY = ROOT / "kernels" / "fastbert_kernels"
R, H, V, P = 3, 16, 5, 64
SEED = torch.tensor([1, 2, 3])


def row() -> Tensor:
    return torch.zeros(H)


def rows(count: int = R) -> Tensor:
    return torch.zeros(count, H)


def ids() -> Tensor:
    return torch.zeros(R, dtype=torch.int64)


def by_name(step: Callable[..., None]) -> Callable[..., None]:
    """An update that is told its buffers one by one, like other ops."""

    @functools.wraps(step)
    def named(**given: Any) -> None:
        buffers = Buffers(**{name: given.pop(name) for name in Buffers._fields})
        step(buffers, Hyperparameters(decay_end=P, weight_decay=0.1), **given)

    return named


UPDATE = {
    "master": torch.zeros(P),
    "grad": torch.zeros(P),
    "exp_avg": torch.zeros(P),
    "exp_avg_sq": torch.zeros(P),
    "weights": torch.zeros(P).half(),
    **{name: torch.tensor(1.0) for name in ("lr", "grad_scale", "grad_norm")},
    **{name: torch.tensor(0) for name in ("step", "skipped")},
}
DROPOUT = {"eps": 1e-5, "dropout_p": 0.1, "seed": SEED, "stream": 1}
# Every public op and a call that it takes.
OPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "attention": (
        attention.attention,
        {"qkv": torch.zeros(9, 3, 2, 32), "cu_seqlens": torch.tensor([0, 4, 9]).int()}
        | {"max_seqlen": 6, "dropout_p": 0.1, "seed": SEED, "stream": 0},
    ),
    "dropout_add_layer_norm": (
        layer_norm.dropout_add_layer_norm,
        {"x": rows(), "bias": row(), "residual": rows(), "weight": row(), "beta": row()} | DROPOUT,
    ),
    "bias_gelu": (gelu.bias_gelu, {"x": rows(), "bias": row()}),
    "gelu_backward": (gelu.gelu_backward, {"dy": rows(), "x": rows(), "bias": row()}),
    "gelu_layer_norm": (
        gelu.gelu_layer_norm,
        {"x": rows(), "bias": row(), "weight": row(), "beta": row(), "eps": 1e-5},
    ),
    "linear_gelu": (linear.linear_gelu, {"x": rows(), "weight": rows(8), "bias": torch.zeros(8)}),
    "linear_cross_entropy": (
        cross_entropy.linear_cross_entropy,
        {"x": rows(), "weight": rows(V), "bias": torch.zeros(V), "labels": ids()},
    ),
    "embed_layer_norm": (
        embedding.embed_layer_norm,
        {"input_ids": ids(), "token_type_ids": ids(), "position_ids": ids()}
        | {"word": rows(V), "token_type": rows(2), "position": rows(4)}
        | {"weight": row(), "beta": row(), "pad_token_id": 0}
        | DROPOUT,
    ),
    "adamw_step": (by_name(optimizer.adamw_step), UPDATE),
    "lamb_step": (
        by_name(optimizer.lamb_step),
        UPDATE | {"table": optimizer.lamb_table([(0, 16), (16, 60)], "cpu")},
    ),
    "symmetric_product": (
        muon.symmetric_product,
        {"x": torch.zeros(2, R, H), "add": torch.zeros(2, R, R)},
    ),
    "muon_step": (
        by_name(muon.muon_step),
        UPDATE
        | {"exp_avg_sq": torch.zeros(32)}
        | {"muon": MuonHyperparameters(32, (MuonGroup(2, 8, (32, 48)),), dtype=torch.float16)},
    ),
    "mask_tokens": (
        mask.mask_tokens,
        {"input_ids": ids(), "is_special": torch.zeros(V, dtype=torch.bool), "seed": SEED}
        | {"mlm_probability": 0.15, "mask_id": 4},
    ),
}
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    r"{name} has shape": lambda t: t[None],
    r"{name} is torch\.": lambda t: t.to(torch.complex64),
    r"(?:{name} is|these are) on meta": lambda t: t.to("meta"),
    r"{name} is not contiguous": lambda t: torch.stack((t, t), -1)[..., 0],
}
ARGUMENTS = [
    (op, name) for op, (_, good) in OPS.items() for name, t in good.items() if isinstance(t, Tensor)
]


@pytest.mark.parametrize("fault", FAULTS, ids=("shape", "dtype", "device", "layout"))
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_wrong_tensor_is_refused_before_any_launch(
    op: str, name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, good = OPS[op]
    if good[name].dim() == 0 and "contiguous" in fault:
        return  # a single number always is
    with pytest.raises(ValueError, match=f"^{op}: .*{fault.format(name=name)}") as error:
        refuse(monkeypatch, function, **(good | {name: FAULTS[fault](good[name])}))
    assert "\n" not in str(error.value)


def refuse(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], **call: Any) -> None:
    """Calls an op that may launch nothing."""

    def launch(*args: object, **kwargs: object) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(triton.runtime.interpreter.InterpretedFunction, "run", launch)
    function(**call)


@pytest.mark.parametrize("field", ["bounds", "parameter", "first_block"])
def test_a_wrong_table_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, good = OPS["lamb_step"]
    for fault, spoil in FAULTS.items():
        table = dataclasses.replace(good["table"], **{field: spoil(getattr(good["table"], field))})
        with pytest.raises(ValueError, match=f"lamb_step: {fault.format(name=f'table.{field}')}"):
            refuse(monkeypatch, function, **(good | {"table": table}))


@pytest.mark.parametrize("op", OPS)
def test_the_good_calls_are_good(op: str) -> None:
    function, good = OPS[op]
    function(**{n: t.clone() if isinstance(t, Tensor) else t for n, t in good.items()})


SEQUENCES = {
    "starts at 1": ([1, 9], 9),
    r"falls at sequences \[1\]": ([0, 5, 3, 9], 9),
    "ends at 10, beyond 9 tokens": ([0, 10], 10),
    "more than max_seqlen = 8": ([0, 9], 8),
    "holds no sequence": ([0], 9),
}


@pytest.mark.parametrize("message", SEQUENCES)
@pytest.mark.parametrize(
    "op", [attention.attention, reference.attention, CpuOps(False).attention],
    ids=("kernel", "reference", "cpu"),
)  # fmt: skip
def test_sequences_that_do_not_fit_are_refused(op: Callable[..., Tensor], message: str) -> None:
    bounds, S = SEQUENCES[message]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        op(torch.zeros(9, 3, 2, 32), cu_seqlens, S, 0.1, SEED, 0)


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, without the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT / "kernels"), str(Path(__file__).parent)))
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )


def test_without_a_gpu_each_op_names_the_reference_to_use() -> None:
    """On CPU tensors and without the interpreter."""
    found = python(
        "import test_neighbours as t\n"
        "for name, (op, good) in t.OPS.items():\n"
        "    try: op(**good)\n"
        "    except ValueError as error: print(error)\n"
    )
    lines = found.stdout.splitlines()
    assert len(lines) == len(OPS), found.stderr
    for op, line in zip(OPS, lines, strict=True):
        assert line.startswith(f"{op}: the Triton kernel needs CUDA tensors, these are on cpu: ")
        named = re.search(r"use fastbert_kernels\.(\w+)\.(\w+), or set TRITON_INTERPRET=1", line)
        assert named, line
        assert callable(getattr(importlib.import_module(f"fastbert_kernels.{named[1]}"), named[2]))


def test_without_triton_an_import_says_what_to_do() -> None:
    need = [p.stem for p in sorted(LIBRARY.glob("*.py")) if "@triton.jit" in p.read_text()]
    found = python(
        "import importlib, sys\n"
        "import fastbert_kernels\n"
        "from fastbert_kernels import cpu, reference, reference_optimizer\n"
        "assert 'triton' not in sys.modules\n"
        "sys.modules['triton'] = None\n"
        f"for name in {need}:\n"
        "    try: importlib.import_module(f'fastbert_kernels.{name}')\n"
        "    except ImportError as error: print(error)\n"
    )
    lines = found.stdout.splitlines()
    assert len(lines) == len(need) > 8, found.stderr
    for line in lines:
        assert "pip install triton, or use the op of the same name in" in line


OWN = {
    "attention": {"backend", "precision", "check"},
    "linear_gelu": {"backend"},
    "linear_cross_entropy": {"chunk_rows"},
}


@pytest.mark.parametrize("op", sorted(OPS.keys() - {"gelu_backward"}))
def test_a_kernel_is_called_like_its_reference(op: str) -> None:
    ours = dict(inspect.signature(OPS[op][0]).parameters)
    oracle = getattr(reference, op, None) or getattr(reference_optimizer, op)
    theirs = dict(inspect.signature(oracle).parameters)
    if op == "lamb_step":  # made of the spans once
        ours["spans"] = ours.pop("table")
    assert OWN.get(op, set()) == ours.keys() - theirs.keys()
    ours = {name: parameter for name, parameter in ours.items() if name in theirs}
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize("stream", [-1, 4])
def test_a_layer_has_four_draws(stream: int) -> None:
    """A fifth would draw the next layer's bits."""
    calls: list[Callable[[], Tensor]] = [
        lambda: attention.attention(
            torch.zeros(R, 3, 1, 32), torch.tensor([0, R], dtype=torch.int32), R, 0.1, SEED, stream
        ),
        lambda: layer_norm.dropout_add_layer_norm(
            rows(), row(), rows(), row(), row(), 1e-5, 0.1, SEED, stream
        ),
        lambda: embedding.embed_layer_norm(
            ids(), ids(), ids(), rows(V), rows(2), rows(V), row(), row(), 0, 1e-5, 0.1, SEED, stream
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"stream = {stream}, expected 0, 1, 2 or 3"):
            call()
