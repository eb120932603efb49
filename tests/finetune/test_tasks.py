"""The five tasks: rows to sequences, outputs to losses, answers and evaluations."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbert.errors import UserError
from fastbert.finetune.columns import Columns
from fastbert.finetune.config import CONFIGS
from fastbert.finetune.inputs import Row
from fastbert.finetune.tasks import TASKS
from fastbert.finetune.tasks.base import Example, Feature, label_names
from fastbert.finetune.tasks.classify import ONE, SCORE, SEVERAL

from . import tiny


def made(task: str, family: str = "bert", max_length: int = 66, **description: Any) -> Any:
    return TASKS[task](tiny.tokenizer(family), max_length, description)


def asked(task: str, **changes: Any) -> Any:
    return CONFIGS[task](model="m", train="t", **changes)


def refused(act: Any, *given: Any) -> str:
    with pytest.raises(UserError) as caught:
        act(*given)
    return str(caught.value)


def pieces(task: Any, feature: Feature, which: int = 0) -> list[str]:
    found: list[str] = task.tokenizer.convert_ids_to_tokens(feature.inputs[which]["input_ids"])
    return found


# classify


def labelled(*labels: Any, text: str = "good film") -> list[Example]:
    return [Example(f"f:{n}", {"text": text, "label": one}) for n, one in enumerate(labels, 1)]


def learnt(*labels: Any, **changes: Any) -> Any:
    task = made("classify")
    task.learn(labelled(*labels), asked("classify", **changes))
    return task


def test_labels_of_any_spelling() -> None:
    columns = Columns("classify", {"text": "t", "label": "l"})

    def label(value: Any, separator: str = "") -> Any:
        task = made("classify")
        task.separator = separator
        return task.example(Row({"t": "x", "l": value}, "f:1"), columns, True).fields["label"]

    assert [label(v) for v in (True, 3, 3.0, 0.5, " a ")] == ["true", "3", "3", "0.5", "a"]
    assert label(["a", 1]) == ["a", "1"]
    assert label("a | b|", "|") == ["a", "b"] and label("", "|") == [] and label("a|b") == "a|b"


def test_label_separators_of_a_request_are_used(tmp_path: Path) -> None:
    from fastbert.finetune.data import read_data

    rows = [{"text": f"good film {n}", "label": ("a", "b", "a|b")[n % 3]} for n in range(9)]
    train = tiny.write_rows(tmp_path / "rows", rows)
    config = CONFIGS["classify"](model="m", train=str(train), eval=str(train), label_separator="|")
    task = made("classify")
    read_data(config, task, lambda line: None)
    assert (task.labels, task.problem) == (["a", "b"], SEVERAL)


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        (["b", "a", "b"], ONE, ["a", "b"]),
        (["10", "9", "-1"], ONE, ["-1", "9", "10"]),
        (["1", "0.5", "0"], SCORE, ["score"]),
        (["1.0", "2.0"], ONE, ["1.0", "2.0"]),
        ([["b"], ["a", "b"], []], SEVERAL, ["a", "b"]),
    ],
)
def test_what_kind_of_problem_labels_make(labels: Any, problem: str, names: list[str]) -> None:
    task = learnt(*labels)
    assert (task.problem, task.labels) == (problem, names)
    assert task.changes["id2label"] == dict(enumerate(names))


def test_names_of_labels_have_one_order() -> None:
    for names in (["1", "01", "001"], ["--5", "3"], ["-", "1"]):
        assert label_names(names) == label_names(reversed(names))
    assert label_names(["10", "9", "-3"]) == ["-3", "9", "10"]


def test_labels_from_which_nothing_is_learnt() -> None:
    one = "there is nothing to learn; name another column with --label-column"
    assert one in refused(learnt, "a", "a")
    assert one in refused(learnt, ["a", "b"], ["b", "a"])
    assert one in refused(learnt, [], [])
    assert "f:2: has a list of labels" in refused(
        lambda: learnt("a", ["b"], problem_type="single_label_classification")
    )
    assert "f:2: label 'x' must be a number" in refused(
        lambda: learnt("1", "x", problem_type="regression")
    )
    assert "all 2 examples have the score 0.5" in refused(learnt, "0.5", "0.50")
    assert "label 'nan' must be a number" in refused(
        lambda: learnt("1", "nan", problem_type="regression")
    )
    many = [f"label {n}" for n in range(150)]
    assert "150 different labels in 150 examples" in refused(learnt, *many)
    for name, value in (("rdrop_alpha", 1.0), ("label_smoothing_factor", 0.1)):
        assert f"{name}: a score" in refused(lambda n=name, v=value: learnt("0.5", "1", **{n: v}))
    assert "class_weight: a score" in refused(lambda: learnt("0.5", "1", class_weight="balanced"))


def test_an_unknown_label_at_evaluation() -> None:
    task = learnt("a", "b")
    assert refused(task.check, labelled("a", "c")) == "f:2: label 'c' is none of training's: a, b"
    several = learnt(["a"], ["b", "a"])
    assert "f:1: label 'd'" in refused(several.check, labelled(["a", "d"]))
    assert "f:1: label 'x' must be a number" in refused(learnt("0.5", "1").check, labelled("x"))


def test_labels_without_names_are_met_by_number() -> None:
    def met(*labels: str) -> list[str]:
        task = made("classify", labels=["LABEL_0", "LABEL_1", "LABEL_2"])
        task.meet(labelled(*labels))
        return list(task.labels)

    assert met("2", "0") == ["0", "1", "2"]
    assert met("3", "1", "2") == ["1", "2", "3"]
    assert met("c", "a", "b") == ["a", "b", "c"]
    assert met("LABEL_2") == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert "the model has 3 labels, none with a name" in refused(met, "3", "1")


def test_pairs_and_texts_that_are_cut() -> None:
    task = made("classify", max_length=8)
    long = "good film plot book very sad"
    rows = [Example("f:1", {"text": "good", "text_pair": "bad film"})]
    rows += [Example("f:2", {"text": long, "text_pair": long})]
    one, other = task.features(rows, False)
    assert " ".join(pieces(task, one)) == "[CLS] good [SEP] bad film [SEP]"
    assert one.inputs[0]["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert (one.label, len(other.inputs[0]["input_ids"]), task.cut) == (None, 8, 1)
    assert task.features([], True) == []


def test_marks_of_entities_become_tokens(tmp_path: Path) -> None:
    text = "<e1> ada </e1> met <e2> bob </e2>"
    task = made("classify")
    task.learn(labelled("a", "b", text=text), asked("classify"))
    assert task.markers == ["</e1>", "</e2>", "<e1>", "<e2>"]
    assert learnt("a", "b").markers == []
    rows = labelled("a", "b", "a", text=text) + labelled("a", "b")
    most = made("classify")
    most.learn(rows, asked("classify"))  # of five three have them
    assert most.markers == task.markers
    most.learn(rows[2:], asked("classify"))
    assert most.markers == []
    named = asked("classify", entity_markers="<e1>, </e1>, <e3>")
    assert refused(most.learn, rows, named) == "entity_markers: '<e3>' stands in no text"
    other = made("classify")
    other.learn(labelled("a", "b", text=text), asked("classify", entity_markers="none"))
    assert other.markers == []
    rows = [
        {"text": f"<e1> {one} </e1> saw <e2> {two} </e2>", "label": "ab"[place % 2]}
        for place, (one, two) in enumerate([("ada", "bob"), ("bob", "ada")] * 6)
    ]
    model, train = tiny.save(tmp_path / "model"), tiny.write_rows(tmp_path / "rows", rows)
    run = tiny.run("classify", model, train, tmp_path / "run", seeds=2, max_steps=2)
    from fastbert.hf.load import load_head, load_tokenizer

    tokenizer = load_tokenizer(run.hf)
    ids = tokenizer("<e1> ada </e1>")["input_ids"]
    size = len(tiny.wordpieces())
    assert ids[1] >= size and ids[3] >= size and len(ids) == 5
    assert load_head(run.hf, "SequenceClassification").config.vocab_size == size + 4


def test_losses_of_classes() -> None:
    logits = torch.randn(5, 3)
    task = learnt("a", "b", "c", "c", class_weight="balanced", label_smoothing_factor=0.1)
    batch = {"labels": torch.tensor([0, 1, 2, 2, 0])}
    weights = torch.tensor([4 / 3, 4 / 3, 2 / 3])
    wanted = F.cross_entropy(logits, batch["labels"], weights, label_smoothing=0.1)
    torch.testing.assert_close(task.loss(logits, batch) / task.items(batch), wanted)
    # In two unequal parts, whose sums are divided by what all of them count: the same.
    parts = [{"labels": batch["labels"][:2]}, {"labels": batch["labels"][2:]}]
    losses = task.loss(logits[:2], parts[0]) + task.loss(logits[2:], parts[1])
    torch.testing.assert_close(losses / sum(task.items(part) for part in parts), wanted)


def test_weights_go_by_names_where_a_head_has_an_order_of_its_own() -> None:
    """A head that goes on with its training may have its labels otherwise."""
    task = learnt("a", "b", "b", "b", class_weight="balanced")
    task.labels = ["b", "a"]
    heavy = task.items({"labels": torch.tensor([1])})
    assert (float(heavy), float(task.items({"labels": torch.tensor([0])}))) == (
        2.0,
        pytest.approx(2 / 3),
    )
    tagger = made("tag")
    tagger.labels, tagger.weight_of = ["I-x", "O", "B-x"], {"O": 0.5, "B-x": 2.0, "I-x": 1.0}
    assert float(tagger.items({"labels": torch.tensor([[2, -100, 1]])})) == 2.5
    with torch.inference_mode():
        seen = learnt("a", "b", "b", class_weight="balanced")
        kept = seen.weights(torch.device("cpu"))
    assert seen.weights(torch.device("cpu")) is kept  # made once, and fit for a backward
    logits = torch.zeros(1, 2, requires_grad=True)
    seen.loss(logits, {"labels": torch.tensor([1])}).backward()
    assert float(logits.grad[0, 1]) == pytest.approx(-0.5 * 3 / 4)
    one = Example("f:1", {"tokens": ["a", "b"], "text": "a b"})
    chances = tagger._of_words([one], [], [])[0]
    assert chances.argmax(1).tolist() == [1, 1]  # of words without a piece: "O"


def test_losses_of_several_labels_and_of_scores() -> None:
    logits = torch.randn(3, 2)
    task = learnt(["a"], ["a", "b"], ["a"], class_weight="balanced")
    targets = torch.tensor([task._target(one) for one in labelled(["a"], [], ["b", "a"])])
    assert targets.tolist() == [[1, 0], [0, 0], [1, 1]]
    batch = {"labels": targets}
    weights = torch.tensor([4 / (2 * 3), 4 / (2 * 1)])  # rarer labels count more where they are
    wanted = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    torch.testing.assert_close(task.loss(logits, batch) / task.items(batch), wanted)
    scores = learnt("0.5", "1")
    batch = {"labels": torch.tensor([0.5, 1.0, 2.0])}
    mean = scores.loss(logits[:, :1], batch) / scores.items(batch)
    torch.testing.assert_close(mean, F.mse_loss(logits[:, 0], batch["labels"]))


def test_predictions_of_classes_labels_and_scores() -> None:
    task = learnt("a", "b")
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    first, second = task.predictions([], [], task.raw(logits, {}))
    assert first["label"] == "a" and second["label"] == "b"
    assert first["score"] == first["probabilities"]["a"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert task.mistake(labelled("a")[0], first) is None
    wrong = task.mistake(labelled("b")[0], first)
    assert (wrong["expected"], wrong["badness"]) == ({"label": "b"}, first["score"])
    assert wrong["input"] == {"text": "good film"}
    several = learnt(["a"], ["b"], threshold=0.3)
    (found,) = several.predictions([], [], several.raw(torch.tensor([[-0.5, -1.0]]), {}))
    assert found["labels"] == ["a"]  # 0.38 and 0.27
    score = learnt("0.5", "1")
    assert score.predictions([], [], score.raw(torch.tensor([[3.25]]), {})) == [{"score": 3.25}]
    examples = labelled("0.5", "1")
    raws = [np.array([0.4]), np.array([1.2])]
    found = score.evaluate(examples, [], raws, score.predictions(examples, [], raws))
    assert found.metrics["pearson"] == pytest.approx(1)


# tag


def sentence(text: str, tags: str = "") -> Example:
    words, spans, begin = text.split(), [], 0
    for word in words:
        spans.append((begin, begin + len(word)))
        begin += len(word) + 1
    fields: dict[str, Any] = {"text": text, "tokens": words, "spans": spans}
    if tags:
        fields |= {"tags": tags.split(), "lines": ()}
    return Example("f:1", fields)


def test_a_word_has_the_tag_of_its_first_piece() -> None:
    task = made("tag")
    one = sentence("carlton met ada in bobville", "B-person O B-person O B-place")
    task.learn([one], asked("tag"))
    assert task.labels == ["O", "B-person", "I-person", "B-place", "I-place"]
    (found,) = task.features([one], True)
    assert " ".join(pieces(task, found)) == "[CLS] carl ##ton met ada in bob ##ville [SEP]"
    assert found.extra == [None, 0, None, 1, 2, 3, 4, None, None]
    assert found.label == [-100, 1, -100, 0, 1, 0, 3, -100, -100]


def test_windows_of_a_long_text_hold_each_word_where_most_is_around_it() -> None:
    task = made("tag", max_length=12)
    words = ["ada", "carlton", "met", "bobville", "in", "paris", "carlville", "saw", "a", "film"]
    draw = np.random.default_rng(0)
    for length in (3, 9, 10, 11, 25, 60):
        text = " ".join(draw.choice(words, length))
        one = sentence(text, " ".join(draw.choice(["O", "B-x"], length)))
        task.labels, task.stride, task.cut = ["O", "B-x", "I-x"], 4, 0
        found = task.features([one], True)
        assert task.cut == (len(found) > 1)
        seen = [word for part in found for word in part.extra if word is not None]
        assert sorted(set(seen)) == list(range(length))
        for part in found:
            assert len(part.inputs[0]["input_ids"]) <= 12
            for place, word in enumerate(part.extra):
                if word is None:  # of what is shared, words are read in both windows
                    assert part.label[place] == -100
                    assert pieces(task, part)[place].startswith(("##", "["))
                    continue
                piece = pieces(task, part)[place]
                assert one.fields["tokens"][word].startswith(piece)
                assert task.labels[part.label[place]] == one.fields["tags"][word]
        # Each window says of a word by how much stands around it there: the most is kept.
        raws, most = [], dict.fromkeys(range(length), 0)
        for part in found:
            raw = np.zeros((len(part.extra), 3), np.float32)
            for place, word in enumerate(part.extra):
                margin = min(place, len(part.extra) - place)
                raw[place, 1] = margin
                if word is not None:
                    most[word] = max(most[word], margin)
            raws.append(raw)
        assert task._of_words([one], found, raws)[0][:, 1].tolist() == list(most.values())


def test_windows_of_a_tokenizer_that_cuts_on_the_left() -> None:
    one = sentence(" ".join(["carlton", "ada", "bobville", "met"] * 6), "B-x O B-x O " * 6)
    found = []
    for side in ("right", "left"):
        tokenizer = tiny.tokenizer()
        tokenizer.truncation_side = side
        task = TASKS["tag"](tokenizer, 12, {})
        task.learn([one], asked("tag", doc_stride=4))
        found.append([(f.inputs, f.label, f.extra) for f in task.features([one], True)])
    assert found[0] == found[1] and len(found[0]) > 2


def test_words_of_byte_pairs_begin_with_their_space() -> None:
    """RoBERTa's pieces of "in Paris" are those of the text, not of "inParis"."""
    task = made("tag", "roberta")
    one = sentence("ada in paris", "B-x O B-y")
    task.learn([one], asked("tag"))
    (found,) = task.features([one], True)
    whole = task.tokenizer(" ada in paris")["input_ids"]
    assert found.inputs[0]["input_ids"] == whole
    firsts = [place for place, word in enumerate(found.extra) if word is not None]
    assert [pieces(task, found)[place] for place in firsts] == ["Ġ", "Ġ", "Ġ"]
    assert found.extra == [None, 0, *[None] * 3, 1, *[None] * 2, 2, *[None] * 5, None]
    close = sentence("ada in")
    close.fields.update(text="ada,in", tokens=["ada", ",", "in"], spans=[(0, 3), (3, 4), (4, 6)])
    (found,) = task.features([close], False)
    assert found.inputs[0]["input_ids"] == task.tokenizer(" ada,in")["input_ids"]
    plain = made("tag")
    assert plain._words([one]) == [["ada", "in", "paris"]]


