"""The high-water mark: an older copy, and a second one, are refused on the machine that saw more."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from ledgerkit import OWNER, make_ledger, make_plan, reopen

from dpbudget.errors import Tampered
from dpbudget.ledger.entries import build
from dpbudget.ledger.head import Head
from dpbudget.ledger.high_water import HighWater, state_folder
from dpbudget.ledger.journal import Journal
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.store.reader import read_ledger
from dpbudget.ledger.store.sqlite import _SqliteTransaction


def signed(path: Path) -> str:
    with make_ledger(path) as ledger:
        return ledger.sign_plan(make_plan(8), owner=OWNER)


def spend(path: Path, run_id: str, steps: int) -> None:
    with reopen(path) as ledger, ledger.start(run_id, lease_steps=1) as run:
        for _ in range(steps):
            run.next_receipt()


def test_an_old_ledger_restored_from_backup_is_refused(tmp_path: Path) -> None:
    path, backup = tmp_path / "ledger", tmp_path / "backup"
    run_id = signed(path)
    spend(path, run_id, 1)
    shutil.copy(path, backup)
    spend(path, run_id, 3)
    shutil.copy(backup, path)
    with pytest.raises(Tampered, match=r"has seen \d+ records of the ledger, and this copy has \d+") as caught:
        reopen(path)
    assert caught.value.code == "DP079"
    assert str(state_folder()) in caught.value.hint


def test_of_two_copies_that_both_spent_the_second_is_refused(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    run_id = signed(path)
    shutil.copy(path, copy)
    spend(path, run_id, 1)
    with reopen(copy, high_water=False) as other, other.start(run_id, lease_steps=1) as run:
        for _ in range(3):
            run.next_receipt()
    with pytest.raises(Tampered, match="another history"):
        reopen(copy)
    reopen(path).close()


def test_a_reader_is_not_refused_since_it_spends_nothing(tmp_path: Path) -> None:
    path, backup = tmp_path / "ledger", tmp_path / "backup"
    run_id = signed(path)
    shutil.copy(path, backup)
    spend(path, run_id, 2)
    with Ledger.open(backup, trust=OWNER.public) as ledger:
        assert ledger.state.runs[run_id].charged == 0


def test_the_mark_holds_size_and_root_and_nothing_else(tmp_path: Path) -> None:
    with make_ledger(tmp_path / "ledger") as ledger:
        (mark,) = (state_folder() / "heads").iterdir()
        assert mark.name == ledger.id
        assert mark.read_text() == f"{ledger.head.size:016d}:{ledger.head.root}\n"
        assert mark.stat().st_mode & 0o077 == 0


def test_a_mark_that_cannot_be_read_or_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "no folder"
    place.write_text("a file where the folder would be")
    monkeypatch.setenv("DPBUDGET_STATE", str(place))
    run_id = signed(tmp_path / "ledger")
    spend(tmp_path / "ledger", run_id, 2)
    assert HighWater.of_user() is not None
    assert HighWater(place).known("00" * 32) is None


def test_a_damaged_mark_counts_as_absent(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    run_id = signed(path)
    (mark,) = (state_folder() / "heads").iterdir()
    for content in (b"", b"\xff\xfe", b"12:abc\n", b"12:" + b"00" * 32 + b"\n", b"x" * 4096):
        mark.write_bytes(content)
        reopen(path).close()
    before = reopen(path).state.size
    spend(path, run_id, 1)
    marks = HighWater.of_user()
    assert marks is not None
    known = marks.known(mark.name)
    assert known is not None
    assert known[0] > before


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert state_folder() == Path(os.environ["DPBUDGET_STATE"])
    monkeypatch.delenv("DPBUDGET_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "dpbudget"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_folder() == Path.home() / ".local" / "state" / "dpbudget"


def test_a_copy_that_was_opened_before_the_ledger_went_on_spends_nothing_more(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    run_id = signed(path)
    shutil.copy(path, copy)
    with reopen(copy) as other:
        spend(path, run_id, 3)
        size = other.state.size
        with pytest.raises(Tampered, match="it is an older one") as caught:
            other.start(run_id, lease_steps=1).next_receipt()
        assert caught.value.code == "DP079"
        assert len(read_ledger(copy).entries) == size
    reopen(path).close()  # the true ledger is still accepted: the copy did not lower the mark


def test_of_two_copies_that_are_open_at_once_the_second_to_spend_is_refused(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    run_id = signed(path)
    shutil.copy(path, copy)
    with reopen(path) as true, reopen(copy) as other:
        first, second = true.start(run_id, lease_steps=1), other.start(run_id, lease_steps=1)
        first.next_receipt()
        with pytest.raises(Tampered):
            second.next_receipt()
        assert first.next_receipt().step == 1


def test_a_slower_process_does_not_lower_the_mark(tmp_path: Path) -> None:
    marks = HighWater(tmp_path / "heads")
    ledger_id, older, newer = "ab" * 32, head_of(5, "01"), head_of(7, "02")
    marks.raise_to(ledger_id, newer)
    marks.raise_to(ledger_id, older)
    assert marks.known(ledger_id) == (7, "02" * 32)


@pytest.mark.parametrize("first", ["lease", "two notes"])
@pytest.mark.parametrize("second", ["lease", "two notes"])
def test_of_two_copies_that_were_checked_at_the_same_moment_one_releases_nothing(
    first: str, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever remembers its head second meets the mark of the other, be it smaller, equal or larger."""
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    run_id = signed(path)
    shutil.copy(path, copy)
    monkeypatch.setattr(Journal, "_new_mark", lambda journal: None)  # neither has seen the other yet

    def go_on(ledger: Ledger, how: str, event: str) -> None:
        if how == "lease":
            ledger.start(run_id, lease_steps=1).next_receipt()
        else:
            ledger._journal.transact(lambda draft: [draft.add("note", event=event) for _ in range(2)])

    with reopen(path) as true, reopen(copy) as other:
        go_on(true, first, "checked")
        with pytest.raises(Tampered) as caught:
            go_on(other, second, "published")
        assert caught.value.code == "DP079"


