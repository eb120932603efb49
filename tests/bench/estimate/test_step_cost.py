"""`estimate.step_cost` and its list of launches: sums done by hand, committed counts, bounds."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch

from fastbert.config import ModelConfig, model_config
from fastbert.train import muon
from fastbert_bench.estimate import launch_list
from fastbert_bench.estimate import step_cost as sc
from fastbert_bench.estimate.launch_list import Array, Kernel
from fastbert_bench.estimate.run import DEVICES
from fastbert_bench.estimate.step_cost import Lengths, Paper, Shares
from fastbert_bench.kernels import counts
from fastbert_bench.kernels.costs import H100, Ceilings
from fastbert_kernels.attention_config import HEAD_SIZES, backward_path

TINY, BASE, LARGE = map(model_config, ("tiny", "base", "large"))

SMALL = ModelConfig(
    vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
    intermediate_size=256, max_position_embeddings=128,
)  # fmt: skip
WHOLE = Shares(1.0, 1.0, 1.0)
ENDLESS = Ceilings(1e30, 1e30)
CLOCK, SMS = 1.755e9, 132


def kernels(sizes, T, N, M):
    return launch_list.read(launch_list.sizes_of(sizes, T, N, M))


# The list


def test_the_products_of_a_step_by_hand():
    """1,000 tokens in 10 sequences; 150 masked, so 160 rows leave the last layer."""
    T, N, M, H, F, V = 1000, 10, 150, 64, 256, 1024  # the vocabulary in whole blocks of 64
    flops = {"forward": 0, "backward": 0, "step": 0}
    for times, kernel in kernels(SMALL, T, N, M):
        flops[kernel.direction] += times * kernel.flops
    layer = 8 * H * H + 4 * H * F
    last = 4 * H * H * T + (4 * H * H + 4 * H * F) * (M + N)
    heads = 2 * H * H * M + (2 * H * H + 4 * H) * N
    rest = 2 * layer * T + last + heads
    logits = 2 * M * H * V
    assert flops["forward"] == pytest.approx(rest + logits, rel=0.01)
    assert flops["backward"] == 2 * flops["forward"]
    assert flops["step"] == 0


def test_what_runs_once_a_layer_and_what_once():
    few, many = (
        kernels(dataclasses.replace(SMALL, num_hidden_layers=L), 1000, 10, 9) for L in (1, 5)
    )
    repeated = {kernel.name for times, kernel in many if times == 4}
    assert sum(times == 4 for times, _ in many) == sum(times == 0 for times, _ in few) == 24
    assert {"attention.attention_backward_kernel", "layer_norm._forward_kernel"} <= repeated
    assert not any(name.startswith(("optimizer", "embedding", "cross")) for name in repeated)


def test_each_letter_has_a_size_of_its_own():
    sizes = launch_list.sizes_of(BASE, 8209, 17, 1235)
    names = launch_list.symbols(sizes)
    assert names[8209] == "T" and names[2304] == "3 * H" and names[1252] == "R"
    with pytest.raises(ValueError, match="X and T are both 512"):
        launch_list.symbols(launch_list.sizes_of(BASE, 512, 17, 1235))


def test_a_line_says_what_a_kernel_reads_and_writes(tmp_path):
    kernel = Kernel(
        "aten.mm", "forward",
        (Array((), torch.int64), Array((10, 64), torch.bfloat16), Array((64, 256), torch.bfloat16)),
        (Array((10, 256), torch.float32),),
    )  # fmt: skip
    row = launch_list.row_of(kernel, "L - 1", {10: "N", 64: "H", 256: "F"})
    assert row[3:] == ["int64; bfloat16 N, H; bfloat16 H, F", "float32 N, F"]
    launch_list.write([row], tmp_path / "list.json")
    sizes = launch_list.sizes_of(SMALL, 1000, 10, 9)
    assert launch_list.read(sizes, tmp_path / "list.json") == [(2, kernel)]
    assert kernel.product == (10, 256, 64) and kernel.flops == 2 * 10 * 256 * 64
    assert kernel.bytes == 2 * (640 + 16384) + 8 + 4 * 2560


def test_a_gather_moves_the_rows_that_are_named():
    table, rows, ids = ((5000, 8), torch.bfloat16), ((10, 8), torch.bfloat16), ((10,), torch.int64)
    select = Kernel("aten.index_select", "forward", (Array(*table), Array(*ids)), (Array(*rows),))
    assert sc.bytes_of(select) == 2 * 160 + 80
    add = Kernel(
        "aten.index_add_", "backward", (Array(*table), Array(*ids), Array(*rows)), (Array(*table),)
    )
    assert sc.bytes_of(add) == 3 * 160
    copy = Kernel("aten.copy_", "step", (Array(*table),), (Array((5000, 8), torch.float32),))
    assert sc.bytes_of(copy) == 6 * 40_000


def test_layer_norm_moves_three_and_four_tensors():
    """x, residual and y; dy, y, dx and dresidual: the sum before the norm is rarely kept."""
    tokens = [one for times, one in kernels(SMALL, 1000, 10, 150) if times > 1]
    moved = {one.name: sc.bytes_of(one) for one in tokens if one.name.startswith("layer_norm")}
    tensor, statistics, parameters, seed = 2 * 1000 * 64, 8 * 1000, 2 * 64, 24
    forward = moved["layer_norm._forward_kernel"]
    assert forward == 3 * tensor + statistics + 3 * parameters + seed
    partials = 4 * 528 * 3 * 64
    backward = moved["layer_norm._backward_kernel"]
    assert backward == 4 * tensor + statistics + 2 * parameters + seed + partials


def test_attention_adds_dq_up_in_the_l2():
    backward = [sc.bytes_of(one) for times, one in kernels(SMALL, 1000, 10, 150)
                if times > 1 and one.name == "attention.attention_backward_kernel"]  # fmt: skip
    # qkv, out, dout in; dqkv out; statistics twice, the seed, lengths, sums for the bias
    assert backward == [2 * 1000 * 64 * 8 + 2 * 4 * 2 * 1000 + 24 + 44 + 4 * 10 * 3 * 64]


def test_every_kernel_has_its_family_and_none_adds_residuals():
    found = {}
    for times, kernel in kernels(BASE, 65_536, 128, 9830):
        found.setdefault(sc.family_of(kernel, 9830), []).append((times, kernel))
    assert set(found) == set(sc.FAMILIES) - {sc.RESIDUAL_ADDS, sc.GAPS}

    def launches(family):
        return sum(times for times, _ in found[family])

    # Four of each of 11 layers, five of the last; the pooler and the next sentence.
    assert launches(sc.GEMM_FORWARD) == 4 * 11 + 5 + 2
    assert launches(sc.GEMM_BACKWARD) == 2 * launches(sc.GEMM_FORWARD)
    assert launches(sc.MLM) == 6
    assert launches(sc.ATTENTION_FORWARD) == launches(sc.ATTENTION_BACKWARD) == 12
    assert launches(sc.QKV_BIAS) == 12 and launches(sc.OPTIMIZER) == 3
    others = {kernel.name for _, kernel in found[sc.OTHER]}
    assert all(name.startswith("aten.") for name in others)
    assert not any(kernel.name.startswith("aten.") for _, kernel in found[sc.PASSES])


def test_the_counts_say_that_bytes_price_the_passes():
    """At presets' widths memory is the slowest pipe of each pass, so that its bytes price it."""
    passes = re.compile(r"(embed|dropout|gelu_.a|bias|column|reduce|sum_p|join|softmax|adamw|squ)")
    seen = 0
    for case, row in counts.read().items():
        width = re.search(r"H=(\d+)", case)
        if passes.match(case) and "bf16" in case and int(width[1] if width else 0) <= 1024:
            one = dict(zip(counts.COLUMNS, row[sc.TRITON], strict=True))
            assert one["cycles"] == one["memory"], case
            seen += 1
    assert seen > 50


