"""Batch: what moves, what is frozen, what is pinned."""

import dataclasses

import pytest
import torch

from fastbert.data.batch import Batch


def example():
    ids = torch.arange(8)
    return Batch(
        input_ids=ids,
        token_type_ids=ids * 0,
        position_ids=ids,
        cu_seqlens=torch.tensor([0, 5, 8], dtype=torch.int32),
        masked_positions=ids[:2],
        masked_labels=ids[:2],
        next_sentence_labels=torch.tensor([1, -100]),
        max_seqlen=8,
        num_tokens=5,
        num_sequences=1,
    )


def test_to_moves_every_tensor_and_keeps_the_rest():
    moved = example().to("meta", non_blocking=True)
    assert [name for name, _ in moved.tensors()] == [
        "input_ids",
        "token_type_ids",
        "position_ids",
        "cu_seqlens",
        "masked_positions",
        "masked_labels",
        "next_sentence_labels",
    ]
    assert {x.device.type for _, x in moved.tensors()} == {"meta"}
    assert (moved.max_seqlen, moved.num_tokens, moved.num_sequences) == (8, 5, 1)
    assert moved.cu_seqlens.dtype == torch.int32


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().num_tokens = 3  # type: ignore[misc]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has pinned memory")
def test_pin_memory():
    assert all(x.is_pinned() for _, x in example().pin_memory().tensors())
