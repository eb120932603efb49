"""Packed documents do not see one another, and what is not computed is not missed."""

import pytest
import torch
from torch import Tensor

from fastbert.config import ModelConfig
from fastbert.model.bert import Bert, Layer, distinct
from fastbert.ops import REFERENCE, Ops, choose_ops

BUNDLES = {"reference": REFERENCE, "cpu": choose_ops("cpu", False)}
V, S = 83, 16
SIZES = ModelConfig(
    V, 32, 3, 2, 64, max_position_embeddings=S, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, initializer_range=0.2,
)  # fmt: skip
LENGTHS = {
    "ragged": [16, 3, 9, 1, 12],
    "length 1": [1, 1, 1],
    "one": [7],
    "empty tail": [5, 16, 2, 0, 0, 0],
    "full": [16, 16],
}


@pytest.fixture(params=BUNDLES.values(), ids=BUNDLES)
def model(request: pytest.FixtureRequest) -> Bert:
    found = Bert(SIZES, request.param)
    with torch.no_grad():  # no bias or LayerNorm at its neutral value
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return found


class Documents:
    """Random documents of these lengths, packed."""

    def __init__(self, lengths: list[int]) -> None:
        T = sum(lengths)
        self.lengths = lengths
        self.ids = torch.randint(1, V, (T,))
        self.types = torch.randint(0, 2, (T,))
        self.positions = torch.cat([torch.arange(n) for n in lengths])
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        chosen = torch.rand(T) < 0.4
        chosen[0] = True
        self.masked = chosen.nonzero().flatten()
        self.labels = torch.randint(0, V, (len(self.masked),))
        real = torch.tensor(lengths) > 0
        self.next_sentence = torch.where(real, torch.randint(0, 2, (len(lengths),)), -100)

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        # The tightest bound: a document alone must not see the padding of the packed ones either.
        return self.ids, self.types, self.positions, self.cu_seqlens, max(self.lengths)

    def span(self, index: int) -> slice:
        return slice(int(self.cu_seqlens[index]), int(self.cu_seqlens[index + 1]))

    def alone(self, index: int) -> "Documents":
        span, found = self.span(index), Documents([self.lengths[index]])
        found.ids, found.types = self.ids[span], self.types[span]
        found.positions = self.positions[span]
        inside = (self.masked >= span.start) & (self.masked < span.stop)
        found.masked, found.labels = self.masked[inside] - span.start, self.labels[inside]
        found.next_sentence = self.next_sentence[index : index + 1]
        return found


def losses(model: Bert, documents: Documents) -> tuple[Tensor, Tensor]:
    sums = model(*documents.tokens, documents.masked, documents.labels, documents.next_sentence)
    return sums.mlm, sums.next_sentence


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_equals_each_document_alone(model: Bert, lengths: list[int]) -> None:
    documents = Documents(lengths)
    states = model.hidden_states(*documents.tokens)
    packed = losses(model, documents)
    packed_gradients = torch.autograd.grad(sum(packed), list(model.parameters()))  # type: ignore
    mlm = next_sentence = torch.zeros(())
    for index, length in enumerate(lengths):
        if not length:
            continue
        alone = documents.alone(index)
        for together, single in zip(states, model.hidden_states(*alone.tokens), strict=True):
            assert (together[documents.span(index)] - single).abs().max() < 1e-5
        one = losses(model, alone)
        mlm, next_sentence = mlm + one[0], next_sentence + one[1]
    assert abs(packed[0] - mlm) < 1e-5 * abs(mlm)
    assert abs(packed[1] - next_sentence) < 1e-5 * abs(next_sentence).clamp(min=1)
    gradients = torch.autograd.grad(mlm + next_sentence, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), packed_gradients, gradients, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max().clamp(min=1e-2), name


@pytest.mark.parametrize("training", [False, True])
def test_other_tokens_change_nothing_bit_for_bit(model: Bert, training: bool) -> None:
    model.train(training)
    for layer in model.layers:
        layer.hidden_dropout_p = layer.attention_dropout_p = 0.1
    model.seed_dropout(5, 1)
    documents = Documents([9, 16, 1, 7, 12, 0])
    before = model.hidden_states(*documents.tokens)
    for index in range(5):
        changed = Documents(documents.lengths)
        span = documents.span(index)
        changed.ids, changed.types = documents.ids.clone(), documents.types.clone()
        changed.ids[span] = (documents.ids[span] + 1) % V
        changed.types[span] = 1 - documents.types[span]
        others = torch.ones(len(documents.ids), dtype=torch.bool)
        others[span] = False
        for a, b in zip(before, model.hidden_states(*changed.tokens), strict=True):
            assert torch.equal(a[others], b[others])
            assert not torch.equal(a[span], b[span])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("ops", BUNDLES.values(), ids=BUNDLES)
