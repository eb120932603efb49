"""`attn_implementation="fastbert"`: what `sdpa` gives, whatever the model and whatever its mask."""

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

import fastbert
from fastbert.hf import attention as ours
from fastbert.hf.layers import _say
from fastbert.hf.packing import Plan
from fastbert.ops import REFERENCE

B, S, V = 3, 10, 31
SIZES = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
RIGHT = torch.arange(S) < torch.tensor([S, 4, 1])[:, None]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """A plan for each attention that left padding out."""
    plans: list[Plan] = []
    real = ours.attend_padded

    def attend(plan: Plan, *args: Any) -> Tensor:
        plans.append(plan)
        return real(plan, *args)

    monkeypatch.setattr(ours, "attend_padded", attend)
    return plans


def pair(kind: Any, **sizes: Any) -> tuple[Any, Any]:
    """The same model with `sdpa` and with ours, in evaluation."""
    torch.manual_seed(0)
    config = kind.config_class(**SIZES | sizes)
    theirs = kind._from_config(config, attn_implementation="sdpa").eval()
    mine = copy.deepcopy(theirs)
    mine.set_attn_implementation("fastbert")
    assert mine.config._attn_implementation == "fastbert"
    return theirs, mine


def same(theirs: Any, mine: Any, mask: Tensor | None, **given: Any) -> None:
    """Real tokens' states agree, and so do the gradients of a loss of them."""
    given = given or {"input_ids": torch.randint(2, V, (B, S))}
    if mask is not None:
        given["attention_mask"] = mask
    a, b = (model(**given).last_hidden_state for model in (theirs, mine))
    if mask is not None:
        a, b = a[mask.bool()], b[mask.bool()]
    torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    for model, x in ((theirs, a), (mine, b)):
        model.zero_grad()
        x.sin().sum().backward()
    for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["BertModel", "RobertaModel", "AlbertModel"])
def test_encoders_leave_padding_out_by_one_plan(kind: str, served: list[Plan]) -> None:
    sizes = {"embedding_size": 16} if kind == "AlbertModel" else {}
    theirs, mine = pair(getattr(transformers, kind), **sizes)
    holes = RIGHT.clone()
    holes[0, 3:5], holes[1, 0] = False, False
    for mask in (RIGHT, RIGHT.flip(1).long(), holes.float()):
        same(theirs, mine, mask)
        assert len(served) == 3 and len({id(plan) for plan in served}) == 1
        assert served[0].shape == (B, S) and served[0].slots is not None
        served.clear()
    same(theirs, mine, None)
    same(theirs, mine, torch.ones(B, S))
    assert not served, "nothing is padded"


def test_where_there_is_a_kernel_it_gets_the_tokens_that_are_kept(
    monkeypatch: pytest.MonkeyPatch, served: list[Plan]
) -> None:
    tokens: list[int] = []

    def attention(qkv: Tensor, *args: Any) -> Tensor:
        tokens.append(len(qkv))
        return REFERENCE.attention(qkv, *args)

    ops = replace(REFERENCE, attention=attention)
    monkeypatch.setattr(ours, "kernels_for", lambda *_: ops)
    theirs, mine = pair(transformers.BertModel, hidden_size=64)
    for mask in (RIGHT, RIGHT.flip(1)):
        same(theirs, mine, mask)
    assert tokens == [int(RIGHT.sum())] * 6 and not served


def test_a_layer_with_a_window_is_sdpas_and_a_global_one_ours(served: list[Plan]) -> None:
    sizes = {"local_attention": 4, "global_attn_every_n_layers": 3, "num_hidden_layers": 4}
    more = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    theirs, mine = pair(transformers.ModernBertModel, **sizes, **more)
    same(theirs, mine, RIGHT)
    assert len(served) == 2


