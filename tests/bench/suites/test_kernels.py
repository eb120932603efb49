"""`fastbert bench kernels`: real rounds on a CPU, the GPU's stage rehearsed, and a wrong op."""

import dataclasses
import functools
import json
import statistics

import pytest
import torch

from fastbert.cli import main
from fastbert.errors import RunError
from fastbert.ops import cpu_ops
from fastbert_bench import config
from fastbert_bench.kernels import costs as kernels
from fastbert_bench.kernels import timings as kernel_timings
from fastbert_bench.measure import result as results
from fastbert_bench.suites import kernels as bench_kernels


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
        tokens = row["real_tokens_per_second"]
        assert (tokens is None) == (cost.op in kernels.WHOLE)
        assert tokens is None or tokens == pytest.approx(48 / row["ms"] * 1e3)
        assert (row["sequences_per_second"] is None) == (cost.op != "attention")
        assert row["peak_memory_bytes"] >= 0 and row["mfu"] is None and row["watts"] is None
    assert {"mfu", "energy"} <= missing.keys()
    assert missing["attention forward, fa2"] == "needs a GPU"
    assert rows["attention", "forward", "ours"]["peak_memory_bytes"] >= 48 * 64 * 4
    ours, eager = (rows["attention", "backward", name] for name in ("ours", "eager"))
    pairs = [theirs / mine for theirs, mine in zip(eager["rounds_ms"], ours["rounds_ms"])]  # noqa: B905
    assert eager["ratio"] == pytest.approx(sorted(pairs)[1]) and ours["ratio"] == 1
    assert "see linear_gelu" in missing["bias_gelu forward, ours"]
    assert "C++ compiler" in missing["attention forward, compile"]
    assert rows["bias_gelu", "forward", "eager"]["compared_with"] == "reference"


def test_the_compiled_reference_is_a_peer(monkeypatch):
    """Without the code generator, of which test_step.py sees enough: its C++ takes 10 s."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = bench_kernels.on_cpu(["bias_gelu"], quick=True)
    names = [row["contender"] for row in found["rows"]]
    assert names == 2 * ["reference", "eager", "compile"]


@pytest.mark.usefixtures("no_compiler")
class TestWhatIsAsked:
    def run(self, **asked):
        return bench_kernels.run(config.KernelBenchConfig(device="cpu", quick=True, **asked))

    def test_a_model_gives_the_widths(self, tmp_path):
        sizes = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160}
        sizes |= {"model_type": "bert", "vocab_size": 700}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(sizes))
        result = self.run(model=str(path), op="linear_gelu,attention,adamw", against="none")
        for row in result["rows"]:
            known = {letter: row["sizes"][letter] for letter in "HAFVTS"}
            assert known == {"H": 96, "A": 3, "F": 160, "V": 700, "T": 48, "S": 16}
            assert row["contender"] == "ours"
        assert len(result["rows"]) == 5
        numels = kernel_timings.parameter_sizes(96, 1, 700, 160)
        assert result["rows"][-1]["sizes"]["P"] == sum(numels)

    @pytest.mark.parametrize("lengths", ["natural", "file"])
    def test_attention_sees_the_lengths(self, lengths, tmp_path, monkeypatch):
        """And padded peers compute what packed ones do, pads left out."""
        if lengths == "file":
            lengths = str(tmp_path / "lengths.txt")
            (tmp_path / "lengths.txt").write_text("5\n7\n99\n")
        monkeypatch.setattr(kernel_timings, "DROPOUT_P", 0.0)
        asked = kernel_timings.Asked(lengths=lengths)
        workload = bench_kernels.cpu_workload("attention", True, asked)
        drawn = kernel_timings.filled(lengths, 48, 16)
        assert drawn.sum() == 48 and drawn.min() >= 1 and len(set(drawn.tolist())) > 1
        assert workload.sizes["N"] == len(drawn) > 3
        inputs, by_name = workload.inputs(), {one.name: one for one in workload.contenders}
        packed = by_name["reference"].build(inputs)[1]()
        padded = by_name["eager"].build(inputs)[1]().transpose(1, 2)  # (N, S, A, D)
        real = torch.arange(16) < torch.from_numpy(drawn)[:, None]
        assert torch.allclose(padded[real], packed, atol=1e-5)
        result = self.run(lengths=lengths, op="attention", against="eager")
        forward = next(row for row in result["rows"] if row["direction"] == "forward")
        s = round(float((drawn**2).sum() / 48))
        assert forward["flops"] == 4 * 48 * s * 64 and s < 16
        rate = len(drawn) / forward["ms"] * 1e3
        assert forward["sequences_per_second"] == pytest.approx(rate)

    def test_only_the_peers_asked_for_are_timed(self, capsys):
        result = self.run(op="gelu_layer_norm", against="eager,liger,fa2")
        assert {row["contender"] for row in result["rows"]} == {"ours", "eager"}
        missing = {one["name"]: one["why"] for one in result["missing"]}
        assert missing["gelu_layer_norm forward, liger"] == "needs a GPU"
        assert missing["fa2"] == "is no peer of the ops that were measured"
        assert main(["bench", "kernels", "--against", "egaer"]) == 2
        assert "did you mean 'eager'?" in capsys.readouterr().err


def test_every_peer_has_a_name_on_the_command_line():
    names = {"reference", "eager", "compile"}
    for op in kernels.OPS:
        sizes = bench_kernels.cpu_sizes(True)
        workload = kernel_timings.workload(op, torch.device("cpu"), torch.float32, sizes)
        names |= {kernel_timings.peer_of(c.name) for c in workload.contenders}
    assert {name for name in names if not name.startswith("ours")} == set(config.KERNEL_PEER_NAMES)


@pytest.mark.usefixtures("no_compiler")
def test_an_op_that_computes_something_else_is_not_timed(monkeypatch):
    right = cpu_ops(False)

    def wrong(*args):
        return right.gelu_layer_norm(*args) * 1.001

    broken = dataclasses.replace(right, gelu_layer_norm=wrong)
    monkeypatch.setattr(kernel_timings, "cpu_ops", lambda compiled: broken)
    with pytest.raises(RunError, match="gelu_layer_norm by ours and by reference differ by"):
        bench_kernels.on_cpu(["gelu_layer_norm"], quick=True)


def test_the_stage_of_a_gpu_becomes_rows_of_the_schema(host_site, monkeypatch):
    """In Triton's interpreter, at its tokens and a model's vocabulary."""
    monkeypatch.setenv("PYTHONPATH", str(host_site))
    asked = kernel_timings.Asked("tiny", "natural", "eager")
    found = bench_kernels.on_gpu(["mask_tokens"], True, asked, device_type="cpu")
    results.check(results.make("kernels", {}, torch.device("cpu"), **found))
    ours, eager = found["rows"]
    assert (ours["contender"], eager["contender"]) == ("ours", "eager")
    assert ours["direction"] == "step" and ours["ms"] > 0
    assert (ours["sizes"]["T"], ours["sizes"]["V"], ours["sizes"]["H"]) == (48, 30522, 128)
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
