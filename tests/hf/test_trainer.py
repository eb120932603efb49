"""transformers' Trainer with the one line and without: the same training, checkpoints and files."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM, Trainer, TrainerCallback, TrainingArguments

import fastbert

from .berts import HEADS, VOCAB, assert_close, bert, pair

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Trainer's own


def rows(head: str, count: int = 16) -> list[dict[str, Any]]:
    """Sequences of any length up to 12, and a column that no model takes."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(count):
        length = int(torch.randint(3, 13, (), generator=generator))
        ids = torch.randint(5, VOCAB, (length,), generator=generator)
        labels: Any = i % 2
        if head == "BertForMaskedLM":
            labels = torch.where(torch.rand(length, generator=generator) < 0.3, ids, -100)
            labels[1] = ids[1]
        found.append({"input_ids": ids, "labels": labels, "text": "unused"})
    return found


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    def pad(name: str, value: int) -> torch.Tensor:
        columns = [row[name] for row in batch]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    ids = pad("input_ids", 0)
    words = isinstance(batch[0]["labels"], torch.Tensor)
    labels = pad("labels", -100) if words else torch.tensor([row["labels"] for row in batch])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def trainer(model: Any, folder: Any, head: str = "BertForMaskedLM", **settings: Any) -> Trainer:
    settings = {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
    } | settings
    made = Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        data_collator=collate,
        train_dataset=rows(head),
        eval_dataset=rows(head, 6),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def losses(made: Trainer) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in made.state.log_history if "loss" in line])


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ("BertForMaskedLM", {}),
        ("BertForSequenceClassification", {}),
        ("BertForMaskedLM", {"bf16": True, "gradient_checkpointing": True, "max_steps": 3}),
        ("BertForMaskedLM", {"label_smoothing_factor": 0.1, "max_steps": 3}),
    ],
    ids=["words", "sequences", "bf16-checkpointing", "smoothing"],
)
def test_the_same_losses_with_the_line_and_without(tmp_path, head, settings):
    found = []
    for model in pair(head):
        made = trainer(model, tmp_path, head, **settings)
        made.train()
        found.append((losses(made), made.evaluate()["eval_loss"], made.predict(rows(head, 6))))
    (a, a_eval, a_told), (b, b_eval, b_told) = found
    assert len(a) == settings.get("max_steps", 10)
    tolerance = 2e-2 if "bf16" in settings else 1e-3
    torch.testing.assert_close(b, a, atol=tolerance, rtol=tolerance)
    assert abs(a_eval - b_eval) < 2 * tolerance
    assert a_told.predictions.shape == b_told.predictions.shape
    assert (a_told.label_ids == b_told.label_ids).all()
    if not settings:
        assert a.max() > a.min() + 0.05  # something was learnt


def test_the_line_after_the_trainer_was_made(tmp_path):
    found = []
    for model in (fastbert.accelerate(bert("BertForMaskedLM")), bert("BertForMaskedLM")):
        made = trainer(model, tmp_path, max_steps=3, bf16=True)
        fastbert.accelerate(model)
        made.train()
        found.append(losses(made))
    assert torch.equal(*found)


def test_accumulated_batches_count_as_one(tmp_path):
    """Labels divided by their number in all of them: transformers 5 adds up means."""
    found = {}
    for name, settings in {
        "whole": {"per_device_train_batch_size": 4},
        "halves": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "singles": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    }.items():
        model = fastbert.accelerate(bert("BertForMaskedLM"))
        made = trainer(model, tmp_path, max_steps=4, optim="sgd", **settings)
        made.train()
        found[name] = losses(made), {n: p.detach() for n, p in model.named_parameters()}
    for name in ("halves", "singles"):
        torch.testing.assert_close(found[name][0], found["whole"][0], atol=1e-3, rtol=1e-3)
        assert_close(found["whole"][1], found[name][1], tolerance=1e-3)


class _Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 4


def test_a_stopped_training_goes_on_and_the_best_model_is_kept(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps"}
    settings |= {"eval_steps": 2, "max_steps": 6, "load_best_model_at_end": True}
    model = fastbert.accelerate(
        bert("BertForMaskedLM", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    )
    whole = trainer(model, tmp_path / "whole", **settings)
    whole.train()
    assert type(whole.model) is fastbert.BertForMaskedLM
    best = AutoModelForMaskedLM.from_pretrained(whole.state.best_model_checkpoint)
    assert type(best) is transformers.BertForMaskedLM
    assert best.config.architectures == ["BertForMaskedLM"]
    for name, value in best.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name])

    def fresh() -> Any:
        return fastbert.accelerate(
            bert("BertForMaskedLM", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        )

    begun = trainer(fresh(), tmp_path / "parts", **settings)
    begun.add_callback(_Stop())
    begun.train()
    gone_on = trainer(fresh(), tmp_path / "parts", **settings)
    gone_on.train(resume_from_checkpoint=True)
    torch.testing.assert_close(losses(gone_on), losses(whole))
    whole.save_model(tmp_path / "saved")
    saved = fastbert.BertForMaskedLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.cls.predictions.bias, whole.model.cls.predictions.bias)


@pytest.mark.parametrize("head", HEADS[1:])
def test_trainer_sees_the_same_columns_labels_and_groups(tmp_path, head):
    seen = []
    for model in pair(head):
        made = trainer(model, tmp_path, head)
        made._set_signature_columns_if_needed()
        groups = made.create_optimizer().param_groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        seen.append(
            (
                sorted(made._signature_columns),
                made.label_names,
                made.can_return_loss,
                made.model_accepts_loss_kwargs,
                [(g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups],
            )
        )
    assert seen[0] == seen[1]
    for decay, names in seen[1][-1]:
        assert bool(decay) != any("LayerNorm" in name or "bias" in name for name in names)


def test_a_batch_that_does_not_fit_is_halved(tmp_path):
    model = fastbert.accelerate(bert("BertForMaskedLM"))
    sizes = []

    def full(_module, _given, named):
        sizes.append(len(named["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model.register_forward_pre_hook(full, with_kwargs=True)
    made = trainer(model, tmp_path, max_steps=2, auto_find_batch_size=True)
    made.train()
    assert set(sizes) > {2, 4}
    assert made.state.global_step == 2
