"""A model as training begins, from folders of every kind: families, heads, tokenizers, damage."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastbert.errors import UserError
from fastbert.finetune.config import CONFIGS
from fastbert.finetune.start import Start, start
from fastbert.finetune.tasks import TASKS
from fastbert.finetune.tasks.base import Example
from fastbert.hf.load import load_head, load_tokenizer, saved_head

from . import tiny

_MARKED = "<e1> {} </e1> saw <e2> {} </e2>"


def begun(model: Path, labels: Any = ("a", "b"), text: str = "ada", **asked: Any) -> Start:
    tokenizer = load_tokenizer(model)
    task = TASKS["classify"](tokenizer, 66, {})
    config = CONFIGS["classify"](model=str(model), train="t", **asked)
    rows = [Example(f"f:{n}", {"text": text, "label": one}) for n, one in enumerate(labels, 1)]
    task.learn(rows, config)
    return start(config, task)


# LoRA


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "camembert"])
def test_lora_adapts_query_and_value_of_every_family(family: str, tmp_path: Path) -> None:
    """PEFT itself knows the names of some families alone."""
    if family == "camembert":
        model = tiny.save(tmp_path, family="roberta")
        config = json.loads((model / "config.json").read_text())
        architectures = ["CamembertForMaskedLM"]
        config |= {"model_type": "camembert", "architectures": architectures}
        (model / "config.json").write_text(json.dumps(config))
        kind = json.loads((model / "tokenizer_config.json").read_text())
        kind["tokenizer_class"] = "PreTrainedTokenizerFast"
        (model / "tokenizer_config.json").write_text(json.dumps(kind))
    else:
        model = tiny.save(tmp_path, family=family)
    names = [
        name for name, one in begun(model, lora_r=2).model.named_parameters() if one.requires_grad
    ]
    adapters = [name for name in names if "lora_A" in name]
    found = {name.split(".lora_A")[0].rpartition(".")[2] for name in adapters}
    assert found == ({"q_lin", "v_lin"} if family == "distilbert" else {"query", "value"})
    assert len(adapters) == 4
    assert all("lora_" in name or "modules_to_save" in name for name in names)


def test_lora_trains_the_rows_of_marks(tmp_path: Path) -> None:
    """Else a mark stays as it was drawn. PEFT loads them with the adapter, whatever was drawn."""
    peft = pytest.importorskip("peft")
    model = tiny.save(tmp_path / "model")
    rows = [
        {"text": _MARKED.format(text, "bob"), "label": label} for text, label in tiny.sentences(12)
    ]
    train = tiny.write_rows(tmp_path / "rows", rows)
    run = tiny.run("classify", model, train, tmp_path / "run", lora_r=2, learning_rate=1e-2)
    tokenizer = load_tokenizer(run.hf)
    ours = load_head(run.hf, "SequenceClassification")
    size = len(tiny.wordpieces())
    drawn = begun(model, text=rows[0]["text"]).model.get_input_embeddings().weight
    kept = ours.get_input_embeddings().weight
    assert torch.equal(kept[:size], drawn[:size])
    assert bool((kept[size:] != drawn[size:]).any(1).all())
    torch.manual_seed(7)  # other rows than those that training began with
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    base.resize_token_embeddings(len(tokenizer))
    theirs = peft.PeftModel.from_pretrained(base, str(run.folder / "adapter")).eval()
    given = tokenizer([row["text"] for row in rows[:4]], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            ours(**given).logits, theirs(**given).logits, rtol=1e-4, atol=1e-5
        )
    weights = (run.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert weights < kept.numel() * kept.element_size()  # not all embeddings again
    # A model that has the marks already: its rows are weights like others.
    again = begun(run.hf, text=rows[0]["text"], lora_r=2).model
    assert not any("trainable_tokens" in name for name, _ in again.named_parameters())


def test_frozen_rows_of_marks_are_said(tmp_path: Path) -> None:
    model = tiny.save(tmp_path)
    text = _MARKED.format("ada", "bob")
    notes = begun(model, text=text, freeze_embeddings=True).notes
    assert "frozen as they were drawn: the embeddings of </e1>, </e2>, <e1>, <e2>" in notes
    assert not any("as they were drawn" in note for note in begun(model, text=text).notes)


# Heads of another make


def test_labels_of_a_head_that_the_model_has(tmp_path: Path) -> None:
    three = tiny.save(tmp_path / "three", "ForSequenceClassification", num_labels=3)
    for labels, what in ((("a", "b"), "2 labels (a, b)"), (("0.5", "1"), "1 label (score)")):
        with pytest.raises(UserError) as caught:
            begun(three, labels)
        assert str(caught.value) == (
            f"{three} was trained for 3 labels (LABEL_0, LABEL_1, LABEL_2), and the data has "
            f"{what}: give --new-head to begin with a fresh one"
        )
    fresh = begun(three, new_head=True)
    assert fresh.model.classifier.weight.shape == (2, 32)
    assert "new weights: classifier.bias, classifier.weight" in fresh.notes
    same = begun(three, ("x", "y", "z"))
    assert "its head goes on with its training" in same.notes
    kept = tiny.model("ForSequenceClassification", num_labels=3).classifier.weight
    assert torch.equal(same.model.classifier.weight, kept)
    named = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    model = tiny.save(tmp_path / "named", "ForSequenceClassification", **named)
    with pytest.raises(
        UserError, match=r"2 labels \(no, yes\), and the data has 2 labels \(a, b\)"
    ):
        begun(model)


def test_a_model_for_three_classes_learns_spans(tmp_path: Path) -> None:
    """Of its configuration transformers would take three outputs, and fail."""
    model = tiny.save(tmp_path / "model", "ForSequenceClassification", num_labels=3)
    train = tiny.asked(tmp_path / "rows", 12)
    run = tiny.run("answer", model, train, tmp_path / "run", max_steps=1)
    assert load_head(run.hf, "QuestionAnswering").qa_outputs.out_features == 2


def test_an_encoder_alone_has_no_head_to_renew(tmp_path: Path) -> None:
    model = tiny.save(tmp_path)
    task = TASKS["embed"](load_tokenizer(model), 66, {})
    with pytest.raises(UserError, match="new_head: embed trains the encoder alone"):
        start(CONFIGS["embed"](model=str(model), train="t", new_head=True), task)


# Tokenizers


@pytest.mark.parametrize("family", ["distilbert", "bert"])
def test_models_without_token_types_are_given_none(family: str, tmp_path: Path) -> None:
    """A folder may hold BERT's tokenizer beside a model that has no types, or one alone."""
    changes = {} if family == "distilbert" else {"type_vocab_size": 1}
    model = tiny.save(tmp_path / "model", family=family, **changes)
    assert list(load_tokenizer(model)("ada", "bob")) == ["input_ids", "attention_mask"]
    rows = [
        {"question": "who is it", "choices": ["ada", "bob", "we"][: 2 + n % 2], "label": n % 2}
        for n in range(10)
    ]
    train = tiny.write_rows(tmp_path / "rows", rows)
    assert tiny.run("choose", model, train, tmp_path / "run", max_steps=1).steps == 1


