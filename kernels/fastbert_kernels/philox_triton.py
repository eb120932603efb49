"""Dropout bits inside a kernel: the same as `philox.keep_mask` and `score_mask`, bit for bit.

One counter gives 16 bytes and a byte decides an element, so the generator runs once for 16 of them.
Philox4x32-7, Salmon et al. 2011; `philox` explains how the bytes lie in a matrix. R rows of a
block.
"""

from fastbert_kernels.triton_import import tl, triton

# $1 a pair of p, $2 and $3 the words that drop its two elements, $4 and $5 their selectors. The
# interpreter has no assembly: tests/kernels/test_philox.py reckons it instruction by instruction.
_DROP_PAIR = tl.constexpr("""{
    .reg .b32 low, high, mask;
    and.b32 low, $4, 0xFF;
    and.b32 high, $5, 0xFF00;
    or.b32 mask, low, high;
    prmt.b32 mask, $2, $3, mask;
    lop3.b32 $0, $1, mask, mask, 0x30;
}""")


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
        # One product of 64 bits for both halves: attention's forward issues 128 x 128 scores in
        # 1,374 cycles, with two products in 1,446; the head's backward on sm_80 in 3,912 and 4,648.
        wide0, wide1 = c0.to(tl.uint64) * factor0, c2.to(tl.uint64) * factor1
        high0, low0 = (wide0 >> 32).to(tl.uint32), wide0.to(tl.uint32)
        high1, low1 = (wide1 >> 32).to(tl.uint32), wide1.to(tl.uint32)
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


@triton.jit
def _dropped_bits(word, THRESHOLD: tl.constexpr):
    """Bit 7 of each byte of a uint32 set where byte >= THRESHOLD: four comparisons in three steps.

    The sum cannot carry from byte to byte: its terms are at most 127 and 128.
    """
    low = word & 0x7F7F7F7F
    if THRESHOLD <= 128:
        return (low + (128 - THRESHOLD) * 0x01010101) | word
    return (low + (256 - THRESHOLD) * 0x01010101) & word


@triton.jit
def dropped_scores(
    first_row,  # a multiple of 16
    rows,  # (R,) the rows, first_row and following where not SCATTERED
    first_column,  # a multiple of COLUMNS
    plane,
    site,
    key0,
    key1,
    THRESHOLD: tl.constexpr,
    COLUMNS: tl.constexpr,  # 32 or a multiple of 64
    SCATTERED: tl.constexpr,
):
    """(R, COLUMNS) uint32: bit 7 of byte (column // 8 % 4) is set where dropout drops the element.

    In the accumulator's own layout: choosing a word by row and column costs nothing there, because
    both are known of every register when the kernel is compiled. Rows that do not follow each other
    share no counters: each spends its own, twice as many.
    """
    R: tl.constexpr = rows.shape[0]
    TILES: tl.constexpr = (COLUMNS + 63) // 64
    group = first_column // 64 * 8 + tl.arange(0, 8 * TILES)
    HALVES: tl.constexpr = 1 if SCATTERED else 2
    shape: tl.constexpr = (R // (8 * HALVES), 1, 8, TILES, 1, 8)
    if SCATTERED:
        counter = rows // 16 * 8 + rows % 8
    else:
        counter = first_row // 2 + tl.arange(0, R // 2)
    w0, w1, w2, w3 = philox_words(counter[:, None], group[None, :], plane, site, key0, key1)
    w0, w1 = _dropped_bits(w0, THRESHOLD), _dropped_bits(w1, THRESHOLD)
    w2, w3 = _dropped_bits(w2, THRESHOLD), _dropped_bits(w3, THRESHOLD)
    if SCATTERED:
        upper = (rows // 8 % 2 == 0)[:, None]
        left, right = tl.where(upper, w0, w2), tl.where(upper, w1, w3)
        left, right = tl.reshape(left, shape), tl.reshape(right, shape)
    else:
        upper = tl.reshape(tl.arange(0, 2), (1, 2, 1, 1, 1, 1)) == 0
        left = tl.where(upper, tl.reshape(w0, shape), tl.reshape(w2, shape))
        right = tl.where(upper, tl.reshape(w1, shape), tl.reshape(w3, shape))
    if COLUMNS == 32:
        word = tl.where(first_column % 64 == 0, left, right)
        word = tl.broadcast_to(word, (R // (8 * HALVES), HALVES, 8, 1, 4, 8))
    else:
        octet = tl.reshape(tl.arange(0, 8), (1, 1, 1, 1, 8, 1))
        word = tl.where(octet < 4, left, right)
    return tl.reshape(word, (R, COLUMNS))


@triton.jit
def drop_scores(
    p,  # (R, COLUMNS)
    dropped,  # of `dropped_scores`
    PAIRS: tl.constexpr,  # p has 16 bits, and this is not the interpreter
):
    """p, zero where dropped. Two elements at once: `prmt` makes of a sign bit each a mask of 16
    bits, `lop3` applies them (forward, 128 x 128: 1,446 to issue against 1,734)."""
    byte = (tl.arange(0, p.shape[1]) // 8 % 4)[None, :]
    if PAIRS:
        # A pair's selectors are constants, and so is what is made of them.
        select = tl.broadcast_to(0xCC88 + byte * 0x1111, p.shape)
        return tl.inline_asm_elementwise(
            _DROP_PAIR, "=r,r,r,r,r,r", [p, dropped, select], p.dtype, is_pure=True, pack=2
        )
    bit = tl.full((), 0x80, tl.uint32) << (byte * 8).to(tl.uint32)
    return tl.where((dropped & bit) == 0, p, 0.0)
