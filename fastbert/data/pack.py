"""Sequences from sentences, and batches from whole sequences laid end to end.

T tokens packed, N sequences packed (slots), M masked tokens, S longest sequence. Sentence pairs
follow create_pretraining_data.py of https://github.com/google-research/bert. A sequence is planned
as spans of the token store and becomes tokens only in its batch.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastbert.data.batch import Batch
from fastbert.data.mask import IGNORE, Masker, max_masked
from fastbert.data.shards import Shards
from fastbert.data.tokenize import TokenIds
from fastbert.errors import UserError

IS_NEXT, IS_RANDOM = 0, 1
LOOKAHEAD = 256
"""Sequences that wait, beyond a batch's worth, for the batch they fit best."""
MAX_WASTE = 1 / 50
"""Share of a batch that may be [PAD]; rather than waste more, a sequence is cut to fit."""
OPEN_DOCUMENTS = 64
"""Documents read in turns, so that a batch is not filled from one book."""
BALANCE = 8
"""How far labels 1 may outnumber labels 0 before chance is overruled, and the reverse."""
SAMPLE = 4096
"""Sequences planned on trial to learn how many a batch holds, and which labels they have."""
MAX_SKEW = 0.1
"""How far the share of labels 0 may be from a half without a word: a document of 3 sentences has
0.65, corpora that allow a choice 0.5."""


class Spans(NamedTuple):
    """A planned sequence: [CLS] a [SEP] b [SEP], or [CLS] a [SEP] where b is empty."""

    a_start: int
    a_end: int
    b_start: int
    b_end: int
    label: int

    @property
    def length(self) -> int:
        """Tokens with the special ones."""
        text = self.a_end - self.a_start + self.b_end - self.b_start
        return text + (3 if self.b_end > self.b_start else 2)


