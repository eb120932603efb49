"""Triton for the op modules; where it is not installed, one line that says what to do.

So too where the interpreter is asked for (TRITON_INTERPRET=1) and Triton and numpy do not fit.
"""

import re

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    raise ModuleNotFoundError(
        "fastbert_kernels: the fused kernels need Triton: pip install triton, or use the op of the "
        "same name in fastbert_kernels.reference or fastbert_kernels.reference_optimizer",
        name="triton",
    ) from None

__all__ = ["TensorDescriptor", "tl", "triton"]


def misfit(triton_version: str, numpy_version: str) -> str | None:
    """Why Triton's interpreter does not work with this numpy; None where it does.

    Until Triton 3.7 it makes a loop's bound of an array of one element by `int(array)`, which numpy
    refuses from 2.4 on: "only 0-dimensional arrays can be converted to Python scalars". Tried:
    Triton 3.6.0 works with numpy 2.3.5 and fails with 2.4.1, 2.4.6 and 2.5.5; 3.7.0, 3.7.1, 3.8.0
    and 3.9.0 work with them.
    """
    if _release(triton_version) >= (3, 7) or _release(numpy_version) < (2, 4):
        return None
    return (
        f"fastbert_kernels: the interpreter of Triton {triton_version} does not work with numpy "
        f"{numpy_version}: pip install 'numpy<2.4' or 'triton>=3.7', or unset TRITON_INTERPRET"
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


if triton.knobs.runtime.interpret:
    import numpy  # as the interpreter itself does

    if _why := misfit(triton.__version__, numpy.__version__):
        raise ImportError(_why)
