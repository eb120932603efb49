"""`fastbert profile`: real recordings on a CPU at a tiny size, and handmade traces of a GPU."""

import contextlib
import io
import json
import os
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backend_bases import FigureCanvasBase
from PIL import Image

from fastbert.cli import main
from fastbert.errors import UserError
from fastbert.train.step import TrainStep
from fastbert_bench import config
from fastbert_bench.kernels import timings as kernel_timings
from fastbert_bench.kernels.costs import OPS
from fastbert_bench.measure import result as results
from fastbert_bench.profile import kernel as profile_kernel
from fastbert_bench.profile import step as profiling
from fastbert_bench.profile import trace as step_trace

ROOT = Path(__file__).parents[3]
CEILINGS = {"copies": {str(2**30): 1e12}, "bandwidth": 1e12, "matrix": 1e14}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {
        "model_type": "bert", "vocab_size": 1200, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 1, "intermediate_size": 64,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(sizes))
    return str(path)


def run_python(*argv):
    """In a process of its own, where the interpreter of Triton's kernels is off."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks")))
    return subprocess.run(
        [sys.executable, *argv], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def profile_step(model, out, *more):
    return main(
        ["profile", "step", "--model", model, "--device", "cpu", "--batch-size", "4",
         "--max-seq-length", "16", "--precision", "fp32", "--json", str(out), *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    """The JSON of a real run, the folder it lies in, and what was printed."""
    folder = tmp_path_factory.mktemp("profile")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert profile_step(model, folder / "step.json") == 0
    assert os.environ["KINETO_LOG_LEVEL"] == "99"  # or torch's profiler writes to stderr
    return json.loads((folder / "step.json").read_text()), folder, printed.getvalue()


def test_the_result_fits_the_schema_and_says_what_is_missing(recorded):
    result, _, printed = recorded
    results.check(result)
    assert result["benchmark"] == "profile-step"
    assert {one["name"] for one in result["missing"]} == {
        "idle time between kernels",
        "our Triton kernels",
    }
    for one in result["missing"]:
        assert f"missing: {one['name']}: {one['why']}" in printed
    for column in ("calls", "ms/step", "share", "MB", "GFLOP", "GB/s", "TFLOP/s", "gap us"):
        assert column in printed


def test_the_rows_add_up_to_the_step(recorded):
    result, folder, _ = recorded
    total = sum(row["ms"] for row in result["rows"])
    steps = [
        event["dur"] / 1e3
        for event in json.loads((folder / "step.trace.json").read_text())["traceEvents"]
        if event.get("name", "").startswith("step ") and event["cat"] == "user_annotation"
    ]
    assert len(steps) == result["step"]["recorded_steps"] == 3
    assert total == pytest.approx(sum(steps) / 3, rel=0.01)
    assert sum(row["share"] for row in result["rows"]) == pytest.approx(1)
    for row in result["rows"]:
        assert sum(kernel["ms"] for kernel in row["kernels"]) == pytest.approx(row["ms"])


def test_every_op_is_found_in_its_layer_forward_and_backward(recorded):
    rows = {(row["layer"], row["op"], row["direction"]) for row in recorded[0]["rows"]}
    ops = ("linear", "attention", "linear_gelu", "dropout_add_layer_norm")
    for direction in ("forward", "backward"):
        assert {(f"layer {i}", op, direction) for i in range(3) for op in ops} <= rows
        assert ("embeddings", "embed_layer_norm", direction) in rows
        assert ("masked words", "gelu_layer_norm", direction) in rows
        assert {("pooler", "", direction), ("next sentence", "", direction)} <= rows
    assert ("masked words", "linear_cross_entropy", "both") in rows
    assert ("optimizer", "adamw", "step") in rows
    calls: Counter[tuple[str, str, str]] = Counter()
    for row in recorded[0]["rows"]:
        calls[row["layer"], row["op"], row["direction"]] += row["calls"]
    for direction in ("forward", "backward"):  # qkv, attention's output, down
        assert calls["layer 1", "linear", direction] == 3


def test_what_must_be_moved_and_computed(recorded):
    result = recorded[0]
    T, H, F = result["real_tokens"], 32, 64
    rows = {(row["layer"], row["op"], row["direction"]): row for row in result["rows"]}
    gelu = rows["layer 0", "linear_gelu", "forward"]
    assert gelu["flops"] == 2 * T * H * F
    assert gelu["bytes"] == 2 * (2 * T * H + 2 * F * H + 4 * T * F)  # the table's, in fp32
    qkv = next(
        row for row in result["rows"]
        if (row["layer"], row["op"], row["direction"]) == ("layer 0", "linear", "backward")
        and row["sizes"]["F"] == 3 * H
    )  # fmt: skip
    assert qkv["flops"] == 2 * (2 * T * H * 3 * H)  # dx and dW, seen as products in the trace
    parameters = rows["optimizer", "adamw", "step"]["sizes"]["P"]
    assert rows["optimizer", "adamw", "step"]["bytes"] == 32 * parameters
    for row in result["rows"]:
        if row["gap_us"] is not None:
            floor = row["ms"] * 1e3 - row["gap_us"]
            assert floor == pytest.approx(row["floor_share"] * row["ms"] * 1e3)
    worth = [row["ms"] * 1e3 if row["gap_us"] is None else row["gap_us"] for row in result["rows"]]
    assert worth == sorted(worth, reverse=True)


def test_three_steps_are_no_whole_run(recorded):
    result, _, printed = recorded
    assert "whole run" not in printed
    assert any("(as in a run of 100,000 steps)" in line for line in result["execution"])


def test_calls_are_whole_or_told_as_what_they_are():
    row = {
        "name": "x", "layer": "layer 0", "op": "linear", "sizes": {}, "direction": "forward",
        "ms": 1.0, "share": 1.0, "kernels": [], **profiling._UNKNOWN,
    }  # fmt: skip
    assert "forward       2 " in profiling.table({"rows": [row | {"calls": 2.0}]})
    assert "forward     2.7 " in profiling.table({"rows": [row | {"calls": 8 / 3}]})
    syncs = [{"name": "a", "where": "b", "calls": calls} for calls in (2.0, 8 / 3)]
    step = {"launched": "eager", "ms": 1, "ms_p20": 1, "ms_p80": 1, "recorded_ms": 1}
    said = profiling._summary(
        {"step": step | {"recorded_steps": 3}, "idle": None, "host_syncs": syncs, "origins": {},
         "ceilings": CEILINGS, "attribution": "", "on_paper": None}
    )  # fmt: skip
    assert "host syncs: 4.7 a step" in said
    assert "  2 x a in b" in said and "  in 3 steps 8 x a in b" in said


def test_the_trace_holds_our_ranges(recorded):
    trace = json.loads((recorded[1] / "step.trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"embeddings", "layer 0", "layer 2", "masked words", "optimizer", "step 0"} <= names
    assert any(str(name).startswith("attention T=") for name in names)


def test_a_host_sync_put_into_the_step_is_reported(model, recorded, tmp_path, monkeypatch, capsys):
    def asks(self, batch, accumulate=TrainStep.accumulate):
        accumulate(self, batch)
        self._loss.item()
        self._loss.item()

    def syncs_of(result):
        found = [sync for sync in result["host_syncs"] if sync["where"].startswith("rest")]
        assert {sync["name"] for sync in found} <= {"aten::_local_scalar_dense"}
        return sum(sync["calls"] for sync in found)

    monkeypatch.setattr(TrainStep, "accumulate", asks)
    assert profile_step(model, tmp_path / "sync.json", "--trace", str(tmp_path / "t.json")) == 0
    result = json.loads((tmp_path / "sync.json").read_text())
    assert syncs_of(result) == syncs_of(recorded[0]) + 2
    assert "2 x aten::_local_scalar_dense in rest of the step forward" in capsys.readouterr().out
    assert (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("profile step --step graph --device cpu", "step = 'graph': CUDA graphs need a GPU"),
        ("profile step --json no/such/x.json", "json = 'no/such/x.json': no such folder"),
        ("profile step --trace no/such/x.json", "trace = 'no/such/x.json': no such folder"),
        ("profile step --json .", "json = '.' is no file: give the path of one"),
        ("profile step --json here.json", "trace = 'here.trace.json' is no file: give the path"),
        ("profile step --lengths no.txt", "lengths = 'no.txt': no such file or folder"),
        ("profile kernel attenion", "unknown kernel 'attenion': did you mean 'attention'? (atten"),
        ("profile kernel", "profile kernel needs one of attention, dropout_add_layer_norm,"),
        ("profile kernel adamw --shape T=1,Q=2", "shape = 'T=1,Q=2': 'Q' must be one of T, S, H,"),
        ("profile kernel adamw --shape T", "shape = 'T': 'T' must be LETTER=NUMBER, e.g. T=4096"),
        ("profile kernel attention --shape T=9,S=4", "shape: T = 9 must be a multiple of S = 4"),
        ("profile kernel adamw --png x.json", "png = 'x.json' must end in one of .png, .svg,"),
        ("profile kernel adamw --png x", "png = 'x' must end in one of .png, .svg, .pdf,"),
        ("profile kernel adamw --png no/such/x.png", "png = 'no/such/x.png': no such folder"),
    ],
)
def test_mistakes_are_one_line(argv, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "ceilings", lambda *_: pytest.fail("it began to measure"))
    (tmp_path / "here.trace.json").mkdir()
    assert main(argv.split()) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith(f"fastbert: error: {line}")


def test_matplotlib_writes_every_picture_that_may_be_asked_for():
    assert {one[1:] for one in config.PICTURES} <= {*FigureCanvasBase.get_supported_filetypes()}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "profile kernel needs one of attention, dropout_add_layer_norm,"),
        (["lam"], "unknown kernel 'lam': did you mean 'lamb'? (attention,"),
        (["lamb", "T=x"], "shape = 'T=x': 'T=x' must be LETTER=NUMBER, e.g. T=4096"),
    ],
)
def test_mistakes_of_the_call_that_ncu_watches_are_one_line(argv, line, capsys):
    assert profile_kernel.once(*argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"fastbert: error: {line}") and shown.count("\n") == 1


def test_mistakes_and_help_import_nothing_slow():
    requests = ["profile", "profile kernel attenion", "profile kernel adamw --shape T=x",
                "profile step --model bsae", "profile step -h", "profile kernel -h"]  # fmt: skip
    code = (
        "import sys; from fastbert.cli import main\n"
        "for argv in sys.argv[1:]:\n"
        "    main(argv.split())\n"
        "    assert not {'torch', 'triton', 'numpy'} & set(sys.modules), argv\n"
    )
    assert run_python("-c", code, *requests).returncode == 0


# A GPU's traces, made by hand: what a launch, a kernel and a node of autograd look like there.


class Trace:
    def __init__(self):
        self.events = []

    def add(self, cat, name, start, end, thread=1, **args):
        self.events.append(
            {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": thread,
             "args": args}
        )  # fmt: skip

    def launch(self, name, at, start, end, thread=1, cat="kernel"):
        number = len(self.events)
        self.add("cuda_runtime", "cudaLaunchKernel", at, at + 1, thread, correlation=number)
        self.add(cat, name, start, end, "stream 7", correlation=number)


def eager_trace():
    trace, op = Trace(), "linear T=4 H=8 F=16"
    product = {"Input type": ["c10::BFloat16"] * 2, "Input Dims": [[4, 8], [8, 16]]}
    for t in (0, 1000):
        trace.add("user_annotation", f"step {t // 1000}", t, t + 400)
        trace.add("user_annotation", "layer 3", t + 10, t + 100)
        trace.add("user_annotation", op, t + 20, t + 60)
        number = {"Sequence number": 7 + t, "Fwd thread id": 0}
        trace.add("cpu_op", "_Linear", t + 21, t + 59, **number)
        trace.add("cpu_op", "aten::mm", t + 30, t + 50, **product)
        trace.launch("sm90_gemm", t + 35, t + 40, t + 60)
        trace.launch("splitKreduce_kernel", t + 40, t + 60, t + 70)
        node = {"Sequence number": 7 + t, "Fwd thread id": 1}
        trace.add("cpu_op", step_trace._EVALUATE + "_LinearBackward", t + 150, t + 200, 2, **node)
        trace.launch("our_kernel", t + 160, t + 170, t + 190, 2)
        trace.add("cpu_op", "aten::_local_scalar_dense", t + 300, t + 330)
        trace.launch("Memcpy DtoH (Device -> Pinned)", t + 310, t + 320, t + 325, cat="gpu_memcpy")
    return {"traceEvents": trace.events}


def test_a_gpus_kernels_find_their_layer_and_whose_they_are():
    found = step_trace.analyse(eager_trace(), cuda=True)
    rows = profiling.rows_of(found, CEILINGS, torch.bfloat16, True, frozenset({"our_kernel"}))
    by_name = {row["name"]: row for row in rows}
    op = "linear T=4 H=8 F=16"
    forward = by_name[f"layer 3 {op} forward"]
    assert forward["ms"] == pytest.approx(0.030) and forward["calls"] == 1
    assert forward["flops"] == 2 * 4 * 8 * 16  # one product, though two kernels
    assert forward["bytes"] == 2 * (4 * 8 + 8 * 16 + 4 * 16)
    assert {kernel["origin"] for kernel in forward["kernels"]} == {"cuBLAS"}
    (kernel,) = by_name[f"layer 3 {op} backward"]["kernels"]
    assert (kernel["origin"], kernel["calls"], kernel["ms"]) == ("our Triton kernels", 1, 0.02)
    syncs = {name: count for (name, _), count in found.syncs.items()}
    assert syncs == {"aten::_local_scalar_dense": 2, "Memcpy DtoH (Device -> Pinned)": 2}


def test_idle_time_of_a_device():
    told = profiling.idle(step_trace.analyse(eager_trace(), cuda=True))
    assert told["span_ms"] == pytest.approx(0.285)
    assert told["idle_ms"] == pytest.approx(0.230)  # 70 to 170 and 190 to 320
    assert told["gaps"] == 2
    assert told["longest"][0]["before"].startswith("Memcpy DtoH")


def test_a_graphs_kernels_take_the_places_of_the_eager_steps():
    graph = Trace()
    graph.add("user_annotation", "step 0", 0, 20)
    graph.add("cuda_runtime", "cudaGraphLaunch", 5, 15, correlation=1)
    names = ["batch_copy", "sm90_gemm", "splitKreduce_kernel", "our_kernel"]
    for index, name in enumerate(names):
        graph.add("kernel", name, 30 + 10 * index, 40 + 10 * index, "stream 7", correlation=1)
    recorded = step_trace.analyse({"traceEvents": graph.events}, cuda=True)
    eager = step_trace.analyse(eager_trace(), cuda=True)
    kernels = step_trace.label_like(recorded, eager).kernels
    places = {kernel.name: kernel.place for kernel in kernels}
    assert places["batch_copy"].layer == "not attributed"
    assert places["sm90_gemm"] == ("layer 3", "linear T=4 H=8 F=16", "forward")
    assert places["our_kernel"] == ("layer 3", "linear T=4 H=8 F=16", "backward")
    assert [kernel.flops for kernel in kernels] == [0, 1024, 0, 0]


# One kernel


def test_one_kernel_over_sizes_compiled_and_drawn(tmp_path):
    command = "import sys; from fastbert.cli import main; sys.exit(main())"
    options = ["--device", "cpu", "--shape", "T=64,S=16", "--arch", "sm_90"]
    options += ["--json", str(tmp_path / "k.json"), "--png", str(tmp_path / "k.png")]
    done = run_python("-c", command, "profile", "kernel", "attention", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "k.json").read_text())
    results.check(result)
    sizes = [(row["direction"], row["sizes"]["T"]) for row in result["rows"]]
    assert sizes == [(way, T) for T in (16, 64) for way in ("forward", "backward")]
    for row in result["rows"]:
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and len(row["rounds_ms"]) >= 5
    largest = result["rows"][-2]
    assert largest["flops"] == 4 * 64 * 16 * 64
    chosen = {
        (row["kernel"], row["configuration"].split()[0], row["arch"])
        for row in result["kernels"] if row["chosen"]
    }  # fmt: skip
    assert chosen == {
        ("attention_forward_kernel", "short", 90), ("attention_backward_kernel", "tile", 90)
    }  # fmt: skip
    for row in result["kernels"]:
        if row["chosen"]:
            assert row["registers"] > 16 and row["spills"] == 0 and 0 < row["occupancy"] <= 1
            # 128 x 128 scores of heads of 64: two products forward, five backward.
            products = 5 if "backward" in row["kernel"] else 2
            assert row["cost"]["flops"] == products * 2 * 128 * 128 * 64
            assert f"TFLOP/s by {row['cost']['limit']}" in done.stdout
        assert not row["chosen"] or row["kernel"] in done.stdout
    assert "not chosen" not in done.stdout and "float32; ceilings here" in done.stdout
    assert result["dtype"] == "float32"
    why = {one["name"]: one["why"] for one in result["missing"]}
    assert why["counters of ncu"] == "it needs a GPU"
    assert "plain PyTorch" in done.stdout and "missing: times of our Triton kernels" in done.stdout
    with Image.open(tmp_path / "k.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("op", OPS)
def test_every_op_runs_alone_on_a_cpu(op):
    cpu = torch.device("cpu")
    sizes = profile_kernel.sizes_of(op, {"T": 32, "S": 16, "H": 64, "V": 100}, cuda=False)
    workload = profile_kernel.workload_of(op, cpu, sizes)
    (contender,) = workload.contenders
    assert contender.name == "plain PyTorch"
    for direction in workload.directions:
        for call in kernel_timings.calls_of(contender, direction, [workload.inputs()]):
            call()
    assert profile_kernel.sweep(op, sizes)[-1] == sizes


@pytest.mark.parametrize(
    ("op", "asked", "made"),
    [
        ("attention", {"T": 32}, {"S": 32}),
        ("attention", {"T": 1000}, {"S": 500}),
        ("attention", {"S": 2048}, {"T": 65_536}),
        ("attention", {"S": 100_000}, {"T": 100_000}),
        ("attention", {"A": 5}, {"H": 320}),
        ("attention", {"H": 200}, {"A": 2}),
        ("dropout_add_layer_norm", {"T": 33}, {"S": 33}),
        ("dropout_add_layer_norm", {"T": 33, "S": 32}, {}),
        ("embed_layer_norm", {"T": 600}, {"S": 300}),
    ],
)
def test_a_shape_given_in_part_is_made_to_fit(op, asked, made):
    sizes = profile_kernel.sizes_of(op, asked, cuda=True)
    assert asked | made == {key: sizes[key] for key in asked | made}
    assert profile_kernel.sweep(op, sizes)[-1] == sizes


def test_the_interpreter_is_not_asked_to_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sizes = profile_kernel.sizes_of("mask_tokens", {}, cuda=True)
    rows, missing = profile_kernel.compiled_kernels("mask_tokens", sizes, (90,))
    assert rows == [] and "TRITON_INTERPRET" in missing[0]["why"]


def test_what_was_measured_stands_beside_the_bound():
    rows = [
        {"direction": way, "tflops": tflops, "gbps": gbps}
        for tflops, gbps in ((1, 10), (2, 20))  # the larger size comes last
        for way, tflops, gbps in (("forward", tflops, gbps), ("backward", 3 * tflops, 3 * gbps))
    ]

    def reached(op, kernel, flops, rows=rows):
        return profile_kernel.measured(op, {"kernel": kernel, "cost": {"flops": flops}}, rows)

    assert reached("attention", "attention_forward_kernel", 1) == 2e12
    assert reached("attention", "attention_backward_query_kernel", 1) == 6e12
    assert reached("embed_layer_norm", "embed_layer_norm p=0.1", 0) == 20e9
    assert reached("embed_layer_norm", "reduce_rows", 0) == 60e9
    assert reached("adamw", "prepare", 0, [{"direction": "step", "tflops": 0, "gbps": 5}]) == 5e9


def test_counters_of_ncu_or_why_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profile_kernel.counters("attention", "") == ([], "ncu is not installed")
    ncu = tmp_path / "ncu"

    def install(script):
        ncu.write_text(f"#!/bin/sh\n{script}\n")
        ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)

    install("echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1")
    rows, why = profile_kernel.counters("attention", "")
    assert rows == [] and why.startswith("ncu failed: ==ERROR== ERR_NVGPUCTRPERM")
    install(
        """echo '==PROF== Profiling'
