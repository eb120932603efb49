"""Each op alone: its costs, checks and timings, and its machine code, compiled ahead."""
