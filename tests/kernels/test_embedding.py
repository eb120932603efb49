"""Embeddings, LayerNorm and dropout: values and every gradient against the reference in fp64."""

import pytest
import torch
from torch import Tensor

from fastbert_kernels import embedding, reference
from fastbert_kernels.embedding import embed_layer_norm

NAMES = ("word", "token_type", "position", "weight", "beta")
PAD, EPS = 3, 1e-12
SEED = torch.tensor([2**40 + 7, 5, 2])


def inputs(
    T: int, V: int, P: int, H: int, dtype: torch.dtype, types: int = 2
) -> tuple[list[Tensor], list[Tensor]]:
    ids = torch.randint(V, (T,))
    ids[torch.rand(T) < 0.3] = V - 1  # one word is frequent: its tokens fill several chunks
    ids[::5] = PAD
    positions = torch.arange(T) % P
    tables = [torch.randn(rows, H) for rows in (V, types, P)]
    tables += [torch.rand(H) + 0.5, torch.randn(H)]
    segments = torch.randint(types, (T,))
    return [ids, segments, positions], [t.to(dtype).requires_grad_() for t in tables]


def values_and_gradients(out: Tensor, tables: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, tables, dy.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("T", "V", "P", "H", "types", "p"),
    [
        (1, 9, 4, 128, 2, 0.1),
        (63, 7, 64, 384, 1, 0.0),
        (35, 40, 30, 768, 2, 0.1),
        (7, 9, 4, 1024, 2, 0.1),
        (150, 5, 2, 136, 2, 0.3),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_against_double_precision(
    dtype: torch.dtype, T: int, V: int, P: int, H: int, types: int, p: float
) -> None:
    ids, tables = inputs(T, V, P, H, dtype, types)
    extra = (PAD, EPS, p, SEED, 1)
    dy = torch.randn(T, H).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in tables]
    want = values_and_gradients(reference.embed_layer_norm(*ids, *wide, *extra), wide, dy)
    plain = values_and_gradients(reference.embed_layer_norm(*ids, *tables, *extra), tables, dy)
    found = values_and_gradients(embed_layer_norm(*ids, *tables, *extra), tables, dy)
    for name, a, b, c in zip(("y", *NAMES), found, plain, want, strict=True):
        assert a.shape == c.shape and a.dtype == dtype
        # One rounding of the largest value on top: dz is stored in the tables' dtype.
        limit = 2 * (b - c).abs().max() + torch.finfo(dtype).eps * c.abs().max()
        assert (a - c).abs().max() <= limit, name
    assert torch.equal(found[0] == 0, want[0] == 0)  # dropped bit for bit
    assert not found[1][PAD].any()


@pytest.mark.usefixtures("poisoned")
def test_keys_at_the_edges_of_chunks() -> None:
    # Runs that end at, begin at, or span boundaries of chunks (64 sorted keys), up to 18 of them.
    runs = [64, 1, 62, 65, 1, 1, 126, 1100, 3]
    ids = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor(runs))
    ids = ids[torch.randperm(len(ids))]
    zeros = torch.zeros_like(ids)
    tables = [torch.randn(rows, 8) for rows in (len(runs), 1, 1)]
    tables = [t.requires_grad_() for t in (*tables, torch.rand(8), torch.randn(8))]
    arguments = (ids, zeros, zeros, *tables, -1, 1e-5, 0.0, SEED, 0)
    dy = torch.randn(len(ids), 8)
    found = values_and_gradients(embed_layer_norm(*arguments), tables, dy)
    want = values_and_gradients(reference.embed_layer_norm(*arguments), tables, dy)
    for name, a, b in zip(("y", *NAMES), found, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), name


def test_ids_outside_the_tables_give_nan() -> None:
    ids, tables = inputs(6, 9, 4, 16, torch.float32)
    for which, value in ((0, 9), (0, -1), (1, 2), (2, 4)):
        wrong = [t.clone() for t in ids]
        wrong[which][2] = value
        out = embed_layer_norm(*wrong, *tables, PAD, EPS, 0.0, SEED, 0)
        assert out[2].isnan().all() and not out[[0, 1, 3, 4, 5]].isnan().any()


def test_opcheck() -> None:
    ids, tables = inputs(10, 9, 4, 16, torch.float32)
    torch.library.opcheck(embedding._forward, (*ids, *tables, PAD, EPS, 0.1, SEED, 1))


def test_compiles_without_a_graph_break() -> None:
    ids, tables = inputs(10, 9, 4, 16, torch.float32)
    compiled = torch.compile(embed_layer_norm, backend="aot_eager", fullgraph=True)
    extra, dy = (PAD, EPS, 0.1, SEED, 1), torch.randn(10, 16)
    found = values_and_gradients(compiled(*ids, *tables, *extra), tables, dy)
    want = values_and_gradients(embed_layer_norm(*ids, *tables, *extra), tables, dy)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


def test_bad_arguments() -> None:
    ids, tables = inputs(6, 9, 4, 16, torch.float32)
    extra = (PAD, EPS, 0.1, SEED, 1)
    names = ("input_ids", "token_type_ids", "position_ids", *NAMES)
    good = dict(zip(names, (*ids, *tables), strict=True))
    bad = {
        "token_type_ids is torch.int32": {"token_type_ids": ids[1].int()},
        "position_ids has shape": {"position_ids": ids[2][:-1]},
        "token_type needs": {"token_type": torch.randn(3, 16)},
        "position is torch.float16": {"position": tables[2].half()},
        "weight has shape": {"weight": torch.randn(8)},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=f"embed_layer_norm: {message}"):
            embed_layer_norm(*(good | change).values(), *extra)
    with pytest.raises(ValueError, match="seed"):
        embed_layer_norm(*good.values(), PAD, EPS, 0.1, SEED[:2], 1)
