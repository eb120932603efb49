"""A training step from settings: the model, where it computes, and how a step is launched.

`build_step` is what a run uses, `make_step` what people with a loop of their own do.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastbert.config import ModelConfig, PretrainConfig, model_config, resolved
from fastbert.data.batch import Batch
from fastbert.errors import UserError
from fastbert.model.bert import Bert
from fastbert.model.embeddings import sinusoids
from fastbert.schedules import phase_at
from fastbert.settings import show
from fastbert.train.device import Execution, check_memory, choose_execution
from fastbert.train.graph import launcher
from fastbert.train.phases import use_dropout
from fastbert.train.step import TrainStep, compile_model


def build_step(
    config: PretrainConfig,
    sizes: ModelConfig,
    execution: Execution,
    begin: Callable[[Bert], None] | None = None,
) -> TrainStep:
    """The step of a fresh model on its device; `config.seed` decides the weights.

    Args:
        config: the recipe, resolved.
        sizes: of the model.
        execution: as `choose_execution` has chosen it.
        begin: gives the model other weights before anything is made of them.
    """
    # On a CPU, ops compile their own pieces.
    compiled = execution.compile and execution.device.type == "cuda"
    torch.manual_seed(config.seed)
    model = Bert(
        sizes,
        execution.ops,
        pooler=config.nsp,
        next_sentence=config.nsp,
        gradient_checkpointing=config.gradient_checkpointing,
        last_layer_masked_only=config.last_layer_masked_only,
    )
    if config.position_init == "sinusoidal":  # drawn all the same, for the bits of what follows
        table = model.embeddings.position
        with torch.no_grad():
            table.copy_(sinusoids(len(table), sizes.hidden_size, sizes.initializer_range))
    model.to(execution.device)
    use_dropout(model, config.phases()[0])
    if begin is not None:
        begin(model)
    if compiled:
        compile_model(model)
    return TrainStep(model, config, execution.dtype, main_grads=not compiled)


def described(model: Bert) -> str:
    """Its sizes in a line."""
    sizes, parameters = model.config, sum(one.numel() for one in model.parameters())
    return (
        f"{sizes.num_hidden_layers} layers x {sizes.hidden_size}, {sizes.num_attention_heads} "
        f"heads, vocabulary {sizes.vocab_size}, {parameters / 1e6:.1f}M parameters"
    )


def unused_position_init(config: PretrainConfig) -> tuple[str, ...]:
    """A line for the log where the weights to begin with bring a position table."""
    if config.position_init == "normal":
        return ()
    return (f"position_init = {config.position_init!r} is not used: the position table is given",)


def make_step(config: PretrainConfig, model: ModelConfig | Bert | None = None) -> TrainStep:
    """The training step of `fastbert pretrain`, for a loop of your own.

    Device, precision, ops, compiling and CUDA graph are chosen as `fastbert pretrain` chooses them,
    by the same settings; `step.notes` says what was chosen and why. Of the other settings it reads
    those of the model and the optimizer, the schedules of dropout and learning rate, and `seed`;
    `tokens_per_batch`, `max_seq_length` and `mlm_probability` tell how much memory a step will
    need, as the batches are yours. With `nsp`, they need next-sentence labels. torch's global seed
    is set, as by a run.

    A call of the step takes the micro-batches of one optimizer step, `gradient_accumulation_steps`
    at most, from the CPU or the model's device, and returns without waiting for the device:

        step = fastbert.make_step(fastbert.PretrainConfig(max_steps=100, nsp=False))
        step([batch])
        step.read().loss

    Args:
        config: the settings.
        model: sizes to use instead of those of `config.model`, for a vocabulary of your own; or a
            `Bert` to go on from, such as `load_pretrained(folder)`, whose weights are copied. Heads
            that the settings do not train are left out.

    Raises:
        UserError: settings, sizes and device do not fit each other, the model cannot fit the
            memory, or a `Bert` lacks a head that the settings train.
        ValueError: raised by the step: more micro-batches or steps than the settings say, or a
            batch that the model cannot take.
        TypeError: raised by the step: it was given something else than a list of batches, or is to
            be copied or pickled.
    """
    if not isinstance(config, PretrainConfig):
        raise UserError("config must be a fastbert.PretrainConfig")
    if not isinstance(model, ModelConfig | Bert | None):
        raise UserError(
            f"model must be sizes, as model_config(name) gives them, or a Bert, as "
            f"load_pretrained(folder) does: not {show(model)}"
        )
    config = resolved(config)
    given = model.config if isinstance(model, Bert) else model
    if given is None and config.init_from:
        raise UserError("init_from is read by pretrain: give load_pretrained(folder) as the model")
    sizes = config.initialized(given or model_config(config.sizes_from))
    if config.nsp and sizes.type_vocab_size < 2:
        raise UserError(
            f"type_vocab_size = {sizes.type_vocab_size}: sentence pairs need 2; or nsp = False"
        )
    execution = choose_execution(config, sizes)
    check_memory(config, sizes, execution.device, execution.dtype)
    step = build_step(config, sizes, execution)
    step.notes = execution.reasons
    if isinstance(model, Bert):
        weights = dict(model.named_parameters())
        lost = [name for name in step.flat.names if name not in weights]
        if lost:
            optional = lost[0].startswith(("pooler.", "next_sentence."))
            instead = ", or nsp = False" if optional else ""
            raise UserError(f"the model has no {lost[0]}: give one with it{instead}")
        step.set_weights(weights)
        step.notes += unused_position_init(config)
    # What the step holds may not hold it: its memory is free as soon as nobody has it.
    itself: Any = weakref.proxy(step)
    accumulates = config.gradient_accumulation_steps > 1
    recording = launcher(itself, True, accumulates) if execution.graph else None

    phases = config.phases()

    def launch(batches: Sequence[Batch]) -> None:
        _check(itself, batches)
        use_dropout(itself.model, phase_at(phases, itself.done))
        moved = [batch.to(execution.device, non_blocking=True) for batch in batches]
        (recording or itself.eager)(moved)

    step.launch = launch
    return step


def _check(step: TrainStep, batches: Sequence[Batch]) -> None:
    """What would otherwise be an index beyond a table; reads only what lies on the host."""
    if not isinstance(batches, Sequence) or not all(isinstance(one, Batch) for one in batches):
        raise TypeError("a step takes a list of fastbert.Batch: step([batch])")
    config, sizes = step.config, step.model.config
    most = config.gradient_accumulation_steps
    if not 1 <= len(batches) <= most:
        raise ValueError(
            f"{len(batches)} micro-batches in a step: gradient_accumulation_steps = {most} allows "
            f"{'1' if most == 1 else f'1 to {most}'}"
        )
    if step.done >= config.max_steps:
        raise ValueError(f"max_steps = {config.max_steps} steps are done: the schedule ends there")
    on_host = [batch for batch in batches if batch.input_ids.device.type == "cpu"]
    labels = [batch.next_sentence_labels for batch in on_host]
    if config.nsp and step.done == 0 and labels and bool((torch.cat(labels) == -100).all()):
        raise ValueError("no sequence has a next-sentence label: give some, or nsp = False")
    for batch in batches:
        if batch.max_seqlen > sizes.max_position_embeddings:
            raise ValueError(
                f"max_seqlen = {batch.max_seqlen} must be at most max_position_embeddings = "
                f"{sizes.max_position_embeddings}"
            )
    for batch in on_host:
        T, S, starts = len(batch.input_ids), batch.max_seqlen, batch.cu_seqlens
        lengths = starts.diff()
        if starts[0] != 0 or starts[-1] != T or lengths.min() < 0 or lengths.max() > S:
            raise ValueError(f"cu_seqlens must rise from 0 to {T}, by max_seqlen = {S} at most")
        tables = (
            ("input_ids", sizes.vocab_size),
            ("masked_labels", sizes.vocab_size),
            ("token_type_ids", sizes.type_vocab_size),
            ("position_ids", sizes.max_position_embeddings),
            ("masked_positions", T),
            ("next_sentence_labels", 2),
        )
        for name, size in tables:
            values = getattr(batch, name)
            values = values[values != -100] if name.endswith("labels") else values
            lowest, highest = values.aminmax() if len(values) else (0, 0)
            wrong = int(lowest if lowest < 0 else highest)
            if not 0 <= wrong < size:
                raise ValueError(f"{name} has {wrong}: it must be 0 to {size - 1} in this model")
