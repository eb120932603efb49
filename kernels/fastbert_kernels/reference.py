"""Every op of the step in plain differentiable PyTorch: specification, CPU path and oracle.

N sequences packed, T tokens packed, S longest sequence, A heads, D head dimension, H hidden size,
M masked tokens, V vocabulary, R any number of rows. Statistics and losses are taken in fp32 (fp64
for fp64 inputs) whatever the storage type. `seed` is a (3,) int64 tensor holding the run's seed,
the step and the layer, `stream` tells the dropouts of a layer apart: see `philox`.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels.philox import keep_mask, keep_threshold, score_mask


def accumulate(x: Tensor) -> Tensor:
    """`x` in the type sums and statistics are taken in."""
    return x if x.dtype == torch.float64 else x.float()


def dropout(
    x: Tensor,  # (..., rows, columns)
    dropout_p: float,
    seed: Tensor,
    stream: int,
    rows: Tensor | None = None,  # (rows,) int64: their numbers, if not 0, 1, 2, ...
) -> Tensor:
    """x · keep / P(keep), elementwise."""
    if dropout_p == 0.0:
        return x
    return apply_keep(x, keep_mask(tuple(x.shape), dropout_p, seed, stream, rows), dropout_p)


def dropout_scores(p: Tensor, dropout_p: float, seed: Tensor, stream: int) -> Tensor:
    """`dropout` of attention's probabilities (..., queries, keys), whose bits lie otherwise."""
    if dropout_p == 0.0:
        return p
    keep = score_mask(tuple(p.shape), keep_threshold(dropout_p), seed, seed[2] * 4 + stream)
    return apply_keep(p, keep, dropout_p)


def apply_keep(x: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    """Dropout with its mask at hand."""
    return x * (keep.to(x.dtype) * (256 / keep_threshold(dropout_p)))


class _Gather(torch.autograd.Function):
    """rows[index] with zeros where not `valid`; its gradient is the inverse gather, not a scatter.

    Both directions of a (un)padding are gathers, because each token sits in exactly one slot.
    """

    @staticmethod
    def forward(ctx, rows, index, valid, inverse_index, inverse_valid):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse_index, inverse_valid)
        return _take(rows, index, valid)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        return _take(dout, *ctx.saved_tensors), None, None, None, None


def _take(rows: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    taken = rows.index_select(0, index)
    return taken.masked_fill(~valid.view(-1, *(1,) * (taken.dim() - 1)), 0.0)


def sequence_lengths(
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    T: int,
) -> list[int]:
    """The N lengths. Reads `cu_seqlens`, which on a GPU waits for the device.

    Raises:
        ValueError: the sequences do not start at 0, are not in order, pass the last of T tokens,
            or one is longer than `max_seqlen`.
    """
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if not lengths:
        raise ValueError("attention: cu_seqlens holds no sequence")
    if bounds[0] != 0:
        raise ValueError(f"attention: cu_seqlens starts at {bounds[0]}, expected 0")
    if min(lengths) < 0:
        falls = [sequence for sequence, length in enumerate(lengths) if length < 0]
        raise ValueError(f"attention: cu_seqlens falls at sequences {falls[:3]}")
    if bounds[-1] > T:
        raise ValueError(f"attention: cu_seqlens ends at {bounds[-1]}, beyond {T} tokens")
    if max(lengths) > max_seqlen:
        raise ValueError(
            f"attention: a sequence has {max(lengths)} tokens, more than max_seqlen = {max_seqlen}"
        )
    return lengths


class _BiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):  # type: ignore[no-untyped-def]
        ctx.like_bias = bias.shape, bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):  # type: ignore[no-untyped-def]
        shape, dtype = ctx.like_bias
        return dx, dx.sum(0).view(shape).to(dtype)


def with_bias_gradient(
    x: Tensor,  # (T, ...)
    bias: Tensor,  # any shape of so many elements as a row has
) -> Tensor:  # (T, ...)
    """x, which contains `bias` already: whose gradient is the sum of dx over the rows, in fp32."""
    out: Tensor = _BiasGradient.apply(x, bias)
    return out


def with_bias_gradients(
    q: Tensor,  # (R, A, D)
    kv: Tensor,  # (T, 2, A, D)
    qkv_bias: Tensor,  # (3 A D,) or (3, A, D)
) -> tuple[Tensor, Tensor]:
    """`with_bias_gradient` of queries, and of keys and values, that have one bias."""
    q_bias, kv_bias = qkv_bias.view(3, -1).split((1, 2))
    return with_bias_gradient(q, q_bias), with_bias_gradient(kv, kv_bias)


