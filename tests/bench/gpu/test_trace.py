"""`gpu.trace`: handmade traces of a GPU, and the recording of a small step on a CPU."""

import dataclasses
import io
import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from fastbert.config import ModelConfig, model_config
from fastbert.errors import UserError
from fastbert_bench.estimate import predictions
from fastbert_bench.estimate.run import DEVICES
from fastbert_bench.estimate.step_cost import FAMILIES, GAPS, PASSES, Lengths
from fastbert_bench.gpu import trace as gpu_trace
from fastbert_bench.kernels.compile_report import shipped_cases
from fastbert_bench.measure import result as results
from fastbert_bench.measure.workloads import Workload
from fastbert_bench.profile import step as profiling
from fastbert_bench.profile import trace as step_trace
from fastbert_bench.profile.trace import Kernel, Place
from fastbert_kernels.compile_cases import op_of

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab_size=1200, hidden_size=32, num_hidden_layers=2, num_attention_heads=1,
    intermediate_size=64,
)  # fmt: skip

NVJET = "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNT"
XMMA = "sm90_xmma_gemm_bf16f32_bf16f32_f32_nt_n_tilesize128x128x64_warpgroupsize1x1x1_execute"
CUTLASS = "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_nn>"
SPLIT_K = "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, true>"
ADD = (
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>, "
    "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, "
    "3ul>)"
)
SUM = (
    "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, at::native::"
    "func_wrapper_t<c10::BFloat16, at::native::sum_functor<c10::BFloat16, float, c10::BFloat16>::"
    "operator()(at::TensorIterator&)::{lambda(float, float)#1}>, unsigned int, c10::BFloat16, 4>>"
)
LOSS_ADD = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, "
    "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)"
)
GATHER = "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int, long)"
UPDATE = "void at::native::multi_tensor_apply_kernel<at::native::TensorListMetadata<2>, Copy>"
MEMSET, MEMCPY = "Memset (Device)", "Memcpy DtoD (Device -> Device)"
MYSTERY = "mystery_kernel_v7"

QKV, OUT = "linear T=64 H=32 F=96", "linear T=64 H=32 F=32"
UP, NORM = "linear_gelu T=64 H=32 F=64", "dropout_add_layer_norm T=64 H=32"
CROSS, ATTENTION = "linear_cross_entropy M=9 H=32 V=1200", "attention T=64 S=32 H=32 A=1"

# (layer, op, direction, kernels, the family of all of them): a step of one layer.
STEP = [
    ("embeddings", "embed_layer_norm T=64 H=32 V=1200", "forward", ["_forward_kernel"], PASSES),
    ("layer 0", QKV, "forward", [NVJET], "GEMM forward"),
    ("layer 0", ATTENTION, "forward", ["attention_forward_kernel"], "attention forward"),
    ("layer 0", "", "forward", [GATHER], "everything else"),
    ("layer 0", OUT, "forward", [CUTLASS, SPLIT_K], "GEMM forward"),
    ("layer 0", NORM, "forward", ["_forward_kernel"], PASSES),
    ("layer 0", UP, "forward", [NVJET], "GEMM forward"),
    ("layer 0", UP, "forward", ["_bias_gelu_kernel"], PASSES),
    ("masked words", "linear T=9 H=32 F=32", "forward", [NVJET], "MLM products"),
    ("masked words", CROSS, "forward", [NVJET], "MLM products"),
    ("masked words", CROSS, "forward", ["_softmax_gradient_kernel"], PASSES),
    ("masked words", CROSS, "backward", [XMMA, XMMA], "MLM products"),
    ("layer 0", UP, "backward", ["_gelu_backward_kernel", "_reduce_rows_kernel"], PASSES),
    ("layer 0", UP, "backward", [XMMA, NVJET], "GEMM dgrad + wgrad"),
    ("layer 0", UP, "backward", [MEMSET], "everything else"),
    ("layer 0", UP, "backward", [ADD], "residual-gradient adds"),
    ("layer 0", NORM, "backward", ["_backward_kernel", "_reduce_rows_kernel"], PASSES),
    ("layer 0", ATTENTION, "backward", ["attention_delta_kernel", "attention_backward_kernel"],
     "attention backward"),
    ("layer 0", QKV, "backward", [XMMA, NVJET], "GEMM dgrad + wgrad"),
    ("layer 0", QKV, "backward", [SUM], "sum of dy, QKV bias"),
    ("layer 0", QKV, "backward", ["_column_sums_kernel"], "sum of dy, QKV bias"),
    ("layer 0", QKV, "backward", [ADD], "residual-gradient adds"),
    ("gradients", "", "step", [UPDATE], "everything else"),
    ("optimizer", "", "step", [LOSS_ADD], "everything else"),
    ("optimizer", "adamw P=9", "step", ["_square_sums_kernel", "_adamw_kernel"], "optimizer"),
    ("optimizer", "muon P=9", "step", ["_symmetric_product_kernel", "nvjet_tst_128x256_NTN"],
     "optimizer"),
    ("rest of the step", "", "forward", [MYSTERY], "everything else"),
]  # fmt: skip


