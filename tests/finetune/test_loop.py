"""The loop of fine-tuning: transformers' Trainer step by step, and what Trainer does not have."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from fastbert.errors import RunError, UserError
from fastbert.finetune import loop, metrics
from fastbert.finetune.config import CONFIGS
from fastbert.finetune.data import read_data
from fastbert.finetune.infer import batches, infer
from fastbert.finetune.loop import Trainer, epoch_order
from fastbert.finetune.tasks import TASKS
from fastbert.hf.load import load_head, load_tokenizer

from . import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of transformers' Trainer

HEADS = {"classify": "SequenceClassification", "tag": "TokenClassification"}
HEADS |= {"answer": "QuestionAnswering"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and data for each task: `model`, `classify`, `tag` ..., each with `-eval`."""
    root = tmp_path_factory.mktemp("data")
    tiny.save(root / "model")
    for name, count, seed in (("", 30, 0), ("-eval", 9, 1)):
        tiny.labelled(root / f"classify{name}", count, 3, seed)
        tiny.tagged(root / f"tag{name}", count, seed)
        tiny.asked(root / f"answer{name}", count, seed)
    return root


def begun(root: Path, task: str, run: Path, **changes: Any) -> Trainer:
    """A run before its first step."""
    settings = {
        "model": str(root / "model"), "train": str(root / task), "eval": str(root / f"{task}-eval"),
        "out": str(run), "report_to": "none", "logging_steps": 1, "learning_rate": 5e-3,
        "per_device_train_batch_size": 4, "device": "cpu",
    }  # fmt: skip
    config = CONFIGS[task](**(settings | changes))
    made = TASKS[task](load_tokenizer(config.model), config.max_seq_length or 66, {})
    data = read_data(config, made, lambda line: None)
    run.mkdir(exist_ok=True)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return Trainer(
        config, made, data, run, torch.device("cpu"), dtype, config.resume, lambda line: None
    )


def finished(trainer: Trainer) -> Any:
    trainer.run(lambda: "")
    return trainer.finish()


# transformers' Trainer


class _Order(TrainerCallback):
    """The places of the examples in the order in which they were seen."""

    def __init__(self) -> None:
        self.places: list[int] = []


def theirs(
    root: Path, task: str, folder: Path, loss: Callable[..., Tensor] | None = None, **changes: Any
) -> tuple[list[float], list[int]]:
    """The losses of transformers' Trainer, and the order of its examples."""
    tokenizer = load_tokenizer(root / "model")
    made = TASKS[task](tokenizer, 66, {})
    paths = {"model": str(root / "model"), "train": str(root / task)}
    config = CONFIGS[task](**paths, eval=str(root / f"{task}-eval"))
    data = read_data(config, made, lambda line: None)
    rows: list[dict[str, Any]] = []
    for place, one in enumerate(made.features(data.train, True)):
        row: dict[str, Any] = {**one.inputs[0], "place": place}
        if task == "answer":
            row["start_positions"], row["end_positions"] = one.label
        else:
            row["labels"] = one.label
        rows.append(row)
    order = _Order()

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Tensor]:
        order.places += [row["place"] for row in chosen]
        longest = max(len(row["input_ids"]) for row in chosen)
        found = {}
        for name in chosen[0].keys() - {"place"}:
            values = [row[name] for row in chosen]
            if isinstance(values[0], list):
                fill = -100 if name == "labels" else 0
                values = [value + [fill] * (longest - len(value)) for value in values]
            found[name] = torch.tensor(values)
        return found

    settings = {
        "learning_rate": 5e-3, "per_device_train_batch_size": 4, "num_train_epochs": 3.0,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "seed": 42, "weight_decay": 0.01, "warmup_steps": 0.1,
        "remove_unused_columns": False,
    } | changes  # fmt: skip
    transformers.set_seed(42)
    kind = getattr(transformers, f"AutoModelFor{HEADS[task]}")
    labels = {"num_labels": len(made.labels)} if made.labels else {}
    model = kind.from_pretrained(root / "model", **labels)
    trainer = transformers.Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        data_collator=collate,
        train_dataset=rows,  # type: ignore[arg-type]
        compute_loss_func=loss,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], order.places


