"""Real disks that fill up, turn read-only or vanish, files swapped under a lock, and workers that are forked."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ledgerkit import OWNER, make_ledger, make_plan, reopen
from mounts import cover_read_only, grow_memory, in_child, lose, mount_memory, with_mounts

from dpbudget.errors import DPBudgetError, StorageFailed
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.run import Run
from dpbudget.ledger.store.sqlite import SqliteStore, _SqliteTransaction

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
PLANNED = 3000


def started(path: Path, lease_steps: int = 1) -> tuple[Ledger, Run]:
    ledger = make_ledger(path)
    return ledger, ledger.start(ledger.sign_plan(make_plan(PLANNED), owner=OWNER), lease_steps=lease_steps)


def charged(path: Path) -> int:
    with Ledger.open(path, trust=OWNER.public) as ledger:
        return next(iter(ledger.state.runs.values())).charged


def release_all(run: Run, steps: list[int]) -> None:
    for receipt in run:
        steps.append(receipt.step)  # noqa: PERF401 - what came before an error must stay in the list


def spend_until_it_fails(run: Run) -> list[int]:
    """The steps released until the store failed; every later attempt must fail too."""
    steps: list[int] = []
    with pytest.raises(StorageFailed) as caught:
        release_all(run, steps)
    assert caught.value.code == "DP075"
    for attempt in (run.next_receipt, run.next_receipt, run.close):
        with pytest.raises(StorageFailed, match="refuses to go on"):
            attempt()
    return steps


def check_resumed(path: Path, steps: list[int]) -> None:
    """A new process goes on behind everything that was released."""
    assert steps == list(range(len(steps)))
    assert len(steps) <= charged(path) <= len(steps) + 1
    with reopen(path) as ledger:
        run = ledger.start(next(iter(ledger.state.runs)), lease_steps=1)
        assert run.next_receipt().step >= len(steps)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kilobytes", [128, 132, 140, 152])
def test_a_full_disk_stops_before_release_and_a_larger_one_goes_on(disk: Path, kilobytes: int) -> None:
    def work() -> int:
        mount_memory(disk, kilobytes << 10)
        ledger, run = started(disk / "ledger")
        steps = spend_until_it_fails(run)
        ledger._journal.close()
        with pytest.raises(StorageFailed):  # it is still full, for a new process too
            release_all(reopen(disk / "ledger").start(run.run_id, lease_steps=1), steps)
        grow_memory(disk, 1 << 22)
        check_resumed(disk / "ledger", steps)
        return len(steps)

    assert 0 < with_mounts(disk, work) < PLANNED


def test_a_folder_that_turns_read_only_releases_nothing_more(disk: Path) -> None:
    def work() -> int:
        ledger, run = started(disk / "ledger")
        steps = [run.next_receipt().step for _ in range(5)]
        cover_read_only(disk)
        assert spend_until_it_fails(run) == []
        ledger._journal.close()
        assert charged(disk / "ledger") == 5  # a reader needs no write
        with pytest.raises(DPBudgetError):
            next(iter(reopen(disk / "ledger").start(run.run_id, lease_steps=1)))
        lose(disk)
        check_resumed(disk / "ledger", steps)
        return len(steps)

    assert with_mounts(disk, work) == 5


def test_a_mount_that_is_lost_releases_nothing_more(disk: Path) -> None:
    def work() -> int:
        mount_memory(disk, 1 << 22)
        ledger, run = started(disk / "ledger")
        steps = [run.next_receipt().step for _ in range(5)]
        lose(disk)
        assert spend_until_it_fails(run) == []
        ledger._journal.close()
        assert list(disk.iterdir()) == []  # and nothing new was begun in the empty folder
        return len(steps)

    assert with_mounts(disk, work) == 5


def test_a_mount_that_is_lost_and_replaced_by_an_older_copy_releases_nothing_more(disk: Path) -> None:
    def work() -> int:
        mount_memory(disk, 1 << 22)
        ledger, run = started(disk / "ledger")
        older = (disk / "ledger").read_bytes()
        steps = [run.next_receipt().step for _ in range(5)]
        lose(disk)
        mount_memory(disk, 1 << 22)
        (disk / "ledger").write_bytes(older)
        assert spend_until_it_fails(run) == []
        ledger._journal.close()
        return len(steps)

    assert with_mounts(disk, work) == 5


def test_a_renamed_folder_releases_nothing_more_until_it_is_opened_anew(disk: Path) -> None:
    ledger, run = started(disk / "ledger")
    steps = [run.next_receipt().step for _ in range(5)]
    disk.rename(disk.with_name("moved"))
    assert spend_until_it_fails(run) == []
    ledger._journal.close()
    check_resumed(disk.with_name("moved") / "ledger", steps)


@pytest.fixture
def unprivileged() -> Iterator[tuple[int, Path]]:
    """A user for whom permissions hold, root or not, and a folder that it owns."""
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    folder = Path(tempfile.mkdtemp(prefix="dpbudget-"))
    os.chown(folder, user, -1)

    def reachable() -> bool:
        os.setuid(user)
        return all(os.access(place, os.W_OK | os.X_OK) for place in (folder, tempfile.gettempdir()))

    if not in_child(reachable):
        folder.rmdir()
        pytest.skip("the folder for temporary files is closed to other users")
    yield user, folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o500, 0o400, 0o000], ids=oct)
def test_a_folder_whose_permissions_are_withdrawn_mid_run_releases_nothing_more(
    unprivileged: tuple[int, Path], mode: int
) -> None:
    user, folder = unprivileged

    def work() -> int:
        os.setuid(user)
        ledger, run = started(folder / "ledger")
        steps = [run.next_receipt().step for _ in range(5)]
        folder.chmod(mode)
        assert spend_until_it_fails(run) == []
        ledger._journal.close()
        folder.chmod(0o700)
        check_resumed(folder / "ledger", steps)
        return len(steps)

    assert in_child(work) == 5


def test_a_file_whose_permissions_are_withdrawn_mid_run_is_charged_to_the_end(
    unprivileged: tuple[int, Path],
) -> None:
    """Permissions are asked at open: the run that has the file goes on, is charged, and nobody else begins one."""
    user, folder = unprivileged

    def work() -> int:
        os.setuid(user)
        ledger, run = started(folder / "ledger")
        steps = [run.next_receipt().step for _ in range(5)]
        (folder / "ledger").chmod(0o400)
        steps += [run.next_receipt().step for _ in range(5)]
        assert charged(folder / "ledger") == 10
        ledger._journal.close()
        with pytest.raises(DPBudgetError):
            reopen(folder / "ledger").start(run.run_id, lease_steps=1).next_receipt()
        (folder / "ledger").chmod(0o600)
        check_resumed(folder / "ledger", steps)
        return len(steps)

    assert in_child(work) == 10


# --- swapped under the lock (what test_ledger_sqlite.py moves between and after transactions) ------------------------


def swap_for_copy(path: Path) -> None:
    """An older copy takes the name, as a restore would."""
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def rename_and_begin_anew(path: Path) -> None:
    """The file moves away and another ledger takes its name."""
    make_ledger(path.with_name("new")).close()
    path.rename(path.with_name("moved"))
    path.with_name("new").rename(path)


def charged_in(folder: Path) -> int:
    """Steps charged in all ledgers of a folder."""
    states = [Ledger.open(path).state for path in folder.iterdir() if path.name in ("ledger", "moved")]
    return sum(run.charged for state in states for run in state.runs.values())


SWAPS = [swap_for_copy, rename_and_begin_anew]


@pytest.mark.parametrize("moment", ["_begin", "append"])
@pytest.mark.parametrize("swap", SWAPS)
def test_a_file_that_is_swapped_inside_a_transaction_takes_no_spend(
    tmp_path: Path, swap: Callable[[Path], None], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the lock was taken, and right before the commit, when SQLite itself looks no more."""
    path = tmp_path / "ledger"
    ledger, run = started(path)
    run.next_receipt()
    place = SqliteStore if moment == "_begin" else _SqliteTransaction
    act = getattr(place, moment)

    def act_and_swap(*args: Any, **options: Any) -> None:
        act(*args, **options)
        monkeypatch.undo()  # the new file is made without being swapped
        swap(path)

    monkeypatch.setattr(place, moment, act_and_swap)
    assert spend_until_it_fails(run) == []
    ledger._journal.close()
    assert charged_in(tmp_path) == 1


