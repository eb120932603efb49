"""Packing: full batches of one shape, nothing lost or doubled, going on where it stopped."""

import json
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbert.data.batch import Batch
from fastbert.data.corpus import Skipped, read_corpus
from fastbert.data.pack import Packer, evaluation_batches, next_sentence_labels
from fastbert.data.shards import Shards, build_shards
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError, UserError

PAD, _, CLS, SEP, MASK = range(5)


def packer(make_ids, shards, T=1024, S=128, **changes):
    ids = make_ids(shards.vocab_size)
    return Packer(shards, ids, tokens_per_batch=T, max_seq_length=S, **{"seed": 1, **changes})


def ragged(rng, documents=60, longest=60, sentences=25):
    return [
        rng.integers(1, longest, size=rng.integers(1, sentences)).tolist() for _ in range(documents)
    ]


def equal(a: Batch, b: Batch) -> bool:
    same = all(torch.equal(x, y) for (_, x), (_, y) in zip(a.tensors(), b.tensors(), strict=True))
    return same and (a.num_tokens, a.num_sequences) == (b.num_tokens, b.num_sequences)


def originals(batch: Batch) -> np.ndarray:
    ids = batch.input_ids.numpy().copy()
    used = batch.masked_labels.numpy() != -100
    ids[batch.masked_positions.numpy()[used]] = batch.masked_labels.numpy()[used]
    return ids


def segments(batch: Batch):
    """Yields (a, b, label) of each sequence, token positions in the split; b may be empty."""
    ids, cu = originals(batch), batch.cu_seqlens.numpy()
    types = batch.token_type_ids.numpy()
    for n in range(batch.num_sequences):
        sequence, kinds = ids[cu[n] : cu[n + 1]], types[cu[n] : cu[n + 1]]
        assert sequence[0] == CLS
        assert sequence[-1] == SEP
        a, b = sequence[kinds == 0], sequence[kinds == 1]
        assert a[-1] == SEP
        assert len(b) == 0 or b[-1] == SEP
        a, b = a[1:-1], b[:-1]
        assert (a >= 5).all()
        assert (b >= 5).all()
        assert (kinds[: len(a) + 2] == 0).all()
        assert (np.diff(a) == 1).all()
        assert (np.diff(b) == 1).all()
        yield a - 5, b - 5, int(batch.next_sentence_labels[n])


def document_of(shards, position):
    starts = shards.sentence_offsets[shards.document_offsets]
    return int(np.searchsorted(starts, position, side="right")) - 1


def check_shape(batch: Batch, T, N, M, S):
    for name, shape in {
        "input_ids": (T,),
        "token_type_ids": (T,),
        "position_ids": (T,),
        "cu_seqlens": (N + 1,),
        "masked_positions": (M,),
        "masked_labels": (M,),
        "next_sentence_labels": (N,),
    }.items():
        tensor = getattr(batch, name)
        assert tuple(tensor.shape) == shape
        assert tensor.dtype == (torch.int32 if name == "cu_seqlens" else torch.int64)
    assert batch.max_seqlen == S
    cu = batch.cu_seqlens.numpy()
    lengths = np.diff(cu)
    assert cu[0] == 0
    assert cu[-1] == T
    assert (lengths >= 0).all()
    assert lengths.max() <= S
    assert cu[batch.num_sequences] == batch.num_tokens
    ids = batch.input_ids.numpy()
    assert (ids[batch.num_tokens :] == PAD).all()
    assert (ids[: batch.num_tokens] != PAD).all()
    assert (batch.next_sentence_labels[batch.num_sequences :] == -100).all()
    assert (batch.token_type_ids[batch.num_tokens :] == 0).all()
    expected = np.concatenate([np.arange(length) for length in lengths])
    assert (batch.position_ids.numpy() == expected).all()
    used = batch.masked_labels != -100
    assert (batch.masked_positions[used] < batch.num_tokens).all()
    assert used.any()


CORPORA = {
    "ragged": lambda: ragged(np.random.default_rng(0)),
    "uniform": lambda: [[297] for _ in range(40)],
    "long sentences": lambda: [[5000], [1300, 7], [2, 900]],
    "tweets": lambda: [[n % 11 + 4] for n in range(500)],
    "books and tweets": lambda: [[20] * 2000, *([n % 9 + 4] for n in range(300)), [30] * 1500],
    "tiny": lambda: [[3, 4], [5, 2]],
    "one document": lambda: [[7, 12, 3, 25, 9, 14] * 4],
    "two sentences": lambda: [[9, 9]],
    "two tokens": lambda: [[1], [1]],
}


