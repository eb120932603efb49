"""`python -m fastbert_bench.gpu` rehearsed on a CPU, and its judgement tried on what is wrong."""

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fastbert_bench.gpu import __main__ as gpu
from fastbert_bench.gpu import step as gpu_step
from fastbert_bench.kernels import checks as kernel_checks
from fastbert_bench.kernels import costs as kernels
from fastbert_bench.kernels import stage as kernel_stage
from fastbert_bench.kernels import timings as kernel_timings
from fastbert_bench.kernels.checks import Case, check_case
from fastbert_bench.measure import processes, timing
from fastbert_bench.measure import result as results
from fastbert_bench.measure.workloads import TINY
from fastbert_bench.report import files as report_files

CPU = torch.device("cpu")
OPS = ["fault:raise", "bias_gelu", "fault:kill"]  # an op after a crash and before one


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, host_site, installed):
    """(exit code, what was printed, stage, parts) of a run of everything with two crashes in it.

    From the wheel, and its processes see the packages of a GPU's host only.
    """
    folder = tmp_path_factory.mktemp("gpu")
    arguments = ["--device", "cpu", "--quick", "--budget", "3000", "--out", "below/results"]
    for op in OPS:
        arguments += ["--op", op]
    # From another folder, and to a relative one.
    done = subprocess.run(
        [installed.python, "-m", "fastbert_bench.gpu", *arguments], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(host_site)}, capture_output=True, text=True,
    )  # fmt: skip
    out = folder / "below" / "results"
    assert list(folder.iterdir()) == [out.parent]
    parts = {path.stem: json.loads(path.read_text()) for path in (out / "kernels").glob("*.json")}
    stage = json.loads((out / "kernels.json").read_text())
    return done.returncode, done.stdout, stage, parts, out


@pytest.mark.slow
def test_a_crash_costs_one_op_and_the_exit_code(rehearsal):
    code, printed, stage, parts, _ = rehearsal
    assert code == 1
    assert list(stage["ops"]) == OPS
    assert "a fault that was asked for" in stage["ops"]["fault:raise"]["error"]
    assert "exit code -9" in stage["ops"]["fault:kill"]["error"]
    assert printed.count("FAILED") == 2 and "2 failures" in printed.splitlines()[-1]
    # What was found before the crash is kept.
    assert stage["ops"]["fault:kill"]["checks"] == parts["fault-kill-checks"]["checks"] != []
    assert stage["ops"]["bias_gelu"]["error"] is None
    assert stage["ops"]["bias_gelu"]["checks"] == parts["bias_gelu-checks"]["checks"] != []


@pytest.mark.slow
def test_every_stage_leaves_its_file_and_its_lines(rehearsal):
    _, printed, _, _, out = rehearsal
    told = json.loads((out / "gpu.json").read_text())
    names = list(told["parts"])
    assert names[:4] == ["compile", "smoke", "pretrain", f"{TINY}: fastbert"]
    assert told["not_run"] == [] and len(told["failures"]) == 2
    assert all(part["why"] is None for name, part in told["parts"].items() if "fault" not in name)
    smoke, pretrain = (json.loads((out / f"{n}.json").read_text()) for n in ("smoke", "pretrain"))
    assert len(smoke["checks"]) > 30 and len(pretrain["checks"]) == 6
    assert all(row["ok"] for row in pretrain["checks"])
    assert all(row["ok"] is not False for row in smoke["checks"])
    step = json.loads((out / f"step-{TINY}.json").read_text())
    results.check(step)
    rows = [row["name"] for row in step["rows"]]
    assert rows == ["fastbert", "hf-sdpa", "fastbert.accelerate"]
    dropin = json.loads((out / "dropin.json").read_text())
    assert len(dropin["checks"]) == 11 and all(row["ok"] for row in dropin["checks"])
    assert dropin["loop"]["ratio"] > 0 and "dropin: 11 of 11 checks hold" in printed
    assert step["drift"] and step["floor_ms"] and step["ablations"]
    lines = printed.splitlines()
    assert len(lines) - len(names) <= gpu.LINES
    story = "\n".join(lines[len(names) :])
    for begin in ("smoke: ", "pretrain: 6 of 6", f"{TINY}: ", "products on", "ceilings: "):
        assert begin in story
    assert sum(len(line) + 1 for line in lines) < 12_000  # one reply


@pytest.mark.slow
def test_the_report_takes_what_it_leaves(rehearsal):
    found, refused = report_files.load([str(rehearsal[-1])])
    assert refused == []
    assert {one.kind for one in found} >= {"step", "kernels"}


