"""Speedruns: tokens, time and energy to a fixed loss on fixed text; see docs/speedrun.md."""