echo '"ID","Kernel Name","gpu__time_duration.sum"'
echo '"","","ns"'
echo '"0","attention_forward_kernel","1234"'"""
    )
    rows, why = profile_kernel.counters("attention", "T=64")
    assert why == ""
    (row,) = rows
    assert row == {"kernel": "attention_forward_kernel", "gpu__time_duration.sum [ns]": "1234"}


@pytest.mark.parametrize("S", [1, 2, 3, 8, 96])
def test_sequences_of_any_length_hold_every_token(S):
    for lengths in ("full", "natural"):
        found = kernel_timings.filled(lengths, 97, S)
        assert found.sum() == 97 and found.min() >= 1 and found.max() <= S
    assert list(kernel_timings.filled("full", 96, S)) == [S] * (96 // S)


def test_a_number_of_tokens_without_small_divisors_is_one_sequence_or_refused():
    sizes = profile_kernel.sizes_of("attention", {"T": 97}, cuda=False)
    assert (sizes["T"], sizes["S"]) == (97, 97)
    with pytest.raises(UserError, match="T = 65537 is no multiple of any length of 8 to 512: give"):
        profile_kernel.sizes_of("attention", {"T": 65537}, cuda=True)
    assert profile_kernel.sizes_of("bias_gelu", {"T": 65537}, cuda=True)["T"] == 65537