# Products


def by_hand(waves, steps, columns=256, item=2):
    """Seconds of waves of tiles of 128 x columns: 64 summands at a time through tensor cores."""
    one = steps * 2 * 128 * columns * 64 / 4096 + sc.RAMP + 128 * columns * item / 32
    return waves * one / CLOCK


@pytest.mark.parametrize(
    ("tiles", "waves", "filled"), [(132, 1, 1.0), (133, 2, 133 / 264), (264, 2, 1.0)]
)
def test_a_product_takes_whole_waves(tiles, waves, filled):
    paper = Paper(ENDLESS, Shares(1.0, 1.0, 1.0, splits=1), 90)
    seconds, limit, share = paper.product(128 * tiles, 256, 1024, 0)
    assert seconds == pytest.approx(by_hand(waves, 16))
    assert (limit, share) == ("tensor", pytest.approx(filled))


def test_a_share_and_memory():
    paper = Paper(Ceilings(1e12, 1.0), Shares(0.5, 1.0, 0.25, splits=1), 90)
    assert paper.product(128 * 132, 256, 1024, 0)[0] == pytest.approx(2 * by_hand(1, 16))
    assert paper.product(128 * 132, 256, 1024, 1e9)[:2] == (pytest.approx(4e-3), "memory")


def test_a_long_sum_is_cut_where_that_fills_the_gpu():
    """A weight gradient of 768 x 768 has 18 tiles for 132 multiprocessors."""
    alone = Paper(ENDLESS, Shares(1.0, 1.0, 1.0, splits=1), 90)
    free = Paper(ENDLESS, WHOLE, 90)
    paid = Paper(H100, WHOLE, 90)
    args = (768, 768, 65_536, 0, 4)
    seconds, _, filled = free.product(*args)
    # Seven parts of 18 tiles in one wave, or a multiple; what cutting gains is little below that.
    assert filled > 0.9 and seconds < alone.product(*args)[0] / 3.5
    assert free.product(*args)[0] < paid.product(*args)[0] < alone.product(*args)[0]
    assert free.product(768, 768, 1024, 0)[0] == alone.product(768, 768, 1024, 0)[0]


