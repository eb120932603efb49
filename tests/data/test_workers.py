"""Batches from worker processes: the packer's own, whatever ends first."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.data.pack import Packer
from fastbert.data.shards import Shards, build_shards
from fastbert.data.tokenize import WordPiece
from fastbert.data.workers import BatchLoader, DevicePrefetcher, _every, _portable
from fastbert.errors import RunError, UserError

ROOT = Path(__file__).parent.parent.parent
T = 2048
WORDS = [
    a + b for a in ("ba", "lo", "mi", "tu", "re", "ka") for b in ("n", "st", "ver", "ling", "")
]


@pytest.fixture(scope="module")
def words():
    return WordPiece.train([" ".join(WORDS)], 120)


@pytest.fixture(scope="module")
def build(words, tmp_path_factory):
    """Builds shards of random documents and returns their folder."""

    def make(documents=40):
        folder = tmp_path_factory.mktemp("corpus")
        rng = np.random.default_rng(0)
        text = "\n\n".join(
            "\n".join(" ".join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(30))
            for _ in range(documents)
        )
        (folder / "text.txt").write_text(text)
        build_shards(
            str(folder / "text.txt"),
            words,
            folder / "shards",
            validation_fraction=0,
            seed=0,
            progress=False,
        )
        return folder / "shards"

    return make


@pytest.fixture(scope="module")
def folder(build):
    return build()


@pytest.fixture
def make_packer(folder, words):
    def make(folder=folder, **changes):
        settings = {"tokens_per_batch": T, "max_seq_length": 64, "seed": 3, **changes}
        return Packer(Shards.open(folder, "train"), words.ids, **settings)

    return make


def assert_equal(batch, other):
    for (name, x), (_, y) in zip(batch.tensors(), other.tensors(), strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x.cpu(), y.cpu()), name
    for name in ("max_seqlen", "num_tokens", "num_sequences"):
        assert getattr(batch, name) == getattr(other, name)


def recorded(packer, count):
    """`count` batches, and as many states + 1."""
    states, batches = [packer.state_dict()], []
    for batch in islice(packer, count):
        batches.append(batch)
        states.append(packer.state_dict())
    return batches, states


def gone(pid):
    """Whether the process has ended, reaped or not, within 10 seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_any_number_of_workers_gives_the_packers_batches(make_packer, num_workers):
    batches, states = recorded(make_packer(whole_word_mask=True), 11)
    with BatchLoader(make_packer(whole_word_mask=True), num_workers) as loader:
        assert (loader.T, loader.N, loader.M) == (T, make_packer().N, make_packer().M)
        assert loader.notes == []
        assert loader.fill == 1
        assert loader.state_dict() == states[0]
        kept = []
        for state in states[1:]:
            kept.append(next(loader))
            assert loader.state_dict() == state
        assert loader.fill == pytest.approx(np.mean([b.num_tokens for b in batches]) / T)
    assert loader.state_dict() == states[-1]
    for batch, expected in zip(kept, batches, strict=True):  # nothing was overwritten since
        assert_equal(batch, expected)


def test_a_resume_may_change_the_number_of_workers(make_packer):
    batches, states = recorded(make_packer(nsp=False), 10)
    with (
        BatchLoader(make_packer(nsp=False), 1) as one,
        BatchLoader(make_packer(nsp=False), 2, prefetch_factor=1) as two,
    ):
        for expected in batches[:5]:
            assert_equal(next(one), expected)
        state = json.loads(json.dumps(one.state_dict()))
        two.load_state_dict(state)
        for k in (5, 6, 7):  # the first worker's, the second's, the first's
            assert_equal(next(two), batches[k])
            assert two.state_dict() == states[k + 1]
        two.load_state_dict(states[1])  # while its workers are ahead
        assert_equal(next(two), batches[1])
        with BatchLoader(make_packer(nsp=False)) as none:
            none.load_state_dict(state)
            assert_equal(next(none), batches[5])
        with pytest.raises(UserError, match="is for other data or settings"):
            two.load_state_dict(make_packer(seed=4).state_dict())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_last_epoch_ends_the_iteration(make_packer, num_workers):
    expected, states = recorded(make_packer(epochs=1), 10**6)
    assert len(expected) > 3
    with BatchLoader(make_packer(epochs=1), num_workers) as loader:
        batches = list(loader)
        assert len(batches) == len(expected)
        for batch, other in zip(batches, expected, strict=True):
            assert_equal(batch, other)
        assert loader.state_dict() == states[-1]
        assert next(loader, None) is None


