"""BERT over packed sequences: encoder, pooler and the two pre-training heads.

Vaswani et al. 2017, Devlin et al. 2019: post-LayerNorm. N sequences, T tokens, R of them wanted, M
masked, H hidden size, V vocabulary. The tensors are those of a `Batch`: sequences laid end to end,
`cu_seqlens` telling where each starts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.config import ModelConfig
from fastbert.model.embeddings import Embeddings
from fastbert.model.heads import (
    GELU_APPROXIMATION,
    Linear,
    MaskedLanguageHead,
    NextSentenceHead,
    Pooler,
)
from fastbert.ops import REFERENCE, Ops

Tokens = tuple[Tensor, Tensor, Tensor, Tensor, int]
"""Packed: input_ids, token_type_ids, position_ids, all (T,); cu_seqlens (N + 1,) int32; max_seqlen.
"""


class LossSums(NamedTuple):
    """Sums, not means: a step over several micro-batches divides by its own counts."""

    mlm: Tensor  # () over masked tokens
    next_sentence: Tensor  # () over labelled sequences


class Logits(NamedTuple):
    """Scores of both heads."""

    mlm: Tensor  # (M, V)
    next_sentence: Tensor  # (N, 2)


class Queries(NamedTuple):
    """Tokens whose output is wanted, each once, in the order in which they lie."""

    positions: Tensor  # (R,) int64; T in the unused tail
    cu_queries: Tensor  # (N + 1,) int32, where each sequence's begin in `positions`


def distinct(
    rows: Tensor,  # (R,) int64, any order, repeats
    cu_seqlens: Tensor,  # (N + 1,) int32
    T: int,
) -> tuple[Queries, Tensor]:  # and (R,) where each of `rows` is among the queries
    """The tokens of `rows` without repeats: no sort, no shape that the values decide."""
    flags = rows.new_zeros(T + 1).index_fill_(0, rows + 1, 1)
    before = flags.cumsum(0)  # before[i]: how many of the tokens 0 to i - 1
    inverse = before.index_select(0, rows)
    positions = rows.new_full(rows.shape, T).scatter_(0, inverse, rows)  # repeats write the same
    return Queries(positions, before.index_select(0, cu_seqlens).int()), inverse


class Layer(nn.Module):
    """Attention and feed-forward over packed tokens, each followed by dropout + add + LayerNorm."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.heads, self.head_size = config.num_attention_heads, config.head_size
        self.qkv = Linear(hidden, 3 * hidden)
        self.attention_out = Linear(hidden, hidden)
        self.attention_norm_weight = nn.Parameter(torch.ones(hidden))
        self.attention_norm_bias = nn.Parameter(torch.zeros(hidden))
        self.up = Linear(hidden, intermediate)
        self.down = Linear(intermediate, hidden)
        self.norm_weight = nn.Parameter(torch.ones(hidden))
        self.norm_bias = nn.Parameter(torch.zeros(hidden))
        self.eps = config.layer_norm_eps
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.attention_dropout_p = config.attention_probs_dropout_prob
        self.approximate = GELU_APPROXIMATION[config.hidden_act]
        self.ops = ops

    def forward(
        self,
        x: Tensor,  # (T, H)
        cu_seqlens: Tensor,  # (N + 1,) int32
        max_seqlen: int,
        seed: Tensor,  # (3,)
        queries: Queries | None = None,  # the tokens whose output is wanted; None for all
    ) -> Tensor:  # (T or R, H)
        ops, heads = self.ops, (self.heads, self.head_size)
        weight, bias, rows = self.qkv.weight, self.qkv.bias, None
        attention_p = self.attention_dropout_p if self.training else 0.0
        hidden_p = self.hidden_dropout_p if self.training else 0.0
        # The bias gets its gradient from attention, which can sum dqkv where it makes it.
        if queries is None:
            qkv, x = ops.linear_residual(x, weight, bias.detach())
            context = ops.attention(
                qkv.view(-1, 3, *heads), cu_seqlens, max_seqlen, attention_p, seed, 0,
                qkv_bias=bias,
            )  # fmt: skip
        else:
            # Of a token that no loss reads, the others need key and value only.
            rows = queries.positions
            q, kv, x = ops.qkv_linear_at(x, rows, weight, bias.detach())
            context = ops.attention_at(
                q.view(-1, *heads), kv.view(-1, 2, *heads), *queries, cu_seqlens, max_seqlen,
                attention_p, seed, 0, qkv_bias=bias,
            )  # fmt: skip
        x = ops.dropout_add_layer_norm(
            ops.linear(context.flatten(1), self.attention_out.weight), self.attention_out.bias, x,
            self.attention_norm_weight, self.attention_norm_bias, self.eps, hidden_p, seed, 1,
            rows=rows,
        )  # fmt: skip
        x, residual = ops.feed_forward(
            x, self.up.weight, self.up.bias, self.down.weight, self.approximate
        )
        return ops.dropout_add_layer_norm(
            x, self.down.bias, residual,
            self.norm_weight, self.norm_bias, self.eps, hidden_p, seed, 2, rows=rows,
        )  # fmt: skip


