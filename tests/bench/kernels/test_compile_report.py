"""The compile report, in its own process: it compiles for real, where the interpreter is off."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fastbert_bench.kernels import compile_report
from fastbert_bench.kernels.compile_report import FEW_SPILLS, Built
from fastbert_kernels.compile_cases import CompileCase

ROOT = Path(__file__).parents[3]
STACK = "keeps 8 bytes of stack a thread"
MANY = FEW_SPILLS + 1

KERNELS = """
import triton
import triton.language as tl
from fastbert_kernels.compile_cases import CompileCase


@triton.jit
def add_one(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)


@triton.jit
def hoard(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x / tl.sum(x * x))


@triton.jit
def dot(x_ptr, M: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, 64)
    x = tl.load(x_ptr + i[:, None] * 64 + j[None, :])
    tl.store(x_ptr + i[:, None] * M + i[None, :], tl.dot(x, x.T).to(tl.bfloat16))


def case(fn, constexprs, **more):
    options = {"num_warps": 4, "configuration": "test", **more}
    return CompileCase(fn.__name__, fn=fn, signature={"x_ptr": "*bf16"}, constexprs=constexprs,
                       **options)


def compile_cases():
    return CASES
"""


def report(
    folder: Path, cases: str, *args: str, interpret: bool = False
) -> subprocess.CompletedProcess[str]:
    (folder / "cases.py").write_text(f"{KERNELS}\nCASES = [{cases}]\n")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    homes = (ROOT, ROOT / "kernels", ROOT / "benchmarks", folder)
    env["PYTHONPATH"] = os.pathsep.join(map(str, homes))
    env["TRITON_CACHE_DIR"] = str(folder / "cache")
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-m", "fastbert_bench.kernels.compile_report", "--module", "cases", *args],
        env=env, cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_what_is_well_passes(tmp_path: Path) -> None:
    cases = 'case(add_one, {"N": 1024}), case(dot, {"M": 64}, needs_wgmma=True, archs=(90,))'
    found = report(tmp_path, cases, "--json", "build/report.json")
    assert found.returncode == 0, found.stderr
    assert "3 compiled, 0 failures" in found.stdout and not found.stderr
    told = json.loads((tmp_path / "build/report.json").read_text())
    assert told["triton"] == version("triton") and told["ptxas"].keys() == {"sm_80", "sm_90"}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in told["ptxas"].values())
    head = f"Triton {version('triton')}; ptxas {told['ptxas']['sm_80']} for sm_80, "
    assert found.stdout.startswith(f"{head}ptxas {told['ptxas']['sm_90']} for sm_90\n")
    assert told["asked"] == 3 and told["failures"] == []
    table = told["compiled"]
    assert [(row["kernel"], row["arch"]) for row in table] == [
        ("add_one", 80), ("add_one", 90), ("dot", 90)
    ]  # fmt: skip
    for row in table:
        assert row["registers"] > 0 and row["instructions"] > 10
        assert row["spills"] == row["stack"] == 0 and row["failures"] == []
    assert table[0]["wide_accesses"] == table[0]["accesses"] == 2  # 8 elements of bf16: 16 bytes
    assert table[2]["hgmma"] > 0 and table[2]["shared"] >= 64 * 64 * 2
    # Neither has a loop: what is counted is all that must be computed and moved.
    assert [row["cost"]["bytes"] for row in table] == [1024 * 2 * 2] * 2 + [64 * 64 * 2 * 2]
    assert [row["cost"]["flops"] for row in table] == [0, 0, 2 * 64**3]
    assert [row["tiles"] for row in table] == [[4, 3]] * 3


def test_every_failure_is_named(tmp_path: Path) -> None:
    # 16,384 elements in one warp are 512 a thread, which has 255 registers. One warp has no wgmma.
    cases = """
        case(hoard, {"N": 16384}, num_warps=1),
        case(dot, {"M": 16}, num_warps=1, needs_wgmma=True),
        case(add_one, {"N": 1000}),
        case(add_one, {"M": 1024})
    """
    found = report(tmp_path, cases, "--arch", "sm_90", "--json", "report.json")
    assert found.returncode == 1
    assert "hoard [test] sm_90: spills" in found.stderr
    assert "hoard [test] sm_90: keeps" in found.stderr and "bytes of stack" in found.stderr
    assert "dot [test] sm_90: needs wgmma and has no HGMMA" in found.stderr
    assert "add_one [test] sm_90: does not compile" in found.stderr
    assert "add_one: ['M', 'N'] given or expected, but not both" in found.stderr
    assert "2 compiled, 5 failures" in found.stdout
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["asked"] == 4 and len(told["compiled"]) == 2
    assert "\n".join(told["failures"]) == found.stderr.strip()


def test_other_tiles_and_limits_can_be_tried(tmp_path: Path) -> None:
    case = 'case(hoard, {"N": 4096}), case(add_one, {"N": 1024})'
    found = report(tmp_path, case, "--arch", "sm_90", "--match", "hoard", "--maxnreg", "24",
                   "--json", "report.json")  # fmt: skip
    (row,) = json.loads((tmp_path / "report.json").read_text())["compiled"]
    assert row["registers"] <= 24 and row["kernel"] == "hoard", found.stderr
    attention = CompileCase("a", "", None, {}, {"BLOCK_M": 64, "BLOCK_N": 128, "D": 64})
    tried = compile_report._with(attention, compile_report._tiles("32,16,2,1"), None)
    assert tried.constexprs == {"BLOCK_M": 32, "BLOCK_N": 16, "D": 64}
    assert (tried.num_warps, tried.num_stages, tried.maxnreg) == (2, 1, None)
    assert compile_report._passes(attention) == 2 and compile_report._passes(tried) == 32


def test_too_much_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = " Function k:\n  REG:40 STACK:0 SHARED:0 LOCAL:0"
    sass = ["        /*0000*/                   LDG.E R1, [R2] ;"]
    monkeypatch.setattr(compile_report, "_tool", lambda *_, **__: usage)
    case = CompileCase("k", "", None, {}, {})
    for arch, limit in ((80, 163 * 1024), (90, 227 * 1024)):
        built = Built(case, arch, b"", limit)
        assert compile_report._read(built, sass).failures == ()
        (failure,) = compile_report._read(built._replace(shared=limit + 1), sass).failures
        assert failure == f"wants {limit + 1} bytes of shared memory, has {limit}"


@pytest.mark.parametrize(
    ("stack", "inside", "outside", "failures"),
    [
        (8, 0, FEW_SPILLS, []),
        (8, 0, MANY, [f"spills: {MANY} LDL/STL, 0 of them in the main loop", STACK]),
        (8, 1, 0, ["spills: 1 LDL/STL, 1 of them in the main loop", STACK]),
        (8, 0, 0, [STACK]),
    ],
)
def test_few_spills_outside_the_main_loop_pass(
    stack: int, inside: int, outside: int, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = ["LDG.E R1, [R2]", *["LDL R1, [R3]"] * inside, f"@P0 BRA {16 * outside:#x}"]
    lines = [*["STL [R3], R1"] * outside, *loop]
    sass = [f" /*{16 * index:04x}*/ {line} ;" for index, line in enumerate(lines)]
    monkeypatch.setattr(compile_report, "_tool", lambda *_, **__: f"REG:40 STACK:{stack}")
    built = Built(CompileCase("k", "", None, {}, {}), 90, b"", 0)
    found = compile_report._read(built, sass)
    assert list(found.failures) == failures


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    found = report(tmp_path, "", interpret=True)
    assert found.returncode == 2 and "TRITON_INTERPRET is set" in found.stderr


def test_nothing_compiled_is_a_failure(tmp_path: Path) -> None:
    assert report(tmp_path, "").returncode == 1
