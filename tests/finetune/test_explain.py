"""`fastbert explain`: numbers beside transformers' and analytic ones; the page; mistakes."""

import base64
import importlib
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

import fastbert
from fastbert.cli import main
from fastbert.errors import RunError, UserError
from fastbert.finetune import explain_page
from fastbert.finetune.explain import (
    STEPS,
    TOLERANCE,
    Explainer,
    Explanation,
    Gradients,
    Word,
    explain,
    integrated_gradients,
    rollout,
)
from fastbert.finetune.explain_page import LEVELS, quantised, write_page

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"<>/.?\"'&()"),
    *("the", "cat", "sat", "on", "mat", "dog", "##s", "good", "bad", "who", "script", "alert"),
]
TEXT = "the cats sat on the mat. good dogs sat"
NASTY = (
    "<script>alert(\"x\")</script> & 'cat' \U0001f600 \u05e9\u05dc\u05d5\u05dd \u6f22\u5b57 cats"
)
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "type_vocab_size": 2,
}  # fmt: skip
DISTIL = {
    "vocab_size": len(WORDS), "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
LABELS = {
    "SequenceClassification": ["negative", "neutral", "positive"],
    "TokenClassification": ["O", "B-animal", "I-animal"],
}


def save(path: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A folder of transformers' model of that name, random, and a tokenizer."""
    torch.manual_seed(seed)
    labels = LABELS.get(re.sub(r".*For", "", name), ["0", "1"])
    named = {"id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}}
    sizes = DISTIL if name.startswith("Distil") else SIZES
    kind = getattr(transformers, name)
    if name.startswith("Roberta"):
        tokenizer = roberta_tokenizer(path)
        changes = {"vocab_size": len(tokenizer), "max_position_embeddings": 66} | changes
        changes |= {"pad_token_id": tokenizer.pad_token_id, "type_vocab_size": 1}
    else:
        ids = {word: index for index, word in enumerate(WORDS)}
        tokenizer = transformers.BertTokenizer(vocab=ids)
    if name.startswith("Distil"):
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if name.startswith("Electra"):
        changes = {"embedding_size": 16} | changes
    model = kind(kind.config_class(**{**sizes, **named, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def roberta_tokenizer(path: Path) -> Any:
    made = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator([TEXT] * 4, vocab_size=290, special_tokens=special)
    path.mkdir(parents=True, exist_ok=True)
    made.save_model(str(path))
    return transformers.RobertaTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A name of transformers' -> its folder, made once."""
    root, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save(root / name, name)
        return made[name]

    return folder


def ids_of(name: str, folder: Path, *texts: str) -> dict[str, Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(*texts, return_tensors="pt"))


# Numbers


@pytest.mark.parametrize(
    "name",
    [
        *("BertForSequenceClassification", "RobertaForSequenceClassification"),
        *("DistilBertForSequenceClassification", "ElectraForSequenceClassification"),
        *("BertForTokenClassification", "RobertaForMaskedLM", "ElectraForTokenClassification"),
        *("DistilBertForQuestionAnswering", "RobertaForQuestionAnswering", "BertForMaskedLM"),
        *("BertModel", "RobertaModel", "DistilBertModel", "ElectraModel"),
    ],
)
def test_attention_is_transformers_and_gradients_are_complete(
    folders: Callable[[str], Path], name: str
) -> None:
    folder = folders(name)
    mask = "<mask>" if name.startswith("Roberta") else "[MASK]"
    text = TEXT.replace("mat", mask) if name.endswith("MaskedLM") else TEXT
    asks = "who sat?" if name.endswith("QuestionAnswering") else None
    found = explain(text, folder, question=asks)

    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
    texts = (asks, text) if asks else (text,)
    given = ids_of(name, folder, *texts)
    with torch.no_grad():
        output = model(**given, output_attentions=True)
    np.testing.assert_allclose(found.attentions, torch.cat(output.attentions), atol=1e-6)
    assert found.attentions.shape == (2, 2, len(found.tokens), len(found.tokens))
    np.testing.assert_allclose(found.attentions.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found.rollout.sum(-1), 1, atol=1e-5)
    assert [found.texts[word.part][word.start : word.end] for word in found.words] == [
        word.text for word in found.words
    ]
    spoken = "".join(word.text for word in found.words if word.part == len(texts) - 1)
    assert spoken == text.replace(" ", "")

    if name.endswith("Model"):
        assert (found.attributions, found.delta, found.prediction) == (None, None, {})
        assert found.note == "the model has no head: attention alone"
        return
    assert found.gradients is not None and found.attributions is not None
    logits = output.start_logits if asks else output.logits
    assert np.isclose(logits.numpy(), found.gradients.output, atol=1e-5).any()
    assert found.gradients.error < TOLERANCE
    difference = found.gradients.output - found.gradients.baseline
    assert found.attributions.sum() == pytest.approx(difference, rel=TOLERANCE)
    assert abs(difference) > 1e-3

    # The baseline, computed in the plain way: padding for words, in the same positions.
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    keep = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id]
    ids = given["input_ids"]
    given["input_ids"] = ids.where(torch.isin(ids, torch.tensor(keep)), tokenizer.pad_token_id)
    if name.startswith("Roberta"):
        given["position_ids"] = torch.arange(2, 2 + ids.shape[1])[None]
    with torch.no_grad():
        empty = model(**given)
    logits = empty.start_logits if asks else empty.logits
    assert np.isclose(logits.numpy(), found.gradients.baseline, atol=1e-5).any()
    special = torch.isin(ids[0], torch.tensor(keep)).numpy()
    assert found.gradients.tokens[special].tolist() == [0] * int(special.sum())


def test_rollout_of_two_layers_by_hand() -> None:
    first = np.array([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])  # mean: .5 .5 / 1 0
    second = np.array([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    # (A + I) / 2: [.75 .25; .5 .5], and [.5 .5; 0 1] on its left
    np.testing.assert_allclose(
        rollout(np.stack([first, second])), [[0.625, 0.375], [0.5, 0.5]], rtol=1e-12
    )


def test_gradients_of_a_linear_model_are_the_analytic_ones() -> None:
    table, weight = nn.Embedding(7, 5), torch.randn(5)
    ids, baseline = torch.tensor([[1, 4, 2, 6]]), torch.tensor([[1, 0, 0, 0]])
    found = integrated_gradients(lambda ids: (table(ids) @ weight).sum(1), table, ids, baseline)
    expected = ((table(ids) - table(baseline)) @ weight)[0].detach().numpy()
    np.testing.assert_allclose(found.tokens, expected, atol=1e-6)
    assert (found.steps, expected[0]) == (STEPS[0], 0)
    assert abs(found.delta) < 1e-5


def test_gradients_of_a_square() -> None:
    """f = |sum of e|²: token t has (e_t - b_t) · (sum e + sum b)."""
    table = nn.Embedding(7, 5)
    ids, baseline = torch.tensor([[1, 4, 2]]), torch.tensor([[0, 0, 0]])
    found = integrated_gradients(
        lambda ids: table(ids).sum(1).square().sum(1), table, ids, baseline
    )
    sums = table(ids).sum(1) + table(baseline).sum(1)
    expected = ((table(ids) - table(baseline))[0] * sums).sum(-1).detach().numpy()
    np.testing.assert_allclose(found.tokens, expected, rtol=1e-4, atol=1e-5)


def test_steps_are_raised_until_it_converges_and_no_further() -> None:
    table = nn.Embedding(2, 1)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[0.0], [1.0]]))
    ids, baseline = torch.tensor([[1]]), torch.tensor([[0]])

    def after(threshold: float, sharpness: float) -> Any:
        def score(ids: Tensor) -> Tensor:
            return ((table(ids)[:, 0, 0] - threshold) * sharpness).sigmoid()

        return integrated_gradients(score, table, ids, baseline)

    assert after(0.5, 5).steps == STEPS[0]
    slower = after(0.37, 300)
    assert STEPS[0] < slower.steps < STEPS[-1]
    assert slower.error < TOLERANCE
    hopeless = after(0.37, 1e6)
    assert hopeless.steps == STEPS[-1]
    assert hopeless.error == pytest.approx(abs(hopeless.delta))
    assert hopeless.error > TOLERANCE


def test_the_word_that_decides_has_the_highest_attribution(tmp_path: Path) -> None:
    folder = save(tmp_path, "BertForSequenceClassification", hidden_dropout_prob=0.0)
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    others = [WORDS.index(word) for word in ("the", "cat", "sat", "on", "mat", "dog", ".")]
    good = WORDS.index("good")
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = torch.tensor(others)[torch.randint(0, 7, (32, 8), generator=generator)]
        has = torch.arange(32) % 2 == 0
        place = torch.randint(1, 7, (32,), generator=generator)
        ids[has, place[has]] = good
        ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
        loss = model(input_ids=ids, labels=2 * has.long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    model.save_pretrained(folder)

    explainer = Explainer(folder)
    for text in ("the cat sat on good mat.", "good dog, the cats sat", "on the dog sat good cat"):
        found = explainer(text)
        assert found.prediction["label"] == "positive"
        assert found.words[int(found.attributions.argmax())].text == "good"
        against = explainer(text, target="negative")
        assert against.words[int(against.attributions.argmin())].text == "good"


# What is asked


def test_a_word_is_its_pieces(folders: Callable[[str], Path]) -> None:
    found = explain("the  cats sat", folders("BertForSequenceClassification"), pair="dogs")
    assert found.tokens == ("[CLS]", "the", "cat", "##s", "sat", "[SEP]", "dog", "##s", "[SEP]")
    assert [(w.text, w.start, w.end, w.part, w.tokens) for w in found.words] == [
        ("the", 0, 3, 0, (1, 2)), ("cats", 5, 9, 0, (2, 4)), ("sat", 10, 13, 0, (4, 5)),
        ("dogs", 0, 4, 1, (6, 8)),
    ]  # fmt: skip
    tokens = found.gradients.tokens
    np.testing.assert_allclose(
        found.attributions, [tokens[1], tokens[2] + tokens[3], tokens[4], tokens[6] + tokens[7]]
    )


def test_words_of_bytes(folders: Callable[[str], Path]) -> None:
    found = explain(f"the {NASTY}", folders("RobertaForSequenceClassification"))
    assert "".join(word.text for word in found.words) == f"the{NASTY}".replace(" ", "")
    assert all(word.text == word.text.strip() for word in found.words)


def test_the_class_and_a_target(folders: Callable[[str], Path]) -> None:
    folder = folders("BertForSequenceClassification")
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**ids_of("Bert", folder, TEXT)).logits[0]
    best, explainer = int(logits.argmax()), Explainer(folder)
    labels = LABELS["SequenceClassification"]
    found = explainer(TEXT)
    assert found.prediction["label"] == labels[best]
    assert found.prediction["score"] == pytest.approx(float(logits.softmax(-1)[best]), abs=1e-5)
    assert list(found.prediction["probabilities"]) == labels
    for index, label in enumerate(labels):
        asked = explainer(TEXT, target=label)
        assert asked.gradients.output == pytest.approx(float(logits[index]), abs=1e-5)
        assert asked.target == f"logit of {label}"
        assert asked.prediction == found.prediction


def test_several_labels_and_a_score(tmp_path: Path) -> None:
    several = {"problem_type": "multi_label_classification"}
    found = explain(TEXT, save(tmp_path / "a", "BertForSequenceClassification", **several))
    chances = found.prediction["probabilities"]
    assert found.prediction["labels"] == [name for name, chance in chances.items() if chance > 0.5]
    one = {"id2label": {0: "stars"}, "label2id": {"stars": 0}}
    found = explain(TEXT, save(tmp_path / "b", "BertForSequenceClassification", **one))
    assert found.prediction == {"score": pytest.approx(found.gradients.output, abs=1e-6)}
    assert found.target == "score of stars"


def test_a_tag(folders: Callable[[str], Path]) -> None:
    folder = folders("BertForTokenClassification")
    model = transformers.BertForTokenClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**ids_of("Bert", folder, TEXT)).logits[0]
    explainer, labels = Explainer(folder), LABELS["TokenClassification"]
    firsts = [1, 2, 4, 5, 6, 7, 8, 9, 10, 12]  # "cats" and "dogs" have two pieces
    tags = [labels[int(logits[place].argmax())] for place in firsts]
    second = explainer(TEXT, word=2)
    assert second.prediction["tags"] == tags
    assert (second.token, second.prediction["word"]) == (2, "cats")
    assert second.gradients.output == pytest.approx(float(logits[2].max()), abs=1e-5)
    assert explainer(TEXT, word=3).token == 4
    other = explainer(TEXT, word=2, target="I-animal")
    assert other.gradients.output == pytest.approx(float(logits[2, 2]), abs=1e-5)
    first = next((place for place, tag in enumerate(tags) if tag != "O"), 0)
    assert explainer(TEXT).token == firsts[first]


def test_an_answer(folders: Callable[[str], Path]) -> None:
    found = explain(TEXT, folders("RobertaForQuestionAnswering"), question="who sat?")
    said = found.prediction
    assert found.texts == ("who sat?", TEXT)
    assert TEXT[said["start"] : said["end"]] == said["answer"] == said["answer"].strip() != ""
    assert 0 < said["score"] <= 1
    assert said["answer"] in found.target
    word = next(word for word in found.words if word.part and word.end > said["start"])
    assert word.tokens[0] <= found.token < word.tokens[1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("BertForSequenceClassification", {}),
        ("BertForSequenceClassification", {"problem_type": "regression", "num_labels": 1}),
        (
            "BertForSequenceClassification",
            {"problem_type": "multi_label_classification", "fastbert": {"threshold": 0.05}},
        ),
        ("RobertaForQuestionAnswering", {}),
        ("BertForQuestionAnswering", {"fastbert": {"max_answer_length": 1, "unanswerable": True}}),
    ],
)
def test_predictions_are_those_of_predict(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    folder = save(tmp_path, name, **changes)
    asks = "who sat?" if name.endswith("QuestionAnswering") else None
    pipe = fastbert.pipeline(None, folder, device="cpu")
    said = pipe(question=asks, context=TEXT) if asks else pipe(TEXT)
    found = explain(TEXT, folder, question=asks).prediction
    assert found.keys() == said.keys()
    for key, value in said.items():
        assert found[key] == (
            value if isinstance(value, str | list) else pytest.approx(value, abs=1e-5)
        )
    assert found.get("labels", [1]) and found.get("no_answer") != 1


def test_no_answer_is_explained_where_it_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", "BertForQuestionAnswering", fastbert={"unanswerable": True})
    monkeypatch.setattr("fastbert.finetune.tasks.answer._NO_ANSWER", -1.0)
    found = explain(TEXT, folder, question="who sat?")
    model = transformers.BertForQuestionAnswering.from_pretrained(folder).eval()
    with torch.no_grad():
        starts = model(**ids_of("Bert", folder, "who sat?", TEXT)).start_logits[0]
    assert (found.token, found.target) == (0, "start logit of no answer")
    assert found.gradients.output == pytest.approx(float(starts[0]), abs=1e-5)
    _, read, _ = page_of(tmp_path / "page.html", found)
    assert "no answer" in read.listed[0] and len(read.listed) == 1


def test_a_masked_word(folders: Callable[[str], Path]) -> None:
    folder = folders("BertForMaskedLM")
    (theirs, *_) = transformers.pipeline("fill-mask", str(folder), device="cpu")("the [MASK] sat")
    found = explain("the [MASK] sat", folder)
    assert found.prediction["guesses"][0]["token_str"] == theirs["token_str"]
    assert found.prediction["guesses"][0]["score"] == pytest.approx(theirs["score"], abs=1e-5)
    assert found.token == 2
    assert "logit of dog for [MASK]" == explain("the [MASK] sat", folder, target="dog").target
    without = explain("the cat sat", folder)
    assert (without.gradients, without.note) == (None, "no [MASK] to fill: attention alone")


def test_one_of_several_masks(folders: Callable[[str], Path]) -> None:
    folder, text = folders("BertForMaskedLM"), "[MASK] cats sat on [MASK]."
    (_, (theirs, *_)) = transformers.pipeline("fill-mask", str(folder), device="cpu")(text)
    explainer = Explainer(folder)
    first, second = explainer(text), explainer(text, mask=2)
    assert (first.token, second.token) == (1, 6)
    assert first.target.endswith(" for [MASK] 1 of 2")
    assert second.target.endswith(" for [MASK] 2 of 2")
    assert second.prediction["guesses"][0]["score"] == pytest.approx(theirs["score"], abs=1e-5)
    assert first.gradients.output != second.gradients.output


def test_broken_weights_are_named(tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(
        save(tmp_path, "BertForSequenceClassification")
    )
    with torch.no_grad():
        model.classifier.bias[1] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(RunError, match="outputs are not finite: its weights are broken"):
        explain(TEXT, tmp_path)


def test_a_text_that_is_its_own_baseline_is_explained_without_error(
    folders: Callable[[str], Path],
) -> None:
    found = explain("[MASK]", folders("BertForMaskedLM"))
    assert (found.gradients.error, found.gradients.steps) == (0.0, STEPS[0])
    assert found.attributions.tolist() == [0.0]


@pytest.mark.parametrize(("pooling", "token"), [("mean", None), ("cls", 0)])
def test_a_vector_is_read_where_it_is_pooled(
    tmp_path: Path, pooling: str, token: int | None
) -> None:
    folder = save(tmp_path / "own", "BertModel", fastbert={"task": "embed", "pooling": pooling})
    found = explain(TEXT, folder)
    assert found.token is token
    wanted = found.rollout.mean(0) if token is None else found.rollout[0]
    np.testing.assert_array_equal(found.flow, wanted)
    html, _, (data,) = page_of(tmp_path / "page.html", found)
    assert data["token"] is token
    assert ("the mean of all tokens" in html) == (token is None)
    theirs = save(tmp_path / "theirs", "BertModel")
    modules = [{"type": f"models.{kind}", "path": path} for kind, path in
               (("Transformer", ""), ("Pooling", "1_Pooling"))]  # fmt: skip
    (theirs / "modules.json").write_text(json.dumps(modules))
    (theirs / "1_Pooling").mkdir()
    mode = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[pooling]
    (theirs / "1_Pooling" / "config.json").write_text(json.dumps({mode: True}))
    assert explain(TEXT, theirs).token is token


def test_pre_training_has_masked_words_too(tmp_path: Path) -> None:
    found = explain("the [MASK] sat", save(tmp_path, "BertForPreTraining"))
    assert found.gradients is not None and len(found.prediction["guesses"]) == 5


def test_a_choice_shows_attention_alone(tmp_path: Path) -> None:
    found = explain(TEXT, save(tmp_path, "BertForMultipleChoice"))
    assert found.gradients is None
    assert found.note.startswith("of multiple choice only the attention is shown")


def test_a_class_is_read_from_what_it_was_trained_with(tmp_path: Path) -> None:
    explainer = Explainer(
        save(tmp_path, "BertForSequenceClassification", fastbert={"max_seq_length": 16})
    )
    found = explainer("the cat " * 20)
    assert (len(found.tokens), found.cut) == (16, 26)
    assert len(explainer("the cat " * 20, max_length=30).tokens) == 30


def test_what_does_not_fit_is_cut_and_counted(folders: Callable[[str], Path]) -> None:
    long = "the cat " * 50
    found = explain(long, folders("RobertaForSequenceClassification"))
    assert len(found.tokens) == 64  # of 66 positions, as two stand below the padding's
    found = explain(long, folders("BertForSequenceClassification"))
    assert (len(found.tokens), found.cut) == (64, 100 + 2 - 64)
    assert max(word.end for word in found.words) < len(long) - 80
    asked = Explainer(folders("DistilBertForQuestionAnswering"))
    found = asked(long, question="who sat?", max_length=20)
    assert (len(found.tokens), found.cut) == (20, 3 + 3 + 100 - 20)
    assert [word.text for word in found.words if word.part == 0] == ["who", "sat", "?"]
    found = asked(long, question="who sat on the good mat", max_length=11)
    assert [len([w for w in found.words if w.part == part]) for part in (0, 1)] == [6, 2]
    with pytest.raises(UserError, match="at most 6 tokens: must be at least 7"):
        asked(long, question="who sat?", max_length=6)


# The page


class _Read(HTMLParser):
    """Text by the class of what stands around it, and every name of a tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.scripts, self.marked = list[str](), list[str](), list[str]()
        self.listed = list[str]()
        self._open = list[tuple[str, str]]()
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        kind = dict(attributes).get("class") or ""
        if tag not in ("meta", "li"):
            self._open.append((tag, kind))
        if (tag, kind) == ("p", "marked"):
            self.marked.append("")
        if tag == "script":
            self.scripts.append("")
        if tag == "li":
            self.listed.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "script":
            self.scripts[-1] += data
        elif ("p", "marked") in self._open:
            self.marked[-1] += data
        elif ("ul", "said") in self._open:
            self.listed[-1] += data


def page_of(path: Path, *found: Explanation) -> tuple[str, _Read, list[Any]]:
    """The page, what a parser reads in it, and the data of its maps."""
    size = write_page(path, found, "<b>bold</b>")
    html = path.read_text("utf-8")
    assert size == path.stat().st_size
    read = _Read(html)
    return html, read, [json.loads(script) for script in read.scripts[:-1]]


def test_whatever_the_text_is_the_page_shows_it(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    found = explain(NASTY, folders("BertForSequenceClassification"), pair="<b>\n  'dog'</b>")
    html, read, (data,) = page_of(tmp_path / "page.html", found)
    assert html.count("<script") == 2  # the data and ours
    assert "<b>\n" not in html and "<b>bold" not in html
    assert read.marked == [NASTY, "<b>\n  'dog'</b>"] * 2  # gradients, rollout
    assert data["tokens"] == list(found.tokens)
    assert {"\U0001f600", "\u05e9\u05dc\u05d5\u05dd", "\u6f22", "cats"} <= {
        name for name, *_ in data["words"]
    }
    apart = html.replace("http://www.w3.org/2000/svg", "")  # a name, fetched by nobody
    assert not re.search(r"""(src|href)=["']?(?!#)|https?:|url\(|@import""", apart)


def test_a_label_is_escaped(tmp_path: Path) -> None:
    label = "<img src=x onerror=alert(1)>"
    named = {"id2label": {0: label, 1: "b"}, "label2id": {label: 0, "b": 1}}
    folder = save(tmp_path / "model", "BertForSequenceClassification", **named)
    html, read, _ = page_of(tmp_path / "page.html", explain(TEXT, folder, target=label))
    assert "img" not in read.tags
    found = replace(explain(TEXT, folder), target="half of a pair: \ud800")
    assert "half of a pair: ?" in page_of(tmp_path / "page.html", found)[0]
    assert "&lt;img src=x" in html


def test_no_word_or_token_is_read_as_html(tmp_path: Path) -> None:
    """Not even where a tokenizer leaves a whole tag in a word, or between words."""
    bad = "</script><img src=x>"
    one = np.ones((1, 1, 1, 1), np.float32)
    found = Explanation(
        texts=(bad * 3,), tokens=(bad,), cut=0,
        words=(Word(bad, len(bad), 2 * len(bad), 0, (0, 1)),),
        attentions=one, rollout=one[0, 0], token=0, prediction={"tag": bad, "word": bad,
        "tags": [bad], "score": 1.0}, target=bad, note="",
        gradients=Gradients(np.ones(1), 1.0, 0.0, 32),
    )  # fmt: skip
    html, read, (data,) = page_of(tmp_path / "page.html", found)
    assert "img" not in read.tags and "<img" not in html
    assert (data["tokens"], read.marked) == ([bad], [bad * 3] * 2)


def test_the_maps_are_the_attention(folders: Callable[[str], Path], tmp_path: Path) -> None:
    found = explain(TEXT, folders("BertForSequenceClassification"))
    _, _, (data,) = page_of(tmp_path / "page.html", found)
    size = len(found.tokens)
    values = np.frombuffer(zlib.decompress(base64.b64decode(data["values"])), np.uint8)
    shown = (values.reshape(5, size, size) / data["top"]) ** 2
    np.testing.assert_allclose(shown[:4], found.attentions.reshape(4, size, size), atol=0.004)
    np.testing.assert_allclose(shown[4], found.rollout, atol=0.004)
    assert (data["layers"], data["heads"]) == (2, 2)
    # Each token is in one word, in order.
    assert [place for _, *ends in data["words"] for place in range(*ends)] == list(range(size))


@pytest.mark.parametrize("levels", LEVELS)
def test_quantised_errs_by_little_everywhere(levels: int) -> None:
    share = np.linspace(0, 1, 100_001)
    error = np.abs((quantised(share, levels) / (levels - 1)) ** 2 - share)
    assert error.max() <= 1 / (levels - 1)
    assert error[share < 0.001].max() < 0.032 / (levels - 1)


def test_a_long_text_has_fewer_levels(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = explain(TEXT, folders("BertForSequenceClassification"))
    rows = np.concatenate([found.attentions.reshape(-1, *found.rollout.shape), [found.rollout]])
    seen = []
    for most in (1000, 800, 600, 500, 100):
        monkeypatch.setattr(explain_page, "MOST", most)
        html, _, (data,) = page_of(tmp_path / "page.html", found)
        values = np.frombuffer(zlib.decompress(base64.b64decode(data["values"])), np.uint8)
        seen.append(data["top"] + 1)
        shown = (values.reshape(rows.shape) / data["top"]) ** 2
        np.testing.assert_allclose(shown, rows, atol=1 / data["top"])
        assert f"in {seen[-1]} levels, which errs by at most {100 / data['top']:.1f} per" in html
    assert seen == sorted(seen, reverse=True)
    assert (seen[0], seen[-1]) == (256, 32) and len(set(seen)) > 2


def test_a_full_page_says_what_it_leaves_out(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    found = explain(TEXT, folders("BertForSequenceClassification"))
    monkeypatch.setattr(explain_page, "MOST_OF_ALL", 1)
    html, read, maps = page_of(tmp_path / "page.html", found, found, found)
    assert (len(maps), len(read.marked)) == (1, 6)
    assert html.count("Left out: the page is full") == 2
    assert "the maps of attention of the last 2 texts were left out" in caplog.text


def test_a_page_of_a_large_model_is_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    attentions = rng.dirichlet(np.full(128, 0.05), (12, 12, 128)).astype(np.float32)
    names = tuple(f"w{place}" for place in range(128))
    words = tuple(Word(name, 0, 0, 0, (at, at + 1)) for at, name in enumerate(names))
    found = Explanation(
        texts=("",), tokens=names, words=words, cut=0, attentions=attentions,
        rollout=rollout(attentions), token=0, prediction={}, target="", gradients=None, note="no",
    )  # fmt: skip
    assert write_page(tmp_path / "page.html", [found]) < 4e6


def test_what_is_cut_and_what_is_rough_is_said(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    found = explain("the cat " * 50, folders("BertForSequenceClassification"))
    html, read, _ = page_of(tmp_path / "page.html", found)
    assert "38 tokens at the end did not fit into the 64 that were read" in html
    assert read.marked[0] == "the cat " * 50
    assert "of the difference, after 32 steps" in html
    assert "these figures are rough" not in html
    rough = replace(found, gradients=replace(found.gradients, tokens=found.gradients.tokens * 2))
    html, _, _ = page_of(tmp_path / "page.html", rough)
    assert re.search(r"misses the difference by \d+\.\d% after 32 steps, more than 5%: these", html)


# The command


def say(capsys: pytest.CaptureFixture[str], status: int, *argv: object) -> tuple[str, str]:
    assert main(["explain", *map(str, argv)]) == status
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_the_command_writes_a_page_of_several_texts(
    folders: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").write_text(f"{TEXT}\n\n{NASTY}\n", "utf-8")
    model = folders("BertForSequenceClassification")
    out, err = say(capsys, 0, "--model", model, "--file", "texts")
    assert "1 empty lines were skipped" in err
    assert re.search(r"^text 2: logit of \w+: .*\nexplain.html: \d+ kB$", out, re.M)
    read = _Read(Path("explain.html").read_text("utf-8"))
    assert read.marked == [TEXT, TEXT, NASTY, NASTY]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["explain.html", "texts"]


def test_a_run_stands_for_its_model(
    folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/hf").symlink_to(folders("BertForMaskedLM"))
    page = tmp_path / "page.html"
    out, _ = say(capsys, 0, "--model", tmp_path / "run", "the [MASK] sat", "--out", page)
    assert " for [MASK]: " in out


@pytest.mark.parametrize(
    ("head", "argv", "says"),
    [
        ("SequenceClassification", ["--model", "{folder}/none", TEXT], "no such file or folder"),
        ("SequenceClassification", ["  "], "text 1 is empty"),
        ("SequenceClassification", [TEXT, "\u200b"], "text 2: text '\\u200b' holds no word"),
        ("SequenceClassification", [TEXT, "--pair", ""], "--pair '' is empty"),
        ("SequenceClassification", ["\udcff"], "text '\\udcff' is not UTF-8"),
        (
            "SequenceClassification",
            [TEXT, "--target", "positiv"],
            "--target positiv: none of the model's labels: did you mean 'positive'? (negative, neu",
        ),
        ("SequenceClassification", [TEXT, "--word", "1"], "gives no tag to words"),
        ("SequenceClassification", [TEXT, "--question", "who?"], "was not trained to answer"),
        ("SequenceClassification", [TEXT, "--max-length", "no"], "must be an integer"),
        ("SequenceClassification", [TEXT, "--max-length", "2"], "must be at least 3"),
        ("SequenceClassification", [TEXT, "--out", "{tmp}/none/x"], "no such folder"),
        ("SequenceClassification", [TEXT, "--file", "{tmp}/x"], "--file stands instead of texts"),
        ("SequenceClassification", [TEXT] * 101, "101 texts: a page holds 100 at most"),
        ("SequenceClassification", [TEXT, "--targt", "x"], "did you mean --target?"),
        ("TokenClassification", [TEXT, "--word", "11"], "--word 11: must be from 1 to 10"),
        ("TokenClassification", [TEXT, "--target", "B-anmal"], "did you mean 'B-animal'?"),
        ("TokenClassification", [TEXT, "--mask", "1"], "fills no [MASK]"),
        ("QuestionAnswering", ["\u200b", "--question=who"], "text '\\u200b' holds no word"),
        ("QuestionAnswering", [TEXT], "answers questions: give one, as --question"),
        ("QuestionAnswering", [TEXT, "--question=who", "--target=x"], "has no labels"),
        (
            "MaskedLM",
            ["the [MASK]", "--target", "dgo"],
            "no single token of the tokenizer: did you",
        ),
        ("MaskedLM", ["the cat", "--target", "dog"], "the text holds no [MASK]"),
        ("MaskedLM", ["the cat", "--mask", "2"], "--mask 2: the text holds no [MASK]"),
        ("MaskedLM", ["[MASK] [MASK]", "--mask", "3"], "--mask 3: must be from 1 to 2, the [MASK]"),
    ],
)
def test_mistakes_in_one_line(
    folders: Callable[[str], Path],
    tmp_path: Path,
    head: str,
    argv: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"DistilBertFor{head}" if head == "QuestionAnswering" else f"BertFor{head}"
    folder = folders(name)
    words = [word.format(folder=folder, tmp=tmp_path) for word in argv]
    given = ["--model", folder, "--out", tmp_path / "page.html", *words]
    _, err = say(capsys, 2, *given)
    said = [line for line in err.splitlines() if line.startswith("fastbert: ")]
    assert len(said) == 1 and said[0].startswith("fastbert: error: ")
    assert says in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_captum_is_named(
    folders: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without(name: str) -> Any:
        if name.startswith("captum"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.import_module(name)

    monkeypatch.setattr("fastbert.finetune.needs.import_module", without)
    page = tmp_path / "page.html"
    model = folders("BertForSequenceClassification")
    _, err = say(capsys, 2, "--model", model, TEXT, "--out", page)
    assert 'captum is not installed: pip install "fastbert-engine[finetune]"' in err
    say(capsys, 0, "--model", folders("BertModel"), TEXT, "--out", page)  # needs none


def test_it_is_public() -> None:
    assert fastbert.explain is explain
    assert fastbert.Explanation is Explanation
