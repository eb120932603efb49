"""Counter-based random bytes for dropout: the same bits in the reference and in every kernel.

Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with 7 rounds,
the fewest that pass BigCrush there, as FlashAttention has it. One counter gives 16 bytes and
dropout spends one byte per element, so the generator runs once per 16 elements. The key is (seed
folded to 32 bits, step); the counter is (row, group, plane, site), where `plane` numbers the
independent matrices of a tensor (sequence x head in attention) and `site` is 4 · layer + stream:
the place in the model. Nothing depends on the order in which elements are visited, so forward,
backward and any tiling agree. The layer comes from a tensor, not a Python number, so that one
compiled layer serves all of them.

Columns are cut into tiles of 128, a tile into 8 groups: column c of a tile takes byte c // 8 of
group c % 8. That is how a tensor core's accumulator lays a row over its threads (a thread holds
columns 2t, 2t + 1 of every 8), so a kernel spends each counter in the thread that computed it; and
on a CPU it keeps 8 neighbouring columns in one vector (0.16 ms against 0.50 ms for 16 consecutive
columns per counter, 2250 x 256 elements, 2 cores).
"""

import math

import torch
from torch import Tensor

TILE = 128
GROUPS = 8
_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7


def _multiply_wide(value: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # By 16-bit halves of the factor, so that nothing reaches bit 63: signed overflow is undefined
    # in the C++ that torch.compile writes, and g++ drops the mask of a product it takes for >= 0.
    low, high = value * (factor & 0xFFFF), value * (factor >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK32


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words that one counter gives.

    Args:
        counter: four int64 tensors that broadcast, each in [0, 2^32).
        key: two int64 scalars in [0, 2^32).
        rounds: of mixing; the known-answer vectors are published for 7 and 10.

    Returns:
        Four int64 tensors in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _multiply_wide(c0, _MULTIPLIERS[0])
        hi1, lo1 = _multiply_wide(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def keep_threshold(dropout_p: float) -> int:
    """Of the 256 values of a byte, how many keep the element: round(256 (1 - p)).

    Survivors must be rescaled by 256 / threshold, the *quantised* keep probability, so that
    dropout stays unbiased.

    Raises:
        ValueError: p is outside [0, 1), or so close to 1 that nothing would be kept.
    """
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p = {dropout_p} must be in [0, 1)")
    threshold = round(256 * (1.0 - dropout_p))
    if threshold == 0:
        raise ValueError(f"dropout_p = {dropout_p} keeps nothing: use at most 0.998")
    return threshold


def keep_mask(
    shape: tuple[int, ...],  # (..., rows, columns)
    dropout_p: float,
    seed: Tensor,  # (3,) int64: the run's seed, the step, the layer
    stream: int,  # 0..3: which dropout of the layer
) -> Tensor:
    """Boolean mask of `shape`, True where dropout keeps the element.

    The bit of an element depends on its plane, row, column, site, seed and step only: not on how
    many planes, rows or columns there are.
    """
    return site_mask(shape, keep_threshold(dropout_p), seed, seed[2] * 4 + stream)


def site_mask(
    shape: tuple[int, ...],  # (..., rows, columns)
    threshold: int,
    seed: Tensor,  # (3,) int64
    site: Tensor,  # () int64
) -> Tensor:
    """`keep_mask` by its threshold and site: one compiled function serves every dropout."""
    *planes, rows, columns = shape
    tiles = -(-columns // TILE)
    device = seed.device
    plane = torch.arange(math.prod(planes), device=device).view(-1, 1, 1)
    row = torch.arange(rows, device=device).view(1, -1, 1)
    group = torch.arange(tiles * GROUPS, device=device)
    words = philox_4x32(
        (row, group, plane, site), ((seed[0] ^ (seed[0] >> 32)) & _MASK32, seed[1] & _MASK32)
    )
    packed = torch.stack([word.to(torch.int32) for word in words], dim=2)  # (planes, rows, 4, 8 t)
    packed = packed.view(math.prod(planes), rows, 4, tiles, GROUPS).transpose(2, 3).unsqueeze(4)
    shift = torch.tensor((0, 8, 16, 24), dtype=torch.int32, device=device).view(4, 1)
    byte = (packed >> shift) & 0xFF  # (planes, rows, tiles, 4 words, 4 bytes, 8 groups)
    return (byte < threshold).reshape(*planes, rows, tiles * TILE)[..., :columns]
