"""Measurements: each compares contenders in one process, interleaved, and writes what it found."""