def test_windows_of_byte_pairs() -> None:
    task = made("tag", "roberta", 16)
    one = sentence("ada saw paris by carlton near rome", "B-x O B-y O B-x O B-y")
    task.labels, task.stride = ["O", "B-x", "I-x", "B-y", "I-y"], 5
    found = task.features([one], True)
    for word in range(7):
        places = [(p, i) for p in found for i, w in enumerate(p.extra) if w == word]
        assert places
        for part, place in places:
            assert pieces(task, part)[place] == "Ġ"
            assert task.labels[part.label[place]] == one.fields["tags"][word]


def test_tags_of_other_schemes_are_read_as_iob2() -> None:
    task = made("tag")
    one = sentence("ada in paris rome", "S-x O B-y E-y")
    task.learn([one], asked("tag"))
    assert one.fields["tags"] == ["B-x", "O", "B-y", "I-y"]
    assert "label 'B-z' is none of training's" in refused(task.check, [sentence("a", "S-z")])
    whole = "all words have the tag 'B-x'"
    assert whole in refused(made("tag").learn, [sentence("ada", "B-x")], asked("tag"))
    unknown = sentence("a b", "O S-z")
    unknown.fields["lines"] = (7, 8)
    assert refused(task.check, [unknown]).startswith("f:8: ")


