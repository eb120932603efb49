"""The kernels' dropout bits against `philox.keep_mask`, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from fastbert_kernels.philox import TILE, keep_mask, keep_threshold
from fastbert_kernels.philox_triton import dropout_key, keep_columns


@triton.jit
def _keep_kernel(
    out_ptr,  # (R, TILES * 128) bytes
    seed_ptr,  # (3,) int64
    stream,
    plane,
    first_row,
    first_tile,
    THRESHOLD: tl.constexpr,
    R: tl.constexpr,
    TILES: tl.constexpr,
):  # type: ignore[no-untyped-def]
    row, column = tl.arange(0, R), tl.arange(0, TILES * 128)
    key0, key1, site = dropout_key(seed_ptr, stream)
    keep = keep_columns(first_row + row, first_tile, plane, site, key0, key1, THRESHOLD, TILES)
    tl.store(out_ptr + row[:, None] * (TILES * 128) + column[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.998])
@pytest.mark.parametrize("seed", [[0, 0, 0], [2**62 + 123456789012, 10**6, 23], [-1, 2**31, 1]])
def test_bits_are_those_of_the_reference(seed: list[int], p: float) -> None:
    tensor = torch.tensor(seed)
    for tiles, first_tile, plane, first_row, stream in ((1, 0, 0, 0, 0), (4, 1, 2, 5, 3)):
        out = torch.full((4, tiles * TILE), 7, dtype=torch.int8)
        _keep_kernel[(1,)](
            out, tensor, stream, plane, first_row, first_tile, keep_threshold(p), 4, tiles
        )
        whole = keep_mask((3, first_row + 4, (first_tile + tiles) * TILE), p, tensor, stream)
        assert torch.equal(out, whole[plane, first_row:, first_tile * TILE :].to(torch.int8))
