"""Each task beside transformers' own heads and scripts' definitions, over families and tokenizers.

What is compared with is written here from their definitions: the losses are those of transformers'
models that are not accelerated; spans are searched by going through all of them.
"""

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fastbert.finetune.config import CONFIGS
from fastbert.finetune.tasks import TASKS
from fastbert.finetune.tasks.base import Example
from fastbert.hf.accelerate import accelerate

from . import tiny

FAMILIES = ("bert", "roberta", "distilbert", "electra")
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def xlm_roberta() -> Any:
    """A unigram model of a few words, whose pieces hold the space before them."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    texts = [" ".join(tiny.WORDS), "in Paris and Rome 東京 は", "Ada, Bob; naïve café (1789)"]
    made.train_from_iterator(texts * 20, trainer)
    vocabulary = json.loads(made.to_str())["model"]["vocab"]
    return transformers.XLMRobertaTokenizer(vocab=[tuple(one) for one in vocabulary])


def cased() -> Any:
    vocabulary = dict(tiny.wordpieces())
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        vocabulary.setdefault(letter, len(vocabulary))
        vocabulary.setdefault(f"##{letter}", len(vocabulary))
    return transformers.BertTokenizer(vocab=vocabulary, do_lower_case=False)


TOKENIZERS = {
    "uncased": tiny.tokenizer,
    "cased": cased,
    "byte pairs": lambda: tiny.tokenizer("roberta"),
    "unigram": xlm_roberta,
}


def begun(task: str, family: str, examples: list[Example], **asked: Any) -> Any:
    """A task that has learnt, and its features, as of a folder of that family."""
    tokenizer = tiny.tokenizer(family)
    if family == "distilbert":  # as load_tokenizer makes it
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    made = TASKS[task](tokenizer, 60, {})
    made.learn(examples, CONFIGS[task](model="m", train="t", **asked))
    return made


def both(task: Any, family: str, examples: list[Example], labels: Any) -> None:
    """The loss of a padded batch is that of transformers' head, and so are its gradients."""
    changes = dict(task.changes)
    theirs = tiny.model(f"For{task.head}", family, **changes).eval()
    ours = accelerate(tiny.model(f"For{task.head}", family, **changes)).eval()
    features = task.features(examples, True)
    batch = task.batch(features)
    found = task.loss(task.outputs(ours, batch, False), batch) / task.items(batch)
    wanted = labels(theirs, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found.backward()
    wanted.backward()
    gradients = dict(theirs.named_parameters())
    for name, one in ours.named_parameters():
        other = gradients[name].grad
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other, rtol=1e-3, atol=1e-4, msg=name)


def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in batch.items() if name not in ("labels", "sizes", "texts")}


