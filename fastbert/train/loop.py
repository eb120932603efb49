"""Pre-training from raw text to a trained model: the straight line through every room.

A run's folder: config.toml, tokenizer/, data/ (token shards), metrics.jsonl, tensorboard/,
checkpoints/step-000010/, loss.png, hf/; and run.lock while a process works there.
"""

import dataclasses
import gc
import json
import math
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbert.config import ModelConfig, PretrainConfig, resolved
from fastbert.data.batch import Batch
from fastbert.data.pack import Packer, evaluation_batches
from fastbert.data.workers import BatchLoader, DevicePrefetcher
from fastbert.errors import RunError, UserError
from fastbert.schedules import changes, phase_at
from fastbert.train import checkpoint
from fastbert.train.build import build_step, described
from fastbert.train.callbacks import Callback, Callbacks, PretrainResult
from fastbert.train.device import check_threads, is_out_of_memory, what_fits
from fastbert.train.evaluate import (
    Evaluation,
    evaluate,
    fill_masks,
    sentences_to_show,
    unigram_log_probabilities,
)
from fastbert.train.graph import launcher
from fastbert.train.initial import ReadInitial
from fastbert.train.interrupts import interruptible, noting_signals
from fastbert.train.phases import is_of_another, use_dropout
from fastbert.train.prepare import (
    CheckTokenizer,
    Prepared,
    begin,
    check_request,
    check_sizes,
    held_run,
    prepare,
    restored_state,
    say,
    say_of_recipe,
    taken_back_on_failure,
)
from fastbert.train.report import Reporter
from fastbert.train.schedule import learning_rate
from fastbert.train.step import Metrics

Export = Callable[[Path, Mapping[str, Tensor], ModelConfig, Path], None]
_MAX_SKIPPED_IN_A_ROW = 3
_EVALUATED = 0.15  # of the held-out tokens, whatever is trained on: so losses can be compared


def pretrain(
    config: PretrainConfig,
    export: Export,
    check_tokenizer: CheckTokenizer | None = None,
    read_initial: ReadInitial | None = None,
    callbacks: Iterable[Callback] = (),
) -> PretrainResult:
    """Trains a BERT as `config` says and returns what the run found.

    Args:
        config: everything there is to set.
        export: writes the `hf/` folder: (folder, weights by name, model sizes, tokenizer folder).
        check_tokenizer: refuses, before the first step, a given tokenizer whose saved form is
            another: (the tokenizer, the folder it is saved in).
        read_initial: reads the weights of `init_from`; needed where that is set.
        callbacks: are told what the run logs, evaluates and saves, and may stop it.

    Raises:
        UserError: a bad request: missing files, a run already there or at work, a damaged
            checkpoint, a model that cannot fit.
        RunError: the run failed: disk full, three non-finite gradients in a row; or it was stopped
            by a signal and has saved itself.
        Interrupted: a signal came before or after the training, or a second one amid it.
        Exception: a callback raised it.
    """
    told = Callbacks(callbacks)
    if config.num_threads:
        check_threads(config.num_threads)
        torch.set_num_threads(config.num_threads)
    with interruptible(), held_run(config) as run:
        asked, config = config, resolved(dataclasses.replace(config, out=str(run)))
        check_request(config)
        assert read_initial is not None or not config.init_from
        restored = restored_state(config, run)
        with taken_back_on_failure(run):
            prepared = prepare(config, run, check_tokenizer, None if restored else read_initial)
            say_of_recipe(asked)
            trainer = _Trainer(config, run, prepared, restored, told)
        with noting_signals() as stop:
            trainer.run(stop)
        result = trainer.finish(export)
    told.call(lambda one: one.on_train_end(result))
    told.raise_error()
    return result


