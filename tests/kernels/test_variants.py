"""Each kernel has one compiled variant for its constexprs and dtypes, and the report compiles it.

In processes of their own, where the interpreter is off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

# The integers that a model's sizes set and wide accesses rest on. Any other is in
# `do_not_specialize`: what changes with the batch would have up to three variants each.
SPECIALIZED = {
    "bias_gelu": ["H"],
    "gelu_backward": ["H"],
    "reduce_rows": ["W"],
    "linear_gelu": ["F_EIGHTHS"],
    "gelu_linear_backward": ["F_EIGHTHS"],
    "square_sums": ["P"],
    "prepare": ["programs"],
    "adamw": ["P", "decay_end", "embedding_end"],
    "symmetric_product": ["M", "K"],
    "muon_momentum": ["size"],
    "muon_apply": ["size"],
}

ARGUMENTS = """
import json
from fastbert_bench.kernels.compile_report import shipped_cases

kernels = {}
for case in shipped_cases():
    params = {param.name: param for param in case.fn.params}
    integers = [name for name, type in case.signature.items() if type in ("i32", "i64")]
    left = [name for name in integers if not params[name].do_not_specialize]
    kernels[case.name] = {
        "integers": integers,
        "specialized": left,
        "taken for multiples": [name for name in left if name in case.divisible_by_16],
        "seed": "seed_ptr" in params and not params["seed_ptr"].do_not_specialize,
    }
print(json.dumps(kernels))
"""

COMPILED = """
import json
import triton
import triton.language as tl
from fastbert_bench.kernels.compile_report import compile_case
from fastbert_kernels.compile_cases import CompileCase


@triton.jit
def copy(x_ptr, y_ptr):
    i = tl.arange(0, 1024)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit(do_not_specialize=["x_ptr", "y_ptr"])
def copy_unaligned(x_ptr, y_ptr):
    i = tl.arange(0, 1024)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


wide = []
for fn in (copy, copy_unaligned):
    case = CompileCase("copy", "", fn, {"x_ptr": "*bf16", "y_ptr": "*bf16"}, {})
    wide.append(compile_case(case, 90).wide_accesses)
print(json.dumps(wide))
"""


def run(folder: Path, code: str) -> Any:
    script = folder / "script.py"
    script.write_text(code)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    env["TRITON_CACHE_DIR"] = str(folder / "cache")
    found = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def test_nothing_that_a_batch_or_a_layer_sets_makes_a_variant(tmp_path: Path) -> None:
    kernels = run(tmp_path, ARGUMENTS)
    assert sum(len(found["integers"]) for found in kernels.values()) > 40
    for name, found in kernels.items():
        base = name.partition(" ")[0]
        assert found["specialized"] == SPECIALIZED.get(base, []), name
        assert found["taken for multiples"] == found["specialized"], name
        assert not found["seed"], name


def test_the_report_promises_the_compiler_what_the_jit_does(tmp_path: Path) -> None:
    aligned, unaligned = run(tmp_path, COMPILED)
    assert aligned == 2 and unaligned == 0
