"""The road of the data: raw text, tokens, memory-mapped shards, packed sequences, `Batch`."""
