"""Durable transactions of the state machine: what a ledger and its runs share.

Every transaction re-reads what other processes added, checks it against the rules and the signed head, adds records
that pass the same rules, and signs the new head, all under the store's lock.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from dpbudget.errors import InvalidParameter, ReceiptSpent, Tampered
from dpbudget.ledger.entries import Entry, build
from dpbudget.ledger.head import Head, read_head, sign_head
from dpbudget.ledger.signing import PublicKey, Signer
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.store.base import LedgerStore, Snapshot
from dpbudget.ledger.tree import Frontier, leaf_hash

#: Values that the operating system's generator gives once.
_RANDOM = re.compile(rb'"(nonce|commitment|fresh)":"([0-9a-f]+)"')
#: Kinds after which the head stays in the store, so that an outsider who saw it then can find it again.
_KEPT = frozenset({"genesis", "portfolio", "plan", "lease", "close"})


T = TypeVar("T")


class Draft:
    """Records being added: each one is admitted by the rules as it is written."""

    def __init__(self, state: LedgerState) -> None:
        self.state = state
        self.entries: list[Entry] = []
        self.keep = False

    def add(self, kind: str, *, seal: Callable[[bytes], bytes] | None = None, **fields: Any) -> None:
        """Append one record; ``seal`` makes its envelope from its line."""
        line = build(kind, seq=self.state.size, prev=self.state.last, **fields)
        entry = Entry(line, seal(line) if seal else None)
        self.state = self.state.admit(entry)
        self.entries.append(entry)
        self.keep = self.keep or kind in _KEPT


def replay(entries: Iterable[Entry], note: bytes | None, trust: PublicKey | None) -> tuple[LedgerState, Head]:
    """The state after all ``entries`` and the writer's head, which must cover exactly them.

    Beside the rules for single records, no lease may repeat another's nonce or commitment and no step another's fresh
    bytes: that would be the mark of a cloned process, whose noise repeats.

    Raises:
        Tampered: any rule, the head's signature, or its size and root do not hold.
    """
    state = LedgerState(trust=trust)
    seen: set[bytes] = set()
    for entry in entries:
        state = state.admit(entry)
        _refuse_repeats(entry.line, seen)
    if note is None:
        raise Tampered("the ledger has no signed head", code="DP070")
    return state, check_head(state, note)


def check_head(state: LedgerState, note: bytes) -> Head:
    """The head in ``note``, when it is the writer's and covers exactly ``state``."""
    head = read_head(note, state.genesis.ledger_id, state.genesis.writer)
    if head.size != state.size or head.root != state.tree.root.hex():
        raise Tampered(
            f"the signed head covers {head.size} records with root {head.root}; the store holds {state.size} records "
            f"with root {state.tree.root.hex()}",
            hint="records were added, cut or changed without the writer's key; look for a backup or an export",
        )
    return head


def check_kept_heads(snapshot: Snapshot, state: LedgerState) -> int:
    """Check every head that the store kept, and return their number; ``state`` is that of the same snapshot.

    Raises:
        Tampered: a head is not the writer's or does not belong to this history.
    """
    genesis, tree = state.genesis, Frontier()
    heads = iter([read_head(note, genesis.ledger_id, genesis.writer) for note in snapshot.heads])
    head = next(heads, None)
    for entry in snapshot.entries:
        tree = tree.append(leaf_hash(entry.line))
        if head is not None and head.size == tree.size:
            if head.root != tree.root.hex():
                raise Tampered(f"the head of {head.size} records has another root than these records")
            head = next(heads, None)
    if head is not None:
        raise Tampered(f"a kept head of {head.size} records is out of order or beyond the {tree.size} records")
    return len(snapshot.heads)


class Journal:
    """The store, the verified state and the writer's key of one open ledger, in one process.

    Attributes:
        store: where the records live.
        writer: signs heads; None for a ledger that is only read.
        state: the newest verified state that this process knows.
        head: the newest head that this process knows; None before the first record.
    """

    def __init__(self, store: LedgerStore, writer: Signer | None, state: LedgerState, head: Head | None) -> None:
        self.store, self.writer, self.state, self.head = store, writer, state, head
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._closed = False

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked child."""
        return os.getpid() != self._pid

    def guard(self) -> None:
        """Refuse a forked child (DP076) and a closed ledger (DP078)."""
        if self.forked:
            raise ReceiptSpent(
                f"a ledger that process {self._pid} opened is used in process {os.getpid()}",
                code="DP076",
                hint="open the ledger in the process that trains; a fork would repeat its parent's noise",
            )
        if self._closed:
            raise InvalidParameter("the ledger is closed", code="DP078", hint="open it again")

    def transact(self, write: Callable[[Draft], T]) -> T:
        """Catch up, let ``write`` draft records, sign the head and commit; durable on return of what ``write`` gave.

        A draft without records commits nothing. What ``write`` raises leaves the ledger as it was.

        Raises:
            StorageFailed: nothing may be released (DP075).
            Tampered: what another process added breaks a rule.
        """
        self.guard()
        if self.writer is None:
            raise InvalidParameter(
                "the ledger was opened for reading", code="DP080", hint="open it with the writer's key"
            )
        with self._lock, self.store.transaction() as transaction:
            state = self.state
            for entry in transaction.read(state.size):
                state = state.admit(entry)
            head = self._newest(state, transaction.note())
            draft = Draft(state)
            result = write(draft)
            if draft.entries:
                genesis, state = draft.state.genesis, draft.state
                head = sign_head(genesis.ledger_id, state.size, state.tree.root, self.writer)
                transaction.append(draft.entries, head.note.encode("utf-8"), size=state.size, keep=draft.keep)
        self.state, self.head = state, head
        return result

    def snapshot(self) -> Snapshot:
        """A consistent reading of the store, verified from the first record on."""
        self.guard()
        snapshot = self.store.snapshot()
        state, head = replay(snapshot.entries, snapshot.note, self.state.trust)
        if state.size < self.state.size:
            raise Tampered(f"the store went back from {self.state.size} to {state.size} records")
        self.state, self.head = state, head
        return snapshot

    def close(self) -> None:
        """Close the store; harmless when repeated."""
        self._closed = True
        self.store.close()

    def _newest(self, state: LedgerState, note: bytes | None) -> Head | None:
        if state.size == 0:
            if note is not None:
                raise Tampered("a head without records")
            return self.head
        if note is None:
            raise Tampered("the ledger has no signed head")
        if self.head is not None and state is self.state and note == self.head.note.encode("utf-8"):
            return self.head
        # Refuses a store that was put back to an earlier time too: its head is smaller than what this process saw.
        return check_head(state, note)


def _refuse_repeats(line: bytes, seen: set[bytes]) -> None:
    # admit() has checked the schema, in which no other string can hold such a pair.
    for name, value in _RANDOM.findall(line):
        if value in seen:
            what = f"{name.decode()} {value.decode()}"
            raise Tampered(f"a record repeats the {what}: a cloned process repeats its noise")
        seen.add(value)
