"""Optimizer, schedule, step, checkpoints and the loop: from batches to a trained model."""
