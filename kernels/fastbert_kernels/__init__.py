"""Fused kernels for BERT pre-training, one op per file, each with its specification in `reference`.

Importing this package imports neither Triton nor a CUDA library; it works on a machine without a GPU.
"""
