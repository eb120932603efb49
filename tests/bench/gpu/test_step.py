"""The stages `step` and `rivals`, rehearsed on a CPU: real steps of a tiny model, one by one."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from fastbert.config import model_config
from fastbert.errors import RunError
from fastbert_bench.gpu import step as gpu_step
from fastbert_bench.gpu.step import AGAIN, OURS, Bench
from fastbert_bench.measure import result as results
from fastbert_bench.measure.flops import executed_flops_per_token, flops_per_token
from fastbert_bench.measure.workloads import SEED, WORKLOADS, Workload
from fastbert_bench.suites import contenders
from fastbert_bench.suites.contenders import flattened, part_of

CPU = torch.device("cpu")
TARGETS = {"floor": 1.3, "hf-sdpa": 1e9, "mfu": 0.5}
TEST = Workload("test", "tiny", 4, 32, "natural", TARGETS)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(WORKLOADS, "test", TEST)


def run(out, *names):
    """Every contender as its process would run it; what their processes died of."""
    told = {}
    for name in names:
        told[name] = None
        try:
            gpu_step.run_contender("test", name, "cpu", True, gpu_step.piece(out, "test", name))
        except Exception as error:
            told[name] = f"exit code 1: {error}"
    return told


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A folder with what several contenders left."""
    out = tmp_path_factory.mktemp("pieces")
    names = (OURS, "hf-sdpa", "last layer everywhere", AGAIN, "hf-flash")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKLOADS, "test", TEST)
        return out, run(out, *names)


def test_a_workload_is_collected_and_judged(pieces):
    out, told = pieces
    result = gpu_step.collect(out, TEST, told, "abc")
    results.check(result)
    ours, theirs = result["rows"]
    assert (ours["name"], theirs["name"]) == (OURS, "hf-sdpa")
    assert math.isclose(ours["first_loss"], theirs["first_loss"], rel_tol=1e-5)
    tokens = result["real_tokens"] / ours["ms"] * 1e3
    assert math.isclose(tokens, ours["real_tokens_per_second"])
    assert math.isclose(theirs["ratio"], theirs["ms"] / ours["ms"])
    assert 0 < result["floor_ms"] < ours["ms"]
    (without,) = result["ablations"]
    assert without["name"] == "last layer everywhere" and without["ratio"] > 0
    assert result["targets"]["hf-sdpa"]["holds"] is False
    assert result["targets"]["floor"]["measured"] > 1
    assert result["targets"]["mfu"]["holds"] is None
    assert [one["name"] for one in result["missing"]] == ["hf-flash"]
    assert "not installed" in result["missing"][0]["why"]
    lines = gpu_step.table(result)
    assert any("MISSED" in line for line in lines) and max(map(len, lines)) <= 150


def test_the_second_run_of_ours_is_part_of_the_first(pieces):
    out, told = pieces
    first, again = (
        json.loads(gpu_step.piece(out, "test", name).read_text()) for name in (OURS, AGAIN)
    )
    result = gpu_step.collect(out, TEST, told)
    assert result["drift"] == pytest.approx(again["ms"] / first["ms"])
    assert result["rows"][0]["rounds_ms"] == first["rounds_ms"] + again["rounds_ms"]
    alone = gpu_step.collect(out, TEST, {OURS: None})
    assert alone["drift"] is None and alone["rows"][0]["ms"] == pytest.approx(first["ms"])


def test_nothing_is_made_of_nothing(tmp_path):
    assert gpu_step.collect(tmp_path, TEST, {"hf-sdpa": "exit code -9: "}) is None


def test_what_died_silently_is_missing(pieces):
    out, told = pieces
    result = gpu_step.collect(out, TEST, told | {"hf-eager": "stopped after 55 s: "})
    assert {"name": "hf-eager", "why": "stopped after 55 s: "} in result["missing"]


def test_a_rival_that_computes_something_else_is_not_admitted(pieces, tmp_path):
    out, told = pieces
    path = gpu_step.piece(out, "test", "hf-sdpa").with_suffix(".npy")
    losses = np.load(path)
    np.save(path, losses + 0.01)
    try:
        result = gpu_step.collect(out, TEST, told)
    finally:
        np.save(path, losses)
    assert [row["name"] for row in result["rows"]] == [OURS]
    assert result["missing"][-1]["why"].startswith("not comparable")


