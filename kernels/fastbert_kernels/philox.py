"""Counter-based random bytes for dropout: the same bits in the reference and in every kernel.

Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with 7 rounds,
the fewest that pass BigCrush there, as FlashAttention has it. One counter gives 16 bytes and
dropout spends one byte per element, so the generator runs once per 16 elements. The key is (seed
folded to 32 bits, step); the counter is (row, group, plane, site), where `plane` numbers the
independent matrices of a tensor (sequence x head in attention) and `site` is 4 · layer + stream:
the place in the model. Nothing depends on the order in which elements are visited, so forward,
backward and any tiling agree. The layer comes from a tensor, not a Python number, so that one
compiled layer serves all of them.

Where rows are whole (`keep_mask`), columns are cut into tiles of 128, a tile into 8 groups: column
c of a tile takes byte c // 8 of group c % 8, which on a CPU keeps 8 neighbouring columns in one
vector (0.16 ms against 0.50 ms for 16 consecutive columns per counter, 2250 x 256 elements, 2
cores). Attention's scores (`score_mask`) are cut as a tensor core's accumulator lays them over its
threads, which hold columns 2t, 2t + 1 of every 8 in two rows 8 apart: a counter serves the rows r
and r + 8 of 16, and of 64 columns those of one group, bytes 0 to 7 the upper row. So a kernel
spends each counter in the thread that computed it, in tiles of 64 columns too.
"""

import math

import torch
from torch import Tensor

TILE, SCORE_TILE = 128, 64
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
    numbers: Tensor | None = None,  # (rows,) int64, of the rows; None: 0, 1, 2, ...
) -> Tensor:
    """Boolean mask of `shape`, True where dropout keeps the element.

    The bit of an element depends on its plane, row, column, site, seed and step only: not on how
    many planes, rows or columns there are.
    """
    return site_mask(shape, keep_threshold(dropout_p), seed, seed[2] * 4 + stream, numbers)


def site_mask(
    shape: tuple[int, ...],  # (..., rows, columns)
    threshold: int,
    seed: Tensor,  # (3,) int64
    site: Tensor,  # () int64
    numbers: Tensor | None = None,  # (rows,) int64
) -> Tensor:
    """`keep_mask` by its threshold and site: one compiled function serves every dropout."""
    *planes, rows, columns = shape
    tiles = -(-columns // TILE)
    row = torch.arange(rows, device=seed.device) if numbers is None else numbers
    words = _words(math.prod(planes), row, tiles * GROUPS, seed, site)
    packed = torch.stack(words, dim=2)  # (planes, rows, 4, 8 t)
    packed = packed.view(math.prod(planes), rows, 4, tiles, GROUPS).transpose(2, 3).unsqueeze(4)
    byte = _bytes(packed)  # (planes, rows, tiles, 4 words, 4 bytes, 8 groups)
    return (byte < threshold).reshape(*planes, rows, tiles * TILE)[..., :columns]


def score_mask(
    shape: tuple[int, ...],  # (..., queries, keys)
    threshold: int,
    seed: Tensor,  # (3,) int64
    site: Tensor,  # () int64: 4 · layer + stream
) -> Tensor:
    """Boolean mask of attention's probabilities, True where dropout keeps one; see `keep_mask`."""
    *planes, rows, columns = shape
    blocks, tiles = -(-rows // 16), -(-columns // SCORE_TILE)
    row = torch.arange(blocks * 8, device=seed.device)
    words = _words(math.prod(planes), row, tiles * GROUPS, seed, site)
    packed = torch.stack(words, dim=3).view(-1, blocks, 8, tiles, GROUPS, 2, 2)
    # (planes, blocks, 2 halves, 8 rows, tiles, 2 words, 1, 8 groups)
    packed = packed.permute(0, 1, 5, 2, 3, 6, 4).unsqueeze(6)
    keep = (_bytes(packed) < threshold).reshape(*planes, blocks * 16, tiles * SCORE_TILE)
    return keep[..., :rows, :columns]


def _words(planes: int, row: Tensor, groups: int, seed: Tensor, site: Tensor) -> list[Tensor]:
    """Four int32 tensors (planes, rows, groups)."""
    plane = torch.arange(planes, device=seed.device).view(-1, 1, 1)
    group = torch.arange(groups, device=seed.device)
    key = ((seed[0] ^ (seed[0] >> 32)) & _MASK32, seed[1] & _MASK32)
    counter = (row.view(1, -1, 1), group, plane, site)
    return [word.to(torch.int32) for word in philox_4x32(counter, key)]


def _bytes(packed: Tensor) -> Tensor:  # (..., 1, 8 groups) int32 -> (..., 4, 8 groups)
    shift = torch.tensor((0, 8, 16, 24), dtype=torch.int32, device=packed.device).view(4, 1)
    return (packed >> shift) & 0xFF
