"""The ops as a CPU wants them: the mathematics and the dropout bits of `reference`, less work.

Attention goes by groups of sequences of similar length, so that the cost follows Σ s² and not
N S² (at 55% real tokens: 40%). Pointwise chains are fused by torch.compile where there is a C++
compiler; matrix products stay outside the compiled pieces, where oneDNN runs them with bias and
without a copy (linear + GELU, 2312 x 256 x 1024, forward + backward: 5.4 ms against 9.0 compiled).

N sequences, T tokens packed, S longest sequence, A heads, D head dimension, H hidden size, M masked
tokens, V vocabulary; n sequences of a group, s its padded length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels import reference
from fastbert_kernels.main_grad import embedding
from fastbert_kernels.philox import keep_threshold, score_mask, site_mask


class CpuOps:
    """The fused ops for a CPU; signatures and meaning are those of `reference`.

    Args:
        compiled: fuse pointwise chains with torch.compile, which needs a C++ compiler.
    """

    def __init__(self, compiled: bool) -> None:
        def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function

        if compiled:
            # One code for each shape: a curriculum and a prediction bring more than the usual 8.
            dynamo: Any = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, 64)

        self._grouped: Tensor | None = None
        self._version = 0
        self._groups: list[_Group] = []
        self._site_mask, self._score_mask = fuse(site_mask), fuse(score_mask)
        self._dropout_add_layer_norm = fuse(_dropout_add_layer_norm)
        self._gelu_layer_norm = fuse(reference.gelu_layer_norm)
        self._softmax_gradient = fuse(_softmax_gradient)

    def _keep(
        self,
        mask_of: Callable[..., Tensor],  # site_mask, or score_mask for attention
        shape: tuple[int, ...],
        dropout_p: float,
        seed: Tensor,
        stream: int,
        *rows: Tensor | None,  # of site_mask
    ) -> Tensor | None:
        if dropout_p == 0.0:
            return None
        mask = mask_of(shape, keep_threshold(dropout_p), seed, seed[2] * 4 + stream, *rows)
        # As bytes: compiled code converts bool element by element (1.25 ms against 0.21 for a
        # LayerNorm of 2109 x 256).
        keep: Tensor = mask.view(torch.uint8)
        return keep

    def attention(
        self,
        qkv: Tensor,  # (T, 3, A, D)
        cu_seqlens: Tensor,  # (N + 1,) int32
        max_seqlen: int,
        dropout_p: float,
        seed: Tensor,
        stream: int,
        *,
        qkv_bias: Tensor | None = None,
    ) -> Tensor:  # (T, A, D)
        """`reference.attention`, group by group."""
        if qkv_bias is not None:
            qkv = reference.with_bias_gradient(qkv, qkv_bias)
        N, A, S = cu_seqlens.numel() - 1, qkv.shape[2], max_seqlen
        keep = self._keep(self._score_mask, (N, A, S, S), dropout_p, seed, stream)
        groups = self._groups_of(cu_seqlens, S, qkv.shape[0])
        out: Tensor = _Attention.apply(qkv, groups, dropout_p, keep)
        return out

    def attention_at(
        self,
        q: Tensor,  # (R, A, D)
        kv: Tensor,  # (T, 2, A, D)
        positions: Tensor,  # (R,)
        cu_queries: Tensor,  # (N + 1,) int32
        cu_seqlens: Tensor,  # (N + 1,) int32
        max_seqlen: int,
        dropout_p: float,
        seed: Tensor,
        stream: int,
        *,
        qkv_bias: Tensor | None = None,
    ) -> Tensor:  # (R, A, D)
        """`reference.attention_at`, group by group."""
        if qkv_bias is not None:
            q, kv = reference.with_bias_gradients(q, kv, qkv_bias)
        N, A, S = cu_seqlens.numel() - 1, q.shape[1], max_seqlen
        keep = self._keep(self._score_mask, (N, A, S, S), dropout_p, seed, stream)
        groups = self._groups_of(cu_seqlens, S, kv.shape[0])
        asked = _with_queries(groups, positions, cu_queries, cu_seqlens)
        out: Tensor = _AttentionAt.apply(q, kv, asked, dropout_p, keep)
        return out

    def _groups_of(self, cu_seqlens: Tensor, S: int, T: int) -> list["_Group"]:
        version = -1 if cu_seqlens.is_inference() else cu_seqlens._version  # not known there
        if self._grouped is not cu_seqlens or self._version != version or version < 0:
            self._groups = _groups(cu_seqlens, S, T)  # the same for every layer
            self._grouped, self._version = cu_seqlens, version
        return self._groups

    def dropout_add_layer_norm(
        self,
        x: Tensor,  # (R, H)
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        beta: Tensor,
        eps: float,
        dropout_p: float,
        seed: Tensor,
        stream: int,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:  # (R, H)
        """`reference.dropout_add_layer_norm`."""
        keep = self._keep(self._site_mask, tuple(x.shape), dropout_p, seed, stream, rows)
        out: Tensor = self._dropout_add_layer_norm(
            x, bias, residual, weight, beta, eps, dropout_p, keep
        )
        return out

    def gelu_layer_norm(self, *args: Any) -> Tensor:
        """`reference.gelu_layer_norm`."""
        out: Tensor = self._gelu_layer_norm(*args)
        return out

    def embed_layer_norm(
        self,
        input_ids: Tensor,  # (T,)
        token_type_ids: Tensor,
        position_ids: Tensor,
        word: Tensor,  # (V, H)
        token_type: Tensor,
        position: Tensor,
        weight: Tensor,
        beta: Tensor,
        pad_token_id: int,
        eps: float,
        dropout_p: float,
        seed: Tensor,
        stream: int,
    ) -> Tensor:  # (T, H)
        """`reference.embed_layer_norm`."""
        total = embedding(word, input_ids, pad_token_id)
        total = total + embedding(token_type, token_type_ids) + embedding(position, position_ids)
        out = reference.layer_norm(total, weight, beta, eps).to(word.dtype)
        keep = self._keep(self._site_mask, tuple(out.shape), dropout_p, seed, stream)
        return out if keep is None else reference.apply_keep(out, keep, dropout_p)

    def linear_cross_entropy(
        self,
        x: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        bias: Tensor,  # (V,)
        labels: Tensor,  # (M,)
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:  # () fp32
        """`reference.linear_cross_entropy`; the forward already leaves the logits' gradient."""
        if label_smoothing or z_loss:
            return reference.linear_cross_entropy(x, weight, bias, labels, label_smoothing, z_loss)
        loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, labels, self._softmax_gradient)
        return loss