def test_skipping_plans_what_making_does(make_packer):
    _, states = recorded(make_packer(), 9)
    for W in (2, 3):
        packer = make_packer()
        for k, _ in zip(range(1, 9, W), _every(packer, 1, W), strict=False):
            assert packer.state_dict() == states[k + 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_data_is_told_at_its_batch(build, make_packer, num_workers):
    folder, in_order = build(60), {"shuffle": False, "nsp": False}
    with open(folder / "train-00000.bin", "r+b") as file:
        file.seek(2 * (os.path.getsize(file.name) // 3))
        file.write(b"\xff\xff")
    expected = []
    with pytest.raises(RunError, match="train tokens hold id 65535") as told:
        expected.extend(make_packer(folder, **in_order))
    assert len(expected) > 2
    with BatchLoader(make_packer(folder, **in_order), num_workers) as loader:
        for batch in expected:
            assert_equal(next(loader), batch)
        with pytest.raises(RunError) as found:
            next(loader)
        assert str(found.value) == str(told.value)


def test_missing_data_is_told(build, make_packer):
    folder = build(12)
    packer = make_packer(folder)
    (folder / "meta.json").unlink()
    with BatchLoader(packer, 1) as loader, pytest.raises(RunError, match=r"meta.json: cannot be"):
        next(loader)


def test_any_error_crosses():
    class OddError(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} and {two}")

    for error, kind in ((UserError("a = 1 is wrong"), UserError), (ValueError("b"), ValueError)):
        moved = _portable(error)
        assert type(moved) is kind
        assert str(moved) == str(error)
        assert "in a data worker" in moved.__notes__[0]
    assert str(_portable(OddError(1, 2))) == "OddError: 1 and 2"


def test_a_killed_worker_is_told_and_can_be_replaced(make_packer):
    batches, _ = recorded(make_packer(), 6)
    with BatchLoader(make_packer(), 2) as loader:
        assert_equal(next(loader), batches[0])
        victim, other = loader.pids
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(RunError, match="data worker 1 of 2 was ended by SIGKILL") as told:
            list(islice(loader, 6))
        assert time.monotonic() - started < 10
        assert "--dataloader-num-workers 0" in str(told.value)
        assert gone(other)
        done = loader.state_dict()["batches"]
        assert_equal(next(loader), batches[done])


def test_a_worker_that_hangs_is_told(make_packer, monkeypatch):
    with BatchLoader(make_packer(), 1) as loader:
        next(loader)
        os.kill(loader.pids[0], signal.SIGSTOP)
        monkeypatch.setattr("fastbert.data.workers.PATIENCE", 0.2)
        with pytest.raises(RunError, match="data worker 1 of 1 is stuck at batch"):
            list(islice(loader, 9))


def test_a_loader_nobody_holds_ends_its_workers(make_packer):
    loader = BatchLoader(make_packer(), 1)
    next(loader)
    (pid,) = loader.pids
    del loader
    assert gone(pid)


SCRIPT = """
import os, signal, sys, time
from fastbert.data.pack import Packer
from fastbert.data.shards import Shards
from fastbert.data.tokenize import WordPiece
from fastbert.data.workers import BatchLoader

if __name__ == "__main__":
    os.setsid()
    received = []
    signal.signal(signal.SIGINT, lambda *_: received.append("SIGINT"))
    words = WordPiece.train([sys.argv[2]], 120)
    packer = Packer(
        Shards.open(sys.argv[1], "train"), words.ids, tokens_per_batch=2048, max_seq_length=64
    )
    loader = BatchLoader(packer, 2)
    loader.start()
    os.killpg(0, signal.SIGINT)  # Ctrl-C, while they start
    next(loader)
    os.killpg(0, signal.SIGINT)  # and once they work
    batches = [next(loader) for _ in range(9)]
    maps = [line.split() for line in open("/proc/self/maps")]
    named = [line[5:] for line in maps if line[1] == "rw-s"]
    deleted = [path for path in named if path[-1] == "(deleted)"]
    print(*received, len(named), len(deleted), *loader.pids, flush=True)
    EXIT
"""


@pytest.mark.parametrize("way_out", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_nothing_outlives_the_parent(folder, tmp_path, way_out):
    """Ctrl-C reaches the parent alone; its exit or death takes workers and memory along."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("EXIT", way_out))
    result = subprocess.run(
        [sys.executable, str(script), str(folder), " ".join(WORDS)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == (0 if way_out == "pass" else -signal.SIGKILL), result.stderr
    *received, shared, unlinked, one, two = result.stdout.split()
    assert received == ["SIGINT", "SIGINT"]
    assert int(shared) > 0
    assert unlinked == shared  # memory without a name goes with its last user
    assert gone(one)
    assert gone(two)
    assert result.stderr == ""


@pytest.mark.parametrize("num_workers", [0, 1])
def test_prefetching_hands_out_the_same_batches_and_their_states(make_packer, num_workers):
    batches, states = recorded(make_packer(epochs=2), 10**6)
    with DevicePrefetcher(BatchLoader(make_packer(epochs=2), num_workers), "cpu") as source:
        source.start()
        assert source.state_dict() == states[0]
        assert (source.T, source.N, source.M) == (T, make_packer().N, make_packer().M)
        for batch, state in zip(batches[:5], states[1:6], strict=True):
            assert_equal(next(source), batch)
            assert source.state_dict() == state
        source.load_state_dict(states[2])
        assert source.state_dict() == states[2]
        for batch in batches[2:6]:
            assert_equal(next(source), batch)
        assert source.fill == pytest.approx(np.mean([b.num_tokens for b in batches[:6]]) / T)
    assert source.state_dict() == states[6]
    rest = list(source)  # goes on, up to the end
    assert len(rest) == len(batches) - 6
    assert_equal(rest[-1], batches[-1])
    assert source.state_dict() == states[-1]
    source.close()


def test_prefetching_takes_two_ahead_and_no_more(make_packer):
    loader = BatchLoader(make_packer())
    source = DevicePrefetcher(loader, "cpu", depth=2)
    next(source)
    assert loader.state_dict()["batches"] == 3
    next(source)
    assert loader.state_dict()["batches"] == 4
    assert source.state_dict()["batches"] == 2


def test_prefetching_tells_an_error_after_the_batches_before_it(make_packer, monkeypatch):
    batches, states = recorded(make_packer(), 4)
    loader = BatchLoader(make_packer())
    made = loader._packer._materialise

    def failing(sequences):
        if loader._packer.batch_index == 3:
            raise RunError("the fourth batch is damaged")
        return made(sequences)

    monkeypatch.setattr(loader._packer, "_materialise", failing)
    source = DevicePrefetcher(loader, "cpu")
    for k in range(3):
        assert_equal(next(source), batches[k])
        assert source.state_dict() == states[k + 1]
    for _ in range(2):
        with pytest.raises(RunError, match="fourth"):
            next(source)
    assert source.state_dict() == states[3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_prefetching_to_a_gpu_that_is_behind(make_packer):
    """No memory is written again while a late consumer still reads it, and the host never waits."""
    count = 60
    batches, states = recorded(make_packer(), count)
    sums = torch.zeros(count, 7, device="cuda", dtype=torch.int64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with DevicePrefetcher(BatchLoader(make_packer(), 2), "cuda") as source:
            for k in range(count):
                batch = next(source)
                assert source.state_dict() == states[k + 1]
                torch.cuda._sleep(20_000_000)  # some 10 ms, so that the host runs ahead
                for i, (_, tensor) in enumerate(batch.tensors()):
                    weights = torch.arange(1, len(tensor) + 1, device="cuda")
                    sums[k, i] = (tensor * weights).sum()
                del batch, tensor
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for row, batch in zip(sums.cpu(), batches, strict=True):
        expected = [int((x * torch.arange(1, len(x) + 1)).sum()) for _, x in batch.tensors()]
        assert row.tolist() == expected


def test_workers_run_no_script_again():
    from multiprocessing.spawn import get_preparation_data

    import __main__
    from fastbert.data.workers import _without_main

    with _without_main():
        assert not [name for name in get_preparation_data("worker") if "init_main" in name]
    assert sys.modules["__main__"] is __main__