def attention(
    qkv: Tensor,  # (T, 3, A, D)
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor,
    stream: int,
    *,
    qkv_bias: Tensor | None = None,  # (3 A D,) or (3, A, D)
) -> Tensor:  # (T, A, D)
    """softmax(Q Kᵀ / √D) V within each sequence, dropout on the probabilities.

    Vaswani et al. 2017, equation 1. A sequence sees itself only; rows beyond cu_seqlens[-1] are 0.
    A `qkv_bias` is in `qkv` already and not added: it gets its gradient here, where dqkv is made.

    Raises:
        ValueError: on a CPU, where looking is free, sequences that do not fit.
    """
    if qkv_bias is not None:
        qkv = with_bias_gradient(qkv, qkv_bias)
    T, _, A, D = qkv.shape
    N, S = cu_seqlens.numel() - 1, max_seqlen
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        sequence_lengths(cu_seqlens, S, T)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    position = torch.arange(S, device=qkv.device)
    slot_valid = position < (ends - starts)[:, None]  # (N, S)
    slot_token = (starts[:, None] + position).clamp(max=T - 1)
    token = torch.arange(T, device=qkv.device)
    sequence = torch.searchsorted(ends, token, right=True).clamp(max=N - 1)
    token_slot = sequence * S + (token - starts[sequence]).clamp(0, S - 1)
    token_valid = token < ends[-1]

    to_padded = (slot_token.flatten(), slot_valid.flatten(), token_slot, token_valid)
    to_packed = (token_slot, token_valid, slot_token.flatten(), slot_valid.flatten())
    q, k, v = _Gather.apply(qkv, *to_padded).view(N, S, 3, A, D).permute(2, 0, 3, 1, 4)
    scores = accumulate((q * D**-0.5) @ k.transpose(-1, -2))  # (N, A, S, S)
    # A finite floor instead of -inf: an empty sequence has no key, and must not make NaN.
    scores = scores.masked_fill(~slot_valid[:, None, None, :], -1e30)
    probabilities = dropout_scores(torch.softmax(scores, dim=-1), dropout_p, seed, stream)
    context = probabilities.to(qkv.dtype) @ v  # (N, A, S, D)
    return _Gather.apply(context.transpose(1, 2).reshape(N * S, A, D), *to_packed)


def attention_at(
    q: Tensor,  # (R, A, D)
    kv: Tensor,  # (T, 2, A, D)
    positions: Tensor,  # (R,) int64, ascending, each once; T in the unused tail
    cu_queries: Tensor,  # (N + 1,) int32
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor,
    stream: int,
    *,
    qkv_bias: Tensor | None = None,  # (3 A D,) or (3, A, D)
) -> Tensor:  # (R, A, D)
    """The rows of `attention` at `positions`, and no other: the same values, the same dropout.

    `q` holds the queries of the tokens at `positions`; those of sequence n are its rows
    cu_queries[n] to cu_queries[n + 1]. Rows beyond cu_queries[-1] are 0.

    Raises:
        ValueError: as `attention` does.
    """
    if qkv_bias is not None:
        q, kv = with_bias_gradients(q, kv, qkv_bias)
    T, _, A, D = kv.shape
    everywhere = q.new_zeros(T + 1, A, D).index_copy(0, positions, q)
    qkv = torch.cat((everywhere[:T, None], kv), dim=1)
    out = attention(qkv, cu_seqlens, max_seqlen, dropout_p, seed, stream)
    return F.pad(out, (0, 0, 0, 0, 0, 1)).index_select(0, positions)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / √(variance + eps) · weight + bias over the last dimension; Ba et al. 2016."""
    wide = accumulate(x)
    out = F.layer_norm(wide, (x.shape[-1],), weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return out.to(x.dtype)


def dropout_add_layer_norm(
    x: Tensor,  # (R, H)
    bias: Tensor,  # (H,)
    residual: Tensor,  # (R, H)
    weight: Tensor,  # (H,)
    beta: Tensor,  # (H,)
    eps: float,
    dropout_p: float,
    seed: Tensor,
    stream: int,
    *,
    rows: Tensor | None = None,  # (R,) int64
) -> Tensor:  # (R, H)
    """LayerNorm(dropout(x + bias) + residual).

    `rows` are the numbers of the rows of which these were chosen: they draw the same dropout.
    """
    dropped = dropout(accumulate(x) + accumulate(bias), dropout_p, seed, stream, rows)
    return layer_norm(dropped + accumulate(residual), weight, beta, eps).to(x.dtype)


def linear_residual(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (F, H)
    bias: Tensor | None = None,  # (F,)
) -> tuple[Tensor, Tensor]:  # (R, F), (R, H)
    """x Wᵀ + b, and x for who adds it as a residual."""
    return F.linear(x, weight, bias), x


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Φ(x) (Hendrycks & Gimpel 2016); `approximate` = "tanh" for the models trained so."""
    return F.gelu(x, approximate=approximate)


def bias_gelu(
    x: Tensor,  # (R, H)
    bias: Tensor,  # (H,)
    approximate: str = "none",
) -> Tensor:  # (R, H)
    """GELU(x + bias)."""
    return gelu(accumulate(x) + accumulate(bias), approximate).to(x.dtype)


def linear_gelu(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (F, H)
    bias: Tensor,  # (F,)
    approximate: str = "none",
) -> Tensor:  # (R, F)
    """GELU(x Wᵀ + b)."""
    return gelu(F.linear(x, weight, bias), approximate)


