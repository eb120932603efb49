"""Word + token-type + position embeddings, LayerNorm, dropout (Devlin et al. 2019, figure 2)."""

import torch
from torch import Tensor, nn

from fastbert.config import ModelConfig
from fastbert.ops import Ops


def sinusoids(positions: int, hidden: int, std: float) -> Tensor:
    """Table (positions, hidden) fp32 of sines and cosines, of root mean square `std`.

    Column 2i is sin(p / 10000^(2i / H)), column 2i + 1 its cosine: Vaswani et al. 2017, 3.5.
    """
    columns = torch.arange(0, hidden, 2, dtype=torch.float64)
    angles = torch.arange(positions).double()[:, None] * 10000 ** (-columns / hidden)
    table = torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :hidden]
    return (table * (std / table.square().mean().sqrt())).float()


class Embeddings(nn.Module):
    """(T,) ids to (T, H)."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word = nn.Parameter(torch.empty(config.vocab_size, hidden))
        self.position = nn.Parameter(torch.empty(config.max_position_embeddings, hidden))
        self.token_type = nn.Parameter(torch.empty(config.type_vocab_size, hidden))
        self.norm_weight = nn.Parameter(torch.ones(hidden))
        self.norm_bias = nn.Parameter(torch.zeros(hidden))
        self.eps, self.dropout_p = config.layer_norm_eps, config.hidden_dropout_prob
        self.pad_token_id = config.pad_token_id
        self.ops = ops

    def forward(
        self,
        input_ids: Tensor,  # (T,)
        token_type_ids: Tensor,  # (T,)
        position_ids: Tensor,  # (T,)
        seed: Tensor,  # (3,)
    ) -> Tensor:  # (T, H)
        return self.ops.embed_layer_norm(
            input_ids, token_type_ids, position_ids,
            self.word, self.token_type, self.position, self.norm_weight, self.norm_bias,
            self.pad_token_id, self.eps, self.dropout_p if self.training else 0.0, seed, 0,
        )  # fmt: skip
