"""What the compile report compiles: one kernel in one configuration that we ship.

Every op module defines `compile_cases() -> list[CompileCase]`; the report (benchmarks) compiles
each for each architecture and reads registers, spills and tensor-core instructions off the result.
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
            to be, as torch allocates them.
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
    archs: tuple[int, ...] = (80, 90)
