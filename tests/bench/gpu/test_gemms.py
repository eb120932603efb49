"""`gpu.gemms`: its products are those of a step, and a small model's are timed on a CPU."""

import io
import json
import sys

import pytest
import torch

from fastbert.config import ModelConfig, model_config
from fastbert_bench.estimate import launch_list, predictions
from fastbert_bench.estimate.step_cost import GEMM_BACKWARD, GEMM_FORWARD, MLM, PRODUCTS
from fastbert_bench.estimate.step_cost import family_of as family_on_paper
from fastbert_bench.gpu import gemms
from fastbert_bench.measure import result as results
from fastbert_bench.measure import timing

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=1,
    intermediate_size=64,
)  # fmt: skip


@pytest.mark.parametrize(("model", "mean"), [("base", 512), ("large", 278)])
def test_the_products_are_those_of_the_estimate(model, mean):
    """But for the pooler's and the next sentence's, which have N rows."""
    sizes, T = model_config(model), 65_536
    M, N = round(0.15 * T), round(T / mean)
    asked: dict[str, float] = {}
    for times, kernel in launch_list.read(launch_list.sizes_of(sizes, T, N, M)):
        family = family_on_paper(kernel, M)
        if family in PRODUCTS and N not in kernel.product:
            asked[family] = asked.get(family, 0.0) + times * kernel.flops
    found: dict[str, float] = {}
    for weight in gemms.weights_of(model, sizes, T, mean):
        for kind, (M, N, K) in weight.shapes().items():
            row = {"weight": weight.name, "kind": kind, "per_step": weight.count}
            family = gemms.family_of(row)
            if family:
                found[family] = found.get(family, 0.0) + weight.count * 2 * M * N * K
    assert found == pytest.approx(asked, rel=1e-5)


def test_the_vocabulary_as_it_is_and_padded_twice():
    weights = gemms.weights_of("base", model_config("base"), 65_536, 512)
    decoders = {weight.name: weight.count for weight in weights if weight.name[:3] == "dec"}
    assert decoders == {"decoder N=30522": 0, "decoder N=30528": 1, "decoder N=30592": 0}