@pytest.mark.parametrize("kind", ["GPT2Model", "LlamaModel", "BartModel"])
def test_causal_and_cross_attention_are_sdpas(kind: str, served: list[Plan]) -> None:
    sizes = {
        "n_embd": 16, "n_head": 2, "n_layer": 2, "num_key_value_heads": 1, "d_model": 16,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "dropout": 0.0,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    theirs, mine = pair(getattr(transformers, kind), **sizes)
    for mask in (None, RIGHT, RIGHT.flip(1)):
        same(theirs, mine, mask)
    assert not served


def test_a_decoder_that_asks_an_encoder_of_the_same_length(served: list[Plan]) -> None:
    theirs, mine = pair(transformers.BertModel, is_decoder=True, add_cross_attention=True)
    given = {"encoder_hidden_states": torch.randn(B, S, 16), "encoder_attention_mask": RIGHT}
    same(theirs, mine, None, input_ids=torch.randint(2, V, (B, S)), **given)
    assert not served


def test_images_have_no_mask(served: list[Plan]) -> None:
    theirs, mine = pair(transformers.ViTModel, image_size=8, patch_size=4, num_channels=1)
    same(theirs, mine, None, pixel_values=torch.randn(2, 1, 8, 8))
    assert not served


def test_dropout_draws_each_weight_with_its_probability() -> None:
    module = transformers.models.bert.modeling_bert.BertSelfAttention
    one = module(transformers.BertConfig(**SIZES))
    x = torch.ones(200, 1, 10, 8)
    keys = ours.mask(
        batch_size=200, q_length=10, kv_length=10, mask_function=bidirectional_mask_function,
        attention_mask=(torch.arange(10) < 8).expand(200, -1), allow_is_bidirectional_skip=True,
    )  # fmt: skip
    torch.manual_seed(0)
    out, weights = ours.attention(one, x, x, x, keys, dropout=0.25)
    assert weights is None and out.shape == (200, 10, 1, 8)
    assert torch.equal(out[:, 8:], torch.zeros(200, 2, 1, 8))
    assert abs(out[:, :8].mean().item() - 1.0) < 0.02 and out[:, :8].std() > 0.1


def call(mask: Any, **changes: Any) -> tuple[Tensor, Tensor]:
    """What ours gives, and sdpa with the same mask written out."""
    kind = transformers.models.bert.modeling_bert.BertSelfAttention
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, 2, S, 8) for _ in range(3))
    given = {"dropout": 0.0, "scaling": None} | changes
    one = kind(transformers.BertConfig(**SIZES))
    full = mask if mask is None or mask.dim() == 4 else mask[:, None, None, :].bool()
    full = None if full is None else full.expand(-1, -1, S, -1).contiguous()
    theirs = AttentionInterface()["sdpa"]
    return ours.attention(one, q, k, v, mask, **given)[0], theirs(one, q, k, v, full, **given)[0]


def test_scaling_bias_and_other_masks(served: list[Plan]) -> None:
    for changes in ({"scaling": 0.5}, {"is_causal": False}):
        got, wanted = call(RIGHT, **changes)  # (B, S): as flash attention would get it
        torch.testing.assert_close(got[RIGHT], wanted[RIGHT])
    assert len(served) == 2
    causal = torch.ones(S, S).tril().bool()
    for mask in (causal[None, None].expand(B, -1, -1, -1), RIGHT[:, None, :, None] & causal):
        got, wanted = call(mask)
        assert torch.equal(got, wanted)
    got, wanted = call(torch.ones(B, S))  # a mask that nobody looked at
    torch.testing.assert_close(got, wanted)
    got, wanted = call(RIGHT, position_bias=torch.randn(1, 2, S, S))
    torch.testing.assert_close(got[RIGHT], wanted[RIGHT])
    assert len(served) == 3


def make(mask: Tensor, function: Any = bidirectional_mask_function, **changes: Any) -> Any:
    given = {"allow_is_bidirectional_skip": True, "allow_is_causal_skip": False} | changes
    sizes = {"batch_size": B, "q_length": S, "kv_length": S} | given
    return ours.mask(**sizes, attention_mask=mask, mask_function=function)


def test_masks_are_sdpas() -> None:
    theirs = AttentionMaskInterface()["sdpa"]
    for function in (bidirectional_mask_function, causal_mask_function):
        for changes in ({}, {"q_length": 4}, {"q_length": 1, "q_offset": 7}):
            sizes = {"batch_size": B, "q_length": S, "kv_length": S} | changes
            wanted = theirs(
                **sizes, attention_mask=RIGHT, mask_function=function, allow_is_causal_skip=False
            )
            assert torch.equal(make(RIGHT, function, **changes), wanted)
    full = torch.ones(B, S).bool()
    assert make(full) is None
    assert torch.equal(make(full, allow_is_bidirectional_skip=False), full.new_ones(B, 1, S, S))


