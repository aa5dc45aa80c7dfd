"""What a store with a connection must survive: threads that share it, and forks that copy it."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress

from dpbudget.errors import StorageFailed

_live: weakref.WeakSet[BoundStore] = weakref.WeakSet()


class BoundStore:
    """A store bound to the process that opened it.

    A forked child finds it poisoned, and a fork waits until no transaction is open: a copy of a connection in the
    middle of one could roll back, or end, what the parent is doing.

    Attributes:
        shown: where the records live, as messages may say it.
    """

    def __init__(self, shown: str) -> None:
        self.shown = shown
        self._lock = threading.RLock()
        self._poison: str | None = None
        _live.add(self)

    def _check_alive(self) -> None:
        if self._poison is not None:
            raise StorageFailed(
                f"the ledger {self.shown} refuses to go on: {self._poison}", hint="open the ledger in a new process"
            )


def live_stores() -> list[BoundStore]:
    """The stores of this process that may be used."""
    return [store for store in list(_live) if store._poison is None]


def _lock_before_fork() -> None:
    for store in list(_live):
        store._lock.acquire()


def _unlock_after_fork() -> None:
    for store in list(_live):
        with suppress(RuntimeError):
            store._lock.release()


def _disown_in_child() -> None:
    for store in list(_live):
        store._poison = "this process was forked from the one that opened the ledger"
        with suppress(RuntimeError):
            store._lock.release()


os.register_at_fork(before=_lock_before_fork, after_in_parent=_unlock_after_fork, after_in_child=_disown_in_child)
