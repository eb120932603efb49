"""`fastbert bench data`: real rounds at a small size, and what its figures rest on."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data
from benchmarks import result as results
from fastbert.cli import main
from fastbert.data.pack import Packer
from fastbert.data.workers import BatchLoader


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return data.write_shards(tmp_path_factory.mktemp("shards"), 60_000, seed=1)


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    out = tmp_path / "data.json"
    sizes = ["--tokens-per-batch", "1024", "--corpus-tokens", "30000"]
    choice = ["--max-seq-lengths", "64", "--num-workers", "1,0", "--rounds", "2"]
    options = [*sizes, *choice, "--seconds", "0.05", "--json", str(out)]
    assert main(["bench", "data", *options]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    results.check(result)
    assert [(row["max_seq_length"], row["num_workers"]) for row in result["rows"]] == [
        (64, 0),
        (64, 1),
    ]
    for row in result["rows"]:
        assert len(row["rounds_tokens_per_second"]) == 2
        assert row["real_tokens_per_second"] > 1000
        assert row["cores_used"] > 0.05
        # a rate per core is a rate over the cores in use, up to the median of two rounds
        ratio = row["real_tokens_per_second"] / row["real_tokens_per_second_and_core"]
        assert ratio == pytest.approx(row["cores_used"], rel=0.5)
        assert f"{row['real_tokens_per_second']:,.0f}" in printed
    assert result["cores"] == len(os.sched_getaffinity(0))
    assert f"{result['cores']} cores" in printed
    assert "target: not measured" in printed


def test_a_bad_request_is_told_before_the_work(capsys):
    assert main(["bench", "data", "--max-seq-lengths", "128", "--tokens-per-batch", "64"]) == 2
    assert "128 must be at most tokens_per_batch = 64" in capsys.readouterr().err


def test_the_corpus_is_like_text(shards):
    assert shards.num_tokens >= 60_000
    assert np.mean(shards.sentence_lengths) == pytest.approx(25, rel=0.05)
    assert np.mean(np.diff(shards.document_offsets)) == pytest.approx(30, rel=0.4)
    ids = shards.tokens(0, int(shards.sentence_offsets[shards.document_offsets[1]]))
    assert ids.min() >= 1000
    assert ids.max() < data.V


def test_only_real_tokens_count_and_the_workers_time_does(shards):
    packer = Packer(shards, data.token_ids(), tokens_per_batch=4096, max_seq_length=128)
    with BatchLoader(packer, 1) as loader:
        tokens, wall, cpu = data.one_round(loader, 2, 0.3)
        state = loader.state_dict()
        (pid,) = loader.pids
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        assert data.cpu_seconds(loader) - data.cpu_seconds(BatchLoader(packer)) == pytest.approx(
            spent, abs=0.1
        )
    assert 0.3 <= wall < 3
    assert 0 < cpu < 2.5 * wall
    assert 0 < tokens <= state["real_tokens"] <= 4096 * state["batches"]


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
