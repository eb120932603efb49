"""Fine-tuning of a speedrun's checkpoints: whole entities count, and both tasks end in a table."""

import importlib
import json

import pytest

import fastbert
from fastbert.config import model_config
from fastbert.data.tokenize import WordPiece
from fastbert.model.bert import Bert

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
downstream = importlib.import_module("fastbert_bench.speedrun.downstream")


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-a I-a O B-b", {(1, 3, "a"), (4, 5, "b")}),
        ("B-a B-a I-a", {(0, 1, "a"), (1, 3, "a")}),
        ("I-a I-b O", {(0, 1, "a"), (1, 2, "b")}),
        ("B-a I-b I-b", {(0, 1, "a"), (1, 3, "b")}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_are_whole(tags, found):
    assert downstream.spans(tags.split()) == found


def test_f1_counts_entities_that_are_right_as_a_whole():
    right = [["B-a", "I-a", "O"], ["B-b", "O", "B-a"]]
    assert downstream.f1(right, right) == 1
    half = [["B-a", "O", "O"], ["B-b", "O", "B-a"]]  # 2 of 3 found, 2 of 3 right
    assert downstream.f1(half, right) == pytest.approx(2 / 3)
    assert downstream.f1([["O"] * 3] * 2, right) == 0


def test_checkpoints_are_fine_tuned(tmp_path, capsys, monkeypatch):
    words = ["good", "bad", "dull", "fine", "london", "paris"]
    texts = [f"this is a {word} {place}" for word in words[:4] for place in words[4:6]] * 8
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "eval"):
        lines = [
            f'{text}\t{"positive" if "good" in text or "fine" in text else "negative"}\t"1'
            for text in texts
        ]
        (data / f"sentiment-{part}.tsv").write_text("text\tlabel\tscore\n" + "\n".join(lines))
        tagged = [
            "\n".join(
                f"{word}\t{'B-place' if word in words[4:6] else 'O'}" for word in text.split()
            )
            for text in texts
        ]
        (data / f"entities-{part}.conll").write_text("\n\n".join(tagged) + "\n\n")
    tokenizer = WordPiece.train(dict.fromkeys(texts, 1), 120, True, None, progress=False)
    hf = tmp_path / "fast-1" / "seed-1" / "hf"
    sizes = model_config("tiny", vocab_size=tokenizer.vocab_size, hidden_size=32,
                         num_attention_heads=2, intermediate_size=64)  # fmt: skip
    fastbert.save_pretrained(Bert(sizes), hf, tokenizer)
    monkeypatch.setattr(downstream, "LEARNING_RATE", 1e-2)
    monkeypatch.setitem(downstream.EPOCHS, "sentiment", 20)
    downstream.main([str(hf.parents[1]), "--data", str(data), "--json", str(tmp_path / "a.json")])
    figures = json.loads((tmp_path / "a.json").read_text())["fast-1"]
    assert figures["sentiment"][0] > 0.9 and figures["entities"][0] > 0.9
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| fast-1 | ") and row.count("|") == 4
    with pytest.raises(SystemExit):
        downstream.main([str(tmp_path), "--data", str(data)])
    assert "holds no seed-1/hf" in capsys.readouterr().err
