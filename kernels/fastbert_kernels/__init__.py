"""Fused kernels for BERT pre-training, one op per file, each with its specification in `reference`.

Importing this package does not import Triton: it works on a machine without a GPU.
"""