class Trace:
    def __init__(self):
        self.events = []

    def add(self, cat, name, start, end, thread=1, **args):
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": thread,
             "args": args}
        )  # fmt: skip

    def kernel(self, name, start, end, correlation):
        kind = "gpu_memset" if "Memset" in name else "kernel"
        kind = "gpu_memcpy" if "Memcpy" in name else kind
        self.add(kind, name, start, end, "stream 7", correlation=correlation)


def eager_trace(steps=2):
    """Each launch in its ranges, backwards on a thread of their own; kernels of 10, 20, ... us."""
    trace = Trace()
    for step in range(steps):
        at = step * 100_000
        trace.add("user_annotation", f"step {step}", at, at + 50_000)
        runs = at + 100
        for index, (layer, op, direction, names, _) in enumerate(STEP):
            host, end, number = at + 200 * index, at + 200 * index + 150, at + index
            thread = 2 if direction == "backward" else 1
            if direction == "backward":
                # The node was made in the forward, which is what tells the layer.
                maker = at + 200 * index + 160
                trace.add("user_annotation", layer, maker, maker + 30)
                trace.add("user_annotation", op, maker + 1, maker + 29)
                made = {"Sequence number": number, "Fwd thread id": 0}
                trace.add("cpu_op", "maker", maker + 2, maker + 20, **made)
                node = {"Sequence number": number, "Fwd thread id": 1}
                trace.add("cpu_op", step_trace._EVALUATE + "Node", host, end, 2, **node)
            else:
                if layer != "rest of the step":
                    trace.add("user_annotation", layer, host, end)
                if op:
                    trace.add("user_annotation", op, host + 1, end - 1)
            for place, name in enumerate(names):
                correlation = len(trace.events)
                launched = host + 10 + 10 * place
                trace.add("cuda_runtime", "cudaLaunchKernel", launched, launched + 5, thread,
                          correlation=correlation)  # fmt: skip
                trace.kernel(name, runs, runs + 10 * (index + 1), correlation)
                runs += 10 * (index + 1)
    return {"traceEvents": trace.events}


def graph_trace(gap=5, steps=2):
    """The same kernels from one launch, after a copy of the batch, `gap` us apart."""
    trace = Trace()
    for step in range(steps):
        at = step * 100_000
        trace.add("user_annotation", f"step {step}", at, at + 20)
        trace.add("cuda_runtime", "cudaGraphLaunch", at + 5, at + 15, correlation=at + 1)
        runs = at + 30
        for index, names in enumerate([[MEMCPY], *(entry[3] for entry in STEP)]):
            for name in names:
                trace.kernel(name, runs, runs + 10 * max(index, 1), at + 1)
                runs += 10 * max(index, 1) + gap
    return {"traceEvents": trace.events}


def rows(recorded, **given):
    settings = {"cuda": True, "real_tokens": 65_536, "library": gpu_trace.library_kernels(),
                "predicted": {}, "estimated": {}} | given  # fmt: skip
    return gpu_trace.rows_of(recorded, **settings)


def expected_us():
    sums = Counter()
    for index, (*_, names, family) in enumerate(STEP):
        sums[family] += 10 * (index + 1) * len(names)
    return sums


def families_of(found):
    return {row["name"]: row["ms"] * 1e3 for row in found if "below" not in row and "ms" in row}


