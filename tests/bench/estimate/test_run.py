"""`fastbert estimate`: sums done by hand, committed measurements, bounds, errors in one line."""

import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest

from fastbert import cli
from fastbert.config import ModelConfig, model_config
from fastbert.errors import RunError, UserError
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE
from fastbert_bench.config import EstimateConfig
from fastbert_bench.estimate import run as est
from fastbert_bench.estimate.run import DEVICES, Device, Memory, estimate
from fastbert_bench.estimate.step_cost import CPU, FAMILIES, OPTIMIZER, RESIDUAL_ADDS, Lengths
from fastbert_bench.kernels.costs import Ceilings
from fastbert_bench.measure import result

TINY, BASE, LARGE = map(model_config, ("tiny", "base", "large"))

ROUND = Device("round", Ceilings(1e9, 2e9), "made up", 1e9, CPU, None, nvlink=100e9)
SMALL = ModelConfig(
    vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=256, max_position_embeddings=128,
)  # fmt: skip
COMMITTED = [(name, one) for name, device in DEVICES.items() for one in est.measurements(device)]


# The model, by hand


def test_parameters():
    assert est.parameters(BASE) == 110_106_428  # as transformers counts BertForPreTraining
    for sizes in (TINY, SMALL):
        model = Bert(sizes, REFERENCE)
        assert est.parameters(sizes) == sum(p.numel() for p in model.parameters())


def test_lengths_come_down_to_a_mean_and_a_mean_by_tokens():
    found = Lengths.of(np.array([100, 300]))
    assert (found.mean, found.attended) == (200, 250)  # (100 * 100 + 300 * 300) / 400


def test_memory_of_base_on_an_h100():
    memory = Memory.of(BASE, DEVICES["h100"])
    assert memory.state_bytes == 18 * 110_106_428
    assert memory.bytes_per_token == pytest.approx(12 * (8 * 768 + 2 * 3072) * 2 + 9156.6)
    # (0.9 * 79 GiB - 1.98 GB) / 304,068.6 B = 244,553 tokens, or 477 sequences of 512
    assert memory.most_tokens(512) == 477 * 512
    assert memory.needed(244_553) <= 79 * 2**30 < memory.needed(244_554)


def test_a_ring_sends_nearly_twice_the_bytes():
    assert est.all_reduce_seconds(1e9, 1, ROUND) == 0
    assert est.all_reduce_seconds(1e9, 2, ROUND) == pytest.approx(1 / 80)
    assert est.all_reduce_seconds(1e9, 8, ROUND) == pytest.approx(2 * 7 / 8 / 80)
    assert est.all_reduce_seconds(1e9, 64, ROUND) == pytest.approx(2 * 63 / 64 / 40)  # InfiniBand


def test_the_backward_hides_all_but_the_embedding():
    embedding, all = 4 * 1130 * 64, 4 * est.parameters(SMALL)  # 1,000 + 128 + 2 rows

    def ring(bytes):
        return 2 * 63 / 64 * bytes / 40e9

    assert est.exposed_seconds(SMALL, 64, 1.0, ROUND) == pytest.approx(ring(embedding))
    assert est.exposed_seconds(SMALL, 64, 0.0, ROUND) == pytest.approx(ring(all))
    partly = ring(all - embedding) / 4
    assert est.exposed_seconds(SMALL, 64, partly, ROUND) == pytest.approx(ring(all) - partly)
    assert est.exposed_seconds(SMALL, 1, 0.0, ROUND) == 0


# Measurements


@pytest.mark.parametrize(("gpu", "one"), COMMITTED, ids=[str(one.path) for _, one in COMMITTED])
def test_the_model_reproduces_what_was_measured(gpu, one):
    assert one.factor(DEVICES[gpu]) == pytest.approx(1, abs=0.15)


def test_committed_steps_of_the_cpu_are_found():
    found = {one.path.name: one for gpu, one in COMMITTED if gpu == "cpu"}
    assert {"step-mini.json", "step-base.json"} <= set(found)
    assert all(one.tokens == 2312 for one in found.values())


