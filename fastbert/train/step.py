"""One optimizer step: forward and backward over its micro-batches, then the update.

Nothing here asks the device for an answer: counts, loss, schedule and the decision to skip an
update stay on it, and `read` fetches them when the loop wants to log. So the same lines run eagerly
and are recorded by `fastbert.train.graph`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert.config import PretrainConfig
from fastbert.data.batch import Batch
from fastbert.model.bert import Bert
from fastbert.train.optimizer import flat_parameters, make_optimizer
from fastbert.train.schedule import learning_rate

# Micikevicius et al. 2018, section 3.2, with the constants of torch.amp.GradScaler.
_FIRST_SCALE, _SCALE_UP_AFTER = 2.0**16, 2000


@dataclass(frozen=True)
class Metrics:
    """What the device counted, read at one moment."""

    loss: float  # of the last step: MLM + next-sentence, nats
    loss_sum: float  # over the steps since `clear_window` whose update was made
    loss_steps: int  # how many those are
    grad_norm: float  # of the last step, before clipping
    updates: int
    skipped: int  # steps whose gradient was not finite, in all
    streak: int  # the longest row of skipped steps since `clear_window`
    loss_scale: float  # 1 but in fp16


def model_inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor]:
    """What the encoder and the masked-word head read of a batch, in `Bert.predict`'s order."""
    return (
        batch.input_ids, batch.token_type_ids, batch.position_ids,
        batch.cu_seqlens, batch.max_seqlen, batch.masked_positions,
    )  # fmt: skip


