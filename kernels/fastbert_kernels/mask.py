"""MLM masking on the device, from the same counter-based generator as dropout.

Devlin et al. 2019, section 3.1: each token is chosen independently, and a chosen one becomes [MASK]
(80%), a word drawn from the vocabulary (10%) or stays (10%). `reference_optimizer.mask_tokens` says
which bits decide. 24 bytes a token (ids read, ids and labels written): 0.5 us for 65,536, so what
counts is that it is one launch. T tokens packed, V vocabulary.
"""

import torch
from torch import Tensor

from fastbert_kernels import checks
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.philox_triton import dropout_key, philox_words
from fastbert_kernels.reference_optimizer import MASK_GROUP, SHARE_KEPT_BELOW, SHARE_MASK, share
from fastbert_kernels.triton_import import tl, triton

_BLOCK = 512


@triton.jit(do_not_specialize=["seed_ptr", "T", "V", "mask_id"])
def _mask_kernel(
    input_ids_ptr,  # (T,) int64
    is_special_ptr,  # (V,) bool
    seed_ptr,  # (3,) int64
    masked_ids_ptr,  # (T,) int64
    labels_ptr,  # (T,) int64
    T,
    V,
    mask_id,
    CHOSEN: tl.constexpr,  # thresholds of 2^32
    MASK: tl.constexpr,
    RANDOM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < T
    ids = tl.load(input_ids_ptr + token, inside, other=0)
    special = tl.load(is_special_ptr + ids, inside & (ids >= 0) & (ids < V), other=1)
    key0, key1, site = dropout_key(seed_ptr, 0)
    group, plane = tl.full((), GROUP, tl.uint32), tl.zeros((), tl.uint32)
    choice, kind, word, _ = philox_words(token, group, plane, site, key0, key1)
    chosen = (choice.to(tl.int64) < CHOSEN) & (special == 0)
    kind = kind.to(tl.int64)
    random_id = tl.umulhi(word, tl.cast(V, tl.uint32)).to(tl.int64)
    replaced = tl.where(kind < MASK, mask_id, tl.where(kind < RANDOM, random_id, ids))
    tl.store(masked_ids_ptr + token, tl.where(chosen, replaced, ids), inside)
    tl.store(labels_ptr + token, tl.where(chosen, ids, -100), inside)


@torch.library.custom_op("fastbert::mask_tokens", mutates_args=())
def _mask_tokens(
    input_ids: Tensor, is_special: Tensor, seed: Tensor, mlm_probability: float, mask_id: int
) -> tuple[Tensor, Tensor]:
    T = input_ids.numel()
    masked_ids, labels = torch.empty_like(input_ids), torch.empty_like(input_ids)
    if T:
        _mask_kernel[(triton.cdiv(T, _BLOCK),)](
            input_ids, is_special, seed, masked_ids, labels, T, is_special.numel(), mask_id,
            CHOSEN=share(mlm_probability), MASK=share(SHARE_MASK), RANDOM=share(SHARE_KEPT_BELOW),
            GROUP=MASK_GROUP, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return masked_ids, labels


@_mask_tokens.register_fake
def _(input_ids, is_special, seed, mlm_probability, mask_id):
    return torch.empty_like(input_ids), torch.empty_like(input_ids)


def mask_tokens(
    input_ids: Tensor,  # (T,) int64
    is_special: Tensor,  # (V,) bool: tokens never chosen
    seed: Tensor,  # (3,) int64
    mlm_probability: float,
    mask_id: int,
) -> tuple[Tensor, Tensor]:  # masked ids (T,), labels (T,): -100 where nothing is to be predicted
    """`reference_optimizer.mask_tokens`, bit for bit.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, mlm_probability outside [0, 1], or
            mask_id outside the vocabulary.
    """
    op, device = "mask_tokens", input_ids.device
    checks.require_launchable(op, _mask_kernel, device, "reference_optimizer.mask_tokens")
    checks.require_tensor(op, "input_ids", input_ids, (None,), torch.int64, device)
    checks.require_tensor(op, "is_special", is_special, (None,), torch.bool, device)
    checks.require_seed(op, seed, device)
    V = is_special.numel()
    if not 0.0 <= mlm_probability <= 1.0:
        raise ValueError(f"{op}: mlm_probability = {mlm_probability} is outside [0, 1]")
    if not 0 <= mask_id < V:
        raise ValueError(f"{op}: mask_id = {mask_id} is outside the vocabulary of {V}")
    masked: tuple[Tensor, Tensor] = _mask_tokens(
        input_ids, is_special, seed, mlm_probability, mask_id
    )
    return masked


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped configuration, for the compile report."""
    constexprs = {
        "CHOSEN": share(0.15),
        "MASK": share(SHARE_MASK),
        "RANDOM": share(SHARE_KEPT_BELOW),
        "GROUP": MASK_GROUP,
        "BLOCK": _BLOCK,
    }
    signature = checks.kernel_signature(_mask_kernel, constexprs, torch.int64, is_special_ptr="*i1")
    return [CompileCase("mask_tokens", "15%", _mask_kernel, signature, constexprs, num_warps=4)]
