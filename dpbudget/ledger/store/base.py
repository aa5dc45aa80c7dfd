"""What a ledger asks of a store: durable appends under one lock, and consistent reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from dpbudget.ledger.entries import Entry


class Reading(Protocol):
    """A consistent reading of a whole store, one record at a time: a long ledger need not fit into memory."""

    def entries(self) -> Iterator[Entry]:
        """Every record, in order; once."""

    def newest(self) -> bytes | None:
        """The newest head. Of an export: after its entries."""

    def heads(self) -> Iterator[bytes]:
        """The kept heads, oldest first, the newest included; there may be hundreds of thousands."""


@dataclass(frozen=True)
class Snapshot:
    """A whole store in memory.

    Attributes:
        entries: every record, in order.
        note: the newest signed head; None in a store without records.
        heads: the kept heads, oldest first, the newest included.
    """

    entries: tuple[Entry, ...]
    note: bytes | None
    heads: tuple[bytes, ...]

    @classmethod
    def of(cls, reading: Reading) -> Snapshot:
        """All of a reading."""
        entries = tuple(reading.entries())
        note = reading.newest()
        return cls(entries, note, tuple(reading.heads()))

    def reading(self) -> Reading:
        """The same, record by record."""
        return _SnapshotReading(self)


class _SnapshotReading:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def entries(self) -> Iterator[Entry]:
        return iter(self._snapshot.entries)

    def newest(self) -> bytes | None:
        return self._snapshot.note

    def heads(self) -> Iterator[bytes]:
        return iter(self._snapshot.heads)


class Transaction(Protocol):
    """The store under its exclusive lock."""

    def read(self, start: int) -> Iterable[Entry]:
        """The records from sequence number ``start`` on."""

    def note(self) -> bytes | None:
        """The newest signed head."""

    def append(self, entries: Sequence[Entry], note: bytes, *, size: int, keep: bool) -> None:
        """Add records and the head of the then ``size`` records; once in a transaction.

        An older head that was not appended with ``keep`` is dropped.
        """


class LedgerStore(Protocol):
    """Where records live. No store interprets them."""

    def transaction(self) -> AbstractContextManager[Transaction]:
        """An exclusive transaction; its appends are durable when the context ends without an exception.

        Raises:
            StorageFailed: the lock was not granted in time, or any write or sync failed. After a failed write the
                store refuses everything (DP075): a sync that failed once cannot be trusted when it is repeated.
        """

    def reading(self) -> AbstractContextManager[Reading]:
        """Everything, consistently."""

    def close(self) -> None:
        """Release the store; harmless when repeated."""
