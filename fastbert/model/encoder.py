"""One Transformer encoder layer, post-LayerNorm (Vaswani et al. 2017; Devlin et al. 2019)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert.config import ModelConfig
from fastbert.ops import Ops

GELU_APPROXIMATION = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


class Linear(nn.Module):
    """Weight (out, in) and bias (out,); how they are applied is the caller's business."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))


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
