"""`fastbert bench kernels`: real rounds on a CPU, the GPU's stage rehearsed, and a wrong op."""

import dataclasses
import json
import statistics

import pytest
import torch

from benchmarks import bench_kernels, kernels
from benchmarks import result as results
from fastbert import config
from fastbert.cli import main
from fastbert.errors import RunError
from fastbert.ops import cpu_ops


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(bench_kernels, "can_compile", lambda device: False)


@pytest.mark.usefixtures("no_compiler")
def test_every_op_is_timed_or_says_why_not(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--device", "cpu", "--quick", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    results.check(result)
    rows = {(row["op"], row["direction"], row["contender"]): row for row in result["rows"]}
    missing = {one["name"]: one["why"] for one in result["missing"]}
    for cost in kernels.COSTS:
        absent = missing.get(f"{cost.op} {cost.direction}, ours")
        assert (absent is None) == ((cost.op, cost.direction, "ours") in rows)
        row = next(r for key, r in rows.items() if key[:2] == (cost.op, cost.direction))
        assert row["bytes"] == cost.bytes_of(row["sizes"]) > 0
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] and len(row["rounds_ms"]) == 3
        assert row["name"] in printed
    ours, eager = (rows["attention", "backward", name] for name in ("ours", "eager"))
    pairs = [theirs / mine for theirs, mine in zip(eager["rounds_ms"], ours["rounds_ms"])]  # noqa: B905
    assert eager["ratio"] == pytest.approx(sorted(pairs)[1]) and ours["ratio"] == 1
    assert "see linear_gelu" in missing["bias_gelu forward, ours"]
    assert "C++ compiler" in missing["attention forward, compile"]
    assert rows["bias_gelu", "forward", "eager"]["compared_with"] == "reference"


def test_the_compiled_reference_is_a_peer():
    found = bench_kernels.on_cpu(["bias_gelu"], quick=True)
    names = [row["contender"] for row in found["rows"]]
    assert names == 2 * ["reference", "eager", "compile"]


@pytest.mark.usefixtures("no_compiler")
def test_an_op_that_computes_something_else_is_not_timed(monkeypatch):
    right = cpu_ops(False)

    def wrong(*args):
        return right.gelu_layer_norm(*args) * 1.001

    broken = dataclasses.replace(right, gelu_layer_norm=wrong)
    monkeypatch.setattr(bench_kernels, "cpu_ops", lambda compiled: broken)
    with pytest.raises(RunError, match="gelu_layer_norm by ours and by reference differ by"):
        bench_kernels.on_cpu(["gelu_layer_norm"], quick=True)


def test_the_stage_of_a_gpu_becomes_rows_of_the_schema():
    """In Triton's interpreter, at its sizes."""
    found = bench_kernels.on_gpu(["mask_tokens"], True, device_type="cpu")
    results.check(results.make("kernels", {}, torch.device("cpu"), **found))
    ours, eager = found["rows"]
    assert (ours["contender"], eager["contender"]) == ("ours", "eager")
    pairs = [a / b for a, b in zip(eager["rounds_ms"], ours["rounds_ms"], strict=True)]
    assert eager["ratio"] == pytest.approx(statistics.median(pairs))
    assert ours["floor_share"] > 0 and all(check["ok"] for check in found["checks"]["mask_tokens"])


def stage_with(checks, rows):
    return {"ops": {"attention": {"error": None, "checks": checks}}, "rows": rows}


def timed(contender, ms, direction="forward"):
    row = {"op": "attention", "direction": direction, "sizes": kernels.model_sizes(768, 512)}
    return row | {"contender": contender, "ms": ms, "ms_p20": ms, "ms_p80": ms}


def test_times_of_an_op_that_fails_a_check_are_not_admitted():
    checks = [{"check": "dq", "ok": False}, {"check": "dk", "ok": True}]
    found = bench_kernels.from_stage(stage_with(checks, [timed("ours", 1.0)]))
    assert found["rows"] == []
    assert "1 checks against the reference fail: dq" in found["missing"][0]["why"]


def test_like_is_compared_with_like():
    rows = [timed("ours", 2.0), timed("ours p=0", 1.0), timed("fa2 p=0.1", 4.0)]
    rows += [timed("fa2 p=0", 3.0), timed("ours", 5.0, "backward"), timed("eager", 9.0, "backward")]
    absent = {key: timed("fa3 p=0", 1.0)[key] for key in ("op", "direction", "sizes", "contender")}
    found = bench_kernels.from_stage(stage_with([], [*rows, absent | {"why": "not installed"}]))
    assert [row["ratio"] for row in found["rows"]] == [1, 1, 2, 3, 1, 9 / 5]
    assert found["missing"] == [{"name": "attention forward, fa3 p=0", "why": "not installed"}]


def test_the_command_knows_every_op():
    assert set(config.KERNEL_OPS) == set(kernels.OPS)