def adds_up(found, total):
    lines = sum(row.get("ms", 0.0) for row in found if "below" not in row)
    assert lines - total["overlap_ms"] == pytest.approx(total["ms"])
    below = Counter()
    assert len({row["name"] for row in found}) == len(found)
    for row in found:
        if "below" in row:
            below[row["below"]] += row["ms"]
            assert sum(kernel["ms"] for kernel in row["kernels"]) == pytest.approx(row["ms"])
    for row in found:
        if "below" not in row and row["family"] != GAPS:
            assert below[row["name"]] == pytest.approx(row.get("ms", 0.0))


def test_every_kernel_of_an_eager_step_is_in_its_family():
    found, total = rows(step_trace.analyse(eager_trace(), cuda=True))
    assert families_of(found) == pytest.approx(dict(expected_us()))
    adds_up(found, total)
    assert total["ms"] * 1e3 == pytest.approx(sum(expected_us().values()))  # no gaps in it


def test_a_graphs_kernels_are_told_by_the_eager_steps_places():
    eager = step_trace.analyse(eager_trace(), cuda=True)
    graph = step_trace.analyse(graph_trace(), cuda=True)
    found, total = rows(step_trace.label_like(graph, eager))
    launches = 1 + sum(len(names) for *_, names, _ in STEP)
    wanted = expected_us()
    wanted["everything else"] += 10  # the batch's copy
    wanted[GAPS] = 5 * (launches - 1)
    assert families_of(found) == pytest.approx(dict(wanted))
    adds_up(found, total)
    assert total["idle_ms"] * 1e3 == pytest.approx(5 * (launches - 1))
    assert sum(row["calls"] for row in found if "below" in row) == launches


def test_kernels_that_overlap_still_add_up():
    eager = step_trace.analyse(eager_trace(), cuda=True)
    graph = step_trace.analyse(graph_trace(gap=-3), cuda=True)
    found, total = rows(step_trace.label_like(graph, eager))
    launches = 1 + sum(len(names) for *_, names, _ in STEP)
    assert total["overlap_ms"] * 1e3 == pytest.approx(3 * (launches - 1))
    adds_up(found, total)
    assert total["ms_per_65536_tokens"] == pytest.approx(total["ms"])


def test_what_no_rule_knows_keeps_its_name():
    found, _ = rows(step_trace.analyse(eager_trace(), cuda=True))
    others = {row["line"]: row["where"] for row in found if row.get("below") == gpu_trace.OTHER}
    assert others == {
        "vectorized_gather_kernel long": "layer 0",
        MEMSET: "layer 0",
        "multi_tensor_apply_kernel": "gradients",
        "vectorized_elementwise_kernel CUDAFunctor_add float": "optimizer",
        MYSTERY: "rest of the step",
    }


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long>(int)",
         "indexSelectLargeIndex BFloat16"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::"
         "TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(float)#1}>(int)",
         "unrolled_elementwise_kernel direct_copy_kernel_cuda float"),
        (SUM, "reduce_kernel sum_functor BFloat16"),
        (NVJET, NVJET),
        (MEMCPY, MEMCPY),
        ("aten::mm", "aten::mm"),
    ],
)  # fmt: skip
def test_short_names(name, short):
    assert gpu_trace.short_name(name) == short


def test_without_a_place_only_names_can_tell():
    nowhere = Place("not attributed", "", "step")
    library = gpu_trace.library_kernels()

    def family(name):
        return gpu_trace.family_of(Kernel(0, name, 0, 1, nowhere, 0, 0), True, library)

    assert family("attention_backward_kernel") == "attention backward"
    assert family("_forward_kernel") == PASSES
    assert family(ADD) == "residual-gradient adds"
    assert family("void pytorch_flash::flash_bwd_dq_kernel<cutlass>") == "attention backward"
    # A forward product and a gradient's may be the same kernel.
    assert {family(name) for name in (NVJET, SUM, LOSS_ADD, MYSTERY)} == {gpu_trace.OTHER}


def test_every_kernel_of_the_library_has_one_family():
    library = gpu_trace.library_kernels()
    modules = {(op_of(case.fn), case.fn.fn.__name__) for case in shipped_cases()}
    assert {name for _, name in modules} == set(library)
    special = {"attention", "optimizer", "muon", "mask", "linear"}
    for module, name in modules:
        assert (library[name] == PASSES) == (module not in special), (module, name)


