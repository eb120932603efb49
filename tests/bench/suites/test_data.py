"""`fastbert bench data`: real rounds at a small size, and what its figures rest on."""

import dataclasses
import json
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.cli import main
from fastbert.errors import RunError
from fastbert_bench.config import DataBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.suites import data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return data.write_shards(tmp_path_factory.mktemp("shards"), 60_000, seed=1)


@pytest.fixture
def small(tmp_path):
    """A short run with a vocabulary of its own."""
    sizes = {"model_type": "bert", "vocab_size": 600, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return DataBenchConfig(
        device="cpu",
        model=str(tmp_path / "config.json"),
        max_seq_lengths="64",
        num_workers="1,0",
        tokens_per_batch=1024,
        corpus_tokens=30_000,
        rounds=3,
        seconds=0.05,
    )


def options(config):
    """The command line of a configuration."""
    asked = dataclasses.asdict(config)
    return [f"--{name.replace('_', '-')}={value}" for name, value in asked.items() if value]


def test_the_command_prints_a_table_and_writes_json(small, tmp_path, capsys):
    out = tmp_path / "data.json"
    assert main(["bench", "data", *options(dataclasses.replace(small, json=str(out)))]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    results.check(result)
    rows = {(row["num_workers"], row["contender"]): row for row in result["rows"]}
    assert list(rows) == [(W, name) for W in (0, 1) for name in ("fastbert", "hf-collator")]
    for row in result["rows"]:
        assert len(row["rounds_ms"]) == len(row["rounds_tokens_per_second"]) == 3
        assert row["real_tokens_per_second"] > 1000
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        mean = row["real_tokens_per_second"] / row["sequences_per_second"]
        assert 30 < mean <= 64  # a batch of about T tokens has T / mean sequences
        assert row["ms"] / 1e3 * row["real_tokens_per_second"] == pytest.approx(1000, rel=0.2)
        assert row["cores_used"] > 0.05
        # a rate per core is a rate over the cores in use, up to the median of the rounds
        ratio = row["real_tokens_per_second"] / row["real_tokens_per_second_and_core"]
        assert ratio == pytest.approx(row["cores_used"], rel=0.5)
        assert row["name"] in printed and f"{row['real_tokens_per_second']:,.0f}" in printed
    ours, theirs = (
        rows[0, name]["rounds_tokens_per_second"] for name in ("fastbert", "hf-collator")
    )
    pairs = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
    assert rows[0, "hf-collator"]["ratio"] == pytest.approx(pairs[1])
    assert rows[0, "fastbert"]["ratio"] == 1
    missing = {one["name"]: one["why"] for one in result["missing"]}
    assert missing.keys() == {"mfu", "peak_memory_bytes", "energy"}
    assert result["cores"] == len(os.sched_getaffinity(0)) and result["vocab_size"] == 600
    assert f"{result['cores']} cores" in printed
    assert "target: not measured" in printed


def mean_length(shards, config, S=64):
    rows = data.sequences_of(shards, S, config)
    return np.mean([len(row["input_ids"]) for row in rows])


def test_full_sequences_are_full(small, tmp_path):
    config = dataclasses.replace(small, lengths="full")
    shards = data.write_shards(tmp_path, 60_000, seed=1, V=600, lengths="full", S=64)
    assert shards.sentence_lengths.max() <= 8
    assert mean_length(shards, config) > 63


def test_lengths_of_sentences_come_from_a_file(small, tmp_path, capsys):
    path = tmp_path / "lengths.txt"
    path.write_text("3\n40\n")
    folder = tmp_path / "shards"
    folder.mkdir()
    shards = data.write_shards(folder, 20_000, seed=1, V=600, lengths=str(path))
    assert set(shards.sentence_lengths.tolist()) == {3, 40}
    config = dataclasses.replace(small, lengths=str(path), num_workers="0", rounds=1)
    assert main(["bench", "data", *options(config)]) == 0
    assert "lengths.txt lengths" in capsys.readouterr().out
    path.write_text("3\nx\n")
    assert main(["bench", "data", *options(config)]) == 2
    assert ":2: 'x' is not a length" in capsys.readouterr().err


def test_a_rival_holds_what_we_planned(small, tmp_path):
    shards = data.write_shards(tmp_path, 20_000, seed=1, V=600)
    rows = data.sequences_of(shards, 64, small)
    assert sum(len(row["input_ids"]) for row in rows) >= 20_000
    for row in rows:
        ids = row["input_ids"]
        assert ids[0] == data.CLS and ids[-1] == data.SEP and data.MASK not in ids
        assert row["special_tokens_mask"] == [int(one < data.WORDS) for one in ids]
        assert row["next_sentence_label"] in (0, 1)
        first = ids.index(data.SEP) + 1
        assert row["token_type_ids"] == [0] * first + [1] * (len(ids) - first)


class TestWrongRivalsAreCaught:
    @pytest.fixture
    def refused(self, small, monkeypatch):
        def run(wrong):
            make = data.hf_collator
            monkeypatch.setitem(data.RIVALS, "hf-collator", lambda *given: wrong(make(*given)))
            config = dataclasses.replace(small, num_workers="0", tokens_per_batch=8192)
            with pytest.raises(RunError) as raised:
                data.run(config)
            return str(raised.value)

        return run

    def test_padding_counted_as_work(self, refused):
        def careless(source):
            def seen():
                ids, labels, taken = source.seen()
                return ids, labels, taken._replace(tokens=ids.numel())

            return dataclasses.replace(source, seen=seen)

        assert "[PAD] is no work" in refused(careless)

    def test_nothing_masked(self, refused):
        def lazy(source):
            def seen():
                ids, labels, taken = source.seen()
                return ids, labels.fill_(-100), taken

            return dataclasses.replace(source, seen=seen)

        assert "hf-collator masks 0.0% of the tokens, not 15%" in refused(lazy)


def test_a_bad_request_is_told_before_the_work(capsys):
    assert main(["bench", "data", "--max-seq-lengths", "128", "--tokens-per-batch", "64"]) == 2
    assert "128 must be at most tokens_per_batch = 64" in capsys.readouterr().err
    assert main(["bench", "data", "--max-seq-lengths", "1024,128"]) == 2
    assert "max_seq_length = 1024 must be at most 512" in capsys.readouterr().err
    assert main(["bench", "data", "--against", "hf"]) == 2
    assert "'hf' must be one of hf-collator" in capsys.readouterr().err


def test_the_corpus_is_like_text(shards):
    assert shards.num_tokens >= 60_000
    assert np.mean(shards.sentence_lengths) == pytest.approx(25, rel=0.05)
    assert np.mean(np.diff(shards.document_offsets)) == pytest.approx(30, rel=0.4)
    ids = shards.tokens(0, int(shards.sentence_offsets[shards.document_offsets[1]]))
    assert ids.min() >= data.WORDS
    assert ids.max() < data.V


def test_only_real_tokens_count_and_the_workers_time_does(shards, small):
    config = dataclasses.replace(small, model="base", tokens_per_batch=4096)
    with ExitStack() as stack:
        source = data.ours(shards, 128, 1, config, CPU, stack)
        found = data.one_round(source, 2, 0.3, CPU)
        (pid,) = source.pids
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        assert data.cpu_seconds(source.pids) == pytest.approx(spent, abs=0.1)
        before = data.cpu_seconds(source.pids)
        data.rest(source.pids)
        assert data.cpu_seconds(source.pids) - before < 0.05  # a round leaves nobody at work
    assert 0.3 <= found.wall < 3
    assert 0 < found.cpu < 2.5 * found.wall
    assert 0 < found.tokens <= 4096 * found.batches
    assert found.tokens <= 128 * found.sequences


@pytest.mark.parametrize(
    ("rate", "per_core", "said"),
    [(3e6, 4e5, "met"), (2.9e6, 4e5, "missed"), (3e6, 3.9e5, "missed")],
)
def test_the_verdict(rate, per_core, said):
    row = {
        "max_seq_length": 512,
        "num_workers": 4,
        "real_tokens_per_second": rate,
        "real_tokens_per_second_and_core": per_core,
    }
    assert data.verdict([row]).endswith(said)
    assert "not measured" in data.verdict([row | {"num_workers": 2}])
