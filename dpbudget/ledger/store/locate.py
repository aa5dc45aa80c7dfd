"""From a location to its store: a path is an SQLite file or an export, ``postgresql://...#name`` a database."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

from dpbudget.errors import InvalidParameter
from dpbudget.ledger.store.base import LedgerStore, Reading, Transaction
from dpbudget.ledger.store.postgres import PostgresStore, reading_database
from dpbudget.ledger.store.postgres_url import is_database
from dpbudget.ledger.store.reader import reading_of
from dpbudget.ledger.store.sqlite import SqliteStore

Location = str | os.PathLike[str]


def create_store(location: Location) -> LedgerStore:
    """A new, empty store; what exists there is refused (DP074)."""
    return PostgresStore.create(str(location)) if is_database(location) else SqliteStore.create(location)


def open_store(location: Location) -> LedgerStore:
    """An existing store, for reading and writing."""
    return PostgresStore.open(str(location)) if is_database(location) else SqliteStore.open(location)


def reading_at(location: Location) -> AbstractContextManager[Reading]:
    """A consistent reading of a ledger or an export, which writes nothing."""
    return reading_database(str(location)) if is_database(location) else reading_of(location)


class ReadingStore:
    """A ledger that is only read: every reading looks at its place anew, and a long one need not fit into memory."""

    durable = False

    def __init__(self, location: Location) -> None:
        self._location = location

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Refused (DP080)."""
        raise InvalidParameter("the ledger was opened for reading", code="DP080", hint="open it with the writer's key")

    def reading(self) -> AbstractContextManager[Reading]:
        """The ledger as it is now."""
        return reading_at(self._location)

    def close(self) -> None:
        """Nothing is held open."""
