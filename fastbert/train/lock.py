"""One process in a run's folder: a second would delete the first one's checkpoints.

The lock is `run.lock`, which its holder keeps under flock(2), so that it falls with the process
however that dies: at once, whatever became of its number, and for containers of one host as well.
flock says nothing where a network file system does not carry it to other hosts, or has none. There
the file's content and age decide: its holder renews it every `BEAT` seconds, and another host's
lock counts as dead after `STALE`. Ages are taken by the file system's clock, not the host's.
"""

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastbert.errors import RunError, UserError
from fastbert.train.interrupts import held_signals

NAME = "run.lock"
BEAT = 15.0
STALE = 120.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def locked(run: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a run's folder, which exists; removed at the end, however it comes.

    Args:
        run: the folder.
        say: gets a line where a dead holder's lock is taken over, or flock is missing.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
        RunError: the disk is full.
    """
    path = run / NAME
    try:
        descriptor, told = _acquire(path)
    except OSError as error:
        kind = RunError if error.errno in _FULL else UserError
        raise kind(
            f"out = {str(run)!r} cannot be written: {error.strerror}; name another folder"
        ) from None
    for line in told:
        say(line)
    ended = threading.Event()
    pulse = threading.Thread(target=_beat, args=(descriptor, ended), daemon=True)
    pulse.start()
    try:
        yield
    finally:
        with held_signals():
            ended.set()
            pulse.join()
            with suppress(OSError):
                if _is_at(path, descriptor):
                    path.unlink()  # while it is held: nobody can have taken it over
            os.close(descriptor)


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(descriptor)


def _acquire(path: Path) -> tuple[int, list[str]]:
    """The open lock file, held by us, and what is to be said of it."""
    told: list[str] = []
    for _ in range(100):
        try:
            descriptor, made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                descriptor, made = os.open(path, os.O_RDWR), False
            except FileNotFoundError:  # released in between
                continue
        try:
            ours = _take(path, descriptor, made, told)
        except BaseException:
            os.close(descriptor)
            raise
        if ours:
            return descriptor, told
        os.close(descriptor)
        time.sleep(0.01)
    raise UserError(f"{path}: others take this lock again and again: name another folder")


def _take(path: Path, descriptor: int, made: bool, told: list[str]) -> bool:
    """Makes the open file our lock; False where another file is to be opened.

    Raises:
        UserError: another process holds it.
    """
    works = _flock(descriptor)
    if works is False:
        raise _in_use(path, _holder(descriptor), "")
    if not _is_at(path, descriptor):
        return False
    if works is None and not told:
        told.append(
            f"lock: this file system has no flock: whoever holds {path} renews it every "
            f"{BEAT:.0f} s instead"
        )
    if not made:
        holder = _holder(descriptor)
        if not holder and os.fstat(descriptor).st_size:
            raise UserError(
                f"{path} is no lock of a run, or damaged: name another folder, or delete it if "
                "nobody works there"
            )
        reason = _why_alive(path, descriptor, holder, flock=bool(works))
        if reason:
            raise _in_use(path, holder, reason)
        if works is None:
            # Without flock, two may find the same dead lock: the one whose rename finds it wins.
            aside = path.with_name(f".{NAME}.{uuid.uuid4().hex}")
            try:
                os.rename(path, aside)
            except FileNotFoundError:
                return False
            dead = _is_at(aside, descriptor)
            if not dead:
                with suppress(OSError):  # that was a living one: put back
                    os.link(aside, path)
            aside.unlink(missing_ok=True)
        if holder and (works or dead):
            told.append(f"lock: taken over from {_named(holder)}, which has ended")
        if works is None:
            return False  # now it is made anew, by O_EXCL
    content = json.dumps({**_ourselves(), "token": uuid.uuid4().hex}).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    with suppress(OSError):
        os.fsync(descriptor)
    return True


def _flock(descriptor: int) -> bool | None:
    """Whether the lock is ours; None where the file system knows none."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        there, here = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _ourselves() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(),
        "started": _started(os.getpid()),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _namespace() -> str:
    """Of process ids: two containers of a host count them apart."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot: numbers are used again, not both."""
    stat = _read(f"/proc/{pid}/stat")
    return stat.rpartition(")")[2].split()[19] if ")" in stat else ""


def _holder(descriptor: int) -> dict[str, Any]:
    """What the lock file says; empty where it is not written yet, or damaged."""
    for _ in range(10):
        try:
            holder = json.loads(os.pread(descriptor, 4096, 0))
            if isinstance(holder, dict) and isinstance(holder.get("pid"), int):
                return holder
        except (OSError, ValueError, RecursionError):
            pass
        time.sleep(0.02)
    return {}


def _why_alive(path: Path, descriptor: int, holder: dict[str, Any], *, flock: bool) -> str:
    """Why a lock that flock did not refuse is still held; empty where its holder is dead."""
    ours = _ourselves()
    same_boot = bool(ours["boot"]) and holder.get("boot") == ours["boot"]
    if flock and (same_boot or not holder):
        return ""  # this host's kernel would know; who has not signed yet will find it ours
    if same_boot and holder.get("namespace") == ours["namespace"]:
        pid = holder["pid"]
        if pid > 0 and holder.get("started") and _started(pid) == holder["started"]:
            return f"; without flock, its process {pid} was found alive"
        return ""
    age = _age(path, descriptor)
    if age >= STALE:
        return ""
    return f", renewed {age:.0f} s ago, and counts as dead after {STALE:.0f} s"


def _age(path: Path, descriptor: int) -> float:
    """Seconds since the lock was renewed, by the clock of the file system that it lies on."""
    probe = path.with_name(f".{NAME}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
    return max(now - os.fstat(descriptor).st_mtime, 0.0)


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {str(holder.get('host'))[:100]}"


def _in_use(path: Path, holder: dict[str, Any], reason: str) -> UserError:
    who = f"{_named(holder)}{reason}" if holder else f"another process{reason}"
    return UserError(
        f"out = {str(path.parent)!r} is in use by {who}: wait for it or name another folder; only "
        f"if you are sure that it is dead, delete {path}"
    )
