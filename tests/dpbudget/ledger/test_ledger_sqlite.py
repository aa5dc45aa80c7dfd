"""The SQLite store: hostile files, torn files, failing disks, moved files. Whatever fails, nothing is released."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ledgerkit import OWNER, STRANGER, WRITER, lived_in_ledger, make_ledger, make_plan, reopen, snapshot_in

from dpbudget.errors import DPBudgetError, InvalidParameter, StorageFailed, Tampered, Unreadable
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.run import Run
from dpbudget.ledger.store import files
from dpbudget.ledger.store import sqlite as sqlite_store
from dpbudget.ledger.store.memory import MemoryStore
from dpbudget.ledger.store.reader import read_ledger
from dpbudget.ledger.store.sqlite import SCHEMA, SqliteStore


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    place = tmp_path_factory.mktemp("made") / "ledger"
    lived_in_ledger(place).close()
    return place.read_bytes()


@pytest.fixture
def path(tmp_path: Path, lived_in: bytes) -> Path:
    """A lived-in ledger, closed."""
    place = tmp_path / "ledger"
    files.create_private(place)
    place.write_bytes(lived_in)
    return place


def started(path: Path, steps: int = 20, **options: Any) -> tuple[Ledger, Run]:
    ledger = make_ledger(path)
    return ledger, ledger.start(ledger.sign_plan(make_plan(steps), owner=OWNER), **{"lease_steps": 1, **options})


def charged(path: Path) -> int:
    with Ledger.open(path, trust=OWNER.public) as ledger:
        return sum(run.charged for run in ledger.state.runs.values())


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_ledger_survives_closing_and_is_private(path: Path) -> None:
    made = path.with_name("made")
    lived_in_ledger(made).close()
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    with reopen(path) as ledger, Ledger.open(path, trust=OWNER.public) as read:
        assert ledger.durable
        assert not read.durable
        assert ledger.head == read.head
        assert ledger.state.tree == read.state.tree
    assert not path.with_name("ledger-journal").exists()


def test_the_connection_is_set_up_to_be_durable(path: Path) -> None:
    store = SqliteStore.open(path)
    values = {
        name: store._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "fullfsync", "trusted_schema", "cell_size_check")
    }
    assert values == {
        "journal_mode": "delete",
        "synchronous": 3,
        "fullfsync": 1,
        "trusted_schema": 0,
        "cell_size_check": 1,
    }
    store.close()


def test_an_existing_file_is_never_taken_over(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(InvalidParameter) as caught:
        make_ledger(path)
    assert caught.value.code == "DP074"
    assert path.read_bytes() == before


def test_a_ledger_is_not_made_beside_a_foreign_journal(tmp_path: Path) -> None:
    (tmp_path / "new-journal").write_bytes(b"x")
    with pytest.raises(Unreadable, match="left from another database"):
        make_ledger(tmp_path / "new")


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_what_is_not_a_path_is_refused(name: str) -> None:
    with pytest.raises(InvalidParameter):
        files.as_path(name)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="cannot create"):
        make_ledger(tmp_path / "missing" / "ledger")


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "fifo", "folder", "dangling"])
def test_what_is_not_a_plain_file_is_refused(path: Path, kind: str) -> None:
    other = path.with_name("other")
    if kind == "symlink":
        other.symlink_to(path)
    elif kind == "hardlink":
        os.link(path, other)
    elif kind == "fifo":
        os.mkfifo(other)
    elif kind == "folder":
        other.mkdir()
    else:
        other.symlink_to(path.with_name("nothing"))
    for open_it in (lambda: reopen(other), lambda: Ledger.open(other)):
        with pytest.raises(Unreadable) as caught:
            open_it()
        assert caught.value.code in ("DP083", "DP070")


def test_a_new_ledger_does_not_follow_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(InvalidParameter):
        make_ledger(tmp_path / "link")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/", "ext4"),
        ("/srv/a", "ext4"),
        ("/mnt/share", "nfs4"),
        ("/mnt/share/deep/er", "nfs4"),
        ("/mnt/shared", "ext4"),
        ("/with space/x", "fuse.sshfs"),
        ("/mnt/twice", "xfs"),
    ],
)
def test_the_mount_with_the_longest_name_decides(folder: str, kind: str) -> None:
    mounts = [
        "/dev/vda / ext4 rw 0 0",
        "server:/x /mnt/share nfs4 rw 0 0",
        "me@host: /with\\040space fuse.sshfs rw 0 0",
        "/dev/a /mnt/twice ext4 rw 0 0",
        "/dev/b /mnt/twice xfs rw 0 0",
        "broken",
    ]
    assert files.file_system_of(folder, mounts) == kind


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "ceph", "fuse.sshfs", "fuse.s3fs"])
def test_a_network_file_system_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.is_network(kind)
    monkeypatch.setattr(files, "file_system_of", lambda folder, mounts: kind)
    with pytest.raises(Unreadable, match=rf"network file system \({kind}\)") as caught:
        make_ledger(tmp_path / "ledger")
    assert caught.value.code == "DP083"
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "apfs", "fuseblk"])
def test_a_local_file_system_is_accepted(kind: str) -> None:
    assert not files.is_network(kind)


def test_the_writers_key_is_needed_to_write(path: Path) -> None:
    with pytest.raises(InvalidParameter) as caught:
        reopen(path, writer=OWNER)
    assert caught.value.code == "DP080"
    with Ledger.open(path) as ledger, pytest.raises(InvalidParameter, match="opened for reading"):
        ledger._journal.transact(lambda draft: None)


# --- hostile databases -----------------------------------------------------------------------------------------------


def edit(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON record BEGIN DELETE FROM record; END",
        "CREATE VIEW v AS SELECT * FROM record",
        "CREATE TABLE more (x)",
        "CREATE INDEX i ON record (line)",
        "ALTER TABLE record ADD COLUMN more",
        "DROP TABLE head",
        "ANALYZE",
        "PRAGMA user_version=2",
    ],
)
def test_a_database_with_another_schema_is_refused(path: Path, statement: str) -> None:
    edit(path, statement)
    for open_it in (lambda: reopen(path), lambda: Ledger.open(path)):
        with pytest.raises(Unreadable, match="unexpected database schema") as caught:
            open_it()
        assert caught.value.code == "DP083"


def test_a_foreign_database_is_not_a_ledger(tmp_path: Path) -> None:
    edit(tmp_path / "other", "CREATE TABLE t (x)")
    for open_it in (lambda: reopen(tmp_path / "other"), lambda: Ledger.open(tmp_path / "other")):
        with pytest.raises(Unreadable, match="not a dpbudget ledger"):
            open_it()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM record WHERE seq = 5",
        "DELETE FROM record WHERE seq = (SELECT max(seq) FROM record)",
        "DELETE FROM record",
        "UPDATE record SET seq = -1 WHERE seq = 0",
        "UPDATE record SET line = substr(line, 2) WHERE seq = 4",
        "UPDATE record SET line = CAST(line AS TEXT) WHERE seq = 4",
        "UPDATE record SET line = 7 WHERE seq = 4",
        "UPDATE record SET envelope = x'00' WHERE seq = 4",
        "UPDATE record SET envelope = NULL WHERE seq = 0",
        "UPDATE record SET line = (SELECT line FROM record WHERE seq = 5) WHERE seq = 4",
        "INSERT INTO record SELECT max(seq) + 1, line, envelope FROM record",
        "DELETE FROM head",
        "DELETE FROM head WHERE size = (SELECT max(size) FROM head)",
        "UPDATE head SET note = x'00'",
        "UPDATE head SET note = 'text'",
    ],
)
def test_rows_edited_by_the_owner_of_the_file_are_noticed(path: Path, statement: str) -> None:
    edit(path, statement)
    for open_it in (lambda: reopen(path), lambda: Ledger.open(path)):
        with pytest.raises(Tampered):
            open_it()


def test_overwritten_bytes_are_noticed_or_were_unused(path: Path) -> None:
    data, whole, noticed = path.read_bytes(), read_ledger(path), 0
    for offset in range(0, len(data), 331):
        path.write_bytes(data[:offset] + os.urandom(8) + data[offset + 8 :])
        try:
            with Ledger.open(path, trust=OWNER.public) as ledger:
                assert snapshot_in(ledger).entries == whole.entries
        except (Tampered, Unreadable):
            noticed += 1
    assert noticed > len(data) // 331 // 3


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for size in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:size])
        for open_it in (lambda: reopen(path), lambda: Ledger.open(path)):
            with pytest.raises((Tampered, Unreadable)):
                open_it()


# --- crashes ---------------------------------------------------------------------------------------------------------

CRASH = """
import os, sys, sqlite3
sys.path[:0] = {paths!r}
from ledgerkit import *
ledger = reopen(__import__("pathlib").Path({path!r}))
connection = ledger._journal.store._connection
connection.execute("PRAGMA cache_size=1")       # spill dirty pages into the file before the commit
connection.execute("PRAGMA cache_spill=1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE record SET envelope = zeroblob(9000)")
os.kill(os.getpid(), 9)
"""


def crash(path: Path) -> None:
    """Leave a hot journal beside the file, as a power cut in the middle of a commit would."""
    here = Path(__file__).resolve()
    program = CRASH.format(paths=[str(here.parents[3]), str(here.parent)], path=str(path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr


def test_a_torn_commit_is_rolled_back_and_a_reader_writes_nothing(path: Path) -> None:
    whole, before = path.read_bytes(), Ledger.open(path).head
    crash(path)
    journal = path.with_name("ledger-journal")
    torn, saved = path.read_bytes(), journal.read_bytes()
    assert torn != whole  # pages of the dead transaction are in the file
    with Ledger.open(path, trust=OWNER.public) as ledger:
        assert ledger.head == before
    assert path.read_bytes() == torn
    assert journal.read_bytes() == saved
    with reopen(path) as ledger:
        assert ledger.head == before
    assert not journal.exists()


def test_a_torn_file_without_its_journal_is_refused(path: Path) -> None:
    crash(path)
    path.with_name("ledger-journal").unlink()
    for open_it in (lambda: reopen(path), lambda: Ledger.open(path)):
        with pytest.raises((Tampered, Unreadable)):
            open_it()


def test_a_journal_that_names_a_second_file_is_refused(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path.with_name("ledger-journal").write_bytes(bytes(512) + bytes.fromhex("d9d505f920a163d7"))
    for open_it in (lambda: reopen(path), lambda: Ledger.open(path)):
        with pytest.raises(Unreadable, match="several databases"):
            open_it()
    assert victim.read_bytes() == b"precious"


def test_a_journal_that_is_a_link_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    path.with_name("ledger-journal").symlink_to(tmp_path / "elsewhere")
    for open_it in (lambda: reopen(path), lambda: Ledger.open(path)):
        with pytest.raises(Unreadable, match="not a regular file"):
            open_it()
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_a_reader_in_the_same_process_does_not_drop_the_writers_locks(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger, run = started(path)
    probe = f"""
