"""The store of teams: ledgers in one PostgreSQL database, for processes on many machines.

A location is ``postgresql://user@host/database#name``; the fragment names the ledger (``main`` if there is none) and
everything before it is libpq's. Passwords come from the URL, ``PGPASSWORD`` or ``~/.pgpass`` and stand in no message.

A commit that returned is on the server's disk: settings that would allow less are refused at connect and again in every
transaction. A primary that fails over to a replica behind it loses commits; a process that spent sees that at once, and
the high-water mark of its machine afterwards. Have a synchronous standby, or take a head after every run.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dpbudget.errors import InvalidParameter, MissingExtra, StorageFailed, Tampered, Unreadable
from dpbudget.ledger.entries import MAX_ENVELOPE_BYTES, Entry
from dpbudget.ledger.store.bound import BoundStore
from dpbudget.ledger.store.postgres_schema import CREATE_SCHEMA, READER_ROLE, SCHEMA_VERSION, WRITER_ROLE
from dpbudget.ledger.store.postgres_url import PostgresUrl, show_location

if TYPE_CHECKING:
    import psycopg

_OLDEST = 120000
_BATCH = 2000
MAX_TOTAL_BYTES = 1 << 30
#: A commit in these modes waits for this server's disk, and for a synchronous standby's where there is one.
_DURABLE = ("on", "remote_apply")
_SETTINGS = (
    "SELECT current_setting('synchronous_commit'), current_setting('fsync'), current_setting('full_page_writes'), "
    "pg_is_in_recovery(), current_setting('transaction_read_only'), current_setting('server_version_num')"
)


class PostgresStore(BoundStore):
    """An open ledger for reading and writing; use :meth:`create` or :meth:`open`.

    Every failure of a write, and a connection lost in a transaction, poisons the handle: whether a lost commit is on
    disk nobody here can know, so nothing more is released (DP075).
    """

    durable = True

    def __init__(self, location: str, connection: psycopg.Connection[Any], busy_seconds: float) -> None:
        super().__init__(show_location(location))
        self._name = PostgresUrl.parse(location).name
        self._connection, self._busy_seconds = connection, busy_seconds
        self._inside = False
        self._close = weakref.finalize(self, _close_in_owner, connection, os.getpid())

    @classmethod
    def create(cls, location: str, *, busy_seconds: float = 30.0) -> PostgresStore:
        """A new, empty ledger, and the schema where it is missing; a name that exists is refused (DP074).

        Raises:
            Unreadable: no connection (DP070), or the schema cannot be made or is another version's (DP083).
        """
        name, connection = PostgresUrl.parse(location).name, _connect(location)
        try:
            _check_settings(connection, location)
            with _database_errors(location), connection.transaction():
                _make_schema(connection, location)
                row = connection.execute(
                    "INSERT INTO dpbudget.ledger (name) VALUES (%s) ON CONFLICT DO NOTHING RETURNING name", (name,)
                ).fetchone()
            if row is None:
                raise InvalidParameter(
                    f"{show_location(location)} exists", code="DP074", hint="choose another name behind the #"
                )
        except BaseException:
            connection.close()
            raise
        return cls(location, connection, busy_seconds)

    @classmethod
    def open(cls, location: str, *, busy_seconds: float = 30.0) -> PostgresStore:
        """An existing ledger.

        Raises:
            Unreadable: no connection, no such ledger (DP070), or a server whose commits are not durable (DP083).
        """
        connection = _connect(location)
        try:
            _check_settings(connection, location)
            with _database_errors(location):
                _check_ledger(connection, location)
        except BaseException:
            connection.close()
            raise
        return cls(location, connection, busy_seconds)

    @contextmanager
    def transaction(self) -> Iterator[_PostgresTransaction]:
        """BEGIN and the lock of the ledger, to COMMIT; durable when the context ends without an exception."""
        errors = _driver()
        with self._lock:
            self._check_alive()
            self._refuse_reentry()
            try:
                self._inside = True
                self._begin(errors)
                yield _PostgresTransaction(self._connection, self._name)
                self._check_alive()
                # PostgreSQL answers COMMIT without an error where no transaction is open, or where one was aborted.
                inside = self._connection.info.transaction_status == errors.pq.TransactionStatus.INTRANS
                if not inside or self._connection.execute("COMMIT").statusmessage != "COMMIT":
                    self._poison = "the transaction was not committed"
                    raise StorageFailed(f"{self.shown}: {self._poison}; nothing was released")
            except StorageFailed:
                self._roll_back(errors)
                raise
            except errors.Error as error:
                self._poison = _first_line(error)
                self._roll_back(errors)
                raise StorageFailed(
                    f"{self.shown}: {self._poison}; the spend may or may not be on disk, and nothing was released",
                    hint="see to the server, then open the ledger in a new process",
                ) from error
            except BaseException:
                # Nothing was written yet, or the rules refused it: the database is as it was.
                self._roll_back(errors)
                raise
            finally:
                self._inside = False

    @contextmanager
    def reading(self) -> Iterator[PostgresReading]:
        """Everything, as of one moment."""
        with self._lock:
            self._check_alive()
            self._refuse_reentry()
            try:
                self._inside = True
                with _database_errors(self.shown), _snapshot(self._connection):
                    yield PostgresReading(self._connection, self._name)
            finally:
                self._inside = False

    def close(self) -> None:
        """Close the connection; harmless when repeated, and left alone in a forked child."""
        with self._lock:
            self._refuse_reentry()
            self._close()
        self._poison = self._poison or "the store is closed"

    def _refuse_reentry(self) -> None:
        # A signal handler of this thread, which the lock lets in. The driver's own lock would not, and wait for itself;
        # and a rollback here would undo the outer spend, whose COMMIT still passes.
        if self._inside:
            self._poison = "the ledger was used again in the middle of a transaction"
            raise StorageFailed(f"{self.shown}: {self._poison}; nothing was released")

    def _begin(self, errors: ModuleType) -> None:
        milliseconds = max(1, int(self._busy_seconds * 1000))
        try:
            self._connection.execute("BEGIN")
            self._connection.execute(f"SET LOCAL lock_timeout = {milliseconds}")
            row = self._connection.execute("SELECT dpbudget.hold(%s)", (self._name,)).fetchone()
        except errors.errors.LockNotAvailable:
            raise StorageFailed(
                f"another process holds the lock of {self.shown}; nothing was charged",
                hint="wait for it, or see which process has the ledger open",
            ) from None
        if row is None or row[0] is None:
            self._poison = "the ledger is not in the database any more"
            raise StorageFailed(f"{self.shown}: {self._poison}; nothing was released")
        problem = _unsafe(self._connection)
        if problem:
            self._poison = problem
            raise StorageFailed(f"{self.shown}: {problem}; nothing was released", hint="see to the server's settings")

    def _roll_back(self, errors: ModuleType) -> None:
        with suppress(errors.Error):
            if self._connection.info.transaction_status != errors.pq.TransactionStatus.IDLE:
                self._connection.execute("ROLLBACK")


class _PostgresTransaction:
    def __init__(self, connection: psycopg.Connection[Any], name: str) -> None:
        self._connection, self._name = connection, name

    def read(self, start: int) -> Iterator[Entry]:
        return _read_entries(self._connection, self._name, start)

    def note(self) -> bytes | None:
        return _newest_head(self._connection, self._name)

    def append(self, entries: Sequence[Entry], note: bytes, *, size: int, keep: bool) -> None:
        first = size - len(entries)
        for start in range(0, len(entries), _BATCH):
            part = entries[start : start + _BATCH]
            # A head that covers more than is there yet stands inside this transaction alone.
            self._connection.execute(
                "SELECT dpbudget.append(%s, %s, %s::bytea[], %s::bytea[], %s, %s)",
                (
                    self._name,
                    first + start,
                    [entry.line for entry in part],
                    [entry.envelope for entry in part],
                    note,
                    keep and start + _BATCH >= len(entries),
                ),
            )


class PostgresReading:
    """What the database holds of a ledger, under a transaction of its owner."""

    def __init__(self, connection: psycopg.Connection[Any], name: str) -> None:
        self._connection, self._name = connection, name

    def entries(self) -> Iterator[Entry]:
        """Every record, in order."""
        return _read_entries(self._connection, self._name, 0)

    def newest(self) -> bytes | None:
        """The newest head."""
        return _newest_head(self._connection, self._name)

    def heads(self) -> Iterator[bytes]:
        """The kept heads, oldest first, the newest included; a batch at a time."""
        query = (
            "SELECT size, substring(note for 1025) FROM dpbudget.head "
            "WHERE ledger = %s AND size > %s ORDER BY size LIMIT %s"
        )
        after = -1
        while rows := self._connection.execute(query, (self._name, after, _BATCH)).fetchall():
            yield from (bytes(note) for _, note in rows)
            after = rows[-1][0]


def _newest_head(connection: psycopg.Connection[Any], name: str) -> bytes | None:
    row = connection.execute(
        "SELECT substring(note for 1025) FROM dpbudget.head WHERE ledger = %s ORDER BY size DESC LIMIT 1", (name,)
    ).fetchone()
    return None if row is None else bytes(row[0])


@contextmanager
def reading_database(location: str) -> Iterator[PostgresReading]:
    """A consistent reading for whoever may only read; nothing is written.

    Raises:
        Unreadable: no connection, no such ledger, or no right to read it (DP070).
    """
    connection = _connect(location)
    try:
        with _database_errors(location), _snapshot(connection):
            _check_ledger(connection, location)
            yield PostgresReading(connection, PostgresUrl.parse(location).name)
    finally:
        connection.close()


def _read_entries(connection: psycopg.Connection[Any], name: str, start: int) -> Iterator[Entry]:
    """Records from ``start`` on, a batch at a time; a gap is refused."""
    query = (
        "SELECT seq, substring(line for 4097), substring(envelope for %s) FROM dpbudget.record "
        "WHERE ledger = %s AND seq >= %s ORDER BY seq LIMIT %s"
    )
    expected, total = start, 0
    while True:
        rows = connection.execute(query, (MAX_ENVELOPE_BYTES + 1, name, expected, _BATCH)).fetchall()
        for seq, line, envelope in rows:
            if seq != expected:
                raise Tampered(f"record {expected} is missing from the store; the next is {seq}")
            entry = Entry(bytes(line), None if envelope is None else bytes(envelope))
            total += len(entry.line) + len(entry.envelope or b"")
            if total > MAX_TOTAL_BYTES:
                raise Tampered(f"the records hold more than {MAX_TOTAL_BYTES} bytes", code="DP082")
            yield entry
            expected += 1
        if len(rows) < _BATCH:
            return


def _driver() -> ModuleType:
    try:
        import psycopg
    except ImportError:
        raise MissingExtra(
            "a ledger in PostgreSQL needs the package psycopg", hint="pip install 'dpbudget[postgres]'"
        ) from None
    return psycopg


def _connect(location: str) -> psycopg.Connection[Any]:
    driver = _driver()
    try:
        wanted = driver.conninfo.conninfo_to_dict(PostgresUrl.parse(location).conninfo)
    except driver.Error:
        raise InvalidParameter(
            f"{show_location(location)} is not a PostgreSQL URL",
            code="DP070",
            hint="write postgresql://user@host/database#name",
        ) from None
    defaults = {"connect_timeout": 10, "application_name": "dpbudget", "keepalives_idle": 30, "keepalives_count": 3}
    try:
        connection: psycopg.Connection[Any] = driver.connect(
            **{**defaults, **wanted, "client_encoding": "utf8"}, autocommit=True, prepare_threshold=None
        )
    except driver.Error as error:
        raise Unreadable(
            f"{show_location(location)}: {_first_line(error)}",
            hint="check host, database, user and password (PGPASSWORD or ~/.pgpass)",
        ) from None
    return connection


def _check_settings(connection: psycopg.Connection[Any], location: str) -> None:
    with _database_errors(location):
        problem = _unsafe(connection)
    if problem:
        raise Unreadable(
            f"{show_location(location)}: {problem}",
            code="DP083",
            hint="connect to the primary, with synchronous_commit, fsync and full_page_writes on",
        )


def _unsafe(connection: psycopg.Connection[Any]) -> str | None:
    """Why a commit on this connection would not be durable; None if it is."""
    row = connection.execute(_SETTINGS).fetchone()
    if row is None:
        return "the server tells no settings"
    commit, fsync, pages, replica, read_only, version = row
    if commit not in _DURABLE:
        return f"synchronous_commit is {commit}, so that a commit may be lost"
    if fsync != "on" or pages != "on":
        return f"fsync is {fsync} and full_page_writes is {pages}, so that a commit may be lost"
    if replica or read_only != "off":
        return "the server is a replica or read-only"
    if int(version) < _OLDEST:
        return f"the server is of version {version}; {_OLDEST} is the oldest that is known to work"
    return None


def _make_schema(connection: psycopg.Connection[Any], location: str) -> None:
    row = connection.execute("SELECT obj_description(to_regnamespace('dpbudget'), 'pg_namespace')").fetchone()
    there = connection.execute("SELECT to_regnamespace('dpbudget') IS NOT NULL").fetchone()
    if there and there[0]:
        _check_version(row, location)
        return
    for role in (WRITER_ROLE, READER_ROLE):
        known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone()
        if known is None:
            connection.execute(f"CREATE ROLE {role} NOLOGIN")
    for statement in CREATE_SCHEMA:
        connection.execute(statement)


def _check_ledger(connection: psycopg.Connection[Any], location: str) -> None:
    there = connection.execute("SELECT to_regnamespace('dpbudget') IS NOT NULL").fetchone()
    if not there or not there[0]:
        raise Unreadable(
            f"{show_location(location)} holds no ledgers", hint=f"dpbudget ledger init {show_location(location)}"
        )
    row = connection.execute("SELECT obj_description(to_regnamespace('dpbudget'), 'pg_namespace')").fetchone()
    _check_version(row, location)
    name = PostgresUrl.parse(location).name
    if connection.execute("SELECT 1 FROM dpbudget.ledger WHERE name = %s", (name,)).fetchone() is None:
        names = [
            str(found) for (found,) in connection.execute("SELECT name FROM dpbudget.ledger ORDER BY name LIMIT 20")
        ]
        known = f"its ledgers are {', '.join(names)}" if names else f"dpbudget ledger init {show_location(location)}"
        raise Unreadable(f"{show_location(location)}: the database has no ledger {name}", hint=known)


def _check_version(row: Sequence[Any] | None, location: str) -> None:
    if row is None or row[0] != SCHEMA_VERSION:
        found = str(row[0])[:60] if row else "none"
        raise Unreadable(
            f"{show_location(location)}: the schema is {found!r}, not {SCHEMA_VERSION!r}",
            code="DP083",
            hint="it was made by another version or another program",
        )


@contextmanager
def _snapshot(connection: psycopg.Connection[Any]) -> Iterator[None]:
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    try:
        yield
    finally:
        with suppress(_driver().Error):
            connection.execute("ROLLBACK")


@contextmanager
def _database_errors(location: str) -> Iterator[None]:
    """Turn what the driver raises outside a spend into a refusal that says the way out."""
    driver = _driver()
    try:
        yield
    except driver.errors.InsufficientPrivilege as error:
        raise Unreadable(
            f"{show_location(location)}: {_first_line(error)}",
            code="DP083",
            hint=f"an administrator grants {READER_ROLE} for reading, {WRITER_ROLE} for spending, and runs ledger init",
        ) from None
    except driver.Error as error:
        raise Unreadable(f"{show_location(location)}: {_first_line(error)}", hint="see to the server") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _close_in_owner(connection: psycopg.Connection[Any], pid: int) -> None:
    # A forked child would end the parent's session on the shared socket.
    if os.getpid() == pid:
        with suppress(Exception):
            connection.close()
