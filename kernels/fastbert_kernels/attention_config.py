"""Which attention runs: path by length, tiles by head size and architecture, backend by a table.

All choices are plain functions of what the host knows, so that a run's choice is always the same.
None has been timed on a GPU yet: tiles were chosen by the compiled code, so that nothing spills
with Triton 3.6, 3.7 and 3.9, and then for the fewest instructions an element.
"""

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.attention

HEAD_SIZES = (32, 64, 128)
ONE_TILE = 128  # longest sequence that one tile of the "tile" path holds
WHOLE_HEAD = 512  # longest sequence of which one program makes all gradients of a head
BACKENDS = ("auto", "triton", "torch", "flash_attn", "fa3", "fa4")
# (compute capability, D, longest sequence) -> what `auto` takes up to that length, as measured by
# `python -m fastbert_bench.gpu --stage kernels`. Empty: nothing has been measured yet.
FASTEST: dict[tuple[int, int, int], str] = {}


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut: rows and columns of a tile, warps of a program, pipelining depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


Table = dict[str, dict[tuple[int, bool], Tiles]]
_Row = tuple[int, int, int, int]


def _by_size(
    half: tuple[_Row, ...], single: tuple[_Row, ...] = ()
) -> dict[tuple[int, bool], Tiles]:
    """(D, half precision?) -> tiles, from a row of numbers for each of the head sizes."""
    kinds = ((half, True), (single, False))
    return {
        (D, h): Tiles(*row) for rows, h in kinds for D, row in zip(HEAD_SIZES, rows, strict=False)
    }


# "short" is a forward that holds all columns in one tile. "tile" and "head" are whole backwards of
# short sequences: where one has no row for a head size, it would spill registers or lose wgmma.
# "columns" and "query" are the two halves of the backward for any length.
TABLES: dict[int, Table] = {
    90: {
        "forward": _by_size(
            ((64, 128, 4, 2), (64, 128, 4, 2), (128, 64, 8, 2)),
            ((32, 32, 8, 1), (64, 32, 8, 1), (16, 32, 16, 1)),
        ),
        "short": _by_size(((128, 128, 8, 2), (128, 128, 8, 2))),
        "tile": _by_size(((128, 128, 8, 1), (128, 128, 8, 1))),
        "head": _by_size(((64, 64, 4, 1), (64, 64, 4, 1))),
        "columns": _by_size(
            ((64, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 1)),
            ((64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
        ),
        "query": _by_size(
            ((64, 128, 4, 2), (64, 128, 4, 2), (128, 64, 8, 2)),
            ((32, 32, 4, 1), (64, 32, 8, 1), (32, 32, 16, 1)),
        ),
    },
    80: {
        "forward": _by_size(
            ((64, 128, 4, 2), (64, 128, 4, 2), (64, 32, 4, 2)),
            ((32, 32, 8, 1), (16, 32, 8, 1), (32, 32, 16, 1)),
        ),
        "short": _by_size(((128, 128, 8, 2), (128, 128, 8, 2))),
        "tile": _by_size(((128, 128, 8, 1),)),
        "head": _by_size(((64, 64, 4, 1), (64, 64, 4, 1))),
        "columns": _by_size(
            ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 8, 1)),
            ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
        ),
        "query": _by_size(
            ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 1)),
            ((16, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        ),
    },
}


def table_for(capability: int) -> Table:
    """Tiles by compute capability (90 for 9.0): sm_90's from there on, sm_80's below."""
    return TABLES[90 if capability >= 90 else 80]


def backward_path(max_seqlen: int, D: int, dtype: torch.dtype, capability: int) -> str:
    """ "tile", "head" or "split": how far one program of the backward reaches."""
    table, key = table_for(capability), (D, dtype != torch.float32)
    if max_seqlen <= ONE_TILE and key in table["tile"]:
        return "tile"
    if max_seqlen <= WHOLE_HEAD and key in table["head"]:
        return "head"
    return "split"


def forward_kernel(max_seqlen: int, D: int, dtype: torch.dtype, capability: int) -> str:
    """ "short" or "forward"."""
    tiles = table_for(capability)["short"].get((D, dtype != torch.float32))
    fits = tiles is not None and max_seqlen <= min(tiles.block_m, tiles.block_n)
    return "short" if fits else "forward"


def choose_tiles(kernel: str, D: int, dtype: torch.dtype, capability: int) -> Tiles:
    """Tiles of "forward", "short", "tile", "head", "columns" or "query"."""
    return table_for(capability)[kernel][D, dtype != torch.float32]


def choose_backend(
    backend: str,  # one of BACKENDS
    dtype: torch.dtype,
    device_type: str,
    dropout_p: float,
    capability: int,
    D: int,
    max_seqlen: int,
) -> str:
    """Which implementation serves a call.

    | asked for | taken |
    |---|---|
    | auto | what `FASTEST` says; triton where it says nothing |
    | triton | our kernels: alone deterministic, and alone with the reference's dropout bits |
    | torch | the FlashAttention 2 that PyTorch carries; fp16 or bf16 on a GPU, as all below |
    | flash_attn | the package of that name, FlashAttention 2 |
    | fa3, fa4 | FlashAttention 3 or 4 through PyTorch, where installed; without dropout |

    Raises:
        ValueError: an unknown backend, or one that cannot serve this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention: backend = {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        bounds = [S for cap, d, S in FASTEST if (cap, d) == (capability, D) and S >= max_seqlen]
        backend = FASTEST[capability, D, min(bounds)] if bounds else "triton"
    if backend == "triton":
        return backend
    asked = f"attention: backend = {backend!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{asked} takes fp16 or bf16, not {dtype}")
    if device_type != "cuda":
        raise ValueError(f"{asked} needs CUDA tensors")
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(f"{asked}, but that package is not installed")
    if backend in ("fa3", "fa4"):
        if dropout_p > 0:
            raise ValueError(f"{asked} has no dropout: dropout_p must be 0, or use 'torch'")
        if backend.upper() not in flash_implementations():
            raise ValueError(f"{asked}, but torch {torch.__version__} does not offer it")
    return backend


def flash_implementations() -> list[str]:
    """The FlashAttentions beyond 2 that PyTorch can be told to use: of ["FA3", "FA4"]."""
    offered = getattr(torch.nn.attention, "list_flash_attention_impls", None)
    return [name for name in ("FA3", "FA4") if name in offered()] if offered else []