def test_tags_that_are_no_entities() -> None:
    task = made("tag")
    one = sentence("ada saw paris", "NOUN VERB NOUN")
    task.learn([one], asked("tag"))
    assert (task.labels, task.kind) == (["NOUN", "VERB"], "tag tokens")
    features = task.features([one], True)
    raws = [np.eye(2, dtype=np.float32)[[0, 0, 1, 1, 0]]]
    predictions = task.predictions([one], features, raws)
    assert [e["type"] for e in predictions[0]["entities"]] == ["NOUN", "VERB", "VERB"]
    assert task.evaluate([one], features, raws, predictions).metrics["accuracy"] == pytest.approx(
        2 / 3
    )


def test_entities_stand_at_their_characters() -> None:
    task = made("tag")
    one = sentence("ada carlton saw paris", "B-x I-x O B-y")
    task.learn([one], asked("tag"))
    features = task.features([one], True)
    raw = np.full((len(features[0].extra), 5), 0.1, np.float32)
    for place, tag in ((1, 1), (2, 2), (4, 0), (5, 3)):
        raw[place, tag] = 0.6
    predictions = task.predictions([one], features, [raw])
    first, second = predictions[0]["entities"]
    assert first == {
        "type": "x",
        "text": "ada carlton",
        "start": 0,
        "end": 11,
        "score": pytest.approx(0.6),
    }
    assert (second["text"], second["start"], second["end"]) == ("paris", 16, 21)
    assert task.evaluate([one], features, [raw], predictions).metrics["f1"] == 1.0
    assert task.mistake(one, predictions[0]) is None