def texts_of(labels: list[Any], pairs: bool) -> list[Example]:
    drawn = random.Random(0)
    rows = []
    for number, label in enumerate(labels):
        words = [" ".join(drawn.choices(tiny.WORDS, k=drawn.randint(1, 9))) for _ in range(2)]
        fields = {"text": words[0], "label": label} | ({"text_pair": words[1]} if pairs else {})
        rows.append(Example(f"f:{number}", fields))
    return rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("labels", "targets"),
    [
        (["b", "a", "c", "a"], [1, 0, 2, 0]),
        ([["b"], [], ["a", "b"], ["c"]], [[0.0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]]),
        (["0.5", "-3", "2.25", "0"], [0.5, -3.0, 2.25, 0.0]),
    ],
)
def test_classify(family: str, labels: Any, targets: Any) -> None:
    rows = texts_of(labels, pairs=family != "electra")
    task = begun("classify", family, rows)
    wanted = torch.tensor(targets)
    both(task, family, rows, lambda model, batch: model(**inputs(batch), labels=wanted).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_tag(family: str) -> None:
    words = [["carlton", "met", "ada"], ["in"], ["ada", "bobville", "saw", "paris", "rome"]]
    tags = [["B-x", "O", "B-x"], ["O"], ["B-x", "I-x", "O", "B-y", "B-y"]]
    rows = []
    for number, (tokens, given) in enumerate(zip(words, tags, strict=True)):
        ends = np.cumsum([len(one) + 1 for one in tokens]) - 1
        spans = [(int(end) - len(one), int(end)) for one, end in zip(tokens, ends, strict=True)]
        fields = {"text": " ".join(tokens), "tokens": tokens, "spans": spans}
        rows.append(Example(f"f:{number}", fields | {"tags": given, "lines": ()}))
    task = begun("tag", family, rows)
    tokenizer = task.tokenizer

    def loss(model: Any, batch: Any) -> Any:
        """Labels as the scripts of transformers align them: a word's first piece has its tag."""
        labels = torch.full(batch["input_ids"].shape, -100)
        for row, (tokens, given) in enumerate(zip(words, tags, strict=True)):
            if family == "roberta":
                tokens = [f" {one}" for one in tokens]
            found = tokenizer(tokens, is_split_into_words=True)
            assert found["input_ids"] == batch["input_ids"][row, : len(found["input_ids"])].tolist()
            before = None
            for place, word in enumerate(found.word_ids()):
                if word is not None and word != before:
                    labels[row, place] = task.labels.index(given[word])
                before = word
        return model(**inputs(batch), labels=labels).loss

    both(task, family, rows, loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_answer(family: str) -> None:
    rows = []
    for number, answer in enumerate(("paris", "ada", "")):
        context = "ada met bob in paris" + " near rome" * number
        answers = [(answer, context.index(answer))] if answer else []
        fields = {"id": None, "question": "who is it ?", "context": context, "answers": answers}
        rows.append(Example(f"f:{number}", fields))
    task = begun("answer", family, rows)
    assert task.unanswerable

    def loss(model: Any, batch: Any) -> Any:
        starts, ends = batch["labels"].unbind(1)
        return model(**inputs(batch), start_positions=starts, end_positions=ends).loss

    both(task, family, rows, loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_choose(family: str) -> None:
    rows = [
        Example(
            "f:1", {"context": "ada met", "question": "who", "choices": list("abc"), "label": 2}
        ),
        Example("f:2", {"context": "", "question": "is it", "choices": ["bob", "we"], "label": 0}),
        Example("f:3", {"context": "rome", "question": "", "choices": ["a film", "a"], "label": 1}),
    ]
    task = begun("choose", family, rows)

    def loss(model: Any, batch: Any) -> Any:
        """A question at a time, for transformers has as many choices for all."""
        losses, begin = [], 0
        for row, label in zip(rows, (2, 0, 1), strict=True):
            end = begin + len(row.fields["choices"])
            given = {name: x[None, begin:end] for name, x in inputs(batch).items()}
            losses.append(model(**given, labels=torch.tensor([label])).loss)
            begin = end
        return torch.stack(losses).mean()

    both(task, family, rows, loss)


# Windows and spans of `answer`


def paragraph(draw: random.Random, length: int) -> str:
    """Words, marks and other scripts, with spaces of several kinds between."""
    odd = ("Paris", "naïve", "café", "東京", "(1789)", "e\u0301te\u0301", "don't", "🙂", "3,5", "-")
    words = [draw.choice(odd if draw.random() < 0.3 else tiny.WORDS) for _ in range(length)]
    return "".join(word + draw.choice((" ", " ", "  ", "\n", "\u00a0")) for word in words).strip()


def answered(draw: random.Random, length: int) -> Example:
    """The answer may be the last word, be none, or be given several times."""
    context = paragraph(draw, length)
    words = context.split()
    answers = []
    for _ in range(draw.randint(0, 2)):
        text = draw.choice([*words, words[-1], words[-1]])
        at = context.rindex(text) if draw.random() < 0.5 else context.index(text)
        answers.append((text, at))
    fields = {"id": None, "question": " who is it ?", "context": context, "answers": answers}
    return Example("f:1", fields)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_windows_are_those_of_transformers_script(name: str) -> None:
    """Sequences, and first and last token of the first answer, or the first of all."""
    draw = random.Random(len(name))
    tokenizer = TOKENIZERS[name]()
    most = 80 if name == "byte pairs" else 40
    task = TASKS["answer"](tokenizer, most, {"doc_stride": 9})
    windows = 0
    for length in (1, 7, 30, 45):
        one = answered(draw, length)
        context, answers = one.fields["context"], one.fields["answers"]
        found = tokenizer(
            one.fields["question"].lstrip(), context, truncation="only_second", max_length=most,
            stride=9, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        features = task.features([one], True)
        assert [f.inputs[0]["input_ids"] for f in features] == found["input_ids"]
        windows += len(features) > 1
        for row, feature in enumerate(features):
            parts, offsets = found.sequence_ids(row), found["offset_mapping"][row]
            inside = [place for place, part in enumerate(parts) if part == 1]
            start, end = feature.label
            if not answers:
                assert (start, end) == (0, 0)
                continue
            text, begin = answers[0]
            behind = begin + len(text)
            if offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < behind:
                assert (start, end) == (0, 0)
                continue
            last = max(place for place in inside if offsets[place][0] <= begin)
            first = min(place for place in inside if offsets[place][1] >= behind)
            assert offsets[start][0] == offsets[last][0] and offsets[end][1] == offsets[first][1]
            assert context[offsets[start][0] : offsets[end][1]].count(text) == 1
    assert windows


def best_of_all(one: Example, features: Any, raws: Any, longest: int) -> tuple[float, int, int]:
    """Going through every pair of tokens of a paragraph in every window."""
    found = []
    for feature, (starts, ends) in zip(features, raws, strict=True):
        places = [place for place, span in enumerate(feature.extra) if span]
        for first, last in product(places, places):
            if first <= last < first + longest:
                begin, end = feature.extra[first][0], feature.extra[last][1]
                found.append((float(starts[first] + ends[last]), begin, end))
    score, begin, end = max(found)
    while one.fields["context"][begin].isspace():
        begin += 1
    while one.fields["context"][end - 1].isspace():
        end -= 1
    return score, begin, end


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_the_best_span_of_all(name: str) -> None:
    draw, noise = random.Random(1), np.random.default_rng(2)
    most = 80 if name == "byte pairs" else 40
    options = {"doc_stride": 9, "max_answer_length": 5, "n_best": 1000, "unanswerable": True}
    task = TASKS["answer"](TOKENIZERS[name](), most, options)
    rows = [answered(draw, length) for length in (1, 3, 12, 30, 45)]
    features = task.features(rows, False)
    raws = [noise.normal(size=(2, len(f.extra))).astype(np.float32) for f in features]
    without = 0
    for number, (one, found) in enumerate(
        zip(rows, task.predictions(rows, features, raws), strict=True)
    ):
        own = [place for place, f in enumerate(features) if f.example == number]
        of_one = [features[place] for place in own], [raws[place] for place in own]
        score, begin, end = best_of_all(one, *of_one, 5)
        null = min(float(raw[0, 0] + raw[1, 0]) for raw in of_one[1])
        assert found["no_answer"] == pytest.approx(1 / (1 + np.exp(score - null)), abs=1e-5)
        if null > score:
            without += 1
            assert (found["answer"], found["start"], found["end"]) == ("", 0, 0)
        else:
            text = one.fields["context"][begin:end]
            assert (found["answer"], found["start"], found["end"]) == (text, begin, end)
            assert text == text.strip() != ""
    assert without < len(rows)


# A model of sentence-transformers


def test_embed_is_for_sentence_transformers(tmp_path: Path) -> None:
    """Vectors of what was fine-tuned are the same there, of a model that makes them of length 1."""
    sentences = pytest.importorskip("sentence_transformers")
    folder = tiny.save(tmp_path / "model", "")
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    rows = [{"anchor": f"{text} in", "positive": text} for text, _ in tiny.sentences(20)]
    train = tiny.write_rows(tmp_path / "rows", rows)
    run = tiny.run("embed", folder, train, tmp_path / "run")
    theirs = sentences.SentenceTransformer(str(run.hf), device="cpu")
    texts = [row["positive"] for row in rows[:5]]
    from fastbert.finetune.predict import pipeline

    ours = [one["embedding"] for one in pipeline("embed", run.hf)(texts)]
    np.testing.assert_allclose(ours, theirs.encode(texts), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
