"""The packed encoder against transformers' BERT with the same weights: fp32, dropout 0."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig
from transformers import BertForPreTraining as HFPreTraining

from fastbert.config import model_config
from fastbert.hf.weights import read_weights, to_hf
from fastbert.model.bert import Bert

SHAPES = [(2, 32), (2, 64), (1, 64), (4, 32)]  # heads, head size
LENGTHS = {
    "full": [24, 24, 24],
    "ragged": [24, 3, 17, 9],
    "length_1": [1, 24, 1, 2],
    "single": [1],
}


def hf_config(heads=2, head_size=32, **changes):
    values = {
        "vocab_size": 311,
        "hidden_size": heads * head_size,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "intermediate_size": 4 * heads * head_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 64,
    }
    return BertConfig(**(values | changes))


def randomized(model):
    """Weights large enough that a wrong LayerNorm, bias or scale shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def padded_batch(lengths, vocab_size=311):
    S = max(lengths)
    attention_mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(0, vocab_size, (len(lengths), S)) * attention_mask
    token_type_ids = torch.randint(0, 2, input_ids.shape) * attention_mask
    chosen = (torch.rand(input_ids.shape) < 0.3) & attention_mask.bool()
    chosen[0, 0] = True
    labels = torch.where(chosen, torch.randint(0, vocab_size, input_ids.shape), -100)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "labels": labels,
        "next_sentence_label": torch.randint(0, 2, (len(lengths),)),
    }


def largest(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "head_size"), SHAPES)
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
def test_states_logits_loss_and_every_gradient(tmp_path, lengths, heads, head_size, hidden_act):
    theirs = randomized(HFPreTraining(hf_config(heads, head_size, hidden_act=hidden_act))).eval()
    theirs.save_pretrained(tmp_path)
    sizes = model_config(str(tmp_path))
    ours = Bert(sizes).eval()
    state, missing, _ = read_weights(tmp_path, dict(ours.named_parameters()), sizes)
    assert not missing
    ours.load_state_dict(state)
    batch = padded_batch(lengths)
    want = theirs(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    counts = torch.tensor(lengths)
    tokens = (
        batch["input_ids"][real],
        batch["token_type_ids"][real],
        torch.cat([torch.arange(length) for length in lengths]),
        F.pad(counts.cumsum(0), (1, 0)).int(),
        max(lengths),
    )
    labels = batch["labels"][real]
    masked = (labels != -100).nonzero().squeeze(1)
    states = ours.hidden_states(*tokens)
    assert len(states) == len(want.hidden_states)
    for mine, other in zip(states, want.hidden_states, strict=True):
        assert largest(mine, other[real]) < 1e-5
    logits = ours.predict(*tokens, masked)
    assert largest(logits.mlm, want.prediction_logits[real][masked]) < 1e-5
    assert largest(logits.next_sentence, want.seq_relationship_logits) < 1e-5

    want.loss.backward()
    sums = ours(*tokens, masked, labels[masked], batch["next_sentence_label"])
    loss = sums.mlm / len(masked) + sums.next_sentence / len(lengths)
    assert abs(loss / want.loss - 1) < 1e-6
    loss.backward()
    gradients = to_hf({name: p.grad for name, p in ours.named_parameters()}, sizes)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().clamp(min=1e-3)  # a key's bias has gradient 0 exactly
        assert largest(gradient, expected[name]) < 1e-4 * scale, name
