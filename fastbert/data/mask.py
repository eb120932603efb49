"""Masked language modelling on packed sequences, vectorised: which tokens to predict, and how.

T tokens packed, N sequences packed, M masked tokens. Rules: https://arxiv.org/abs/1810.04805
(3.1, and whole-word masking of the repository's README of May 2019).
"""

import math

import numpy as np
from numpy.typing import NDArray

from fastbert.data.tokenize import TokenIds

IGNORE = -100
"""Label of what is not predicted."""
SHARE_MASK = 0.8
SHARE_RANDOM = 0.1


def max_masked(T: int, N: int, mlm_probability: float) -> int:
    """Returns M, room for the predictions of any usual batch, a multiple of 8.

    A sequence of c candidates has round(p * c) predictions. As c excludes at least two special
    tokens a sequence, p * T already exceeds the mean by 2 * p * N; sqrt(N) is over three standard
    deviations of the sum of roundings, sqrt(N / 12).
    """
    wanted = min(math.ceil(mlm_probability * T + math.sqrt(N)), T)
    return -(-wanted // 8) * 8


class Masker:
    """Chooses and replaces the tokens to predict, with shapes that never change."""

    def __init__(
        self, ids: TokenIds, *, mlm_probability: float, whole_word_mask: bool, max_masked: int
    ) -> None:
        """Prepares masking.

        Args:
            ids: of the vocabulary.
            mlm_probability: share of each sequence's candidates to predict.
            whole_word_mask: whether the pieces of a word are predicted together.
            max_masked: M.
        """
        self._ids = ids
        self._probability = mlm_probability
        self._whole_word_mask = whole_word_mask
        self._max_masked = max_masked
        self._is_special = np.zeros(ids.vocab_size, dtype=bool)
        self._is_special[ids.special] = True
        self._replacements = np.flatnonzero(~self._is_special)

    def __call__(
        self,
        input_ids: NDArray[np.int64],  # (T,), changed in place
        cu_seqlens: NDArray[np.int32],  # (N+1,)
        rng: np.random.Generator,
        never: NDArray[np.bool_] | None = None,  # (T,) no candidates, beside the special tokens
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Masks a batch in place.

        Of a sequence's c candidates, the tokens that are not special, round(p * c) are chosen and
        at least one; whole words are taken in random order, and skipped where they would exceed
        this number. Each chosen token becomes [MASK] (80%), a random token (10%) or stays.

        Returns:
            positions (M,), ascending, and their original tokens (M,); unused entries at the end
            are 0 and -100.
        """
        excluded = self._is_special[input_ids]
        candidates = np.flatnonzero(~(excluded if never is None else excluded | never))
        lengths = np.diff(cu_seqlens)
        sequence = np.repeat(np.arange(len(lengths)), lengths)[candidates]
        count = np.bincount(sequence, minlength=len(lengths))
        budget = np.maximum(np.rint(self._probability * count).astype(np.int64), 1)
        chosen = self._choose(input_ids, candidates, sequence, budget, rng)

        labels = input_ids[chosen]
        draw = rng.random(len(chosen))
        random_ids = self._replacements[rng.integers(len(self._replacements), size=len(chosen))]
        replaced = np.where(draw < SHARE_MASK + SHARE_RANDOM, random_ids, labels)
        input_ids[chosen] = np.where(draw < SHARE_MASK, self._ids.mask, replaced)

        masked_positions = np.zeros(self._max_masked, dtype=np.int64)
        masked_labels = np.full(self._max_masked, IGNORE, dtype=np.int64)
        masked_positions[: len(chosen)] = chosen
        masked_labels[: len(chosen)] = labels
        return masked_positions, masked_labels

    def _choose(
        self,
        input_ids: NDArray[np.int64],
        candidates: NDArray[np.int64],
        sequence: NDArray[np.int64],  # of each candidate
        budget: NDArray[np.int64],  # (N,)
        rng: np.random.Generator,
    ) -> NDArray[np.int64]:
        if not self._whole_word_mask:
            order = np.argsort(sequence + rng.random(len(candidates)))
            rank = np.arange(len(order)) - np.searchsorted(sequence, sequence)
            taken = order[rank < budget[sequence]]  # sorted by sequence, so rank[i] is order[i]'s
            if len(taken) > self._max_masked:
                taken = rng.permutation(taken)[: self._max_masked]
            return candidates[np.sort(taken)]
        starts = self._word_starts(input_ids, candidates)
        lengths = np.diff(starts, append=len(candidates))
        word_sequence = sequence[starts]
        order = np.argsort(word_sequence + rng.random(len(starts)))
        words = order[_take_in_order(lengths[order], word_sequence, budget)]
        if lengths[words].sum() > self._max_masked:
            words = rng.permutation(words)
            words = words[np.cumsum(lengths[words]) <= self._max_masked]
        is_chosen = np.zeros(len(starts), dtype=bool)
        is_chosen[words] = True
        return candidates[np.repeat(is_chosen, lengths)]

    def _word_starts(
        self, input_ids: NDArray[np.int64], candidates: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Returns which candidates begin a word: no "##" piece, or the first after a special."""
        begins = ~self._ids.is_continuation[input_ids[candidates]]
        begins |= np.diff(candidates, prepend=-1) > 1
        return np.flatnonzero(begins)


def _take_in_order(
    lengths: NDArray[np.int64],  # of words, in random order within their sequence
    sequence: NDArray[np.int64],  # of these words, ascending
    budget: NDArray[np.int64],  # (N,)
) -> NDArray[np.int64]:
    """Returns the words taken one by one as long as the next fits its sequence's budget.

    Equals a loop over words that skips each which would overshoot; each round here takes all words
    up to the next one skipped. Where no word fits, the first is taken.
    """
    room = budget.copy()
    left = np.arange(len(lengths))
    taken = []
    while len(left):
        left = left[lengths[left] <= room[sequence[left]]]
        total = np.cumsum(lengths[left])
        first = np.searchsorted(sequence[left], sequence[left])
        within = total - (total - lengths[left])[first]
        fits = within <= room[sequence[left]]
        taken.append(left[fits])
        used = np.bincount(sequence[left[fits]], weights=lengths[left[fits]], minlength=len(room))
        room -= used.astype(np.int64)
        left = left[~fits]
    found = np.concatenate([*taken, np.empty(0, dtype=np.int64)])
    without = np.setdiff1d(sequence, sequence[found])
    return np.concatenate([found, np.searchsorted(sequence, without)])
