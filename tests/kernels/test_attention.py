"""The attention kernels under the interpreter, against the reference upcast to fp64."""

import pytest
import torch
from torch import Tensor

from fastbert_kernels import attention as attention_module
from fastbert_kernels import attention_config, attention_flash, reference
from fastbert_kernels.attention import attention, attention_at, compile_cases
from fastbert_kernels.attention_config import backward_path, choose_backend
from fastbert_kernels.philox import keep_threshold, score_mask

SEED = torch.tensor([2**40 + 12345, 7, 3])


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def inputs(T: int, A: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(T, 3, A, D).to(dtype), torch.randn(T, A, D).to(dtype)


def both_ways(op, qkv: Tensor, dout: Tensor, *rest) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    qkv = qkv.clone().requires_grad_()
    out = op(qkv, *rest)
    (dqkv,) = torch.autograd.grad(out, qkv, dout.to(out.dtype))
    return out.detach(), dqkv


def assert_near(found: Tensor, torch_own: Tensor, want: Tensor, times: int = 2) -> None:
    """Not worse than twice PyTorch's own error in the same dtype."""
    error, allowed = ((x.double() - want).abs().max() for x in (found, torch_own))
    assert error <= times * allowed + 1e-6, f"{error:.2e} against {allowed:.2e}"


def gradients(op, tensors: list[Tensor], dout: Tensor, *rest) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Output, the gradients of `tensors`, and that of the bias they contain."""
    bias = torch.zeros(3, *tensors[0].shape[-2:], dtype=tensors[0].dtype).requires_grad_()
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    out = op(*tensors, *rest, qkv_bias=bias)
    return [out.detach(), *torch.autograd.grad(out, (*tensors, bias), dout.to(out.dtype))]


def agree(op, oracle, tensors: list[Tensor], dout: Tensor, *rest) -> list[Tensor]:  # type: ignore[no-untyped-def]
    found = gradients(op, tensors, dout, *rest)
    torch_own = gradients(oracle, tensors, dout, *rest)
    want = gradients(oracle, [tensor.double() for tensor in tensors], dout, *rest)
    # What errors the rows of dqkv have in common adds up in the bias's gradient.
    for f, o, w, times in zip(found, torch_own, want, [2] * len(tensors) + [2, 4], strict=True):
        assert f.dtype == tensors[0].dtype
        assert_near(f, o, w, times)
    assert not found[-1][1].any()  # of the keys' bias, exactly
    return found


def compare(
    lengths: list[int], S: int, A: int, D: int, p: float, dtype: torch.dtype, unused: int = 0
) -> None:
    T = sum(lengths) + unused
    qkv, dout = inputs(T, A, D, dtype)
    rest = (bounds(lengths), S, p, SEED, 1)
    for found in agree(attention, reference.attention, [qkv], dout, *rest)[:-1]:
        assert not found[T - unused :].any()


def compare_some(
    lengths: list[int], S: int, A: int, D: int, p: float, dtype: torch.dtype, asked: list[int]
) -> None:
    """`asked` tokens of each sequence ask; one token belongs to none, two queries are unused."""
    T, unused = sum(lengths) + 1, 2
    starts = bounds(lengths)[:-1].tolist()
    chosen = [
        start + torch.randperm(length)[:count].sort().values
        for start, length, count in zip(starts, lengths, asked, strict=True)
    ]
    positions = torch.cat([*chosen, torch.full((unused,), T)])
    qkv, dout = inputs(T, A, D, dtype)
    q, kv = qkv[positions.clamp(max=T - 1), 0], qkv[:, 1:].contiguous()
    dout = dout[positions.clamp(max=T - 1)]
    index = (positions, bounds(asked), bounds(lengths))
    rest = (*index, S, p, SEED, 1)
    out, dq, dkv, _ = agree(attention_at, reference.attention_at, [q, kv], dout, *rest)
    assert not out[-unused:].any() and not dq[-unused:].any() and not dkv[-1].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_one_tile_a_head(D: int, p: float) -> None:
    assert backward_path(128, D, torch.float16, 90) == "tile"
    compare([7, 1, 63, 64, 65, 127, 0, 0], 128, 1, D, p, torch.float16, unused=5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("lengths", "S"), [([129, 1, 512], 512), ([130, 130], 130)])
def test_several_tiles_a_head(lengths: list[int], S: int) -> None:
    assert backward_path(S, 64, torch.float16, 90) == "head"
    compare(lengths, S, 1, 64, 0.1, torch.float16)


@pytest.mark.usefixtures("poisoned")
def test_long_sequences() -> None:
    assert backward_path(600, 64, torch.float16, 90) == "split"
    compare([129, 0, 530], 600, 1, 64, 0.1, torch.float16, unused=200)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("lengths", "S", "D", "p"),
    [
        ([33, 1, 64, 0], 70, 32, 0.1),
        ([63, 7, 0], 63, 64, 0.1),
        ([65, 1], 128, 128, 0.1),
        ([127, 129], 129, 64, 0.0),
        ([321], 321, 32, 0.0),
    ],
)
def test_single_precision(lengths: list[int], S: int, D: int, p: float) -> None:
    compare(lengths, S, 1, D, p, torch.float32, unused=1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("lengths", "asked", "S", "D", "dtype"),
    [
        ([7, 1, 100, 128, 0, 33], [2, 1, 0, 128, 0, 20], 128, 32, torch.float16),
        ([129, 40, 3], [70, 0, 1], 200, 64, torch.float16),
        ([300, 5], [65, 5], 600, 64, torch.float16),
        ([65, 20], [40, 3], 80, 32, torch.float32),
    ],
)
def test_some_tokens_ask(
    lengths: list[int], asked: list[int], S: int, D: int, dtype: torch.dtype
) -> None:
    compare_some(lengths, S, 2, D, 0.1, dtype, asked)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("D", [32, 64, 128])
def test_tiles_of_sm_80(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "capability", lambda device: 80)
    compare([65, 129, 7], 130, 1, D, 0.1, torch.float16, unused=1)


@pytest.mark.parametrize(
    ("p", "length", "A", "dtype"),
    [(p, 200, 2, torch.float16) for p in (0.1, 0.5)] + [(0.1, 130, 1, torch.float32)],
)
def test_dropout_draws_the_bits_of_the_reference(
    p: float, length: int, A: int, dtype: torch.dtype
) -> None:
    """With equal scores and v rows that are unit vectors, the output shows which columns stayed."""
    D = 128
    kept = []
    for first in range(0, length, D):
        qkv = torch.zeros(2 * length, 3, A, D, dtype=dtype)
        for sequence in range(2):
            here = torch.arange(first, min(first + D, length))
            qkv[sequence * length + here, 2, :, here - first] = 1.0
        out = attention(qkv, bounds([length, length]), length, p, SEED, 2)
        kept.append(out.view(2, length, A, D).transpose(1, 2) > 0)
    found = torch.cat(kept, dim=-1)[..., :length]
    want = score_mask((2, A, length, length), keep_threshold(p), SEED, SEED[2] * 4 + 2)
    assert torch.equal(found, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the others compute with NaN
@pytest.mark.parametrize(("S", "lengths"), [(128, [50, 70, 3]), (300, [129, 150, 3])])
def test_a_sequence_reads_and_writes_its_own_rows_only(S: int, lengths: list[int]) -> None:
    cu_seqlens = bounds(lengths)
    qkv, dout = inputs(sum(lengths), 1, 32, torch.float16)
    clean = both_ways(attention, qkv, dout, cu_seqlens, S, 0.1, SEED, 0)
    middle = slice(int(cu_seqlens[1]), int(cu_seqlens[2]))
    others = torch.ones(len(qkv), dtype=torch.bool)
    others[middle] = False
    qkv[others], dout[others] = torch.nan, torch.nan
    poisoned = both_ways(attention, qkv, dout, cu_seqlens, S, 0.1, SEED, 0)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a[middle], b[middle])


@pytest.mark.parametrize("S", [128, 200])
def test_scores_far_from_zero(S: int) -> None:
    """All of a row's scores below -2^7: columns beyond the sequence must not overflow."""
    qkv, dout = inputs(70, 1, 64, torch.float16)
    qkv[:, 0], qkv[:, 1] = qkv[:, 0] / 8 + 6.0, qkv[:, 1] / 8 - 6.0
    out, dqkv = both_ways(attention, qkv, dout, bounds([70]), S, 0.1, SEED, 0)
    want, dwant = both_ways(reference.attention, qkv.double(), dout, bounds([70]), S, 0.1, SEED, 0)
    assert torch.allclose(out.double(), want, atol=2e-2)
    assert torch.allclose(dqkv.double(), dwant, atol=3e-2)


def test_dropout_that_keeps_every_value_is_none() -> None:
    qkv, _ = inputs(40, 1, 32, torch.float16)
    rest = (bounds([40]), 64)
    assert torch.equal(attention(qkv, *rest, 0.001, SEED, 0), attention(qkv, *rest, 0.0, SEED, 0))


def test_registration() -> None:
    qkv, _ = inputs(20, 1, 32, torch.float32)
    bias = torch.zeros(96)
    rest = (bounds([12, 8]), 12, 230, SEED, 0, "ieee")
    ops = torch.ops.fastbert
    torch.library.opcheck(
        ops.attention.default, (qkv.requires_grad_(), bias.requires_grad_(), *rest)
    )
    with torch.no_grad():
        saved = (qkv.detach(), bias.detach(), *ops.attention(qkv, bias, *rest))
    torch.library.opcheck(ops.attention_backward.default, (saved[2], *saved, *rest))
    q, kv = qkv.detach()[:3, 0].clone().requires_grad_(), qkv.detach()[:, 1:].clone()
    at = (torch.tensor([0, 5, 14]), bounds([2, 1]))
    kv.requires_grad_()
    torch.library.opcheck(ops.attention_at.default, (q, kv, bias, *at, *rest))
    with torch.no_grad():
        found = ops.attention_at(q, kv, bias, *at, *rest)
    saved = (q.detach(), kv.detach(), bias.detach(), *found)
    torch.library.opcheck(ops.attention_at_backward.default, (saved[3], *saved, *at, *rest))


def test_compiles_into_one_graph() -> None:
    qkv, dout = inputs(20, 2, 32, torch.float32)

    def op(qkv: Tensor) -> Tensor:
        return attention(qkv, bounds([12, 8]), 12, 0.1, SEED, 0) * 2

    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for eager, traced in zip(both_ways(op, qkv, dout), both_ways(compiled, qkv, dout), strict=True):
        assert torch.equal(eager, traced)


GOOD = {
    "qkv": torch.zeros(9, 3, 2, 32),
    "cu_seqlens": bounds([9]),
    "max_seqlen": 9,
    "dropout_p": 0.1,
    "seed": SEED,
    "stream": 0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(9, 2, 2, 32)}, r"qkv has shape \(9, 2, 2, 32\)"),
        ({"qkv": torch.zeros(9, 3, 2, 48)}, "head size 48"),
        ({"qkv": torch.zeros(0, 3, 2, 32)}, "no tokens or no heads"),
        ({"qkv_bias": torch.zeros(64)}, "qkv_bias has 64 elements, expected 192"),
        ({"seed": SEED[:2]}, "seed has shape"),
        ({"stream": 4}, "stream = 4"),
        ({"dropout_p": 1.0}, "dropout_p = 1.0"),
        ({"max_seqlen": 0}, "max_seqlen = 0"),
        ({"precision": "tf19"}, "precision = 'tf19'"),
        ({"backend": "cudnn"}, "backend = 'cudnn'"),
        ({"backend": "torch"}, "takes fp16 or bf16"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**(GOOD | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv": torch.zeros(9, 3, 2, 32)}, r"kv has shape \(9, 3, 2, 32\)"),
        ({"positions": torch.zeros(3)}, r"positions has shape \(3,\)"),
        ({"cu_queries": bounds([1, 1])}, r"cu_queries has shape \(3,\)"),
        ({"max_seqlen": 0}, "attention_at: max_seqlen = 0"),
    ],
)
def test_wrong_arguments_where_some_ask(change: dict[str, object], message: str) -> None:
    good = {key: value for key, value in GOOD.items() if key != "qkv"} | {
        "q": torch.zeros(2, 2, 32), "kv": torch.zeros(9, 2, 2, 32),
        "positions": torch.tensor([0, 3]), "cu_queries": bounds([2]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        attention_at(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("check", [False, True])
def test_sequences_are_read_when_asked(check: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once by `check`, whatever the device, and once more because these tensors are on a CPU."""
    read: list[object] = []
    monkeypatch.setattr(attention_module, "sequence_lengths", lambda *args: read.append(args))
    attention(**GOOD, check=check)  # type: ignore[arg-type]
    assert len(read) == 1 + check


def test_choice_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(backend: str, device_type: str = "cuda", p: float = 0.0, S: int = 512) -> str:
        return choose_backend(backend, torch.bfloat16, device_type, p, 90, 64, S)

    assert choose("auto") == "triton" and choose("torch", p=0.1) == "torch"
    monkeypatch.setattr(attention_config, "FASTEST", {(90, 64, 128): "torch"})
    assert choose("auto", S=128) == "torch" and choose("auto", S=129) == "triton"
    with pytest.raises(ValueError, match="'fa3' has no dropout: dropout_p must be 0"):
        choose("fa3", p=0.1)
    monkeypatch.setattr(attention_config, "flash_implementations", lambda: ["FA4"])
    assert choose("fa4") == "fa4"
    with pytest.raises(ValueError, match=r"'fa3', but torch .* does not offer it"):
        choose("fa3")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        choose("torch", "cpu")


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_flash_attention_of_torch_takes_our_arguments(p: float) -> None:
    """Shapes only: nothing computes without a GPU."""
    qkv = torch.empty(50, 3, 2, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    out = attention_flash.attention(qkv, cu_seqlens, 32, p, "torch")
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert out.shape == (50, 2, 64)
    assert dqkv.shape == qkv.shape
    q, kv = qkv[:7, 0], qkv[:, 1:]
    some = attention_flash.attention_at(q, kv, cu_seqlens, cu_seqlens, 32, p, "torch")
    assert some.shape == q.shape


def test_every_configuration_is_reported() -> None:
    cases = compile_cases()
    assert len({(case.name, case.configuration, case.archs) for case in cases}) == len(cases)
    shipped = sum(len(t) for table in attention_config.TABLES.values() for t in table.values())
    assert len(cases) >= shipped