@pytest.mark.parametrize(
    ("M", "N", "tiles", "share"),
    [(768, 768, 18, 18 / 132), (3072, 768, 72, 72 / 132), (128 * 132, 256, 132, 1.0),
     (128 * 132 + 1, 256, 133, 133 / 264), (65_536, 2304, 4608, 4608 / (35 * 132))],
)  # fmt: skip
def test_waves_of_tiles(M, N, tiles, share):
    assert gemms.waves(M, N) == (tiles, pytest.approx(share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_multiply_what_they_say(dtype, monkeypatch):
    made: list[torch.Tensor] = []

    def random_like(*args, random_like=timing.random_like):
        made.append(random_like(*args))
        return made[-1]

    monkeypatch.setattr(timing, "random_like", random_like)
    monkeypatch.setattr(timing, "clones_needed", lambda *_: 1)
    for weight in gemms.weights_of("small", SMALL, 40, 20):
        made.clear()
        calls = gemms.calls_of(weight, dtype, CPU)
        x, w, _, dy, *bias = (tensor.float() for tensor in made)
        dy = dy[:, : weight.F]
        wanted = {"forward": x @ w.t() + sum(bias), "dgrad": dy @ w, gemms.WGRAD: dy.t() @ x,
                  gemms.WGRAD_ADDS: 2 * dy.t() @ x, gemms.WGRAD_BF16: dy.t() @ x}  # fmt: skip
        assert list(calls) == list(weight.shapes()) and len(bias) == (weight.name == "qkv")
        for kind, (call,) in calls.items():
            M, N, K = weight.shapes()[kind]
            out = call()
            assert out.shape == (M, N) and K == weight.rows + weight.H + weight.F - M - N
            torch.testing.assert_close(out.float(), wanted[kind], rtol=2e-2, atol=0.2)
            wide = kind in (gemms.WGRAD, gemms.WGRAD_ADDS)
            wide |= kind == "dgrad" and weight.name.startswith("decoder")
            assert out.dtype == (torch.float32 if wide else dtype)


def test_a_sum_stands_beside_its_prediction():
    def row(weight, kind, library, milliseconds, count=12.0):
        one = gemms.Weight("base", weight, 32_768, 768, 768, count)
        return gemms.row_of(one, kind, library, [milliseconds], 1e12)

    rows = [
        row("qkv", "forward", "cublas", 0.5), row("up", "forward", "cublas", 0.25),
        row("qkv", "forward", "cublaslt", 0.4), row("qkv", "dgrad", "cublas", 1.0),
        row("qkv", gemms.WGRAD, "cublas", 2.0), row("qkv", gemms.WGRAD_BF16, "cublas", 9.0),
        row("qkv", gemms.WGRAD_ADDS, "cublas", 9.0), row("transform", "forward", "cublas", 1.0, 1),
        row("decoder N=30528", "forward", "cublas", 9.0, 0.0),
    ]  # fmt: skip
    sums = {one["family"]: one for one in gemms.sums_of(rows, 32_768, "NVIDIA H200")}
    assert list(sums) == [GEMM_FORWARD, GEMM_BACKWARD, MLM]
    assert sums[GEMM_FORWARD]["ms_per_65536_tokens"] == {
        "cublas": pytest.approx(18.0), "cublaslt": pytest.approx(9.6)
    }  # fmt: skip
    assert sums[GEMM_BACKWARD]["ms_per_65536_tokens"] == {"cublas": pytest.approx(72.0)}
    assert sums[MLM]["ms_per_65536_tokens"] == {"cublas": pytest.approx(2.0)}
    for family, one in sums.items():
        said = predictions.committed()["h200"]["trace base-512-full"]["families"]
        assert one["predicted_ms"] == said[family] > 0
    assert {one["predicted_ms"] for one in gemms.sums_of(rows, 32_768)} == {None}
    assert rows[0]["tflops"] == pytest.approx(2 * 32_768 * 768**2 / 0.5e-3 / 1e12)
    assert rows[0]["matrix_share"] == pytest.approx(rows[0]["tflops"])


def test_the_library_is_what_it_was_before(monkeypatch):
    chosen = ["default"]

    def choose(library=None):
        if library is not None:
            chosen.append(library)
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", choose)

    def fails():
        with gemms.preferred("cublaslt"):
            assert choose() == "cublaslt"
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fails()
    assert chosen == ["default", "cublaslt", "default"]
    with gemms.preferred("cpu"):
        assert choose() == "default"
    assert len(chosen) == 3


# A small model on a CPU


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gemms, "model_config", lambda name: SMALL)
    monkeypatch.setattr(gemms, "ROUNDS", 2)


def test_every_product_of_a_model_is_timed(small, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "gemms.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    argv = ["--device", "cpu", "--out", str(path), "--wait", "--tokens", "40"]
    assert gemms.main(argv) == 0
    assert sys.stdin.read() == ""  # it waited for its line
    found = json.loads(path.read_text())
    results.check(found)
    assert found["missing"] == [] and found["settings"]["tokens"] == 40
    kinds = {(row["weight"], row["kind"]) for row in found["rows"]}
    weights = gemms.weights_of("tiny", SMALL, 40, 64)
    assert kinds == {(weight.name, kind) for weight in weights for kind in weight.shapes()}
    assert len(kinds) == len(found["rows"]) == 4 * 5 + 3 + 3 * 3
    for row in found["rows"]:
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and len(row["rounds_ms"]) == 2
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
    lines = gemms.table(found)
    assert capsys.readouterr().out.splitlines() == lines
    assert len(lines) == gemms.LINES and max(map(len, lines)) <= gemms.WIDTH
    assert sum(line.startswith("tiny") for line in lines) == 3


def test_what_fails_or_finds_no_time_is_missing(small, monkeypatch):
    def replay(calls, device, replay=timing.Replay):
        if calls[0].func is gemms._addmm_fp32 and calls[0].args[-1] == 1:
            raise RuntimeError("no such product\nmore")
        return replay(calls, device)

    monkeypatch.setattr(timing, "Replay", replay)
    found = gemms.measure(CPU, True, T=40)
    assert [one["name"] for one in found["missing"]] == [
        f"tiny {name} wgrad beta=1, cpu" for name in gemms.LINEARS
    ]
    assert {one["why"] for one in found["missing"]} == {"RuntimeError: no such product"}
    assert len(found["rows"]) == 4 * 4 + 3 + 3 * 3
    kept: list[int] = []
    late = gemms.measure(CPU, True, 0.0, 40, lambda one: kept.append(len(one["missing"])))
    assert late["rows"] == [] and {one["why"] for one in late["missing"]} == {"no time was left"}
    assert kept == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert len(gemms.table(late)) == 2  # nothing to say, and no exception
