"""Every kernel of a training step in symbols, committed in launch_list.json.

`python -m fastbert_bench.gpu.launches --list` records it (see `gpu.launches`), a line a
kernel: how often, direction, name, arrays read, arrays written. Sizes are formulas in the letters
of `sizes_of`, so that the list stands for any model and batch; sizes that are a launch's own (its
partial sums) stay as recorded. `read` gives the kernels of one step.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastbert.config import ModelConfig
from fastbert_bench.kernels.costs import value_of

FILE = Path(__file__).with_name("launch_list.json")
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")
ONCE, PER_LAYER = "1", "L - 1"
"""How often a kernel runs: the last layer's are among those that run once."""


class Array(NamedTuple):
    """A tensor that a kernel reads or writes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Kernel(NamedTuple):
    """One kernel of a step: of ours, or what an op of PyTorch's launches on a GPU.

    What is updated in place is among inputs and outputs. Nothing tells which of its pointers a
    kernel of ours writes: outputs are those whose memory is new, or was made by PyTorch in the same
    op (zeros to add to, logits that become their gradient), or that the op declares to mutate.
    """

    name: str
    """Such as aten.addmm or layer_norm._backward_kernel."""
    direction: str
    """"forward", "backward", or "step" for what a step does around them."""
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    launch: Any = None
    """Of our own kernels, where it was recorded: a `fastbert_bench.gpu.launches.Launch`."""

    @property
    def bytes(self) -> int:
        """Each input read once, each output written once, whole: a gather moves less."""
        return sum(array.bytes for array in (*self.inputs, *self.outputs))

    @property
    def product(self) -> tuple[int, int, int] | None:
        """(rows, columns, summands) of a matrix product; None for the rest."""
        if self.name not in PRODUCTS:
            return None
        *rows, columns = self.outputs[0].shape
        return math.prod(rows), columns, self.inputs[-1].shape[-2]

    @property
    def flops(self) -> int:
        """Of a matrix product; 0 for the rest."""
        return 2 * math.prod(self.product or (0,))


def sizes_of(sizes: ModelConfig, T: int, N: int, M: int) -> dict[str, int]:
    """The letters: T tokens in N sequences, M of them masked, R that leave the last layer, L
    layers, H hidden size, F intermediate size, A heads of size D, V vocabulary, W the same in whole
    blocks of 64, X positions, U token types, P parameters in the flat buffer."""
    H, F, V = sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size
    L, A, X = sizes.num_hidden_layers, sizes.num_attention_heads, sizes.max_position_embeddings
    U = sizes.type_vocab_size
    layers = L * (4 * H * H + 2 * H * F + 9 * H + F)
    heads = (H * H + H) + (H * H + 3 * H + V) + (2 * H + 2)
    return {
        "T": T, "N": N, "M": M, "R": M + N, "L": L, "H": H, "F": F, "A": A, "D": H // A,
        "V": V, "W": V + -V % 64, "X": X, "U": U, "P": (V + X + U) * H + 2 * H + layers + heads,
    }  # fmt: skip


# Beside the letters, what a step makes of them: the three products of attention, ids of words and
# positions, a scratch buffer with room for a block of 64 rows beyond every sequence.
_FORMULAS = (
    "2 * T", "T + 1", "N + 1", "2 * H", "3 * H", "V + X", "T + 64 * N", "R + 64 * N",
)  # fmt: skip


def symbols(sizes: Mapping[str, int]) -> dict[int, str]:
    """Size -> its formula; raises ValueError where two have the same."""
    found: dict[int, str] = {}
    for formula in (*sizes, *_FORMULAS):
        if formula in ("L", "U"):  # too small to be told from other numbers
            continue
        value = value_of(formula, sizes)
        if value in found:
            raise ValueError(f"{formula} and {found[value]} are both {value}")
        found[value] = formula
    return found


Row = list[str]
"""How often, direction, name, inputs, outputs: arrays as "bfloat16 T, 3 * H; int64"."""


def row_of(kernel: Kernel, times: str, names: Mapping[int, str]) -> Row:
    """A kernel's line, its sizes by `names`."""

    def told(arrays: Sequence[Array]) -> str:
        return "; ".join(
            f"{str(array.dtype).removeprefix('torch.')} "
            f"{', '.join(names.get(n, str(n)) for n in array.shape)}".strip()
            for array in arrays
        )

    return [times, kernel.direction, kernel.name, told(kernel.inputs), told(kernel.outputs)]


def write(rows: Sequence[Row], path: Path = FILE) -> None:
    """A line a kernel."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


def read(sizes: Mapping[str, int], path: Path = FILE) -> list[tuple[int, Kernel]]:
    """How often each kernel of a step runs, and the kernel.

    Args:
        sizes: as of `sizes_of`.
        path: the file.
    """

    def arrays(text: str) -> tuple[Array, ...]:
        found = []
        for one in filter(None, text.split("; ")):
            dtype, _, shape = one.partition(" ")
            dims = tuple(value_of(size, sizes) for size in shape.split(", ") if size)
            found.append(Array(dims, getattr(torch, dtype)))
        return tuple(found)

    return [
        (value_of(times, sizes), Kernel(name, direction, arrays(inputs), arrays(outputs)))
        for times, direction, name, inputs, outputs in json.loads(path.read_text(encoding="utf-8"))
    ]