class TrainStep:
    """The training step of a model over flat buffers.

    Losses are means over all masked tokens and all labelled sequences of the step, so splitting a
    batch over more micro-batches changes nothing but rounding. A loss or gradient that is not
    finite never reaches the weights. Dropout's counter and the schedule advance all the same.
    `fastbert.make_step` makes one for a device.

    Args:
        model: on its device.
        config: the recipe, resolved.
        dtype: of the weights in use; fp16 gets dynamic loss scaling.
        main_grads: see `FlatParameters`; off for a model compiled with torch.compile.

    Attributes:
        model: trained in place; its parameters are the weights in use, in `dtype`.
        done: steps that calls have begun, those before a `load_state_dict` included.
        launch: what a call does with its batches instead of `eager`.
        notes: how it runs and why, one line each.
    """

    def __init__(
        self,
        model: Bert,
        config: PretrainConfig,
        dtype: torch.dtype = torch.float32,
        *,
        main_grads: bool = True,
    ) -> None:
        self.model, self.config = model, config
        self.done = 0
        self.notes: tuple[str, ...] = ()
        self.launch: Callable[[Sequence[Batch]], None] | None = None
        self.flat = flat_parameters(model, config, dtype, main_grads=main_grads)
        self.optimizer = make_optimizer(self.flat, config, model.ops)
        device = self.flat.master.device

        def scalar(value: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=device)

        rates = [learning_rate(config, step) for step in range(config.max_steps)]
        self._rates = torch.tensor(rates, dtype=torch.float32, device=device)
        self._step = scalar(0, torch.int64)
        self._micro_batches = scalar(0, torch.int64)
        self._micro_batches_before = scalar(0, torch.int64)  # when the step began
        self._denominators = torch.ones(2, device=device)  # masked tokens, labelled sequences
        self._loss = scalar(0, torch.float32)
        self._loss_sum, self._loss_steps = scalar(0, torch.float64), scalar(0, torch.int64)
        self._run, self._streak = scalar(0, torch.int64), scalar(0, torch.int64)
        self._scaling = dtype == torch.float16
        self._scale = scalar(_FIRST_SCALE if self._scaling else 1, torch.float32)
        self._good_steps = scalar(0, torch.int64)
        model.seed_dropout(config.seed, 0)

    def __call__(self, batches: Sequence[Batch]) -> None:
        """Trains on the micro-batches of one step."""
        (self.launch or self.eager)(batches)
        self.done += 1

    def __reduce__(self) -> str:
        raise TypeError("a TrainStep is neither copied nor pickled: take its state_dict()")

    def eager(self, batches: Sequence[Batch]) -> None:
        """One step on batches that lie on the model's device, launched kernel by kernel."""
        self.begin(batches)
        self.flat.forget_gradients()
        for batch in batches:
            self.accumulate(batch)
        self.update()

    @torch.no_grad()
    def begin(self, batches: Sequence[Batch]) -> None:
        """Counts what the losses of the step are means over."""
        self._denominators.zero_()
        for batch in batches:
            for index, labels in enumerate((batch.masked_labels, batch.next_sentence_labels)):
                self._denominators[index] += (labels != -100).sum()
        self._denominators.clamp_(min=1)
        self._micro_batches_before.copy_(self._micro_batches)
        self._loss.zero_()

    def accumulate(self, batch: Batch) -> None:
        """Forward and backward of one micro-batch; its gradient is added to `flat.grad`."""
        sums = self.model.train()(
            *model_inputs(batch), batch.masked_labels, batch.next_sentence_labels
        )
        loss = sums.mlm / self._denominators[0] + sums.next_sentence / self._denominators[1]
        (loss * self._scale if self._scaling else loss).backward()
        self.flat.collect_gradients()
        with torch.no_grad():
            self._loss += loss
            self._micro_batches += 1
            self.model.advance_dropout()

    @torch.no_grad()
    def update(self) -> None:
        """The optimizer's update, and everything that counts steps."""
        optimizer = self.optimizer
        torch.index_select(self._rates, 0, self._step.view(1), out=optimizer.lr.view(1))
        # A loss that is not finite makes the scale NaN, and so skips the update.
        optimizer.update(self._scale + 0 * self._loss)
        good = optimizer.grad_norm.isfinite()
        self._loss_sum += torch.where(good, self._loss, 0)
        self._loss_steps += good
        # In fp16 an overflow is how the scale is found; only at scale 1 is it the model's fault.
        bad = ~good & (self._scale <= 1)
        self._run.copy_(torch.where(bad, self._run + 1, 0))
        torch.maximum(self._streak, self._run, out=self._streak)
        if self._scaling:
            self._good_steps.copy_(torch.where(good, self._good_steps + 1, 0))
            grown = torch.where(self._good_steps % _SCALE_UP_AFTER == 0, 2.0, 1.0)
            self._scale.mul_(torch.where(good, grown, 0.5)).clamp_(min=1)
        self._step += 1

    @torch.no_grad()
    def abandon(self) -> None:
        """Forgets a step that was broken off, memory and all; the next call begins it anew."""
        for parameter in self.model.parameters():
            parameter.grad = None
        self._micro_batches.copy_(self._micro_batches_before)
        self.model.dropout_state[:, 1] = self._micro_batches_before

    def read(self) -> Metrics:
        """Fetches the counters: the one place that waits for the device."""
        optimizer = self.optimizer
        found = (
            self._loss, self._loss_sum, self._loss_steps, optimizer.grad_norm,
            optimizer.updates, optimizer.skipped, self._streak, self._scale,
        )  # fmt: skip
        numbers = torch.stack([value.double() for value in found]).tolist()
        whole = {2, 4, 5, 6}
        return Metrics(*(int(n) if index in whole else n for index, n in enumerate(numbers)))

    def clear_window(self) -> None:
        """Begins a new mean of the loss, and a new longest streak."""
        self._loss_sum.zero_()
        self._loss_steps.zero_()
        self._streak.copy_(self._run)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on but the data; waits for the device.

        Returns:
            `weights` (fp32, by the model's parameter names) and `optimizer` (its moments): tensors
            that the next step changes in place; `counters`: what JSON can hold.
        """
        metrics = self.read()
        counters = {
            "updates": metrics.updates,
            "skipped": metrics.skipped,
            "window": [metrics.loss_sum, metrics.loss_steps],
            "streak": int(self._run),
            "micro_batches": int(self._micro_batches),
            "loss_scale": [metrics.loss_scale, int(self._good_steps)] if self._scaling else None,
        }
        weights = self.flat.views(self.flat.master)
        return {"weights": weights, "optimizer": self.optimizer.state_dict(), "counters": counters}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies weights by the model's parameter names; others are passed over.

        Raises:
            KeyError: one is missing.
            RuntimeError: one has another shape.
        """
        for name, view in self.flat.views(self.flat.master).items():
            view.copy_(weights[name])
        self.flat.write_back()

    @torch.no_grad()
    def load_state_dict(self, whole: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, with the same next step bit for bit.

        Raises:
            KeyError, UserError: something is missing.
            RuntimeError: a tensor has another shape.
        """
        state = whole["counters"]
        self.set_weights(whole["weights"])
        self.optimizer.load_state_dict(whole["optimizer"], state["updates"], state["skipped"])
        self.done = state["updates"] + state["skipped"]
        self._step.fill_(self.done)
        self._loss_sum.fill_(state["window"][0])
        self._loss_steps.fill_(state["window"][1])
        self._run.fill_(state["streak"])
        self._streak.fill_(state["streak"])
        self._micro_batches.fill_(state["micro_batches"])
        self.model.seed_dropout(self.config.seed, state["micro_batches"])
        if self._scaling and state["loss_scale"] is not None:
            self._scale.fill_(state["loss_scale"][0])
            self._good_steps.fill_(state["loss_scale"][1])


def compile_model(model: Bert) -> None:
    """Compiles each layer and the masked-word head in place with torch.compile.

    Layers are compiled one by one, so the first serves all of the same shape (the last one differs:
    it keeps masked and [CLS] rows only). Embeddings stay eager: a compiled scatter of their
    gradient adds in whatever order threads arrive.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 256)  # one code for each phase and shape
    for layer in model.layers:
        layer.compile(dynamic=False, fullgraph=True)
    if model.mlm is not None:
        model.mlm.compile(dynamic=False, fullgraph=True)
