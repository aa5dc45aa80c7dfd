"""Durable transactions of the state machine: what a ledger and its runs share.

Every transaction re-reads what other processes added, checks it against the rules and the signed head, adds records
that pass the same rules, and signs the new head, all under the store's lock.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, TypeVar

from dpbudget.errors import InvalidParameter, ReceiptSpent, Tampered
from dpbudget.ledger.entries import Entry, draft, read
from dpbudget.ledger.head import Head, key_hash, key_hint, origin_of, read_head, sign_head
from dpbudget.ledger.high_water import HighWater, Mark
from dpbudget.ledger.noise_keys import Lifetime
from dpbudget.ledger.rules import Machine
from dpbudget.ledger.signing import PublicKey, Signer
from dpbudget.ledger.state import LedgerState
from dpbudget.ledger.store.base import LedgerStore, Reading, Transaction
from dpbudget.ledger.tree import leaf_hash

#: Kinds after which the head stays in the store, so that an outsider who saw it then can find it again.
_KEPT = frozenset(
    {"genesis", "renyi", "portfolio", "budget", "rekey", "note", "plan", "commit", "entropy", "lease", "close"}
)


#: How many of the newest roots are kept, to compare the marks of other processes with.
_ROOTS = 64

T = TypeVar("T")


class Draft:
    """Records being added: each one is admitted by the rules as it is written."""

    def __init__(self, state: LedgerState) -> None:
        self._machine = Machine(state)
        self._state: LedgerState | None = state
        self.entries: list[Entry] = []
        self.keep = False

    @property
    def state(self) -> LedgerState:
        """What follows from the records so far."""
        if self._state is None:
            self._state = self._machine.state()
        return self._state

    def add(self, kind: str, *, seal: Callable[[bytes], bytes] | None = None, **fields: Any) -> None:
        """Append one record; ``seal`` makes its envelope from its line."""
        line = draft(kind, seq=self._machine.size, prev=self._machine.last, **fields)
        self.put(Entry(line, seal(line) if seal else None), kind)

    def put(self, entry: Entry, kind: str) -> None:
        """Append a record of this kind that was made elsewhere, by an owner for example."""
        self._machine.feed((entry,))
        self._state = None
        self.entries.append(entry)
        self.keep = self.keep or kind in _KEPT


def replay(
    entries: Iterable[Entry], note: bytes | None, trust: PublicKey | None, *, watch: Collection[int] = ()
) -> tuple[LedgerState, Head]:
    """The state after all ``entries`` and the writer's head, which must cover exactly them.

    Raises:
        Tampered: any rule, the head's signature, its size and root, or the trusted key do not hold.
    """
    machine = Machine(LedgerState(trust=trust), watch=watch, remember=True)
    machine.feed(entries)
    return conclude(machine, note)


def replay_store(
    store: LedgerStore, trust: PublicKey | None, *, high_water: HighWater | None = None
) -> tuple[LedgerState, Head]:
    """:func:`replay` of a store, which must not be older than the high-water mark.

    Raises:
        Tampered: as :func:`replay`, or the mark of this machine is not part of the history (DP079).
    """
    mark = None
    if high_water is not None:
        with store.reading() as reading:
            ledger_id, _, _ = begin(reading)
        # Before the reading that is judged: other processes may add records and raise the mark meanwhile.
        mark = high_water.known(ledger_id)
    with store.reading() as reading:
        machine = Machine(LedgerState(trust=trust), watch=() if mark is None else (mark[0],), remember=True)
        machine.feed(reading.entries())
        note = reading.newest()
    state, head = conclude(machine, note)
    if high_water is not None:
        high_water.check(mark, state, machine.roots)
    return state, head


def begin(reading: Reading) -> tuple[str, str | None, Iterator[Entry]]:
    """What the first record says of the whole: the ledger's id, the owner's key (unchecked), and all entries."""
    entries = reading.entries()
    first = next(entries, None)
    if first is None:
        raise Tampered("the ledger has no records", code="DP070")
    owner = read(first.line).get("owner")
    return leaf_hash(first.line).hex(), owner, chain((first,), entries)


class CheckedReading:
    """A reading that passes the rules on its way, for whoever copies it."""

    def __init__(self, reading: Reading, trust: PublicKey | None) -> None:
        self._reading = reading
        self._machine = Machine(LedgerState(trust=trust), remember=True)
        self._conclusion: tuple[LedgerState, Head] | None = None

    def entries(self) -> Iterator[Entry]:
        """Every record, once it passed the rules."""
        for entry in self._reading.entries():
            self._machine.feed((entry,))
            yield entry

    def newest(self) -> bytes | None:
        """The newest head, once it was checked."""
        note = self._reading.newest()
        self._conclusion = conclude(self._machine, note)
        return note

    def heads(self) -> Iterator[bytes]:
        """The kept heads, unchecked."""
        return self._reading.heads()

    def conclusion(self) -> tuple[LedgerState, Head]:
        """State and head of what was read."""
        if self._conclusion is None:
            raise Tampered("the reading is not finished", code="DP070")
        return self._conclusion


def conclude(machine: Machine, note: bytes | None) -> tuple[LedgerState, Head]:
    """What a whole history comes to: no randomness twice, the owner that is trusted, and the writer's head.

    Raises:
        Tampered: one of them does not hold (DP070, DP071, DP072).
    """
    machine.refuse_repeats()
    state = machine.state()
    check_trust(state)
    if note is None:
        raise Tampered("the ledger has no signed head", code="DP070")
    return state, check_head(state, note)


def check_trust(state: LedgerState) -> None:
    """Refuse a history that another owner signed than the one that is trusted.

    A trusted key that came into the role by a rekey vouches for all before it: its signature covers their chain.

    Raises:
        Tampered: the trusted key never held the role (DP072).
    """
    if state.trust is not None and not state.trusted:
        raise Tampered(
            f"the ledger belongs to owner {state.genesis.owner.hex}, the trusted key is {state.trust.hex}",
            code="DP072",
            hint="ask the owner for the public key by another way than this file",
        )


def check_head(state: LedgerState, note: bytes) -> Head:
    """The head in ``note``, when it is the writer's and covers exactly ``state``."""
    head = read_head(note, state.genesis.ledger_id, state.writer)
    if head.size != state.size or head.root != state.tree.root.hex():
        raise Tampered(
            f"the signed head covers {head.size} records with root {head.root}; the store holds {state.size} records "
            f"with root {state.tree.root.hex()}",
            hint="records were added, cut or changed without the writer's key; look for a backup or an export",
        )
    return head