@pytest.mark.parametrize("swap", SWAPS)
def test_a_file_that_is_swapped_while_a_writer_waits_for_its_lock_takes_no_spend(
    tmp_path: Path, swap: Callable[[Path], None]
) -> None:
    path = tmp_path / "ledger"
    ledger, run = started(path)
    run.next_receipt()
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")

    def swap_and_let_go() -> None:
        swap(path)
        holder.execute("ROLLBACK")

    timer = threading.Timer(0.2, swap_and_let_go)
    timer.start()
    assert spend_until_it_fails(run) == []
    timer.join()
    holder.close()
    ledger._journal.close()
    assert charged_in(tmp_path) == 1


# --- forked workers --------------------------------------------------------------------------------------------------


def tried(act: Callable[[], Any]) -> str:
    try:
        act()
    except DPBudgetError as error:
        return error.code
    return "allowed"


def load_data(ledger: Ledger, run: Run, receipt: Receipt, asked: Any, answers: Any) -> None:
    """What a DataLoader's worker does, and then everything that it must not."""
    for index in iter(asked.get, None):
        answers.put(index * index)
    acts = (
        run.next_receipt,
        lambda: receipt.use("grad-noise"),
        ledger.refresh,
        lambda: ledger.start(run.run_id).next_receipt(),
    )
    answers.put([tried(act) for act in acts])
    run.close()
    ledger.close()


def test_workers_that_are_forked_after_the_ledger_was_opened_can_spend_nothing_and_disturb_nobody(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger"
    ledger, run = started(path, lease_steps=3)
    receipts = [run.next_receipt()]
    context = multiprocessing.get_context("fork")
    asked, answers = context.Queue(), context.Queue()
    workers = [context.Process(target=load_data, args=(ledger, run, receipts[0], asked, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for index in range(20):
        asked.put(index)
        assert answers.get(timeout=30) == index * index
        receipts.append(run.next_receipt())
    for _ in workers:
        asked.put(None)
    assert [answers.get(timeout=30) for _ in workers] == [["DP076"] * 4] * 2
    for worker in workers:
        worker.join()
        # A worker ends as programs do, with its copies of ledger and connection.
        assert worker.exitcode == 0
    receipts += [run.next_receipt() for _ in range(9)]
    assert [receipt.step for receipt in receipts] == list(range(30))
    assert receipts[-1].use("grad-noise") is not None
    ledger.close()
    assert charged(path) == 30
    for queue in (asked, answers):
        queue.close()
        queue.join_thread()
