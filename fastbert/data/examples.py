"""Batches from tokenized examples of any source, for a training loop of one's own.

T tokens packed, N sequences packed (slots), M masked tokens, S longest sequence, V vocabulary. The
examples are whole sequences with their [CLS] and [SEP]; `pack` lays them end to end as the packer
lays those that it plans itself, and masks them by the same rules.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastbert.data.batch import Batch
from fastbert.data.mask import IGNORE, Masker, max_masked
from fastbert.data.pack import LOOKAHEAD, MAX_WASTE, Frame, slots
from fastbert.data.tokenize import TokenIds, WordPiece

_SAMPLE = 4 * LOOKAHEAD  # examples read ahead to choose N
_MUCH = 0.1  # of a batch, empty
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")
_LABEL = "next_sentence_label"


def pack(
    examples: Iterable[Any],
    *,
    tokens_per_batch: int,
    max_seq_length: int,
    tokenizer: Any = None,
    vocab_size: int | None = None,
    mask_token_id: int | None = None,
    pad_token_id: int | None = None,
    special_token_ids: Iterable[int] = (),
    mlm_probability: float = 0.15,
    whole_word_mask: bool = False,
    truncation: bool = False,
    num_slots: int | None = None,
    drop_last: bool = False,
    seed: int = 0,
) -> Iterator[Batch]:
    """Packs tokenized examples into batches for `TrainStep`, without padding, masks drawn anew.

    Each batch takes, of the next few hundred examples, those that fill it best; shapes stay the
    same. Sequences are never cut up. The same examples and arguments give the same batches. One
    call is one pass; give each pass a `seed` of its own, or it has the masks of the one before.

    Args:
        examples: read once, as they are needed. Each is a sequence of ids, [CLS] and [SEP] included
            (a list, an array or a tensor of one dimension), or a mapping as a tokenizer of
            transformers or a row of `datasets` is: `input_ids`, and optionally `token_type_ids`,
            `attention_mask` (where it is 0, tokens are left out), `special_tokens_mask` (where it
            is 1, none is predicted) and `next_sentence_label` (0 B follows A, 1 B is random, -100
            none). One mapping of such columns will do as well.
        tokens_per_batch: T.
        max_seq_length: S, at most the model's `max_position_embeddings`.
        tokenizer: of transformers, or a `WordPiece`; tells vocabulary and special tokens.
        vocab_size: V, without a tokenizer.
        mask_token_id: of [MASK], without a tokenizer.
        pad_token_id: of [PAD], without a tokenizer; 0 unless it is given.
        special_token_ids: of [CLS], [SEP] and whatever else is never predicted or drawn at random,
            without a tokenizer.
        mlm_probability: share of a sequence's tokens to predict; of these 80% become [MASK], 10% a
            random token, 10% stay.
        whole_word_mask: whether the "##" pieces of a word are predicted together; needs a
            tokenizer.
        truncation: whether what is longer than S loses the tokens before its last one, rather than
            being refused.
        num_slots: N; None chooses it from the first examples. Where later ones are so much shorter
            that slots run out before tokens, a warning says which number would do.
        drop_last: whether to leave the last batch out where it is not full.
        seed: of the masks.

    Returns:
        the batches, on the CPU.

    Raises:
        ValueError: an argument is wrong; or, when its batch is made, an example is: it tells which.
    """
    ids = _token_ids(tokenizer, vocab_size, mask_token_id, pad_token_id, special_token_ids)
    if whole_word_mask and tokenizer is None:
        raise ValueError("whole_word_mask needs a tokenizer, which knows the pieces of words")
    if not 0 < mlm_probability < 1:
        raise ValueError(f"mlm_probability = {mlm_probability} must be more than 0, less than 1")
    if max_seq_length < 3:
        raise ValueError(f"max_seq_length = {max_seq_length} must be at least 3")
    if tokens_per_batch < max_seq_length:
        raise ValueError(
            f"tokens_per_batch = {tokens_per_batch} must be at least max_seq_length = "
            f"{max_seq_length}"
        )
    least = -(-tokens_per_batch // max_seq_length) + 1
    if num_slots is not None and num_slots < least:
        raise ValueError(f"num_slots = {num_slots} must be at least {least} for these shapes")
    read = _read(iter(_rows(examples)), ids, max_seq_length, truncation)

    def batches() -> Iterator[Batch]:
        waiting = list(islice(read, LOOKAHEAD if num_slots else _SAMPLE))
        if not waiting:
            return
        T, N = tokens_per_batch, num_slots
        if N is None:
            N = max(slots([len(one.input_ids) for one in waiting], T), least)
        frame = Frame(T, N, max_masked(T, N, mlm_probability), max_seq_length)
        masker = Masker(
            ids,
            mlm_probability=mlm_probability,
            whole_word_mask=whole_word_mask,
            max_masked=frame.M,
        )
        made, told = 0, False
        while True:
            waiting += islice(read, max(0, LOOKAHEAD + N - len(waiting)))
            if not waiting:
                return
            taken, rest = frame.choose(np.array([len(one.input_ids) for one in waiting]))
            gone = set(taken)
            chosen = [waiting[index] for index in taken]
            waiting = [one for index, one in enumerate(waiting) if index not in gone]
            if not told and rest > _MUCH * T and any(len(w.input_ids) <= rest for w in waiting):
                told = True
                enough = slots([len(one.input_ids) for one in waiting], T)
                warnings.warn(
                    f"batch {made}: {rest} of {T} tokens stay empty, as {N} slots for sequences "
                    f"are too few: shuffle the examples, or give num_slots = {enough}",
                    stacklevel=2,
                )
            if drop_last and rest > MAX_WASTE * T and not waiting:
                return  # nothing is left to read: else as much as fits would wait
            yield _batch(frame, chosen, masker, ids.pad, np.random.default_rng([seed, 2, made]))
            made += 1

    return batches()


class _Example(NamedTuple):
    """One sequence of n tokens."""

    input_ids: NDArray[np.int64]  # (n,)
    token_type_ids: NDArray[np.int64]  # (n,)
    never: NDArray[np.bool_]  # (n,) not to be predicted
    label: int


def _batch(
    frame: Frame, chosen: list[_Example], masker: Masker, pad: int, rng: np.random.Generator
) -> Batch:
    laid, never = frame.empty(pad), np.zeros(frame.T, dtype=bool)
    end = 0
    # The longest first, as the packer has them, so that a GPU begins with it.
    for slot, one in enumerate(sorted(chosen, key=lambda one: len(one.input_ids), reverse=True)):
        start, end = end, end + len(one.input_ids)
        laid.cu_seqlens[slot] = start
        laid.input_ids[start:end] = one.input_ids
        laid.token_type_ids[start:end] = one.token_type_ids
        laid.next_sentence_labels[slot] = one.label
        never[start:end] = one.never
    return frame.finished(laid, len(chosen), end, masker, rng, never)


def _rows(examples: Iterable[Any]) -> Iterable[Any]:
    """The examples one by one, where they came as columns."""
    if not isinstance(examples, Mapping):
        return examples
    known = {name: examples[name] for name in (*_COLUMNS, _LABEL) if name in examples}
    if "input_ids" not in known:
        raise ValueError("examples: a mapping must have input_ids")
    lengths = {name: len(column) for name, column in known.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"examples: columns of different lengths: {lengths}")
    return (dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True))


def _read(rows: Iterator[Any], ids: TokenIds, S: int, truncation: bool) -> Iterator[_Example]:
    for index, row in enumerate(rows):
        try:
            yield _example(row, ids, S, truncation)
        except ValueError as error:
            raise ValueError(f"example {index}: {error}") from None


def _example(row: Any, ids: TokenIds, S: int, truncation: bool) -> _Example:
    """Raises ValueError where it is none."""
    columns = row if isinstance(row, Mapping) else {"input_ids": row}
    if "input_ids" not in columns:
        raise ValueError(f"it has no input_ids, only {', '.join(map(str, columns))}"[:200])
    found = {name: _integers(name, columns[name]) for name in _COLUMNS if name in columns}
    tokens = found["input_ids"]
    for name, values in found.items():
        if len(values) != len(tokens):
            raise ValueError(f"{len(values)} {name} for {len(tokens)} input_ids")
    real = found.get("attention_mask")
    if real is not None:
        found = {name: values[real != 0] for name, values in found.items()}
        tokens = found["input_ids"]
    if len(tokens) > S:
        if not truncation:
            raise ValueError(
                f"{len(tokens)} tokens are more than max_seq_length = {S}: cut it, or give "
                "truncation = True"
            )
        kept = np.r_[: S - 1, -1]  # the last token is [SEP]
        found = {name: values[kept] for name, values in found.items()}
        tokens = found["input_ids"]
    if not len(tokens):
        raise ValueError("it has no tokens")
    if tokens.min() < 0 or tokens.max() >= ids.vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise ValueError(f"token {wrong} is outside the vocabulary of {ids.vocab_size}")
    pads = np.flatnonzero(tokens == ids.pad)
    if len(pads):
        raise ValueError(f"[PAD] at position {pads[0]}: give it unpadded, or with attention_mask")
    types = found.get("token_type_ids", np.zeros_like(tokens))
    if types.min() < 0:
        raise ValueError(f"token_type_ids has {types.min()}")
    label = columns.get(_LABEL, IGNORE)
    label = label.item() if isinstance(label, Tensor | np.ndarray) else label
    if label not in (0, 1, IGNORE):
        raise ValueError(f"{_LABEL} = {label!r} must be 0, 1 or {IGNORE}")
    never = found.get("special_tokens_mask", np.zeros_like(tokens)) != 0
    return _Example(tokens, types, never, int(label))


def _integers(name: str, values: Any) -> NDArray[np.int64]:
    """(n,) of whatever holds them."""
    if isinstance(values, Tensor):
        values = values.cpu()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        array = np.empty((), dtype=object)
    if array.shape == (0,):
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in ("iub" if name.endswith("mask") else "iu"):
        raise ValueError(f"{name} must be one row of integers, not {_described(values)}")
    return array.astype(np.int64)


def _described(values: Any) -> str:
    shape = getattr(values, "shape", None)
    kind = type(values).__name__
    return kind if shape is None else f"a {kind} of {values.dtype}, shape {tuple(shape)}"


def _token_ids(
    tokenizer: Any,
    vocab_size: int | None,
    mask_token_id: int | None,
    pad_token_id: int | None,
    special_token_ids: Iterable[int],
) -> TokenIds:
    special = set(special_token_ids)
    if tokenizer is not None and (special or {vocab_size, mask_token_id, pad_token_id} != {None}):
        raise ValueError("give tokenizer, or vocab_size and the ids of special tokens, not both")
    if isinstance(tokenizer, WordPiece):
        return tokenizer.ids
    pieces: list[str] = []
    if tokenizer is not None:
        vocab_size, mask_token_id = len(tokenizer), tokenizer.mask_token_id
        pad_token_id, special = tokenizer.pad_token_id, set(tokenizer.all_special_ids)
        pieces = [one or "" for one in tokenizer.convert_ids_to_tokens(list(range(vocab_size)))]
        if mask_token_id is None or pad_token_id is None:
            raise ValueError("the tokenizer has no mask token or no padding token")
    if vocab_size is None or mask_token_id is None:
        raise ValueError("give tokenizer, or vocab_size and mask_token_id")
    pad_token_id = 0 if pad_token_id is None else pad_token_id
    special |= {mask_token_id, pad_token_id}
    if min(special) < 0 or max(special) >= vocab_size:
        shown = ", ".join(map(str, sorted(special)))
        raise ValueError(f"special tokens {shown} must lie in the vocabulary of {vocab_size}")
    if len(special) >= vocab_size:
        raise ValueError(f"vocab_size = {vocab_size} leaves no token beside the special ones")
    continues = np.zeros(vocab_size, dtype=bool)
    continues[: len(pieces)] = [piece.startswith("##") for piece in pieces]
    return TokenIds(
        vocab_size=vocab_size,
        pad=pad_token_id,
        unk=-1,  # who packs needs mask and padding only
        cls=-1,
        sep=-1,
        mask=mask_token_id,
        special=np.array(sorted(special), dtype=np.int64),
        is_continuation=continues,
    )
