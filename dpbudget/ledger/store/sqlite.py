"""The default store: one SQLite file, one machine, many processes.

Rollback journal with synchronous=EXTRA: a commit returns after pages, the journal's removal and the folder are synced.
WAL is not used: before SQLite 3.51.3 it can corrupt a file that several connections write.
"""

from __future__ import annotations

import os
import sqlite3
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from dpbudget.errors import StorageFailed, Tampered, Unreadable
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.store import files
from dpbudget.ledger.store.bound import BoundStore, live_stores

#: "dpbl", so that file(1) and a reader can tell a ledger from any other database.
APPLICATION_ID = 0x6470626C
SCHEMA_VERSION = 1
SCHEMA = (
    ("head", "CREATE TABLE head (size INTEGER PRIMARY KEY, keep INTEGER NOT NULL, note BLOB NOT NULL)"),
    ("record", "CREATE TABLE record (seq INTEGER PRIMARY KEY, line BLOB NOT NULL, envelope BLOB)"),
)
MAGIC = b"SQLite format 3\0"
#: A journal that ends so names a second file, which SQLite would open and might delete.
_SUPER_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
#: A ledger has no value of more bytes than this, and together not more than its file; overlapping cells of a crafted
#: file could otherwise name the same bytes a million times.
_MAX_VALUE_BYTES, MAX_TOTAL_BYTES = 2 << 20, 1 << 30
_LEAVE_WAL = 'close what has it open, then run: sqlite3 LEDGER "PRAGMA journal_mode=DELETE"'


def _close_in_owner(connection: sqlite3.Connection, folder: int, pid: int) -> None:
    # In a forked child, closing could roll back a transaction that the parent is in.
    if os.getpid() == pid:
        with suppress(sqlite3.Error):
            connection.close()
        os.close(folder)