def measured(folder, **changes):
    """A file as `fastbert bench step` writes it: 64 sequences of 512, 40 ms, 0.4 J a token."""
    content = {
        "benchmark": "step",
        "conditions": {"device": "NVIDIA H100 80GB HBM3", "device_type": "cuda"},
        "dtype": "bfloat16",
        "model": dataclasses.asdict(BASE),
        "lengths": [512] * 64,
        "real_tokens": 32768,
        "rows": [{"name": "fastbert", "ms": 40.0, "joules_per_million_tokens": 400.0}],
        **changes,
    }
    (folder / "h100").mkdir(exist_ok=True)
    (folder / "h100" / "anything.json").write_text(json.dumps(content))


def asked(**changes):
    return EstimateConfig(**{"lengths": "full", "tokens_per_batch": 32768, **changes})


def test_a_measurement_of_this_model_replaces_the_models_time(tmp_path):
    measured(tmp_path)
    found = estimate(asked(), tmp_path)
    assert found.source == f"from {tmp_path / 'h100' / 'anything.json'}"
    plan = found.plans[0]
    assert plan.step_seconds == pytest.approx(0.040)
    assert plan.low_seconds == plan.high_seconds == plan.step_seconds
    assert found.watts == pytest.approx(400 * 0.032768 / 0.040)  # J a step over seconds a step
    # At twice the tokens the model carries it on: as much longer as the model says.
    twice = estimate(asked(tokens_per_batch=65536), tmp_path)
    plain = [estimate(asked(tokens_per_batch=T), tmp_path / "no").plans[0] for T in (65536, 32768)]
    expected = 0.040 * plain[0].step_seconds / plain[1].step_seconds
    assert twice.plans[0].step_seconds == pytest.approx(expected)
    assert "32,768 tokens a step; the model carries it to 65,536" in twice.source


@pytest.mark.parametrize(
    ("changes", "settings", "source"),
    [
        ({}, {"model": "large"}, "this model at such lengths is not yet measured on this device"),
        ({}, {"lengths": "natural"}, "this model at such lengths is not yet"),
        ({}, {"gpu": "h200"}, "not yet measured on this device"),
        ({"dtype": "float32"}, {}, "not yet measured on this device"),
        ({"benchmark": "data"}, {}, "not yet measured on this device"),
        ({"conditions": {"device": "NVIDIA H100 PCIe"}}, {}, "not yet measured on this device"),
        ({}, {"gpu": "a100-80gb"}, "not yet measured on this device"),
        ({"rows": [{"name": "hf-sdpa", "ms": 1.0}]}, {}, "not yet measured on this device"),
    ],
)
def test_other_measurements_do_not(tmp_path, changes, settings, source):
    measured(tmp_path, **changes)
    config = asked(**settings)
    found = estimate(config, tmp_path)
    assert found.source.startswith(f"modelled: {source}")
    assert found.plans == estimate(config, tmp_path / "none").plans


def test_a_file_at_odds_with_itself_is_refused(tmp_path):
    measured(tmp_path, real_tokens=32767)
    with pytest.raises(RunError, match=r"anything\.json: the lengths do not add up to real_tokens"):
        estimate(asked(), tmp_path)


# The whole estimate


def test_days_dollars_and_energy_follow_from_the_rate(tmp_path):
    found = estimate(asked(gpus="1,16,1024", price_per_hour=2.5, tokens=1e11), tmp_path)
    assert [plan.gpus for plan in found.plans] == [1, 16, 1024]
    for plan in found.plans:
        hours = plan.days * 24
        assert plan.tokens_per_second * hours * 3600 == pytest.approx(1e11)
        assert plan.dollars == pytest.approx(hours * 2.5 * plan.gpus)
        assert plan.kilowatt_hours == pytest.approx(hours * plan.gpus * 0.7 * 0.85)
        assert plan.optimizer_steps == math.ceil(1e11 / (32768 * plan.gpus))
        assert plan.optimizer_steps * plan.step_seconds == pytest.approx(hours * 3600, rel=1e-3)
        # 72 * 12 * 768² + 12 * 12 * 768 * 512 + 0.9 * (768² + 768 * 30522) = 587,858,688
        rate = plan.tokens_per_second / plan.gpus
        assert plan.mfu == pytest.approx(587_858_688 * rate / 989e12)
        # Of the last layer 60 H² are for 15% and one of 512 tokens, and so are 12 H s.
        skipped = (60 * 768**2 + 12 * 768 * 512) * (0.85 - 1 / 512)
        executed = (587_858_688 - skipped) * rate / 989e12
        assert plan.mfu_executed == pytest.approx(executed, rel=1e-3)
        assert plan.low_seconds < plan.step_seconds < plan.high_seconds


