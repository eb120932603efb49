"""Dropout bits inside a kernel: the same as `philox.keep_mask`, bit for bit.

One counter gives 16 bytes and a byte decides an element, so the generator runs once for 16 columns
of a row. Philox4x32-7, Salmon et al. 2011; `philox` explains how the bytes lie in a tile of 128
columns. R rows of a block.
"""

from fastbert_kernels.triton_import import tl, triton


@triton.jit
def dropout_key(
    seed_ptr,  # (3,) int64: the run's seed, the step, the layer
    stream,  # which dropout of the layer
):
    """The uint32 scalars (key0, key1, site) that all elements of a dropout share."""
    seed = tl.load(seed_ptr)
    key0 = (seed ^ (seed >> 32)).to(tl.uint32)
    key1 = tl.load(seed_ptr + 1).to(tl.uint32)
    site = (tl.load(seed_ptr + 2) * 4 + stream).to(tl.uint32)
    return key0, key1, site


@triton.jit
def philox_words(row, group, plane, site, key0, key1):
    """The four uint32 words of each counter (row, group, plane, site), which broadcast."""
    c0, c1 = tl.broadcast(row.to(tl.uint32), group.to(tl.uint32))
    c2 = tl.zeros_like(c0) + plane.to(tl.uint32)
    c3 = tl.zeros_like(c0) + site.to(tl.uint32)
    for i in tl.static_range(7):
        k0 = key0 + tl.full((), (0x9E3779B9 * i) & 0xFFFFFFFF, tl.uint32)
        k1 = key1 + tl.full((), (0xBB67AE85 * i) & 0xFFFFFFFF, tl.uint32)
        factor0 = tl.full((), 0xD2511F53, tl.uint32)
        factor1 = tl.full((), 0xCD9E8D57, tl.uint32)
        # Not one 64-bit product for both halves: no fewer instructions around a 128 x 128 dot
        # (1255 against 1262), but 14 to 75 registers more and a spill on sm_80.
        high0, low0 = tl.umulhi(c0, factor0), c0 * factor0
        high1, low1 = tl.umulhi(c2, factor1), c2 * factor1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


@triton.jit
def keep_columns(
    row,  # (R,) integers
    first_tile,  # the tile of 128 columns to begin with
    plane,
    site,
    key0,
    key1,
    THRESHOLD: tl.constexpr,  # philox.keep_threshold(dropout_p)
    TILES: tl.constexpr,
):
    """(R, TILES * 128) booleans, True where dropout keeps the element.

    Only views, no arithmetic, lie between words and elements: in the layout of a dot's accumulator
    every thread already holds the counters of its own elements (6.3 instructions an element for
    everything, 128 x 128, 4 warps); in a row-wise layout one byte an element changes threads
    through shared memory (9.7 instructions).
    """
    R: tl.constexpr = row.shape[0]
    group = first_tile * 8 + tl.arange(0, TILES * 8)
    w0, w1, w2, w3 = philox_words(row[:, None], group[None, :], plane, site, key0, key1)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (R, TILES, 8, 4))
    words = tl.reshape(tl.permute(words, (0, 1, 3, 2)), (R, TILES, 4, 1, 8))
    shift = tl.reshape(tl.arange(0, 4) * 8, (1, 1, 1, 4, 1)).to(tl.uint32)
    byte = (words >> shift) & 0xFF  # (R, TILES, 4 words, 4 bytes, 8 groups)
    return tl.reshape(byte < THRESHOLD, (R, TILES * 128))