class SqliteStore(BoundStore):
    """An open ledger file for reading and writing; use :meth:`create` or :meth:`open`.

    Every failure of a write or a sync, and a file that was renamed or replaced, poisons the handle: from then on
    everything raises :class:`StorageFailed` (DP075).
    """

    durable = True

    def __init__(self, path: Path, connection: sqlite3.Connection, identity: tuple[int, int]) -> None:
        super().__init__(str(path))
        self.path = path
        self._connection = connection
        self._identity = identity
        self._transaction: _SqliteTransaction | None = None
        try:
            # Open from the start: see _sync_folder().
            self._folder = files.open_folder(path.parent)
        except Unreadable:
            connection.close()
            raise
        # A ledger that nobody closed: every commit was synced, so this only spares the warning of Python 3.13. The
        # finalizer holds the connection, which therefore outlives the store in any order of collection.
        self._close = weakref.finalize(self, _close_in_owner, connection, self._folder, os.getpid())

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, busy_seconds: float = 30.0) -> SqliteStore:
        """A new, empty ledger file of mode 0600; an existing name is refused (DP074)."""
        place = files.as_path(path)
        files.refuse_network_file_system(place)
        for left in (journal_of(place), wal_of(place)):
            if os.path.lexists(left):
                raise Unreadable(f"{left} is left from another database", code="DP083", hint="remove it")
        files.create_private(place)
        store = cls(place, _connect(place, busy_seconds), files.identity(place))
        try:
            connection = store._connection
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            connection.execute("BEGIN IMMEDIATE")
            for _, statement in SCHEMA:
                connection.execute(statement)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            store.close()
            raise StorageFailed(f"cannot write {place}: {error}") from None
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, busy_seconds: float = 30.0) -> SqliteStore:
        """An existing ledger file; a crash's journal is rolled back, as SQLite does on the first read.

        Raises:
            Unreadable: missing or not a ledger (DP070), a link, a network file system or a foreign schema (DP083).
        """
        place = files.as_path(path)
        before = files.identity(place)
        files.refuse_network_file_system(place)
        refuse_super_journal(journal_of(place))
        refuse_wal(place)
        connection = _connect(place, busy_seconds)
        try:
            check_schema(connection, place)
        except BaseException:
            connection.close()
            raise
        if files.identity(place) != before:
            connection.close()
            raise Unreadable(f"{place} was replaced while it was opened", code="DP083")
        return cls(place, connection, before)

    @contextmanager
    def transaction(self) -> Iterator[_SqliteTransaction]:
        """BEGIN IMMEDIATE to COMMIT; durable when the context ends without an exception."""
        with self._lock:
            self._check_alive()
            self._refuse_reentry()
            try:
                # Inside, so that an interrupt right after BEGIN gives the lock back.
                self._begin()
                # No try statement in here: CPython 3.11 leaves its first instruction out of the one around it.
                self._transaction = transaction = _SqliteTransaction(self._connection)
                yield transaction
                transaction.close()
                self._check_in_place()
                self._commit()
                if transaction.wrote:
                    self._sync_folder()
                self._check_in_place()
            except StorageFailed:
                self._roll_back()
                raise
            except (sqlite3.Error, OSError) as error:
                self._roll_back()
                if isinstance(error, sqlite3.Error) and not self._inside:
                    # A reader kept the commit waiting for too long: SQLite wrote nothing, and the next one may go on.
                    refuse_busy(error, self.path)
                self._poison = f"{type(error).__name__}: {error}"
                raise StorageFailed(
                    f"{self.path}: {error}; the spend may or may not be on disk, and nothing was released",
                    hint="see to the disk, then open the ledger in a new process",
                ) from error
            except BaseException:
                # Nothing was written yet, or the rules refused it: the file is as it was.
                self._roll_back()
                raise

    @contextmanager
    def reading(self) -> Iterator[SqliteReading]:
        """Everything, read in one transaction."""
        with self._lock:
            self._check_alive()
            self._refuse_reentry()
            try:
                self._connection.execute("BEGIN")
                reading = SqliteReading(self._connection)
                try:
                    yield reading
                finally:
                    reading.close()
                    self._connection.execute("ROLLBACK")
            except sqlite3.Error as error:
                refuse_busy(error, self.path)
                raise Tampered(f"{self.path} is damaged: {error}") from None

    def close(self) -> None:
        """Close the connection; harmless when repeated, and left alone in a forked child."""
        with self._lock:
            self._close()
        self._poison = self._poison or "the store is closed"

    def _begin(self) -> None:
        try:
            self._check_in_place()
            self._connection.execute("BEGIN IMMEDIATE")
            mode = self._connection.execute("PRAGMA journal_mode").fetchone()[0]
        except sqlite3.Error as error:
            refuse_busy(error, self.path)
            self._poison = f"{type(error).__name__}: {error}"
            raise StorageFailed(f"{self.path}: {error}; nothing was released") from error
        if mode != "delete":
            # What is spent into a write-ahead log is missing from the file that readers copy.
            self._poison = f"another program turned the file to journal mode {mode}"
            raise StorageFailed(f"{self.path}: {self._poison}; nothing was released", hint=_LEAVE_WAL)

    def _commit(self) -> None:
        self._connection.execute("COMMIT")

    def _sync_folder(self) -> None:
        # SQLite syncs the folder after it made the journal and ignores whether that worked; it opens the folder anew
        # each time, so no later sync of its own hears of it. A descriptor that was open all the while does: Linux
        # reports a failed write-back once to each.
        os.fsync(self._folder)

    def _roll_back(self) -> None:
        if self._transaction is not None:
            self._transaction.close()
        with suppress(sqlite3.Error):
            if self._inside:
                self._connection.execute("ROLLBACK")

    @property
    def _inside(self) -> bool:
        try:
            return self._connection.in_transaction
        except sqlite3.ProgrammingError:  # closed by a signal handler
            return False

    def _refuse_reentry(self) -> None:
        # A signal handler of this thread: the lock lets it in, and its rollback would undo the spend that it came into.
        if self._inside:
            raise StorageFailed(
                f"{self.path} was used again in the middle of a transaction; nothing was charged or released",
                hint="let the signal handler set a flag, and act on it between two steps",
            )

    def _check_in_place(self) -> None:
        # A spend in a file that nobody will open again would be a spend that nobody counts.
        try:
            moved = files.identity(self.path) != self._identity
        except Unreadable as error:
            moved, reason = True, error.message
        else:
            reason = f"{self.path} is another file than the one that was opened"
        if moved:
            self._poison = f"renamed or replaced: {reason}"
            raise StorageFailed(f"the ledger was renamed or replaced under its lock: {reason}; nothing was released")


