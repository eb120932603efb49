"""Examples of any source as batches: nothing lost, laid and masked as the packer does it."""

import re
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch

import fastbert
from fastbert.data.batch import Batch
from fastbert.data.mask import max_masked

PAD, CLS, SEP, MASK, V = 0, 2, 3, 4, 1000
IDS: dict[str, Any] = {
    "vocab_size": V, "mask_token_id": MASK, "pad_token_id": PAD, "special_token_ids": (1, CLS, SEP),
}  # fmt: skip
SHAPES: dict[str, Any] = {"tokens_per_batch": 256, "max_seq_length": 32}


def examples(count: int, longest: int = 32, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest + 1, size=count)
    return [[CLS, *rng.integers(5, V, size=n - 2).tolist(), SEP] for n in lengths]


def sequences(batch: Batch) -> list[list[int]]:
    """The sequences of a batch as they were before masking."""
    ids, used = batch.input_ids.clone(), batch.masked_labels != -100
    ids[batch.masked_positions[used]] = batch.masked_labels[used]
    bounds = batch.cu_seqlens.tolist()
    return [ids[a:b].tolist() for a, b in islice(pairwise(bounds), batch.num_sequences)]


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x, y)
        for a, b in zip(one, other, strict=True)
        for (_, x), (_, y) in zip(a.tensors(), b.tensors(), strict=True)
    )