def test_half_of_a_symmetric_product_is_made_in_tiles_of_128():
    """768 x 768: 21 tiles of 36; seven such products are 147, in two waves."""
    paper = Paper(ENDLESS, Shares(1.0, 1.0, 1.0, splits=1), 90)
    seconds, limit, filled = paper.product(768, 768, 3072, 0, batch=7, symmetric=True)
    l2 = 2 * 64 * 1.5 * 128 / 32  # two neighbours share an operand: slower than the tensor cores
    assert seconds == pytest.approx(2 * (48 * l2 + sc.RAMP + 128 * 128 * 2 / 32) / CLOCK)
    assert (limit, filled) == ("L2", pytest.approx(147 / 264))
    assert paper.product(128 * 12, 256, 1024, 0, batch=11)[0] == pytest.approx(by_hand(1, 16))
    assert paper.product(128 * 12, 256, 1024, 0, batch=12)[0] > by_hand(1, 16)


def test_muons_launches_by_hand():
    """Base: 49 matrices of 768 x 768, 12 of 3072 x 768 and 12 of 768 x 3072."""
    priced = sc.muon_launches(Paper(H100, WHOLE, 90), BASE, sc.Muon())
    assert sum(one.launches for one in priced) == 3 * (5 + 3 * 5)
    H, F = 768.0, 3072.0
    square, long = 49 * 2 * H**3, 24 * 2 * H * H * F
    half = 7 / 12  # 21 tiles of 36
    symmetric = square + long + (square + 24 * 2 * H**3)
    assert sum(one.flops for one in priced) == pytest.approx(
        5 * (half * symmetric + square + long), rel=1e-12
    )
    passes = sum(one.bytes for one in priced if not one.flops)
    assert passes == (14 + 2 + 4 + 12) * muon.num_parameters(BASE)
    on_cpu = sc.muon_launches(Paper(Ceilings(1e30, 430e9), WHOLE, None), BASE, sc.Muon(ns_steps=3))
    flops = muon.newton_schulz_flops(BASE, True, 3)
    assert sum(one.flops for one in on_cpu) == flops
    assert sum(one.seconds for one in on_cpu) == pytest.approx(flops / 95e9)


def test_adamw_updates_what_muon_leaves():
    args = (BASE, 16_384, Lengths.of(np.array([128])), H100, WHOLE, 90)
    alone, beside = (
        [one for one in sc.price(*args, of_muon) if one.family == sc.OPTIMIZER]
        for of_muon in (None, sc.Muon(split_qkv=False))
    )
    ours = sc.muon_launches(Paper(H100, WHOLE, 90), BASE, sc.Muon(split_qkv=False))
    assert beside[: len(ours)] == ours and len(beside) == len(ours) + len(alone)
    saved = sum(one.bytes for one in alone) - sum(one.bytes for one in beside[len(ours) :])
    # As the list has it: g, m, v, w and the rounded copy, of which all but g are written too.
    assert saved == pytest.approx(32 * muon.num_parameters(BASE), rel=1e-6)


def test_the_best_product_is_the_measured_one():
    """cuBLAS's 8192 x 8192 x 8192 on an H100: 798 TFLOP/s."""
    paper = Paper(H100, sc.HOPPER.best, 90)
    seconds, limit, _ = paper.product(8192, 8192, 8192, 3 * 2 * 8192**2)
    assert limit == "tensor"
    assert 2 * 8192**3 / seconds == pytest.approx(H100.matrix, rel=0.02)


