"""The smoke test's judgement, on ops that need no interpreter: right ones pass, wrong ones do not.

That it runs whole on the kernels is shown by test_gpu.py's rehearsal.
"""

import dataclasses
import math

import pytest
import torch

from fastbert.ops import MainGrad, cpu_ops
from fastbert_bench.gpu import smoke as gpu_smoke
from fastbert_bench.gpu.smoke import CHECKS, SHAPES, smoke_cases, table
from fastbert_bench.kernels import checks as kernel_checks
from fastbert_bench.measure.processes import failed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_triton(monkeypatch):
    monkeypatch.setattr(gpu_smoke, "triton_ops", lambda: cpu_ops(False))


def verdicts(name):
    return {row["check"]: row["ok"] for row in CHECKS[name](CPU)}


@pytest.mark.parametrize("name", ["products", "gradients", "graph", "optimizers", "muon"])
def test_what_is_right_passes(name):
    found = verdicts(name)
    assert found and all(ok is not False for ok in found.values())


def wrong_op(monkeypatch, name, change):
    ops = cpu_ops(False)
    op = getattr(ops, name)

    def changed(*args, **named):
        out = op(*args, **named)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    wrong = dataclasses.replace(ops, **{name: changed})
    monkeypatch.setattr(gpu_smoke, "triton_ops", lambda: wrong)


@pytest.mark.parametrize("name", ["attention", "linear_gelu_residual", "gelu_layer_norm"])
def test_a_gradient_that_is_off_is_caught(name, monkeypatch):
    """10% too small in the backward alone: the losses do not show it."""
    wrong_op(monkeypatch, name, lambda out: out * 0.9 + out.detach() * 0.1)
    assert not any(verdicts("gradients").values())


def test_a_main_grad_that_is_off_is_caught(monkeypatch):
    """Only what goes straight to the flat buffer: autograd's own gradients are right."""
    add = MainGrad.add_product

    def off(self, dy, x):
        add(self, dy, torch.where(x > 0, 1.05 * x, x))

    monkeypatch.setattr(MainGrad, "add_product", off)
    found = verdicts("gradients")
    assert [ok for name, ok in found.items() if "main_grad" in name] == [False]
    assert [ok for name, ok in found.items() if "autograd" in name] == [True]
    assert not any(verdicts("products").values())


def test_a_product_that_reads_old_memory_is_caught(monkeypatch):
    monkeypatch.setattr(MainGrad, "_filled", lambda self: 1)
    found = list(CHECKS["products"](CPU))
    assert [row["ok"] for row in found] == [False, False] and math.isnan(found[0]["error"])


def test_an_update_that_is_off_is_caught(monkeypatch):
    ops = cpu_ops(False)

    def late(buffers, hyper):
        ops.adamw_step(buffers, hyper._replace(beta2=hyper.beta2 + 1e-3))

    wrong = dataclasses.replace(ops, adamw_step=late, kernels=True)
    monkeypatch.setattr(gpu_smoke, "triton_ops", lambda: wrong)
    found = verdicts("optimizers")
    assert found["adamw: three updates against plain PyTorch"] is False
    assert found["lamb: three updates against plain PyTorch"] is True


def test_an_update_of_matrices_that_is_off_is_caught(monkeypatch):
    ops = cpu_ops(False)

    def late(buffers, hyper, *, muon, spread=None):
        ops.muon_step(buffers, hyper, muon._replace(momentum=muon.momentum - 1e-2), spread)

    wrong = dataclasses.replace(ops, muon_step=late, kernels=True)
    monkeypatch.setattr(gpu_smoke, "triton_ops", lambda: wrong)
    found = verdicts("muon")
    assert found["muon: 2 updates against torch's, fp32"] is False
    assert found["muon: 2 updates against torch's, AdamW's part"] is True


def test_bits_that_change_are_caught(monkeypatch):
    calls = []

    def jitter(out):
        calls.append(1)
        return out * (1 + 1e-2 * len(calls))

    wrong_op(monkeypatch, "linear_gelu_residual", jitter)
    found = verdicts("graph")
    assert found["1 eager steps twice: the same bits"] is False
    assert found["backward twice: the same bits"] is False


def test_a_check_that_crashes_is_a_failure_and_the_rest_runs(monkeypatch):
    def broken(device):
        yield {"check": "before", "ok": True}
        raise RuntimeError("no such kernel\nmore")

    fine = {"after": lambda device: iter([{"check": "after", "ok": True}])}
    monkeypatch.setattr(gpu_smoke, "CHECKS", {"broken": broken, **fine})
    *_, found = gpu_smoke.measure(CPU)
    assert [row["ok"] for row in found["checks"]] == [True, False, True]
    assert failed(found["checks"]) == ["broken: RuntimeError: no such kernel"]
    assert table(found) == [
        "smoke: 2 of 3 checks hold",
        "  FAILED broken: RuntimeError: no such kernel",
    ]


def test_every_op_of_a_step_has_a_case_on_a_gpu():
    """By the labels; the same cases are compiled ahead."""
    for op, shapes in SHAPES.items():
        cases = list(smoke_cases(op, CPU))
        assert len(cases) >= len(shapes)
        assert all(case.dtype == torch.bfloat16 and not case.deep for case in cases)
    assert SHAPES.keys() == kernel_checks.CASES.keys() - {"linear_gelu"}  # training uses bias_gelu
