"""Launches noted without a GPU, in a process whose kernels are not the interpreter's."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastbert.config import model_config
from fastbert_bench.estimate import launch_list
from fastbert_bench.measure.places import ROOT

BASE = model_config("base")
SCRIPT = """
import collections, json, os, sys, torch
from fastbert_bench.estimate import launch_list
from fastbert_bench.gpu import launches

found = {}
with launches.no_gpu(90):
    for T in (0, 529, 576, 1041):
        kernels = launches.step_trace("base", 512, T=T)
        step = launches.launches_of(kernels)
        found.setdefault("variants", []).append(sorted({one.variant() for one in step}))
    found["ours"] = sorted({one.name for one in step})
    found["step"] = [[one.direction, one.name.removeprefix("aten."), *one.outputs[0].shape]
                     for one in kernels]
    found["work"] = [[one.name, one.bytes, one.flops] for one in kernels]
    found["listed"] = launches.listed()
    found["three layers"] = [[one.direction, one.name, one.bytes, one.flops]
                             for one in launches.step_trace("base", 512, layers=3, T=T)]
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
    homes = (ROOT, ROOT / "kernels", ROOT / "benchmarks")
    environment["PYTHONPATH"] = os.pathsep.join(map(str, homes))
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    out = folder / "found.json"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out)], env=environment, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(Path(out).read_text())


T, N, M, H, F, V = 1041, 3, 157, 768, 3072, 30522  # M masked words in N sequences
R = M + N  # rows that leave the last layer
REDUCE = "reduce._reduce_rows_kernel"


def after_attention(rows):
    norm = ("mm", rows, H), ("layer_norm._forward_kernel", rows, H)
    return [*norm, ("mm", rows, F), ("gelu._bias_gelu_kernel", rows, F), *norm]


def before_attention(rows):
    """The backward of it: a product adds the gradient of the residual that its input is."""
    norm = ("layer_norm._backward_kernel", rows, H), (REDUCE, 3, H)
    return [
        *norm, ("addmm", H, F), ("mm", rows, F), ("gelu._gelu_backward_kernel", rows, F),
        (REDUCE, F), ("addmm", F, H), ("addmm", rows, H), *norm, ("addmm", H, H), ("mm", rows, H),
    ]  # fmt: skip


ATTENTION = [("addmm", T, 3 * H), ("attention.attention_forward_kernel", T, 12, 64)]
QUERIES = [  # the tokens that a loss reads, each once
    ("new_zeros", T + 1), ("add", R), ("index_fill_", T + 1), ("cumsum", T + 1),
    ("index_select", R), ("new_full", R), ("scatter_", R), ("index_select", N + 1),
    ("_to_copy", N + 1),
]  # fmt: skip
ATTENTION_AT = [
    ("clamp", R), ("index_select", R, H), ("addmm", R, H), ("addmm", T, 2 * H),
    ("attention.attention_forward_kernel", R, 12, 64),
]  # fmt: skip
ATTENTION_BACK = [
    ("attention.attention_backward_kernel", 12, T), (REDUCE, 3, 12, 64),
    ("addmm", 3 * H, H), ("addmm", T, H),
]  # fmt: skip
ATTENTION_AT_BACK = [
    ("attention.attention_backward_kernel", 12, R), (REDUCE, 3, 12, 64),
    ("addmm", H, H), ("addmm", 2 * H, H), ("mm", T, H), ("clamp", R), ("addmm", R, H),
    ("index_add_", T, H),
]  # fmt: skip
COUNTS = [("ne", M), ("sum",), ("add_",), ("copy_",), ("ne", N), ("sum",), ("add_",), ("copy_",)]
STEP = {
    "counts": [("zero_", 2), *COUNTS, ("clamp_", 2), ("copy_",), ("zero_",)],
    "forward": [
        ("_to_copy", N), ("clamp", N), ("cat", R), ("embedding._forward_kernel", T, H),
        *ATTENTION, *after_attention(T),
        *QUERIES, *ATTENTION_AT, *after_attention(R), ("index_select", R, H),
        ("mm", M, H), ("gelu._gelu_layer_norm_kernel", M, H),
        ("pad", V + 6), ("mm", M, V + 6), ("cross_entropy._softmax_gradient_kernel", M, V + 6),
        ("sum",), ("addmm", N, H), ("tanh", N, H), ("addmm", N, 2), ("_to_copy", N, 2),
        ("_log_softmax", N, 2), ("nll_loss_forward",),
    ],
    "loss": [("div",), ("div",), ("add",), ("ones_like",)],
    "backward": [
        ("div",), ("div",), ("nll_loss_backward", N, 2), ("_log_softmax_backward_data", N, 2),
        ("_to_copy", N, 2), ("mm", N, H), ("mm", 2, H), ("sum", 1, 2), ("tanh_backward", N, H),
        ("mm", N, H), ("mm", H, H), ("sum", 1, H),
        ("mm", M, H), ("mul", M, H), ("cross_entropy._column_sums_kernel", 10, V + 6),
        ("sum", V + 6), ("mul", V), ("_to_copy", V), ("mul", M, H), ("addmm", V + 6, H),
        ("gelu._gelu_layer_norm_backward_kernel", M, H), (REDUCE, 3, H),
        ("addmm", H, H), ("mm", M, H), ("cat", R, H), ("new_zeros", R, H), ("index_add", R, H),
        *before_attention(R), *ATTENTION_AT_BACK, *before_attention(T), *ATTENTION_BACK,
        ("embedding._rows_backward_kernel", T, H), (REDUCE, 4, H), ("add", T), ("cat", 2 * T),
        ("sort", 2 * T), ("zeros", V + 512, H), ("embedding._sum_pieces_kernel", 2 * T),
        ("embedding._join_pieces_kernel", 2 * T),
    ],
    "update": [
        ("add_", V, H), ("copy_", 512, H), ("copy_", 2, H), ("copy_", H, H), ("copy_", 2, H),
        ("_foreach_copy_", H), ("add_",), ("add_",), ("add_", 3), ("copy_", 3),
        ("index_select", 1), ("mul",), ("add",), ("optimizer._square_sums_kernel", 1024),
        ("optimizer._prepare_kernel",), ("optimizer._adamw_kernel", 39241600),
        ("abs",), ("ne",), ("eq",), ("mul",), ("scalar_tensor",), ("where",), ("add_",), ("add_",),
        ("bitwise_not",), ("le",), ("bitwise_and",), ("add",), ("scalar_tensor",), ("where",),
        ("copy_",), ("maximum",), ("add_",),
    ],
}  # fmt: skip
DIRECTIONS = {"forward": "forward", "backward": "backward"}