def test_more_gpus_are_faster_but_never_by_more_than_their_number(tmp_path):
    plans = estimate(asked(gpus="64,1,8,1024,8"), tmp_path).plans
    assert [plan.gpus for plan in plans] == [1, 8, 64, 1024]
    assert plans[0].efficiency == 1
    for fewer, more in itertools.pairwise(plans):
        assert fewer.tokens_per_second < more.tokens_per_second
        assert more.tokens_per_second / more.gpus <= fewer.tokens_per_second / fewer.gpus
        assert 0 < more.efficiency <= fewer.efficiency


@pytest.mark.parametrize("gpu", DEVICES)
def test_larger_work_takes_longer(gpu):
    device, usual, short = DEVICES[gpu], BASE, Lengths.of(np.array([128]))

    def seconds(sizes=usual, tokens=8192, lengths=short):
        return device.step(sizes, tokens, lengths).seconds

    assert seconds(tokens=8192) < seconds(tokens=16384) < 2 * seconds(tokens=8192)
    assert seconds() < seconds(LARGE)
    assert seconds() < seconds(lengths=Lengths.of(np.array([512])))


def test_beyond_lambs_recipes_it_warns_and_plans_within_them(tmp_path):
    found = estimate(asked(tokens_per_batch=65536, gpus="1024"), tmp_path)  # 128 sequences each
    last, within = found.plans[-2:]
    assert (last.gpus, last.sequences_per_step) == (1024, 131_072)
    assert (within.gpus, within.sequences_per_step) == (1024, 65_536)
    assert within.tokens_per_batch == 32768
    assert within.efficiency < last.efficiency
    (line,) = est.warnings(found)
    assert line.startswith("1,024 GPUs with 65,536 tokens each are 131,072 sequences a step")
    assert not est.warnings(estimate(asked(), tmp_path))


def test_heads_that_no_kernel_has_are_told_of(tmp_path, capsys):
    path = tmp_path / "config.json"
    for heads, told in ((8, True), (12, False)):
        path.write_text(json.dumps({"model_type": "bert", "num_attention_heads": heads}))
        for gpu in ("h100", "cpu"):
            assert cli.main(["estimate", "--model", str(path), "--gpu", gpu]) == 0
            said = "warning: heads of 96: our kernels have 32, 64, 128" in capsys.readouterr().out
            assert said == (told and gpu == "h100")


def test_muon_costs_time_and_executed_flops_and_spares_a_moment(tmp_path, capsys):
    adamw, split, joined = (
        estimate(asked(**changes), tmp_path)
        for changes in ({}, {"optim": "muon"}, {"optim": "muon", "muon_split_qkv": False})
    )
    seconds = [one.plans[0].step_seconds for one in (adamw, joined, split)]
    assert seconds == sorted(seconds)
    assert split.plans[0].mfu < adamw.plans[0].mfu
    before, after = (
        one.plans[0].mfu_executed * one.plans[0].step_seconds * 989e12 for one in (adamw, split)
    )
    orthogonalized = split.cost.family(OPTIMIZER).flops
    assert after - before == pytest.approx(orthogonalized)
    assert 1.2e12 < orthogonalized < 1.64e12  # 1.64e12, but for halves of symmetric products
    assert adamw.memory.state_bytes - split.memory.state_bytes == 4 * 85_524_480
    assert cli.main(["estimate", "--optim", "muon"]) == 0
    shown = capsys.readouterr().out
    assert "- step: bf16, Muon and AdamW, " in shown
    assert "- Muon: 73 matrices, 4 bytes a parameter less; Newton-Schulz 5 times, 1.64 TF" in shown
    measured(tmp_path)
    found = estimate(asked(optim="muon"), tmp_path)
    assert found.source.endswith("; measured with AdamW, the model carries it to Muon")
    ratio = found.plans[0].step_seconds / 0.040
    assert ratio == pytest.approx(split.cost.seconds / adamw.cost.seconds)


