"""Dropout bits inside a kernel: the same as `philox.keep_mask`, bit for bit.

One counter gives 16 bytes and a byte decides an element, so the generator runs once for 16 columns
of a row: `keep_columns` computes the counters at (rows, 8 per tile of 128 columns) and spreads
their bytes. Philox4x32-7, Salmon et al. 2011; the layout of a tile is explained in `philox`.
"""

import triton
import triton.language as tl


@triton.jit
def dropout_key(
    seed_ptr,  # (3,) int64: the run's seed, the step, the layer
    stream,
):  # type: ignore[no-untyped-def]
    """The three uint32 scalars (key0, key1, site) that all elements of a dropout share."""
    seed = tl.load(seed_ptr)
    key0 = (seed ^ (seed >> 32)).to(tl.uint32)
    key1 = tl.load(seed_ptr + 1).to(tl.uint32)
    site = (tl.load(seed_ptr + 2) * 4 + stream).to(tl.uint32)
    return key0, key1, site


@triton.jit
def philox_words(row, group, plane, site, key0, key1):  # type: ignore[no-untyped-def]
    """The four uint32 words of each counter (row, group, plane, site); the four broadcast."""
    c0, c1 = tl.broadcast(row.to(tl.uint32), group.to(tl.uint32))
    c2 = tl.zeros_like(c0) + plane.to(tl.uint32)
    c3 = tl.zeros_like(c0) + site.to(tl.uint32)
    for round in tl.static_range(7):
        k0 = key0 + tl.full((), (0x9E3779B9 * round) & 0xFFFFFFFF, tl.uint32)
        k1 = key1 + tl.full((), (0xBB67AE85 * round) & 0xFFFFFFFF, tl.uint32)
        a, b = c0, c2
        m0 = tl.full((), 0xD2511F53, tl.uint32)
        m1 = tl.full((), 0xCD9E8D57, tl.uint32)
        c0 = tl.umulhi(b, m1) ^ c1 ^ k0
        c1 = b * m1
        c2 = tl.umulhi(a, m0) ^ c3 ^ k1
        c3 = a * m0
    return c0, c1, c2, c3


@triton.jit
def keep_columns(
    row,  # (R,) integers
    first_tile,  # scalar: the tile of 128 columns to begin with
    plane,  # scalar
    site,
    key0,
    key1,
    THRESHOLD: tl.constexpr,
    TILES: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """(R, TILES * 128) booleans, True where dropout keeps the element."""
    R: tl.constexpr = row.shape[0]
    group = first_tile * 8 + tl.arange(0, TILES * 8)
    w0, w1, w2, w3 = philox_words(row[:, None], group[None, :], plane, site, key0, key1)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, TILES, 8, 4))
    words = tl.reshape(tl.permute(words, (0, 1, 3, 2)), (R, TILES, 4, 1, 8))
    shift = tl.reshape(tl.arange(0, 4) * 8, (1, 1, 1, 4, 1)).to(tl.uint32)
    byte = (words >> shift) & 0xFF  # (R, TILES, 4, 4, 8)
    return tl.reshape(byte < THRESHOLD, (R, TILES * 128))