import sqlite3, sys
connection = sqlite3.connect({str(path)!r}, timeout=0, isolation_level=None)
try:
    connection.execute("BEGIN IMMEDIATE")
except sqlite3.OperationalError:
    sys.exit(3)
"""
    read: list[int] = []
    reader = threading.Thread(target=lambda: read.append(len(read_ledger(path).entries)))
    with ledger._journal.store.transaction():
        reader.start()
        # POSIX drops a process's locks on a file when it closes any descriptor of it, so no reader may open one.
        assert subprocess.run([sys.executable, "-c", probe], timeout=60).returncode == 3
    reader.join()
    assert read == [ledger.state.size]
    assert run.next_receipt().step == 0
    ledger.close()


# --- failing storage -------------------------------------------------------------------------------------------------


class FailingConnection:
    """Passes everything on but one statement, which raises; before or after it took effect."""

    def __init__(self, connection: sqlite3.Connection, statement: str, error: Exception, *, after: bool) -> None:
        self._connection, self._statement, self._error, self._after = connection, statement, error, after
        self.attempts = 0

    def execute(self, statement: str, *arguments: Any) -> Any:
        if statement.startswith(self._statement):
            self.attempts += 1
            if self._after:
                self._connection.execute(statement, *arguments)
            raise self._error
        return self._connection.execute(statement, *arguments)

    def executemany(self, statement: str, rows: Any) -> Any:
        if statement.startswith(self._statement):
            self.attempts += 1
            raise self._error
        return self._connection.executemany(statement, rows)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


FAULTS = [
    ("COMMIT", sqlite3.OperationalError("database or disk is full")),
    ("COMMIT", sqlite3.OperationalError("disk I/O error")),
    ("COMMIT", sqlite3.OperationalError("attempt to write a readonly database")),
    ("COMMIT", OSError(28, "No space left on device")),
    ("INSERT INTO record", sqlite3.OperationalError("database or disk is full")),
    ("INSERT INTO head", sqlite3.OperationalError("disk I/O error")),
    ("BEGIN IMMEDIATE", sqlite3.OperationalError("attempt to write a readonly database")),
    ("BEGIN IMMEDIATE", sqlite3.DatabaseError("database disk image is malformed")),
    ("SELECT seq", sqlite3.DatabaseError("database disk image is malformed")),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("statement", "error"), FAULTS, ids=[f"{s}-{e}" for s, e in FAULTS])
def test_a_failed_write_releases_nothing_and_is_never_tried_again(
    tmp_path: Path, statement: str, error: Exception, after: bool
) -> None:
    path = tmp_path / "ledger"
    ledger, run = started(path)
    released = [run.next_receipt()]
    store: Any = ledger._journal.store
    failing = FailingConnection(store._connection, statement, error, after=after)
    store._connection = failing
    with pytest.raises(StorageFailed) as caught:
        released.append(run.next_receipt())
    assert caught.value.code == "DP075"
    store._connection = failing._connection  # the disk is well again, which does not help
    for act in (run.next_receipt, lambda: ledger.sign_plan(make_plan(), owner=OWNER), run.close):
        with pytest.raises(StorageFailed, match="refuses to go on"):
            act()
    assert failing.attempts == 1
    ledger.close()
    assert charged(path) >= len(released) == 1
    with reopen(path) as again:  # a new handle goes on behind whatever is on disk
        assert again.start(run.run_id).next_receipt().step == charged(path) - 1


def test_a_limit_on_the_size_of_files_stops_before_release(tmp_path: Path) -> None:
    """A real short write: the kernel refuses to let the file grow."""
    here = Path(__file__).resolve()
    program = f"""
        import resource, signal, sys
        sys.path[:0] = {[str(here.parents[3]), str(here.parent)]!r}
        from pathlib import Path
        from ledgerkit import *
        from dpbudget.errors import StorageFailed
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = Path({str(tmp_path / "ledger")!r})
        ledger = make_ledger(path)
        run = ledger.start(ledger.sign_plan(make_plan(500), owner=OWNER), lease_steps=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20000,) * 2)
        released = 0
        try:
            for receipt in run:
                released += 1
        except StorageFailed as error:
            print(released, error.code)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    released, code = done.stdout.split()
    assert code == "DP075"
    assert 0 < int(released) <= charged(tmp_path / "ledger") < 500


