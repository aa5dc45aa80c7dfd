"""Files that another program bent: WAL mode, values larger than any ledger's, one value many times."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ledgerkit import OWNER, make_ledger, make_plan, reopen

from dpbudget.errors import ReceiptSpent, StorageFailed, Tampered, Unreadable
from dpbudget.ledger.store import reader, sqlite
from dpbudget.ledger.store.reader import read_ledger

TO_WAL = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
assert connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
connection.execute("SELECT count(*) FROM record").fetchone()
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def opened_in_wal_mode(path: Path) -> Iterator[None]:
    """Another process, such as a database browser, that turned the file to WAL and still has it open."""
    with subprocess.Popen([sys.executable, "-c", TO_WAL, str(path)], stdin=-1, stdout=-1) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        yield
        other.stdin.close()


def test_a_ledger_turned_to_wal_under_a_run_releases_nothing_more(tmp_path: Path) -> None:
    # Spends would go into a log that readers do not copy, and verify would find an older, valid ledger.
    path = tmp_path / "ledger"
    ledger = make_ledger(path)
    run = ledger.start(ledger.sign_plan(make_plan(4), owner=OWNER), lease_steps=1)
    run.next_receipt()
    with opened_in_wal_mode(path):
        with pytest.raises(StorageFailed, match="journal mode wal"):
            run.next_receipt()
        with pytest.raises(StorageFailed, match="refuses to go on"):
            run.next_receipt()
        ledger._journal.close()
        with pytest.raises(Unreadable, match="WAL mode") as caught:
            read_ledger(path)
        assert caught.value.code == "DP083"
        with pytest.raises(Unreadable, match="WAL mode"):
            reopen(path)


def test_a_ledger_in_wal_mode_without_its_log_is_refused_until_it_is_turned_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    make_ledger(path).close()
    with opened_in_wal_mode(path):
        pass
    (tmp_path / "ledger-wal").unlink(missing_ok=True)
    with pytest.raises(Unreadable, match="WAL mode"):
        read_ledger(path)
    with pytest.raises(Unreadable, match="journal wal") as caught:
        reopen(path)
    assert "journal_mode=DELETE" in caught.value.hint
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()
    with reopen(path) as ledger:
        assert ledger.state.size == 2


def test_a_log_beside_a_new_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger-wal").write_bytes(b"")
    with pytest.raises(Unreadable, match="left from another database"):
        make_ledger(tmp_path / "ledger")


def test_a_value_larger_than_any_of_a_ledger_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    make_ledger(path).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE record SET envelope = zeroblob(40000000) WHERE seq = 1")
    connection.commit()
    connection.close()
    with pytest.raises(Tampered, match="too big"):
        read_ledger(path)


@pytest.mark.parametrize("table", ["record", "head"])
def test_a_database_that_holds_more_than_its_size_is_refused(
    tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Cells of a crafted file may share their overflow pages, so that a small file reads as terabytes.
    path = tmp_path / "ledger"
    with make_ledger(path) as ledger:
        ledger.sign_plan(make_plan(4), owner=OWNER)
    connection = sqlite3.connect(path)
    if table == "head":
        connection.execute("INSERT INTO head VALUES (99, 1, zeroblob(30000))")
    else:
        connection.execute("UPDATE record SET envelope = zeroblob(30000) WHERE seq = 2")
    connection.commit()
    connection.close()
    monkeypatch.setattr(sqlite, "MAX_TOTAL_BYTES", 20_000)
    with pytest.raises(Tampered, match=rf"{table}s hold more than 20000 bytes"):
        reader.read_ledger(path)


def test_a_ledger_whose_last_write_fails_still_closes_every_run_and_erases_its_keys(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger")
    runs = [ledger.start(ledger.sign_plan(make_plan(4), owner=OWNER), lease_steps=4) for _ in range(2)]
    receipts = [run.next_receipt() for run in runs]
    (tmp_path / "ledger").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageFailed):
        ledger.close()
    assert [run.closed for run in runs] == [True, True]
    for receipt in receipts:
        with pytest.raises(ReceiptSpent, match="erased"):
            receipt.use("grad-noise")
    ledger.close()


def test_the_error_in_a_ledgers_block_is_not_hidden_by_a_failing_close(tmp_path: Path) -> None:
    def block() -> None:
        with make_ledger(tmp_path / "ledger") as ledger:
            run = ledger.start(ledger.sign_plan(make_plan(4), owner=OWNER))
            run.next_receipt()
            (tmp_path / "ledger").rename(tmp_path / "elsewhere")
            raise KeyError("what went wrong")

    with pytest.raises(KeyError):
        block()
