"""Reading a ledger that may be hostile, torn or in use: nothing of it is ever opened in place.

SQLite rolls back a crash's journal on the first read, which writes; a verifier must not. So the file and its journal
are copied to a private folder, and the copy is opened. Exports are read as they are.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpbudget.errors import StorageFailed, Tampered, Unreadable
from dpbudget.ledger.store import files
from dpbudget.ledger.store.base import Reading, Snapshot
from dpbudget.ledger.store.jsonl import MAX_EXPORT_BYTES, ExportReading
from dpbudget.ledger.store.sqlite import (
    APPLICATION_ID,
    MAGIC,
    SqliteReading,
    SqliteStore,
    check_schema,
    journal_of,
    limit_values,
    live_store,
    refuse_super_journal,
    refuse_wal,
    refuse_wal_header,
)

#: How long a journal must stay unchanged to count as left behind by a crash.
_STALE_SECONDS = 0.5
_PATIENCE_SECONDS = 10.0


def read_ledger(path: str | os.PathLike[str]) -> Snapshot:
    """All of :func:`reading_of` in memory."""
    with reading_of(path) as reading:
        return Snapshot.of(reading)


@contextmanager
def reading_of(path: str | os.PathLike[str]) -> Iterator[Reading]:
    """The records of a ledger file or of an export, by its first bytes; nothing is written beside it.

    Raises:
        Unreadable: missing, neither of both, or unsafe to read (DP070, DP083).
        Tampered: a torn or edited file (DP071, DP082).
    """
    place = files.as_path(path)
    live = _live(place)
    if live is not None:
        with live.reading() as reading:
            yield reading
        return
    head = _first_bytes(place)
    if head == MAGIC:
        with _copied(place) as reading:
            yield reading
    elif head[:1] == b"{":
        with files.open_regular(place, MAX_EXPORT_BYTES) as file:
            yield ExportReading(file)
    else:
        raise Unreadable(f"{place} is neither a ledger nor an export", hint="name a file made by dpbudget")


def _live(place: Path) -> SqliteStore | None:
    try:
        status = os.stat(place)
    except OSError as error:
        raise Unreadable(f"{place}: {error.strerror}", hint=files.check_path(place)) from None
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(f"{place} is not a regular file", code="DP083", hint="name a file made by dpbudget")
    return live_store((status.st_dev, status.st_ino))


def _first_bytes(place: Path) -> bytes:
    # O_NONBLOCK: a FIFO that took the file's place must not make this wait.
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"{place}: {error.strerror}", hint="check the path and its permissions") from None
    with os.fdopen(descriptor, "rb") as file:
        try:
            return file.read(len(MAGIC))
        except OSError as error:
            raise Unreadable(f"{place}: {error.strerror}", hint="name a file made by dpbudget") from None


@contextmanager
def _copied(place: Path) -> Iterator[Reading]:
    files.identity(place)
    with tempfile.TemporaryDirectory(prefix="dpbudget-") as folder:  # mode 0700
        copy = Path(folder) / "ledger"
        _copy_consistently(place, copy)
        connection = sqlite3.connect(f"{copy.as_uri()}?mode=rw", uri=True, isolation_level=None)
        try:
            limit_values(connection)
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("PRAGMA cell_size_check=ON")
            connection.execute("PRAGMA mmap_size=0")
            check_schema(connection, place)
            reading = SqliteReading(connection)
            try:
                yield reading
            finally:
                reading.close()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise Tampered(f"{place} is damaged: {error}") from None
        finally:
            connection.close()


def _copy_consistently(place: Path, copy: Path) -> None:
    """Copy database and journal as they stood at one moment between two commits.

    Every commit changes the counter in the file's header, and a journal exists from before the first page is written
    until after the last one is synced: equal counters around the copy without a journal mean that nobody wrote.
    """
    journal, deadline = journal_of(place), time.monotonic() + _PATIENCE_SECONDS
    quiet_since, mark = time.monotonic(), _journal_mark(journal)
    while time.monotonic() < deadline:
        counter, present = _counter(place), _journal_mark(journal)
        if present != mark:
            quiet_since, mark = time.monotonic(), present
        if present is None or time.monotonic() - quiet_since > _STALE_SECONDS:
            # A copy without the log beside it would be an older ledger, and valid.
            refuse_wal(place)
            journal_of(copy).unlink(missing_ok=True)  # of an attempt before
            header = _copy_file(place, copy)
            refuse_wal_header(place, header)
            torn = present is not None and _copy_journal(journal, journal_of(copy))
            if (
                torn == (present is not None)
                and _journal_mark(journal) == present
                and counter == _counter(place) == header[24:28]
            ):
                if torn:
                    refuse_super_journal(journal_of(copy))
                return
        time.sleep(0.005)
    raise StorageFailed(f"{place} was written to all the time; nothing could be read", hint="read it again later")


def _copy_file(source: Path, target: Path) -> bytes:
    """Copy a regular file and return its first hundred bytes, the header of a database."""
    with files.open_regular(source, MAX_EXPORT_BYTES) as old, open(target, "wb") as new:
        header = old.read(100)
        if header.startswith(MAGIC) and header[68:72] != APPLICATION_ID.to_bytes(4, "big"):
            # File format, bytes 68 to 71: before a foreign database of any size is copied.
            raise Unreadable(f"{source} is not a dpbudget ledger", hint="name the ledger file or an export of it")
        new.write(header)
        left = MAX_EXPORT_BYTES - len(header)
        while chunk := old.read(1 << 20):
            left -= len(chunk)
            if left < 0:
                raise Unreadable(f"{source} grew beyond {MAX_EXPORT_BYTES} bytes while it was read")
            new.write(chunk)
    return header


def _copy_journal(journal: Path, target: Path) -> bool:
    """Copy a journal; False when its writer finished meanwhile."""
    if journal.is_symlink():
        raise Unreadable(f"{journal} is not a regular file", code="DP083", hint="a journal is never a link")
    try:
        _copy_file(journal, target)
    except Unreadable:
        if os.path.lexists(journal):
            raise
        target.unlink(missing_ok=True)
        return False
    return True


def _counter(place: Path) -> bytes:
    with open(place, "rb", buffering=0) as file:
        return os.pread(file.fileno(), 4, 24)


def _journal_mark(journal: Path) -> tuple[int, int, int] | None:
    try:
        status = os.lstat(journal)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