class Bert(nn.Module):
    """The encoder, with the heads asked for.

    Args:
        config: sizes, named as in Hugging Face's BertConfig.
        ops: which implementation of the fused ops to use.
        pooler, mlm, next_sentence: which parts stand on the encoder.
        gradient_checkpointing: keep only the layers' inputs and compute the rest again in the
            backward (Chen et al. 2016); dropout draws the same bits again from its counters.
        last_layer_masked_only: beyond its keys and values, run the last layer only at the positions
            that a loss reads. Exact, dropout included: its bits belong to tokens. It saves 5.8% of
            BERT-base's FLOPs and 2.9% of BERT-large's at 512 tokens.
    """

    dropout_state: Tensor

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops = REFERENCE,
        *,
        pooler: bool = True,
        mlm: bool = True,
        next_sentence: bool = True,
        gradient_checkpointing: bool = False,
        last_layer_masked_only: bool = True,
    ) -> None:
        super().__init__()
        kind: type = type(config)
        if not issubclass(kind, ModelConfig):  # one of transformers may be of a decoder
            name = kind.__name__
            raise TypeError(f"a {name} is no ModelConfig: fastbert.model_config(folder) makes one")
        self.config, self.ops = config, ops
        self.gradient_checkpointing = gradient_checkpointing
        self.last_layer_masked_only = last_layer_masked_only
        self.embeddings = Embeddings(config, ops)
        self.layers = nn.ModuleList(Layer(config, ops) for _ in range(config.num_hidden_layers))
        self.pooler = Pooler(config) if pooler else None
        self.mlm = MaskedLanguageHead(config, ops) if mlm else None
        self.next_sentence = NextSentenceHead(config) if next_sentence else None
        sites = torch.zeros(config.num_hidden_layers + 1, 3, dtype=torch.int64)
        sites[:, 2] = torch.arange(config.num_hidden_layers + 1)
        self.register_buffer("dropout_state", sites, persistent=False)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal(0, initializer_range) matrices, zero biases and [PAD], as Hugging Face does."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range, generator=generator)
            else:
                nn.init.constant_(parameter, 1.0 if name.endswith("norm_weight") else 0.0)
        with torch.no_grad():
            self.embeddings.word[self.config.pad_token_id].zero_()

    def seed_dropout(self, seed: int, step: int) -> None:
        """Sets what the dropout bits of the next forward are drawn from."""
        self.dropout_state[:, 0] = seed
        self.dropout_state[:, 1] = step

    def advance_dropout(self) -> None:
        """Other bits for the next forward, on the device alone."""
        self.dropout_state[:, 1] += 1

    def encode(
        self,
        input_ids: Tensor,  # (T,)
        token_type_ids: Tensor,  # (T,)
        position_ids: Tensor,  # (T,)
        cu_seqlens: Tensor,  # (N + 1,) int32
        max_seqlen: int,
        rows: Tensor | None = None,  # (R,) tokens wanted from the last layer; None for all
    ) -> Tensor:  # (T or R, H)
        """The last layer's output."""
        seeds = self.dropout_state.unbind(0)
        x = self.embeddings(input_ids, token_type_ids, position_ids, seeds[0])
        for layer, seed in zip(self.layers[:-1], seeds[1:-1], strict=True):
            x = self._run(layer, x, cu_seqlens, max_seqlen, seed)
        queries, inverse = None, rows
        if self.last_layer_masked_only and rows is not None:
            queries, inverse = distinct(rows, cu_seqlens, input_ids.numel())
        x = self._run(self.layers[-1], x, cu_seqlens, max_seqlen, seeds[-1], queries)
        return x if inverse is None else x.index_select(0, inverse)

    def _run(self, layer: nn.Module, *inputs: Tensor | int | Queries | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # No generator has a state to restore: dropout's bits come from counters.
            out: Tensor = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            out = layer(*inputs)
        return out

    def hidden_states(self, *tokens: *Tokens) -> list[Tensor]:  # L + 1 tensors (T, H)
        """The embeddings' output and every layer's."""
        *ids, cu_seqlens, max_seqlen = tokens
        seeds = self.dropout_state.unbind(0)
        states = [self.embeddings(*ids, seeds[0])]
        for layer, seed in zip(self.layers, seeds[1:], strict=True):
            states.append(layer(states[-1], cu_seqlens, max_seqlen, seed))
        return states

    def _masked_and_cls(
        self, *inputs: *tuple[*Tokens, Tensor]
    ) -> tuple[Tensor, Tensor]:  # (M, H), (N, H)
        input_ids, _, _, cu_seqlens, _, masked_positions = inputs
        # An empty sequence at the tail starts at T: its row is a stand-in that no label reads.
        cls_positions = cu_seqlens[:-1].long().clamp(max=input_ids.numel() - 1)
        x = self.encode(*inputs[:-1], rows=torch.cat((masked_positions, cls_positions)))
        masked, cls = x.split((masked_positions.numel(), cls_positions.numel()))
        return masked, cls

    def forward(
        self,
        input_ids: Tensor,  # (T,)
        token_type_ids: Tensor,  # (T,)
        position_ids: Tensor,  # (T,)
        cu_seqlens: Tensor,  # (N + 1,) int32
        max_seqlen: int,
        masked_positions: Tensor,  # (M,)
        masked_labels: Tensor,  # (M,) -100 in the unused tail
        next_sentence_labels: Tensor,  # (N,) 0, 1 or -100
    ) -> LossSums:
        """The pre-training losses. Only masked and [CLS] tokens leave the last layer."""
        masked, cls = self._masked_and_cls(
            input_ids, token_type_ids, position_ids, cu_seqlens, max_seqlen, masked_positions
        )
        assert self.mlm is not None
        mlm = self.mlm(masked, self.embeddings.word, masked_labels)
        if self.next_sentence is None or self.pooler is None:
            return LossSums(mlm, torch.zeros_like(mlm))
        scores = self.next_sentence(self.pooler(cls)).float()
        next_sentence = F.cross_entropy(scores, next_sentence_labels, reduction="sum")
        return LossSums(mlm, next_sentence)

    def predict(self, *inputs: *tuple[*Tokens, Tensor]) -> Logits:
        """Both heads' logits in fp32, for evaluation, of what `forward` takes but its labels."""
        masked, cls = self._masked_and_cls(*inputs)
        assert self.mlm is not None
        mlm = self.mlm.logits(masked, self.embeddings.word).float()
        if self.next_sentence is None or self.pooler is None:
            return Logits(mlm, mlm.new_zeros(cls.shape[0], 2))
        return Logits(mlm, self.next_sentence(self.pooler(cls)).float())
