"""The encoder over packed tokens. It knows tensors: not files, not training."""
