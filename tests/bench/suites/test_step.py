"""`fastbert bench step`: real runs at a small size, and contenders that must not be compared."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from fastbert.cli import main
from fastbert.errors import RunError
from fastbert.train.device import can_compile
from fastbert_bench.config import StepBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.measure.lengths import natural_lengths
from fastbert_bench.suites import contenders, step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch):
    monkeypatch.setattr(step, "SECONDS_PER_ROUND", 0.02)


@pytest.fixture
def ours_eager(monkeypatch):
    """Our own step is not compiled, which takes a minute from an empty cache."""
    monkeypatch.setattr(step, "can_compile", lambda device: False)


@pytest.fixture
def traced(ours_eager, monkeypatch):
    """Nor are the rivals in earnest: torch.compile has no code generator."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture
def small(tmp_path):
    sizes = {
        "model_type": "bert",
        "vocab_size": 1200,
        "hidden_size": 32,
        "num_hidden_layers": 1,  # what is compiled for a second takes 20 s
        "num_attention_heads": 1,
        "intermediate_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return StepBenchConfig(
        model=str(tmp_path / "config.json"),
        device="cpu",
        batch_size=4,
        max_seq_length=16,
        rounds=2,
        against="hf-eager,hf-sdpa,hf-sdpa+malloc",
    )


def test_the_command_prints_a_table_and_writes_json(small, tmp_path, capsys):
    """Our own step is compiled in earnest: tests/kernels/test_cpu.py does so with dropout."""
    path, out = tmp_path / "config.json", tmp_path / "step.json"
    none = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    path.write_text(json.dumps(json.loads(path.read_text()) | none))  # 6 pieces instead of 12
    arguments = ["--model", small.model, "--against", small.against, "--json", str(out)]
    options = ["--device", "cpu", "--batch-size", "4", "--max-seq-length", "16", "--rounds", "2"]
    assert main(["bench", "step", *arguments, *options]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    results.check(result)
    rows = {row["name"]: row for row in result["rows"]}
    assert {"fastbert-eager", "hf-eager", "hf-sdpa", "hf-sdpa+malloc"} <= rows.keys()
    assert ("fastbert" in rows) == can_compile(CPU)
    for name, row in rows.items():
        assert name in printed
        assert len(row["rounds_ms"]) == 2 and row["ms"] > 0
        assert row["real_tokens_per_second"] == pytest.approx(
            result["real_tokens"] / row["ms"] * 1e3
        )
    assert result["real_tokens"] < result["padded_tokens"] == 64
    # Logits of every padded position in fp32 alone outweigh all that we hold.
    assert rows["hf-sdpa"]["peak_memory_bytes"] > 64 * 1200 * 4


def test_both_sides_train_the_same_sequences(small):
    rng = np.random.default_rng(small.seed)
    lengths = natural_lengths(small.batch_size, small.max_seq_length, rng)
    padded, packed = contenders.make_batches(lengths, small.max_seq_length, 1200, rng)
    for theirs, ours in zip(padded, packed, strict=True):
        real = theirs["attention_mask"].bool()
        assert torch.equal(theirs["input_ids"][real], ours.input_ids)
        assert torch.equal(theirs["token_type_ids"][real], ours.token_type_ids)
        labels = theirs["labels"][real]
        assert torch.equal(labels[ours.masked_positions], ours.masked_labels)
        assert int((labels != -100).sum()) == ours.masked_labels.numel()
        assert int(real.sum()) == ours.num_tokens == packed[0].num_tokens


@pytest.mark.usefixtures("traced")
def test_every_rival_is_a_row_or_says_why_not(small):
    result = step.run(dataclasses.replace(small, against=",".join(contenders.RIVALS)))
    names = {row["name"] for row in result["rows"]}
    missing = {one["name"]: one["why"] for one in result["missing"]}
    assert names | missing.keys() >= contenders.RIVALS.keys()
    assert {"hf-eager", "hf-sdpa", "torch-encoder"} <= names
    compiled = {"hf-eager-compile", "hf-sdpa-compile", "hf-sdpa-compile-max"}
    assert compiled <= (names if can_compile(CPU) else missing.keys())
    assert "rotary positions" in missing["modernbert"] and "no BERT" in missing["liger"]
    assert "not installed" in missing["hf-flash"] and "energy" in missing
    losses = [row["first_loss"] for row in result["rows"]]
    assert max(losses) - min(losses) < 1e-4


class TestWrongContendersAreCaught:
    """Each deliberately does other work than we do."""

    @pytest.fixture
    def refused(self, small, ours_eager):
        def run() -> str:
            with pytest.raises(RunError) as raised:
                step.run(dataclasses.replace(small, precision="fp32", against="hf-sdpa"))
            return str(raised.value)

        return run

    def test_attention_that_leaks_into_padding(self, refused, monkeypatch):
        from transformers import BertForPreTraining

        forward = BertForPreTraining.forward

        def leaking(self, attention_mask=None, **inputs):
            return forward(self, attention_mask=torch.ones_like(attention_mask), **inputs)

        monkeypatch.setattr(BertForPreTraining, "forward", leaking)
        assert "nats in the loss of a token" in refused()

    def test_missing_dropout(self, refused, monkeypatch):
        hugging_face = contenders._hugging_face

        def without(name, sizes, weights, dtype):
            sizes = dataclasses.replace(
                sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
            return hugging_face(name, sizes, weights, dtype)

        monkeypatch.setattr(contenders, "_hugging_face", without)
        assert "hf-sdpa trains without dropout" in refused()

    def test_padding_counted_as_work(self, refused, monkeypatch):
        rival = step.rival

        def padded(*arguments):
            made = rival(*arguments)
            return dataclasses.replace(made, real_tokens=64)

        monkeypatch.setattr(step, "rival", padded)
        assert "count 64 and" in refused()

    def test_other_weights(self, refused, monkeypatch):
        hugging_face = contenders._hugging_face

        def other(name, sizes, weights, dtype):
            return hugging_face(name, sizes, {}, dtype)

        monkeypatch.setattr(contenders, "_hugging_face", other)
        assert "nats in the loss of a token" in refused()
