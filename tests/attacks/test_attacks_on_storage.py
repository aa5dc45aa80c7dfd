"""Attacks 7 to 12: torn writes, failing disks, racing writers, files moved under their lock."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attackkit import (
    OWNER,
    WRITER,
    charged,
    ended,
    export,
    make,
    plan,
    problem,
    problem_of,
    release_into,
    released,
    reopen,
    signed,
    spawn,
    spent,
)

from dpbudget.errors import StorageFailed, Tampered
from dpbudget.ledger.journal import Journal, replay
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.run import Run
from dpbudget.ledger.store.base import Snapshot
from dpbudget.ledger.store.jsonl import read_export
from dpbudget.ledger.store.memory import MemoryStore
from dpbudget.ledger.store.sqlite import SqliteStore

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def test_attack_07_an_export_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    spent(path, 1)
    whole = export(path)
    assert problem_of(whole, tmp_path) is None
    for size in range(len(whole)):
        with pytest.raises(Tampered):  # the form alone shows it, before any signature is looked at
            read_export(whole[:size])
    for size in range(0, len(whole), 61):
        assert problem_of(whole[:size], tmp_path) is not None, size


def test_attack_07_a_ledger_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    spent(path, 2)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 512), *range(0, len(whole), 1009), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert problem(path) is not None, size


def _kill_loop(folder: Path, rounds: int, seed: int) -> tuple[int, int]:
    """kill -9 at random moments of a releasing process; steps that were released, and that are charged in the end."""
    path, log, moments = folder / "ledger", folder / "log", random.Random(seed)
    run_id = signed(path, 2000)
    for _ in range(rounds):
        before = len(released(log))
        child = spawn(lambda: release_into(path, run_id, log, 2000))
        deadline = time.monotonic() + 20
        while len(released(log)) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        assert len(released(log)) <= charged(path)
    steps = released(log)
    assert len(steps) == len(set(steps))
    assert problem(path) is None
    return len(steps), charged(path)


def test_attack_07_killed_at_any_moment_the_ledger_holds_every_released_step(tmp_path: Path) -> None:
    count, total = _kill_loop(tmp_path, 6, seed=7)
    assert 6 <= count <= total <= count + 6  # a kill wastes one step at most


@pytest.mark.slow
@pytest.mark.parametrize("part", range(40))
def test_attack_07_killed_a_thousand_times_the_ledger_holds_every_released_step(tmp_path: Path, part: int) -> None:
    count, total = _kill_loop(tmp_path, 25, seed=700 + part)
    assert 25 <= count <= total <= count + 25


class Faulty:
    """A connection whose ``statement`` fails as SQLite reports that the disk did; all others pass."""

    def __init__(self, connection: sqlite3.Connection, statement: str, error: str) -> None:
        self.connection, self._statement, self._error, self.attempts = connection, statement, error, 0

    def execute(self, statement: str, *arguments: Any) -> Any:
        if statement.startswith(self._statement):
            self.attempts += 1
            raise sqlite3.OperationalError(self._error)
        return self.connection.execute(statement, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


def _started(path: Path) -> tuple[Ledger, Run]:
    ledger = make(path)
    return ledger, ledger.start(ledger.sign_plan(plan(200), owner=OWNER), lease_steps=1)


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("COMMIT", "disk I/O error"),  # fsync: EIO
        ("COMMIT", "database or disk is full"),  # ENOSPC
        ("COMMIT", "attempt to write a readonly database"),  # a file system that was remounted read-only
        ("BEGIN IMMEDIATE", "unable to open database file"),  # a mount that is lost
    ],
)
def test_attacks_08_to_10_a_failed_sync_releases_nothing_and_is_never_tried_again(
    tmp_path: Path, statement: str, error: str
) -> None:
    ledger, run = _started(tmp_path / "ledger")
    run.next_receipt()
    store: Any = ledger._journal.store
    faulty = store._connection = Faulty(store._connection, statement, error)
    with pytest.raises(StorageFailed, match=error) as caught:
        run.next_receipt()
    assert caught.value.code == "DP075"
    store._connection = faulty.connection  # the disk is well again, which proves nothing about what it lost
    with pytest.raises(StorageFailed, match="refuses to go on"):
        run.next_receipt()
    assert faulty.attempts == 1
    ledger._journal.close()
    assert charged(tmp_path / "ledger") >= 1


def _releasing_until_refused(path: Path, log: Path, fault: Callable[[], None]) -> None:
    """Open, cause a fault of the system after three releases, and go on until the ledger refuses (exit code 14)."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    ledger = reopen(path, high_water=False)
    for count, receipt in enumerate(ledger.start(next(iter(ledger.state.runs)), lease_steps=1), 1):
        os.write(file, b"%d\n" % receipt.step)
        if count == 3:
            fault()