def test_predictions_stand_beside_what_was_measured():
    predicted = predictions.of("NVIDIA H100 80GB HBM3", "trace", "base-512-full")["families"]
    wrong = "attention backward"
    estimated = predictions.estimated(model_config("base"), np.full(9, 512), DEVICES["h100"])
    recorded = step_trace.analyse(eager_trace(), cuda=True)
    found, total = rows(
        recorded, real_tokens=32_768, predicted=predicted, estimated=estimated
    )  # fmt: skip
    by_name = {row["name"]: row for row in found if "below" not in row}
    row = by_name[wrong]
    assert row["ms_per_65536_tokens"] == pytest.approx(2 * row["ms"])
    assert row["over_predicted"] == pytest.approx(2 * row["ms"] / predicted[wrong])
    assert row["estimated_ms"] == estimated[wrong]
    optimizer = by_name["optimizer"]  # the same whatever the tokens
    assert optimizer["ms_per_65536_tokens"] == optimizer["ms"]
    assert total["predicted_ms"] == pytest.approx(sum(predicted.values()))
    assert total["estimated_ms"] == pytest.approx(sum(estimated[name] for name in FAMILIES))
    assert found[0]["name"] == "GEMM dgrad + wgrad"  # furthest from its prediction
    gelu = next(row for row in found if row.get("line") == "bias_gelu backward")
    # 12 layers, all but the last of 65,536 rows: 6 bytes for each of 3,072 elements
    assert gelu["estimated_ms"] == pytest.approx(11.2 * 6 * 65_536 * 3072 / 2.55e12 * 1e3, rel=0.02)


# What was predicted


@pytest.mark.parametrize(
    ("name", "model", "lengths"),
    [("base-512-full", "base", np.full(4, 512)), ("large-512-natural", "large", None)],
)
def test_the_estimate_by_family_is_the_estimate(name, model, lengths):
    if lengths is None:
        lengths = Workload.of(name).draw_tokens(65_536)
    found = predictions.estimated(model_config(model), lengths, DEVICES["h100"])
    whole = DEVICES["h100"].step(model_config(model), 65_536, Lengths.of(lengths)).seconds
    assert sum(found[family] for family in FAMILIES) == pytest.approx(whole * 1e3)
    below = sum(value for key, value in found.items() if key not in FAMILIES)
    assert below == pytest.approx(found[PASSES])


