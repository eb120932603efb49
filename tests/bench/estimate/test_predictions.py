"""What was predicted is committed, current until measured, and stands beside what came of it."""

import copy
import json

import numpy as np
import pytest

from fastbert.config import model_config
from fastbert_bench.estimate import predictions
from fastbert_bench.estimate.run import DEVICES
from fastbert_bench.estimate.step_cost import FAMILIES, PRODUCTS, Lengths
from fastbert_bench.measure.workloads import TINY, WORKLOADS
from fastbert_bench.profile import step as profiling

BASE = model_config("base")

H200 = "NVIDIA H200"


def near(found):
    """For comparisons of nested figures: rounding differs between builds of numpy."""
    if isinstance(found, dict):
        return {key: near(value) for key, value in found.items()}
    return pytest.approx(found, rel=2e-3)


@pytest.fixture(scope="module")
def now():
    return predictions.make({}, {})


def test_what_is_committed_is_what_the_estimate_says_until_a_gpu_has_spoken(now):
    committed = predictions.committed()
    assert list(committed) == list(predictions.GPUS)
    measured = predictions.measured()
    for gpu in predictions.GPUS:
        assert set(committed[gpu]) == set(now[gpu])
        if gpu not in measured:
            assert committed[gpu] == near(now[gpu])


def test_every_workload_of_the_gpu_command_is_there(now):
    steps = {name for name in WORKLOADS if name != TINY}
    for found in now.values():
        assert {name.partition(" ")[2] for name in found if name.startswith("step ")} == steps
        assert {name for name in found if name.startswith("trace ")} == {
            "trace base-512-full", "trace large-512-natural"
        }  # fmt: skip
        for one in found.values():
            assert one["low_ms"] <= one["ms"] <= one["high_ms"]
        for one in (one for name, one in found.items() if not name.startswith("kernel ")):
            assert one["low_ms"] < one["ms"] < one["high_ms"]
            assert one["mfu_executed"] < one["mfu"] < 1
            assert sum(one["families"].values()) == pytest.approx(one["ms"], rel=1e-3)


def test_kernels_by_their_bytes_or_their_tiles(now):
    found = now["h100"]
    # x, residual and y of 65,536 x 768 in bf16, two statistics: at 85% of 3 TB/s
    norm = found["kernel dropout_add_layer_norm forward 512"]
    assert norm["ms"] == pytest.approx(65_536 * (6 * 768 + 8) / 2.55e12 * 1e3, rel=1e-3)
    assert norm["gbps"] == pytest.approx(2550, rel=1e-3) and norm["tflops"] == 0
    attention = found["kernel attention forward 512"]
    assert attention["tflops"] == pytest.approx(
        4 * 65_536 * 512 * 768 / attention["ms"] / 1e9, 1e-3
    )
    step = found["trace base-512-full"]["families"]["attention forward"]
    assert attention["ms"] == pytest.approx(step / 11.2, rel=0.02)  # eleven layers, and 15% of one
    assert "kernel linear_gelu forward 512" not in found


def test_figures_follow_from_the_families():
    found = predictions.predict(BASE, np.full(64, 512), 32_768, DEVICES["h200"])
    families = found["families"]
    assert set(families) == set(FAMILIES)
    products = sum(families[name] for name in PRODUCTS)
    assert found["over_products"] == pytest.approx(found["ms"] / products, rel=1e-3)
    assert found["tokens_per_second"] == pytest.approx(32_768 / found["ms"] * 1e3, rel=1e-3)
    assert found["sequences_per_second"] == pytest.approx(64 / found["ms"] * 1e3, rel=1e-3)
    # 72 * 12 * 768² + 12 * 12 * 768 * 512 + 0.9 * (768² + 768 * 30522) FLOPs a token
    assert found["mfu"] == pytest.approx(587_858_688 * found["tokens_per_second"] / 989e12, 1e-3)
    # Attention of 11 layers whole, of the last for 15% of the tokens and [CLS].
    pairs = 12 * 64 * 512 * 512 * 64 * (11 + 78 / 512)
    forward, backward = found["attention_tflops"]
    assert forward == pytest.approx(4 * pairs / families["attention forward"] / 1e9, rel=5e-3)
    assert backward == pytest.approx(10 * pairs / families["attention backward"] / 1e9, rel=5e-3)


def test_what_was_measured_freezes_what_was_predicted(now):
    before = copy.deepcopy(now)
    before["h200"]["step base-512-full"]["ms"] = 1.0
    before["h100"]["step base-512-full"]["ms"] = 1.0
    new = before["h200"].pop("trace base-512-full")  # measured before anyone thought of it
    after = predictions.make({"h200": {}}, before)
    assert after["h200"] == before["h200"] | {"trace base-512-full": new}
    assert after["h100"] == now["h100"]


