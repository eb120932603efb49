"""One seed of a speedrun: trained by `fastbert.pretrain`, measured on text that it never sees.

The clock and the energy counter stand still while checkpoints are written and measured.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.commands.pretrain import pretrain
from fastbert.config import ModelConfig, PretrainConfig
from fastbert.data.batch import Batch
from fastbert.data.pack import evaluation_batches
from fastbert.data.shards import Shards, build_shards
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError
from fastbert.hf.initial import load_pretrained
from fastbert.hf.load import load_model
from fastbert.model.bert import Bert
from fastbert.train import checkpoint
from fastbert.train.callbacks import Callback
from fastbert.train.evaluate import evaluate
from fastbert.train.step import model_inputs
from fastbert_bench.measure.energy import EnergyMeter

POINTS = 10
"""Measurements of a run: after a tenth of its steps, and so on."""
HELD_OUT = ("choose", "report")
EVALUATED = 24
"""Batches of each held-out part: some 7,300 masked tokens."""
BATCH = 2048
"""Tokens of one of them, at sequences of 128; more where sequences are longer."""
SEED = 0
"""Of pairs and masks."""
PARITY = 1e-5
"""Most by which logits in transformers may differ from ours, as a share of the largest."""


class Point(NamedTuple):
    """What a run had reached after so many steps."""

    step: int
    tokens: int
    seconds: float
    joules: float | None  # None where no counter is read
    choose: float  # nats, MLM loss
    report: float


def held_out_batches(
    texts: Mapping[str, Path], tokenizer: WordPiece, max_seq_length: int
) -> dict[str, list[Batch]]:
    """Batches of each held-out part, the same for every recipe: 15% fixed masks, sentence pairs.

    Pairs are what the classic recipe reads. A recipe without them meets a form that it has not
    seen, so the comparison favours the classic one.

    Args:
        texts: the file of each part.
        tokenizer: of the track.
        max_seq_length: tokens.
    """
    made = {}
    for part in HELD_OUT:
        with tempfile.TemporaryDirectory() as folder:
            shards = Path(folder) / part
            build_shards(
                str(texts[part]), tokenizer, shards, validation_fraction=0, seed=SEED,
                progress=False,
            )  # fmt: skip
            made[part] = evaluation_batches(
                Shards.open(shards, "train"), tokenizer.ids, max_batches=EVALUATED,
                tokens_per_batch=max(BATCH, 4 * max_seq_length), max_seq_length=max_seq_length,
                nsp=True, mlm_probability=0.15, seed=SEED,
            )  # fmt: skip
    return made


class Watch(Callback):
    """Measures each checkpoint of a run; the points stand in a file, and a run goes on from them.

    Attributes:
        points: so far.
    """

    def __init__(
        self, held_out: Mapping[str, Sequence[Batch]], file: Path, device: torch.device
    ) -> None:
        self._held_out, self._file, self._device = held_out, file, device
        self._meter = EnergyMeter(device)
        self.points: list[Point] = []
        if file.exists():
            self.points = [Point(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
        last = self.points[-1] if self.points else Point(0, 0, 0.0, 0.0, 0.0, 0.0)
        self._tokens, self._seconds, self._joules = last.tokens, last.seconds, last.joules or 0.0
        self._mark = 0.0

    def on_train_begin(self, config: PretrainConfig, folder: Path) -> None:
        """Begins to count."""
        self._mark = self._meter.joules()

    def on_log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds what the steps since the last time have taken."""
        self._seconds += (metrics["tokens"] - self._tokens) / metrics["tokens_per_second"]
        self._tokens = int(metrics["tokens"])
        joules = self._meter.joules()
        self._joules += joules - self._mark
        self._mark = joules

    def on_save(self, step: int, folder: Path) -> None:
        """Measures the checkpoint."""
        losses = measured(folder, self._held_out, self._device)
        joules = None if self._meter.why_not else self._joules
        self.points.append(Point(step, self._tokens, self._seconds, joules, **losses))
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps([one._asdict() for one in self.points]), encoding="utf-8")
        os.replace(part, self._file)
        self._mark = self._meter.joules()


@torch.no_grad()
def measured(
    folder: Path, held_out: Mapping[str, Sequence[Batch]], device: torch.device
) -> dict[str, float]:
    """The MLM losses of a run's checkpoint, in fp32 and without any setting of the run."""
    found = checkpoint.load(folder)
    model = Bert(ModelConfig(**found.state["sizes"]), pooler=False, next_sentence=False)
    for name, parameter in model.named_parameters():
        parameter.copy_(found.weights[name])
    model.to(device)
    nothing = torch.zeros(model.config.vocab_size, device=device)
    return {part: evaluate(model, batches, nothing).mlm_loss for part, batches in held_out.items()}


def run_seed(
    config: PretrainConfig,
    held_out: Mapping[str, Sequence[Batch]],
    points: Path,
    device: torch.device,
) -> list[Point]:
    """Trains one seed, or goes on with it, and returns its points.

    Args:
        config: the run's settings.
        held_out: as `held_out_batches` makes them.
        points: the file that keeps them.
        device: that the run computes on.

    Raises:
        FastbertError: as `fastbert.pretrain`.
        RunError: the exported checkpoint is not the same model to transformers.
    """
    watch = Watch(held_out, points, device)
    result = pretrain(config, [watch])
    largest, apart = parity(result.hf, held_out["report"][0])
    if not apart <= PARITY * largest:  # "not": NaN fails, too
        raise RunError(
            f"{result.hf}: logits in transformers are {apart:.1e} apart from ours, the largest "
            f"being {largest:.1f}"
        )
    return watch.points


@torch.no_grad()
def parity(hf: Path, batch: Batch) -> tuple[float, float]:
    """The largest of transformers' logits for a batch, and the largest difference of ours."""
    ours, theirs = load_pretrained(hf).eval(), load_model(hf, mlm=True)
    starts = batch.cu_seqlens.tolist()[: batch.num_sequences + 1]
    largest = apart = 0.0
    found: Tensor = ours.predict(*model_inputs(batch)).mlm
    for begin, end in pairwise(starts):
        here = slice(begin, end)
        logits = theirs(
            input_ids=batch.input_ids[None, here], token_type_ids=batch.token_type_ids[None, here]
        ).logits[0]
        inside = (batch.masked_positions >= begin) & (batch.masked_positions < end)
        inside &= batch.masked_labels != -100
        at = batch.masked_positions[inside] - begin
        if len(at):
            largest = max(largest, logits[at].abs().max().item())
            apart = max(apart, (logits[at] - found[inside]).abs().max().item())
    return largest, apart