def test_poison_stays_in_its_document(ops: Ops, poison: float) -> None:
    layer = Layer(SIZES, ops)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    lengths = [9, 16, 1, 7]
    documents = Documents(lengths)
    seed = torch.tensor([1, 2, 3])
    x = torch.randn(sum(lengths), 32)
    for index in range(len(lengths)):
        span = documents.span(index)
        others = torch.ones(len(x), dtype=torch.bool)
        others[span] = False
        poisoned = x.clone()
        poisoned[span.stop - 1, 5] = poison
        results = []
        for values in (x, poisoned):
            leaf = values.clone().requires_grad_()
            out = layer(leaf, documents.cu_seqlens, S, seed)
            out[others].sum().backward()
            assert leaf.grad is not None
            results.append((out[others], leaf.grad[others]))
            if values is poisoned:
                assert out[span].isnan().any()
        for clean, beside_poison in zip(*results, strict=True):
            assert torch.equal(clean, beside_poison)


def test_pad_sequences_and_spare_slots_change_nothing(model: Bert) -> None:
    documents = Documents([9, 16, 3])
    want = losses(model, documents)
    wanted = torch.autograd.grad(sum(want), list(model.parameters()))  # type: ignore[arg-type]
    filled = Documents([9, 16, 3, 16, 4, 0, 0])  # [PAD] in sequences of its own, then empty slots
    filled.ids = torch.cat([documents.ids, torch.zeros(20, dtype=torch.int64)])
    filled.types = torch.cat([documents.types, torch.zeros(20, dtype=torch.int64)])
    spare = torch.zeros(6, dtype=torch.int64)
    filled.masked = torch.cat([documents.masked, spare])
    filled.labels = torch.cat([documents.labels, spare - 100])
    filled.next_sentence = torch.cat([documents.next_sentence, torch.full((4,), -100)])
    found = losses(model, filled)
    got = torch.autograd.grad(sum(found), list(model.parameters()))  # type: ignore[arg-type]
    for a, b in zip(want, found, strict=True):
        assert abs(a - b) < 1e-5 * abs(a)
    for (name, _), a, b in zip(model.named_parameters(), wanted, got, strict=True):
        assert (a - b).abs().max() < 1e-5 * a.abs().max().clamp(min=1e-2), name


def test_nothing_to_predict_gives_zero(model: Bert) -> None:
    documents = Documents([9, 16, 3])
    documents.labels = torch.full_like(documents.labels, -100)
    documents.next_sentence = torch.full((3,), -100)
    mlm, next_sentence = losses(model, documents)
    assert mlm == 0 and next_sentence == 0
    (mlm + next_sentence).backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_rows_of_the_last_layer_are_those_of_the_whole(model: Bert, p: float) -> None:
    """Dropout's bits too."""
    model.train()
    model.embeddings.dropout_p = p
    for layer in model.layers:
        layer.hidden_dropout_p = layer.attention_dropout_p = p
    model.seed_dropout(5, 1)
    documents = Documents([9, 16, 1, 7, 0, 0])
    whole = model.encode(*documents.tokens)
    rows = torch.tensor([0, 3, 9, 8, 25, 26, 32, 3, 0])  # any order, repeats
    some = model.encode(*documents.tokens, rows=rows)
    assert some.shape == (9, 32)
    # Products of few rows are blocked otherwise: with AVX-512 1.2e-6 apart, of values up to 3.
    assert (some - whole[rows]).abs().max() < 4e-6
    assert torch.equal(whole, model.hidden_states(*documents.tokens)[-1])

    dout = torch.randn(9, 32)
    parameters = [p for n, p in model.named_parameters() if n.startswith(("layers", "emb"))]
    mine = torch.autograd.grad(some, parameters, dout)
    want = torch.autograd.grad(whole[rows], parameters, dout)
    for a, b in zip(mine, want, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max().clamp(min=1e-2)


@pytest.mark.parametrize("rows", [[7, 0, 3, 7, 0, 0, 9, 8], [5], [9] * 12])
def test_distinct_rows_by_sequence(rows: list[int]) -> None:
    cu_seqlens = torch.tensor([0, 4, 4, 8, 8], dtype=torch.int32)  # 8 and 9 are in no sequence
    (positions, cu_queries), inverse = distinct(torch.tensor(rows), cu_seqlens, 10)
    once = sorted(set(rows))
    assert positions.tolist() == once + [10] * (len(rows) - len(once))
    assert positions[inverse].tolist() == rows
    assert cu_queries.dtype == torch.int32
    assert cu_queries.tolist() == [sum(row < end for row in once) for end in cu_seqlens.tolist()]


def test_predict_gives_the_logits_behind_the_losses(model: Bert) -> None:
    documents = Documents([9, 16, 1, 7, 0])
    logits = model.predict(*documents.tokens, documents.masked)
    assert logits.mlm.shape == (len(documents.masked), V)
    assert logits.next_sentence.shape == (5, 2)
    picked = torch.log_softmax(logits.mlm, -1)[
        torch.arange(len(documents.masked)), documents.labels
    ]
    mlm, next_sentence = losses(model, documents)
    assert abs(-picked.sum() - mlm) < 1e-5 * mlm
    scores = torch.log_softmax(logits.next_sentence[:4], -1)
    chosen = scores[torch.arange(4), documents.next_sentence[:4]]
    assert abs(-chosen.sum() - next_sentence) < 1e-5 * next_sentence