# The budget


def parts_of(*told, log):
    """Parts (name, estimate, what goes wrong) that do nothing but note their name."""
    return [
        gpu.Part(name, "smoke", seconds, action=lambda left, n=name, w=why: (log.append(n), w)[1])
        for name, seconds, why in told
    ]


def run_of(tmp_path, budget):
    return gpu.Run(gpu.Asked(tmp_path, "cpu"), budget)


def test_a_part_begins_only_if_its_estimate_fits(tmp_path):
    log = []
    run = run_of(tmp_path, 100.0)
    run.go(parts_of(("a", 60, None), ("b", 200, None), ("c", 90, None), ("d", 101, None), log=log))
    assert log == ["a", "c"] and run.not_run == ["b", "d"]
    run.save()
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["not_run"] == ["b", "d"] and list(told["parts"]) == ["a", "c"]
    assert run.failures() == []  # no time is no failure
    assert run.story()[-2] == "not run, for want of time: b, d"


def test_what_takes_longer_leaves_less(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    limits = []

    def work(left):
        limits.append(left)
        clock[0] += 50

    run = run_of(tmp_path, 100.0)
    run.go([gpu.Part(name, "smoke", 30, action=work) for name in "abc"])
    assert run.not_run == ["c"]
    assert limits == [95.0, 50.0]  # 2.5 x 30 + 20, and what is left


def test_a_failure_is_told_and_the_rest_runs(tmp_path):
    log = []
    run = run_of(tmp_path, 100.0)
    rival = dataclasses.replace(parts_of(("r", 1, "no package"), log=log)[0], tolerated=True)
    run.go([*parts_of(("a", 1, "exit code 1: oh"), log=log), rival,
            *parts_of(("b", 1, None), log=log)])  # fmt: skip
    assert log == ["a", "r", "b"]
    assert run.failures() == ["a: exit code 1: oh"]
    assert any(line.startswith("FAILED a: exit code 1: oh") for line in run.story())


def test_an_earlier_runs_figures_do_not_stand_for_this_ones(tmp_path):
    stale = tmp_path / f"step-{TINY}.json"
    stale.write_text("{}")
    path = gpu_step.piece(tmp_path, TINY, "fastbert")
    part = gpu.Part(f"{TINY}: fastbert", "step", 1, "fastbert_bench.gpu.step",
                    (TINY, "fastbert"), path)  # fmt: skip
    run = run_of(tmp_path, 100.0)
    run.done[part.name] = {"why": "exit code 1: oh", "stage": "step", "tolerated": False}
    run._take(part, "exit code 1: oh", 1.0)
    assert not stale.exists()


def test_most_wanted_first_and_the_first_call_fits():
    """Smoke, the main job and all steps within the first call's budget, by the estimates."""
    todo = list(gpu.parts(gpu.Asked(Path("x"))))
    stages = [part.stage for part in todo if part.name != "compile"]
    assert list(dict.fromkeys(stages)) == list(gpu.STAGES)
    first = [part for part in todo if part.stage in ("smoke", "pretrain", "step")]
    assert sum(part.seconds for part in first) < 330 - 30
    steps = [part.name for part in todo if part.stage == "step"]
    assert steps[0] == "base-512-full: fastbert" and "large-512-mlperf: hf-sdpa" in steps
    kernels_parts = [part.name for part in todo if part.stage == "kernels"]
    last_check = max(i for i, name in enumerate(kernels_parts) if name.endswith(" checks"))
    timings = [name for name in kernels_parts[last_check:] if name.endswith(" timings")]
    assert timings[1:5] == [f"{op} timings" for op in gpu.MAIN_OPS]
    names = [part.name for part in todo]
    assert len(names) == len(set(names))
    paths = [part.path for part in todo if part.path]
    assert len(paths) == len(set(paths))
    ablations = [part for part in todo if part.name.partition(": ")[2] in gpu_step.ABLATIONS]
    assert len(ablations) == len(gpu_step.ABLATIONS) and all(part.tolerated for part in ablations)


def test_the_story_is_cut_where_it_is_longest():
    sections = [["a"], [f"b{i}" for i in range(50)], [f"c{i}" for i in range(40)]]
    cut = gpu.cut(sections, 30)
    assert sum(map(len, cut)) == 30 and cut[0] == ["a"]
    assert cut[1][0] == "b0" and cut[1][-1] == f"  … {50 - len(cut[1]) + 1} lines more, in the JSON"
    assert abs(len(cut[1]) - len(cut[2])) <= 1
    assert gpu.cut(sections, 91) == sections


def test_a_hang_before_it_was_asked_is_stopped(tmp_path, monkeypatch):
    """A process that waits while there is no time left for it does not stay."""
    started = []
    start = processes.start

    def noted(*arguments):
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(processes, "start", noted)
    path = tmp_path / "x.json"
    arguments = ("mask_tokens", str(path), "cpu", "--quick")
    waiting = gpu.Part("w", "kernels", 500, "fastbert_bench.kernels.stage", arguments, path)
    run = run_of(tmp_path, 100.0)
    run.go([*parts_of(("a", 1, None), log=[]), waiting])
    assert run.not_run == ["w"]
    assert [process.returncode is not None for process in started] == [True]


@pytest.mark.parametrize("budget", ["0", "-3", "inf", "nan", "soon"])
def test_a_budget_is_seconds(budget, capsys):
    with pytest.raises(SystemExit) as error:
        gpu.main(["--budget", budget])
    assert error.value.code == 2 and "--budget" in capsys.readouterr().err


@pytest.mark.slow
def test_every_check_is_a_boolean_with_its_numbers(rehearsal):
    _, _, stage, _, _ = rehearsal
    checks = {check["check"]: check for check in stage["ops"]["bias_gelu"]["checks"]}
    assert all(check["ok"] for name, check in checks.items() if "CUDA graph" not in name)
    compared = checks["fp16 R=5 H=128 tanh: dbias"]
    assert 0 < compared["error"] <= compared["allowed"] < 0.1
    assert "fp16 R=5 H=128 none: torch.compile" in checks
    assert checks["fp16 R=5 H=128 none: CUDA graph"]["why"] == "no GPU"
    assert checks["fp16 R=5 H=128 none: backward 2 times the same bits"]["ok"]


@pytest.mark.slow
def test_rows_hold_times_work_and_ratios(rehearsal):
    _, printed, stage, _, _ = rehearsal
    assert {"device", "torch", "triton", "commit", "date"} <= stage["conditions"].keys()
    rows = {(row["op"], row["direction"], row["contender"]): row for row in stage["rows"]}
    for direction in ("forward", "backward"):
        ours, eager = (rows["bias_gelu", direction, name] for name in ("ours", "eager"))
        sizes = ours["sizes"]
        elements = sizes["T"] * sizes["F"]
        assert ours["bytes"] == eager["bytes"] == elements * (4 if direction == "forward" else 6)
        assert 0 < ours["ms_p20"] <= ours["ms"] <= ours["ms_p80"]
        assert ours["gbps"] == pytest.approx(ours["bytes"] / ours["ms"] / 1e6)
        assert ours["floor_share"] == pytest.approx(
            ours["bytes"] / stage["ceilings"]["bandwidth"] / ours["ms"] * 1e3
        )
        assert ours["ratios"]["eager"] == pytest.approx(ours["ms"] / eager["ms"])
        assert ours["target_met"] is False  # in the interpreter
        assert "GELU only times a gate" in rows["bias_gelu", direction, "liger"]["why"]
    assert "bandwidth_share ≥ 0.85: MISSED" in printed


def test_a_hang_is_stopped(tmp_path):
    process = kernel_stage.start("fault:hang", tmp_path / "hang.json", "cpu", True)
    assert "stopped after 2 s" in processes.finish(process, 2.0)
    assert process.returncode == -9


@pytest.mark.slow
def test_what_cannot_be_compiled_ahead_is_told(tmp_path):
    ops = ["mask_tokens", "fault:raise"]
    notes = kernel_stage.compile_all(ops, tmp_path, "cpu", True, halves=("timings",))
    assert len(notes) == 1 and notes[0].startswith("compiling fault:raise 0/1: exit code 1")


def square(x):
    return x * x


def verdicts(op, *, dtype=torch.float32, deep=False):
    """{what: whether it holds} for an op that should be `square`."""
    case = Case("case", dtype, op, square, lambda: {"x": torch.randn(9, 8)}, deep=deep)
    return {row["check"]: row["ok"] for row in check_case(case, CPU, False)}


class Flaky(torch.autograd.Function):
    """A square whose gradient differs in the last bits from run to run."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dout):
        Flaky.calls += 1
        (x,) = ctx.saved_tensors
        return 2 * x * dout * (1 + 1.2e-7 * Flaky.calls)


def unwritten(x):
    out = torch.empty_like(x)
    out[:-1] = x[:-1] * x[:-1]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_right_passes(dtype):
    assert verdicts(square, dtype=dtype) == {"case: out": True, "case: dx": True}


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        (lambda x: x * x + 1e-4, {"out"}),
        (lambda x: x * x.detach(), {"dx"}),
        (lambda x: torch.where(torch.arange(8) == 3, 1.01, 1.0) * x * x, {"out", "dx"}),
        (lambda x: (x * x).where(x > 0, x * x * torch.nan), {"out", "dx"}),
        (unwritten, {"out", "dx"}),
        (lambda x: (x * x).double(), {"out"}),
        (lambda x: (x * x)[:-1], {"out", "dx"}),
    ],
)
def test_what_is_wrong_is_caught(op, wrong):
    found = verdicts(op)
    assert {name.removeprefix("case: ") for name, ok in found.items() if ok is False} == wrong


def test_a_backward_that_differs_from_run_to_run_is_caught():
    found = verdicts(Flaky.apply, deep=True)
    assert found["case: dx"] and not found["case: backward 2 times the same bits"]


def test_poison_goes_away_again():
    before = torch.empty, torch.empty_like
    with kernel_checks.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
    with contextlib.suppress(KeyError), kernel_checks.poisoned():
        raise KeyError
    assert (torch.empty, torch.empty_like) == before


def test_failures_are_told_and_missed_targets_are_not():
    checks = [
        {"check": "good", "ok": True},
        {"check": "not here", "ok": None, "why": "no GPU"},
        {"check": "bad", "ok": False, "error": 0.5, "allowed": 0.1},
    ]
    row = {"op": "lamb", "direction": "step", "contender": "eager", "why": "missing"}
    stage = {"ops": {"lamb": {"error": None, "checks": checks[:2]}}, "rows": [row]}
    assert kernel_stage.failures(stage) == []
    stage["ops"]["lamb"]["checks"] = checks
    stage["rows"] = [row | {"contender": "ours triton"}]
    assert kernel_stage.failures(stage) == [
        "lamb: bad: error 5.00e-01, allowed 1.00e-01",
        "lamb step, ours triton: missing",
    ]


def timed(op, direction, contender, ms, S=512):
    sizes = kernels.model_sizes(768, S)
    row = {"op": op, "direction": direction, "contender": contender, "sizes": sizes}
    return row | {"ms": ms, "ms_p20": ms, "ms_p80": ms}


H100 = {"bandwidth": 3e12, "matrix": 800e12}


@pytest.mark.parametrize(
    ("rows", "hopper", "met"),
    [
        ([timed("attention", "forward", "ours", 0.309)], True, True),  # 103 GFLOP at 333.6 TFLOP/s
        ([timed("attention", "forward", "ours", 0.311)], True, False),
        ([timed("attention", "backward", "ours", 0.945)], True, True),
        ([timed("attention", "forward", "ours", 0.168, S=128)], True, True),  # 0.135 ms / 0.8
        ([timed("attention", "forward", "ours", 0.171, S=128)], True, False),
        ([timed("attention", "forward", "ours", 2.0)], False, None),
        ([timed("attention", "forward", "ours", 2.0),
          timed("attention", "forward", "fa2 p=0.1", 2.1)], False, True),
        ([timed("dropout_add_layer_norm", "forward", "ours", 0.118)], True, True),
        ([timed("dropout_add_layer_norm", "forward", "ours", 0.119)], True, False),
        ([timed("lamb", "step", "ours", 1.29), timed("lamb", "step", "adamw", 1.0)], True, True),
        ([timed("lamb", "step", "ours", 1.31), timed("lamb", "step", "adamw", 1.0)], True, False),
        ([timed("linear_gelu", "forward", "ours", 1.0),
          timed("linear_gelu", "forward", "bare gemm", 0.96)], True, True),
        ([timed("linear_cross_entropy", "both", "ours", 1.2),
          timed("linear_cross_entropy", "both", "bare gemms", 1.0)], True, False),
    ],
)  # fmt: skip
def test_targets(rows, hopper, met):
    ours = kernel_timings.finish(rows, H100, hopper)[0]
    assert ours["target_met"] is met


def test_the_table_of_a_whole_run_fits_into_one_reply():
    rows = []
    for cost in kernels.COSTS:
        for sizes in kernel_timings.shapes(cost.op, torch.device("cuda"), False):
            names = ["ours", "eager", "compile", "liger"]
            names += ["ours p=0", "fa2 p=0.1", "fa2 p=0", "cudnn p=0.1"] * (cost.op == "attention")
            same = [timed(cost.op, cost.direction, n, 1.0) | {"sizes": sizes} for n in names]
            rows += kernel_timings.finish(same, H100, True)
    many = [{"check": "bad " * 40, "ok": False}] * 100
    ops = {op: {"error": None, "checks": many if op == "lamb" else []} for op in kernels.OPS}
    stage = {"conditions": {}, "ceilings": H100, "seconds": 200.0, "ops": ops, "rows": rows}
    table = kernel_stage.table(stage)
    assert len(table) < 11_500 and "100 failures" in table and "85 more" in table
    assert all(f"\n{op}: " in table for op in kernels.OPS) and "… cut" not in table
    assert "… cut" in kernel_stage.table(stage, limit=5000)


def test_the_readme_holds_the_table():
    committed = kernels.README.read_text(encoding="utf-8")
    told = "run python -m fastbert_bench.kernels.costs --readme"
    assert kernels.with_table(committed) == committed, told


def test_the_table_quotes_committed_measurements(tmp_path):
    folder = tmp_path / "nvidia-h100"
    folder.mkdir()
    row = kernel_timings.finish([timed("bias_gelu", "forward", "ours", 0.3)], H100, True)[0]
    stage = {"conditions": {"device_type": "cuda"}, "rows": [row]}
    (folder / "kernels.json").write_text(json.dumps(stage))
    lines = list(kernels.table_lines(tmp_path))
    assert "nvidia-h100: 300 (89%)" in next(line for line in lines if "`bias_gelu` forward" in line)
    assert sum("not yet run on a GPU" in line for line in lines) == len(lines) - 3
    stage["conditions"]["device_type"] = "cpu"
    (folder / "kernels.json").write_text(json.dumps(stage))
    with pytest.raises(ValueError, match="not measured on a GPU"):
        list(kernels.table_lines(tmp_path))


@pytest.mark.parametrize(("H", "layers"), [(768, 12), (1024, 24)])
def test_parameters_are_those_of_bert(H, layers):
    numels = kernel_timings.parameter_sizes(H, layers, kernels.VOCABULARY)
    assert sum(numels) == kernels.model_sizes(H, 512)["P"]
    assert sum(numels) == {768: 110_106_428, 1024: 336_226_108}[H]
    spans = kernel_timings.aligned_spans(numels)
    assert [stop - start for start, stop in spans] == numels
    assert all(start % 64 == 0 for start, _ in spans)
    assert all(a[1] <= b[0] < a[1] + 64 for a, b in itertools.pairwise(spans))


def test_clones_exceed_the_l2(monkeypatch):
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda")
    assert [timing.clones_needed(n, cuda) for n in (2**30, 2**25, 2**20, 1)] == [2, 5, 150, 400]


def test_a_replay_captures_every_call_and_times_one(monkeypatch):
    """The CUDA branch, with a device that is not there."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 12.0

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def capture(graph, stream):
        log.append("capture")
        yield
        log.append("captured")

    for name, fake in {
        "Event": Event, "CUDAGraph": Graph, "graph": capture, "current_stream": lambda: "stream",
        "synchronize": lambda device=None: log.append("wait"),
        "_sleep": lambda cycles: log.append("spin"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    calls = [lambda i=i: log.append(i) for i in range(3)]
    replay = timing.Replay(calls, torch.device("cuda"))
    assert log == [0, 1, "wait", "capture", 0, 1, 2, "captured"]
    log.clear()
    assert replay.run()() == 4.0
    assert log == ["spin", "event", "replay", "event"]


def test_rounds_are_interleaved_and_the_first_two_left_out():
    order = []

    class Replay:
        def __init__(self, name):
            self.name = name

        def run(self):
            order.append(self.name)
            return lambda: float(len(order))

    times = timing.interleaved({"a": Replay("a"), "b": Replay("b")}, CPU, rounds=3, seconds=9.0)
    assert "".join(order) == "baabbaabba"
    assert [len(found) for found in times.values()] == [3, 3]


def test_without_a_gpu_it_says_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as error:
        gpu.main(["--stage", "kernels"])
    assert error.value.code == 2
    assert "no CUDA GPU here: use one, or rehearse by --device cpu" in capsys.readouterr().err


def test_no_process_is_left(tmp_path):
    process = kernel_stage.start("mask_tokens", tmp_path / "x.json", "cpu", True)
    processes.stop(process)
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
