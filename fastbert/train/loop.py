"""Pre-training from raw text to a trained model: the straight line through every room.

A run's folder: config.toml, tokenizer/, data/ (token shards), metrics.jsonl, tensorboard/,
checkpoints/step-000010/, loss.png, hf/.
"""

import dataclasses
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.config import ModelConfig, PretrainConfig, model_config, resolved
from fastbert.data.pack import Packer, evaluation_batches
from fastbert.data.shards import Shards
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError, UserError
from fastbert.model.bert import Bert
from fastbert.train import checkpoint
from fastbert.train.device import Execution, choose_execution
from fastbert.train.evaluate import evaluate, fill_masks, unigram_log_probabilities
from fastbert.train.prepare import prepare_data, run_folder, say, taken_back_on_failure
from fastbert.train.report import Reporter
from fastbert.train.schedule import learning_rate
from fastbert.train.step import TrainStep, compile_model

Export = Callable[[Path, Mapping[str, Tensor], ModelConfig, Path], None]
_MAX_SKIPPED_IN_A_ROW = 3


def pretrain(config: PretrainConfig, export: Export) -> Path:
    """Trains a BERT as `config` says and returns the run's folder.

    Args:
        config: everything there is to set.
        export: writes the `hf/` folder: (folder, weights by name, model sizes, tokenizer folder).

    Raises:
        UserError: a bad request: missing files, a run already there, a damaged checkpoint.
        RunError: the run failed: disk full, three non-finite gradients in a row.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    run = run_folder(config)
    config = dataclasses.replace(resolved(config), out=str(run))
    choose_execution(config, _asked_model(config))  # a wrong device is told before the work
    restored = _restored(config, run)
    with taken_back_on_failure(run):
        trainer = _prepared(config, run, restored)
    with _graceful_stop() as stop:
        trainer.run(stop)
    trainer.finish(export)
    return run


def _prepared(
    config: PretrainConfig, run: Path, restored: checkpoint.Checkpoint | None
) -> "_Trainer":
    tokenizer, train_shards, validation_shards = prepare_data(config, run)
    sizes = _model_sizes(config, tokenizer)
    execution = choose_execution(config, sizes)
    if config.warmup_steps >= config.max_steps:
        say(
            f"warmup_steps = {config.warmup_steps} is not less than max_steps = "
            f"{config.max_steps}: the learning rate never reaches its peak"
        )
    for line in execution.reasons:
        say(line)
    return _Trainer(
        config, run, sizes, execution, tokenizer, train_shards, validation_shards, restored
    )


def _restored(config: PretrainConfig, run: Path) -> checkpoint.Checkpoint | None:
    if not config.resume:
        return None
    if config.resume == "auto":
        found = checkpoint.load_newest(run, say)
        if found is None:
            say(f"resume: {run} has no checkpoint yet, starting at step 0")
            return None
    else:
        found = checkpoint.load(Path(config.resume))
    for line in checkpoint.check_recipe(
        found.state["recipe"], dataclasses.asdict(config), f"the checkpoint of step {found.step}"
    ):
        say(f"resume: {line}")
    say(f"resume: going on from step {found.step}")
    return found


def _asked_model(config: PretrainConfig) -> ModelConfig:
    sizes = model_config(config.model)
    if config.max_seq_length > sizes.max_position_embeddings:
        raise UserError(
            f"max_seq_length = {config.max_seq_length} must be at most the model's "
            f"max_position_embeddings = {sizes.max_position_embeddings}"
        )
    if config.nsp and sizes.type_vocab_size < 2:
        raise UserError(
            f"model = {config.model!r} has type_vocab_size = {sizes.type_vocab_size}: sentence "
            "pairs need 2; give another model, or --no-nsp"
        )
    return sizes


def _model_sizes(config: PretrainConfig, tokenizer: WordPiece) -> ModelConfig:
    changes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if getattr(config, name) is not None:
            changes[name] = getattr(config, name)
    return dataclasses.replace(_asked_model(config), **changes)


@contextmanager
def _graceful_stop() -> Iterator[Callable[[], str]]:
    """Yields a function that names the first signal received; a second one interrupts at once."""
    received: list[str] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread: whoever runs us handles signals
            break
    try:
        yield lambda: received[0] if received else ""
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class _Trainer:
    """The state of a run between steps."""

    def __init__(
        self,
        config: PretrainConfig,
        run: Path,
        sizes: ModelConfig,
        execution: Execution,
        tokenizer: WordPiece,
        train_shards: Shards,
        validation_shards: Shards | None,
        restored: checkpoint.Checkpoint | None,
    ) -> None:
        self.config, self.folder, self.sizes, self.device = config, run, sizes, execution.device
        self.tokenizer, self.validation_shards = tokenizer, validation_shards
        self.model = self._build_model(execution)
        self.train_step = TrainStep(self.model, config, execution.dtype)
        packing: dict[str, Any] = {
            "tokens_per_batch": config.tokens_per_batch,
            "max_seq_length": config.max_seq_length,
            "nsp": config.nsp,
            "short_seq_prob": config.short_seq_prob,
            "mlm_probability": config.mlm_probability,
            "whole_word_mask": config.whole_word_mask,
            "seed": config.seed,
        }
        self.packer = Packer(train_shards, tokenizer.ids, **packing)
        for note in self.packer.notes:
            say(f"data: {note}")
        self.eval_batches = []
        if validation_shards is not None:
            self.eval_batches = evaluation_batches(
                validation_shards,
                tokenizer.ids,
                max_batches=config.max_eval_batches,
                num_slots=self.packer.N,
                **packing,
            )
        counts = train_shards.token_counts(tokenizer.vocab_size)
        self.unigram = unigram_log_probabilities(counts, tokenizer.special_ids).to(self.device)
        self.step = 0
        self.tokens = 0
        self.skipped = 0
        self.window = (0.0, 0)  # loss sum and steps since the last log line
        if restored is not None:
            self._restore(restored)
        self.reporter = Reporter(
            run, self.step, config.max_steps, config.report_to == "tensorboard"
        )

    def _build_model(self, execution: Execution) -> Bert:
        torch.manual_seed(self.config.seed)
        nsp = self.config.nsp
        model = Bert(self.sizes, execution.ops, pooler=nsp, mlm=True, next_sentence=nsp)
        model.to(execution.device)
        if execution.compile and execution.device.type == "cuda":
            compile_model(model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        say(
            f"model: {self.sizes.num_hidden_layers} layers x {self.sizes.hidden_size}, "
            f"{self.sizes.num_attention_heads} heads, vocabulary {self.sizes.vocab_size}, "
            f"{parameters / 1e6:.1f}M parameters"
        )
        return model

    # Checkpoints

    def _restore(self, restored: checkpoint.Checkpoint) -> None:
        flat, state = self.train_step.flat, restored.state
        sizes = dataclasses.asdict(self.sizes)
        for name, value in state["sizes"].items():
            if sizes[name] != value:
                raise UserError(
                    f"model = {self.config.model!r} has {name} = {sizes[name]}, but had {value} at "
                    f"the checkpoint of step {restored.step}: put it back, or start a new run"
                )
        try:
            with torch.no_grad():
                for name, view in flat.views(flat.master).items():
                    view.copy_(restored.weights[name])
            flat.write_back()
            self.train_step.optimizer.load_state_dict(restored.optimizer, state["updates"])
            self.packer.load_state_dict(state["data"])
            self.tokens, self.skipped = state["tokens"], state["skipped"]
            self.window = tuple(state["window"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint of step {restored.step} does not fit this run: {error}"
            ) from None
        self.step = restored.step

    def _save(self) -> None:
        flat, optimizer = self.train_step.flat, self.train_step.optimizer
        state = {
            "updates": optimizer.updates,
            "data": self.packer.state_dict(),
            "tokens": self.tokens,
            "skipped": self.skipped,
            "window": self.window,
            "recipe": dataclasses.asdict(self.config),
            "sizes": dataclasses.asdict(self.sizes),
        }
        checkpoint.save(
            self.folder,
            checkpoint.Checkpoint(
                self.step, flat.views(flat.master), optimizer.state_dict(), state
            ),
            self.config.save_total_limit,
        )

    # The loop

    def run(self, stop_signal: Callable[[], str]) -> None:
        config = self.config
        last = min(config.max_steps, config.stop_at_step or config.max_steps)
        saved_at = self.step if self.step else -1
        try:
            started, tokens_before = time.perf_counter(), self.tokens
            skipped_in_a_row = 0
            rate = loss = None
            while self.step < last and not stop_signal():
                loss, updated = self._one_step()
                skipped_in_a_row = 0 if updated else skipped_in_a_row + 1
                if skipped_in_a_row == _MAX_SKIPPED_IN_A_ROW:
                    raise RunError(
                        f"the gradient was not finite in {skipped_in_a_row} steps in a row, up to "
                        f"step {self.step}: start a new run with a lower --learning-rate; "
                        f"{self._newest_checkpoint()}"
                    )
                if self.step % config.logging_steps == 0 or self.step == last:
                    now = time.perf_counter()
                    rate = (self.tokens - tokens_before) / (now - started)
                    started, tokens_before = now, self.tokens
                    self._log(rate)
                self.reporter.advance(loss, rate)
                pause = time.perf_counter()
                if config.eval_steps and self.step % config.eval_steps == 0 and self.step < last:
                    self._evaluate()
                if config.save_steps and self.step % config.save_steps == 0:
                    self._save()
                    saved_at = self.step
                started += time.perf_counter() - pause
            if self.step != saved_at:
                self._save()
            if stop_signal() and self.step < last:
                raise RunError(
                    f"stopped by {stop_signal()} at step {self.step}; everything is saved: go on "
                    f"with: fastbert pretrain --resume auto --out {shlex.quote(str(self.folder))}"
                )
            self._evaluate()
        except BaseException:
            self.reporter.close()
            raise

    def _newest_checkpoint(self) -> str:
        newest = checkpoint.newest_folder(self.folder)
        return f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"

    def _one_step(self) -> tuple[float, bool]:
        batches = [next(self.packer) for _ in range(self.config.gradient_accumulation_steps)]
        result = self.train_step(
            [batch.to(self.device) for batch in batches],
            self.step,
            learning_rate(self.config, self.step),
        )
        self.step += 1
        self.tokens += sum(batch.num_tokens for batch in batches)
        if result.updated:
            self.window = (self.window[0] + result.loss, self.window[1] + 1)
        else:
            self.skipped += 1
            self.reporter.say(f"step {self.step}: the gradient was not finite, update skipped")
        return result.loss, result.updated

    def _log(self, rate: float) -> None:
        metrics = {
            "learning_rate": learning_rate(self.config, self.step - 1),
            "tokens_per_second": rate,
            "tokens": self.tokens,
            "skipped_steps": self.skipped,
        }
        loss_sum, steps = self.window
        if steps:
            metrics = {"loss": loss_sum / steps, **metrics}
        self.window = (0.0, 0)
        self.reporter.log(self.step, metrics)

    def _evaluate(self) -> None:
        if not self.eval_batches:
            return
        result = evaluate(self.model, self.eval_batches, self.unigram)
        self.reporter.log(self.step, result.metrics())
        nsp = f", NSP accuracy {result.nsp_accuracy:.1%}" if self.config.nsp else ""
        self.reporter.say(
            f"step {self.step}: held-out MLM loss {result.mlm_loss:.3f} (unigram baseline "
            f"{result.unigram_loss:.3f}), accuracy {result.mlm_accuracy:.1%}{nsp}"
        )

    # The end

    def finish(self, export: Export) -> None:
        """Draws the loss, writes `hf/`, and shows what the model would say."""
        self.reporter.close()
        picture = self.reporter.draw()
        flat = self.train_step.flat
        hf_folder = self.folder / "hf"
        export(hf_folder, flat.views(flat.master), self.sizes, self.folder / "tokenizer")
        say(f"packing: {self.packer.fill:.2%} of each batch was real tokens")
        for example in fill_masks(self.model, self.tokenizer, self._held_out_sentences()):
            print(example)
        print(f"loss curve: {picture}")
        print(f"model: {hf_folder} (transformers.AutoModelForMaskedLM loads it)")

    def _held_out_sentences(self, wanted: int = 4) -> list[list[int]]:
        shards = self.validation_shards
        if shards is None:
            return []
        longest = min(24, self.config.max_seq_length - 2)
        lengths = shards.sentence_lengths
        fitting = np.flatnonzero((lengths >= 8) & (lengths <= longest))
        if not len(fitting):
            fitting = np.argsort(-lengths, kind="stable")[:wanted]  # cut to what fits
        stride = max(1, len(fitting) // wanted)
        offsets = shards.sentence_offsets
        return [
            shards.tokens(offsets[index], offsets[index + 1])[:longest].tolist()
            for index in fitting[::stride][:wanted]
        ]