def test_each_example_once_in_full_batches_of_one_shape() -> None:
    given = examples(1500)
    batches = list(fastbert.pack(given, **SHAPES, **IDS))
    assert sorted(s for batch in batches for s in sequences(batch)) == sorted(given)
    assert len({tuple(len(t) for _, t in batch.tensors()) for batch in batches}) == 1
    full = batches[: -len(batches) // 10]  # the last ones take what is left
    assert sum(batch.num_tokens for batch in full) / (256 * len(full)) > 0.995
    for batch in batches:
        T, N = len(batch.input_ids), len(batch.cu_seqlens) - 1
        assert T == 256 and batch.max_seqlen == 32
        assert len(batch.masked_positions) == max_masked(T, N, 0.15)
        lengths = batch.cu_seqlens.diff()
        real = lengths[: batch.num_sequences]
        assert batch.num_tokens == real.sum() and lengths.max() <= 32 and lengths.sum() == T
        assert (real.diff() <= 0).all(), "the longest first"
        assert (batch.input_ids[batch.num_tokens :] == PAD).all()
        starts = torch.repeat_interleave(batch.cu_seqlens[:-1], lengths)
        assert torch.equal(batch.position_ids, torch.arange(T) - starts)
        assert (batch.next_sentence_labels == -100).all() and not batch.token_type_ids.any()


def test_masks_are_berts_and_special_tokens_have_none() -> None:
    batches = list(fastbert.pack(examples(3000), **SHAPES, **IDS))
    became: dict[str, int] = dict.fromkeys(("mask", "same", "other"), 0)
    candidates = 0
    for batch in batches:
        used = batch.masked_labels != -100
        labels, now = batch.masked_labels[used], batch.input_ids[batch.masked_positions[used]]
        assert (labels > MASK).all() and (now >= MASK).all()
        became["mask"] += int((now == MASK).sum())
        became["same"] += int((now == labels).sum())
        became["other"] += int(((now != labels) & (now != MASK)).sum())
        candidates += batch.num_tokens - 2 * batch.num_sequences
    total = sum(became.values())
    assert total / candidates == pytest.approx(0.15, abs=0.01)
    assert became["mask"] / total == pytest.approx(0.8, abs=0.02)
    assert became["other"] / total == pytest.approx(0.1, abs=0.02)


def test_a_seed_decides_the_masks_and_the_examples_the_rest() -> None:
    given = examples(300)
    one, again, other = (
        list(fastbert.pack(iter(given), seed=seed, **SHAPES, **IDS)) for seed in (1, 1, 2)
    )
    assert same(one, again) and not same(one, other)
    assert list(map(sequences, one)) == list(map(sequences, other))


def test_it_reads_no_further_ahead_than_a_window() -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield [CLS, 7, 8, 9, SEP]

    batches = fastbert.pack(endless(), **SHAPES, **IDS)
    assert read == 0
    for made, batch in enumerate(islice(batches, 60), start=1):
        assert batch.num_sequences == 51
        assert read <= max(1024, made * 51 + 256 + 80)


def test_slots_that_run_out_are_told_once() -> None:
    given = [[CLS, *[9] * 28, SEP]] * 1100 + [[CLS, 9, SEP]] * 900
    told = r"of 256 tokens stay empty, as \d+ slots .* are too few: .* num_slots = (\d+)"
    with pytest.warns(UserWarning, match=told) as warned:
        list(fastbert.pack(given, **SHAPES, **IDS))
    assert len(warned) == 1
    found = re.search(told, str(warned[0].message))
    assert found is not None
    list(fastbert.pack([[CLS, *[9] * 18, SEP]] * 9, **SHAPES | {"tokens_per_batch": 32}, **IDS))
    batches = list(fastbert.pack(given, num_slots=int(found[1]), **SHAPES, **IDS))  # no warning
    assert sum(batch.num_tokens for batch in batches) / (256 * len(batches)) > 0.9


class Rows:
    """What pack needs of `datasets.Dataset`: rows that are mappings, again at each pass."""

    def __init__(self, *rows: dict[str, Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        yield from self.rows


def test_rows_with_columns_arrays_and_tensors() -> None:
    types = [0, 0, 0, 1, 1]
    row = {
        "input_ids": [CLS, 10, SEP, 11, SEP], "token_type_ids": types, "idx": 5,
        "special_tokens_mask": [1, 0, 1, 1, 1], "next_sentence_label": 1,
    }  # fmt: skip
    padded = {
        "input_ids": np.array([CLS, 20, SEP, PAD, PAD]), "attention_mask": [1, 1, 1, 0, 0],
        "next_sentence_label": torch.tensor(0),
    }  # fmt: skip
    rows = Rows(row, padded, {"input_ids": torch.tensor([CLS, 30, 31, 32, 33, SEP])})
    for _ in range(2):
        (batch,) = fastbert.pack(rows, **SHAPES, **IDS)
        assert sequences(batch) == [[CLS, 30, 31, 32, 33, SEP], row["input_ids"], [CLS, 20, SEP]]
        assert batch.next_sentence_labels[:4].tolist() == [-100, 1, 0, -100]
        assert batch.token_type_ids[6:11].tolist() == types and batch.token_type_ids.sum() == 2
        masked = batch.masked_labels[batch.masked_labels != -100].tolist()
        assert 10 in masked and 11 not in masked  # marked special, whatever its id
    columns = {"input_ids": [[CLS, 10, SEP], [CLS, 20, 21, SEP]], "next_sentence_label": [0, 1]}
    (batch,) = fastbert.pack(columns, **SHAPES, **IDS)
    assert batch.next_sentence_labels[:2].tolist() == [1, 0]


def test_a_tokenizer_tells_what_is_special(wordpiece: Any, tmp_path: Any) -> None:
    import transformers

    wordpiece.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["the quick brown fox", "jumps over the lazy dog, again and again."] * 40
    encoded = theirs(texts)
    for more in ({}, {"whole_word_mask": True}):
        one, other = (
            list(fastbert.pack(encoded, tokenizer=t, seed=3, **more, **SHAPES))
            for t in (theirs, wordpiece)
        )
        assert same(one, other)
    assert sum(batch.num_sequences for batch in one) == 80
    with pytest.raises(ValueError, match="not both"):
        fastbert.pack(encoded, tokenizer=theirs, vocab_size=99, **SHAPES)


def test_truncation_keeps_the_last_token() -> None:
    long = [CLS, *range(5, 105), SEP]
    (batch,) = fastbert.pack([long], truncation=True, **SHAPES, **IDS)
    assert sequences(batch) == [[*long[:31], SEP]]


def test_drop_last_leaves_out_what_is_not_full() -> None:
    given = [[CLS, *[9] * 30, SEP]] * 20  # 8 fill a batch
    counts = [
        [batch.num_sequences for batch in fastbert.pack(given, drop_last=drop, **SHAPES, **IDS)]
        for drop in (False, True)
    ]
    assert counts == [[8, 8, 4], [8, 8]]
    assert len(list(fastbert.pack(given[:16], drop_last=True, **SHAPES, **IDS))) == 2
    assert list(fastbert.pack([], **SHAPES, **IDS)) == []


@pytest.mark.parametrize(
    ("example", "told"),
    [
        ([CLS, *[9] * 32, SEP], "34 tokens are more than max_seq_length = 32: cut it, or give"),
        ([CLS, V, SEP], "token 1000 is outside the vocabulary of 1000"),
        ([CLS, -1, SEP], "token -1 is outside the vocabulary"),
        ([], "it has no tokens"),
        ([CLS, 9, SEP, PAD], r"\[PAD\] at position 3: give it unpadded, or with attention_mask"),
        ([CLS, 9.5, SEP], "input_ids must be one row of integers, not list"),
        (torch.ones(2, 3), r"input_ids must be .* not a Tensor of torch.float32, shape \(2, 3\)"),
        ([[CLS, 9, SEP]], "input_ids must be one row of integers"),
        ("a text", "input_ids must be one row of integers, not str"),
        (None, "input_ids must be one row of integers, not NoneType"),
        ({"text": "a text"}, "it has no input_ids, only text"),
        ({"input_ids": [CLS, SEP], "token_type_ids": [0]}, "1 token_type_ids for 2 input_ids"),
        ({"input_ids": [CLS, SEP], "token_type_ids": [0, -1]}, "token_type_ids has -1"),
        ({"input_ids": [CLS, SEP], "next_sentence_label": 2}, "next_sentence_label = 2 must be 0"),
        ({"input_ids": [CLS, SEP], "next_sentence_label": None}, "next_sentence_label = None must"),
    ],
)
def test_a_bad_example_is_named(example: Any, told: str) -> None:
    batches = fastbert.pack([[CLS, 9, SEP], example], **SHAPES, **IDS)
    with pytest.raises(ValueError, match=f"^example 1: {told}"):
        list(batches)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokens_per_batch": 31}, "tokens_per_batch = 31 must be at least max_seq_length = 32"),
        ({"max_seq_length": 2}, "max_seq_length = 2 must be at least 3"),
        ({"mlm_probability": 1}, "mlm_probability = 1 must be more than 0, less than 1"),
        ({"num_slots": 8}, "num_slots = 8 must be at least 9 for these shapes"),
        ({"vocab_size": None}, "give tokenizer, or vocab_size and mask_token_id"),
        ({"vocab_size": 4}, "special tokens 0, 1, 2, 3, 4 must lie in the vocabulary of 4"),
        ({"vocab_size": 5}, "vocab_size = 5 leaves no token beside the special ones"),
        ({"whole_word_mask": True}, "whole_word_mask needs a tokenizer"),
        ({"examples": {"text": ["a"]}}, "examples: a mapping must have input_ids"),
        (
            {"examples": {"input_ids": [[CLS]], "token_type_ids": []}},
            "examples: columns of different lengths",
        ),
    ],
)
def test_a_bad_argument_is_told_at_once(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fastbert.pack(**{"examples": [], **SHAPES, **IDS, **changes})
