"""`fastbert bench dropin`: real Trainers at a small size, and a line that changes the model."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from fastbert.cli import main
from fastbert.config import model_config
from fastbert.errors import RunError
from fastbert_bench.config import DropinBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.suites import dropin

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate"
)
OURS, THEIRS = "fastbert.accelerate", "hf-sdpa"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Options of a small run."""
    monkeypatch.setattr(dropin, "IN_TRAINER", (0.01, 3, 3))
    monkeypatch.setattr(dropin, "BARE", (0.01, 1, 3))
    sizes = {
        "model_type": "bert",
        "vocab_size": 1200,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return {
        "model": str(tmp_path / "config.json"),
        "device": "cpu",
        "batch_size": 4,
        "max_seq_length": 16,
        "rounds": 2,
    }


@needs_accelerate
def test_both_tasks_and_every_shape_are_rows(small, tmp_path, capsys):
    out = tmp_path / "dropin.json"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    assert main(["bench", "dropin", *options, "--shapes", "--json", str(out)]) == 0
    said = capsys.readouterr()
    assert "train_runtime" not in said.out
    result = json.loads(out.read_text())
    results.check(result)
    *rows, worst = result["rows"]
    whats = ["masked words", "classification"]
    shapes = [f"{B} x {S} full" for B, S in ((1, 8), (4, 16), (8, 64))]
    whats += [f"{shape}, {mode}" for shape in shapes for mode in ("evaluation", "training")]
    assert [row["name"] for row in rows] == [
        f"{w}, {name}" for w in whats for name in (OURS, THEIRS)
    ]
    for row, first in zip(rows, [one for one in rows[::2] for _ in range(2)], strict=True):
        assert row["name"] in said.out and len(row["rounds_ms"]) == 2
        pairs = [a / b for a, b in zip(row["rounds_ms"], first["rounds_ms"], strict=True)]
        assert row["ratio"] == pytest.approx(sum(pairs) / 2)
    for row in rows[:4]:
        assert row["real_tokens_per_second"] * row["ms"] == pytest.approx(
            result["real_tokens"] * 1e3
        )
        assert row["sequences_per_second"] * row["ms"] == pytest.approx(4e3)
    assert result["real_tokens"] < result["padded_tokens"] == 4 * max(result["lengths"])
    least = min(rows[5::2], key=lambda row: row["ratio"])
    assert worst == {**least, "name": f"worst shape: {least['name']}"}
    missing = {one["name"]: one["why"] for one in result["missing"]}
    assert missing.keys() == {"MFU, memory, energy", "16 x 128 full", "16 x 128 natural"}
    assert missing["16 x 128 full"] == "the model has 64 positions"


@needs_accelerate
def test_every_round_trains_in_the_precision_asked(small):
    """Trainer wraps a model for bf16 and marks it; neither may last beyond the round."""
    config, cpu = DropinBenchConfig(**small), torch.device("cpu")
    sizes = model_config(config.model)
    batches = dropin.batches_of("mlm", np.array([9, 5]), 1200, np.random.default_rng(0))
    for model in dropin.pair("mlm", sizes, 0, cpu).values():
        seen, before = [], model.cls.predictions.bias.detach().clone()
        model.bert.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(torch.is_autocast_enabled("cpu"))
        )
        for bf16 in (True, True, False, True):
            assert dropin.train(model, batches, cpu, bf16, 1) > 0
        assert seen == [True] * 4 + [False] * 2 + [True] * 2
        assert not {"forward", "_original_forward"} & vars(model).keys()
        assert not torch.equal(before, model.cls.predictions.bias)


def other_words(model):
    model.bert.embeddings.word_embeddings.weight.data[1000:] *= 2


def padding_that_is_read(model):
    drop = lambda module, args, inputs: (args, inputs | {"attention_mask": None})  # noqa: E731
    model.bert.register_forward_pre_hook(drop, with_kwargs=True)


@needs_accelerate
@pytest.mark.parametrize(
    ("task", "what", "spoil"),
    [
        ("mlm", "losses", other_words),
        ("mlm", "hidden states", padding_that_is_read),
        ("classification", "hidden states", padding_that_is_read),
    ],
)
def test_a_line_that_changes_the_model_is_refused(small, monkeypatch, task, what, spoil):
    def wrong(model):
        spoil(model)
        return model

    monkeypatch.setattr(dropin, "accelerate", wrong)
    said = f"not comparable: in .*, the {what} of {OURS} and {THEIRS} differ by"
    with pytest.raises(RunError, match=said):
        dropin.run(DropinBenchConfig(**small, task=task))


def test_without_the_package_it_says_so_in_one_line(small, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name)
    )
    options = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    assert main(["bench", "dropin", *options]) == 2
    assert capsys.readouterr().err == (
        "fastbert: error: transformers' Trainer needs the package accelerate, which is not "
        "installed\n"
    )
