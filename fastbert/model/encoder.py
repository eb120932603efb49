"""One Transformer encoder layer, post-LayerNorm (Vaswani et al. 2017; Devlin et al. 2019)."""

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
        rows: Tensor | None = None,  # (R,) the tokens whose output is wanted; None for all
    ) -> Tensor:  # (T or R, H)
        attention_p = self.attention_dropout_p if self.training else 0.0
        hidden_p = self.hidden_dropout_p if self.training else 0.0
        qkv, x = self.ops.linear_residual(x, self.qkv.weight, self.qkv.bias)
        qkv = qkv.view(-1, 3, self.heads, self.head_size)
        context = self.ops.attention(qkv, cu_seqlens, max_seqlen, attention_p, seed, 0).flatten(1)
        if rows is not None:
            # Nothing after attention mixes tokens: what no loss reads need not be computed.
            context, x = context.index_select(0, rows), x.index_select(0, rows)
        x = self.ops.dropout_add_layer_norm(
            self.ops.linear(context, self.attention_out.weight), self.attention_out.bias, x,
            self.attention_norm_weight, self.attention_norm_bias, self.eps, hidden_p, seed, 1,
        )  # fmt: skip
        up, x = self.ops.linear_gelu_residual(x, self.up.weight, self.up.bias, self.approximate)
        return self.ops.dropout_add_layer_norm(
            self.ops.linear(up, self.down.weight), self.down.bias, x,
            self.norm_weight, self.norm_bias, self.eps, hidden_p, seed, 2,
        )  # fmt: skip
