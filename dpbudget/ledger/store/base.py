"""What a ledger asks of a store: durable appends under one lock, and consistent reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from dpbudget.ledger.entries import Entry


@dataclass(frozen=True)
class Snapshot:
    """A consistent reading of a whole store.

    Attributes:
        entries: every record, in order.
        note: the newest signed head; None in a store without records.
        heads: the kept heads, oldest first, the newest included.
    """

    entries: tuple[Entry, ...]
    note: bytes | None
    heads: tuple[bytes, ...]


class Transaction(Protocol):
    """The store under its exclusive lock."""

    def read(self, start: int) -> tuple[Entry, ...]:
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

    def snapshot(self) -> Snapshot:
        """Everything, consistently."""

    def close(self) -> None:
        """Release the store; harmless when repeated."""