@pytest.mark.parametrize(
    ("T", "S", "nsp"), [(4096, 512, True), (4096, 512, False), (1024, 128, True), (512, 512, False)]
)
@pytest.mark.parametrize("name", CORPORA)
def test_batches_are_full_and_of_one_shape(make_shards, make_ids, name, T, S, nsp):
    shards = make_shards(CORPORA[name]())
    source = packer(make_ids, shards, T, S, nsp=nsp)
    fill = []
    for batch in islice(source, min(12, 25_000 // T)):
        check_shape(batch, source.T, source.N, source.M, S)
        fill.append(batch.num_tokens / T)
        lengths = np.diff(batch.cu_seqlens.numpy())[: batch.num_sequences]
        assert (np.diff(lengths) <= 0).all()  # the longest first
        for _, b, label in segments(batch):
            assert (label == -100) == (len(b) == 0)
    assert min(fill) >= 0.98
    assert source.fill == pytest.approx(np.mean(fill))


def test_constant_shapes_over_epochs(make_shards, make_ids):
    source = packer(make_ids, make_shards(ragged(np.random.default_rng(5), 100)))
    while source.epoch < 7:
        batch = next(source)
        check_shape(batch, source.T, source.N, source.M, 128)
        assert batch.num_tokens >= 0.98 * 1024


def test_every_sequence_300_tokens(make_shards, make_ids):
    source = packer(make_ids, make_shards([[298]] * 50), 4096, 512, nsp=False, short_seq_prob=0)
    for batch in islice(source, 50):
        lengths = np.diff(batch.cu_seqlens.numpy())[: batch.num_sequences].tolist()
        assert lengths.count(300) == 13
        assert len(lengths) == 14  # the last one shortened
        assert batch.num_tokens == 4096


@given(
    documents=st.lists(
        st.lists(st.integers(1, 200), min_size=1, max_size=12), min_size=1, max_size=12
    ),
    S=st.sampled_from([16, 64, 128]),
    budget=st.integers(256, 1200),
    nsp=st.booleans(),
    whole_word_mask=st.booleans(),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_corpus_packs(make_shards, make_ids, documents, S, budget, nsp, whole_word_mask):
    shards = make_shards(documents)
    source = packer(make_ids, shards, budget, S, nsp=nsp, whole_word_mask=whole_word_mask)
    for batch in islice(source, 12):
        check_shape(batch, source.T, source.N, source.M, S)
        assert batch.num_tokens >= 0.98 * budget
        for a, b, label in segments(batch):
            if label == 0:
                assert document_of(shards, a[0]) == document_of(shards, b[-1])
                assert a[-1] < b[0]
            elif label == 1 and len(documents) > 1:
                assert document_of(shards, a[0]) != document_of(shards, b[0])


def test_next_sentence_labels_are_true(make_shards, make_ids):
    shards = make_shards(ragged(np.random.default_rng(1), 100, longest=40))
    starts = set(shards.sentence_offsets.tolist())
    whole = adjoining = randoms = begins = 0
    for batch in islice(packer(make_ids, shards, S=256), 200):
        for a, b, label in segments(batch):
            documents = {document_of(shards, p) for p in (a[0], a[-1])}
            others = {document_of(shards, p) for p in (b[0], b[-1])}
            assert len(documents) == len(others) == 1
            assert (documents == others) == (label == 0)
            if label == 0:
                # between A and B lie at most the tokens that truncation took
                assert a[-1] < b[0] <= a[-1] + 1 + 3 * 256
                whole += 1
                adjoining += b[0] == a[-1] + 1
            else:
                randoms += 1
                begins += int(b[0]) in starts
    assert adjoining > 0.6 * whole  # the others lost tokens to truncation
    assert begins > 0.6 * randoms


@pytest.mark.parametrize("name", ["ragged", "uniform", "long sentences", "tweets", "one document"])
def test_labels_are_half_and_half(make_shards, make_ids, name):
    short = name == "tweets"  # of which a batch holds many
    batches = [
        [label for *_, label in segments(batch) if label != -100]
        for batch in islice(packer(make_ids, make_shards(CORPORA[name]())), 300 - 200 * short)
    ]
    assert abs(np.mean(list(chain(*batches))) - 0.5) < 0.01
    if name != "uniform":
        # And not in a pattern: batches differ as coins would, standard deviation 1.
        scores = [2 * (np.mean(labels) - 0.5) * len(labels) ** 0.5 for labels in batches]
        assert 0.3 < np.std(scores) < 1.5


def test_single_document_takes_b_from_afar(make_shards, make_ids):
    shards = make_shards([[10] * 300])
    source = packer(make_ids, shards)
    assert "single document" in source.notes[0]
    for batch in islice(source, 50):
        for a, b, label in segments(batch):
            if label == 1:
                assert b[0] > a[-1] + 1 or b[-1] < a[0] - 1
    assert not packer(make_ids, make_shards([[5], [6]])).notes


NO_RANDOM = 'every label is "is next"'
NO_NEXT = 'every label is "not next"'


@pytest.mark.parametrize(
    ("documents", "labels", "note"),
    [
        ([[1]], set(), "is a single token: it gives no sentence pair"),
        ([[20]], {0}, NO_RANDOM),
        ([[2]], {0}, NO_RANDOM),
        ([[10, 10]], {0}, NO_RANDOM),
        ([[1, 1]], {0}, NO_RANDOM),
        ([[10, 10, 10]], {0, 1}, 'elsewhere in it; 65% of the labels of the train split are "is n'),
        ([[10] * 9], {0, 1}, "random next sentences come from elsewhere in it"),
        ([[500]], {0, 1}, "random next sentences come from elsewhere in it"),  # cut into many
        ([[1], [1]], {1}, NO_NEXT),
        ([[1]] * 50, {1}, NO_NEXT),
        ([[1]] * 50 + [[10] * 20], {0, 1}, "as many of its documents are single tokens"),
        ([[2]] * 50, {0, 1}, ""),
        ([[10], [10]], {0, 1}, ""),
        ([[1, 1]] * 9, {0, 1}, ""),
    ],
)
def test_notes_tell_what_labels_there_are(make_shards, make_ids, documents, labels, note):
    shards = make_shards(documents)
    source = packer(make_ids, shards, T=128, S=32)
    found = {label for batch in islice(source, 15) for *_, label in segments(batch)}
    assert found - {-100} == labels
    said = next_sentence_labels(shards, max_seq_length=32, seed=1)
    assert said.mixed == (labels == {0, 1})
    assert note in said.note
    assert source.notes == ([said.note] if note else [])
    assert packer(make_ids, shards, T=128, S=32, nsp=False).notes == []


def test_without_nsp_sequences_hold_whole_sentences_of_one_document(make_shards, make_ids):
    shards = make_shards(ragged(np.random.default_rng(2), 80, longest=50))
    ends = set(shards.sentence_offsets.tolist())
    cut = total = 0
    for batch in islice(packer(make_ids, shards, T=4096, nsp=False), 100):
        for a, b, label in segments(batch):
            assert label == -100
            assert len(b) == 0
            assert document_of(shards, a[0]) == document_of(shards, a[-1])
            assert a[0] in ends
            cut += int(a[-1]) + 1 not in ends
            total += 1
        assert (batch.token_type_ids == 0).all()
    assert cut < 0.05 * total


def test_an_epoch_sees_every_token(make_shards, make_ids):
    shards = make_shards(ragged(np.random.default_rng(3), 64))
    ids = make_ids(shards.vocab_size)
    batches = evaluation_batches(shards, ids, tokens_per_batch=1024, max_seq_length=128, nsp=False)
    seen = np.concatenate([a for batch in batches for a, *_ in segments(batch)])
    assert len(np.unique(seen)) == len(seen)
    assert len(seen) >= 0.98 * shards.num_tokens  # the rest was cut off to fit
    source = packer(make_ids, shards, nsp=False)
    seen = set()
    while source.epoch < 4:
        seen |= {int(p) for a, *_ in segments(next(source)) for p in a}
    assert len(seen) == shards.num_tokens


def test_documents_are_mixed(make_shards, make_ids):
    shards = make_shards([[20] * 500 for _ in range(40)])
    batch = next(packer(make_ids, shards, T=4096))
    assert len({document_of(shards, a[0]) for a, *_ in segments(batch)}) > 5


def test_short_sequences(make_shards, make_ids):
    shards = make_shards([[10] * 400 for _ in range(20)])

    def short(probability):
        source = packer(make_ids, shards, T=4096, nsp=False, short_seq_prob=probability)
        sizes = [len(a) for b in islice(source, 40) for a, *_ in segments(b)]
        return np.mean(np.array(sizes) < 110)

    assert short(0) < 0.06
    assert 0.06 < short(0.1) - short(0) < 0.14
    assert short(1) > 0.7


@pytest.mark.parametrize("nsp", [True, False])
def test_same_seed_same_batches_other_seed_others(make_shards, make_ids, nsp):
    shards = make_shards(ragged(np.random.default_rng(6)))

    def run(seed):
        return list(islice(packer(make_ids, shards, nsp=nsp, seed=seed), 20))

    assert all(map(equal, run(1), run(1)))
    assert not any(map(equal, run(1), run(2)))
    assert run(2**63 - 1)


@pytest.mark.parametrize("name", ["ragged", "tiny", "one document", "books and tweets"])
@pytest.mark.parametrize("nsp", [True, False])
def test_resume_is_exact(make_shards, make_ids, name, nsp):
    shards = make_shards(CORPORA[name]())
    source = packer(make_ids, shards, nsp=nsp, whole_word_mask=True)
    states, batches = [json.dumps(source.state_dict())], []
    for _ in range(20):
        batches.append(next(source))
        states.append(json.dumps(source.state_dict()))
    for k in (0, 1, 7, 19):
        restored = packer(make_ids, shards, nsp=nsp, whole_word_mask=True, num_slots=source.N)
        next(restored)
        restored.load_state_dict(json.loads(states[k]))
        assert restored.batch_index == k
        for j in range(k, min(k + 5, 20)):
            assert equal(next(restored), batches[j])
            assert json.dumps(restored.state_dict()) == states[j + 1]


def test_a_state_does_not_change_afterwards(make_shards, make_ids):
    source = packer(make_ids, make_shards(CORPORA["ragged"]()))
    next(source)
    state = source.state_dict()
    before = json.dumps(state)
    for _ in range(5):
        next(source)
    assert json.dumps(state) == before


def test_state_of_other_data_is_refused(make_shards, make_ids):
    one, other = make_shards(CORPORA["ragged"]()), make_shards([[9, 9], [9, 9]])
    state = packer(make_ids, one).state_dict()
    for target in (packer(make_ids, other), packer(make_ids, one, T=2048)):
        with pytest.raises(UserError, match="is for other data or settings"):
            target.load_state_dict(state)


@pytest.mark.parametrize(("before", "after"), [(16, 40), (40, 16)])
def test_another_length_goes_on_with_the_data(make_shards, make_ids, before, after):
    """No token of the epoch is skipped but those in the sentence that was cut up otherwise."""
    rng = np.random.default_rng(0)
    shards = make_shards([[int(n) for n in rng.integers(1, 90, 12)] for _ in range(30)])
    short = packer(make_ids, shards, 256, before, nsp=False, short_seq_prob=0.0)
    batches = [next(short) for _ in range(8)]
    long = packer(make_ids, shards, 512, after, nsp=False, short_seq_prob=0.0)
    long.adopt(short.state_dict())
    assert long.batch_index == 8 and long.epoch == short.epoch
    batches += [next(long) for _ in range(6)]
    assert all(int(batch.cu_seqlens.diff().max()) <= after for batch in batches[8:])
    assert 0.95 < long.fill <= 1
    again = packer(make_ids, shards, 512, after, nsp=False, short_seq_prob=0.0)
    again.adopt(short.state_dict())
    assert equal(next(again), batches[8])
    other = packer(make_ids, shards, 512, after, nsp=False, seed=7)
    with pytest.raises(UserError, match="the checkpoint's data position is for other data"):
        other.adopt(short.state_dict())


def test_masks_follow_the_batch_index(make_shards, make_ids):
    """Equal sequences of different batches are masked differently, epoch after epoch."""
    shards = make_shards([[60]])
    source = packer(make_ids, shards, T=640, S=64, nsp=False, short_seq_prob=0)
    batches = list(islice(source, 5))
    assert len({tuple(batch.masked_positions.tolist()) for batch in batches}) == 5
    assert len({tuple(originals(batch).tolist()) for batch in batches}) == 1


def test_mlm_share(make_shards, make_ids):
    shards = make_shards(ragged(np.random.default_rng(7)))
    for p in (0.15, 0.4):
        chosen = candidates = masks = 0
        for batch in islice(packer(make_ids, shards, T=8192, S=512, mlm_probability=p), 20):
            chosen += int((batch.masked_labels != -100).sum())
            masks += int((batch.input_ids == MASK).sum())
            candidates += int((originals(batch) >= 5).sum())
        assert abs(chosen / candidates - p) < 0.005
        assert abs(masks / chosen - 0.8) < 0.02


def test_evaluation_is_fixed_and_in_order(make_shards, make_ids):
    shards = make_shards(ragged(np.random.default_rng(8), 40))
    train = packer(make_ids, shards)
    common = {"tokens_per_batch": 1024, "max_seq_length": 128, "num_slots": train.N, "seed": 3}
    first = evaluation_batches(shards, train_ids := make_ids(shards.vocab_size), **common)
    assert all(map(equal, first, evaluation_batches(shards, train_ids, **common)))
    assert len(first) > 3
    for batch in first:
        check_shape(batch, train.T, train.N, train.M, 128)
    starts = [np.mean([a[0] for a, *_ in segments(batch)]) for batch in first]
    assert np.corrcoef(starts, np.arange(len(starts)))[0, 1] > 0.9
    few = evaluation_batches(shards, train_ids, **common, max_batches=2)
    assert len(few) == 2
    assert all(map(equal, few, first))


def test_evaluation_of_less_than_a_batch(make_shards, make_ids):
    shards = make_shards([[4, 5], [6, 3]])
    (batch,) = evaluation_batches(
        shards, make_ids(shards.vocab_size), tokens_per_batch=4096, max_seq_length=128
    )
    assert 0 < batch.num_tokens < 100
    assert np.diff(batch.cu_seqlens.numpy()).max() <= 128
    assert batch.next_sentence_labels[batch.num_sequences :].eq(-100).all()


def test_bad_requests(make_shards, make_ids):
    shards = make_shards([[9, 9]])
    with pytest.raises(UserError, match="tokens_per_batch = 64 must be at least"):
        packer(make_ids, shards, T=64, S=128)
    with pytest.raises(UserError, match="max_seq_length = 4 must be at least 5"):
        packer(make_ids, shards, S=4)
    with pytest.raises(UserError, match="num_slots = 3 must be at least 9"):
        packer(make_ids, shards, num_slots=3)
    with pytest.raises(UserError, match="split is empty"):
        packer(make_ids, make_shards([]))
    with pytest.raises(UserError, match="made with 23 tokens in the vocabulary, not 99"):
        Packer(shards, make_ids(99), tokens_per_batch=128, max_seq_length=128)


def test_damaged_tokens_are_told(make_shards, make_ids):
    shards = make_shards([[9, 9], [8, 8]])
    shards._shards[0][:] = 60_000
    with pytest.raises(RunError, match="train tokens hold id 60000"):
        next(packer(make_ids, shards))


def test_the_whole_road(tmp_path):
    """Builtin text to batches, which decode to sentences of the text."""
    documents = list(islice(read_corpus("builtin", Skipped()), 60))
    (tmp_path / "a.txt").write_text("\n\n".join("\n".join(d) for d in documents))
    wordpiece = WordPiece.train((s for d in documents for s in d), 2000)
    build_shards(
        str(tmp_path / "a.txt"),
        wordpiece,
        tmp_path / "s",
        validation_fraction=0.1,
        seed=0,
        progress=False,
    )
    labels = []
    text = " ".join(wordpiece.decode(wordpiece.encode_batch([s])[0]) for d in documents for s in d)
    for split in ("train", "validation"):
        source = Packer(
            Shards.open(tmp_path / "s", split),
            wordpiece.ids,
            tokens_per_batch=4096,
            max_seq_length=128,
            whole_word_mask=True,
        )
        for batch in islice(source, 25):
            check_shape(batch, source.T, source.N, source.M, 128)
            assert batch.num_tokens >= 0.98 * 4096
            labels += batch.next_sentence_labels[: batch.num_sequences].tolist()
        ids, cu = originals(batch), batch.cu_seqlens.numpy()
        types = batch.token_type_ids.numpy()
        for n in range(batch.num_sequences):
            a = ids[cu[n] : cu[n + 1]][types[cu[n] : cu[n + 1]] == 0][1:-1]
            words = wordpiece.decode(a.tolist()).split()[1:-1]
            assert " ".join(words) in text
    assert abs(np.mean(labels) - 0.5) < 0.01