def test_a_mark_that_can_be_read_and_not_written_costs_no_second_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger"
    run_id = signed(path)
    starts: list[int] = []
    read = _SqliteTransaction.read
    monkeypatch.setattr(_SqliteTransaction, "read", lambda self, start: starts.append(start) or read(self, start))
    monkeypatch.setattr(HighWater, "_raise", lambda marks, ledger_id, mark: None)
    with reopen(path) as ledger, ledger.start(run_id, lease_steps=1) as run:
        for _ in range(5):
            run.next_receipt()
    assert len(starts) >= 5
    assert 0 not in starts


def test_a_mark_whose_lock_is_held_for_ever_stops_nothing(tmp_path: Path) -> None:
    marks = HighWater(tmp_path / "heads")
    marks.raise_to("ab" * 32, head_of(5, "01"))
    with open(tmp_path / "heads" / ("ab" * 32), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        marks.raise_to("ab" * 32, head_of(6, "02"))
    assert marks.known("ab" * 32) == (5, "01" * 32)


def test_processes_that_take_turns_read_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark of another process lies between what this one knew and what it knows now."""
    path = tmp_path / "ledger"
    run_id = signed(path)
    starts: list[int] = []
    read = _SqliteTransaction.read
    monkeypatch.setattr(_SqliteTransaction, "read", lambda self, start: starts.append(start) or read(self, start))
    with reopen(path) as first, reopen(path) as second:
        runs = [ledger.start(run_id, lease_steps=1) for ledger in (first, second)]
        for _ in range(3):
            for run in runs:
                run.next_receipt()
    assert starts
    assert 0 not in starts


def test_a_history_without_its_writers_head_teaches_nothing(tmp_path: Path) -> None:
    """Records that somebody appended without the key are refused, and marks are not judged by their roots."""
    path = tmp_path / "ledger"
    run_id = signed(path)
    with reopen(path) as ledger:
        ledger.start(run_id, lease_steps=1).next_receipt()
        size = ledger.state.size
        line = build("note", seq=size, prev=ledger.state.last, event="checked")
        with sqlite3.connect(path) as other:
            other.execute("INSERT INTO record (seq, line, envelope) VALUES (?, ?, NULL)", (size, line))
        other.close()
        with pytest.raises(Tampered, match="the signed head covers"):
            ledger.refresh()
        assert size + 1 not in ledger._journal._roots
        other = sqlite3.connect(path)
        other.execute("DELETE FROM record WHERE seq = ?", (size,))
        other.commit()
        other.close()
        assert ledger.refresh().size == size


def test_a_mark_raised_late_is_looked_up_in_the_whole_history(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    run_id = signed(path)
    with reopen(path) as ledger, ledger.start(run_id, lease_steps=1) as run:
        run.next_receipt()
        mark = state_folder() / "heads" / ledger.id
        mark.write_text(f"{1:016d}:{ledger.id}\n")  # a root of one record is the hash of its leaf
        run.next_receipt()
        mark.write_text(f"{1:016d}:{'00' * 32}\n")
        with pytest.raises(Tampered, match="another history"):
            run.next_receipt()
        mark.unlink()


def head_of(size: int, byte: str) -> Head:
    return Head(size, byte * 32, "")