class TestARivalThatDoesNotFit:
    """It gets the largest part of the batch that fits, and is compared by the token."""

    @pytest.fixture
    def result(self, tmp_path, monkeypatch):
        made, tried = contenders.rival, []

        def rival(name, sizes, weights, batches, *rest):
            tried.append(len(batches[0]["labels"]))
            if tried[-1] > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.\nMore")
            return made(name, sizes, weights, batches, *rest)

        monkeypatch.setattr(contenders, "rival", rival)
        told = run(tmp_path, OURS, "hf-sdpa")
        assert tried == [4, 3, 2]
        return gpu_step.collect(tmp_path, TEST, told)

    def test_it_is_compared_by_the_token(self, result):
        results.check(result)
        ours, theirs = result["rows"]
        assert theirs["batch_size"] == 2 and "batch_size" not in ours
        by_token = ours["real_tokens_per_second"] / theirs["real_tokens_per_second"]
        assert theirs["ratio"] == pytest.approx(by_token)
        assert theirs["sequences_per_second"] == pytest.approx(2 / theirs["ms"] * 1e3)
        assert "fits 2 sequences" in "\n".join(gpu_step.table(result))

    def test_another_error_is_no_reason_to_shrink(self, tmp_path, monkeypatch):
        def rival(*_):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(contenders, "rival", rival)
        told = run(tmp_path, OURS, "hf-sdpa")
        missing = gpu_step.collect(tmp_path, TEST, told)["missing"]
        assert missing == [{"name": "hf-sdpa", "why": "RuntimeError: no such kernel"}]

    def test_nothing_fits(self, tmp_path, monkeypatch):
        def rival(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(contenders, "rival", rival)
        told = run(tmp_path, OURS, "hf-sdpa")
        missing = gpu_step.collect(tmp_path, TEST, told)["missing"]
        assert missing == [{"name": "hf-sdpa", "why": "OutOfMemoryError: CUDA out of memory."}]


def test_a_part_of_a_batch_has_the_same_lengths_in_every_batch():
    bench = Bench(WORKLOADS["base-512-natural"], torch.float32)
    wanted = None
    for batch in bench.padded:
        lengths = batch["attention_mask"].sum(1)[part_of(batch, 24)].sort().values
        wanted = lengths if wanted is None else wanted
        assert torch.equal(lengths, wanted)
    whole = bench.padded[0]["attention_mask"].sum(1).float()
    assert abs(float(wanted.float().mean() / whole.mean()) - 1) < 0.05  # stands for all
    assert torch.equal(part_of(bench.padded[0], 96), torch.arange(96))


def test_every_contender_starts_from_the_same_weights():
    first, second = Bench(TEST, torch.float32), Bench(TEST, torch.float32)
    state = second.model().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first._initial.items())
    model = first.model()
    assert model.dropout_state[:, 2].tolist() == [0, 1, 2]
    model.layers[0].up.weight.data.zero_()
    assert first.model().layers[0].up.weight.abs().max() > 0


def test_flattened_sequences_leak_unless_attention_knows_their_ends():
    """Why only FlashAttention is admitted: SDPA takes the row for one sequence."""
    bench = Bench(TEST, torch.float32).to(CPU)
    flat = flattened(bench.padded[0])
    assert torch.equal(flat["input_ids"][0], bench.packed[0].input_ids)
    assert torch.equal(flat["cu_seq_lens_q"], bench.packed[0].cu_seqlens)
    assert torch.equal(flat["position_ids"][0], bench.packed[0].position_ids)
    made, _ = bench.rival("hf-sdpa", 1.0)
    hugging_face = contenders._hugging_face

    def by_sdpa(name, *rest):
        return hugging_face("hf-sdpa-flat", *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "_hugging_face", by_sdpa)
        leaking, _ = bench.rival("hf-flash-flat", 1.0)
    assert leaking.real_tokens == made.real_tokens
    assert leaking.token_losses.shape == made.token_losses.shape
    leaking.step(0)  # it trains all the same
    with pytest.raises(RunError, match="nats in the loss of a token"):
        contenders.check_fair(made, dataclasses.replace(leaking, losses_dtype=torch.float32), True)


def test_evidence_in_the_weights_own_dtype_where_an_op_has_no_fp32():
    """FlashAttention's: the ablation of it once failed before it began."""
    bench = Bench(TEST, torch.bfloat16).to(CPU)
    whole = bench.ours(OURS)
    recipe = contenders.make_recipe(1)
    narrow = contenders.ours(
        "narrow", bench.model(), bench.packed, recipe, torch.bfloat16, losses_dtype=torch.bfloat16
    )
    assert narrow.losses_dtype == torch.bfloat16 and narrow.drops
    difference = (narrow.token_losses.float() - whole.token_losses).abs().max()
    assert 1e-6 < difference < contenders.TOLERANCE[torch.bfloat16]
    contenders.check_fair(whole, narrow, True)


def test_flops_are_the_formulas():
    """BERT-base at 512: 6 (85.0M + 0.15 (0.6M + 23.4M)) + attention's 12 L H s."""
    sizes = model_config("base")
    found = flops_per_token(sizes, np.full(8, 512))
    assert math.isclose(found, 6 * 12 * 12 * 768**2 + 12 * 12 * 768 * 512 + 0.9 * 768 * 31290)
    assert flops_per_token(sizes, np.array([512, 1])) < found
    # Of the last layer, 60 of 72 H² a token and its attention take place for one row in six.
    executed = executed_flops_per_token(sizes, np.full(8, 512), masked=round(0.15 * 8 * 512))
    skipped = (60 * 768**2 + 12 * 768 * 512) * (1 - 614 / 4096 - 1 / 512)
    assert math.isclose(executed, found - skipped, rel_tol=1e-4)
    assert 0.057 < 1 - executed / found < 0.059
    everywhere = executed_flops_per_token(sizes, np.full(8, 512), masked=8 * 512)
    assert everywhere == found


def test_mlperf_lengths_have_its_mean():
    (workload,) = (w for w in WORKLOADS.values() if w.lengths == "mlperf")
    rng = np.random.default_rng(SEED)
    lengths = workload.draw(rng)
    assert abs(lengths.mean() - 254) < 10 and lengths.max() == 512