def test_the_kernels_of_a_step_in_their_order(found):
    """Two layers of BERT-base, bf16: ours and PyTorch's, each with the shape of its output."""
    want = [[DIRECTIONS.get(part, "step"), *kernel] for part in STEP for kernel in STEP[part]]
    assert found["step"] == want


def test_what_the_kernels_of_a_step_move_and_compute(found):
    flops, moved = {}, {}
    for (direction, *_), (name, bytes_, operations) in zip(
        found["step"], found["work"], strict=True
    ):
        flops[direction] = flops.get(direction, 0) + operations
        moved.setdefault((direction, name), []).append(bytes_)
    layers = 24 * H**2 * T + (4 * H**2 * T + 20 * H**2 * R)
    heads = 2 * (H**2 + H * (V + 6)) * M + 2 * (H**2 + 2 * H) * N
    assert flops == {"forward": layers + heads, "backward": 2 * (layers + heads), "step": 0}
    # The sum before the norm and its statistics are kept; biases, scales and the seed are small.
    assert moved["forward", "layer_norm._forward_kernel"][0] == 8 * T * H + 8 * T + 6 * H + 24
    # The first product of a layer reads the residual's gradient and writes its own over it.
    assert moved["backward", "aten.addmm"][-1] == 2 * (T * 3 * H + 3 * H * H + 2 * T * H)
    assert moved["step", "optimizer._adamw_kernel"] == [4 * 7 * 39241600 + 2 * 39241600 * 2 + 20]


def test_the_committed_list_is_what_a_step_launches(found):
    assert found["listed"] == json.loads(launch_list.FILE.read_text())


def test_the_list_stands_for_other_layers_and_tokens(found):
    """Recorded at 8,209 tokens and one or two layers; here for 1,041 and three."""
    sizes = launch_list.sizes_of(dataclasses.replace(BASE, num_hidden_layers=3), T, N, M)
    calls, work = Counter(), Counter()
    for times, kernel in launch_list.read(sizes):
        calls[kernel.direction, kernel.name] += times
        work["bytes", kernel.direction] += times * kernel.bytes
        work["flops", kernel.direction] += times * kernel.flops
    recorded = found["three layers"]
    assert calls == Counter((direction, name) for direction, name, *_ in recorded)
    for index, what in ((2, "bytes"), (3, "flops")):
        for direction in ("forward", "backward", "step"):
            whole = sum(one[index] for one in recorded if one[0] == direction)
            # Partial sums are those of more tokens: 264 programs instead of as many as have work.
            assert work[what, direction] == pytest.approx(whole, rel=0.05 if index == 2 else 0)


def test_the_number_of_tokens_makes_no_variant(found):
    first, *others = found["variants"]
    assert all(other == first for other in others)
    # Attention and LayerNorm, each way, have another where some tokens ask.
    assert len(first) == len(found["ours"]) + 4


def test_one_variant_of_each_kernel_with_its_constants(found):
    """Whatever workload, length, layer or batch: what is compiled ahead is what a step needs."""
    assert found["several"] == []
    assert {
        "optimizer._lamb_apply_kernel", "attention.attention_backward_kernel",
        "muon._symmetric_product_kernel", "muon._momentum_kernel", "muon._apply_kernel",
    } <= set(found["forms"])  # fmt: skip


def test_what_is_compiled_ahead_is_found_in_the_cache(found):
    assert found["said"] == [""]
    assert "_reduce_rows_kernel.cubin" in found["cached"] and found["same"]


def test_what_does_not_compile_is_told(found):
    assert len(found["broken"]) == 1 and "Error" in found["broken"][0]