def _dropout_add_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    beta: Tensor,
    eps: float,
    dropout_p: float,
    keep: Tensor | None,
) -> Tensor:
    total = reference.accumulate(x) + reference.accumulate(bias)
    if keep is not None:
        total = reference.apply_keep(total, keep, dropout_p)
    total = total + reference.accumulate(residual)
    return reference.layer_norm(total, weight, beta, eps).to(x.dtype)


# Attention


class _Group(NamedTuple):
    """Sequences of similar length, padded to s."""

    sequences: Tensor  # (n,) which they are
    tokens: Tensor  # (n * s,) where each slot's token stands; some other token's place if padding
    valid: Tensor  # (n, 1, 1, s) False at padding
    slots: Tensor | None  # (tokens of the group,) slots that are not padding; None if all


def _groups(cu_seqlens: Tensor, S: int, T: int) -> list[_Group]:
    multiple = max(32, S // 16)  # at most 16 groups; 4 at S = 128, where 2 and 8 are slower
    by_length: dict[int, list[int]] = {}
    for sequence, length in enumerate(reference.sequence_lengths(cu_seqlens, S, T)):
        if length:
            padded = min(-(-length // multiple) * multiple, S)
            by_length.setdefault(padded, []).append(sequence)
    return [
        _group(torch.tensor(members), cu_seqlens, padded, T)
        for padded, members in sorted(by_length.items())
    ]


def _group(sequences: Tensor, bounds: Tensor, padded: int, T: int) -> _Group:
    starts, ends = bounds[:-1].long()[sequences, None], bounds[1:].long()[sequences, None]
    tokens = starts + torch.arange(padded)
    valid = tokens < ends
    slots = None if bool(valid.all()) else valid.view(-1).nonzero().squeeze(1)
    return _Group(sequences, tokens.clamp_(max=T - 1).view(-1), valid[:, None, None, :], slots)


class _Queries(NamedTuple):
    """Of a group's sequences, those there are: at most r of each."""

    rows: _Group  # where they lie, as if they were tokens
    places: Tensor  # (n, 1, r, 1) their rows in the sequence's matrix of scores


def _with_queries(
    groups: list[_Group], positions: Tensor, cu_queries: Tensor, cu_seqlens: Tensor
) -> list[tuple[_Group, _Queries]]:
    found = []
    for group in groups:
        longest = int(cu_queries.diff()[group.sequences].max())
        if longest:
            rows = _group(group.sequences, cu_queries, longest, len(positions))
            places = positions[rows.tokens].view(-1, longest)
            places = places - cu_seqlens[:-1].long()[group.sequences, None]
            places = places.masked_fill_(~rows.valid[:, 0, 0], 0)
            found.append((group, _Queries(rows, places[:, None, :, None])))
    return found


def _attend(
    q: Tensor,  # (n A, r, D)
    k: Tensor,  # (n A, s, D)
    v: Tensor,  # (n A, s, D)
    group: _Group,
    kept: Tensor | None,  # (n, A, r, s)
) -> tuple[Tensor, tuple[Any, ...]]:  # (n A, r, D), and what the gradient needs
    n, s = group.sequences.numel(), group.valid.shape[-1]
    q = q * k.shape[-1] ** -0.5
    scores = torch.bmm(q, k.transpose(1, 2)).view(n, -1, q.shape[1], s)
    if group.slots is not None:
        floor = torch.zeros(n, 1, 1, s, dtype=scores.dtype)
        scores += floor.masked_fill_(~group.valid, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1)
    # A product, because masked_fill is not vectorised: 0.09 ms against 0.28 for 330k.
    dropped = probabilities if kept is None else probabilities * kept
    context = torch.bmm(dropped.view(-1, q.shape[1], s), v)
    return context, (q, k, v, probabilities, dropped, kept)


def _attend_backward(
    dcontext: Tensor,  # (n A, r, D)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probabilities: Tensor,
    dropped: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # dq (n A, r, D), dk (n A, s, D), dv (n A, s, D)
    dprobabilities = torch.bmm(dcontext, v.transpose(1, 2)).view(probabilities.shape)
    if kept is not None:
        dprobabilities *= kept
    dscores = torch.ops.aten._softmax_backward_data(
        dprobabilities, probabilities, -1, probabilities.dtype
    ).view(-1, *probabilities.shape[2:])
    dq = torch.bmm(dscores, k) * k.shape[-1] ** -0.5
    dk = torch.bmm(dscores.transpose(1, 2), q)
    return dq, dk, torch.bmm(dropped.view(dscores.shape).transpose(1, 2), dcontext)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, groups, dropout_p, keep):  # type: ignore[no-untyped-def]
        T, _, A, D = qkv.shape
        flat = qkv.reshape(T, 3 * A * D)
        out = _rows_of(flat, A * D, groups)
        scale = 256 / keep_threshold(dropout_p)
        saved = []
        for group in groups:
            s, kept = group.valid.shape[-1], None
            if keep is not None:
                kept = keep[:, :, :s, :s].index_select(0, group.sequences).to(qkv.dtype)
            q, k, v = _take(flat, group, A, D)
            context, state = _attend(q, k, v, group, kept)
            _put(out, context[None], group, A)
            saved.append((group, state))
        ctx.saved, ctx.shape, ctx.scale = saved, (T, A, D), scale
        return (out * scale if keep is not None else out).view(T, A, D)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        T, A, D = ctx.shape
        dout = dout.reshape(T, A * D)
        dqkv = _rows_of(dout, 3 * A * D, [group for group, _ in ctx.saved])
        for group, state in ctx.saved:
            (dcontext,) = _take(dout, group, A, D)
            if state[-1] is not None:
                dcontext *= ctx.scale
            _put(dqkv, torch.stack(_attend_backward(dcontext, *state)), group, A)
        return dqkv.view(T, 3, A, D), None, None, None


class _AttentionAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, groups, dropout_p, keep):  # type: ignore[no-untyped-def]
        (R, A, D), T = q.shape, kv.shape[0]
        q, kv = q.reshape(R, A * D), kv.reshape(T, 2 * A * D)
        out = _rows_of(q, A * D, [queries.rows for _, queries in groups])
        scale = 256 / keep_threshold(dropout_p)
        saved = []
        for group, (rows, places) in groups:
            s, kept = group.valid.shape[-1], None
            if keep is not None:
                kept = keep[..., :s].index_select(0, group.sequences)
                kept = kept.gather(2, places.expand(-1, A, -1, s)).to(q.dtype)
            (own,), (k, v) = _take(q, rows, A, D), _take(kv, group, A, D)
            context, state = _attend(own, k, v, group, kept)
            _put(out, context[None], rows, A)
            saved.append((group, rows, state))
        ctx.saved, ctx.shape, ctx.scale = saved, (R, T, A, D), scale
        return (out * scale if keep is not None else out).view(R, A, D)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        R, T, A, D = ctx.shape
        dout = dout.reshape(R, A * D)
        dq = _rows_of(dout, A * D, [rows for _, rows, _ in ctx.saved])
        dkv = _rows_of(dout, 2 * A * D, [group for group, *_ in ctx.saved], T)
        for group, rows, state in ctx.saved:
            (dcontext,) = _take(dout, rows, A, D)
            if state[-1] is not None:
                dcontext *= ctx.scale
            own, *others = _attend_backward(dcontext, *state)
            _put(dq, own[None], rows, A)
            _put(dkv, torch.stack(others), group, A)
        return dq.view(R, A, D), dkv.view(T, 2, A, D), None, None, None


def _rows_of(like: Tensor, width: int, groups: list[_Group], T: int = 0) -> Tensor:
    """(T, width) to be filled by the groups: zeros only where they do not cover every token."""
    covered = sum(len(group.tokens if group.slots is None else group.slots) for group in groups)
    T = T or like.shape[0]
    return like.new_empty(T, width) if covered == T else like.new_zeros(T, width)


def _take(rows: Tensor, group: _Group, A: int, D: int) -> Tensor:  # (T, c A D) -> (c, n A, s, D)
    """c kinds of rows of each head of each sequence, zeros at padding."""
    taken = rows.index_select(0, group.tokens)
    if group.slots is not None:
        taken = taken.masked_fill(~group.valid.view(-1, 1), 0.0)
    n, s = group.sequences.numel(), group.valid.shape[-1]
    return taken.view(n, s, -1, A, D).permute(2, 0, 3, 1, 4).reshape(-1, n * A, s, D)


def _put(out: Tensor, heads: Tensor, group: _Group, A: int) -> None:  # the inverse of `_take`
    c, _, s, D = heads.shape
    rows = heads.view(c, -1, A, s, D).permute(1, 3, 0, 2, 4).reshape(-1, c * A * D)
    if group.slots is None:
        out.index_copy_(0, group.tokens, rows)
    else:
        tokens = group.tokens.index_select(0, group.slots)
        out.index_copy_(0, tokens, rows.index_select(0, group.slots))


# Cross-entropy


def _softmax_gradient(
    logits: Tensor,  # (M, V) without bias
    bias: Tensor,  # (V,)
    labels: Tensor,  # (M,)
) -> tuple[Tensor, Tensor]:  # () summed loss, (M, V) its gradient by the logits
    wide = reference.accumulate(logits) + reference.accumulate(bias)
    real = labels != -100
    target = labels.clamp(min=0)[:, None]
    log_normalizer = torch.logsumexp(wide, dim=1, keepdim=True)
    losses = (log_normalizer - wide.gather(1, target)).squeeze(1)
    column = torch.arange(wide.shape[1], device=wide.device)
    dlogits = (wide - log_normalizer).exp() - (column == target).to(wide.dtype)
    dlogits = dlogits * real[:, None]
    return torch.where(real, losses, 0.0).sum(), dlogits.to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, labels, softmax_gradient):  # type: ignore[no-untyped-def]
        loss, dlogits = softmax_gradient(F.linear(x, weight), bias, labels)
        ctx.save_for_backward(x, weight, dlogits)
        ctx.main_grad = getattr(weight, "main_grad", None)
        return loss

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        x, weight, dlogits = ctx.saved_tensors
        dx = dlogits @ weight * dloss.to(x.dtype)
        scaled, dweight = x * dloss.to(x.dtype), None
        if ctx.main_grad is None:
            dweight = dlogits.t() @ scaled
        else:
            ctx.main_grad.add_product(dlogits, scaled)
        dbias = dlogits.sum(0) * dloss.to(x.dtype)
        return dx, dweight, dbias, None, None
