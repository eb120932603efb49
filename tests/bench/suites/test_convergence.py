"""`fastbert bench convergence`: real training at a small size, and runs that do not begin alike."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.cli import main
from fastbert.errors import RunError
from fastbert_bench.config import ConvergenceBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.suites import contenders, convergence

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convergence")
    rng = np.random.default_rng(0)
    words = [f"w{index:02d}" for index in range(60)]
    documents = [
        "\n".join(" ".join(rng.choice(words[:20], 9)) + "." for _ in range(8)) for _ in range(60)
    ]
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    sizes = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    (folder / "config.json").write_text(json.dumps(sizes))
    return ConvergenceBenchConfig(
        device="cpu",
        model=str(folder / "config.json"),
        data=str(folder / "corpus.txt"),
        vocab_size=200,
        max_seq_length=32,
        tokens_per_batch=256,
        max_steps=24,
        warmup_steps=2,
        learning_rate=1e-2,
        eval_steps=10,
        precision="fp32",
        against="hf-loop",
    )


def options(config):
    """The command line of a configuration."""
    asked = dataclasses.asdict(config)
    return [f"--{name.replace('_', '-')}={value}" for name, value in asked.items() if value]


def test_the_command_writes_curves_a_table_and_a_picture(small, tmp_path, capsys):
    out, picture = tmp_path / "convergence.json", tmp_path / "loss.png"
    config = dataclasses.replace(small, json=str(out), png=str(picture))
    assert main(["bench", "convergence", *options(config)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    results.check(result)
    ours, theirs = result["rows"]
    assert (ours["name"], theirs["name"]) == ("fastbert", "hf-loop")
    for row in (ours, theirs):
        assert row["eval_steps"] == [0, 10, 20, 24]
        assert row["steps"] == [*range(2, 24, 2), 24]
        assert row["eval_seconds"][0] == 0 and row["eval_seconds"] == sorted(row["eval_seconds"])
        assert row["eval_losses"][-1] < row["eval_losses"][0] - 0.5
        assert row["seconds"][-1] == row["eval_seconds"][-1] == row["train_seconds"]
        assert 0 < row["seconds_to_target"] <= row["train_seconds"]
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert len(row["rounds_ms"]) == len(row["steps"])
        assert 7 < row["real_tokens_per_second"] / row["sequences_per_second"] <= 32
        assert row["name"] in printed
    assert ours["eval_losses"][0] == pytest.approx(theirs["eval_losses"][0], abs=1e-5)
    # Dropout's bits differ, the recipe does not.
    assert ours["eval_losses"] == pytest.approx(theirs["eval_losses"], abs=0.1)
    assert result["target_loss"] == max(row["eval_losses"][-1] for row in (ours, theirs))
    assert theirs["ratio"] == pytest.approx(theirs["seconds_to_target"] / ours["seconds_to_target"])
    missing = {one["name"]: one["why"] for one in result["missing"]}
    assert missing.keys() == {"mfu", "peak_memory_bytes", "energy"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_dropout_both_learn_alike(small, tmp_path):
    """The recipe is the same to rounding: schedule, clipping, decay, batches."""
    sizes = json.loads(Path(small.model).read_text())
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    config = dataclasses.replace(small, model=str(tmp_path / "config.json"), max_steps=12)
    ours, theirs = convergence.run(config)["rows"]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-3)
    assert ours["eval_losses"] == pytest.approx(theirs["eval_losses"], abs=2e-3)


@needs_accelerate
def test_the_trainer_is_the_loop(small):
    rows = convergence.run(dataclasses.replace(small, against="hf-trainer,hf-loop"))["rows"]
    assert [row["name"] for row in rows] == ["fastbert", "hf-trainer", "hf-loop"]
    assert rows[1]["eval_losses"] == pytest.approx(rows[2]["eval_losses"], abs=0.1)


def test_a_warm_up_without_end_is_said(small, tmp_path, capsys):
    convergence.Task(dataclasses.replace(small, warmup_steps=24), tmp_path)
    assert (
        "warmup_steps = 24 is not less than max_steps = 24: the learning rate never reaches its "
        "peak\n"
    ) in capsys.readouterr().err
    convergence.Task(small, tmp_path)
    assert "warmup_steps" not in capsys.readouterr().err


def test_a_trainer_that_is_missing_and_a_loss_never_reached_are_told(small, monkeypatch):
    monkeypatch.setattr(convergence, "why_no_trainer", lambda device: "no accelerate here")
    config = dataclasses.replace(small, against="auto", max_steps=2, target_loss=0.01)
    result = convergence.run(config)
    assert [row["name"] for row in result["rows"]] == ["fastbert", "hf-loop"]
    assert result["rows"][0]["seconds_to_target"] is None and "ratio" not in result["rows"][0]
    missing = {one["name"]: one["why"] for one in result["missing"]}
    assert missing["hf-trainer"] == "no accelerate here"
    assert "0.010 was never reached" in missing["hf-loop, seconds_to_target"]
    assert "never" in convergence.table(result)


def test_a_rival_that_fails_costs_nothing_of_what_was_measured(small, monkeypatch):
    def fails(hf):
        raise ImportError("Trainer needs a newer accelerate\nthan this one")

    monkeypatch.setattr(convergence, "train_by_loop", fails)
    result = convergence.run(dataclasses.replace(small, max_steps=2))
    assert [row["name"] for row in result["rows"]] == ["fastbert"]
    missing = {one["name"]: one["why"] for one in result["missing"]}
    assert missing["hf-loop"] == "ImportError: Trainer needs a newer accelerate"


def test_full_sequences_are_not_cut_short(small, tmp_path, capsys):
    text = Path(small.data).read_text().replace("\n\n", "\n").splitlines()
    long = "\n\n".join("\n".join(text[start : start + 60]) for start in range(0, len(text), 60))
    (tmp_path / "long.txt").write_text(long)  # documents of 600 tokens

    def full(lengths):
        config = dataclasses.replace(small, lengths=lengths, data=str(tmp_path / "long.txt"))
        task = convergence.Task(config, tmp_path / lengths)
        batches = task.batches(convergence.Clock(torch.device("cpu")), lambda batch: batch)
        found = [batch.cu_seqlens[: batch.num_sequences + 1].diff() for batch in batches]
        return float((torch.cat(found) == 32).float().mean())

    # Short are then only the last sequence of a document, and what it leaves to others.
    assert full("natural") < 0.945 < 0.97 < full("full")
    assert main(["bench", "convergence", "--lengths", "lengths.txt"]) == 2
    assert "must be natural or full: the text decides the lengths" in capsys.readouterr().err


def test_other_initial_weights_are_refused(small, monkeypatch):
    make = contenders._hugging_face

    def other(name, sizes, weights, dtype):
        return make(name, sizes, {}, dtype)

    monkeypatch.setattr(contenders, "_hugging_face", other)
    with pytest.raises(RunError, match="before training, the held-out MLM losses of hf-loop"):
        convergence.run(dataclasses.replace(small, max_steps=1))


def test_padding_counted_as_work_is_refused(small, monkeypatch):
    batches = convergence.HuggingFace.batches

    def counting_pads(self):
        for batch in batches(self):
            self.curve.real_tokens += int((batch["attention_mask"] == 0).sum())
            yield batch

    monkeypatch.setattr(convergence.HuggingFace, "batches", counting_pads)
    with pytest.raises(RunError, match=r"trained on \d+ and \d+ tokens"):
        convergence.run(dataclasses.replace(small, max_steps=8))


def test_padded_batches_hold_what_packed_ones_do(small, tmp_path):
    task = convergence.Task(small, tmp_path)
    clock = convergence.Clock(torch.device("cpu"))
    for batch in task.batches(clock, lambda batch: batch):
        made = convergence.padded(batch, task.sizes.pad_token_id)
        real = made["attention_mask"].bool()
        T = batch.num_tokens
        assert int(real.sum()) == T and real.any(1).all() and real.any(0).all()
        assert torch.equal(made["input_ids"][real], batch.input_ids[:T])
        assert torch.equal(made["token_type_ids"][real], batch.token_type_ids[:T])
        labels = made["labels"][real]
        kept = batch.masked_labels != -100
        assert torch.equal(labels[batch.masked_positions[kept]], batch.masked_labels[kept])
        assert int((made["labels"] != -100).sum()) == int(kept.sum())
        assert (made["labels"][~real] == -100).all()
        assert len(made["next_sentence_label"]) == batch.num_sequences


def test_the_time_to_a_loss_lies_between_evaluations(small):
    curve = convergence.Curve("x", convergence.Clock(torch.device("cpu")), small, lambda: 0.0)
    curve.eval_seconds, curve.eval_losses = [0.0, 10.0, 20.0], [8.0, 6.0, 5.0]
    assert curve.seconds_to(7.0) == 5.0
    assert curve.seconds_to(5.0) == 20.0
    assert curve.seconds_to(4.9) is None
    # there before the first step, whatever training made of it
    assert curve.seconds_to(9.0) == curve.seconds_to(8.0) == 0.0
    curve.eval_losses = [5.0, 5.3, 5.1]
    assert curve.seconds_to(5.1) == 0.0
    curve.eval_seconds, curve.eval_losses = [0.0, 0.1 + 0.2], [0.7, 0.1]
    assert curve.seconds_to(0.1) == 0.1 + 0.2  # and not a rounding later