def _mean_of_all(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """What transformers calls the right loss of accumulated batches; its heads take none."""
    logits = outputs.logits.flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


RECIPE = {"warmup_steps": 4, "weight_decay": 0.3, "max_grad_norm": 0.2}
RECIPE |= {"lr_scheduler_type": "cosine", "adam_beta2": 0.9}


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("classify", {}),
        ("tag", {}),
        ("answer", {"unpad": False}),
        ("classify", {"gradient_accumulation_steps": 2, "num_train_epochs": 5.0, **RECIPE}),
        ("tag", {"gradient_accumulation_steps": 2, "num_train_epochs": 5.0, **RECIPE}),
        ("classify", {"label_smoothing_factor": 0.2, "max_grad_norm": 0.0}),
        ("tag", {"label_smoothing_factor": 0.2, "num_train_epochs": 2.6}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value)[:40] or "plain",
)
def test_the_losses_of_transformers_trainer(
    root: Path, tmp_path: Path, task: str, changes: dict[str, Any]
) -> None:
    """30 examples by 4: the last batch of an epoch is smaller, and so are the last 2 of 8."""
    asked = {"num_train_epochs": 3.0, **changes}
    trainer = begun(root, task, tmp_path / "ours", **asked)
    ours = finished(trainer)
    given = {name: value for name, value in asked.items() if name != "unpad"}
    whole = None if task == "answer" or "label_smoothing_factor" in changes else _mean_of_all
    losses, places = theirs(root, task, tmp_path / "theirs", whole, **given)
    assert len(losses) >= 20
    assert list(ours.losses) == list(range(1, len(losses) + 1))
    found = list(ours.losses.values())
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-4)
    assert max(found) > min(found) + 0.01
    count = len(trainer.train)
    ordered = [place for epoch in range(2) for place in epoch_order(count, 42, epoch)]
    assert places[: 2 * count] == ordered
    assert sorted(ordered[:count]) == list(range(count)) and ordered[:count] != ordered[count:]


def test_answers_as_trainer_with_padding_masked(root: Path, tmp_path: Path) -> None:
    class Masked(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            starts, ends = inputs.pop("start_positions"), inputs.pop("end_positions")
            output = model(**inputs)
            padding = inputs["attention_mask"] == 0
            pair = ((output.start_logits, starts), (output.end_logits, ends))
            return sum(F.cross_entropy(x.masked_fill(padding, -1e9), y) for x, y in pair) / 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "Trainer", Masked)
        losses, _ = theirs(root, "answer", tmp_path / "theirs")
    ours = finished(begun(root, "answer", tmp_path / "ours", num_train_epochs=3.0))
    assert len(losses) >= 20
    np.testing.assert_allclose(list(ours.losses.values()), losses, rtol=0, atol=1e-4)


def test_smoothing_is_transformers_label_smoother(root: Path, tmp_path: Path) -> None:
    for task in ("classify", "tag"):
        made = begun(root, task, tmp_path / task, label_smoothing_factor=0.3).task
        labels = (
            torch.tensor([[0, 2, -100], [1, -100, -100]]) if task == "tag" else torch.tensor([0, 2])
        )
        logits = torch.randn(*labels.shape, len(made.labels))
        wanted = LabelSmoother(0.3)({"logits": logits}, labels)
        given = {"labels": labels}
        torch.testing.assert_close(made.loss(logits, given) / made.items(given), wanted)


# Which weights change, and how fast


