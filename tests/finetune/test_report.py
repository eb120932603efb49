"""The report of an evaluation: eval.json whole, a page that is safe and complete, pictures."""

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.errors import RunError
from fastbert.finetune import metrics, pictures
from fastbert.finetune.metrics import Evaluation
from fastbert.finetune.report import Report, write_report

EVIL = "<script>alert('x')</script>\" onload=\"y&"
PNG = b"\x89PNG\r\n\x1a\n"


class Tags(HTMLParser):
    """Follows what is open, and gathers elements and words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.cells: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "text"):
            self.cells.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def written(folder: Path, report: Report) -> Tags:
    """Writes the report and reads the page; nothing of it may run or lie elsewhere."""
    page = write_report(folder, report).read_text("utf-8")
    tags = Tags(page)
    kinds = {tag for tag, _ in tags.elements}
    assert kinds.isdisjoint({"script", "link", "img", "iframe", "object", "base", "form"})
    names = {name for _, attributes in tags.elements for name in attributes}
    assert not any(name.startswith("on") for name in names)
    assert names.isdisjoint({"src", "href", "srcset", "xlink:href"})
    assert re.search(r"url\(|@import|https?:", page) is None
    return tags


def classified(names: list[str], examples: int = 60) -> Evaluation:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, len(names), examples)
    logits = np.exp(generator.normal(size=(examples, len(names))) + 2 * np.eye(len(names))[labels])
    return metrics.classification(labels, logits / logits.sum(axis=1, keepdims=True), names)


HISTORY = [
    {"step": 1, "loss": 0.75, "learning_rate": 1e-5},
    {"step": 2, "loss": math.nan},
    {"step": 3, "loss": np.float64(0.5)},
    {"step": 3, "eval/loss": 0.625, "eval/accuracy": 0.8125, "eval/macro_f1": 0.7},
]


def test_everything_is_in_eval_json(tmp_path: Path) -> None:
    evaluation = classified(["no", "yes"])
    seeds = metrics.mean_and_deviation([evaluation, evaluation])
    mistake = {
        "where": "a.tsv:2", "input": {"text": "fine"}, "expected": {"label": "yes"},
        "predicted": {"label": "no", "score": np.float32(0.75)},
    }  # fmt: skip
    report = Report(
        "Reviews", "classify", {"model": tmp_path, "lr": 5e-5, "seeds": (1, 2)}, evaluation,
        [mistake] * 60, HISTORY, ["A note."], seeds, {"majority": {"accuracy": 0.5}},
    )  # fmt: skip
    written(tmp_path / "deep" / "out", report)
    found = json.loads((tmp_path / "deep" / "out" / "eval.json").read_text("utf-8"))
    assert found["metrics"] == evaluation.metrics
    assert found["details"] == evaluation.details
    assert found["seeds"]["accuracy"]["deviation"] == 0.0
    assert found["baselines"] == {"majority": {"accuracy": 0.5}}
    assert found["settings"] == {"model": str(tmp_path), "lr": 5e-5, "seeds": [1, 2]}
    assert len(found["mistakes"]) == 60
    assert found["mistakes"][0]["predicted"]["score"] == 0.75
    assert [row.get("loss", "none") for row in found["history"]] == [0.75, None, 0.5, "none"]
    assert (found["title"], found["task"], found["notes"]) == ("Reviews", "classify", ["A note."])
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == {
        "eval.json", "report.html", "confusion.png", "reliability.png"
    }  # fmt: skip
    for name in ("confusion.png", "reliability.png"):
        assert (tmp_path / "deep" / "out" / name).read_bytes().startswith(PNG)


def test_the_page_shows_metrics_seeds_and_baselines(tmp_path: Path) -> None:
    one, two = (Evaluation({"accuracy": value, "loss": 0.25}) for value in (0.75, 0.8125))
    report = Report(
        "Reviews", "classify", {"learning_rate": 5e-5}, one, history=HISTORY, notes=["2 cut."],
        seeds=metrics.mean_and_deviation([one, two]), baselines={"bag of words": {"accuracy": 0.7}},
    )  # fmt: skip
    text = written(tmp_path, report).text
    assert "accuracy 0.750 0.781 ± 0.044 over 2 seeds" in text
    assert re.search(r"bag of words accuracy 0\.750 0\.781 ± 0\.044 0\.700 loss 0\.250", text)
    assert "2 cut." in text
    assert "learning_rate 5e-05" in text
    assert "accuracy in evaluation" in text


def test_metrics_of_answers_are_percent(tmp_path: Path) -> None:
    evaluation = metrics.answers(
        {"1": ["a cat"], "2": [], "3": []}, {"1": "cat", "2": "x", "3": "y"},
        {"1": 0.25, "2": 0.5, "3": 0.75},
    )  # fmt: skip
    text = written(tmp_path, Report("Q", "answer", {}, evaluation)).text
    assert re.search(r"exact match 33\.33 has answer", text)
    assert re.search(r"best F1 100\.00 best", text)
    assert "best F1 at 0.25" in text
    assert "2 unanswerable" in text


def test_classes_and_their_confusion(tmp_path: Path) -> None:
    evaluation = metrics.classification(
        [0, 0, 0, 1], [[0.9, 0.1, 0], [0.9, 0.1, 0], [0.2, 0.8, 0], [0.1, 0.9, 0]], ["a", "b", "c"]
    )
    tags = written(tmp_path, Report("T", "classify", {}, evaluation))
    assert "a 1.000 0.667 0.800 3 b 0.500 1.000 0.667 1 c 0.000 0.000 0.000 0" in tags.text
    assert "true a, predicted b: 1 of 3" in tags.text
    assert any("3 of 4 are right" in str(one.get("aria-label")) for _, one in tags.elements)
    cells = [one for tag, one in tags.elements if tag == "rect" and "cell" in str(one["class"])]
    assert [(one["class"], one["style"]) for one in cells] == [
        ("cell right", "--share:0.667"), ("cell wrong", "--share:0.333"),
        ("cell right", "--share:1.000"),
    ]  # fmt: skip
    assert "Expected calibration error 0.275 over 15 bins, Brier score" in tags.text
    assert "the share of all examples of the true class" in tags.text
    assert "What is confused most" not in tags.text


def test_words_are_what_a_tagger_is_counted_by(tmp_path: Path) -> None:
    evaluation = metrics.entities(
        [["B-a", "O"]], [["B-a", "B-a"]], confidences=[np.array([0.9, 0.7], np.float32)]
    )
    tags = written(tmp_path, Report("T", "tag", {}, evaluation))
    assert "1 examples · 2 tokens" in tags.text
    assert "the share of all tokens of the true class" in tags.text
    assert "Expected calibration error 0.400 over 15 bins. On the dashed line" in tags.text
    assert "0.000 at 0.700, 1 tokens" in tags.text
    assert (tmp_path / "reliability.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("most", "ticks"), [(1, "0 1 2"), (436, "0 200 400"), (9, "0 5")])
def test_counts_of_a_reliability_diagram_have_whole_ticks(most: int, ticks: str) -> None:
    known = metrics.calibration(np.full(most, 0.95), np.ones(most, dtype=bool))
    words = Tags(pictures.reliability_svg(known, "confidence", "accuracy", "examples")).cells
    assert " ".join(words[-9 - len(ticks.split()) + 1 : -8]) == ticks


def test_of_many_classes_the_most_frequent_confusions_are_listed(tmp_path: Path) -> None:
    counts = [[10 * (row == column) for column in range(150)] for row in range(150)]
    counts[149][7], counts[3][4], counts[5][6] = 6, 2, 1
    names = [f"class {place}" for place in range(150)]
    evaluation = Evaluation({"accuracy": 0.9}, {"confusion": {"names": names, "counts": counts}})
    text = written(tmp_path, Report("T", "classify", {}, evaluation)).text
    assert "Shown are the 40 of 150 with the most mistakes." in text
    assert text.endswith("true predicted examples of class 149 class 7 6 16 class 3 class 4 2 12")


def test_of_many_classes_the_picture_has_those_with_the_most_mistakes() -> None:
    counts = [[10 * (row == column) for column in range(60)] for row in range(60)]
    counts[59][58] = 3
    counts[1][0] = 1
    shown = pictures.shown_classes(counts)
    assert len(shown) == pictures.MOST_CLASSES
    assert {0, 1, 58, 59} <= set(shown)
    assert shown == sorted(shown)
    names = [f"class {place}" for place in range(60)]
    drawing = Tags(pictures.confusion_svg(names, counts))
    assert "true class 59, predicted class 58: 3 of 13" in drawing.text
    assert any("600 of 604 are right" in str(one.get("aria-label")) for _, one in drawing.elements)


@pytest.mark.parametrize(
    "name", ["$x^{$", "日本語の長いトピックの名前です", "x" * 300, "\x00\n", "\ud800", 9 * EVIL, ""]
)
def test_any_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    evaluation = classified([name, "other"])
    tags = written(tmp_path, Report("T", "classify", {}, evaluation))
    assert json.loads((tmp_path / "eval.json").read_text("utf-8"))["details"]["positive"] == "other"
    assert len(tags.cells) > 30
    assert max(map(len, tags.cells)) <= 80


def test_names_are_clipped_by_their_width() -> None:
    assert pictures.clipped("x" * 22) == "x" * 22
    assert pictures.clipped("x" * 23) == "x" * 21 + "…"
    assert pictures.clipped("日" * 12) == "日" * 10 + "…"
    assert pictures.clipped("a\nb\u202e") == "a b "
    assert (
        pictures.clipped("\u0645\u06cc\u200c\u062e") == "\u0645\u06cc\u200c\u062e"
    )  # joins no letters
    assert pictures.clipped("\U0001f468\u200d\U0001f469") == "\U0001f468\u200d\U0001f469"


def evil_reports() -> Iterator[Report]:
    names = [EVIL, "ok"]
    settings = {EVIL: EVIL, "list": [EVIL], "metric_for_best_model": EVIL}
    probabilities = {EVIL: 0.25, "ok": 0.75}
    more: dict[str, Any] = {
        "notes": [EVIL],
        "baselines": {EVIL: {"accuracy": 0.5}},
        "history": [{"step": 1, f"eval/{EVIL}": 0.5}],
    }
    mistake = {
        "where": f"{EVIL}.tsv:2", "input": {EVIL: EVIL}, "expected": {"label": EVIL},
        "predicted": {"label": "ok", "score": 0.75, "probabilities": probabilities},
    }  # fmt: skip
    several = {
        "where": EVIL, "input": {"text": EVIL}, "expected": {"labels": [EVIL]},
        "predicted": {"labels": ["ok"], "probabilities": probabilities},
    }  # fmt: skip
    evaluation = classified(names)
    evaluation.metrics[EVIL] = 0.5
    yield Report(EVIL, "classify", settings, evaluation, [mistake, several], **more)
    span = {"type": EVIL, "text": EVIL, "start": 0, "end": len(EVIL), "score": 0.5}
    tagged = {
        "where": EVIL, "input": {"text": EVIL}, "expected": {"entities": [span]},
        "predicted": {"entities": []},
    }  # fmt: skip
    evaluation = metrics.entities([[f"B-{EVIL}"]], [["O"]])
    yield Report(EVIL, "tag", settings, evaluation, [tagged], **more)
    answered = {
        "where": EVIL, "input": {"question": EVIL, "context": EVIL},
        "expected": {"answer": EVIL[:8], "start": 0, "end": 8},
        "predicted": {"answer": EVIL[4:], "start": 4, "end": len(EVIL), "score": 0.5},
    }  # fmt: skip
    golds = {**answered, "expected": {"answers": [EVIL]}}
    evaluation = metrics.answers({"1": ["x"]}, {"1": "y"})
    yield Report(EVIL, "answer", settings, evaluation, [answered, golds], **more)
    chosen = {
        "where": EVIL, "input": {"text": EVIL, "choices": [EVIL, EVIL, EVIL]},
        "expected": {"choice": 1}, "predicted": {"choice": 0, "score": 0.5},
    }  # fmt: skip
    evaluation = metrics.choices([1], [[0.5, 0.25, 0.25]])
    yield Report(EVIL, "choose", settings, evaluation, [chosen], **more)
    near = {
        "where": EVIL, "input": {"anchor": EVIL}, "expected": {"rank": 1},
        "predicted": {"rank": 3, EVIL: EVIL},
    }  # fmt: skip
    evaluation = metrics.retrieval([0], [1])
    yield Report(EVIL, "embed", settings, evaluation, [near], **more)


@pytest.mark.parametrize("report", evil_reports(), ids=lambda report: report.task)
def test_all_that_comes_from_data_is_text(report: Report, tmp_path: Path) -> None:
    tags = written(tmp_path, report)
    assert tags.text.count(EVIL) >= 10
    assert f"{EVIL} in evaluation" in tags.text


def said(mistake: dict[str, Any], folder: Path, task: str = "classify") -> Tags:
    mistake = {"where": "a.tsv:2", **mistake}
    report = Report("T", task, {}, Evaluation({"accuracy": 0.5, "f1": 0.5}), [mistake])
    return written(folder, report)


def marked(tags: Tags) -> list[str | None]:
    return [attributes["class"] for tag, attributes in tags.elements if tag == "mark"]


def test_a_mistaken_label_stands_with_its_probabilities(tmp_path: Path) -> None:
    predicted = {"label": "no", "score": 0.75, "probabilities": {"no": 0.75, "yes": 0.25}}
    mistake = {"input": {"text": "fine"}, "expected": {"label": "yes"}, "predicted": predicted}
    text = said(mistake, tmp_path).text
    assert re.search(
        r"a\.tsv:2 text fine expected yes predicted no\s+score 0\.750,\s+yes\s+0\.250", text
    )


def test_mistaken_labels_stand_with_the_probabilities_of_both_sides(tmp_path: Path) -> None:
    mistake = {
        "input": {"text": "fine"}, "expected": {"labels": []},
        "predicted": {"labels": ["a"], "probabilities": {"a": 0.75, "b": 0.25}},
    }  # fmt: skip
    assert re.search(r"expected no label predicted a\s+a\s+0\.750", said(mistake, tmp_path).text)


def test_entities_are_marked_right_and_wrong(tmp_path: Path) -> None:
    ada = {"type": "person", "text": "Ada", "start": 0, "end": 3}
    mistake = {
        "input": {"text": "Ada saw Kew ."},
        "expected": {"entities": [ada, {"type": "place", "text": "Kew", "start": 8, "end": 11}]},
        "predicted": {"entities": [ada | {"score": 0.5}]},
    }  # fmt: skip
    tags = said(mistake, tmp_path, "tag")
    assert marked(tags) == ["right", "wrong", "right"]
    assert "expected Ada person  saw  Kew place  . predicted Ada person  saw Kew ." in tags.text


def test_answers_are_marked_in_their_context_which_may_be_long(tmp_path: Path) -> None:
    context = "before " * 500 + "Ada Lovelace" + " after" * 500
    start = context.index("Ada")
    mistake = {
        "input": {"question": "Who?", "context": context},
        "expected": {"answer": "Ada", "start": start, "end": start + 3},
        "predicted": {"answer": "Ada Lovelace", "start": start, "end": start + 12, "score": 0.5},
    }  # fmt: skip
    tags = said(mistake, tmp_path, "answer")
    assert marked(tags) == ["right wrong", "wrong"]
    assert f"({len(context):,} characters)" in tags.text
    assert tags.text.count("before") < 60
    assert tags.text.count("after") < 60


def test_spans_far_apart_are_both_shown(tmp_path: Path) -> None:
    context = "Ada" + " x" * 3000 + " Kew" + " y" * 3000
    start = context.index("Kew")
    mistake = {
        "input": {"question": "Who?", "context": context},
        "expected": {"answer": "Ada", "start": 0, "end": 3},
        "predicted": {"answer": "Kew", "start": start, "end": start + 3, "score": 0.5},
    }  # fmt: skip
    tags = said(mistake, tmp_path, "answer")
    assert marked(tags) == ["right", "wrong"]
    assert re.search(r"Ada [ x]+ … [ x]+ Kew [ y]+ … ", tags.text)
    assert 200 < tags.text.count("x") < 300


def test_both_sides_of_long_texts_show_the_same_part_around_what_is_wrong(tmp_path: Path) -> None:
    text = "Bob " + "x " * 3000 + "Ada" + " y" * 3000
    start = text.index("Ada")
    bob = {"type": "person", "text": "Bob", "start": 0, "end": 3}
    ada = {"type": "person", "text": "Ada", "start": start, "end": start + 3}
    mistake = {
        "input": {"text": text}, "expected": {"entities": [bob, ada]},
        "predicted": {"entities": [bob]},
    }  # fmt: skip
    tags = said(mistake, tmp_path, "tag")
    assert marked(tags) == ["wrong"]
    assert tags.text.count("Ada") == 2
    assert "Bob" not in tags.text


def test_a_long_text_without_spans_is_shown_as_far_as_there_is_room(tmp_path: Path) -> None:
    shown = []
    for length in (1200, 1201):
        mistake = {
            "input": {"text": "§" * length}, "expected": {"label": "a"}, "predicted": {"label": "b"}
        }  # fmt: skip
        tags = said(mistake, tmp_path)
        shown.append((tags.text.count("§"), f"({length:,} characters)" in tags.text))
    assert shown == [(1200, False), (1200, True)]


def test_names_in_any_script_leave_the_numbers_beside_them_in_order(tmp_path: Path) -> None:
    name = "\u05e9\u05dc\u05d5\u05dd"
    mistake = {
        "input": {"text": "x"}, "expected": {"label": name},
        "predicted": {"label": "b", "score": 0.5, "probabilities": {name: 0.25, "b": 0.5}},
    }  # fmt: skip
    tags = said(mistake, tmp_path)
    directions = [one["dir"] for _, one in tags.elements if "dir" in one]
    assert directions == ["auto", "ltr", "ltr"]
    assert f"<bdi>{name}</bdi> 0.250" in (tmp_path / "report.html").read_text("utf-8")


def test_small_numbers_are_not_0(tmp_path: Path) -> None:
    evaluation = Evaluation({"mse": 0.00004, "mae": 0.0, "pearson": -0.0001, "r2": 0.0005001})
    text = written(tmp_path, Report("T", "classify score", {}, evaluation)).text
    assert re.search(r"Pearson -0\.0001 MSE 4e-05 MAE 0\.000 R² 0\.001", text)


def test_counts_are_as_short_as_their_cells() -> None:
    counts = [[9_999, 10_000], [999_499, 12_345_678]]
    assert [
        word for word in Tags(pictures.confusion_svg(["a", "b"], counts)).cells if "%" not in word
    ][-4:] == ["9999", "10k", "999k", "12.3M"]


def test_an_answer_where_there_is_none(tmp_path: Path) -> None:
    predicted = {"answer": "Ada", "start": 0, "end": 3, "score": 0.5, "no_answer": 0.25}
    mistake = {
        "input": {"question": "Who?", "context": "Ada"},
        "expected": {"answers": []}, "predicted": predicted,
    }  # fmt: skip
    tags = said(mistake, tmp_path, "answer")
    assert marked(tags) == ["wrong"]
    assert re.search(
        r"expected no answer predicted Ada\s+score 0\.500, no answer 0\.250", tags.text
    )


def test_choices_are_listed(tmp_path: Path) -> None:
    mistake = {
        "input": {"text": "She", "choices": ["sat", "ran"]}, "expected": {"choice": 1},
        "predicted": {"choice": 0, "score": 0.75, "probabilities": [0.75, 0.25]},
    }  # fmt: skip
    assert re.search(
        r"sat ran expected 1 predicted 0\s+score 0\.750, 1 0\.250", said(mistake, tmp_path).text
    )


def test_only_the_worst_mistakes_are_shown(tmp_path: Path) -> None:
    mistakes = [
        {
            "where": f"a.tsv:{line}", "input": {"text": "x"}, "expected": {"score": 1.0},
            "predicted": {"score": 2.5},
        }
        for line in range(60)
    ]  # fmt: skip
    evaluation = metrics.scores([1.0, 2.0], [1.5, 3.0])
    tags = written(tmp_path, Report("T", "classify score", {}, evaluation, mistakes))
    assert "The worst 50 of the 60 in eval.json" in tags.text
    assert "a.tsv:49" in tags.text
    assert "a.tsv:50" not in tags.text
    assert "expected 1.000 predicted 2.500" in tags.text
    assert sum(one.get("class") == "dots" for _, one in tags.elements) == 2


@pytest.mark.parametrize(
    "values", [[0.5], [0.5, 0.5], [1e-9, 2e-9], [0.0, 1e6], [-3.0, 4.0], [1e8, 1e8 + 1e-3]]
)
def test_any_values_have_a_few_ticks(values: list[float]) -> None:
    line = pictures.Line("training", list(enumerate(values)), False)
    drawing = Tags(pictures.lines_svg([line], "loss"))
    ticks = [tag for tag, attributes in drawing.elements if attributes.get("class") == "grid"]
    assert 2 <= len(ticks) <= 10


@pytest.mark.parametrize(("step", "x"), [(5, "468.0"), (10_000, "456.0")])
def test_the_last_step_stands_within_the_picture(step: int, x: str) -> None:
    line = pictures.Line("training", [(1, 0.5), (step, 0.25)], False)
    drawing = Tags(pictures.lines_svg([line], "loss"))
    places = [one["x"] for _, one in drawing.elements if one.get("text-anchor") == "middle"]
    assert places[-2] == x  # the last is the axis's name


def test_long_lines_are_thinned_and_keep_their_end() -> None:
    line = pictures.Line("training", [(step, step % 2) for step in range(1, 10_001)], False)
    drawing = Tags(pictures.lines_svg([line], "loss"))
    (path,) = (one["d"] for tag, one in drawing.elements if one.get("class") == "line")
    assert path is not None
    assert path.count("L") < 301
    assert path.endswith("L468.0 123.0")  # the last step, and the mean of 0 and 1


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = Report("T", "classify", {}, Evaluation({"accuracy": 0.5}))
    with pytest.raises(RunError, match=r"file/eval\.json: cannot be written"):
        write_report(tmp_path / "file", report)
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    with pytest.raises(RunError, match=r"report\.html: cannot be written"):
        write_report(tmp_path / "out", report)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "eval.json", "report.html"
    ]  # fmt: skip
