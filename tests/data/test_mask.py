"""Masks: how many, which words, what stands in their place."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data.mask import Masker, _take_in_order, max_masked

CLS, SEP, MASK = 2, 3, 4


def packed(lengths, V, rng, T=None):
    """Sequences of [CLS] text [SEP], and [PAD] up to T as one more."""
    total = sum(lengths)
    T = T or total
    ids = np.zeros(T, dtype=np.int64)
    ids[:total] = rng.integers(5, V, size=total)
    cu = np.cumsum([0, *lengths, T - total]).astype(np.int32)
    ids[cu[:-2]] = CLS
    ids[cu[1:-1] - 1] = SEP
    return ids, cu


def mask(make_ids, ids, cu, seed=0, p=0.15, whole_word_mask=False, every=0, V=1000, M=None):
    masker = Masker(
        make_ids(V, every),
        mlm_probability=p,
        whole_word_mask=whole_word_mask,
        max_masked=M or max_masked(len(ids), len(cu), p),
    )
    masked = ids.copy()
    positions, labels = masker(masked, cu, np.random.default_rng(seed))
    used = labels != -100
    assert (np.diff(positions[used]) > 0).all()
    assert (positions[~used] == 0).all()
    assert not used[used.sum() :].any()
    assert (labels[used] == ids[positions[used]]).all()
    untouched = np.ones(len(ids), dtype=bool)
    untouched[positions[used]] = False
    assert (masked[untouched] == ids[untouched]).all()
    return masked, positions[used], labels[used]


@pytest.mark.parametrize("p", [0.05, 0.15, 0.3, 0.9])
def test_number_per_sequence_is_exact(make_ids, p):
    rng = np.random.default_rng(1)
    lengths = [*range(3, 60), 128, 512]
    ids, cu = packed(lengths, 1000, rng, T=sum(lengths) + 37)
    ids[5] = 1  # an [UNK] is no candidate
    _, positions, _ = mask(make_ids, ids, cu, p=p, M=len(ids))
    assert (ids[positions] >= 5).all()
    for start, end in pairwise(cu[:-1]):
        candidates = int((ids[start:end] >= 5).sum())
        expected = max(1, round(p * candidates)) if candidates else 0
        assert ((positions >= start) & (positions < end)).sum() == expected


def test_eighty_ten_ten(make_ids):
    rng = np.random.default_rng(2)
    ids, cu = packed([512] * 400, 1000, rng)
    masked, positions, labels = mask(make_ids, ids, cu)
    n = len(positions)
    assert abs(n / (400 * 510) - 0.15) < 0.001
    is_mask = masked[positions] == MASK
    same = masked[positions] == labels
    other = ~is_mask & ~same
    for share, expected in ((is_mask, 0.8), (same, 0.1), (other, 0.1)):
        bound = 5 * (expected * (1 - expected) / n) ** 0.5 + 0.1 / 995
        assert abs(share.mean() - expected) < bound
    drawn = masked[positions][other]
    assert drawn.min() >= 5
    assert len(np.unique(drawn)) > 900
    # positions are uniform over a sequence
    counts = np.histogram(positions % 512, bins=8, range=(0, 512))[0]
    assert counts.min() > 0.9 * counts.max()


def test_whole_words_are_chosen_together(make_ids):
    rng = np.random.default_rng(3)
    ids, cu = packed([512] * 50 + [7] * 50, 1000, rng, T=26_000)
    masked, positions, _ = mask(make_ids, ids, cu, whole_word_mask=True, every=3)
    chosen = np.zeros(len(ids) + 1, dtype=bool)
    chosen[positions] = True
    continues = (ids >= 5) & (ids % 3 == 0)
    for position in np.flatnonzero(continues):
        if ids[position - 1] >= 5:
            assert chosen[position] == chosen[position - 1]
    for start, end in pairwise(cu[:-1]):
        budget = max(1, round(0.15 * (end - start - 2)))
        picked = int(chosen[start:end].sum())
        assert picked >= 1
        assert picked <= budget or not chosen[start:end].all()
        if end - start == 512:
            assert picked == budget  # there are always one-piece words to fill up with
    # each piece of a word is replaced on its own
    pairs = [(masked[p] == MASK, masked[p + 1] == MASK) for p in positions if chosen[p + 1]]
    assert abs(np.mean([a != b for a, b in pairs]) - 0.32) < 0.08
    assert abs((masked[positions] == MASK).mean() - 0.8) < 0.03


def test_at_least_one_word_even_if_too_long(make_ids):
    cu = np.array([0, 7, 7], dtype=np.int32)
    expected = {
        (5, 6, 9, 12, 15): [1, 2, 3, 4, 5],  # one word
        (5, 7, 9, 12, 15): [1],  # a word that fits and one that does not
    }
    for text, chosen in expected.items():
        ids = np.array([CLS, *text, SEP])
        for seed in range(20):
            _, positions, _ = mask(
                make_ids, ids, cu, seed, whole_word_mask=True, every=3, V=20, M=8
            )
            assert positions.tolist() == chosen


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_word_selection_equals_the_loop(data):
    counts = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    sequence = np.repeat(np.arange(len(counts)), counts)
    some = st.lists(st.integers(1, 5), min_size=len(sequence), max_size=len(sequence))
    lengths = np.array(data.draw(some), dtype=np.int64)
    budget = np.array([data.draw(st.integers(1, 9)) for _ in counts])
    expected = []
    for s in range(len(counts)):
        room, words = budget[s], np.flatnonzero(sequence == s)
        taken = []
        for word in words:
            if lengths[word] <= room:
                taken.append(int(word))
                room -= lengths[word]
        expected += taken or words[:1].tolist()
    assert sorted(_take_in_order(lengths, sequence, budget).tolist()) == sorted(expected)


@pytest.mark.parametrize("whole_word_mask", [False, True])
def test_overflow_drops_fairly(make_ids, whole_word_mask):
    ids, cu = packed([32] * 64, 1000, np.random.default_rng(4))
    dropped = np.zeros(64)
    for seed in range(200):
        _, positions, _ = mask(
            make_ids, ids, cu, seed, p=0.5, whole_word_mask=whole_word_mask, every=4, M=400
        )
        assert 390 <= len(positions) <= 400
        dropped += np.bincount(positions // 32, minlength=64)
    assert dropped.min() > 0.8 * dropped.mean()


def test_no_candidates(make_ids):
    ids = np.array([CLS, 1, SEP, 0, 0, 0])
    cu = np.array([0, 3, 6, 6], dtype=np.int32)
    for whole_word_mask in (False, True):
        masked, positions, _ = mask(make_ids, ids, cu, whole_word_mask=whole_word_mask, M=8)
        assert len(positions) == 0
        assert (masked == ids).all()


@pytest.mark.parametrize(("T", "N"), [(8, 5), (4096, 40), (8192, 20), (65536, 1000)])
def test_max_masked(T, N):
    for p in (0.01, 0.15, 0.4, 0.99):
        M = max_masked(T, N, p)
        assert M % 8 == 0
        assert p * T <= M <= p * T + N**0.5 + 8