class _Trainer:
    """The state of a run between steps."""

    def __init__(
        self,
        config: PretrainConfig,
        run: Path,
        prepared: Prepared,
        restored: checkpoint.Checkpoint | None,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.folder, self.callbacks = config, run, callbacks
        self.sizes, self.execution = prepared.sizes, prepared.execution
        self.device, self.tokenizer = prepared.execution.device, prepared.tokenizer
        self.train_shards, self.validation_shards = prepared.train, prepared.validation
        self.step, state = (restored.step, restored.state) if restored else (0, {})
        self.tokens = state.get("tokens", 0)
        self.split = state.get("split", 1)
        """Parts that a batch is cut into for want of memory, each a micro-batch."""
        self.eval_split = 1
        """The same of the held-out batches, beyond `split`."""
        self.told_skipped = state.get("skipped", 0)
        self.loss, self.stopped = math.nan, False
        self.timed_tokens, self.timed_seconds = 0, 0.0
        self.evaluation: tuple[int, Evaluation] | None = None
        first = prepared.initial and partial(begin, config, prepared.initial, self.tokenizer)
        self.train_step = build_step(config, self.sizes, self.execution, first)
        self.model = self.train_step.model
        say(f"model: {described(self.model)}")
        self.launch = self._launcher()
        self.phases = config.phases()
        self.phase = phase_at(self.phases, self.step)
        use_dropout(self.model, self.phase)
        data = state.get("data")
        moved = data is not None and is_of_another(data["shape"], self.phase, self.phases)
        self.loader = self._open_data(data, adopt=moved)
        for note in self.loader.notes:
            say(f"data: {note}")
        self.eval_batches = self._evaluation_batches()
        counts = self.train_shards.token_counts(self.tokenizer.vocab_size)
        unigram = unigram_log_probabilities(counts, self.tokenizer.special_ids)
        self.unigram = unigram.to(self.device)
        if restored is not None:
            self._restore(restored)
        self.reporter = Reporter(
            run, self.step, config.max_steps, config.report_to == "tensorboard"
        )

    def _launcher(self) -> Callable[[Sequence[Batch]], None]:
        accumulates = self.split * self.config.gradient_accumulation_steps > 1
        return launcher(self.train_step, self.execution.graph, accumulates)

    # Data

    def _packing(self, max_seq_length: int, mlm_probability: float) -> dict[str, Any]:
        config = self.config
        return {
            "tokens_per_batch": config.tokens_per_batch // self.split,
            "max_seq_length": max_seq_length,
            "nsp": config.nsp,
            "short_seq_prob": config.short_seq_prob,
            "mlm_probability": mlm_probability,
            "whole_word_mask": config.whole_word_mask,
            "seed": config.seed,
        }

    def _open_data(self, state: dict[str, Any] | None, *, adopt: bool = False) -> DevicePrefetcher:
        """Batches from where `state` stands; `adopt` where that is of other shapes."""
        packing = self._packing(self.phase.max_seq_length, self.phase.mlm_probability)
        packer = Packer(self.train_shards, self.tokenizer.ids, **packing)
        if state is not None:
            (packer.adopt if adopt else packer.load_state_dict)(state)
        workers = self.config.dataloader_num_workers
        if workers is None:
            workers = int(self.device.type == "cuda")
        loader = BatchLoader(packer, workers, self.config.dataloader_prefetch_factor)
        loader.start()
        return DevicePrefetcher(loader, self.device)

    def _evaluation_batches(self) -> list[Batch]:
        if self.validation_shards is None:
            return []
        packing = self._packing(self.config.max_seq_length, _EVALUATED)
        packing["tokens_per_batch"] //= self.eval_split
        return evaluation_batches(
            self.validation_shards,
            self.tokenizer.ids,
            max_batches=self.config.max_eval_batches * self.eval_split,
            **packing,
        )

    def _next_phase(self) -> None:
        """Goes on as the schedules say from this step on."""
        before, self.phase = self.phase, phase_at(self.phases, self.step)
        if self.phase == before:
            return
        use_dropout(self.model, self.phase)
        if self.phase[:2] != before[:2]:  # other batches
            state = self.loader.state_dict()
            self.loader.close()
            self.loader = self._open_data(state, adopt=True)
        self.reporter.say(f"step {self.step}: {changes(before, self.phase)} from here")

    # Checkpoints

    def _restore(self, restored: checkpoint.Checkpoint) -> None:
        state = restored.state
        check_sizes(self.config, self.sizes, restored)
        try:
            self.train_step.load_state_dict(
                {"weights": restored.weights, "optimizer": restored.optimizer, "counters": state}
            )
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint of step {restored.step} does not fit this run: {error}"
            ) from None

    def _save(self) -> None:
        flat, optimizer = self.train_step.flat, self.train_step.optimizer
        if not all(bool(t.isfinite().all()) for t in (flat.master, *optimizer.moments)):
            raise RunError(
                f"step {self.step}: weights or moments are not finite, no checkpoint is written: "
                f"start a new run with a lower --learning-rate; {self._newest_checkpoint()}"
            )
        whole = self.train_step.state_dict()
        state = {
            **whole["counters"],
            "data": self.loader.state_dict(),
            "tokens": self.tokens,
            "split": self.split,
            "recipe": dataclasses.asdict(self.config),
            "sizes": dataclasses.asdict(self.sizes),
        }
        saved = checkpoint.save(
            self.folder,
            checkpoint.Checkpoint(self.step, whole["weights"], whole["optimizer"], state),
            self.config.save_total_limit,
        )
        self.callbacks.call(lambda one: one.on_save(self.step, saved))

    # The loop

    def run(self, stop_signal: Callable[[], str]) -> None:
        try:
            self._run(stop_signal)
        except BaseException:
            self.reporter.close()
            raise
        finally:
            self.loader.close()

    def _run(self, stop_signal: Callable[[], str]) -> None:
        config = self.config
        last = min(config.max_steps, config.stop_at_step or config.max_steps)
        saved_at = self.step if self.step else -1
        # On a GPU, reading what a step reports would wait for it.
        read_every = 1 if self.device.type == "cpu" else config.logging_steps
        self.callbacks.call(lambda one: one.on_train_begin(config, self.folder))
        if config.init_from and not self.step:
            self._save()  # from here on a resume needs nothing but the run's folder
            saved_at = 0
        started, tokens_before = time.perf_counter(), self.tokens
        rate = loss = None
        while self.step < last and not (stop_signal() or self.callbacks.stopped_by):
            self._next_phase()
            self._one_step()
            logs = self.step % config.logging_steps == 0 or self.step == last
            if logs or self.step % read_every == 0:
                metrics = self._read()
                loss = metrics.loss
            pause = time.perf_counter()
            if logs:
                rate = (self.tokens - tokens_before) / (pause - started)
                self.timed_tokens += self.tokens - tokens_before
                self.timed_seconds += pause - started
                started, tokens_before = pause, self.tokens
                self._log(metrics, rate)
            self.reporter.advance(loss, rate)
            if config.eval_steps and self.step % config.eval_steps == 0 and self.step < last:
                self._evaluate()
            if config.save_steps and self.step % config.save_steps == 0:
                self._save()
                saved_at = self.step
            started += time.perf_counter() - pause
        if self.step != saved_at:
            self._save()
        self.callbacks.raise_error()
        if stop_signal() and self.step < last:
            raise RunError(
                f"stopped by {stop_signal()} at step {self.step}; everything is saved: go on "
                f"with: fastbert pretrain --resume auto --out {shlex.quote(str(self.folder))}"
            )
        if self.step < last and self.callbacks.stopped_by:
            self.stopped = True
            self.reporter.say(f"step {self.step}: stopped by {self.callbacks.stopped_by}")
        if self.evaluation is None or self.evaluation[0] != self.step:
            self._evaluate()
        self.callbacks.raise_error()

    def _newest_checkpoint(self) -> str:
        newest = checkpoint.newest_folder(self.folder)
        return f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"

    def _one_step(self) -> None:
        position = self.loader.position
        while True:
            count = self.split * self.config.accumulation_at(self.step)
            batches = [next(self.loader) for _ in range(count)]
            try:
                self.launch(batches)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Handled here, where the exception no longer holds the step's tensors.
            del batches
            self._halve_micro_batch(json.loads(position))
            position = self.loader.position
        self.step += 1
        self.tokens += sum(batch.num_tokens for batch in batches)

    def _halve_micro_batch(self, data: dict[str, Any]) -> None:
        """Cuts each batch into twice as many parts: the step is the same, the memory half."""
        config, flat = self.config, self.train_step.flat
        T = config.tokens_per_batch // self.split
        if T % 2 or T // 2 < config.max_seq_length:
            raise RunError(
                f"out of memory with {T} tokens in a micro-batch, which cannot be halved: "
                f"{what_fits(self.sizes, self.execution.dtype, flat, self.device, T)}"
            )
        self.split *= 2
        self.train_step.abandon()
        self.launch = self._launcher()
        self._free_memory()
        self.reporter.say(
            f"step {self.step}: out of memory with {T} tokens in a micro-batch: going on with "
            f"{T // 2}, and twice as many in a step"
        )
        self.loader.close()
        self.loader = self._open_data(data, adopt=True)
        self.eval_batches = self._evaluation_batches()

    def _read(self) -> Metrics:
        """What the device counted; complains of skipped steps, and stops after three in a row."""
        metrics = self.train_step.read()
        skipped = metrics.skipped - self.told_skipped
        if skipped:
            self.told_skipped = metrics.skipped
            times = f" {skipped} times" if skipped > 1 else ""
            self.reporter.say(
                f"step {self.step}: the gradient was not finite{times}, update skipped"
            )
        if metrics.streak >= _MAX_SKIPPED_IN_A_ROW:
            raise RunError(
                f"the gradient was not finite in {metrics.streak} steps in a row, up to step "
                f"{self.step}: start a new run with a lower --learning-rate; "
                f"{self._newest_checkpoint()}"
            )
        return metrics

    def _log(self, metrics: Metrics, rate: float) -> None:
        logged = {
            "learning_rate": learning_rate(self.config, self.step - 1),
            "grad_norm": metrics.grad_norm,
            "tokens_per_second": rate,
            "tokens": self.tokens,
            "skipped_steps": metrics.skipped,
        }
        if metrics.loss_steps:
            self.loss = metrics.loss_sum / metrics.loss_steps
            logged = {"loss": self.loss, **logged}
        self.train_step.clear_window()
        row = {k: v for k, v in logged.items() if math.isfinite(v)}
        self.reporter.log(self.step, row)
        self.callbacks.call(lambda one: one.on_log(self.step, {**row}))

    def _evaluate(self) -> None:
        if not self.eval_batches:
            return
        result = self._evaluation()
        self.evaluation = self.step, result
        self.reporter.log(self.step, result.metrics())
        nsp = f", NSP accuracy {result.nsp_accuracy:.1%}" if self.config.nsp else ""
        self.reporter.say(
            f"step {self.step}: held-out MLM loss {result.mlm_loss:.3f} (unigram baseline "
            f"{result.unigram_loss:.3f}), accuracy {result.mlm_accuracy:.1%}{nsp}"
        )
        self.callbacks.call(lambda one: one.on_evaluate(self.step, result.metrics()))

    def _evaluation(self) -> Evaluation:
        """Scores the held-out batches; halves them where logits do not fit beside the step."""
        while True:
            try:
                return evaluate(self.model, self.eval_batches, self.unigram)
            except RuntimeError as error:
                T = self.eval_batches[0].input_ids.numel()
                if not is_out_of_memory(error) or T // 2 < self.config.max_seq_length:
                    raise
            self._free_memory()
            self.eval_split *= 2
            self.eval_batches = self._evaluation_batches()
            self.reporter.say(
                f"step {self.step}: out of memory in the evaluation of {T} tokens at a time: going "
                f"on with {T // 2}"
            )

    def _free_memory(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    # The end

    def finish(self, export: Export) -> PretrainResult:
        """Draws the loss, writes `hf/`, and shows what the model would say."""
        self.reporter.close()
        picture = self.reporter.draw()
        flat = self.train_step.flat
        hf_folder = self.folder / "hf"
        export(hf_folder, flat.views(flat.master), self.sizes, self.folder / "tokenizer")
        say(f"packing: {self.loader.fill:.2%} of each batch was real tokens")
        if self.validation_shards is not None:
            longest = self.config.max_seq_length - 2
            sentences = sentences_to_show(self.validation_shards, longest)
            for example in fill_masks(self.model, self.tokenizer, sentences):
                print(example)
        print(f"loss curve: {picture}")
        print(f"model: {hf_folder} (transformers.AutoModelForMaskedLM loads it)")
        return PretrainResult(
            folder=self.folder,
            hf=hf_folder,
            steps=self.step,
            skipped_steps=self.train_step.read().skipped,
            tokens=self.tokens,
            loss=self.loss,
            evaluation=self.evaluation[1] if self.evaluation else None,
            tokens_per_second=self.timed_tokens / self.timed_seconds if self.timed_seconds else 0.0,
            stopped=self.stopped,
        )
