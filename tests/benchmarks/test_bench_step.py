"""`fastbert bench step`: real runs at a small size, and contenders that must not be compared."""

import dataclasses
import json

import pytest
import torch

from benchmarks import step
from fastbert.cli import main
from fastbert.config import StepBenchConfig
from fastbert.errors import RunError

CPU = torch.device("cpu")


@pytest.fixture
def small(tmp_path):
    sizes = {
        "model_type": "bert",
        "vocab_size": 1200,
        "hidden_size": 32,
        "num_hidden_layers": 2,
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
    out = tmp_path / "step.json"
    arguments = ["--model", small.model, "--against", small.against, "--json", str(out)]
    options = ["--device", "cpu", "--batch-size", "4", "--max-seq-length", "16", "--rounds", "2"]
    assert main(["bench", "step", *arguments, *options]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["contenders"]}
    assert {"fastbert-eager", "hf-eager", "hf-sdpa", "hf-sdpa+malloc"} <= rows.keys()
    for name, row in rows.items():
        assert name in printed
        assert len(row["rounds_ms"]) == 2 and row["ms_per_step"] > 0
        assert row["real_tokens_per_second"] == pytest.approx(
            result["real_tokens"] / row["ms_per_step"] * 1e3
        )
    assert result["real_tokens"] < result["padded_tokens"] == 64
    # Logits of every padded position in fp32 alone outweigh all that we hold.
    assert rows["hf-sdpa"]["peak_memory_bytes"] > 64 * 1200 * 4


def test_both_sides_train_the_same_sequences(small):
    padded, packed = step.make_batches(small, 1200)
    for theirs, ours in zip(padded, packed, strict=True):
        real = theirs["attention_mask"].bool()
        assert torch.equal(theirs["input_ids"][real], ours.input_ids)
        assert torch.equal(theirs["token_type_ids"][real], ours.token_type_ids)
        labels = theirs["labels"][real]
        assert torch.equal(labels[ours.masked_positions], ours.masked_labels)
        assert int((labels != -100).sum()) == ours.masked_labels.numel()
        assert int(real.sum()) == ours.num_tokens == packed[0].num_tokens


def test_a_contender_that_computes_something_else_is_refused(small):
    def contender(name, loss):
        return step.Contender(name, lambda index: 0.0, loss, 0, keeps_memory=True)

    same = [contender("a", 10.0), contender("b", 10.0 + 1e-4)]
    step.check_same_loss(same, torch.float32)
    for wrong in (10.01, float("nan")):
        with pytest.raises(RunError, match=r"first loss of b is .* of a"):
            step.check_same_loss([same[0], contender("b", wrong)], torch.float32)


def test_attention_over_padding_is_noticed(small, monkeypatch):
    def leaking(config, vocab_size):
        padded, packed = make_batches(config, vocab_size)
        for batch in padded:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        return padded, packed

    make_batches = step.make_batches
    monkeypatch.setattr(step, "make_batches", leaking)
    monkeypatch.setitem(step.LOSS_TOLERANCE, torch.float32, 1e-7)
    with pytest.raises(RunError, match="not comparable"):
        step.run(dataclasses.replace(small, precision="fp32", against="hf-sdpa"))


def test_peak_memory_counts_what_lives_at_once():
    def use():
        first = torch.empty(1000, 1000)
        del first
        second = torch.empty(500, 1000)
        return second.sum()

    assert 4_000_000 <= step.peak_of(use, CPU) < 4_100_000
