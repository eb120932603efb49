"""Sequences of tokens laid end to end, as the inputs of a model: no padded batch is built.

N sequences, T tokens of all, H hidden size.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.hf.models import Encoder
from fastbert.hf.packing import Plan


def encoder_of(model: Any) -> Any:
    """The encoder of a model, itself where it is one; None where none of ours is there."""
    found = model
    if not isinstance(model, Encoder):
        found = getattr(model, getattr(model, "base_model_prefix", ""), None)
    return found if isinstance(found, Encoder) else None


def packed_inputs(
    model: Any, sequences: Sequence[Mapping[str, Sequence[int]]]
) -> dict[str, Any] | None:
    """What an accelerated model is called with; None: it takes them as a padded batch only.

    Of a head that reads first tokens the outputs are (N, K), of one that reads all (1, T, K).

    Args:
        model: an encoder, or one with a head of its own.
        sequences: `input_ids`, and `token_type_ids` or none, of at least one token each.
    """
    encoder = encoder_of(model)
    if encoder is None or not hasattr(model, "_packs"):
        return None
    plan, given = end_to_end(encoder, [one["input_ids"] for one in sequences])
    if "token_type_ids" in sequences[0]:
        types = [list(chain.from_iterable(one["token_type_ids"] for one in sequences))]
        given["token_type_ids"] = torch.tensor(types, device=plan.cu_seqlens.device)
    return given | {"fastbert_plan": plan} if model._packs(given) else None


def end_to_end(encoder: Any, tokens: Sequence[Sequence[int]]) -> tuple[Plan, dict[str, Tensor]]:
    """A plan and the inputs of an encoder, where it lies, for texts of at least one token."""
    device = next(encoder.parameters()).device
    lengths = [len(ids) for ids in tokens]
    ids = torch.tensor([list(chain.from_iterable(tokens))])
    given = {"input_ids": ids, "position_ids": _positions(encoder, ids, lengths)}
    there = {name: value.to(device) for name, value in given.items()}
    return Plan.of_lengths(lengths, device), there


def _positions(encoder: Any, ids: Tensor, lengths: list[int]) -> Tensor:  # (1, T)
    """Each text counted by itself. Families count otherwise where a text names padding."""
    texts = ids.split(lengths, dim=1)
    pad = encoder.config.pad_token_id
    if pad is not None and bool((ids == pad).any()):
        rows = [encoder._positions(text.shape, {"input_ids": text}) for text in texts]
        return torch.cat(rows, dim=1)
    longest = texts[int(np.argmax(lengths))]
    row = encoder._positions(longest.shape, {"input_ids": longest})
    return torch.cat([row[:, :length] for length in lengths], dim=1)


def means(states: Tensor, plan: Plan) -> Tensor:  # (T, H) -> (N, H)
    """Means of each sequence's tokens, summed up in fp32."""
    if plan.even is not None:
        return states.view(*plan.even, -1).float().mean(1)
    lengths = plan.cu_seqlens.diff().long()
    texts = torch.arange(len(lengths), device=states.device)
    of_token = texts.repeat_interleave(lengths, output_size=len(states))
    sums = torch.zeros(len(lengths), states.shape[1], device=states.device)
    return sums.index_add_(0, of_token, states.float()) / lengths[:, None]
