"""Models that begin with a fresh head, how deep their weights lie, and answers without padding."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

import fastbert
from fastbert.errors import UserError
from fastbert.hf.depths import depths
from fastbert.hf.load import begin_head, dropout_changes, load_tokenizer, longest_sequence
from fastbert.hf.save import recover, save_model

from ..finetune import tiny
from .berts import batch, pair

FAMILIES = ("bert", "roberta", "distilbert", "electra")
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save(root / family, family=family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_begins_as_transformers_begins_it(saved: dict[str, Path], family: str) -> None:
    for head in HEADS:
        changes = {"num_labels": 3} if "Classification" in head else {}
        torch.manual_seed(7)
        ours, drawn = begin_head(saved[family], head, changes)
        transformers.set_seed(7)
        kind = getattr(transformers, f"AutoModelFor{head}")
        theirs = kind.from_pretrained(saved[family], **changes).state_dict()
        assert drawn and not [name for name in drawn if name not in theirs]
        for name, value in ours.state_dict().items():
            assert torch.equal(value, theirs[name]), (head, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_depths_of_a_family(saved: dict[str, Path], family: str) -> None:
    for head in (*HEADS, ""):
        model = fastbert.accelerate(begin_head(saved[family], head, {})[0])
        found, layers = depths(model)
        assert layers == 2
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, depth in found.items():
            if ".layer.0." in name or ".layer.1." in name:
                assert depth == 1 + (".layer.1." in name), name
            else:
                assert depth == (0 if "embeddings" in name else 3), name


def test_a_head_for_other_labels_is_drawn_anew_if_that_is_asked(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "ForSequenceClassification")
    before = begin_head(folder, "SequenceClassification", {"num_labels": 2})[0]
    kept = tiny.model("ForSequenceClassification")
    assert torch.equal(before.classifier.weight, kept.classifier.weight)
    fresh, drawn = begin_head(folder, "SequenceClassification", {}, new_head=True)
    assert drawn == ["classifier.bias", "classifier.weight"]
    assert not fresh.classifier.bias.any()
    assert 0 < fresh.classifier.weight.std() < 0.04  # 0.02 is drawn; the saved have 0.1
    assert torch.equal(fresh.bert.pooler.dense.weight, kept.bert.pooler.dense.weight)
    alone = begin_head(folder, "", {}, new_head=True)[0]
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(alone.state_dict()[query], kept.bert.state_dict()[query])


@pytest.mark.parametrize(
    ("family", "head", "changes"),
    [
        ("bert", "SequenceClassification", {"classifier_dropout": 0.3}),
        ("roberta", "TokenClassification", {"classifier_dropout": 0.3}),
        ("distilbert", "SequenceClassification", {"seq_classif_dropout": 0.3}),
        ("distilbert", "QuestionAnswering", {"qa_dropout": 0.3}),
        ("electra", "TokenClassification", {"classifier_dropout": 0.3}),
        ("electra", "MultipleChoice", {"summary_last_dropout": 0.3}),
        ("bert", "QuestionAnswering", None),
        ("distilbert", "TokenClassification", None),
        ("bert", "", None),
    ],
)
def test_dropout_before_a_head(
    saved: dict[str, Path], family: str, head: str, changes: dict[str, float] | None
) -> None:
    asked = {"classifier_dropout": 0.3, "hidden_dropout_prob": 0.2}
    if changes is None:
        with pytest.raises(UserError, match=f"classifier_dropout: {family} has none"):
            dropout_changes(family, head, **asked)
        return
    hidden = "dropout" if family == "distilbert" else "hidden_dropout_prob"
    found = dropout_changes(family, head, **asked, attention_probs_dropout_prob=None)
    assert found == {hidden: 0.2, **changes}
    model = begin_head(saved[family], head, found)[0]
    rates = [one.p for one in model.modules() if isinstance(one, torch.nn.Dropout)]
    assert rates.count(0.3) == 1
    assert 0.2 in rates


def test_the_longest_sequence(saved: dict[str, Path]) -> None:
    for family in FAMILIES:
        found = longest_sequence(saved[family], load_tokenizer(saved[family]))
        assert found == (64 if family == "roberta" else 66), family


def test_answers_over_real_tokens_alone() -> None:
    """The loss and its gradients are those of transformers with padding masked out."""
    theirs, ours = pair("BertForQuestionAnswering")
    given = batch("BertForQuestionAnswering")
    labels = torch.stack([given.pop("start_positions"), given.pop("end_positions")], 1).flatten()
    losses = []
    for model, options in ((theirs, {}), (ours, {"fastbert_unpadded": True})):
        output = model(**given, **options)
        logits = torch.stack((output.start_logits, output.end_logits), 1)
        logits = logits.masked_fill(given["attention_mask"][:, None] == 0, -torch.inf)
        if options:
            least = torch.finfo(torch.float32).min
            padded = (given["attention_mask"] == 0)[:, None].expand(-1, 2, -1)
            raw = torch.stack((output.start_logits, output.end_logits), 1)
            assert bool((raw[padded] == least).all())
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_over_real_tokens_alone(family: str) -> None:
    model = fastbert.accelerate(tiny.model("ForQuestionAnswering", family)).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, fastbert_unpadded=True)
        alone = model(input_ids=ids[1:, :2], attention_mask=mask[1:, :2])
    torch.testing.assert_close(both.start_logits[1, :2], alone.start_logits[0])
    assert bool((both.end_logits[1, 2:] < -1e38).all())


def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model("ForSequenceClassification"), tiny.tokenizer()
    folder = tmp_path / "hf"

    def kept() -> Any:
        return json.loads((folder / "config.json").read_text())["fastbert"]

    save_model(folder, model, tokenizer, {"step": 1})
    replace, calls = os.replace, []

    def killed(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 2:  # the old one is aside, the new one not in its place
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_model(folder, model, tokenizer, {"step": 2})
    monkeypatch.undo()
    assert not folder.exists()
    recover(folder)
    assert kept() == {"step": 1}
    save_model(folder, model, tokenizer, {"step": 3})
    recover(folder)
    assert kept() == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