def test_devices_by_the_names_of_their_drivers():
    assert predictions.device_of("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert predictions.device_of("NVIDIA H200") is DEVICES["h200"]
    assert predictions.device_of("NVIDIA T4") is None


@pytest.mark.parametrize("kind", ["full", "natural", "mlperf"])
@pytest.mark.parametrize("tokens", [65_536, 8_192])
def test_lengths_fill_the_tokens(kind, tokens):
    lengths = Workload.of(f"base-512-{kind}").draw_tokens(tokens)
    assert tokens - 8 < lengths.sum() <= tokens
    assert 8 <= lengths.min() and lengths.max() <= 512
    if tokens == 65_536:
        mean = {"full": 512, "natural": 278, "mlperf": 254}[kind]
        assert lengths.mean() == pytest.approx(mean, rel=0.1)


# The recording of a small step on a CPU


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The file that `main` wrote, and what it printed."""
    path = tmp_path_factory.mktemp("trace") / "new" / "trace.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "model_config", lambda name: SMALL)
        patch.setattr(profiling, "TIMED", 2)
        patch.setattr(sys, "stdin", io.StringIO("go\n"))
        patch.setattr(sys, "stdout", printed := io.StringIO())
        argv = ["tiny-64-natural", "--device", "cpu", "--quick", "--wait", "--out", str(path)]
        assert gpu_trace.main(argv) == 0
        assert sys.stdin.read() == ""  # it waited for its line
    return json.loads(path.read_text()), printed.getvalue()


def test_a_step_recorded_on_a_cpu(recorded):
    found, printed = recorded
    results.check(found)
    assert found["launched"] == "eager" and found["notes"] == []
    assert found["real_tokens"] in range(249, 257)
    adds_up(found["rows"], found["total"])
    calls = {row["name"]: row["calls"] for row in found["rows"]
             if "below" not in row and "calls" in row}  # fmt: skip
    # Products add the gradients of residuals; where some tokens ask, q and kv have a sum each.
    assert calls.keys() == {*FAMILIES} - {"residual-gradient adds", GAPS}
    assert calls["sum of dy, QKV bias"] == SMALL.num_hidden_layers + 1
    assert calls["MLM products"] == 6
    assert printed.splitlines() == gpu_trace.table(found)


def test_the_table_is_short_and_says_what_matters(recorded):
    found, _ = recorded
    lines = gpu_trace.table(found)
    assert len(lines) == gpu_trace.LINES
    assert max(map(len, lines)) <= gpu_trace.WIDTH
    for family in {*FAMILIES} - {GAPS}:
        assert sum(line.startswith(family) for line in lines) == 1
    assert "tiny-64-natural" in lines[0] and "more" in lines[-1]
    noted = gpu_trace.table(found | {"notes": ["x" * 200]})
    assert len(noted) == gpu_trace.LINES and noted[2] == f"note: {'x' * 104}"


@pytest.fixture
def played(monkeypatch):
    """Runs nothing: the recording is one made by hand. The step can be a graph, or so it seems."""

    def choose(*args, choose=profiling.choose_execution):
        return dataclasses.replace(choose(*args), graph=True)

    place = Place("layer 0", QKV, "forward")
    kernels = [Kernel(step, "aten::mm", 0.0, 7.0, place, 0, 0) for step in (0, 1)]
    made = step_trace.Recorded(2, kernels, Counter(), Counter())
    monkeypatch.setattr(profiling, "model_config", lambda name: SMALL)
    monkeypatch.setattr(profiling, "choose_execution", choose)
    monkeypatch.setattr(profiling.Runner, "launch", lambda self, graph: graph)
    monkeypatch.setattr(profiling.Runner, "seconds", lambda self, launch: [0.01, 0.02])
    monkeypatch.setattr(profiling.Runner, "record", lambda self, launch, path: made)
    kept = []
    return lambda: gpu_trace.measure("tiny-64-natural", CPU, True, kept.append), kept


def test_the_graph_is_what_counts(played):
    measure, kept = played
    found = measure()
    assert [one["launched"] for one in kept] == ["eager", "graph"]
    assert found is kept[1] and found["notes"] == []
    assert found["step"]["ms"] == pytest.approx(15)
    assert families_of(found["rows"]) == pytest.approx({"GEMM forward": 7})


def test_a_step_that_cannot_be_a_graph_is_recorded_eagerly_and_says_so(played, monkeypatch):
    def launch(self, graph):
        if graph:
            raise RuntimeError("cannot be captured\nmore")

    monkeypatch.setattr(profiling.Runner, "launch", launch)
    measure, kept = played
    found = measure()
    assert len(kept) == 2 and found["launched"] == "eager"
    note = "eager, because the step as one graph failed: RuntimeError: cannot be captured"
    assert found["notes"] == [note] and gpu_trace.table(found)[2] == f"note: {note}"[:110]
    assert families_of(found["rows"]) == pytest.approx({"GEMM forward": 7})


def test_a_recording_outlives_what_fails_after_it(played, monkeypatch):
    def fails(*_):
        raise ValueError("no such family")

    monkeypatch.setattr(gpu_trace, "rows_of", fails)
    found = played[0]()
    results.check(found)
    assert found["notes"] == ["the kernels could not be told apart: ValueError: no such family"]
    assert [(row["name"], row["ms"]) for row in found["rows"]] == [("aten::mm", 0.007)]
    assert gpu_trace.table(found)[3] == "    0.007 ms       1 x aten::mm"


def test_fewer_tokens_where_memory_is_short(monkeypatch):
    tried = []

    def measured(workload, device, tokens, notes, keep):
        tried.append(tokens)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        return {"notes": notes}

    monkeypatch.setattr(gpu_trace, "_measured", measured)
    found = gpu_trace.measure("large-512-natural", torch.device("cuda"), False)
    assert tried == [65_536, 32_768, 16_384]
    assert found["notes"][0] == "65,536 tokens do not fit: OutOfMemoryError: CUDA out of memory"
    tried.clear()
    monkeypatch.setattr(gpu_trace, "LEAST_TOKENS", 40_000)
    with pytest.raises(torch.OutOfMemoryError):
        gpu_trace.measure("large-512-natural", torch.device("cuda"), False)


@pytest.mark.parametrize("name", ["base", "base-512", "base-512-short"])
def test_a_name_that_is_no_workload(name):
    with pytest.raises(UserError, match="must be MODEL-S-full, -natural or -mlperf"):
        Workload.of(name)