def test_epochs_are_times_the_corpus():
    assert est.tokens_asked(EstimateConfig(epochs=2.5, corpus_tokens=4e9)) == 1e10
    assert est.tokens_asked(EstimateConfig(tokens=5e9)) == 5e9
    assert est.tokens_asked(EstimateConfig()) == 1e6 * 256 * 512


def test_only_what_was_asked_for_is_told_of(tmp_path):
    found = estimate(asked(), tmp_path)
    assert [plan.gpus for plan in found.plans] == [1]
    assert "NVLink" not in est.table(found)
    both = est.table(estimate(asked(gpus="8,1"), tmp_path))
    assert "NVLink" in both and re.search(r"^ *8  ", both, re.MULTILINE)


def test_which_vocabulary_is_assumed_is_said_and_can_be_told(tmp_path):
    found = estimate(asked(model="tiny"), tmp_path)
    printed = est.table(found)
    assert "tiny (4M parameters, vocabulary 30,522)" in printed
    assert "vocabulary: 30,522 tokens, the model's own; a tokenizer that `fastbert pre" in printed
    assert " trains has 4,096 unless" in printed
    less = estimate(asked(model="tiny", vocab_size=4096), tmp_path)
    assert "tiny (1M parameters, vocabulary 4,096)" in est.table(less)
    assert "unless told otherwise" not in est.table(less)
    assert less.plans[0].step_seconds < found.plans[0].step_seconds


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0123, "under a second"),
        (119, "119 seconds"),
        (121, "2.0 minutes"),
        (3 * 3600, "3.0 hours"),
        (2.6 * 86400, "2.6 days"),
        (4e6 * 86400, "4,000,000.0 days"),
    ],
)
def test_a_time_is_told_by_its_size(seconds, said):
    assert est.duration(seconds) == said


@pytest.mark.parametrize(
    ("tokens", "found"), [("3.3B", 3.3e9), ("3.3b", 3.3e9), ("2G", 2e9), ("5M", 5e6), ("7K", 7e3)]
)
def test_tokens_may_be_written_short(tmp_path, capsys, tokens, found):
    out = tmp_path / "estimate.json"
    argv = ["estimate", "--gpu", "cpu", "--model", "tiny", "--json", str(out)]
    assert cli.main([*argv, "--tokens", tokens]) == 0
    assert json.loads(out.read_text())["tokens"] == found
    assert cli.main([*argv, "--corpus-tokens", tokens, "--epochs", "2"]) == 0
    assert json.loads(out.read_text())["tokens"] == 2 * found
    assert cli.main([*argv, "--tokens", "3.3X"]) == 2
    assert "--tokens 3.3X: must be a number" in capsys.readouterr().err


