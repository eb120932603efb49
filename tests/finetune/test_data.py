"""From files to examples: what is said of them, what is refused, what a share holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastbert.errors import UserError
from fastbert.finetune.config import CONFIGS
from fastbert.finetune.data import Data, read_data
from fastbert.finetune.tasks import TASKS
from fastbert.finetune.tasks.base import Example, Task

from . import tiny


def read(task: str, train: Path, **more: Any) -> tuple[Data, Task]:
    settings = {n: v if isinstance(v, int) else str(v) for n, v in more.items()}
    made = TASKS[task](tiny.tokenizer(), 66, {})
    config = CONFIGS[task](model="m", train=str(train), **settings)
    return read_data(config, made, lambda line: None), made


def refusal(task: str, train: Path, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(task, train, **more)
    return str(caught.value)


def texts(folder: Path, *labels: Any, name: str = "x.jsonl", prefix: str = "text") -> Path:
    rows = [{"text": f"{prefix} {n}", "label": label} for n, label in enumerate(labels)]
    return tiny.write_rows(folder / name, rows)


def warned(data: Data) -> list[str]:
    return [one.removeprefix("warning: ") for one in data.notes if one.startswith("warning: ")]


def test_examples_of_each_class_are_told(tmp_path: Path) -> None:
    train = texts(tmp_path, *"aaab")
    data, _ = read("classify", train, eval=texts(tmp_path, *"aa", name="e.jsonl", prefix="other"))
    assert "examples for training + evaluation: a 3 + 2, b 1 + 0" in data.notes
    assert warned(data) == ["evaluation has no example of b"]
    data, _ = read("tag", tiny.tagged(tmp_path / "t", 20), eval=0.2)
    (told,) = [one for one in data.notes if one.startswith("examples for")]
    assert "person " in told and "place " in told


def test_labels_that_differ_in_case_alone_are_told(tmp_path: Path) -> None:
    data, task = read("classify", texts(tmp_path, *[" Yes", "yes ", "no", "Yes"] * 3), eval=0.3)
    assert task.labels == ["Yes", "no", "yes"]
    told = "labels 'Yes', 'yes' differ in case or spaces alone, and are learnt as different ones"
    assert told in warned(data)


@pytest.mark.parametrize("seed", range(6))
def test_a_share_never_holds_what_training_lacks(tmp_path: Path, seed: int) -> None:
    for labels in ([*"ab" * 8, "alone"], [["a"], ["b", "a"]] * 8 + [["alone"]]):
        data, task = read("classify", texts(tmp_path, *labels), eval=0.4, seed=seed)
        assert "alone" in task.labels and len(data.eval) in (6, 7)
    conll = tiny.tagged(tmp_path / "t.conll", 12)
    conll.write_text(conll.read_text() + "x\tB-alone\n\n")
    assert "B-alone" in read("tag", conll, eval=0.4, seed=seed)[1].labels


def test_scores_are_not_classes(tmp_path: Path) -> None:
    data, task = read("classify", texts(tmp_path, *(n / 8 for n in range(20))), eval=0.25)
    assert len(data.eval) == 5 and task.labels == ["score"]
    assert not any(one.startswith("examples for") for one in data.notes)
    alike = texts(tmp_path, *[1.5] * 9)
    assert "all 8 examples have the score 1.5: there is nothing to learn" in refusal(
        "classify", alike
    )


def test_equal_texts_stand_on_one_side_or_it_is_said(tmp_path: Path) -> None:
    rows = [{"text": f"text {n % 20}", "label": "ab"[n % 2]} for n in range(60)]
    data, _ = read("classify", tiny.write_rows(tmp_path / "x.jsonl", rows), eval=0.2)
    sides = [{one.fields["text"] for one in part} for part in (data.train, data.eval)]
    assert len(data.eval) == 12 and not sides[0] & sides[1] and not warned(data)
    for different in (2, 4):
        rows = [{"text": f"text {n % different}", "label": "ab"[n % 2]} for n in range(40)]
        data, _ = read("classify", tiny.write_rows(tmp_path / "x.jsonl", rows), eval=0.1)
        assert len(data.eval) == 4
        assert warned(data) == [
            "4 of the 4 have the text of one that stays, for there are few different ones: what is "
            "found on them says little"
        ]
    assert refusal("classify", texts(tmp_path, "a", "b"), eval=0.1) == (
        "eval = 0.1: of 2 examples none can be split off, for what stays must have each label: "
        "give --eval a file"
    )


def test_questions_of_a_paragraph_stay_together(tmp_path: Path) -> None:
    def asked(paragraphs: int) -> Path:
        answers = {"text": ["ada"], "answer_start": [0]}
        rows = [
            {"question": f"who {n}", "context": f"ada {n % paragraphs}", "answers": answers}
            for n in range(60)
        ]
        return tiny.write_rows(tmp_path / "x.jsonl", rows)

    data, _ = read("answer", asked(12), eval=0.2)
    sides = [{one.fields["context"] for one in part} for part in (data.train, data.eval)]
    assert len(data.eval) in (10, 15) and not sides[0] & sides[1] and not warned(data)
    data, _ = read("answer", asked(1), eval=0.2)
    assert len(data.eval) == 12
    assert warned(data)[0].startswith("12 of the 12 have the paragraph of one that stays")


def test_questions_without_an_answer_that_training_lacks(tmp_path: Path) -> None:
    train = tiny.asked(tmp_path / "x.jsonl", 9)
    held = tiny.asked(tmp_path / "e.jsonl", 9, seed=5, unanswerable=True)
    assert "training has no example of no answer" in warned(read("answer", train, eval=held)[0])


def test_a_training_file_that_is_the_evaluation(tmp_path: Path) -> None:
    train = texts(tmp_path, *"abab")
    link, table = tmp_path / "link.jsonl", tmp_path / "same.csv"
    link.symlink_to(train)
    table.write_text("label,text\n" + "".join(f"{'ab'[n % 2]}, text  {n} \n" for n in range(4)))
    for held in (train, link, table):
        assert warned(read("classify", train, eval=held)[0]) == [
            f"4 of the 4 examples of {held} stand in {train} as well: what is found on them says "
            "little"
        ]


def test_choices_are_part_of_what_is_asked(tmp_path: Path) -> None:
    ask = {"question": "which is right", "label": 0}
    train = tiny.write_rows(tmp_path / "x.jsonl", [ask | {"choices": ["a", "b"]}])
    held = tiny.write_rows(tmp_path / "e.jsonl", [ask | {"choices": ["c", "d"]}])
    assert not warned(read("choose", train, eval=held)[0])
    assert warned(read("choose", train, eval=train)[0])


def test_a_column_that_only_training_has(tmp_path: Path) -> None:
    train = texts(tmp_path, *"abab")
    held = tiny.write_rows(tmp_path / "e.jsonl", [{"sentence": "x", "label": "a"}])
    assert refusal("classify", train, eval=held) == (
        f"{held}: has no column 'text', which is the text of {train}: its columns are sentence, "
        "label"
    )


def test_a_first_line_may_be_no_header(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("".join(f"a cat {n}\ta dog {n}\n" for n in range(8)))
    named = {"text_column": "1", "text_pair_column": "2"}
    assert "has no column '1'" in refusal("embed", path, **named)
    data, _ = read("embed", path, header="no", eval=0.25, **named)
    assert len(data.train) + len(data.eval) == 8


def parquet(path: Path, features: dict[str, Any], **columns: list[Any]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        arrow.table(columns).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        ),
        path,
    )
    return path


NAMES: dict[str, Any] = {"names": ["World", "Sports", "Business"], "_type": "ClassLabel"}


def test_names_of_classes_come_from_parquet(tmp_path: Path) -> None:
    labels = [0, 1] * 6 + [-1]
    path = parquet(tmp_path / "x", {"label": NAMES, "text": {"dtype": "string"}},
                   text=[f"text {n}" for n in range(13)], label=labels)  # fmt: skip
    data, task = read("classify", path, eval=0.3)
    assert task.labels == ["World", "Sports"]  # in the order of their numbers
    assert any("1 without a label" in one for one in data.notes)
    assert warned(data) == ["of the file's classes there is no example of Business"]
    path = parquet(tmp_path / "y", {"label": NAMES}, text=["a"] * 4, label=[0, 1, 2, 3])
    told = f"{path} row 4: label = 3, but the file has 3 classes (World, Sports, Business)"
    assert refusal("classify", path) == told


def test_the_order_of_classes_names_the_rows_of_a_head_without_names() -> None:
    task = TASKS["classify"](tiny.tokenizer(), 66, {"labels": ["LABEL_0", "LABEL_1", "LABEL_2"]})
    task.order = NAMES["names"]
    task.meet([Example("x:1", {"label": "Business"}), Example("x:2", {"label": "World"})])
    assert task.labels == NAMES["names"]


@pytest.mark.parametrize("kind", ["Sequence", "List", "bare"])
def test_names_of_tags_come_from_parquet(tmp_path: Path, kind: str) -> None:
    names = {"names": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"], "_type": "ClassLabel"}
    feature: Any = [names] if kind == "bare" else {"feature": names, "_type": kind}
    tokens = [["ada", "met", f"bob{n}"] for n in range(8)]
    path = parquet(tmp_path / "x", {"ner_tags": feature}, tokens=tokens, ner_tags=[[1, 0, 1]] * 8)
    data, task = read("tag", path, eval=0.25)
    assert task.labels == names["names"]
    assert data.train[0].fields["tags"] == ["B-PER", "O", "B-PER"]
    assert warned(data) == ["of the file's classes there is no example of B-LOC, I-LOC"]


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ({"a": 1}, "label {'a': 1} must be text or a number"),
        ([None], "label None must be text or a number"),
        ([""], "label '' must be text or a number"),
        (float("inf"), "label inf must be a finite number"),
        ("['a', 'b']", "\"['a', 'b']\" is in Python's notation: write it as JSON, with json.dumps"),
    ],
)
def test_a_label_that_is_none(tmp_path: Path, label: Any, told: str) -> None:
    path = texts(tmp_path, *"abab", label)
    assert refusal("classify", path) == f"{path}:5: {told}"


def test_one_label_written_in_two_ways(tmp_path: Path) -> None:
    train = texts(tmp_path, "0", "1.0", 1, 0.0)
    held = texts(tmp_path, "1", "0.0", True, name="e.jsonl")
    assert read("classify", train, eval=train)[1].labels == ["0", "1"]
    assert "label 'true' is none of training's: 0, 1" in refusal("classify", train, eval=held)
    several = texts(tmp_path, '["a", "b"]', '["a"]', "[]")
    data, task = read("classify", several, eval=several)
    assert task.labels == ["a", "b"] and data.train[2].fields["label"] == []


def test_scores_of_embeddings_are_cosines(tmp_path: Path) -> None:
    def pairs(name: str, *scores: float) -> Path:
        rows = [{"anchor": f"a {n}", "positive": "b", "score": s} for n, s in enumerate(scores)]
        return tiny.write_rows(tmp_path / name, rows)

    train = pairs("x.jsonl", 0.1, 0.5, 1.0)
    held = pairs("e.jsonl", 0.1, 4.5)
    told = f"{held}:1: scores go from 0.1 to 4.5: a cosine lies between -1 and 1, divide them"
    assert refusal("embed", train, eval=held) == told
    endless = pairs("e.jsonl", 0.1, float("inf"))
    assert refusal("embed", train, eval=endless) == f"{endless}:2: score inf must be a number"
    same = pairs("x.jsonl", 1.0, 1.0)
    assert refusal("embed", same, eval=same).startswith("all 2 scores are 1: there is nothing")