def states(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(
    ("asked", "frozen"),
    [
        ({"freeze_embeddings": True}, ("embeddings.",)),
        ({"freeze_layers": 1}, ("embeddings.", ".layer.0.")),
        ({"freeze_layers": 2}, ("embeddings.", ".layer.0.", ".layer.1.")),
    ],
)
def test_frozen_weights_stay_to_the_last_bit(
    root: Path, tmp_path: Path, asked: dict[str, Any], frozen: tuple[str, ...]
) -> None:
    trainer = begun(root, "classify", tmp_path / "run", max_steps=3, warmup_steps=0, **asked)
    before = states(trainer)
    finished(trainer)
    for name, value in states(trainer).items():
        # A key's bias shifts all scores of a query alike: it has no gradient.
        if "key.bias" not in name:
            assert torch.equal(value, before[name]) == any(part in name for part in frozen), name


def test_rates_by_depth(root: Path, tmp_path: Path) -> None:
    trainer = begun(root, "classify", tmp_path / "run", layerwise_lr_decay=0.5, weight_decay=0.2)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    seen = set()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            below = 3 if "embeddings" in name else 2 if ".0." in name else 1 if ".1." in name else 0
            assert group["peak"] == pytest.approx(5e-3 * 0.5**below), name
            assert group["weight_decay"] == (0 if "bias" in name or "LayerNorm" in name else 0.2)
    assert seen == set(names.values())
    before = states(trainer)
    trainer.run(lambda: "")
    moved = {name: float((p - before[name]).abs().max()) for name, p in states(trainer).items()}
    low, high = "bert.encoder.layer.0.output.dense.weight", "classifier.weight"
    assert 0 < moved[low] < moved[high]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_what_decays_is_what_decays_for_trainer(root: Path, tmp_path: Path, family: str) -> None:
    folder = tiny.save(tmp_path / family, family=family)
    trainer = begun(root, "classify", tmp_path / "run", model=str(folder))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decaying = {
        names[id(p)]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"]
    }
    arguments = TrainingArguments(str(tmp_path / "hf"), report_to="none", use_cpu=True)
    assert decaying == {
        *transformers.Trainer(trainer.model, arguments).get_decay_parameter_names(trainer.model)
    }


def test_dropout_reaches_the_modules(root: Path, tmp_path: Path) -> None:
    trainer = begun(
        root, "classify", tmp_path / "run", hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.2, classifier_dropout=0.3,
    )  # fmt: skip
    rates = {n: m.p for n, m in trainer.model.named_modules() if isinstance(m, nn.Dropout)}
    for name, rate in rates.items():
        wanted = 0.3 if name == "dropout" else 0.2 if "attention.self" in name else 0.1
        assert rate == wanted, name
    assert len(rates) == 8


# The loss of a step


def one_step(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a run's first step, before clipping."""
    trainer.model.train()
    loss = trainer._gradients()
    return loss, {
        n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None
    }


def features_of_first_step(trainer: Trainer) -> dict[str, Tensor]:
    (features,) = trainer._step_batches()
    return trainer.task.batch(features)


def assert_gradients(trainer: Trainer, loss: Tensor, found: dict[str, Tensor]) -> None:
    trainer.model.zero_grad()
    loss.backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["classify", "tag", "answer"])
def test_r_drop_is_the_loss_of_the_paper_halved(root: Path, tmp_path: Path, task: str) -> None:
    """Liang et al. 2021: both losses and alpha / 2 times both divergences, here over two."""
    trainer = begun(root, task, tmp_path / "run", rdrop_alpha=300.0, hidden_dropout_prob=0.3)
    torch.manual_seed(5)
    loss, found = one_step(trainer)
    batch = features_of_first_step(trainer)
    labels = batch.pop("labels")
    torch.manual_seed(5)
    means, logits = [], []
    for _ in range(2):
        options = {"fastbert_unpadded": True} if task == "answer" else {}
        output = trainer.model(**batch, **options)
        if task == "answer":
            both = torch.stack((output.start_logits, output.end_logits), 1).flatten(0, 1)
            wanted = labels.flatten()
        else:
            both = output.logits.flatten(0, -2)
            wanted = labels.flatten()
            both, wanted = both[wanted != -100], wanted[wanted != -100]
        means.append(F.cross_entropy(both, wanted))
        logits.append(both.softmax(-1))
    p, q = logits
    apart = [
        torch.where(a > 0, a * (a.clamp(min=1e-30) / b.clamp(min=1e-30)).log(), 0).sum(1).mean()
        for a, b in ((p, q), (q, p))
    ]
    assert float(apart[0]) > 1e-5
    whole = (means[0] + means[1]) / 2 + 300.0 / 4 * (apart[0] + apart[1])
    assert loss == pytest.approx(float(whole), rel=1e-4)
    assert_gradients(trainer, whole, found)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fgm_adds_the_gradient_at_moved_embeddings(
    root: Path, tmp_path: Path, accumulation: int
) -> None:
    trainer = begun(
        root, "classify", tmp_path / "run", fgm_epsilon=2.0,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    words = trainer.model.get_input_embeddings().weight
    before = words.detach().clone()
    loss, found = one_step(trainer)
    assert torch.equal(words, before)
    total, wanted = 0.0, {name: torch.zeros_like(p) for name, p in states(trainer).items()}
    for features in trainer._step_batches():
        batch = trainer.task.batch(features)
        labels = batch.pop("labels")
        for moved in (False, True):
            if moved:
                with torch.no_grad():
                    words += 2.0 * words.grad / words.grad.norm()
            trainer.model.zero_grad()
            mean = F.cross_entropy(trainer.model(**batch).logits, labels) / accumulation
            mean.backward()
            total += 0 if moved else float(mean.detach())
            for name, parameter in trainer.model.named_parameters():
                wanted[name] += parameter.grad
        with torch.no_grad():
            words.copy_(before)
    assert loss == pytest.approx(total, rel=1e-5)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_fgm_is_taken_back_where_memory_ends(root: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"fgm_epsilon": 2.0, "max_steps": 3, "warmup_steps": 0}
    whole = finished(begun(root, "classify", tmp_path / "whole", **asked))
    trainer = begun(root, "classify", tmp_path / "run", **asked)
    loss, seen = trainer._loss, []

    def full(batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch)
        if len(seen) == 2:  # at the moved embeddings
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(batch)

    trainer._loss = full  # type: ignore[method-assign]
    found = finished(trainer)
    assert trainer.split == 2
    assert found.losses[1] == pytest.approx(whole.losses[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_is_said_and_not_trained_on(
    root: Path, tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    """fp16 looks for its scale in silence, but not where the loss itself is none."""
    trainer = begun(root, "classify", tmp_path / "run", max_steps=20)
    trainer.dtype = dtype
    trainer.scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    loss = trainer._loss
    trainer._loss = lambda batch: loss(batch) * float("nan")  # type: ignore[method-assign]
    before = states(trainer)
    with pytest.raises(metrics.DivergedError, match="not finite in 3 steps in a row"):
        trainer.run(lambda: "")
    assert capsys.readouterr().err.count("the loss was not finite, update skipped") == 3
    for name, value in states(trainer).items():
        assert torch.equal(value, before[name]), name


def test_a_scale_that_is_too_large_is_none_of_it(root: Path, tmp_path: Path) -> None:
    trainer = begun(root, "classify", tmp_path / "run", max_steps=9)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, enabled=True)
    trainer.scaler.set_backoff_factor(2.0**-4)
    loss = trainer._loss
    trainer._loss = lambda batch: 1e6 * loss(batch)  # type: ignore[method-assign]
    finished(trainer)
    assert 9 > trainer.skipped > 3 and trainer.streak == 0


def test_checkpointing_gives_the_same_losses(root: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"max_steps": 4, "hidden_dropout_prob": 0.1, "warmup_steps": 0}
    found = []
    for name, more in (("plain", {}), ("less", {"gradient_checkpointing": True})):
        trainer = begun(root, "classify", tmp_path / name, **asked, **more)
        assert trainer.model.is_gradient_checkpointing == bool(more)
        found.append(list(finished(trainer).losses.values()))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_bf16_runs_near_fp32_with_weights_in_fp32(root: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"max_steps": 4, "warmup_steps": 0}
    one = finished(begun(root, "tag", tmp_path / "fp32", **asked))
    trainer = begun(root, "tag", tmp_path / "bf16", precision="bf16", **asked)
    other = finished(trainer)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert list(one.losses.values()) != list(other.losses.values())
    np.testing.assert_allclose(list(one.losses.values()), list(other.losses.values()), rtol=3e-2)


# Evaluation


def test_a_batch_that_does_not_fit_is_cut(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = list(finished(begun(root, "classify", tmp_path / "whole", max_steps=3)).losses.values())
    trainer = begun(root, "classify", tmp_path / "cut", max_steps=3)

    def full(_module: Any, _given: Any, named: dict[str, Any]) -> None:
        if len(named["input_ids"]) > 2 and trainer.model.training:
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.register_forward_pre_hook(full, with_kwargs=True)
    found = list(finished(trainer).losses.values())
    np.testing.assert_allclose(found, whole, rtol=1e-4)
    assert "out of memory: going on with 2 at a time" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["classify", "tag", "answer"])
def test_what_is_said_of_a_text_does_not_depend_on_others(
    root: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begun(root, task, tmp_path / "run")
    model = trainer.model.eval()
    alone = [infer(trainer.task, model, [one])[0][0] for one in trainer.train]
    sizes = [len(one) for one in batches(trainer.train, 60)]
    assert 1 < max(sizes) and len(sizes) > 2
    for tokens in (60, 2048):
        monkeypatch.setattr("fastbert.finetune.infer.TOKENS_PER_BATCH", {"cpu": tokens})
        together, loss = infer(trainer.task, model, trainer.train)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        assert loss is not None
        whole = trainer.task.batch(trainer.train)
        outputs = trainer.task.outputs(model, whole, True)
        mean = trainer.task.loss(outputs, whole) / trainer.task.items(whole)
        assert loss == pytest.approx(float(mean.detach()), rel=1e-5)


class _Scripted(Trainer):
    """A run whose evaluations are told."""

    accuracies: ClassVar[list[float]] = []

    def _evaluation(self) -> Any:
        found, predictions = super()._evaluation()
        if self.model.training is False and self.accuracies:
            found.metrics["accuracy"] = self.accuracies.pop(0)
        return found, predictions


@pytest.mark.parametrize(
    ("accuracies", "patience", "ends", "best"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.5, 0.5], 2, 4, 2),
        ([0.1, 0.3, 0.2, 0.4, 0.5, 0.5], 2, 6, 5),
        ([0.5, 0.4, 0.6, 0.1, 0.1, 0.1], 1, 2, 1),
        ([0.1, 0.3, 0.2, 0.2, 0.2, 0.9], 0, 6, 6),
    ],
)
def test_early_stopping(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracies: list[float],
    patience: int, ends: int, best: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(_Scripted, "accuracies", list(accuracies))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Trainer", _Scripted)
        trainer = begun(
            root, "classify", tmp_path / "run", max_steps=6, eval_steps=1,
            early_stopping_patience=patience,
        )  # fmt: skip
    kept = {}
    keep = trainer._keep

    def noted() -> None:
        keep()
        kept[trainer.step] = states(trainer)

    monkeypatch.setattr(trainer, "_keep", noted)
    trainer.run(lambda: "")
    assert (trainer.step, trainer.best["step"]) == (ends, best)
    assert trainer.best["value"] == accuracies[best - 1]
    saved = load_head(tmp_path / "run/hf", "SequenceClassification")
    for name, value in saved.named_parameters():
        assert torch.equal(value, kept[best][name])


def test_the_best_model_is_what_was_recorded(root: Path, tmp_path: Path) -> None:
    """Of runs beyond their best: metrics of hf/ anew, eval.json and metrics.jsonl agree."""
    for task, metric in (("classify", "loss"), ("tag", "f1"), ("answer", "loss")):
        run = tmp_path / task
        trainer = begun(
            root, task, run, num_train_epochs=5.0, learning_rate=2e-2, metric_for_best_model=metric
        )
        result = finished(trainer)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        values = {row["step"]: row[f"eval/{metric}"] for row in rows if f"eval/{metric}" in row}
        assert len(values) == 5
        chosen = (min if metric == "loss" else max)(values.values())
        assert values[result.best_step] == chosen
        assert result.metrics[metric] == pytest.approx(chosen, rel=1e-6)
        written = json.loads((run / "eval.json").read_text())
        assert written["metrics"][metric] == pytest.approx(chosen, rel=1e-6)
        model = load_head(run / "hf", HEADS[task])
        raws, loss = infer(trainer.task, model, trainer.eval, unpad=False)
        if task != "answer":  # whose loss without unpadding counts padding
            assert loss == pytest.approx(result.metrics["loss"], rel=1e-5)
        predictions = trainer.task.predictions(trainer.data.eval, trainer.eval, raws)
        again = trainer.task.evaluate(trainer.data.eval, trainer.eval, raws, predictions).metrics
        for name, value in again.items():
            assert value == pytest.approx(result.metrics[name], abs=1e-5), name


def test_metrics_that_may_choose_are_those_of_evaluations() -> None:
    for task, config in CONFIGS.items():
        kinds = [known for kind, known in metrics.METRICS.items() if kind.split()[0] == task]
        assert sorted(config.metrics) == sorted({name for known in kinds for name in known}), task


def test_epochs_and_steps_that_do_not_divide(root: Path, tmp_path: Path) -> None:
    """30 examples by 4 make 8 steps."""
    for number, (asked, steps, evaluated) in enumerate(
        (
            ({"max_steps": 11}, 11, [8, 11]),
            ({"max_steps": 11, "eval_steps": 3}, 11, [3, 6, 9, 11]),
            ({"num_train_epochs": 1.3}, 11, [8, 11]),
            ({"num_train_epochs": 0.01}, 1, [1]),
            ({"per_device_train_batch_size": 100, "num_train_epochs": 2.0}, 2, [1, 2]),
            ({"gradient_accumulation_steps": 100, "num_train_epochs": 2.0}, 2, [1, 2]),
        )
    ):
        run = tmp_path / str(number)
        result = finished(begun(root, "classify", run, **asked))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert result.steps == steps
        assert [row["step"] for row in rows if "eval/loss" in row] == evaluated
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))


def test_a_batch_without_a_labelled_word_changes_nothing(root: Path, tmp_path: Path) -> None:
    trainer = begun(root, "tag", tmp_path / "run", per_device_train_batch_size=1, max_steps=1)
    none = [dataclasses.replace(one, label=[-100] * len(one.label)) for one in trainer.train]
    trainer.train = none
    before = states(trainer)
    assert trainer._one_step() == 0.0
    assert trainer.skipped == 0
    for name, value in states(trainer).items():
        torch.testing.assert_close(value, before[name])


# LoRA


def test_lora_trains_adapters_and_head_alone(root: Path, tmp_path: Path) -> None:
    import peft

    run = tmp_path / "run"
    trainer = begun(root, "tag", run, lora_r=4, num_train_epochs=2.0, learning_rate=2e-2)
    before = states(trainer)
    finished(trainer)
    for name, value in states(trainer).items():
        trained = "lora_" in name or "modules_to_save" in name
        assert torch.equal(value, before[name]) != trained, name
    merged = load_head(run / "hf", "TokenClassification")
    base = transformers.AutoModelForTokenClassification.from_pretrained(
        root / "model", num_labels=len(trainer.task.labels)
    )
    adapted = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    batch = trainer.task.batch(trainer.eval)
    batch.pop("labels")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        ours, wanted = merged(**batch).logits, adapted(**batch).logits
    torch.testing.assert_close(ours[real], wanted[real], rtol=1e-4, atol=1e-5)
    plain = transformers.AutoModelForTokenClassification.from_pretrained(root / "model")
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(merged.state_dict()[query], plain.state_dict()[query])
    dense = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(merged.state_dict()[dense], plain.state_dict()[dense])


def test_lora_of_an_encoder_alone(root: Path, tmp_path: Path) -> None:
    pairs = [{"anchor": text, "positive": f"{text} good"} for text, _ in tiny.sentences(12)]
    train = tiny.write_rows(tmp_path / "pairs", pairs)
    result = tiny.run("embed", root / "model", train, tmp_path / "run", lora_r=2)
    assert (result.folder / "adapter/adapter_config.json").is_file()


def test_a_metric_that_such_labels_lack(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'best_f1': such labels are judged by f1, exact_match"):
        begun(root, "answer", tmp_path / "run", metric_for_best_model="best_f1")
    with pytest.raises(UserError, match="metric_for_best_model = 'f1': such labels"):
        begun(root, "classify", tmp_path / "run", metric_for_best_model="f1")


def test_a_loss_that_is_no_number_ends_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "infer", lambda *a, **b: (infer(*a, **b)[0], math.nan))
    trainer = begun(root, "tag", tmp_path / "run", max_steps=1)
    with pytest.raises(RunError, match="evaluation of step 1 is not a finite number"):
        trainer.run(lambda: "")
    assert not (tmp_path / "run" / "hf").exists()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("step", True, "step must be a count"),
        ("best", {"step": 1, "value": 0.5}, "best must be empty or have details, metrics"),
        ("begun_with", {"examples": ""}, "begun_with must have examples, model"),
        ("window", [0.0], "window and scale must be there"),
        ("seconds", None, "seconds must be a number"),
    ],
)
def test_what_no_checkpoint_says(name: str, value: Any, said: str) -> None:
    state = {
        "step": 1, "skipped": 0, "streak": 0, "stale": 0, "best": {},
        "begun_with": {"examples": "", "model": ""}, "window": [0.0, 0], "scale": None,
        "seconds": 1.0,
    }  # fmt: skip
    assert loop._what_is_wrong(state) == ""
    assert loop._what_is_wrong(state | {name: value}).startswith(said)