def test_lengths_of_a_file_are_cut(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("100\n300\n900\n")
    drawn = est.drawn_lengths(EstimateConfig(lengths=str(path)))
    assert drawn.tolist() == [100, 300, 512]


# The command


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    out = tmp_path / "estimate.json"
    argv = ["--model", "large", "--gpu", "h200", "--gpus", "4", "--price-per-hour", "3"]
    assert cli.main(["estimate", *argv, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    result.check(written)
    assert written["benchmark"] == "estimate"
    assert written["settings"]["model"] == "large"
    assert f"step time, {written['source']}" in printed and ": modelled: " not in printed
    for line in written["assumptions"]:
        assert f"\n- {line}" in printed
        assert "\n" not in line
    for row in written["rows"]:
        assert f"{row['tokens_per_second']:,.0f}" in printed
        joules = row["kilowatt_hours"] * 3.6e6 / (written["tokens"] / 1e6)
        assert row["joules_per_million_tokens"] == pytest.approx(joules)
    assert written["missing"] == []
    assert [one["name"] for one in written["families"]] == list(FAMILIES)
    for one in written["families"]:
        line = next((line for line in printed.splitlines() if line.startswith(one["name"])), "")
        assert (f" {one['seconds'] * 1e3:,.2f} " in line) == (one["name"] != RESIDUAL_ADDS)
        assert (one["limit"] in line) == (one["name"] != RESIDUAL_ADDS)


def test_what_is_not_known_on_a_cpu_is_missing_not_silent(tmp_path, capsys):
    out = tmp_path / "estimate.json"
    argv = ["--gpu", "cpu", "--model", "mini", "--max-seq-length", "128", "--tokens", "1e8"]
    assert cli.main(["estimate", *argv, "--tokens-per-batch", "2312", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["source"].startswith("from benchmarks/results/amd-epyc-2-cores/step-mini.json")
    assert [one["name"] for one in written["missing"]] == ["dollars", "energy", "mfu"]
    assert [row["gpus"] for row in written["rows"]] == [1]
    assert "NVLink" not in capsys.readouterr().out


ERRORS = [
    (
        "--gpu h10",
        "gpu = 'h10' must be one of h100, h200, a100-80gb, a100-40gb, cpu: did you mean ",
    ),
    ("--gpus 1025", "gpus = '1025' must be integers of at least 1 and at most 1024"),
    ("--gpu cpu --gpus 2", "gpus = 2 must be 1 with gpu = 'cpu'"),
    ("--model bsae", "model = 'bsae' is not a preset: did you mean 'base'?"),
    ("--lengths no/such", "lengths = 'no/such': no such file or folder"),
    ("--max-seq-length 1024", "max_seq_length = 1024 must be at most 512"),
    ("--epochs 3", "epochs and corpus_tokens belong together"),
    ("--tokens 1 --epochs 3 --corpus-tokens 9", "tokens = 1 and epochs = 3 say the same"),
    ("--tokens-per-batch 100", "tokens_per_batch = 100 must be at least max_seq_length = 512"),
    (
        "--gpu a100-40gb --tokens-per-batch 1000000",
        "tokens_per_batch = 1000000 needs 316.7 GiB: gpu = 'a100-40gb' has 39 GiB, where at most "
        "117248 tokens fit",
    ),
    ("--json no/such/file.json", "json = 'no/such/file.json': no such folder"),
]


@pytest.mark.parametrize(("argv", "line"), ERRORS)
def test_errors_are_one_line(capsys, argv, line):
    assert cli.main(["estimate", *argv.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fastbert: error: {line}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "the file is empty"), ("100\nx\n", ":2: 'x' is not a length"), ("2\n", ":1: '2' is not")],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, said):
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        est.drawn_lengths(EstimateConfig(lengths=str(path)))


def test_a_model_too_large_says_what_it_needs(tmp_path, capsys):
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 32768}
    path.write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 12, **sizes}))
    assert est.parameters(model_config(str(path))) == pytest.approx(10.05e9, rel=0.01)
    assert cli.main(["estimate", "--model", str(path), "--gpu", "a100-80gb"]) == 2
    # 18 bytes for each of 10 billion parameters, and a tenth of the memory left free
    said = capsys.readouterr().err
    assert "needs 188." in said or "needs 189." in said
    assert "gpu = 'a100-80gb' has 79 GiB" in said


@pytest.mark.parametrize(
    "request_", ["--model tiny --tokens 1K", "--model large --tokens 999T",
                 "--tokens-per-batch 8 --max-seq-length 8"]
)  # fmt: skip
def test_columns_of_plans_never_touch(request_, capsys):
    assert cli.main(["estimate", *request_.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(index for index, line in enumerate(lines) if line.lstrip().startswith("GPUs"))
    titles, cells = (re.split(r"  +", line.strip()) for line in lines[head : head + 2])
    assert len(titles) == len(cells) == 15


def test_without_a_checkout_no_folder_of_the_working_one_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(est, "RESULTS", tmp_path / "none")
    assert cli.main(["estimate"]) == 0
    assert "measured results are in the repository, not in the package" in capsys.readouterr().out
