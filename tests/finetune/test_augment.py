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
    made = augmented(given, "text", 1.5, model, 7)
    assert len(made) == 60
    changed = 0
    for one in made:
        where, added = one.where.split(", ")
        old, new = before[where]["text"].split(), one.fields["text"].split()
        assert added == "augmented" and one.fields["label"] == before[where]["label"]
        assert "[MASK]" not in one.fields["text"] and len(new) == len(old)
        other = sum(a != b for a, b in zip(old, new, strict=True))
        assert other <= max(1, round(SHARE * len(old)))
        changed += other > 0
    assert changed > 50
    assert given == _examples(40)


def test_the_seed_decides(model: str) -> None:
    one, same, other = (augmented(_examples(20), "text", 0.5, model, seed) for seed in (1, 1, 2))
    assert one == same and one != other and len(one) == 10


def test_what_holds_no_word_or_a_mask_stays(model: str) -> None:
    given = [Example("f:1", {"text": "?!"}), Example("f:2", {"text": "the [MASK] sat"})]
    assert {one.fields["text"] for one in augmented(given, "text", 1.0, model, 1)} == {
        "?!", "the [MASK] sat",
    }  # fmt: skip


def test_marks_of_entities_stay(model: str) -> None:
    marks = ["<e1>", "</e1>"]
    given = [Example("f:1", {"text": "<e1> ada </e1> met bob"})]
    for one in augmented(given, "text", 30.0, model, 1, marks):
        first, _, last, *_ = one.fields["text"].split(" ")
        assert [first, last] == marks


def test_a_model_without_the_head_is_refused(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "ForSequenceClassification")
    with pytest.raises(UserError, match="augment needs the head for masked words"):
        augmented(_examples(4), "text", 1.0, str(folder), 1)


def test_a_run_trains_on_them_as_well(model: str, tmp_path: Path) -> None:
    train = tiny.labelled(tmp_path / "train.jsonl", 20)
    out = tmp_path / "run"
    tiny.run("classify", Path(model), train, out, augment=0.5, max_steps=2)
    notes = " ".join(json.loads((out / "eval.json").read_text("utf-8"))["notes"])
    assert "8 examples were made by replacing words" in notes
    assert re.search(r"24 examples for training, 4 for", notes)