def check_kept_heads(notes: Iterable[bytes], state: LedgerState, roots: Mapping[int, bytes]) -> int:
    """Check every head that a store kept, and return their number.

    Args:
        notes: the kept heads, oldest first.
        state: the state of the same history.
        roots: its root at the sizes of the heads (``watch`` of the machine).

    Raises:
        Tampered: a head is not a writer's, or does not belong to this history.
    """
    origin = origin_of(state.genesis.ledger_id)
    writers = {key_hash(origin, writer): writer for writer in state.writers}
    last = count = 0
    for note in notes:
        # A wrong hint of the key is a wrong signature.
        head = read_head(note, state.genesis.ledger_id, writers.get(key_hint(note), state.writer))
        if not last < head.size <= state.size:
            raise Tampered(f"a kept head of {head.size} records is out of order or beyond the {state.size} records")
        if roots.get(head.size, b"").hex() != head.root:
            raise Tampered(f"the head of {head.size} records has another root than these records")
        last, count = head.size, count + 1
    return count


class Journal:
    """The store, the verified state and the writer's key of one open ledger, in one process.

    Attributes:
        store: where the records live.
        writer: signs heads; None for a ledger that is only read.
        state: the newest verified state that this process knows.
        head: the newest head that this process knows; None before the first record.
    """

    def __init__(
        self,
        store: LedgerStore,
        writer: Signer | None,
        state: LedgerState,
        head: Head | None,
        *,
        high_water: HighWater | None = None,
    ) -> None:
        self.store, self.writer, self.state, self.head = store, writer, state, head
        self.high_water = high_water
        #: By run, one for each lease; weak: the key of a step dies with the receipt that needs it.
        self.keys: dict[str, weakref.WeakSet[Lifetime]] = {}
        # Marks that are known to be part of the history, and roots of the newest sizes, to judge others by.
        self._known_marks: tuple[Mark | None, Mark | None] = (None, None)
        self._roots: dict[int, bytes] = {}
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._closed = False

    @property
    def forked(self) -> bool:
        """Whether this is a copy in a forked child."""
        return os.getpid() != self._pid

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

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

    def transact(self, write: Callable[[Draft], T], *, writer: Signer | None = None) -> T:
        """Catch up, let ``write`` draft records, sign the head and commit; durable on return of what ``write`` gave.

        A draft without records commits nothing. What ``write`` raises leaves the ledger as it was. ``writer`` takes the
        place of this journal's when the draft makes it the ledger's writer.

        Raises:
            StorageFailed: nothing may be released (DP075).
            Tampered: what another process added breaks a rule.
            InvalidParameter: opened for reading, or the writer's key was replaced meanwhile (DP080).
        """
        self.guard()
        signer = writer or self.writer
        if signer is None:
            raise InvalidParameter(
                "the ledger was opened for reading", code="DP080", hint="open it with the writer's key"
            )
        with self._lock:
            with self.store.transaction() as transaction:
                state, head = self._catch_up(transaction)
                draft = Draft(state)
                result = write(draft)
                if draft.entries:
                    genesis, state = draft.state.genesis, draft.state
                    check_writer(state, signer)
                    head = sign_head(genesis.ledger_id, state.size, state.tree.root, signer)
                    transaction.append(draft.entries, head.note.encode("utf-8"), size=state.size, keep=draft.keep)
            if state.size >= self.state.size:  # else a signal handler went on since the commit
                self.state, self.head, self.writer = state, head, signer
            if draft.entries and head is not None and self.high_water is not None:
                # After the commit: a mark beyond what is on disk would lock the ledger out for ever.
                self._raise_mark(self.high_water, state, head)
        return result

    def _raise_mark(self, high_water: HighWater, state: LedgerState, head: Head) -> None:
        """Remember the new head; what somebody else remembered meanwhile must be of this history.

        Of two copies that go on at once, whoever comes second sees the mark of the first, and releases nothing.
        """
        mark, before = high_water.raise_to(state.genesis.ledger_id, head)
        self._known_marks = (mark, self._known_marks[0])
        if before is None or before in self._known_marks:
            return
        if before[0] in self._roots:
            high_water.check(before, state, self._roots)
            return
        with self.store.transaction() as transaction:
            self._catch_up(transaction, before)

    def _catch_up(self, transaction: Transaction, mark: Mark | None = None) -> tuple[LedgerState, Head | None]:
        # Read under the lock: whoever belongs to this history raises the mark after a commit.
        mark, state, roots = mark or self._new_mark(), self.state, dict[int, bytes]()
        added = iter(transaction.read(state.size))
        first = next(added, None)
        if first is not None:
            # Marks are of the newest records nearly always, and then need no second reading.
            machine = Machine(state, watch=range(state.size, state.size + _ROOTS))
            machine.feed(chain((first,), added))
            state, roots = machine.state(), machine.roots
        # Before anything of it is believed.
        head = self._newest(state, transaction.note())
        if self.high_water is not None and state.size:
            self._remember_roots({**roots, state.size: state.tree.root})
        if mark is not None:
            self._check_mark(mark, transaction, state)
        return state, head

    def _remember_roots(self, roots: Mapping[int, bytes]) -> None:
        self._roots |= roots
        for size in list(self._roots)[:-_ROOTS]:
            del self._roots[size]

    def _new_mark(self) -> Mark | None:
        """The mark of this machine, where it is not known to be part of the history."""
        if self.high_water is None or self.state.size == 0:
            return None
        mark = self.high_water.known(self.state.genesis.ledger_id)
        return None if mark in self._known_marks else mark

    def _check_mark(self, mark: Mark, transaction: Transaction, state: LedgerState) -> None:
        """Before every append: this machine has seen no other history, and none that goes beyond this one.

        A process that opened a copy before the ledger went on would otherwise spend the same budget a second time.
        """
        roots: Mapping[int, bytes] = self._roots
        if mark[0] < state.size and mark[0] not in roots:
            # Another process raised it late, to a place that this one had passed; rare, so all is read again.
            machine = Machine(LedgerState(trust=state.trust), watch=(mark[0],))
            machine.feed(transaction.read(0))
            roots = machine.roots
        if self.high_water is not None:
            self.high_water.check(mark, state, roots)
        self._known_marks = (self._known_marks[0], mark)

    def wipe_keys(self, run_id: str | None = None) -> None:
        """Erase the noise keys of one run, or of all."""
        for run in [run_id] if run_id is not None else list(self.keys):
            for lifetime in list(self.keys.get(run, ())):
                lifetime.end()

    def reading(self) -> AbstractContextManager[Reading]:
        """The whole store, consistently."""
        self.guard()
        return self.store.reading()

    def close(self) -> None:
        """Erase all keys and close the store; harmless when repeated."""
        self._closed = True
        self.wipe_keys()
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


def check_writer(state: LedgerState, signer: Signer) -> None:
    """Refuse a key that is not the writer's now (DP080); one that was replaced by a rekey is good for nothing."""
    if signer.public != state.writer:
        raise InvalidParameter(
            f"the key {signer.public.hex} is not the ledger's writer",
            code="DP080",
            hint=f"open it with the writer's key, whose public half is {state.writer.hex}",
        )
