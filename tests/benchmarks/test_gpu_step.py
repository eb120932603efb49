"""The stage `step`, rehearsed on a CPU: real steps of a tiny model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_step
from benchmarks import result as results
from benchmarks.flops import flops_per_token
from benchmarks.gpu_step import WORKLOADS, Bench, Workload
from fastbert.config import model_config

TINY = Workload("test", "tiny", 4, 32, "natural", ("hf-sdpa",), {"floor": 1.3, "hf-sdpa": 1e9})


def test_a_workload_is_measured_and_judged(tmp_path: Path) -> None:
    path = tmp_path / "a" / "step.json"
    result = gpu_step.measure(TINY, torch.device("cpu"), quick=True, path=path)
    assert result["missing"] == []
    assert all(ok is True for ok in result["checks"].values()) and len(result["checks"]) == 2
    ours, theirs = result["rows"]
    assert (ours["name"], theirs["name"]) == ("fastbert", "hf-sdpa")
    assert math.isclose(ours["first_loss"], theirs["first_loss"], rel_tol=1e-5)
    tokens = result["real_tokens"] / ours["real_tokens_per_second"] * 1e3
    assert math.isclose(tokens, ours["ms"], rel_tol=0.2)
    assert 0 < result["floor_ms"] < ours["ms"]
    assert [row["name"] for row in result["ablations"]] == [
        "last layer everywhere",
        "gradients by autograd, then copied",
    ]
    assert all(row["ratio"] > 0 for row in result["ablations"])
    assert result["targets"]["hf-sdpa"]["holds"] is False
    assert result["targets"]["floor"]["measured"] > 1
    written = json.loads(path.read_text())
    results.check(written)
    assert written["rows"] == result["rows"] and written["targets"] == result["targets"]
    assert "MISSED" in gpu_step.table(result)


def test_the_second_part_adds_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "_CPU_ABLATIONS", ("last layer everywhere",))
    path, cpu = tmp_path / "step.json", torch.device("cpu")
    first = gpu_step.measure(TINY, cpu, True, path, "abc", ("first",))
    assert first["ablations"] == [] and first["floor_ms"]
    more = gpu_step.measure(TINY, cpu, True, path, "abc", ("more",))
    assert more["rows"] == first["rows"] and more["floor_ms"] == first["floor_ms"]
    assert [row["name"] for row in more["ablations"]] == ["last layer everywhere"]
    assert json.loads(path.read_text()) == more


def test_a_part_that_fails_loses_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Bench, name: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore")

    monkeypatch.setattr(Bench, "rival", broken)
    monkeypatch.setattr(gpu_step, "_CPU_ABLATIONS", ())
    result = gpu_step.measure(TINY, torch.device("cpu"), quick=True)
    assert result["missing"] == [
        {"name": "hf-sdpa", "why": "OutOfMemoryError: CUDA out of memory."}
    ]
    assert [row["name"] for row in result["rows"]] == ["fastbert"]
    assert result["targets"]["hf-sdpa"]["holds"] is None


def test_a_rival_that_computes_something_else_is_not_admitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rival = Bench.rival

    def other(bench: Bench, name: str) -> gpu_step.Contender:
        made = rival(bench, name)
        made.token_losses = made.token_losses + 0.01
        return made

    monkeypatch.setattr(Bench, "rival", other)
    monkeypatch.setattr(gpu_step, "_CPU_ABLATIONS", ())
    result = gpu_step.measure(TINY, torch.device("cpu"), quick=True)
    assert [row["name"] for row in result["rows"]] == ["fastbert"]
    assert result["missing"][0]["why"].startswith("RunError: not comparable")


def test_flops_are_the_formulas() -> None:
    """BERT-base at 512: 6 (85.0M + 0.15 (0.6M + 23.4M)) + attention's 12 L H s."""
    sizes = model_config("base")
    found = flops_per_token(sizes, np.full(8, 512))
    assert math.isclose(found, 6 * 12 * 12 * 768**2 + 12 * 12 * 768 * 512 + 0.9 * 768 * 31290)
    assert flops_per_token(sizes, np.array([512, 1])) < found


def test_mlperf_lengths_have_its_mean() -> None:
    (workload,) = (w for w in WORKLOADS if w.lengths == "mlperf")
    rng = np.random.default_rng(gpu_step.SEED)
    lengths = workload.draw(rng)
    assert abs(lengths.mean() - 254) < 10 and lengths.max() == 512


def test_a_workload_that_crashes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step.sys, "executable", "/bin/false")
    assert gpu_step.run(tmp_path, True, device_type="cpu") == 1
