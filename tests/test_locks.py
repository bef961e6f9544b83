"""One process at a time works in a folder, and a dead one never keeps the next out."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prefzoo import locks
from prefzoo.locks import locked
from prefzoo.registry import UsageError

HOLD = """
import os, subprocess, sys, time
from prefzoo.locks import locked
with locked(sys.argv[1]):
    if sys.argv[2] == "fork":
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    if sys.argv[2] == "start":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    print("held", flush=True)
    time.sleep(60)
"""

TURNS = """
import os, sys
from pathlib import Path
from prefzoo.locks import locked
folder, inside = Path(sys.argv[1]), Path(sys.argv[1]) / "inside"
for _ in range(int(sys.argv[2])):
    with locked(folder, wait=60):
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where two are in
        inside.unlink()
"""


def held_by_another(folder: Path, with_child: str = "") -> subprocess.Popen[str]:
    code = [sys.executable, "-c", HOLD, str(folder), with_child]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_one_owner_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    with locked(tmp_path):
        owner = rf"this process \(pid {os.getpid()} on host {platform.node()}\) still works in .{tmp_path}.: finish"
        with pytest.raises(UsageError, match=owner), locked(tmp_path):
            pytest.fail("two owners")
        with locked(tmp_path, name=".other"):
            assert sorted(f.name for f in tmp_path.iterdir()) == [".lock", ".other"]
        with pytest.raises(UsageError), locked(tmp_path):
            pytest.fail("the lock was lost by a refusal")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("with_child", ["", "fork", "start"])
def test_a_dead_owner_holds_nothing_whatever_it_leaves_behind(tmp_path: Path, with_child: str) -> None:
    process = held_by_another(tmp_path, with_child)
    try:
        with pytest.raises(UsageError, match=rf"pid {process.pid} on host"), locked(tmp_path):
            pytest.fail("two owners")
        process.kill()
        process.wait()
        assert (tmp_path / ".lock").exists()
        with locked(tmp_path, wait=20):  # while its child lives, which may not have run at all yet
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        assert not (tmp_path / ".lock").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)


def test_what_stands_in_the_file_and_its_age_count_for_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(f"pid {os.getppid()} on host elsewhere")
    os.utime(tmp_path / ".lock", (4e9, 4e9))  # clocks may go backwards
    with locked(tmp_path):
        pass


def test_who_waits_gets_it_when_the_owner_leaves(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def own() -> None:
        with locked(tmp_path):
            entered.set()
            leave.wait()

    owner = threading.Thread(target=own)
    owner.start()
    entered.wait()
    threading.Timer(0.2, leave.set).start()
    with locked(tmp_path, wait=60):
        assert leave.is_set()
    owner.join()


def test_many_take_turns_while_the_file_comes_and_goes(tmp_path: Path) -> None:
    turns = [subprocess.Popen([sys.executable, "-c", TURNS, str(tmp_path), "30"]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in turns] == [0] * 4
    assert list(tmp_path.iterdir()) == []


def test_an_owner_whose_file_was_removed_does_not_remove_the_next_ones(tmp_path: Path) -> None:
    first = locked(tmp_path)
    first.__enter__()
    (tmp_path / ".lock").unlink()
    with locked(tmp_path):
        first.__exit__(None, None, None)
        with pytest.raises(UsageError), locked(tmp_path):
            pytest.fail("two owners")


def test_a_file_that_is_removed_between_opening_and_locking_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another owner leaves just then: a lock on its removed file would keep nobody out."""
    lock, removed = locks._lock, []

    def late(handle: int) -> bool:
        if not removed:
            (tmp_path / ".lock").unlink()
            removed.append(handle)
        return lock(handle)

    monkeypatch.setattr(locks, "_lock", late)
    with locked(tmp_path):
        monkeypatch.setattr(locks, "_lock", lock)
        with pytest.raises(UsageError), locked(tmp_path):
            pytest.fail("two owners")
    assert locks._held == set()


@pytest.mark.parametrize("missing", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    locks._tell_once.cache_clear()
    for _ in range(2):
        with locked(tmp_path):
            pass
    assert capsys.readouterr().err.count("no locks here") == 1
    assert list(tmp_path.iterdir()) == [] and locks._held == set()


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(UsageError, match=r"cannot be written to: "), locked(folder):
            pytest.fail("no folder")


def test_a_full_disk_only_takes_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with locked(tmp_path), pytest.raises(UsageError, match=r"another process works in"), locked(tmp_path):
        pytest.fail("two owners")