# answer


def question(context: str, answer: str = "", begin: int = -1, ask: str = "who is it ?") -> Example:
    answers = [(answer, context.index(answer) if begin < 0 else begin)] if answer else []
    return Example("f#1", {"id": "1", "question": ask, "context": context, "answers": answers})


def answers(max_length: int = 66, family: str = "bert", **changes: Any) -> Any:
    return made("answer", family, max_length, **changes)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_answers_in_windows(family: str) -> None:
    """Wherever the answer lies: whole in a window it is that span, else the first token."""
    words = list(tiny.WORDS[8:33])
    context = " ".join(words)
    task = answers(22 if family == "bert" else 60, family, doc_stride=4)
    for first in range(len(words)):
        for length in (1, 2, 3):
            text = " ".join(words[first : first + length])
            begin = len(" ".join(words[:first])) + (first > 0)
            found = task.features([question(context, text, begin)], True)
            assert len(found) > 1
            whole = 0
            for one in found:
                spans = [span for span in one.extra if span]
                assert len(one.inputs[0]["input_ids"]) <= task.max_length
                inside = spans[0][0] <= begin and begin + len(text) <= spans[-1][1]
                if not inside:
                    assert one.label == [0, 0]
                    continue
                whole += 1
                start, end = (one.extra[place] for place in one.label)
                assert context[start[0] : end[1]] == text
            assert whole or length * 5 > 4  # four pieces are shared: some window has it whole
            if family == "bert":
                assert whole


