"""What the compile report compiles: one kernel in one configuration that we ship.

Every op module defines `compile_cases() -> list[CompileCase]`; the report (benchmarks) compiles
each for each architecture and reads registers, spills and tensor-core instructions off the result.

A case is all that the JIT compiles for its constexprs and dtypes. It would make variants of each
integer that is 1 or a multiple of 16 and of each pointer's alignment: eight of a LayerNorm, one
after another inside the first steps. So `do_not_specialize` names what a batch or a layer sets; on
sm_90, in bf16 with dropout, that costs 2.3% more instructions at most (without, 5% in one kernel of
attention). What a model's sizes set stays specialised where 16-byte accesses rest on it (9 accesses
against 66 in `bias_gelu`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration.

    Args:
        name: the kernel's name.
        configuration: what tells this case from the kernel's others, e.g. "bf16 H=768 p=0.1".
        fn: the `triton.jit` function.
        signature: type of each argument that is not a constexpr: "*bf16", "i32", "fp32".
        constexprs: value of each constexpr argument.
        num_warps: warps of a program.
        num_stages: depth of software pipelining.
        needs_wgmma: the dots must be wgmma on Hopper (HGMMA in the machine code).
        divisible_by_16: integer arguments that are multiples of 16 at run time. Pointers are taken
            to be, as torch allocates them. What `do_not_specialize` names is taken to be anything.
        maxnreg: registers that a thread may have; None: as many as the compiler likes.
        archs: the compute capabilities this case is shipped for, 90 for sm_90.
    """

    name: str
    configuration: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    needs_wgmma: bool = False
    divisible_by_16: tuple[str, ...] = ()
    maxnreg: int | None = None
    archs: tuple[int, ...] = (80, 90)


def op_of(kernel: Any) -> str:
    """The module of the op that launches a `triton.jit` function, e.g. "attention": its own, but
    where the op is too long for one file, and its kernels stand beside it (`attention_kernels`)."""
    module: str = kernel.fn.__module__.rpartition(".")[2]  # the interpreter's wrapper has another
    return module.removesuffix("_kernels")