def test_a_lock_held_elsewhere_is_reported_and_can_be_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger, run = started(path)
    store: Any = ledger._journal.store
    store._connection.execute("PRAGMA busy_timeout=50")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageFailed, match="holds the lock"):
        run.next_receipt()
    other.execute("ROLLBACK")
    other.close()
    assert run.next_receipt().step == 0
    ledger.close()


def rename(path: Path) -> None:
    path.rename(path.with_name("moved"))


def replace(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def remove(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    os.link(path, path.with_name("second"))


@pytest.mark.parametrize("move", [rename, replace, remove, link])
def test_a_file_that_is_moved_under_an_open_ledger_poisons_it(tmp_path: Path, move: Callable[[Path], None]) -> None:
    path = tmp_path / "ledger"
    ledger, run = started(path)
    run.next_receipt()
    move(path)
    for _ in range(2):
        with pytest.raises(StorageFailed):
            run.next_receipt()
    ledger._journal.close()


def test_a_file_that_is_moved_during_a_commit_releases_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger, run = started(path)
    store: Any = ledger._journal.store
    commit = store._commit

    def commit_and_move() -> None:
        commit()
        rename(path)

    store._commit = commit_and_move
    with pytest.raises(StorageFailed, match="renamed or replaced"):
        run.next_receipt()
    ledger._journal.close()


def test_a_refused_draft_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    ledger, run = started(tmp_path / "ledger")
    before = ledger.head
    with pytest.raises(Tampered, match="no open lease"):
        ledger._journal.transact(lambda draft: draft.add("reserve", run=run.run_id, step=3, count=1))
    assert ledger.refresh().size == before.size
    assert run.next_receipt().step == 0  # nothing was poisoned
    ledger.close()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_ledger_in_memory_says_that_it_is_not_durable() -> None:
    ledger = make_ledger()
    assert not ledger.durable
    assert "not durable" in str(sys.modules[MemoryStore.__module__].__doc__)
    store = MemoryStore()
    store.close()
    with pytest.raises(StorageFailed), store.transaction():
        pass


def test_the_schema_is_pinned() -> None:
    assert dict(SCHEMA) == {
        "head": "CREATE TABLE head (size INTEGER PRIMARY KEY, keep INTEGER NOT NULL, note BLOB NOT NULL)",
        "record": "CREATE TABLE record (seq INTEGER PRIMARY KEY, line BLOB NOT NULL, envelope BLOB)",
    }


def test_a_failed_creation_leaves_nothing_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SqliteStore) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(SqliteStore, "_commit", fail)
    with pytest.raises(StorageFailed):
        make_ledger(tmp_path / "ledger")
    monkeypatch.undo()
    with pytest.raises(DPBudgetError):
        Ledger.open(tmp_path / "ledger", writer=WRITER)


def test_a_refused_open_leaves_no_lock_behind_while_its_exception_lives(tmp_path: Path) -> None:
    """A notebook keeps the last exception, and with it the frames; their queries must not keep the file locked."""
    path = tmp_path / "ledger"
    with make_ledger(path) as ledger:
        ledger.sign_plan(make_plan(), owner=OWNER)
        with pytest.raises(Tampered) as kept:
            Ledger.open(path, writer=WRITER, trust=STRANGER.public)
        store = ledger._journal.store
        assert isinstance(store, SqliteStore)
        store._connection.execute("PRAGMA busy_timeout=200")
        ledger.note("checked")
    assert kept.value.code == "DP072"


def test_a_schema_that_is_no_text_is_no_ledger(tmp_path: Path) -> None:
    """Found by fuzzing: a name in the schema that is not UTF-8."""
    path = tmp_path / "ledger"
    make_ledger(path).close()
    data = path.read_bytes()
    for at in (data.index(b"CREATE TABLE head") + 13, data.index(b"CREATE TABLE record")):
        path.write_bytes(data[:at] + b"\xc4\xff" + data[at + 2 :])
        for open_it in (lambda: reopen(path), lambda: Ledger.open(path)):
            with pytest.raises((Unreadable, Tampered)):
                open_it()


@pytest.mark.parametrize("name", ["plan", "run_id"])
def test_nobody_puts_another_plan_into_a_run(name: str) -> None:
    ledger = make_ledger()
    run = ledger.start(ledger.sign_plan(make_plan(), owner=OWNER))
    with pytest.raises(AttributeError):
        setattr(run, name, make_plan(9))


def test_a_copy_made_before_the_close_is_an_older_one(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    with make_ledger(path) as ledger:
        run = ledger.start(ledger.sign_plan(make_plan(), owner=OWNER))
        run.next_receipt()
        copy.write_bytes(path.read_bytes())
        for _ in run:
            pass
    path.write_bytes(copy.read_bytes())
    with pytest.raises(Tampered, match="it is an older one"):
        reopen(path)


def test_a_reader_that_keeps_a_commit_waiting_costs_the_spend_and_not_the_handle(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    with make_ledger(path) as ledger:
        run_id = ledger.sign_plan(make_plan(), owner=OWNER)
    store = SqliteStore.open(path, busy_seconds=0.1)
    with store.reading() as reading:
        size = len(list(reading.entries()))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM record").fetchone()  # a long export in another process

    def append() -> None:
        with store.transaction() as transaction:
            transaction.append([Entry(b"x")], b"note", size=size + 1, keep=True)

    with pytest.raises(StorageFailed, match="another process holds the lock"):
        append()
    other.execute("ROLLBACK")
    with store.reading() as reading:
        assert len(list(reading.entries())) == size
    store.close()
    other.close()
    with reopen(path) as again, again.start(run_id) as run:
        assert run.next_receipt().step == 0


def test_a_journal_that_its_writer_is_removing_right_now_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lstat may find the last name of a file just as it goes: no link is left, and that is no second name."""
    path = tmp_path / "ledger"
    make_ledger(path).close()
    journal = tmp_path / "ledger-journal"
    journal.write_bytes(b"")
    real = os.lstat

    def lstat(place: str | os.PathLike[str]) -> os.stat_result:
        found = real(place)
        return os.stat_result((*found[:3], 0, *found[4:])) if Path(place) == journal else found

    monkeypatch.setattr("dpbudget.ledger.store.files.os.lstat", lstat)
    sqlite_store.refuse_super_journal(journal)
    with pytest.raises(Unreadable, match="being removed"):
        files.identity(journal)