def test_the_table_says_how_far_off_it_was(tmp_path, now):
    (tmp_path / "h200").mkdir()
    said = now["h200"]["step base-512-full"]["ms"]
    content = {
        "conditions": {"device": H200, "device_type": "cuda"},
        "rows": [{"name": "fastbert", "ms": 1.25 * said}, {"name": "hf-sdpa", "ms": 9.0}],
    }
    (tmp_path / "h200" / "step-base-512-full.json").write_text(json.dumps(content))
    content["conditions"] |= {"device": "AMD EPYC", "device_type": "cpu"}
    (tmp_path / "h200" / "step-base-128-full.json").write_text(json.dumps(content))
    kernel = now["h200"]["kernel attention forward 512"]["ms"]
    rows = [
        {"op": "attention", "direction": "forward", "contender": name, "ms": kernel * times,
         "sizes": {"H": H, "T": T, "S": 512, "s": s}}
        for name, times, H, T, s in (
            ("ours", 0.9, 768, 65_536, 512), ("ours", 2, 1024, 65_536, 512),
            ("ours", 2, 768, 8192, 512), ("ours", 2, 768, 65_536, 278), ("fa2", 2, 768, 65_536, 512)
        )
    ]  # fmt: skip
    content = {"conditions": {"device": H200, "device_type": "cuda"}, "rows": rows}
    (tmp_path / "h200" / "kernels.json").write_text(json.dumps(content))
    measured = predictions.measured(tmp_path)
    assert measured == {
        "h200": {
            "step base-512-full": {"name": "fastbert", "ms": 1.25 * said},
            "kernel attention forward 512": rows[0],
        }
    }
    lines = list(predictions.table_lines(now, measured))
    row = next(line for line in lines if line.startswith("| h200 | base-512-full"))
    assert row.endswith(f"| {1.25 * said:.1f} | +25% |")
    assert sum("not yet run | - |" in line for line in lines) == 3 * 4 - 1
    row = next(line for line in lines if line.startswith("| attention forward 512")).split(" | ")
    assert row[1].endswith("; not yet run") and row[3].endswith("; not yet run |")
    assert row[2].endswith(f"; {900 * kernel:,.0f}, -10%")


def test_the_log_has_the_committed_table():
    text = predictions.LOG.read_text(encoding="utf-8")
    lines = predictions.table_lines(predictions.committed(), predictions.measured())
    assert f"{predictions.BEGIN}\n{chr(10).join(lines)}\n{predictions.END}" in text


def test_a_prediction_is_found_by_the_name_of_the_driver():
    found = predictions.of(H200, "step", "base-512-full")
    assert found == predictions.committed()["h200"]["step base-512-full"]
    assert predictions.of("NVIDIA T4", "step", "base-512-full") is None
    assert predictions.of(H200, "step", "tiny-64-natural") is None


def test_a_profiled_step_stands_beside_what_it_takes_on_paper():
    lengths = Lengths.of(np.full(64, 512))
    found = profiling.on_paper(H200, BASE, 32_768, lengths)
    said = predictions.committed()["h200"]["step base-512-full"]
    assert found["ms"] == pytest.approx(said["ms"], rel=2e-3)
    assert sum(found["families"].values()) == pytest.approx(found["ms"])
    assert profiling.on_paper("NVIDIA T4", BASE, 32_768, lengths) is None
    step = {"launched": "graph", "ms": 2 * found["ms"], "ms_p20": 1.0, "ms_p80": 3.0,
            "recorded_ms": 9.0, "recorded_steps": 3}  # fmt: skip
    result = {
        "step": step, "idle": None, "ceilings": {"copies": {}, "matrix": 1e12}, "host_syncs": [],
        "attribution": "by hand", "origins": {}, "on_paper": found,
    }  # fmt: skip
    line = next(line for line in profiling._summary(result).splitlines() if "on paper" in line)
    assert f"{found['ms']:.3f} ms" in line and line.endswith("2.00 times as long")
    assert "on paper" not in profiling._summary(result | {"on_paper": None})


def test_the_readme_expects_what_was_predicted():
    text = (predictions.ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("large-512-mlperf", "base-512-full", "base-128-full"):
        one = predictions.committed()["h100"][f"step {name}"]
        low, high = (f"{one['tokens'] / one[key]:.0f}k" for key in ("high_ms", "low_ms"))
        assert f"{one['tokens_per_second'] / 1e3:.0f}k ({low} to {high})" in text, name
    one = predictions.committed()["h100"]["step base-512-full"]
    assert f"| 1.35 | {one['over_products']:.2f} |" in text
