"""Sequences end to end through every head of every family: what transformers says of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastbert
from fastbert.hf.together import encoder_of, packed_inputs

FAMILIES = {
    "Bert": (0, {}),
    "Roberta": (1, {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    "Electra": (0, {"embedding_size": 16}),
    "DistilBert": (0, {}),
}
LENGTHS = ((7, 1, 20, 3), (5, 5, 5), (9,))


def model(family: str, head: str, **changes: Any) -> Any:
    """transformers' own, with weights far from zero."""
    pad, given = FAMILIES[family]
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 30, "num_labels": 3,
    }  # fmt: skip
    if family == "DistilBert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "num_labels": 3}
    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": 99, "pad_token_id": pad} | sizes | given | changes
    )
    if head in ("QuestionAnswering", "MultipleChoice"):
        config.num_labels = 2
    kind = f"For{head}" if head else "Model"
    made = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return made


def drawn(lengths: Sequence[int], types: bool) -> list[dict[str, list[int]]]:
    found = []
    for length in lengths:
        one = {"input_ids": torch.randint(3, 99, (length,)).tolist()}
        if types:
            one["token_type_ids"] = torch.randint(0, 2, (length,)).tolist()
        found.append(one)
    return found


def one_by_one(made: Any, sequences: Sequence[Mapping[str, list[int]]], head: str) -> list[Tensor]:
    """Of each sequence alone what transformers' model gives."""
    found = []
    for one in sequences:
        inputs = {name: torch.tensor([ids]) for name, ids in one.items()}
        if head == "MultipleChoice":
            inputs = {name: value[None] for name, value in inputs.items()}
        found.append(rows(made(**inputs), head))
    return found


def rows(outputs: Any, head: str) -> Tensor:
    """(N, K) of first tokens, or (T, K) of all."""
    if head == "QuestionAnswering":
        return torch.stack((outputs.start_logits, outputs.end_logits), -1).flatten(0, 1)
    states = outputs.last_hidden_state if not head else outputs.logits
    return states.flatten(0, -2)


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    "head",
    ["", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_every_head_says_what_transformers_says(family: str, head: str, hidden: bool) -> None:
    made = model(family, head, output_hidden_states=hidden)
    for lengths in LENGTHS:
        sequences = drawn(lengths, types=family in ("Bert", "Electra"))
        wanted = torch.cat(one_by_one(fastbert.decelerate(made), sequences, head))
        inputs = packed_inputs(fastbert.accelerate(made), sequences)
        assert inputs is not None and inputs["input_ids"].shape == (1, sum(lengths))
        if head == "MultipleChoice":  # as the task calls it
            inputs["input_ids"] = inputs["input_ids"][None]
        found = rows(made(**inputs), head)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 2e-5


def test_what_needs_a_padded_batch_is_told() -> None:
    sequences = drawn((4, 2), types=False)
    plain = model("Bert", "SequenceClassification")
    assert packed_inputs(plain, sequences) is None  # transformers' own
    assert packed_inputs(torch.nn.Linear(3, 3), sequences) is None
    made = fastbert.accelerate(plain)
    assert packed_inputs(made, sequences) is not None
    layer = made.bert.encoder.layer[0].output
    hook = layer.register_forward_hook(lambda *given: None)  # sees (batch, sequence, width)
    assert packed_inputs(made, sequences) is None
    hook.remove()
    made.config.is_decoder = True
    assert packed_inputs(made, sequences) is None
    summary = fastbert.accelerate(model("Electra", "MultipleChoice", summary_type="mean"))
    assert packed_inputs(summary, sequences) is None


def test_an_encoder_is_found_in_a_model_or_is_one() -> None:
    made = fastbert.accelerate(model("Roberta", "TokenClassification"))
    assert encoder_of(made) is made.roberta
    assert encoder_of(made.roberta) is made.roberta
    assert encoder_of(fastbert.decelerate(made)) is None