def test_windows_share_what_was_asked_for() -> None:
    """A long question elsewhere in the batch does not change them."""
    context = " ".join(tiny.WORDS[8:] * 4)
    short, long = question(context), question(context, ask="who is it " * 10)
    task = answers(66, doc_stride=20)
    alone, both = task.features([short], False), task.features([long, short], False)
    assert [one.example for one in both] == sorted(one.example for one in both)
    again = [one.inputs for one in both if one.example == 1]
    assert again == [one.inputs for one in alone]
    for first, second in pairwise(alone):
        shared = {s for s in first.extra if s} & {s for s in second.extra if s}
        assert len(shared) == 20
    few = [one for one in both if one.example == 0]
    assert len({s for s in few[0].extra if s} & {s for s in few[1].extra if s}) == 16
    assert "the question has 60 pieces" in refused(
        answers(66).features, [question(context, ask="who " * 60)], False
    )


def test_the_default_windows_are_those_of_squads_scripts() -> None:
    task = answers(66 * 6)
    context = " ".join(tiny.WORDS * 20)
    first, second = task.features([question(context)], False)[:2]
    assert len({s for s in first.extra if s} & {s for s in second.extra if s}) == 128


def test_what_is_answered() -> None:
    context = "bob met ada in paris"
    task = answers(doc_stride=4)
    one = question(context, "ada")
    (feature,) = task.features([one], True)
    assert pieces(task, feature)[feature.label[0]] == "ada"
    size = len(feature.extra)
    logits = np.zeros((2, size), np.float32)
    place = feature.label[0]
    logits[0, place], logits[1, place] = 5, 5
    logits[1, 2] = 9  # in the question: never an answer
    logits[1, place - 1] = 8  # before its start
    (found,) = task.predictions([one], [feature], [logits])
    assert (found["answer"], found["start"], found["end"]) == ("ada", 8, 11)
    assert 0.7 < found["score"] < 1 and found["no_answer"] == 0.0
    task.unanswerable = True
    logits[:, 0] = 5.1
    (found,) = task.predictions([one], [feature], [logits])
    assert (found["answer"], found["start"], found["end"]) == ("", 0, 0)
    assert found["no_answer"] == found["score"] == pytest.approx(1 / (1 + np.exp(-0.2)), abs=1e-5)
    task.longest = 1
    logits[:] = 0
    logits[0, place], logits[1, place + 1] = 5, 5
    (found,) = task.predictions([one], [feature], [logits])
    assert found["answer"] in ("ada", "in")  # never both


