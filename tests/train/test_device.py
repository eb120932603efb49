"""What cannot fit is told from its sizes, before anything is allocated."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert.config import ModelConfig, PretrainConfig, model_config
from fastbert.errors import UserError
from fastbert.train import device as room
from fastbert.train.device import check_memory, check_threads, check_weights, check_workers

BASE = model_config("base")

CPU = torch.device("cpu")


@pytest.fixture
def four_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 4 * 2**30)


def test_free_memory_is_that_of_the_machine() -> None:
    assert 2**28 < room.free_memory(CPU) < 2**50


@pytest.mark.parametrize(
    ("line", "group", "limit", "used", "cache"),
    [
        ("0::/job/step", "job", "memory.max", "memory.current", "file"),
        ("0::/../elsewhere", "", "memory.max", "memory.current", "file"),
        (
            *("5:cpu,memory:/docker/1", "memory/docker/1", "memory.limit_in_bytes"),
            *("memory.usage_in_bytes", "total_cache"),
        ),
    ],
)
def test_free_memory_is_that_of_the_control_group(
    tmp_path: Path, line: str, group: str, limit: str, used: str, cache: str
) -> None:
    (tmp_path / "cgroup").write_text(f"1:name=systemd:/x\n{line}\nbroken\n")
    folder = tmp_path / "fs" / group
    folder.mkdir(parents=True)
    (folder / limit).write_text("1000\n")
    (folder / used).write_text("700\n")
    (folder / "memory.stat").write_text(f"anon 500\n{cache} 150\n")
    assert room._control_groups(tmp_path / "fs", str(tmp_path / "cgroup")) == [450]
    (folder / limit).write_text("max\n")
    assert room._control_groups(tmp_path / "fs", str(tmp_path / "cgroup")) == []


@pytest.mark.usefixtures("four_gib")
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 2**16, "num_attention_heads": 2**10}, "needs 3,302.4 GiB"),
        ({"num_hidden_layers": 1000}, "needs 106.0 GiB (7,112.9M parameters x 16 bytes of weights"),
        ({"vocab_size": 2**24}, "needs 193.5 GiB"),
        ({"max_position_embeddings": 2**20}, "needs 13.6 GiB"),
        ({"intermediate_size": 2**18}, "needs 72.8 GiB"),
    ],
)
def test_a_model_that_cannot_fit_says_its_memory(sizes: dict[str, Any], message: str) -> None:
    started = time.process_time()
    with pytest.raises(UserError) as raised:
        check_memory(PretrainConfig(), dataclasses.replace(BASE, **sizes), CPU, torch.float32)
    assert time.process_time() - started < 1
    assert str(raised.value).startswith("model = 'tiny' needs ")
    assert message in str(raised.value)
    assert "but only 4.0 GiB are free on cpu: give a smaller --model" in str(raised.value)


@pytest.mark.usefixtures("four_gib")
@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_per_batch": 2**24},
        {"gradient_accumulation_steps": 2**16},
        {"max_seq_length": 2**17, "tokens_per_batch": 2**17},
    ],
)
def test_a_step_that_cannot_fit_says_its_memory(changes: dict[str, Any]) -> None:
    sizes = ModelConfig(150, 16, 1, 2, 32, max_position_embeddings=2**17)
    with pytest.raises(UserError, match=r"^tokens_per_batch = \d+ with .* but only 4\.0 GiB are"):
        check_memory(PretrainConfig(**changes), sizes, CPU, torch.float32)


@pytest.mark.usefixtures("four_gib")
def test_what_fits_passes_and_bytes_follow_the_types() -> None:
    check_memory(PretrainConfig(tokens_per_batch=2048), BASE, CPU, torch.float32)
    assert check_weights("base", BASE, CPU, 18) == 18 * BASE.num_parameters()
    half = PretrainConfig(gradient_precision="bf16")
    large = dataclasses.replace(BASE, num_hidden_layers=33)
    assert 0.9 * 4 * 2**30 < check_weights("x", large, CPU, 16)
    check_memory(dataclasses.replace(half, tokens_per_batch=128), large, CPU, torch.float32)
    with pytest.raises(UserError, match="x 18 bytes of weights, gradients and moments"):
        check_memory(PretrainConfig(), large, CPU, torch.bfloat16)


@pytest.mark.usefixtures("four_gib")
def test_more_processes_than_the_machine_has_a_use_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.os, "sched_getaffinity", lambda pid: range(4), raising=False)
    check_threads(16)
    check_workers("dataloader_num_workers", 8)
    with pytest.raises(UserError, match="num_threads = 17 must be at most 16 on 4 CPU cores"):
        check_threads(17)
    monkeypatch.setattr(room.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    check_threads(256)
    with pytest.raises(UserError, match=r"= 100 needs 29\.3 GiB, but only 4\.0 GiB are free"):
        check_workers("dataloader_num_workers", 100)
