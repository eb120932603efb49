"""Launches noted without a GPU, in a process whose kernels are not the interpreter's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import ROOT

SCRIPT = """
import collections, json, os, sys, torch
from benchmarks import launches

found = {}
with launches.no_gpu(90):
    for T in (0, 529, 576, 1041):
        step = launches.step_launches("base", 512, T=T)
        found.setdefault("variants", []).append(sorted({one.variant() for one in step}))
    found["step"] = [one.name for one in step]
    found["grids"] = [list(one.grid) for one in step]
    forms = collections.defaultdict(set)
    for make in launches.makers(90):
        for one in make():
            constants = [str(a) for a, p in zip(one.args, one.kernel.params) if p.is_constexpr]
            dtypes = [str(a.dtype) for a in one.args if isinstance(a, launches.Pointer)]
            forms[one.name, *constants, *dtypes, str(one.options)].add(one.variant())
    found["several"] = [list(form) for form, several in forms.items() if len(several) > 1]
    found["forms"] = sorted({form[0] for form in forms})
    small = [one for one in step if one.name == "reduce._reduce_rows_kernel"][0]
    found["said"] = [why for _, why in launches.compile_all([small], load=False)]
    def cached():
        files = os.walk(os.environ["TRITON_CACHE_DIR"])
        return sorted(name for _, _, names in files for name in names)
    found["cached"] = cached()
with launches.no_gpu(90):  # a second process would find it: nothing is written anew
    launches.compile_all([small], load=False).__next__()
    found["same"] = cached() == found["cached"]
    broken = launches.Launch(small.kernel, small.args[:-1], small.options, small.grid)
    found["broken"] = [why for _, why in launches.compile_all([broken], load=False)]
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launches")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    out = folder / "found.json"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out)], env=environment, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(Path(out).read_text())


def test_a_step_launches_what_it_should(found):
    """Two layers of BERT-base; products are cuBLAS's and so not among them."""
    layer = ["attention.attention_forward_kernel", "layer_norm._forward_kernel",
             "gelu._bias_gelu_kernel", "layer_norm._forward_kernel"]  # fmt: skip
    norm_back = ["layer_norm._backward_kernel", "reduce._reduce_rows_kernel"]
    layer_back = [*norm_back, "gelu._gelu_backward_kernel", "reduce._reduce_rows_kernel",
                  *norm_back, "attention.attention_backward_kernel"]  # fmt: skip
    assert found["step"] == [
        "embedding._forward_kernel",
        *layer, *layer,
        "gelu._gelu_layer_norm_kernel",
        "cross_entropy._softmax_gradient_kernel", "cross_entropy._column_sums_kernel",
        "gelu._gelu_layer_norm_backward_kernel", "reduce._reduce_rows_kernel",
        *layer_back, *layer_back,
        "embedding._rows_backward_kernel", "reduce._reduce_rows_kernel",
        "embedding._sum_pieces_kernel", "embedding._join_pieces_kernel",
        "optimizer._square_sums_kernel", "optimizer._prepare_kernel", "optimizer._adamw_kernel",
    ]  # fmt: skip
    # 1,041 tokens in 3 sequences, whose [CLS] and 156 masked words leave the last layer.
    masked = 77 + 77 + 3
    norms = [grid for name, grid in zip(found["step"], found["grids"], strict=True)
             if name == "layer_norm._forward_kernel"]  # fmt: skip
    assert norms == [[521], [521], [(masked + 3 + 1) // 2], [(masked + 3 + 1) // 2]]


def test_the_number_of_tokens_makes_no_variant(found):
    first, *others = found["variants"]
    assert all(other == first for other in others)
    assert len(first) == len(set(found["step"]))


def test_one_variant_of_each_kernel_with_its_constants(found):
    """Whatever workload, length, layer or batch: what is compiled ahead is what a step needs."""
    assert found["several"] == []
    assert {"optimizer._lamb_apply_kernel", "attention.attention_backward_kernel"} <= set(
        found["forms"]
    )


def test_what_is_compiled_ahead_is_found_in_the_cache(found):
    assert found["said"] == [""]
    assert "_reduce_rows_kernel.cubin" in found["cached"] and found["same"]


def test_what_does_not_compile_is_told(found):
    assert len(found["broken"]) == 1 and "Error" in found["broken"][0]