def test_space_around_an_answer_is_none_of_it() -> None:
    context = "  ada met bob"
    task = answers()
    for answer, begin in (("  ada", 0), ("bob", 10), ("ada ", 2), ("met ", 6)):
        (found,) = task.features([question(context, answer, begin)], True)
        start, end = (found.extra[place] for place in found.label)
        assert context[start[0] : end[1]] == answer.strip()
    last = question("ada met bob  ", "bob  ")
    (found,) = task.features([last], True)
    assert found.label[0] == found.label[1] > 0
    raw = np.zeros((2, len(found.extra)), np.float32)
    raw[:, found.label[0]] = 5
    wide = dataclasses.replace(found, extra=[s and (s[0] - 1, s[1]) for s in found.extra])
    (answer,) = task.predictions([last], [wide], [raw])
    assert (answer["answer"], answer["start"], answer["end"]) == ("bob", 8, 11)


def test_the_best_of_several_windows() -> None:
    context = " ".join(tiny.WORDS[8:33])
    task = answers(22, doc_stride=4)
    one = question(context, "rome")
    features = task.features([one], True)
    raws = [np.zeros((2, len(part.extra)), np.float32) for part in features]
    holders = [place for place, part in enumerate(features) if part.label != [0, 0]]
    start, end = features[holders[0]].label
    raws[holders[0]][0, start] = raws[holders[0]][1, end] = 3
    (found,) = task.predictions([one], features, raws)
    assert found["answer"] == "rome"
    assert task.evaluate([one], features, raws, [found]).metrics["exact_match"] == 100.0
    assert task.mistake(one, found) is None


def test_questions_none_of_which_has_an_answer() -> None:
    task = answers()
    assert refused(task.learn, [question("ada")], asked("answer")).startswith("none of the 1")
    task.learn([question("ada"), question("ada", "ada")], asked("answer"))
    assert task.unanswerable


# choose


def test_choices_of_differing_number() -> None:
    task = made("choose")
    rows = [
        Example(
            "f:1",
            {"context": "ada saw", "question": "who", "choices": ["a", "b", "we"], "label": 2},
        ),
        Example("f:2", {"context": "", "question": "ada", "choices": ["bob", "carl"], "label": 0}),
    ]
    features = task.features(rows, True)
    assert [len(one.inputs) for one in features] == [3, 2]
    assert " ".join(pieces(task, features[0], 2)) == "[CLS] ada saw [SEP] who we [SEP]"
    assert " ".join(pieces(task, features[1], 1)) == "[CLS] ada [SEP] carl [SEP]"
    model = tiny.model("ForMultipleChoice").eval()
    batch = task.batch(features)
    logits = task.outputs(model, batch, True)
    losses = []
    for one in features:
        alone = task.batch([one])
        given = {n: v[None] for n, v in alone.items() if n not in ("labels", "sizes")}
        losses.append(model(**given, labels=torch.tensor([one.label])).loss)
    torch.testing.assert_close(task.loss(logits, batch), sum(losses))
    assert bool(task.distributions(logits, batch).isfinite().all())
    raws = task.raw(logits.detach(), batch)
    assert [len(raw) for raw in raws] == [3, 2]
    predictions = task.predictions(rows, features, raws)
    assert all(sum(one["probabilities"]) == pytest.approx(1, abs=1e-5) for one in predictions)
    found = task.evaluate(rows, features, raws, predictions).metrics["accuracy"]
    right = [
        one["choice"] == row.fields["label"] for one, row in zip(predictions, rows, strict=True)
    ]
    assert found == np.mean(right)


# embed


def test_in_batch_negatives_as_sentence_transformers() -> None:
    """MultipleNegativesRankingLoss: cosines times 20, all texts of the batch, then negatives."""
    losses = pytest.importorskip("sentence_transformers.losses")
    texts = [text for text, _ in tiny.sentences(12)]
    for roles in (("text", "text_pair"), ("text", "text_pair", "negative")):
        task = made("embed")
        rows = [Example(f"f:{n}", dict(zip(roles, texts[n::4], strict=False))) for n in range(4)]
        task.learn(rows, asked("embed"))
        batch = task.batch(task.features(rows, True))
        vectors = task.outputs(tiny.model("").eval(), batch, True)
        sides = vectors.view(4, len(roles), -1).unbind(1)
        theirs = losses.MultipleNegativesRankingLoss(nn.Identity())
        wanted = theirs.compute_loss_from_embeddings(list(sides), None)
        torch.testing.assert_close(task.loss(vectors, batch) / task.items(batch), wanted)


