"""What the GPU command trains: models, and the lengths of their batches' sequences.

B sequences of a batch, S the longest of them.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from fastbert.config import ModelConfig, model_config
from fastbert.errors import UserError
from fastbert_bench.measure.lengths import mlperf_lengths, natural_lengths

SEED = 42


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the lengths of a batch's sequences."""

    name: str
    model: str
    B: int
    S: int
    lengths: str  # "full", "natural" or "mlperf"
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Name of a figure -> the least it should be (`floor`, `memory`: the most)."""

    @classmethod
    def of(cls, name: str) -> "Workload":
        """Of any name like "base-512-full", with no B: `draw_tokens` asks for none.

        Raises:
            UserError: it is no such name.
        """
        parts = re.fullmatch(r"(\w+)-(\d+)-(full|natural|mlperf)", name)
        if not parts:
            raise UserError(f"{name!r}: must be MODEL-S-full, -natural or -mlperf: base-512-full")
        return cls(name, parts[1], 0, int(parts[2]), parts[3])

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """(B,) lengths."""
        return self._draw(self.B, rng)

    def draw_tokens(self, tokens: int) -> np.ndarray:
        """(B,) lengths of `tokens` real tokens together, or up to 7 fewer; a multiple of S."""
        if self.lengths == "full":
            return self._draw(max(1, tokens // self.S), np.random.default_rng(SEED))
        found = self._draw(4 * tokens // self.S + 1, np.random.default_rng(SEED))
        ends = np.cumsum(found)
        whole = int(np.searchsorted(ends, tokens, side="right"))
        rest = tokens - int(ends[whole - 1])
        return np.append(found[:whole], [rest] if rest >= 8 else []).astype(np.int64)

    def _draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        if self.lengths == "full":
            return np.full(count, self.S)
        kind = natural_lengths if self.lengths == "natural" else mlperf_lengths
        return kind(count, self.S, rng)

    @property
    def sizes(self) -> ModelConfig:
        """Of the model; with a small vocabulary in a rehearsal, where the interpreter is slow."""
        sizes = model_config(self.model)
        return dataclasses.replace(sizes, vocab_size=2000) if self.model == "tiny" else sizes


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("base-512-full", "base", 64, 512, "full",
                 {"tokens_per_second": 850e3, "mfu": 0.5, "hf-eager": 3, "hf-sdpa": 2,
                  "hf-sdpa-cudnn": 1.5, "hf-sdpa-compile": 1.5, "floor": 1.35, "memory": 0.5}),
        Workload("large-512-mlperf", "large", 96, 512, "mlperf",
                 {"tokens_per_second": 248e3, "sequences_per_second": 975}),
        Workload("base-128-full", "base", 256, 128, "full", {"tokens_per_second": 950e3}),
        Workload("base-512-natural", "base", 96, 512, "natural",
                 {"hf-eager": 5, "hf-sdpa": 4, "hf-sdpa-cudnn": 3, "hf-sdpa-compile": 3}),
        Workload("tiny-64-natural", "tiny", 8, 64, "natural", {"hf-sdpa": 1.0}),
    )
}  # fmt: skip
TINY = "tiny-64-natural"
"""What a rehearsal on a CPU runs in place of the others."""