def words(folder: Path, **files: Any) -> Any:
    """What a folder with a vocabulary of two cases makes of a text."""
    folder.mkdir()
    tiny.config(vocab_size=9).save_pretrained(folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Ada", "ada", "éte", "ete"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(folder / "again")
    found = tokenizer.tokenize("Ada éte")
    assert load_tokenizer(folder / "again").tokenize("Ada éte") == found
    return found


def test_case_is_as_a_folder_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cased, lower = {"do_lower_case": False}, {"do_lower_case": True}
    assert words(tmp_path / "cased", tokenizer_config=cased) == ["Ada", "éte"]
    assert words(tmp_path / "lower", tokenizer_config=lower) == ["ada", "ete"]
    # sentence-transformers lower-cases before a tokenizer, which then strips no accents.
    both = {"tokenizer_config": cased, "sentence_bert_config": lower}
    assert words(tmp_path / "both", **both) == ["ada", "éte"]
    both = {"tokenizer_config": lower, "sentence_bert_config": cased}
    assert words(tmp_path / "other", **both) == ["ada", "ete"]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert words(tmp_path / "silent") == ["ada", "ete"]
    (said,) = [one.getMessage() for one in caplog.records if "capitals" in one.getMessage()]
    assert "1 of its 4 tokens have capitals" in said and "do_lower_case" in said


def test_a_tokenizer_that_cannot_lower_case(tmp_path: Path) -> None:
    tiny.tokenizer("roberta").save_pretrained(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(UserError, match="asks for lower-cased text, which its RobertaTokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_fast_is_only_loaded(tmp_path: Path) -> None:
    tiny.config().save_pretrained(tmp_path)
    vocabulary = list(tiny.wordpieces())
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    kind = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    assert load_tokenizer(tmp_path).tokenize("ada") == ["ada"]


# Damage


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"no model to load: .*deserializing"):
        begun(model)
    config = model / "config.json"
    good = config.read_text()
    for content in ("[]", good.replace('"num_hidden_layers": 2', '"num_hidden_layers": "two"')):
        config.write_text(content)
        with pytest.raises(UserError, match=f"{model}: no model to load: ") as caught:
            saved_head(model)
        assert "\n" not in str(caught.value) and str(caught.value)[-1] != ":"
