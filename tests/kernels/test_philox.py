"""The generator against its published vectors, its masks against what chance allows."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastbert_kernels.philox import ROUNDS, keep_mask, keep_threshold, philox_4x32, score_mask
from fastbert_kernels.reference import dropout

ONES = 0xFFFFFFFF

# Rounds, counter, key, words: kat_vectors of https://github.com/DEShawResearch/random123.
KNOWN = [
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
    (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
     "5f6fb709 0d893f64 4f121f81 4f730a48"),
]  # fmt: skip


def words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN)
def test_known_answers(rounds: int, counter: str, key: str, expected: str) -> None:
    found = philox_4x32(words(counter), words(key), rounds)  # type: ignore[arg-type]
    assert " ".join(f"{int(word):08x}" for word in found) == expected


def philox_in_python(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Salmon et al. 2011, section 3.3, in integers that cannot overflow."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        hi0, lo0 = divmod(0xD2511F53 * c[0], 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [hi1 ^ c[1] ^ k[0], lo1, hi0 ^ c[3] ^ k[1], lo0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_any_counter_and_key() -> None:
    for _ in range(50):
        numbers = torch.randint(0, 2**32, (6,)).tolist()
        tensors = [torch.tensor(number) for number in numbers]
        found = philox_4x32(tuple(tensors[:4]), tuple(tensors[4:]))  # type: ignore[arg-type]
        assert [int(word) for word in found] == philox_in_python(numbers[:4], numbers[4:], 7)


def test_counters_broadcast() -> None:
    a, b = torch.arange(3)[:, None], torch.arange(5)
    zero = torch.tensor(0)
    found = philox_4x32((a, b, zero, zero), (zero, zero))
    assert all(word.shape == (3, 5) for word in found)
    assert [int(word[2, 4]) for word in found] == philox_in_python([2, 4, 0, 0], [0, 0], 7)


def seed(run: int = 1, step: int = 0, layer: int = 0) -> Tensor:
    return torch.tensor([run, step, layer])


def scores(
    shape: tuple[int, ...], p: float, seed: Tensor, stream: int
) -> Tensor:  # keep_mask's signature
    return score_mask(shape, keep_threshold(p), seed, seed[2] * 4 + stream)


both = pytest.mark.parametrize("mask_of", [keep_mask, scores])


def test_a_mask_of_scores_by_its_definition() -> None:
    run, step, layer, stream = 2**40 + 12345, 7, 3, 2
    mask = scores((2, 3, 37, 150), 0.3, seed(run, step, layer), stream)
    key = [(run ^ (run >> 32)) % 2**32, step]
    for n, a, row, column in itertools.product(range(2), range(3), range(37), range(0, 150, 7)):
        counter = [row // 16 * 8 + row % 8, column // 64 * 8 + column % 8, n * 3 + a]
        numbers = philox_in_python([*counter, 4 * layer + stream], key, ROUNDS)
        byte = row // 8 % 2 * 8 + column % 64 // 8
        value = numbers[byte // 4] >> (8 * (byte % 4)) & 0xFF
        assert bool(mask[n, a, row, column]) == (value < round(256 * 0.7))


def run_ptx(text: str, registers: dict[str, int]) -> int:
    """$0 of a few PTX instructions on 32 bits (PTX ISA, sections "prmt" and "lop3")."""
    values = dict(registers)
    for line in text.strip("{} \n").split(";"):
        opcode, *operands = line.replace(",", " ").split() or [""]
        if not opcode or opcode == ".reg":
            continue
        a, b, *rest = (values[one] if one in values else int(one, 0) for one in operands[1:])
        if opcode == "prmt.b32":
            data = (b << 32 | a).to_bytes(8, "little")
            found = 0
            for i in range(4):
                select = rest[0] >> 4 * i & 15
                byte = data[select & 7]
                found |= ((byte >> 7) * 0xFF if select & 8 else byte) << 8 * i
        elif opcode == "lop3.b32":
            found = sum(
                (rest[1] >> (a >> i & 1) * 4 + (b >> i & 1) * 2 + (rest[0] >> i & 1) & 1) << i
                for i in range(32)
            )
        else:
            found = {"and.b32": a & b, "or.b32": a | b}[opcode]
        values[operands[0]] = found
    return values["$0"]


def test_a_pair_is_masked_as_its_elements_are() -> None:
    """What the interpreter cannot run: two elements of 16 bits, of any two bytes of two words."""
    from fastbert_kernels.philox_triton import _DROP_PAIR

    for low, high in itertools.product(range(4), range(4)):
        for words in torch.randint(0, 2**32, (20, 2)).tolist():
            pair, junk = 0x3F8040A1, 0x12340000  # above 16 bits a selector says nothing
            inputs = [pair, *words, *(junk | 0xCC88 + byte * 0x1111 for byte in (low, high))]
            found = run_ptx(_DROP_PAIR.value, {f"${i}": n for i, n in enumerate(inputs, 1)})
            chosen = zip(words, (low, high), strict=True)
            drops = [word >> 8 * byte + 7 & 1 for word, byte in chosen]
            kept = (0 if drops[0] else 0xFFFF) | (0 if drops[1] else 0xFFFF0000)
            assert found == pair & kept


def test_a_mask_by_its_definition() -> None:
    run, step, layer, stream, p = 2**40 + 12345, 7, 3, 2, 0.3
    mask = keep_mask((2, 3, 5, 300), p, seed(run, step, layer), stream)
    key = [(run ^ (run >> 32)) % 2**32, step]
    for n, a, row, column in itertools.product(range(2), range(3), range(5), range(0, 300, 7)):
        tile, c = divmod(column, 128)
        group, byte = tile * 8 + c % 8, c // 8
        numbers = philox_in_python([row, group, n * 3 + a, 4 * layer + stream], key, ROUNDS)
        value = numbers[byte // 4] >> (8 * (byte % 4)) & 0xFF
        assert bool(mask[n, a, row, column]) == (value < round(256 * 0.7))


@both
def test_a_bit_does_not_know_the_extent_of_its_tensor(mask_of) -> None:  # type: ignore[no-untyped-def]
    large = mask_of((6, 40, 400), 0.5, seed(), 1)
    for planes, rows, columns in [(1, 1, 1), (2, 7, 100), (6, 40, 128), (3, 40, 129), (5, 1, 399)]:
        small = mask_of((planes, rows, columns), 0.5, seed(), 1)
        assert small.shape == (planes, rows, columns)
        assert torch.equal(small, large[:planes, :rows, :columns])
    assert torch.equal(mask_of((40, 400), 0.5, seed(), 1), large[0])
    assert torch.equal(mask_of((2, 3, 40, 400), 0.5, seed(), 1).view(6, 40, 400), large)


SHAPE = (4, 64, 512)
SIZE = math.prod(SHAPE)


@pytest.mark.parametrize("p", [0.004, 0.1, 0.15, 0.5, 0.9])
@both
def test_keep_rate(p: float, mask_of) -> None:  # type: ignore[no-untyped-def]
    keep = keep_threshold(p) / 256
    assert abs(keep - (1 - p)) <= 1 / 512
    error = math.sqrt(keep * (1 - keep))
    mask = mask_of(SHAPE, p, seed(), 0).double()
    assert abs(mask.mean() - keep) < 4 * error / math.sqrt(SIZE)
    for dim in range(3):  # every plane, row and column by itself; 5 errors, as there are hundreds
        others = [d for d in range(3) if d != dim]
        means = mask.mean(others)
        count = SIZE // SHAPE[dim]
        assert (means - keep).abs().max() < 5 * error / math.sqrt(count)


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors of what independent bits would give."""
    stacked = torch.stack((a.flatten(), b.flatten())).double()
    return float(torch.corrcoef(stacked)[0, 1].abs()) * math.sqrt(a.numel())


