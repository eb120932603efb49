"""Weights packed for a CPU's products: the same outputs, and no longer than the weights stay."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastbert
from fastbert.hf import frozen
from fastbert.hf.frozen import Product
from fastbert.hf.models import Encoder
from fastbert.hf.stack import freeze

FAMILIES = {
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "electra": transformers.ElectraConfig,
}


def model(family: str = "bert", **changes: Any) -> Any:
    config = FAMILIES[family](
        vocab_size=99, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=112, max_position_embeddings=40, pad_token_id=0, **changes,
    )  # fmt: skip
    made = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return fastbert.accelerate(made)


def batch(lengths: tuple[int, ...] = (7, 30, 1, 12)) -> dict[str, Tensor]:
    ids = torch.randint(1, 99, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def packed(made: Any) -> bool:
    (encoder,) = (one for one in made.modules() if isinstance(one, Encoder))
    stack = vars(encoder).get("_fastbert_stack")
    return stack is not None and bool(stack.packed)


@torch.no_grad()
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("lengths", [(7, 30, 1, 12), (5, 5, 5), (1,)])
def test_outputs_stay_what_they_were(family: str, act: str, lengths: tuple[int, ...]) -> None:
    made = model(family, hidden_act=act)
    inputs = batch(lengths)
    wanted = made.double()(**inputs).logits
    made.float()
    plain = made(**inputs).logits
    assert freeze(made) == "" and packed(made)
    found = made(**inputs, output_hidden_states=True)
    assert (found.logits - plain).abs().max() < 2e-5
    assert (found.logits - wanted).abs().max() < 2e-5
    assert len(found.hidden_states) == 4


@torch.no_grad()
def test_in_bf16_they_are_as_near_to_fp32_as_without() -> None:
    made, inputs = model(), batch()
    exact = made(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        plain = made(**inputs).logits.float()
        assert freeze(made, torch.bfloat16) == "" and packed(made)
        found = made(**inputs).logits.float()
    assert (found - exact).abs().max() < 2 * (plain - exact).abs().max() + 0.02
    assert not torch.equal(found, plain)
    assert torch.equal(made(**inputs).logits, exact)  # in fp32 nothing is packed


def test_a_weight_that_is_changed_ends_it() -> None:
    inputs = batch()
    for change in (
        lambda layer: layer.output.dense.weight.mul_(2.0),
        lambda layer: layer.attention.self.key.bias.add_(1.0),
        lambda layer: setattr(
            layer.intermediate.dense, "weight", torch.nn.Parameter(torch.randn(112, 48))
        ),
        lambda layer: setattr(layer.output, "dense", torch.nn.Linear(112, 48)),
        lambda layer: layer.output.LayerNorm.weight.mul_(2.0),
    ):
        made = model()
        with torch.no_grad():
            made(**inputs)
            freeze(made)
            change(made.base_model.encoder.layer[1])
            other = copy.deepcopy(made)
            assert not packed(other)
            assert (made(**inputs).logits - other(**inputs).logits).abs().max() < 2e-5


def test_gradients_come_from_the_weights_themselves() -> None:
    made, inputs = model(), batch()
    assert freeze(made) == ""
    made(**inputs).logits.sum().backward()
    weight = made.base_model.encoder.layer[0].output.dense.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert packed(made)


@torch.no_grad()
def test_training_hooks_and_deceleration_end_it() -> None:
    made, inputs = model(hidden_dropout_prob=0.5), batch()
    freeze(made)
    still = made(**inputs).logits
    assert not torch.allclose(made.train()(**inputs).logits, still)
    made.eval()
    seen: list[Any] = []
    dense = made.base_model.encoder.layer[0].output.dense
    hook = dense.register_forward_hook(lambda *given: seen.append(given))
    made(**inputs)
    assert seen
    hook.remove()
    assert (fastbert.decelerate(made)(**inputs).logits - still).abs().max() < 2e-5


def test_why_nothing_is_packed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    assert "float16" in freeze(made, torch.float16)
    assert "float64" in freeze(model().double())
    assert "not on a CPU" in freeze(model().to("meta"))
    with torch.inference_mode():
        assert "inference mode" in freeze(model())
    bare = transformers.BertModel(transformers.BertConfig(num_hidden_layers=0, hidden_size=24))
    assert freeze(fastbert.accelerate(bare.eval())) == "it has no layers"
    assert freeze(model().train()) == "its layers are called, not read"
    monkeypatch.setattr(Product, "plus", lambda self, x, residual: self(x))
    assert "off by" in freeze(made) and not packed(made)
    monkeypatch.undo()

    def missing(*given: Any) -> None:
        raise AttributeError("no such op")

    monkeypatch.setattr(frozen.Product, "__init__", missing)
    assert freeze(made) == "no such op" and not packed(made)


def test_a_pipeline_and_encode_use_it(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(25))]
    tokenizer = transformers.BertTokenizer(vocab={word: n for n, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path)
    pipe = fastbert.pipeline("classify", tmp_path)
    assert packed(pipe.model)
    pipe("w1 w2")
    assert packed(pipe.model)
