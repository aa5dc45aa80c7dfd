"""What happened to a budget, in the order of its records: a ledger holds no times, so this order is its time.

Grants, plans, keys and notes are single events. Leases are merged where they follow each other, and where several runs
spend in turn for long, neighbours are merged until at most :data:`MOST_STRETCHES` are left, each with its steps by run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpbudget.ledger.entries import Entry, kind_of, read

#: Stretches of spending that a history keeps apart.
MOST_STRETCHES = 256
#: Single events that a history keeps; what comes later is counted.
MOST_EVENTS = 4096
_SINGLE = frozenset({"genesis", "budget", "portfolio", "plan", "commit", "entropy", "rekey", "note"})


@dataclass
class Stretch:
    """Records ``first`` to ``last``, between which ``steps`` of each run were charged; no other event lies inside."""

    first: int
    last: int
    steps: dict[str, int]
    after: int

    def add(self, other: Stretch) -> None:
        """Take in the stretch that follows."""
        self.last = other.last
        for run, count in other.steps.items():
            self.steps[run] = self.steps.get(run, 0) + count


@dataclass(frozen=True)
class Event:
    """One record that is no lease.

    Attributes:
        record: its position.
        kind: its type.
        about: the run of a plan, commit or entropy, the event of a note, the role of a rekey, the index of a portfolio;
            else empty.
    """

    record: int
    kind: str
    about: str


@dataclass
class History:
    """Collects events and stretches from the records of one ledger, each shown once and in order.

    Attributes:
        events: single events, oldest first.
        stretches: spending, oldest first.
        unheard: single events beyond :data:`MOST_EVENTS`.
    """

    events: list[Event] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    unheard: int = 0
    _position: int = 0

    def see(self, entry: Entry) -> None:
        """Take the next record, of which nothing is checked yet; what is no record of a ledger is passed over."""
        position, kind = self._position, kind_of(entry.line)
        self._position += 1
        if kind == "lease":
            record = read(entry.line)
            self._spent(Stretch(position, position, {record["run"]: record["count"]}, len(self.events) + self.unheard))
        elif kind in _SINGLE:
            if len(self.events) == MOST_EVENTS:
                self.unheard += 1
            else:
                self.events.append(Event(position, kind, _about(kind, read(entry.line))))

    def _spent(self, lease: Stretch) -> None:
        newest = self.stretches[-1] if self.stretches else None
        if newest is not None and newest.after == lease.after and newest.steps.keys() == lease.steps.keys():
            newest.add(lease)
            return
        self.stretches.append(lease)
        if len(self.stretches) > 2 * MOST_STRETCHES:
            self.stretches = _halved(self.stretches)

    def spending(self) -> list[Stretch]:
        """At most :data:`MOST_STRETCHES` stretches."""
        kept = self.stretches
        while len(kept) > MOST_STRETCHES and len(halved := _halved(kept)) < len(kept):
            kept = halved
        return kept


def _about(kind: str, record: dict[str, Any]) -> str:
    of_run = dict.fromkeys(("plan", "commit", "entropy"), "run")
    name = {**of_run, "note": "event", "rekey": "role", "portfolio": "index"}.get(kind)
    return "" if name is None else str(record[name])


def _halved(stretches: list[Stretch]) -> list[Stretch]:
    """Every second stretch joined to the one before it, wherever no other event lies between them."""
    kept: list[Stretch] = []
    for index, stretch in enumerate(stretches):
        if index % 2 and kept[-1].after == stretch.after:
            kept[-1].add(stretch)
        else:
            kept.append(Stretch(stretch.first, stretch.last, dict(stretch.steps), stretch.after))
    return kept