@both
def test_different_sites_steps_and_seeds_are_independent(mask_of) -> None:  # type: ignore[no-untyped-def]
    masks = {
        "first": mask_of(SHAPE, 0.5, seed(), 0),
        "stream 1": mask_of(SHAPE, 0.5, seed(), 1),
        "stream 3": mask_of(SHAPE, 0.5, seed(), 3),
        "layer 1": mask_of(SHAPE, 0.5, seed(layer=1), 0),
        "layer 2": mask_of(SHAPE, 0.5, seed(layer=2), 0),
        "step 1": mask_of(SHAPE, 0.5, seed(step=1), 0),
        "step 10^6": mask_of(SHAPE, 0.5, seed(step=10**6), 0),
        "seed 2": mask_of(SHAPE, 0.5, seed(run=2), 0),
        "seed 2^34": mask_of(SHAPE, 0.5, seed(run=2**34), 1),
        "seed 2^63 - 1": mask_of(SHAPE, 0.5, seed(run=2**63 - 1), 0),
    }
    for (name, a), (other, b) in itertools.combinations(masks.items(), 2):
        assert not torch.equal(a, b)
        assert correlation(a, b) < 4.5, (name, other)  # 45 pairs


@both
def test_neighbours_are_independent(mask_of) -> None:  # type: ignore[no-untyped-def]
    mask = mask_of(SHAPE, 0.5, seed(), 0)
    for shift in (1, 2, 7, 8, 16, 32, 64, 128):
        assert correlation(mask[..., :-shift], mask[..., shift:]) < 4.5, f"columns {shift} apart"
    for shift in (1, 2, 8, 16, 32):
        assert correlation(mask[:, :-shift], mask[:, shift:]) < 4.5, f"rows {shift} apart"
    for plane, other in itertools.combinations(mask, 2):
        assert correlation(plane, other) < 4.5


def test_same_arguments_same_bits() -> None:
    assert torch.equal(keep_mask(SHAPE, 0.3, seed(), 0), keep_mask(SHAPE, 0.3, seed(), 0))
    # What a lower probability drops, a higher one drops as well: one byte decides.
    rare, often = keep_mask(SHAPE, 0.1, seed(), 0), keep_mask(SHAPE, 0.6, seed(), 0)
    assert not (often & ~rare).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_is_unbiased(p: float) -> None:
    x = torch.randn(32, 256, dtype=torch.float64) + 1
    x.requires_grad_()
    steps = 400
    total = torch.zeros_like(x)
    for step in range(steps):
        total += dropout(x, p, seed(step=step), 0)
    (dx,) = torch.autograd.grad(total.sum(), x)
    keep = keep_threshold(p) / 256
    factor = (total / x).detach() / steps  # of each element, over the steps
    error = math.sqrt((1 - keep) / keep)
    assert abs(factor.mean() - 1) < 4 * error / math.sqrt(steps * x.numel())
    assert (factor - 1).abs().max() < 6 * error / math.sqrt(steps)  # 8,192 elements, long tails
    assert torch.allclose(dx / steps, factor)


def test_no_dropout_and_bad_probabilities() -> None:
    x = torch.randn(3, 4)
    assert dropout(x, 0.0, seed(), 0) is x
    assert keep_threshold(0.0) == 256 and keep_threshold(0.998) == 1
    for p in (-0.1, 1.0, 1.5, math.nan, 0.9999):
        with pytest.raises(ValueError, match="dropout_p"):
            keep_threshold(p)
