"""Augmentation: words replaced by the model itself, the rest kept; without its head it says so."""

import json
import re
from pathlib import Path

import pytest

from fastbert.errors import UserError
from fastbert.finetune.augment import SHARE, augmented
from fastbert.finetune.tasks.base import Example

from . import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


def _examples(count: int) -> list[Example]:
    return [
        Example(f"f:{place}", {"text": text, "label": label})
        for place, (text, label) in enumerate(tiny.sentences(count))
    ]


def test_some_words_are_others_and_all_else_is_kept(model: str) -> None:
    given = _examples(40)
    before = {one.where: one.fields for one in given}
    made = augmented(given, "text", 60, model, 7)
    assert 50 < len(made) <= 60
    for one in made:
        where, added = one.where.split(", ")
        old, new = before[where]["text"].split(), one.fields["text"].split()
        assert added == "augmented" and one.fields["label"] == before[where]["label"]
        assert "[MASK]" not in one.fields["text"] and len(new) == len(old)
        other = sum(a != b for a, b in zip(old, new, strict=True))
        assert 1 <= other <= max(1, round(SHARE * len(old)))
    assert given == _examples(40)


def test_the_seed_decides(model: str) -> None:
    one, same, other = (augmented(_examples(20), "text", 10, model, seed) for seed in (1, 1, 2))
    assert one == same and one != other and 5 < len(one) <= 10


def test_what_holds_no_word_or_a_mask_or_is_too_long_is_left_out(model: str) -> None:
    texts = ("?!", "the [MASK] sat", " ".join(["film"] * 80), "the film was good")
    given = [Example("f:1", {"text": text}) for text in texts]
    (made,) = augmented(given, "text", 4, model, 1)
    assert len(made.fields["text"].split()) == 4


def test_marks_stay_and_a_text_without_spaces_has_words(model: str, tmp_path: Path) -> None:
    text = "<e1>ada</e1> met <e2>bob</e2> in paris"
    for seed in range(8):
        for one in augmented(
            [Example("f:1", {"text": text})] * 8, "text", 8, model, seed,
            markers=["<e1>", "</e1>", "<e2>", "</e2>"],
        ):  # fmt: skip
            assert re.findall("</?e[12]>", one.fields["text"]) == ["<e1>", "</e1>", "<e2>", "</e2>"]
    signs = "好片子不坏"
    tokenizer = tiny.transformers.BertTokenizer(
        vocab={word: n for n, word in enumerate([*tiny.wordpieces(), *signs])}, model_max_length=66
    )
    folder = tmp_path / "signs"
    tiny.model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = augmented([Example("f:1", {"text": signs})] * 20, "text", 20, str(folder), 1)
    kept = [sum(sign in one.fields["text"] for sign in signs) for one in made]
    assert made and min(kept) >= 4


def test_a_model_without_the_head_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "ForSequenceClassification")
    with pytest.raises(UserError, match="augment needs the head for masked words"):
        augmented(_examples(4), "text", 4, str(folder), 1)


def test_a_run_trains_on_them_as_well(model: str, tmp_path: Path) -> None:
    train = tiny.labelled(tmp_path / "train.jsonl", 20)
    out = tmp_path / "run"
    tiny.run("classify", Path(model), train, out, augment=0.5, max_steps=2)
    notes = " ".join(json.loads((out / "eval.json").read_text("utf-8"))["notes"])
    assert "8 examples were made by replacing words" in notes
    assert re.search(r"24 examples for training, 4 for", notes)
