"""Triton for the op modules; where it is not installed, one line that says what to do."""

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
