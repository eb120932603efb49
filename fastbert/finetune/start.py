"""A model as its training begins: weights and head, dropout, what is frozen, LoRA."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbert.errors import UserError
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.needs import needs
from fastbert.finetune.tasks.base import Task, unnamed
from fastbert.hf.accelerate import accelerate, decelerate
from fastbert.hf.depths import depths
from fastbert.hf.load import (
    add_markers,
    begin_head,
    children_with_weights,
    dropout_changes,
    load_tokenizer,
    saved_head,
)


@dataclass
class Start:
    """A model to train.

    Attributes:
        model: with its head, or PEFT's model around it.
        depth: of each parameter that is trained, by name: 0 of embeddings, layers + 1 of the head.
        layers: of the encoder.
        notes: what is to be said.
    """

    model: Any
    depth: dict[str, int]
    layers: int
    notes: list[str]


def start(config: FinetuneConfig, task: Task, fresh: bool = False) -> Start:
    """Loads the model for a task that has learnt its labels.

    Args:
        config: of the task.
        task: with its labels.
        fresh: whether all weights are drawn, to see what the checkpoint's are worth.

    What is drawn comes from torch's generator, seeded as transformers' `set_seed(seed)` does, so
    that a head is the one that transformers would begin with.

    Raises:
        UserError: no model, one of a family that is not accelerated, or one with a head for other
            labels.
    """
    saved, saved_config = saved_head(config.model)
    changes = task.changes
    if config.new_head and not task.head:
        raise UserError(f"new_head: {task.name} trains the encoder alone: leave it out")
    goes_on = bool(task.head) and saved == task.head and not config.new_head
    if goes_on:
        changes = _agreed(config.model, task, saved_config, changes)
    changes |= dropout_changes(
        saved_config.model_type,
        task.head,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        classifier_dropout=config.classifier_dropout,
    )
    new_head = config.new_head and saved == task.head
    torch.manual_seed(config.seed)
    model: Any
    model, drawn = begin_head(config.model, task.head, changes, fresh, new_head=new_head)
    try:
        accelerate(model)
    except ValueError as error:
        raise UserError(f"{config.model}: {error}") from None
    markers = getattr(task, "markers", [])
    drawn_rows: list[int] = []
    if markers:
        known = load_tokenizer(config.model).get_vocab()  # another run may have added them
        add_markers(model, task.tokenizer, markers)
        new = [mark for mark in markers if mark not in known]
        drawn_rows = task.tokenizer.convert_tokens_to_ids(new)
    depth, layers = depths(model)
    if not config.unpad:
        decelerate(model)
    notes = [f"model: {config.model}: {_count(model.parameters())} weights, {layers} layers"]
    if fresh:
        notes.append("all weights are random")
    elif drawn:
        notes.append(f"new weights: {', '.join(drawn)}")
    elif goes_on:
        notes.append("its head goes on with its training")
    if markers:
        notes.append(f"tokens of their own: {', '.join(markers)}")
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it, and warns of the old name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.lora_r:
        model = _with_lora(config, model, drawn, drawn_rows)
        depth = {name: layers + 1 for name, _ in model.named_parameters()}
    else:
        _freeze(config, model, depth, layers)
        if drawn_rows and not model.get_input_embeddings().weight.requires_grad:
            notes.append(f"frozen as they were drawn: the embeddings of {', '.join(markers)}")
    trained = [p for p in model.parameters() if p.requires_grad]
    if len(trained) < len(list(model.parameters())):
        notes.append(f"trained: {_count(trained)} weights, the others are frozen")
    return Start(model, depth, layers, notes)


def _count(parameters: Any) -> str:
    return f"{sum(p.numel() for p in parameters):,}"


def _agreed(model: str, task: Task, saved: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The labels of a head that goes on with its training.

    Raises:
        UserError: they are not those of the data.
    """
    if not task.labels:
        return changes
    theirs = [str(saved.id2label[number]) for number in sorted(saved.id2label)]
    if sorted(theirs) == sorted(task.labels):
        task.labels = theirs  # in the order of the head's rows
        return task.changes
    if unnamed(theirs) and len(theirs) == len(task.labels):
        return changes
    raise UserError(
        f"{model} was trained for {_listed(theirs)}, and the data has {_listed(task.labels)}: "
        "give --new-head to begin with a fresh one"
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} label{'' if len(names) == 1 else 's'} ({shown})"


def _freeze(config: FinetuneConfig, model: nn.Module, depth: dict[str, int], layers: int) -> None:
    if config.freeze_layers > layers:
        raise UserError(f"freeze_layers = {config.freeze_layers}: the model has {layers} layers")
    frozen = config.freeze_layers if config.freeze_layers or config.freeze_embeddings else -1
    for name, parameter in model.named_parameters():
        if depth[name] <= frozen:
            parameter.requires_grad_(False)


def _with_lora(config: FinetuneConfig, model: Any, drawn: list[str], rows: list[int]) -> Any:
    """The model inside PEFT's, which trains adapters of query and value, the head and new rows."""
    peft = needs("peft")
    heads = children_with_weights(model)
    if any("pooler." in name for name in drawn):
        heads.append("pooler")  # else it would stay as it was drawn
    is_distilbert = model.config.model_type == "distilbert"
    targets = ["q_lin", "v_lin"] if is_distilbert else ["query", "value"]
    try:
        asked = peft.LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            modules_to_save=heads or None,
            trainable_token_indices=rows or None,
        )
        with warnings.catch_warnings():  # PEFT asks for what transformers 5 calls otherwise
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(model, asked)
    except ValueError as error:
        raise UserError(f"lora_r = {config.lora_r}: {error}") from None