def pairs(*texts: tuple[str, ...]) -> list[Example]:
    return [
        Example(f"f:{n}", dict(zip(("text", "text_pair", "negative"), one, strict=False)))
        for n, one in enumerate(texts, 1)
    ]


def test_in_batch_negatives_by_hand() -> None:
    task = made("embed")
    task.scale = 7.0
    rows = pairs(("ada", "bob", "carl"), ("paris", "rome", "film"))
    batch = task.batch(task.features(rows, True))
    vectors = torch.randn(6, 5)  # 2 of 3 texts
    total = torch.zeros(())
    for own in range(2):
        others = [vectors[1], vectors[4], vectors[2], vectors[5]]
        cosines = torch.stack([F.cosine_similarity(vectors[3 * own], o, dim=0) for o in others])
        total = total - (7.0 * cosines).log_softmax(0)[own]
    torch.testing.assert_close(task.loss(vectors, batch), total)


def test_what_belongs_to_a_text_in_another_pair_is_no_negative_of_it() -> None:
    """Two questions on one paragraph, one question on two, and a pair that is another's negative"""
    task = made("embed")
    rows = pairs(
        ("ada", "rome", "sad"), ("bob", "rome", "a"), ("ada", "paris", "b"), ("c", "d", "rome")
    )
    features = task.features(rows, True)
    batch = task.batch(features)
    belongs = {"ada": {"rome", "paris"}, "bob": {"rome"}, "c": {"d"}}
    vectors = torch.randn(12, 5)
    sides = F.normalize(vectors, dim=1).view(4, 3, 5)
    texts = [[one.fields[role] for role in ("text", "text_pair", "negative")] for one in rows]
    total = torch.zeros(())
    for own, (text, pair, _) in enumerate(texts):
        wrong = [
            20 * sides[own, 0] @ sides[row, side]
            for row in range(4)
            for side in (1, 2)
            if texts[row][side] not in belongs[text]
        ]
        assert len(wrong) == (5 if text == "bob" else 4 if text == "ada" else 7), pair
        right = 20 * sides[own, 0] @ sides[own, 1]
        total = total + torch.stack([right, *wrong]).logsumexp(0) - right
    torch.testing.assert_close(task.loss(vectors, batch), total)
    same = task.batch(task.features(pairs(("ada", "rome"), ("bob", "rome")), True))
    assert float(task.loss(torch.randn(4, 5), same)) == 0.0


def test_vectors_are_means_or_first_states() -> None:
    rows = [
        Example(f"f:{n}", {"text": "good", "text_pair": "bad film was sad", "score": score})
        for n, score in enumerate((0.5, 0.25), 1)
    ]
    model = tiny.model("").eval()
    for pooling in ("mean", "cls"):
        task = made("embed")
        task.learn(rows, asked("embed", pooling=pooling))
        assert (task.scored, task.kind, task.description["pooling"]) == (
            True,
            "embed score",
            pooling,
        )
        features = task.features(rows, True)
        batch = task.batch(features)
        vectors = task.outputs(model, batch, True)
        assert len(vectors) == 4
        for side, one in enumerate(features[0].inputs):
            given = {name: torch.tensor([ids]) for name, ids in one.items()}
            states = model(**given).last_hidden_state[0]
            wanted = states[0] if pooling == "cls" else states.mean(0)
            torch.testing.assert_close(vectors[side], wanted, rtol=1e-4, atol=1e-5)
        cosine = F.cosine_similarity(vectors[0], vectors[1], dim=0)
        wanted = (cosine - 0.5) ** 2 + (cosine - 0.25) ** 2
        torch.testing.assert_close(task.loss(vectors, batch), wanted)
    plain, _ = task.predictions([], [], task.raw(vectors.detach(), batch))
    assert plain["embedding"] == pytest.approx(vectors[0].tolist())
    beyond = [Example("f:1", {"text": "a", "text_pair": "b", "score": 4.0})]
    assert "scores go from 4 to 4" in refused(made("embed").learn, beyond, asked("embed"))
    assert "rdrop_alpha" in refused(made("embed").learn, rows, asked("embed", rdrop_alpha=1.0))


