"""What stands on the encoder: the pooler, the masked-word head, the next-sentence head.

T tokens, N sequences, M masked tokens, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
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


class Pooler(Linear):
    """tanh(W x + b) of each sequence's [CLS]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.hidden_size)

    def forward(self, cls: Tensor) -> Tensor:  # (N, H) -> (N, H)
        return torch.tanh(F.linear(cls, self.weight, self.bias))


class MaskedLanguageHead(nn.Module):
    """Dense + GELU + LayerNorm, then the tied word embedding as the output matrix."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.transform = Linear(config.hidden_size, config.hidden_size)
        self.norm_weight = nn.Parameter(torch.ones(config.hidden_size))
        self.norm_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.eps = config.layer_norm_eps
        self.approximate = GELU_APPROXIMATION[config.hidden_act]
        self.ops = ops

    def features(self, x: Tensor) -> Tensor:  # (M, H) -> (M, H)
        return self.ops.gelu_layer_norm(
            self.ops.linear(x, self.transform.weight), self.transform.bias,
            self.norm_weight, self.norm_bias, self.eps, self.approximate,
        )  # fmt: skip

    def logits(self, x: Tensor, word: Tensor) -> Tensor:  # (M, H), (V, H) -> (M, V)
        return F.linear(self.features(x), word, self.bias)

    def forward(
        self,
        x: Tensor,  # (M, H)
        word: Tensor,  # (V, H)
        labels: Tensor,  # (M,)
    ) -> Tensor:  # () the sum over labelled rows
        return self.ops.linear_cross_entropy(self.features(x), word, self.bias, labels)


class NextSentenceHead(Linear):
    """Two logits a sequence: 0 = B follows A, 1 = B is random."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:  # (N, H) -> (N, 2)
        return F.linear(pooled, self.weight, self.bias)
