"""The pytest-benchmark suite: collected only when asked for, and its figures are real."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_pytest_alone_runs_the_tests_only():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]


def test_the_suite_writes_what_it_measured(tmp_path):
    out = tmp_path / "benchmark.json"
    chosen = "gelu_layer_norm-backward or mask_tokens or loader or test_step"
    # Where these tests run in parallel, pytest-benchmark would think that the suite does, too.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-q", "-rs", "-k", chosen, "-p", "no:xdist",
         f"--benchmark-json={out}", "-p", "no:cacheprovider"],
        cwd=ROOT, env={**alone, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "while they are packed: see bench data" in done.stdout
    found = {one["name"]: one for one in json.loads(out.read_text())["benchmarks"]}
    assert found.keys() == {
        "test_step[fastbert]", "test_step[hf-sdpa]", "test_op[gelu_layer_norm-backward]",
        "test_loader[128]", "test_loader[512]",
    }  # fmt: skip
    for one in found.values():
        assert one["stats"]["rounds"] == 5 and 0 < one["stats"]["min"] <= one["stats"]["median"]
    # Timed by its own clock: a call, not the round of two that the wall clock would see.
    assert found["test_op[gelu_layer_norm-backward]"]["stats"]["median"] < 0.1
    steps = [found[f"test_step[{name}]"]["extra_info"] for name in ("fastbert", "hf-sdpa")]
    assert steps[0]["real_tokens"] == steps[1]["real_tokens"] > 0
    assert found["test_loader[512]"]["extra_info"]["real_tokens"] == pytest.approx(65_536, rel=0.03)
