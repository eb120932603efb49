"""One process in a run's folder, on local disks, on other hosts' and where flock is unknown."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fastbert.config import PretrainConfig
from fastbert.errors import UserError
from fastbert.train import lock
from fastbert.train.lock import locked
from fastbert.train.prepare import held_run, run_folder

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(params=["flock", "none"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The second is a file system that knows no flock."""
    if request.param == "none":
        monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    return str(request.param)


def without_note(said: list[str]) -> list[str]:
    return [line for line in said if "has no flock: whoever holds" not in line]


def left_by(run: Path, *, age: float = 0, **changes: Any) -> None:
    """A lock file that a dead process has left."""
    path = run / lock.NAME
    path.write_text(json.dumps({**lock._ourselves(), **changes}))
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))


def test_a_second_is_refused_at_once_and_nothing_stays(tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    with locked(tmp_path, said.append):
        with pytest.raises(UserError) as raised, locked(tmp_path, said.append):
            pass
        assert str(raised.value).startswith(
            f"out = '{tmp_path}' is in use by process {os.getpid()} on {socket.gethostname()}"
        )
        assert str(raised.value).endswith(f"delete {tmp_path}/run.lock")
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert not list(tmp_path.iterdir())
    assert without_note(said) == [] and len(said) == (kind == "none")
    with pytest.raises(ZeroDivisionError), locked(tmp_path, said.append):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


def test_a_dead_holders_lock_is_taken_over_at_once(tmp_path: Path, kind: str) -> None:
    said: list[str] = []
    # Its number is now another process's, which started at another time.
    left_by(tmp_path, pid=os.getppid(), started="12")
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    assert without_note(said) == [
        f"lock: taken over from process {os.getppid()} on {socket.gethostname()}, which has ended"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "elsewhere",
    [{"host": "node7", "boot": "another"}, {"boot": "an earlier one"}, {"boot": ""}],
    ids=["host", "boot", "unknown"],
)
def test_another_hosts_lock_holds_while_it_is_renewed(
    tmp_path: Path, kind: str, elsewhere: dict[str, str]
) -> None:
    said: list[str] = []
    left_by(tmp_path, pid=77, age=40, **elsewhere)
    with pytest.raises(UserError) as raised, locked(tmp_path, said.append):
        pass
    host = elsewhere.get("host", socket.gethostname())
    assert f"is in use by process 77 on {host}, renewed 4" in str(raised.value)
    assert "and counts as dead after 120 s" in str(raised.value)
    left_by(tmp_path, pid=77, age=lock.STALE + 1, **elsewhere)
    with locked(tmp_path, said.append):
        pass
    assert without_note(said) == [f"lock: taken over from process 77 on {host}, which has ended"]


def test_containers_count_processes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    # Same host name, same number, and no such process here: only its age tells.
    left_by(tmp_path, pid=1, namespace="pid:[1]")
    with pytest.raises(UserError, match="renewed 0 s ago"), locked(tmp_path, print):
        pass


@pytest.mark.parametrize("content", ["{", "[1]", '{"pid": "x"}', "\0" * 9, "[" * 10**5])
def test_a_file_that_is_no_lock_is_not_touched(tmp_path: Path, kind: str, content: str) -> None:
    (tmp_path / lock.NAME).write_text(content)
    os.utime(tmp_path / lock.NAME, (0, 0))
    with pytest.raises(UserError, match=r"run\.lock is no lock of a run, or damaged: name another"):
        locked(tmp_path, print).__enter__()
    assert (tmp_path / lock.NAME).read_text() == content


def test_a_lock_file_that_says_nothing_yet(tmp_path: Path, kind: str) -> None:
    (tmp_path / lock.NAME).touch()
    if kind == "none":
        with pytest.raises(UserError, match="in use by another process, renewed"):
            locked(tmp_path, print).__enter__()
        os.utime(tmp_path / lock.NAME, (0, 0))
    with locked(tmp_path, print):
        pass


def at_once(work: Callable[[], Any], number: int = 8) -> tuple[list[Any], list[UserError]]:
    """What `work` gave in so many threads that begin together, and what it was refused with."""
    start, results, refused = threading.Barrier(number), [], []

    def one() -> None:
        start.wait()
        try:
            results.append(work())
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=one) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, refused


@pytest.mark.parametrize("left_over", [False, True])
def test_of_many_at_the_same_moment_one_wins(tmp_path: Path, kind: str, left_over: bool) -> None:
    if left_over and kind == "none":
        pytest.skip("two may meet there between a rename and a link")
    for _ in range(5):
        if left_over:
            left_by(tmp_path, pid=2**22 + 1)
        holders: list[Any] = []

        def take(holders: list[Any] = holders) -> None:
            holder = locked(tmp_path, lambda line: None)
            holder.__enter__()
            holders.append(holder)

        won, refused = at_once(take)
        assert len(won) == 1 and len(refused) == 7
        holders[0].__exit__(None, None, None)
        assert not list(tmp_path.iterdir())


def test_runs_of_the_same_moment_get_numbers_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    held: list[Any] = []

    def begin() -> Path:
        holder = held_run(PretrainConfig())
        run = holder.__enter__()
        (run / "config.toml").touch()
        held.append(holder)
        return run

    runs, refused = at_once(begin, 6)
    assert refused == []
    assert sorted(run.name for run in runs) == [f"pretrain-00{n}" for n in range(1, 7)]
    for holder in held:
        holder.__exit__(None, None, None)
    assert run_folder(PretrainConfig()).name == "pretrain-007"
    assert run_folder(PretrainConfig(resume="auto")).name == "pretrain-006"


@contextmanager
def another_process(run: Path) -> Iterator[subprocess.Popen[str]]:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from fastbert.train.lock import locked\n"
        "with locked(Path(sys.argv[1]), print):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def test_a_run_that_another_process_works_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = PretrainConfig(out=str(run))
    with another_process(run) as process:
        named = f"is in use by process {process.pid} on {socket.gethostname()}: wait for it"
        for resume in ("", "auto"):
            with (
                pytest.raises(UserError, match=named),
                held_run(PretrainConfig(out=str(run), resume=resume)),
            ):
                pass
        (run / "config.toml").touch()  # what it is does not matter while it is in use
        with pytest.raises(UserError, match=named), held_run(config):
            pass
        process.kill()
        process.wait()
        assert (run / lock.NAME).exists()
        with pytest.raises(UserError, match="already holds another run"), held_run(config):
            pass
        (run / "config.toml").unlink()
        with held_run(config) as held:
            assert held == run
    assert not list(run.iterdir())


def test_folders_that_were_made_for_a_lock_go_with_it(tmp_path: Path) -> None:
    config = PretrainConfig(out=str(tmp_path / "a/b/run"))
    with pytest.raises(ZeroDivisionError), held_run(config):
        1 / 0  # noqa: B018
    assert not (tmp_path / "a").exists()
    with held_run(config) as run:
        (run / "config.toml").touch()
    assert [path.name for path in run.iterdir()] == ["config.toml"]


def test_a_place_that_cannot_hold_a_lock(tmp_path: Path) -> None:
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory; name another folder"):
        locked(tmp_path, print).__enter__()
    if not Path("/proc/sys").exists():
        pytest.skip("no place that root cannot write")
    with pytest.raises(UserError, match="out = '/proc/sys' cannot be written"):
        locked(Path("/proc/sys"), print).__enter__()
