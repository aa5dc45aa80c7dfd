"""A store that forgets: for tests and throwaway runs. It is not durable and its name says so to every reader."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dpbudget.errors import StorageFailed
from dpbudget.ledger.entries import Entry
from dpbudget.ledger.store.base import Reading, Snapshot


class MemoryStore:
    """Records in a list of this process; nothing survives it.

    Attributes:
        durable: False; a ledger shows it.
    """

    durable = False

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self._entries: list[Entry] = list(snapshot.entries) if snapshot else []
        self._heads: list[tuple[bytes, bool]] = [(note, True) for note in snapshot.heads] if snapshot else []
        self._lock = threading.RLock()
        self._closed = False

    @contextmanager
    def transaction(self) -> Iterator[_MemoryTransaction]:
        """Exclusive among the threads of this process."""
        with self._lock:
            if self._closed:
                raise StorageFailed("the store is closed", hint="open the ledger again")
            transaction = _MemoryTransaction(self._entries, self._heads)
            yield transaction
            transaction.commit()

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Everything, consistently."""
        with self._lock:
            notes = tuple(note for note, _ in self._heads)
            snapshot = Snapshot(tuple(self._entries), notes[-1] if notes else None, notes)
        yield snapshot.reading()

    def close(self) -> None:
        """Refuse further transactions."""
        self._closed = True


class _MemoryTransaction:
    def __init__(self, entries: list[Entry], heads: list[tuple[bytes, bool]]) -> None:
        self._entries, self._heads = entries, heads
        self._added: tuple[Sequence[Entry], bytes, int, bool] | None = None

    def read(self, start: int) -> tuple[Entry, ...]:
        return tuple(self._entries[start:])

    def note(self) -> bytes | None:
        return self._heads[-1][0] if self._heads else None

    def append(self, entries: Sequence[Entry], note: bytes, *, size: int, keep: bool) -> None:
        self._added = (entries, note, size - len(entries), keep)

    def commit(self) -> None:
        if self._added is not None:
            entries, note, first, keep = self._added
            if len(self._entries) != first:
                # A signal handler of this thread, which the lock lets in.
                raise StorageFailed("the ledger was used again in the middle of a transaction; nothing was released")
            self._entries.extend(entries)
            if self._heads and not self._heads[-1][1]:
                self._heads.pop()
            self._heads.append((note, keep))