def gelu_linear(
    x: Tensor,  # (R, F)
    weight: Tensor,  # (H, F)
    bias: Tensor,  # (F,)
    approximate: str = "none",
) -> Tensor:  # (R, H)
    """GELU(x + bias) Wᵀ."""
    return F.linear(bias_gelu(x, bias, approximate), weight)


def qkv_linear_at(
    x: Tensor,  # (T, H)
    positions: Tensor,  # (R,) int64; T or more: unused
    weight: Tensor,  # (3 F, H)
    bias: Tensor,  # (3 F,)
) -> tuple[Tensor, Tensor, Tensor]:  # (R, F), (T, 2 F), (R, H)
    """Queries of the tokens at `positions`, keys and values of all; x at `positions`.

    What belongs to unused positions is some other token's.
    """
    F3 = weight.shape[0]
    (q_weight, kv_weight), (q_bias, kv_bias) = (
        whole.split((F3 // 3, F3 - F3 // 3)) for whole in (weight, bias)
    )
    rows = x.index_select(0, positions.clamp(max=x.shape[0] - 1))
    return F.linear(rows, q_weight, q_bias), F.linear(x, kv_weight, kv_bias), rows


def linear_gelu_residual(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (F, H)
    bias: Tensor,  # (F,)
    approximate: str = "none",
) -> tuple[Tensor, Tensor]:  # (R, F), (R, H)
    """GELU(x Wᵀ + b), and x for who adds it as a residual."""
    return linear_gelu(x, weight, bias, approximate), x


def gelu_layer_norm(
    x: Tensor,  # (R, H)
    bias: Tensor,  # (H,)
    weight: Tensor,  # (H,)
    beta: Tensor,  # (H,)
    eps: float,
    approximate: str = "none",
) -> Tensor:  # (R, H)
    """LayerNorm(GELU(x + bias)): the transform of BERT's masked-word head."""
    activated = gelu(accumulate(x) + accumulate(bias), approximate)
    return layer_norm(activated, weight, beta, eps).to(x.dtype)


class _Embedding(torch.autograd.Function):
    """table[ids], its gradient summed in fp32 over the tokens that share a row.

    A row of a bf16 table can be read by hundreds of tokens; autograd would sum them in bf16.
    """

    @staticmethod
    def forward(ctx, table, ids, skip_id):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.dtype, ctx.skip_id = table.shape[0], table.dtype, skip_id
        return accumulate(table[ids])

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        used, compact = torch.unique(ids, return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(dout, compact, used.numel(), -1, False)
        sums[used == ctx.skip_id] = 0.0
        dtable = dout.new_zeros(ctx.num_rows, dout.shape[-1], dtype=ctx.dtype)
        dtable[used] = sums.to(ctx.dtype)
        return dtable, None, None


def embedding(
    table: Tensor,  # (V, H)
    ids: Tensor,  # (T,)
    skip_id: int = -1,
) -> Tensor:  # (T, H) in fp32
    """table[ids]; the row `skip_id` is used but gets no gradient."""
    rows: Tensor = _Embedding.apply(table, ids, skip_id)
    return rows


def embed_layer_norm(
    input_ids: Tensor,  # (T,)
    token_type_ids: Tensor,  # (T,)
    position_ids: Tensor,  # (T,)
    word: Tensor,  # (V, H)
    token_type: Tensor,  # (2, H)
    position: Tensor,  # (P, H)
    weight: Tensor,  # (H,)
    beta: Tensor,  # (H,)
    pad_token_id: int,
    eps: float,
    dropout_p: float,
    seed: Tensor,
    stream: int,
) -> Tensor:  # (T, H)
    """dropout(LayerNorm(word[ids] + token_type[types] + position[positions])).

    `word[pad_token_id]` is used but gets no gradient, as in Hugging Face's BERT.
    """
    total = embedding(word, input_ids, pad_token_id)
    total = total + embedding(token_type, token_type_ids) + embedding(position, position_ids)
    return dropout(layer_norm(total, weight, beta, eps), dropout_p, seed, stream).to(word.dtype)


def linear_cross_entropy(
    x: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor,  # (V,)
    labels: Tensor,  # (M,) int64, -100 where nothing is to be predicted
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:  # () fp32
    """Sum over rows of -log softmax(x Wᵀ + b)[label]; rows labelled -100 count nothing.

    With smoothing ε (Szegedy et al. 2016, section 7) the target is 1 - ε of the label and ε of all
    words alike; z-loss ζ (Chowdhery et al. 2022, section 5) adds ζ · logsumexp² to a row's loss.
    """
    logits = accumulate(F.linear(x, weight, bias))
    loss = F.cross_entropy(
        logits, labels, ignore_index=-100, reduction="sum", label_smoothing=label_smoothing
    )
    if z_loss:
        squares = logits.logsumexp(dim=1).square()
        loss = loss + z_loss * squares.masked_fill(labels == -100, 0.0).sum()
    return loss