class _SqliteTransaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.wrote = False
        self._begun: list[Generator[Entry]] = []

    def read(self, start: int) -> Iterator[Entry]:
        self._begun.append(_read_entries(self._connection, start))
        return self._begun[-1]

    def close(self) -> None:
        for begun in self._begun:
            begun.close()

    def note(self) -> bytes | None:
        return _newest_head(self._connection)

    def append(self, entries: Sequence[Entry], note: bytes, *, size: int, keep: bool) -> None:
        self.wrote = True
        first = size - len(entries)
        rows = [(first + index, entry.line, entry.envelope) for index, entry in enumerate(entries)]
        self._connection.executemany("INSERT INTO record (seq, line, envelope) VALUES (?, ?, ?)", rows)
        self._connection.execute("DELETE FROM head WHERE keep = 0")
        self._connection.execute("INSERT INTO head (size, keep, note) VALUES (?, ?, ?)", (size, int(keep), note))


class SqliteReading:
    """What an open database holds, under a transaction of its owner."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._begun: list[Generator[Any]] = []

    def entries(self) -> Iterator[Entry]:
        """Every record, in order."""
        self._begun.append(_read_entries(self._connection, 0))
        return self._begun[-1]

    def close(self) -> None:
        """End what was begun: a query that is still open keeps its lock on the file, and locks every writer out."""
        for begun in self._begun:
            begun.close()

    def newest(self) -> bytes | None:
        """The newest head."""
        return _newest_head(self._connection)

    def heads(self) -> Iterator[bytes]:
        """The kept heads, oldest first, the newest included."""
        self._begun.append(_read_heads(self._connection))
        return self._begun[-1]


def _read_entries(connection: sqlite3.Connection, start: int) -> Generator[Entry]:
    query = "SELECT seq, line, envelope FROM record WHERE seq >= ? OR seq < 0 ORDER BY seq"
    with closing(connection.execute(query, (start,))) as rows:
        yield from _entries_of(rows, start)


def _entries_of(rows: Iterable[tuple[Any, Any, Any]], start: int) -> Generator[Entry]:
    total = 0
    for expected, (seq, line, envelope) in enumerate(rows, start):
        if seq != expected:
            raise Tampered(f"record {expected} is missing from the store; the next is {seq}")
        total += len(_blob(line)) + (0 if envelope is None else len(_blob(envelope)))
        if total > MAX_TOTAL_BYTES:
            raise Tampered(f"the records hold more than {MAX_TOTAL_BYTES} bytes", code="DP082")
        yield Entry(line, envelope)


def _newest_head(connection: sqlite3.Connection) -> bytes | None:
    row = connection.execute("SELECT note FROM head ORDER BY size DESC LIMIT 1").fetchone()
    return None if row is None else _blob(row[0])


def _read_heads(connection: sqlite3.Connection) -> Generator[bytes]:
    """All heads that were kept, the newest included, one at a time."""
    total = 0
    with closing(connection.execute("SELECT note FROM head ORDER BY size")) as rows:
        for (note,) in rows:
            total += len(_blob(note))
            if total > MAX_TOTAL_BYTES:
                raise Tampered(f"the heads hold more than {MAX_TOTAL_BYTES} bytes", code="DP082")
            yield note


def _blob(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise Tampered("the store holds a value of another kind than bytes")
    return value


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse any database but a ledger: a foreign one may carry triggers or views that run on a read (DP083, DP070)."""
    try:
        found = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        encoding = connection.execute("PRAGMA encoding").fetchone()[0]
    except sqlite3.Error as error:
        refuse_busy(error, path)
        raise Unreadable(f"{path} is not a dpbudget ledger: {error}", hint=files.name_a_ledger(path)) from None
    except UnicodeDecodeError:  # of a name in the schema, or in SQLite's complaint about it
        raise Unreadable(
            f"{path} is not a dpbudget ledger: its schema is not text", hint=files.name_a_ledger(path)
        ) from None
    if application != APPLICATION_ID:
        raise Unreadable(f"{path} is not a dpbudget ledger", hint=files.name_a_ledger(path))
    expected = [("table", name, name, sql) for name, sql in SCHEMA]
    if version != SCHEMA_VERSION or found != expected or encoding != "UTF-8":
        raise Unreadable(f"{path} has an unexpected database schema (version {version})", code="DP083")