def test_a_plan_is_not_older_than_its_mask() -> None:
    padding = RIGHT.clone()
    made = make(padding)
    plan = ours._plan(made)
    assert ours._plan(made) is plan
    padding[1, 4] = True
    assert ours._plan(made).cu_seqlens.tolist() == [0, 10, 15, 16]
    with torch.inference_mode():
        made = make(RIGHT.clone())
        assert ours._plan(made) is ours._plan(made)
        assert ours._plan(made) is not ours._plan(make(RIGHT.clone()))


def test_what_a_model_makes_of_a_mask_is_no_longer_ours(served: list[Plan]) -> None:
    made = make(RIGHT)
    bias = torch.randn(B, 2, S, S)
    for mask in (torch.where(made, bias, -1e9), made & torch.ones(S, S).tril().bool()):
        kind = transformers.models.bert.modeling_bert.BertSelfAttention
        one = kind(transformers.BertConfig(**SIZES))
        q = torch.randn(B, 2, S, 8)
        wanted = AttentionInterface()["sdpa"](one, q, q, q, mask)[0]
        assert torch.equal(ours.attention(one, q, q, q, mask)[0], wanted)
    assert not served


class CrossMine(nn.Module):
    """Attention whose file speaks of encoder_hidden_states."""


def test_only_self_attention_is_trusted() -> None:
    bert = transformers.models.bert.modeling_bert
    bart = transformers.models.bart.modeling_bart
    conformer = transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer
    assert ours.asks_itself(bert.BertSelfAttention)
    assert ours.asks_itself(transformers.models.modernbert.modeling_modernbert.ModernBertAttention)
    refused = [bert.BertCrossAttention, bart.BartAttention, CrossMine, type("New", (), {})]
    refused += [transformers.models.esm.modeling_esm.EsmSelfAttention]  # asks itself and others
    refused += [conformer.Wav2Vec2ConformerSelfAttention]
    for kind in refused:
        assert not ours.asks_itself(kind), kind.__name__


@pytest.mark.parametrize("kind", ["MPNetModel", "BlipTextModel"])
def test_a_model_that_looks_nothing_up_says_so(kind: str) -> None:
    base = getattr(transformers, kind)
    model = base(base.config_class(**SIZES, attn_implementation="fastbert"))
    assert model.config._attn_implementation == "fastbert"  # transformers takes it
    with pytest.raises(ValueError, match=r'has an attention of its own.*"eager" is what it has'):
        model(torch.randint(2, V, (B, S)), attention_mask=RIGHT)


def test_a_compiled_or_traced_model_is_sdpas(
    served: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mine = pair(transformers.BertModel)
    monkeypatch.setattr(ours, "is_traced", lambda: True)
    same(theirs, mine, RIGHT)
    assert not served


def test_checkpoints_of_both_kinds_recompute_the_same(served: list[Plan]) -> None:
    _, mine = pair(transformers.BertModel, attention_probs_dropout_prob=0.5)
    ids, grads = torch.randint(2, V, (B, S)), []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if kwargs is not None:
            mine.gradient_checkpointing_enable(kwargs)
        mine.train().zero_grad()
        torch.manual_seed(3)
        mine(ids, attention_mask=RIGHT).last_hidden_state[RIGHT].sin().sum().backward()
        grads.append(mine.encoder.layer[0].attention.self.query.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])
    assert len(served) == 3 + 6 + 6


def test_the_log_says_once_what_is_not_served(caplog: pytest.LogCaptureFixture) -> None:
    _say.cache_clear()
    with caplog.at_level(logging.INFO, "fastbert"):
        for _ in range(2):
            call(RIGHT)
            call(None)
    assert [record.message for record in caplog.records] == [
        "BertSelfAttention: attention leaves the padding out, on cpu",
        'BertSelfAttention, attn_implementation="fastbert": sdpa of transformers: it has no mask',
    ]


def test_it_is_registered_by_one_name_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastbert.register_attention is ours.register_attention
    for registry in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(registry._global_mapping, "fastbert")
    for _ in range(2):
        fastbert.register_attention()
        assert AttentionInterface()["fastbert"] is ours.attention
        assert AttentionMaskInterface()["fastbert"] is ours.mask
