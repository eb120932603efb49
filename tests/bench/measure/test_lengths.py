"""Lengths as they are asked for, and the memory that a call holds."""

import numpy as np
import pytest
import torch

from fastbert.errors import UserError
from fastbert_bench.measure.lengths import lengths_asked
from fastbert_bench.measure.memory import peak_of


def test_lengths_from_a_file(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("3\n5\n99\n")
    rng = np.random.default_rng(0)
    drawn = lengths_asked(str(path), 4, 16, rng)
    assert len(drawn) == 4 and set(drawn.tolist()) <= {3, 5, 16}
    for text, message in (
        ("", "is empty"),
        ("3\nx\n", ":2: 'x' is not a length"),
        ("2", ":1: '2'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            lengths_asked(str(path), 4, 16, rng)
    with pytest.raises(UserError, match="No such file"):
        lengths_asked("no/file", 4, 16, rng)


def test_peak_memory_counts_what_lives_at_once():
    def use():
        first = torch.empty(1000, 1000)
        del first
        second = torch.empty(500, 1000)
        return second.sum()

    assert 4_000_000 <= peak_of(use, torch.device("cpu")) < 4_100_000


def test_peak_memory_of_a_step_that_replaces_tensors_is_quiet(capfd):
    state = [torch.empty(1) for _ in range(1001)]  # torch warns of one such in a thousand

    def replace():
        for index in range(len(state)):
            state[index] = torch.empty(1)

    assert peak_of(replace, torch.device("cpu")) >= 4 * len(state)
    assert "Memory block of unknown size" not in capfd.readouterr().err