def refuse_super_journal(journal: Path) -> None:
    """Refuse a journal that is a link or names a second file: rolling it back could delete that file (DP083)."""
    if not os.path.lexists(journal):
        return
    try:
        files.identity(journal)
        with open(journal, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8))
            tail = file.read(8)
    except FileNotFoundError:
        return
    except Unreadable as error:
        if error.code == "DP070":  # a live writer removed it in between
            return
        raise
    if tail == _SUPER_JOURNAL_MAGIC:
        raise Unreadable(f"{journal} belongs to a transaction over several databases", code="DP083")


def refuse_wal(path: Path) -> None:
    """Refuse a database with a write-ahead log beside it, which SQLite would replay into it (DP083)."""
    log = wal_of(path)
    if os.path.lexists(log):
        raise Unreadable(f"{log} lies beside the ledger: it was turned to WAL mode", code="DP083", hint=_LEAVE_WAL)


def refuse_wal_header(path: Path, data: bytes) -> None:
    """Refuse the bytes of a database in WAL mode: its newest commits may stand in another file (DP083)."""
    # File format, bytes 18 and 19: write and read version, 1 for a rollback journal, 2 for WAL.
    if data[18:20] == b"\x02\x02":
        raise Unreadable(f"{path} is in WAL mode, which no ledger is", code="DP083", hint=_LEAVE_WAL)


def limit_values(connection: sqlite3.Connection) -> None:
    """Let SQLite refuse values that no ledger holds, before it reads them into memory."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)


def refuse_busy(error: sqlite3.Error, path: Path) -> None:
    """Raise :class:`StorageFailed` where ``error`` says that another process holds the lock; else return."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
        raise StorageFailed(
            f"another process holds the lock of {path}; nothing was charged",
            hint="wait for it, or see which process has the ledger open",
        ) from None


def live_store(identity: tuple[int, int]) -> SqliteStore | None:
    """The store of this process that has this file open, if any.

    Closing any other descriptor of the file would drop its POSIX locks, so a reader in the same process asks the store.
    """
    stores = (store for store in live_stores() if isinstance(store, SqliteStore))
    return next((store for store in stores if store._identity == identity), None)


def journal_of(path: Path) -> Path:
    """Where SQLite keeps the rollback journal of ``path``."""
    return path.with_name(path.name + "-journal")


def wal_of(path: Path) -> Path:
    """Where SQLite would keep the write-ahead log of ``path``."""
    return path.with_name(path.name + "-wal")


def _connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    # mode=rw: never create; explicit transactions only.
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw", uri=True, timeout=busy_seconds, isolation_level=None, check_same_thread=False
    )
    try:
        limit_values(connection)
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA cell_size_check=ON")
        connection.execute("PRAGMA mmap_size=0")
        # macOS: fsync alone does not reach the disk.
        connection.execute("PRAGMA fullfsync=ON")
        connection.execute("PRAGMA synchronous=EXTRA")
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        level = connection.execute("PRAGMA synchronous").fetchone()[0]
    except sqlite3.Error as error:
        connection.close()
        refuse_busy(error, path)
        raise Unreadable(f"{path} is not a dpbudget ledger: {error}", hint=files.name_a_ledger(path)) from None
    if mode != "delete" or level != 3:
        connection.close()
        raise Unreadable(
            f"{path}: SQLite gave journal {mode} and synchronous {level}, not delete and 3",
            code="DP083",
            hint=_LEAVE_WAL if mode == "wal" else "",
        )
    return connection