class Frame(NamedTuple):
    """The constant shapes of batches, and how whole sequences are laid into them."""

    T: int
    N: int
    M: int
    S: int

    def holds(self, sequences: int, rest: int) -> bool:
        """Whether there are slots for so many sequences and the [PAD] after them."""
        return sequences + -(-rest // self.S) <= self.N

    def choose(self, lengths: NDArray[np.int64]) -> tuple[list[int], int]:
        """Returns which of the sequences that wait, oldest first, go into the next batch.

        The oldest always does, so that none waits for ever.

        Returns:
            their indices, and how many tokens they leave.
        """
        taken, rest = self._fit(lengths, np.arange(len(lengths)))
        if rest > MAX_WASTE * self.T and not self.holds(len(taken) + 2, rest):
            # slots are running out: long ones first
            longest = np.argsort(-lengths, kind="stable")
            longest_taken, longest_rest = self._fit(lengths, longest)
            if longest_rest < rest:
                taken, rest = longest_taken, longest_rest
        return taken, rest

    def _fit(self, lengths: NDArray[np.int64], order: NDArray[np.int64]) -> tuple[list[int], int]:
        """Returns sequences that fill a batch best, and how many tokens they leave.

        Takes them in `order` down to a room of about two sequences, then the one or two that
        leave least. The order's first is always taken.
        """
        bulk = max(self.T - 2 * self.S, 1)
        count = int(np.searchsorted(np.cumsum(lengths[order]), bulk, side="right"))
        count = min(max(count, 1), self.N, len(order))
        while count and not self.holds(count, self.T - int(lengths[order[:count]].sum())):
            count -= 1  # slots for [PAD] are needed as well
        taken: list[int] = order[:count].tolist()
        rest = self.T - int(lengths[order[:count]].sum())
        waiting = order[count:]
        waiting = waiting[np.argsort(lengths[waiting], kind="stable")]
        while len(waiting):
            found = _best_fit(lengths[waiting], rest)
            after = rest - int(lengths[waiting[found]].sum())
            if not found or not self.holds(len(taken) + len(found), after):
                break
            taken += waiting[found].tolist()
            rest = after
            waiting = np.delete(waiting, found)
        return taken, rest

    def empty(self, pad: int) -> "Laid":
        """Returns a batch's worth of [PAD], to lay sequences into from the front."""
        return Laid(
            np.full(self.T, pad, dtype=np.int64),
            np.zeros(self.T, dtype=np.int64),
            np.full(self.N + 1, self.T, dtype=np.int32),
            np.full(self.N, IGNORE, dtype=np.int64),
        )

    def finished(
        self,
        laid: "Laid",
        sequences: int,
        end: int,
        masker: Masker,
        rng: np.random.Generator,
        never: NDArray[np.bool_] | None = None,
    ) -> Batch:
        """Returns the batch of so many sequences, which end at token `end`: masked.

        Args:
            laid: where they lie; masked in place.
            sequences: how many.
            end: tokens of all of them.
            masker: masks them.
            rng: of the masks.
            never: (T,) tokens that are not to be predicted, beside the special ones.
        """
        pads = range(end, self.T, self.S)
        cu_seqlens = laid.cu_seqlens
        cu_seqlens[sequences : sequences + len(pads)] = pads
        position_ids = np.arange(self.T) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        masked_positions, masked_labels = masker(laid.input_ids, cu_seqlens, rng, never)
        return Batch(
            input_ids=torch.from_numpy(laid.input_ids),
            token_type_ids=torch.from_numpy(laid.token_type_ids),
            position_ids=torch.from_numpy(position_ids),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            masked_positions=torch.from_numpy(masked_positions),
            masked_labels=torch.from_numpy(masked_labels),
            next_sentence_labels=torch.from_numpy(laid.next_sentence_labels),
            max_seqlen=self.S,
            num_tokens=end,
            num_sequences=sequences,
        )


class Laid(NamedTuple):
    """A batch in the making."""

    input_ids: NDArray[np.int64]  # (T,)
    token_type_ids: NDArray[np.int64]  # (T,)
    cu_seqlens: NDArray[np.int32]  # (N+1,)
    next_sentence_labels: NDArray[np.int64]  # (N,)


class _Planner:
    """Plans sequences without end: documents in seeded order, epoch after epoch.

    Several documents are open at a time, and each sequence continues one of them at random.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        max_seq_length: int,
        nsp: bool,
        short_seq_prob: float,
        seed: int,
        shuffle: bool,
        epochs: int | None = None,
    ) -> None:
        self._shards = shards
        self._room = max_seq_length - (3 if nsp else 2)
        self._nsp = nsp
        self._short_seq_prob = short_seq_prob
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = epochs
        self._rng = np.random.default_rng([seed, 0])
        self.epoch = 0
        self.position = 0  # in the epoch's order, of the next document to open
        self.balance = 0  # labels 1 minus labels 0
        self._open: list[list[int]] = []  # of [document, unit]
        self._units: dict[int, list[int]] = {}  # of the open documents
        self._order = self._epoch_order()
        count = max(1, min(OPEN_DOCUMENTS, shards.num_documents // 4)) if shuffle else 1
        for _ in range(count):
            self._open_next()

    def _epoch_order(self) -> NDArray[np.int64]:
        documents = np.arange(self._shards.num_documents)
        if not self._shuffle:
            return documents
        return np.random.default_rng([self._seed, 1, self.epoch]).permutation(documents)

    def _open_next(self) -> None:
        if self.position == self._shards.num_documents:
            if self._epochs is not None and self.epoch + 1 >= self._epochs:
                return
            self.epoch += 1
            self.position = 0
            self._order = self._epoch_order()
        self._open.append([int(self._order[self.position]), 0])
        self.position += 1

    def next(self) -> Spans | None:
        """Returns the next sequence, None after the last epoch."""
        if not self._open:
            return None
        turn = int(self._rng.random() * len(self._open)) if len(self._open) > 1 else 0
        document, unit = self._open[turn]
        units = self._units.get(document)
        if units is None:
            units = self._units[document] = self.units(document)
        spans, unit = self.plan(document, units, unit)
        if unit < len(units) - 1:
            self._open[turn][1] = unit
        else:
            del self._open[turn]
            if all(other != document for other, _ in self._open):
                del self._units[document]
            self._open_next()
        return spans

    def units(self, document: int, room: int | None = None) -> list[int]:
        """Returns where the sentences of a document start, and its end; long ones are cut up."""
        room = room or self._room
        start, end = self._shards.document_offsets[document : document + 2]
        offsets = self._shards.sentence_offsets[start : end + 1]
        units: list[int] = offsets.tolist()
        if np.diff(offsets).max() > room:
            cut = [
                unit + piece * (after - unit) // pieces
                for unit, after in pairwise(units)
                for pieces in (-(-(after - unit) // room),)
                for piece in range(pieces)
            ]
            units = [*cut, units[-1]]
        return units

    def plan(self, document: int, units: list[int], i: int) -> tuple[Spans, int]:
        """Returns the sequence that begins at unit `i`, and the unit after it."""
        target = self._room
        if self._rng.random() < self._short_seq_prob:
            target = 2 + int(self._rng.random() * (self._room - 1))
        last = len(units) - 1
        j = bisect_left(units, units[i] + target, i + 1, last)
        if self._nsp:
            return self._pair(document, units, i, j, target)
        if j > i + 1 and units[j] - units[i] > target:
            j -= 1
        return Spans(units[i], units[j], 0, 0, IGNORE), j

    def _pair(
        self, document: int, units: list[int], i: int, j: int, target: int
    ) -> tuple[Spans, int]:
        """Plans units `i` to `j` as segment A and either its continuation or a random B.

        In BERT a chunk of one sentence can only get a random B, and labels drift from half and
        half. Here the drift weighs on the other choices, and if need be cuts a sentence in two.
        """
        if j - i > 1:
            a_end = i + 1 + int(self._rng.random() * (j - i - 1))
            chance = 0.5 - self.balance / (2 * BALANCE)
        else:
            a_end = j
            chance = 1.0 if self.balance < BALANCE else 0.0
        start, cut, end = units[i], units[a_end], units[j]
        if self._rng.random() < chance or end - start < 2:
            segment = self._random_segment(document, units, i, a_end, target - (cut - start))
            if segment is not None:
                self.balance += 1
                return self._truncated(Spans(start, cut, *segment, IS_RANDOM), self._room), a_end
        if end - start < 2:  # the only token of the corpus
            return Spans(start, end, 0, 0, IGNORE), j
        if cut == end:
            cut = start + 1 + int(self._rng.random() * (end - start - 1))
        self.balance -= 1
        return self._truncated(Spans(start, cut, cut, end, IS_NEXT), self._room), j

    def _random_segment(
        self, document: int, units: list[int], i: int, a_end: int, target: int
    ) -> tuple[int, int] | None:
        """Returns about `target` tokens of another document, or else from elsewhere in this one."""
        documents = self._shards.num_documents
        if documents == 1:
            return self._distant_segment(units, i, a_end, target)
        other = int(self._rng.random() * (documents - 1))
        other += other >= document
        first, last = self._shards.document_offsets[other : other + 2].tolist()
        sentence = first + int(self._rng.random() * (last - first))
        stop = min(last, sentence + max(target, 1))  # a sentence has a token at least
        offsets = self._shards.sentence_offsets[sentence : stop + 1]
        start = int(offsets[0])
        length = int(offsets[1]) - start
        if length > self._room:  # begin at any of its pieces, as A does
            pieces = -(-length // self._room)
            piece = int(self._rng.random() * pieces)
            return start + piece * length // pieces, start + (piece + 1) * length // pieces
        index = int(np.searchsorted(offsets[1:-1], start + target)) + 1
        return start, int(offsets[index])

    def _distant_segment(
        self, units: list[int], i: int, a_end: int, target: int
    ) -> tuple[int, int] | None:
        """Returns tokens of the only document that neither follow nor precede A directly."""
        last = len(units) - 1
        before, after = max(i - 1, 0), max(last - a_end - 1, 0)
        if before + after == 0:
            return None
        unit = int(self._rng.random() * (before + after))
        stop = before
        if unit >= before:
            unit += a_end + 1 - before
            stop = last
        end = bisect_left(units, units[unit] + target, unit + 1, stop)
        return units[unit], units[end]

    def shorten(self, spans: Spans, length: int) -> Spans:
        """Returns the sequence cut to `length` tokens, special ones included."""
        if spans.b_end > spans.b_start:
            return self._truncated(spans, length - 3)
        return spans._replace(a_end=spans.a_start + length - 2)

    def _truncated(self, spans: Spans, room: int) -> Spans:
        """Cuts the longer segment, each token from front or back at random, to `room` in all."""
        a_start, a_end, b_start, b_end, label = spans
        a, b = a_end - a_start, b_end - b_start
        if a + b <= room:
            return spans
        a_cut = max(a - max(room - b, (room + 1) // 2), 0)
        b_cut = a + b - room - a_cut
        a_front = int(self._rng.binomial(a_cut, 0.5)) if a_cut else 0
        b_front = int(self._rng.binomial(b_cut, 0.5)) if b_cut else 0
        return Spans(
            a_start + a_front,
            a_end - (a_cut - a_front),
            b_start + b_front,
            b_end - (b_cut - b_front),
            label,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "balance": self.balance,
            "open": [list(cursor) for cursor in self._open],
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any], their_room: int | None = None) -> None:
        """Goes on from a state; `their_room` is that of its planner, where it is another."""
        self.epoch = state["epoch"]
        self.position = state["position"]
        self.balance = state["balance"]
        self._open = [list(cursor) for cursor in state["open"]]
        self._units = {}
        if their_room not in (None, self._room):  # sentences were cut up otherwise
            for cursor in self._open:
                document, unit = cursor
                token = self.units(document, their_room)[unit]
                cursor[1] = bisect_right(self.units(document), token) - 1
        for document, unit in self._open:
            units = self._units[document] = self.units(document)
            if unit >= len(units) - 1:
                raise UserError(
                    f"{self._shards.folder}: the checkpoint's data position lies behind document "
                    f"{document}: it belongs to other data"
                )
        self._order = self._epoch_order()
        self._rng.bit_generator.state = state["rng"]


def _sample(shards: Shards, planner: _Planner) -> list[Spans]:
    """Plans a sample, 32 sequences of a document at most so that no book hides the short ones."""
    rng = np.random.default_rng(0)
    sample: list[Spans] = []
    units_of = lru_cache(SAMPLE // 32)(planner.units)  # of few documents each comes up often
    while len(sample) < SAMPLE:
        document = int(rng.integers(shards.num_documents))
        units, unit = units_of(document), 0
        for _ in range(max(32, SAMPLE // shards.num_documents)):
            spans, unit = planner.plan(document, units, unit)
            sample.append(spans)
            if unit >= len(units) - 1:
                break
    return sample


def slots(lengths: Sequence[int], T: int) -> int:
    """Returns N, so that batches run out of tokens before they run out of sequences.

    Takes the shortest mean over a look-ahead's worth, with a margin of a quarter.

    Args:
        lengths: of a sample, not empty.
        T: tokens of a batch.
    """
    total = np.concatenate([[0], np.cumsum(lengths)])
    window = min(LOOKAHEAD, len(lengths))
    mean = float((total[window:] - total[:-window]).min()) / window
    return math.ceil(1.25 * T / mean) + 4


class Labels(NamedTuple):
    """How the next-sentence labels of a split fall.

    Attributes:
        mixed: whether there are both.
        note: what the user should know, "" where half of them are "is next".
    """

    mixed: bool
    note: str


def next_sentence_labels(
    shards: Shards, *, max_seq_length: int, short_seq_prob: float = 0.1, seed: int = 0
) -> Labels:
    """Returns what labels a sample of a split's sentence pairs has; arguments as in `Packer`."""
    planner = _Planner(
        shards,
        max_seq_length=max_seq_length,
        nsp=True,
        short_seq_prob=short_seq_prob,
        seed=seed,
        shuffle=False,
    )
    return _labels(shards, _sample(shards, planner))


def _labels(shards: Shards, sample: list[Spans]) -> Labels:
    following = sum(spans.label == IS_NEXT for spans in sample)
    random = sum(spans.label == IS_RANDOM for spans in sample)
    single = shards.num_documents == 1
    split = f"the {shards.split} split"
    if not following + random:
        return Labels(False, f"{split} is a single token: it gives no sentence pair")
    if not random:
        return Labels(
            False,
            f"{split} is one short document ({shards.num_sentences} sentence"
            f"{'s' * (shards.num_sentences > 1)}): no random next sentence can come from elsewhere "
            'in it, so every label is "is next"',
        )
    if not following:
        return Labels(
            False,
            f"no document of {split} has two tokens, the least that a next sentence needs: every "
            'label is "not next"',
        )
    notes = []
    if single:
        notes.append(
            f"{split} is a single document: random next sentences come from elsewhere in it"
        )
    share = following / (following + random)
    if abs(share - 0.5) > MAX_SKEW:
        why = "it is short" if single else "many of its documents are single tokens"
        notes.append(f'{share:.0%} of the labels of {split} are "is next", as {why}')
    return Labels(True, "; ".join(notes))


class Packer:
    """Endless iterator over batches of a split: planned, packed, masked, always of one shape.

    Batch k depends on the data, the arguments and k alone. After batch k, `state_dict` is what
    another Packer with the same arguments needs to go on with batch k + 1, bit for bit.

    Attributes:
        T, N, M: the constant shapes of the batches.
        notes: what the user should know of how this data is used.
    """

    def __init__(
        self,
        shards: Shards,
        ids: TokenIds,
        *,
        tokens_per_batch: int,
        max_seq_length: int,
        nsp: bool = True,
        short_seq_prob: float = 0.1,
        mlm_probability: float = 0.15,
        whole_word_mask: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        num_slots: int | None = None,
        epochs: int | None = None,
    ) -> None:
        """Prepares packing; reads a small sample of the data to choose N.

        Args:
            shards: the split.
            ids: of the vocabulary that made the shards.
            tokens_per_batch: T.
            max_seq_length: S, special tokens included.
            nsp: whether sequences are sentence pairs with a label, else text of one document.
            short_seq_prob: share of sequences planned shorter on purpose.
            mlm_probability: share of tokens to predict.
            whole_word_mask: whether the pieces of a word are predicted together.
            seed: of everything random.
            shuffle: whether documents come in random order.
            num_slots: N; None chooses it from the data.
            epochs: passes after which the iterator ends, its last batch partly empty; None never.

        Raises:
            UserError: T is less than S, S is too small, or the split is empty.
        """
        shortest = 5 if nsp else 3
        if max_seq_length < shortest:
            raise UserError(f"max_seq_length = {max_seq_length} must be at least {shortest}")
        if tokens_per_batch < max_seq_length:
            raise UserError(
                f"tokens_per_batch = {tokens_per_batch} must be at least "
                f"max_seq_length = {max_seq_length}"
            )
        if not shards.num_documents:
            raise UserError(f"{shards.folder}: the {shards.split} split is empty")
        if ids.vocab_size != shards.vocab_size:
            raise UserError(
                f"{shards.folder}: made with {shards.vocab_size} tokens in the vocabulary, not "
                f"{ids.vocab_size}; use its own tokenizer or another folder"
            )
        self._shards = shards
        self._ids = ids
        self._max_seq_length = max_seq_length
        self._shortest = shortest
        self._special = 3 if nsp else 2  # [CLS] and each [SEP]
        self._seed = seed

        def planner(shuffle: bool, epochs: int | None) -> _Planner:
            return _Planner(
                shards,
                max_seq_length=max_seq_length,
                nsp=nsp,
                short_seq_prob=short_seq_prob,
                seed=seed,
                shuffle=shuffle,
                epochs=epochs,
            )

        self.T = tokens_per_batch
        sample = [] if num_slots else _sample(shards, planner(False, None))
        self.N = num_slots or slots([spans.length for spans in sample], self.T)
        needed = -(-self.T // max_seq_length) + 1
        if needed > self.N:
            raise UserError(f"num_slots = {self.N} must be at least {needed} for these shapes")
        self.M = max_masked(self.T, self.N, mlm_probability)
        self._frame = Frame(self.T, self.N, self.M, max_seq_length)
        self._planner = planner(shuffle, epochs)
        self._masker = Masker(
            ids,
            mlm_probability=mlm_probability,
            whole_word_mask=whole_word_mask,
            max_masked=self.M,
        )
        self._pending: list[Spans] = []
        self._batches = 0
        self._real_tokens = 0
        self._room = 0  # tokens that the batches so far could hold
        note = _labels(shards, sample).note if nsp and sample else ""
        self.notes: list[str] = [note] if note else []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        sequences = self._select()
        if not sequences:
            raise StopIteration
        batch = self._materialise(sequences)
        self._count(sequences)
        return batch

    def skip(self) -> bool:
        """Advances by a batch without making it; False where there is none left."""
        sequences = self._select()
        if sequences:
            self._count(sequences)
        return bool(sequences)

    def _count(self, sequences: Sequence[Spans]) -> None:
        self._batches += 1
        self._real_tokens += sum(spans.length for spans in sequences)
        self._room += self.T

    @property
    def fill(self) -> float:
        """Share of tokens so far that are not [PAD]; 1 before the first batch."""
        return self._real_tokens / self._room if self._room else 1.0

    @property
    def epoch(self) -> float:
        """Passes over the documents so far, counted as they are opened."""
        return self._planner.epoch + self._planner.position / self._shards.num_documents

    @property
    def batch_index(self) -> int:
        """Batches made so far."""
        return self._batches

    def _select(self) -> list[Spans]:
        """Takes the next batch's sequences out of those that wait."""
        while len(self._pending) < LOOKAHEAD + self.N:
            spans = self._planner.next()
            if spans is None:
                break
            self._pending.append(spans)
        lengths = np.array([spans.length for spans in self._pending], dtype=np.int64)
        taken, rest = self._frame.choose(lengths)
        chosen = [self._pending[index] for index in taken]
        if rest > MAX_WASTE * self.T and rest >= self._shortest and len(taken) < self.N:
            waiting = np.setdiff1d(np.arange(len(lengths)), taken)
            longer = waiting[lengths[waiting] > rest]
            if len(longer):
                index = int(longer[np.argmin(lengths[longer])])
                chosen.append(self._planner.shorten(self._pending[index], rest))
                taken.append(index)
        gone = set(taken)
        self._pending = [s for index, s in enumerate(self._pending) if index not in gone]
        # Attention begins with the first: the longest last would let a GPU's other multiprocessors
        # wait. At 26,708 tokens of natural lengths the backward of a head takes 1.03 times its work
        # over all of them, in random order 1.16 times (scheduled on paper).
        return sorted(chosen, key=lambda spans: spans.length, reverse=True)

    def _materialise(self, sequences: Sequence[Spans]) -> Batch:
        ids, read = self._ids, self._shards.tokens
        laid = self._frame.empty(ids.pad)
        input_ids = laid.input_ids
        end = 0
        for slot, (a_start, a_end, b_start, b_end, label) in enumerate(sequences):
            laid.cu_seqlens[slot] = end
            laid.next_sentence_labels[slot] = label
            input_ids[end] = ids.cls
            start, end = end + 1, end + 1 + a_end - a_start
            input_ids[start:end] = read(a_start, a_end)
            input_ids[end] = ids.sep
            end += 1
            if b_end > b_start:
                start, end = end, end + b_end - b_start
                input_ids[start:end] = read(b_start, b_end)
                input_ids[end] = ids.sep
                end += 1
                laid.token_type_ids[start:end] = 1
        highest = int(input_ids.max())
        if highest >= ids.vocab_size:
            raise self._shards.damaged_id(highest, ids.vocab_size)
        # its own stream for each batch: masks do not depend on how the batch was planned
        rng = np.random.default_rng([self._seed, 2, self._batches])
        return self._frame.finished(laid, len(sequences), end, self._masker, rng)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that changes from batch to batch, as JSON can hold it."""
        return {
            "shape": self._shape(),
            "batches": self._batches,
            "real_tokens": self._real_tokens,
            "room": self._room,
            "pending": [list(spans) for spans in self._pending],
            "planner": self._planner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`.

        Raises:
            UserError: it belongs to other data or other shapes.
        """
        self._require_same(state, set(self._shape()))
        self.adopt(state)

    def _require_same(self, state: dict[str, Any], names: set[str]) -> None:
        theirs, ours = state.get("shape", {}), self._shape()
        theirs = {"data": ours["data"], **theirs}  # checkpoints once had none
        if any(theirs.get(name) != ours[name] for name in names):
            raise UserError(
                f"{self._shards.folder}: the checkpoint's data position is for other data or "
                f"settings ({theirs}, not {ours}); resume with its own"
            )

    def adopt(self, state: dict[str, Any]) -> None:
        """Goes on with the data where a packer of other T or other S stopped.

        Raises:
            UserError: the state belongs to other data.
        """
        self._require_same(state, {"seed", "documents", "tokens", "data"})
        S, shorten = self._max_seq_length, self._planner.shorten
        self._batches = state["batches"]
        self._real_tokens, self._room = state["real_tokens"], state["room"]
        theirs = state["shape"]["max_seq_length"]
        self._planner.load_state_dict(state["planner"], theirs - self._special)
        pending = [Spans(*spans) for spans in state["pending"]]
        self._pending = [spans if spans.length <= S else shorten(spans, S) for spans in pending]

    def _shape(self) -> dict[str, Any]:
        return {
            "tokens_per_batch": self.T,
            "num_slots": self.N,
            "max_masked": self.M,
            "max_seq_length": self._max_seq_length,
            "seed": self._seed,
            "documents": self._shards.num_documents,
            "tokens": self._shards.num_tokens,
            "data": self._shards.digest,
        }


def _best_fit(lengths: NDArray[np.int64], rest: int) -> list[int]:
    """Returns the one or two of ascending `lengths` whose sum comes nearest to `rest` from below.

    Empty where none fits.
    """
    single = int(np.searchsorted(lengths, rest, side="right")) - 1
    if single < 0:
        return []
    single = int(np.searchsorted(lengths, lengths[single]))  # the oldest of that length
    if len(lengths) == 1:
        return [single]
    partner = np.searchsorted(lengths, rest - lengths, side="right") - 1
    partner -= partner == np.arange(len(lengths))
    sums = np.where(partner >= 0, lengths + lengths[partner], 0)
    best = int(np.argmax(sums))
    if sums[best] > lengths[single]:
        return [int(partner[best]), best]
    return [single]


def evaluation_batches(
    shards: Shards, ids: TokenIds, *, max_batches: int | None = None, **packing: Any
) -> list[Batch]:
    """Returns one pass over a split in order, the same batches and masks at every call.

    Args:
        shards, ids: as in `Packer`.
        max_batches: how many to return at most.
        packing: the other arguments of `Packer`. No sequence is shorter on purpose unless
            `short_seq_prob` says so; with `num_slots` of the training batches, one graph serves
            both.

    Raises:
        UserError: as in `Packer`.
    """
    packing = {"short_seq_prob": 0.0, **packing}
    return list(islice(Packer(shards, ids, **packing, shuffle=False, epochs=1), max_batches))