def test_pairs_from_which_nothing_is_learnt() -> None:
    def said(rows: list[Example], **changes: Any) -> str:
        return refused(made("embed").learn, rows, asked("embed", **changes))

    two = pairs(("ada", "rome"), ("bob", "paris"))
    assert "at least 2" in said(two, per_device_train_batch_size=1)
    made("embed").learn(
        pairs(("ada", "rome", "b"), ("bob", "paris", "c")),
        asked("embed", per_device_train_batch_size=1),
    )
    assert "all 2 pairs have the same second text" in said(pairs(("ada", "rome"), ("bob", "rome")))
    for one in two:
        one.fields["score"] = 0.5
    assert "all 2 scores are 0.5" in said(two)
    for score, one in enumerate(two):
        one.fields.update(score=float(score), negative="film")
    assert "both a negative and a score" in said(two)
    columns = Columns("embed", {"text": "a", "text_pair": "b", "label": "s"})
    for score in ("nan", "inf", "x"):
        row = Row({"a": "ada", "b": "rome", "s": score}, "f:7")
        with pytest.raises(UserError, match=f"f:7: score '{score}' must be a number"):
            made("embed").example(row, columns, True)


def test_vectors_become_as_the_models_folder_says(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "")
    task = made("embed")
    two = pairs(("ada", "rome"), ("bob", "paris"))
    task.learn(two, CONFIGS["embed"](model=str(folder), train="t"))
    assert (task.pooling, task.normalize) == ("mean", False)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    task.learn(two, CONFIGS["embed"](model=str(folder), train="t"))
    assert (task.pooling, task.normalize) == ("cls", True)
    assert task.description["normalize"]
    task.learn(two, CONFIGS["embed"](model=str(folder), train="t", pooling="mean"))
    assert (task.pooling, task.normalize) == ("mean", False)


def test_a_retrieval_is_evaluated_over_all() -> None:
    task = made("embed")
    features = task.features(pairs(("ada", "rome"), ("bob", "paris")), True)
    raws = [np.array([[1.0, 0], [2, 0.1]]), np.array([[0, 1.0], [0.1, 3]])]
    found = task.evaluate([], features, raws, [])
    assert found.metrics["accuracy_at_1"] == 1.0
    cosines = (
        F.normalize(torch.tensor([[1, 0], [0, 1.0]]))
        @ F.normalize(torch.tensor([[2, 0.1], [0.1, 3]])).T
    )
    wanted = F.cross_entropy(20 * cosines, torch.arange(2))
    assert found.metrics["loss"] == pytest.approx(float(wanted), abs=1e-6)
    raws[1] = np.array([[0, 1.0], [1, 0]])
    assert task.evaluate([], features, raws, []).metrics["accuracy_at_1"] < 1.0


def test_texts_that_come_twice_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an index of distinct texts is searched: a question may have more than one answer in it."""
    monkeypatch.setattr("fastbert.finetune.tasks.embed._QUERIES", 2)
    task = made("embed")
    draw = np.random.default_rng(0)
    words = tiny.WORDS
    for roles in (2, 3):
        rows = pairs(
            *((draw.choice(words[:9]), *draw.choice(words[9:16], roles - 1)) for _ in range(20))
        )
        vector = {word: draw.normal(size=4) for word in words}
        texts = [list(one.fields.values()) for one in rows]
        raws = [np.array([vector[word] for word in one], np.float32) for one in texts]
        found = task.evaluate(rows, task.features(rows, True), raws, []).metrics

        def cosine(a: str, b: str, vector: Any = vector) -> float:
            x, y = vector[a], vector[b]
            return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

        belongs: dict[str, set[str]] = {}
        for text, pair, *_ in texts:
            belongs.setdefault(text, set()).add(pair)
        index = {one[1] for one in texts}
        ranks = []
        for text, right in belongs.items():
            order = sorted(index, key=lambda other, text=text: -cosine(text, other))
            ranks.append(1 + min(order.index(one) for one in right))
        wanted = {f"accuracy_at_{k}": float(np.mean([r <= k for r in ranks])) for k in (1, 3, 10)}
        wanted["mrr_at_10"] = float(np.mean([1 / r if r <= 10 else 0 for r in ranks]))
        everything = {word for one in texts for word in one[1:]}
        losses = []
        for text, pair, *_ in texts:
            wrong = [20 * cosine(text, one) for one in everything - belongs[text]]
            own = 20 * cosine(text, pair)
            losses.append(float(np.logaddexp.reduce([own, *wrong])) - own)
        assert found == pytest.approx(wanted | {"loss": float(np.mean(losses))}, abs=1e-5)


# all of them


def test_batches_are_padded_with_the_tokenizers_own() -> None:
    for family, pad in (("bert", 0), ("roberta", 1)):
        task = made("classify", family)
        batch = task.batch(
            task.features(labelled("a", text="ada") + labelled("b", text="ada saw"), False)
        )
        assert batch["input_ids"][0, -1] == pad
        assert "labels" not in batch
        assert batch["attention_mask"].sum(1).tolist()[0] < batch["input_ids"].shape[1]
