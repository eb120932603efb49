"""FlashAttention behind the signature of `attention`: what PyTorch carries, or the package.

Dao 2023, FlashAttention-2. Two things differ from our own kernels: dropout draws bits of its own
from the device's generator, and the backward sums dQ atomically, so two runs differ in the last
bits. Compile-checked only: not yet run on a GPU.
"""

import importlib
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor


def _dispatch_to(backend: str) -> None:
    wanted = {"fa3": "FA3", "fa4": "FA4"}.get(backend)
    now = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if wanted != now:
        if wanted is None:
            torch.nn.attention.restore_flash_attention_impl()
        else:
            torch.nn.attention.activate_flash_attention_impl(wanted)


class _MaskGradient(torch.autograd.Function):
    """x, its gradient zeroed where `tail`: FlashAttention leaves those rows unwritten."""

    @staticmethod
    def forward(ctx, x, tail):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(tail)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):  # type: ignore[no-untyped-def]
        (tail,) = ctx.saved_tensors
        return dx.masked_fill(tail.view(-1, *(1,) * (dx.dim() - 1)), 0.0), None


def attention(
    qkv: Tensor,  # (T, 3, A, D) fp16 or bf16
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    dropout_p: float,
    backend: str,  # "torch", "flash_attn", "fa3" or "fa4"
) -> Tensor:  # (T, A, D)
    """softmax(Q Kᵀ / √D) V within each sequence. Not yet run on a GPU.

    PyTorch dispatches forward and backward of a process to one FlashAttention: the last of "torch",
    "fa3" and "fa4" that was asked for. Do not mix them between a forward and its backward.
    """
    q, k, v = _without_tail(qkv, cu_seqlens).unbind(1)
    return _attend(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, dropout_p, backend)


def attention_at(
    q: Tensor,  # (R, A, D)
    kv: Tensor,  # (T, 2, A, D)
    cu_queries: Tensor,  # (N + 1,) int32
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    dropout_p: float,
    backend: str,
) -> Tensor:  # (R, A, D)
    """`attention` of some queries over all keys. Not yet run on a GPU."""
    k, v = _without_tail(kv, cu_seqlens).unbind(1)
    q = _without_tail(q, cu_queries)
    return _attend(q, k, v, cu_queries, cu_seqlens, max_seqlen, dropout_p, backend)


def _tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]


def _without_tail(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    kept: Tensor = _MaskGradient.apply(x, _tail(x, cu_seqlens))
    return kept


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    backend: str,
) -> Tensor:
    if backend != "flash_attn":
        _dispatch_to(backend)
        out: Any = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_queries, cu_seqlens, max_seqlen, max_seqlen, dropout_p, False, False
        )[0]
    else:
        package = importlib.import_module("flash_attn")
        out = package.flash_attn_varlen_func(
            q, k, v, cu_queries, cu_seqlens, max_seqlen, max_seqlen, dropout_p
        )
    masked: Tensor = out.masked_fill(_tail(q, cu_queries)[:, None, None], 0.0)
    return masked
