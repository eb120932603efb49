"""`Batch`, the one structure that crosses from data to model. Its shapes are constant for a run.

T tokens packed, N sequences packed (slots), M masked tokens (slots), S longest sequence.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """N sequences laid end to end, and what to predict in them.

    The real sequences come first. Tokens left over are [PAD] and form sequences of their own, no
    longer than `max_seqlen`, so that attention never mixes them with real ones; they are never
    masked, and their next-sentence label is -100. Slots still unused are empty sequences at T.
    """

    input_ids: Tensor  # (T,) int64, masked
    token_type_ids: Tensor  # (T,) int64, 0 in segment A, 1 in segment B
    position_ids: Tensor  # (T,) int64, restart at 0 in each sequence
    cu_seqlens: Tensor  # (N+1,) int32, where each sequence starts; unused entries are T
    masked_positions: Tensor  # (M,) int64, ascending; unused entries are 0
    masked_labels: Tensor  # (M,) int64, the original tokens; unused entries are -100
    next_sentence_labels: Tensor  # (N,) int64, 0 B follows A, 1 B is random, -100 none
    max_seqlen: int
    """S, a static bound of every sequence's length."""
    num_tokens: int
    """Real tokens, [PAD] not counted."""
    num_sequences: int
    """Real sequences, those of [PAD] not counted."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Returns the batch on another device."""
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in self.tensors()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> "Batch":
        """Returns a copy in page-locked memory, which a GPU reads without waiting."""
        pinned = {name: x.pin_memory() for name, x in self.tensors()}
        return replace(self, **pinned)  # type: ignore[arg-type]

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Returns (name, tensor) of every tensor, in the order of the fields."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return [(name, value) for name, value in values if isinstance(value, Tensor)]