def test_attack_09_a_full_disk_stops_before_release(tmp_path: Path) -> None:
    """A real short write: the kernel refuses to let any file grow beyond a limit."""
    path, log = tmp_path / "ledger", tmp_path / "log"
    signed(path, 500)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 8192,) * 2)

    assert ended(spawn(lambda: _releasing_until_refused(path, log, fill))) == 10 + StorageFailed.exit_code
    assert 3 <= len(released(log)) <= charged(path) < 500
    assert problem(path) is None


def test_attack_10_a_folder_made_read_only_during_a_run_stops_before_release() -> None:
    # Its own folder below the system's: a child that gives up root must be able to reach it.
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log"
        signed(folder / "ledger", 500)

        def work() -> None:
            if os.geteuid() == 0:  # root writes whatever the mode says
                for place in (folder, folder / "ledger"):
                    os.chown(place, 65534, 65534)
                os.setegid(65534)
                os.seteuid(65534)
            _releasing_until_refused(folder / "ledger", log, lambda: folder.chmod(0o500))

        assert ended(spawn(work)) == 10 + StorageFailed.exit_code
        folder.chmod(0o700)
        assert released(log) == [0, 1, 2]
        assert charged(folder / "ledger") >= 3
        assert problem(folder / "ledger") is None


def test_attack_10_a_folder_that_disappears_during_a_run_stops_before_release(tmp_path: Path) -> None:
    place = tmp_path / "mount"
    place.mkdir()
    ledger, run = _started(place / "ledger")
    run.next_receipt()
    place.rename(tmp_path / "lost")
    with pytest.raises(StorageFailed) as caught:
        run.next_receipt()
    assert caught.value.code == "DP075"
    ledger._journal.close()
    assert charged(tmp_path / "lost" / "ledger") == 1


def _release_unlocked(path: Path, run_id: str, log: Path, most: int) -> None:
    """The control: every process spends from what it read at the start."""
    snapshot: Snapshot = read_export(export(path))
    state, head = replay(snapshot.entries, snapshot.note, OWNER.public)
    ledger = Ledger(Journal(MemoryStore(snapshot), WRITER, state, head), None)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for count, receipt in enumerate(ledger.start(run_id, lease_steps=1), 1):
        os.write(file, b"%d\n" % receipt.step)
        if count == most:
            break


def _race(folder: Path, each: int) -> list[int]:
    """Eight processes that together want twice the plan; the steps that they released."""
    path, log = folder / "ledger", folder / "log"
    run_id = signed(path, 4 * each)
    children = [spawn(lambda: release_into(path, run_id, log, each)) for _ in range(8)]
    assert [ended(child) for child in children] == [0] * 8
    assert charged(path) == 4 * each
    assert problem(path) is None
    return released(log)


def test_attack_11_eight_writers_release_exactly_the_plan(tmp_path: Path) -> None:
    assert sorted(_race(tmp_path, 25)) == list(range(100))


@pytest.mark.slow
def test_attack_11_eight_writers_with_five_hundred_steps_each_release_exactly_the_plan(tmp_path: Path) -> None:
    assert sorted(_race(tmp_path, 500)) == list(range(2000))


def test_attack_11_without_the_lock_the_same_race_releases_twice_the_plan(tmp_path: Path) -> None:
    path, log = tmp_path / "ledger", tmp_path / "log"
    run_id = signed(path, 100)
    with reopen(path) as ledger, ledger.start(run_id, lease_steps=1) as run:
        run.next_receipt()  # freezes the portfolio, so that the control needs no accountant
    children = [spawn(lambda: _release_unlocked(path, run_id, log, 25)) for _ in range(8)]
    assert [ended(child) for child in children] == [0] * 8
    assert len(released(log)) == 200
    assert len(set(released(log))) == 25


def _rename(path: Path) -> None:
    path.rename(path.with_name("moved"))


def _replace(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


@pytest.mark.parametrize("when", ["between", "under the lock"])
@pytest.mark.parametrize("move", [_rename, _replace], ids=["renamed", "replaced"])
def test_attack_12_a_file_moved_under_the_lock_releases_nothing(
    tmp_path: Path, move: Callable[[Path], None], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger"
    ledger, run = _started(path)
    run.next_receipt()
    if when == "between":
        move(path)
    else:
        commit = SqliteStore._commit
        monkeypatch.setattr(SqliteStore, "_commit", lambda store: (commit(store), move(path)))
    for words in ("renamed or replaced", "refuses to go on"):
        with pytest.raises(StorageFailed, match=words) as caught:
            run.next_receipt()
        assert caught.value.code == "DP075"
    ledger._journal.close()