# Attention


def counted(case):
    return dict(zip(counts.COLUMNS, counts.read()[case][sc.TRITON], strict=True))


PIPES = counts.COLUMNS[1:-1]


def together(pipes, around):
    """Cycles of pipes that overlap in part; `around` go through the L2 too."""
    return sum((pipes[name] + around * (name == "memory")) ** 3 for name in PIPES) ** (1 / 3)


def test_pipes_overlap_in_part():
    found = together({name: 10.0 * (name in ("issue", "memory")) for name in PIPES}, 10.0)
    assert found == pytest.approx(9000 ** (1 / 3)) and 20 < found < 30


def test_the_forward_of_full_sequences_by_hand():
    one = counted("attention_forward_kernel [forward bf16 D=64 p=0.1] sm_90")
    lengths = np.full(4, 512)
    paper = Paper(ENDLESS, Shares(1.0, 0.5, 1.0), 90)
    seconds, limit, filled, kernels_ = paper.attention("forward", lengths, lengths, BASE, 2.0, 0)
    # 8 sequences x 12 heads x 8 blocks of 64 rows; four tiles of 64 x 128 each.
    waves = -(-8 * 12 * 8 // (one["held"] * SMS))
    # Beside its tiles a program reads 64 rows of q and writes as many, 64 elements of 2 bytes.
    own = together({pipe: 2 * one[pipe] for pipe in PIPES}, 64 * 64 * 4 / 32)
    program = one["held"] * own + sc.RAMP
    assert seconds == pytest.approx(waves * program / CLOCK / 0.5)
    assert (limit, filled, kernels_) == ("L2", 1.0, 1)


def test_a_program_of_one_tile_is_all_in_its_count():
    one = counted("attention_backward_kernel [tile bf16 D=64 p=0.1] sm_90")
    assert one["held"] == 1
    lengths = np.full(100, 128)
    seconds, *_ = Paper(ENDLESS, WHOLE, 90).attention("backward", lengths, lengths, BASE, 1.0, 0)
    waves = -(-1200 // SMS)
    assert seconds == pytest.approx(waves * (together(one, 0) + sc.RAMP) / CLOCK)


def test_a_whole_head_by_hand():
    """One sequence of 512: 64 tiles of 64 x 64, and 28 bytes an element of its rows around them."""
    one = counted("attention_backward_kernel [head bf16 D=64 p=0.1] sm_90")
    lengths = np.full(1, 512)
    seconds, limit, *_ = Paper(ENDLESS, WHOLE, 90).attention(
        "backward", lengths, lengths, BASE, 1.0, 0
    )
    own = together({pipe: 16 * one[pipe] for pipe in PIPES}, 512 * 64 * 28 / 32)
    assert limit == "L2"
    assert seconds == pytest.approx((one["held"] * own + sc.RAMP) / CLOCK)


def test_what_tiles_compute_beyond_the_lengths():
    lengths = np.array([65, 512, 300])
    paper = Paper(ENDLESS, WHOLE, 90)
    scores = 65**2 + 512**2 + 300**2
    _, _, forward, _ = paper.attention("forward", lengths, lengths, BASE, 1.0, 0)
    # Rows by 64; columns by 128, what is left by 64: 128, 512 and 320 each way.
    assert forward == pytest.approx(scores / (128**2 + 512**2 + 320**2))
    _, _, backward, _ = paper.attention("backward", lengths, lengths, BASE, 1.0, 0)
    assert backward == forward
    asking = np.array([10, 70, 46])
    _, _, some, _ = paper.attention("forward", asking, lengths, BASE, 1.0, 0)
    scores = 10 * 65 + 70 * 512 + 46 * 300
    assert some == pytest.approx(scores / (64 * 128 + 128 * 512 + 64 * 320))


def test_the_last_columns_go_as_the_kernel_takes_them():
    from fastbert_kernels import attention_kernels  # Triton's import is for tests/kernels to begin

    assert sc.TAIL == attention_kernels.TAIL.value


def test_dropout_costs_what_its_counts_say():
    sure = dataclasses.replace(BASE, attention_probs_dropout_prob=0.0)
    lengths = np.full(400, 128)
    paper = Paper(ENDLESS, WHOLE, 90)
    found = [paper.attention("forward", lengths, lengths, one, 1.0, 0)[0] for one in (BASE, sure)]
    cases = [f"attention_forward_kernel [short bf16 D=64 p={p}] sm_90" for p in ("0.1", "0.0")]
    with_, without = (together(counted(case), 0) for case in cases)
    assert found[0] / found[1] == pytest.approx(with_ / without, rel=0.1)
    assert found[0] > found[1]


@pytest.mark.parametrize(("direction", "most"), [("forward", 1.10), ("backward", 1.05)])
def test_dropout_is_cheap_on_paper(direction, most):
    sure = dataclasses.replace(BASE, attention_probs_dropout_prob=0.0)
    lengths = np.full(128, 512)
    with_, without = (
        Paper(H100, sc.HOPPER.likely, 90).attention(direction, lengths, lengths, one, 1.0, 0)[0]
        for one in (BASE, sure)
    )
    assert 1 < with_ / without < most


@pytest.mark.parametrize(
    ("arch", "D", "S", "p", "some"),
    itertools.product((80, 90), HEAD_SIZES, (64, 128, 512, 1024), (0.0, 0.1), (False, True)),
)
def test_every_case_that_attention_needs_was_counted(arch, D, S, p, some):
    sizes = ModelConfig(
        hidden_size=2 * D, num_attention_heads=2, intermediate_size=4 * D,
        attention_probs_dropout_prob=p, max_position_embeddings=S,
    )  # fmt: skip
    lengths = np.array([S, S // 2])
    queries = np.array([5, 9]) if some else lengths
    for direction in ("forward", "backward"):
        found = Paper(ENDLESS, WHOLE, arch).attention(direction, queries, lengths, sizes, 9.0, 0)
        assert found[0] > 0 and 0 < found[2] <= 1
        split = backward_path(S, D, torch.bfloat16, arch) == "split"
        assert found[3] == (3 if direction == "backward" and split else 1)


@pytest.mark.parametrize(
    ("programs", "times", "expected"),
    [
        ([7.0] * 4, 1.0, 14.0),
        ([7.0] * 4, 0.5, 7.0),
        ([8.0, 4.0], 3.0, 36.0 / 3 + 0.6),
        ([8.0, 4.0], 0.5, 8.0),
    ],
)
def test_until_all_programs_are_done(programs, times, expected):
    assert sc._makespan(np.array(programs), times, 3) == pytest.approx(expected)


# The step


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("sizes", [BASE, LARGE, TINY], ids=["base", "large", "tiny"])
def test_families_add_up_between_best_and_worst(gpu, sizes):
    device = DEVICES[gpu]
    cost = device.step(sizes, 16_384, Lengths.of(np.array([512, 200, 37])))
    assert [one.name for one in cost.families] == list(sc.FAMILIES)
    assert cost.seconds == pytest.approx(sum(one.seconds for one in cost.families))
    for one in cost.families:
        assert one.low <= one.seconds <= one.high
    assert cost.low < cost.seconds < cost.high
    assert 0.4 < cost.backward_seconds / cost.seconds < 0.8
    passes = next(one for one in cost.families if one.name == sc.PASSES)
    assert sum(cost.passes.values()) == pytest.approx(passes.seconds)
    assert set(cost.passes) > {"bias_gelu forward", "dropout_add_layer_norm backward"}


def test_no_kernel_is_shorter_than_a_launch():
    cost = DEVICES["h100"].step(TINY, 512, Lengths.of(np.array([64])))
    busy = sum(one.seconds for one in cost.families if one.name != sc.GAPS)
    gaps = next(one for one in cost.families if one.name == sc.GAPS)
    assert busy >= cost.launches * sc.SHORTEST
    assert gaps.seconds == pytest.approx(cost.launches * sc.HOPPER.likely.gap_seconds)
    # No gaps and no launches on a CPU.
    assert DEVICES["cpu"].step(TINY, 512, Lengths.of(np.array([64]))).families[-1].seconds == 0


def test_a_cpu_writes_its_scores():
    paper = Paper(Ceilings(1e9, 1e12), WHOLE, None)
    lengths = np.array([10, 30])
    found = paper.attention("forward", lengths, lengths, SMALL, 3.0, 1e6)
    scores = 3 * (100 + 900)
    flops, moved = 4 * scores * 64, 23 * 2 * scores + 1e6
    assert found[0] == pytest.approx(flops / 1e12 + moved / 1e9)
    assert paper.product(10, 20, 30, 0)[0] == pytest.approx(2 * 6000 / 1e12)
