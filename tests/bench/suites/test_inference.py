"""`fastbert bench inference`: real rounds at a small size, and rivals that answer otherwise."""

import json

import pytest
import torch

from fastbert.cli import main
from fastbert.errors import RunError
from fastbert_bench.config import InferenceBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.suites import contenders, inference


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Options of a small run, without a compiler."""
    monkeypatch.setattr(inference, "can_compile", lambda device: False)
    sizes = {
        "model_type": "bert",
        "vocab_size": 1200,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return {
        "model": str(tmp_path / "config.json"),
        "device": "cpu",
        "batch_size": 4,
        "max_seq_length": 16,
        "rounds": 2,
    }


def test_every_rival_is_a_row_of_each_task_or_says_why_not(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inference, "SECONDS_PER_ROUND", 0.02)
    out = tmp_path / "inference.json"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    assert main(["bench", "inference", *options, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    results.check(result)
    missing = {one["name"]: one["why"] for one in result["missing"]}
    assert missing.keys() == {"hf-flash", "hf-sdpa-compile", "energy", "mfu"}
    assert "not installed" in missing["hf-flash"] and "compiler" in missing["hf-sdpa-compile"]
    names = [
        *("fastbert", "fastbert.accelerate", "hf-eager", "hf-sdpa", "torch-encoder", "modernbert"),
    ]
    rows = {(row["task"], row["contender"]): row for row in result["rows"]}
    on_texts = [("texts", "fastbert.encode"), ("texts", "hf-sdpa-sorted")]
    assert list(rows) == [(task, name) for task in inference.TASKS for name in names] + on_texts
    for (_, name), row in rows.items():
        assert row["name"] in printed and len(row["rounds_ms"]) == 2
        assert 0 < row["latency_ms_p50"] <= row["latency_ms_p99"]
        tokens = result["real_tokens"] / row["ms"] * 1e3
        if (row["task"], name) not in on_texts:
            assert row["real_tokens_per_second"] == pytest.approx(tokens)
        assert row["same_work"] == (name != "modernbert")
    assert printed.count("another architecture") == 2
    ours, sdpa = (rows["encode", name] for name in ("fastbert", "hf-sdpa"))
    pairs = [theirs / mine for theirs, mine in zip(sdpa["rounds_ms"], ours["rounds_ms"])]  # noqa: B905
    assert ours["ratio"] == 1 and sdpa["ratio"] == pytest.approx(sum(pairs) / 2)
    assert result["real_tokens"] < result["padded_tokens"] <= 64


class TestWrongRivalsAreCaught:
    @pytest.fixture
    def refused(self, small):
        def run(rival: str) -> str:
            with pytest.raises(RunError) as raised:
                inference.run(InferenceBenchConfig(**small, against=rival))
            return str(raised.value)

        return run

    def test_attention_that_leaks_into_padding(self, refused, monkeypatch):
        from transformers import BertModel

        forward = BertModel.forward

        def leaking(self, ids, attention_mask=None, **inputs):
            return forward(self, ids, **inputs)

        monkeypatch.setattr(BertModel, "forward", leaking)
        assert "hf-sdpa and fastbert differ by" in refused("hf-sdpa")

    def test_other_weights(self, refused, monkeypatch):
        make = contenders._hugging_face
        monkeypatch.setattr(
            contenders,
            "_hugging_face",
            lambda name, sizes, weights, dtype: make(name, sizes, {}, dtype),
        )
        assert "in their hidden states" in refused("hf-eager")

    def test_means_that_count_padding(self, refused, monkeypatch):
        make = inference._torch_encoder

        def careless(sizes, weights):
            model, forward, score = make(sizes, weights)

            def padded(ids, mask, types):
                hidden = forward(ids, mask, types)
                if mask is not None:
                    mask.fill_(1)  # so that the mean is over all S positions
                return hidden

            return model, padded, score

        monkeypatch.setattr(inference, "_torch_encoder", careless)
        assert "torch-encoder and fastbert differ by" in refused("torch-encoder")


def test_a_rival_that_fails_is_a_gap_with_its_reason(small, monkeypatch):
    def broken(sizes, weights):
        raise torch.OutOfMemoryError("no memory\nleft")

    monkeypatch.setattr(inference, "_torch_encoder", broken)
    monkeypatch.setattr(inference, "SECONDS_PER_ROUND", 0.02)
    result = inference.run(InferenceBenchConfig(**small, against="torch-encoder"))
    assert {row["contender"] for row in result["rows"] if row["task"] != "texts"} == {
        *("fastbert", "fastbert.accelerate"),
    }
    missing = {one["name"]: one["why"] for one in result["missing"]}
    assert missing["torch-encoder"] == "OutOfMemoryError: no memory"


def test_tolerances_are_those_of_the_dtype():
    first = inference.Contender("ours", {}, [], [], {"means": torch.zeros(2, 3)})
    other = inference.Contender("theirs", {}, [], [], {"means": torch.full((2, 3), 2e-4)})
    with pytest.raises(RunError, match=r"differ by 0\.0002 in their means"):
        inference.check_same(first, other)
    other.checked_in = torch.bfloat16
    inference.check_same(first, other)
