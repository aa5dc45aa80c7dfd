"""Runs and their leases while records are applied to them: what :mod:`dpbudget.ledger.rules` changes in place."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

from dpbudget.errors import Tampered
from dpbudget.ledger.state import Lease, RunState


class OpenLease:
    """A lease that is neither complete nor closed, or was until now."""

    __slots__ = ("count", "first", "open", "reserved", "settled")

    def __init__(self, first: int, count: int, reserved: int = 0, settled: int = 0) -> None:
        self.first, self.count, self.reserved, self.settled = first, count, reserved, settled
        self.open = True


class Cell:
    """A run while records are applied to it."""

    __slots__ = ("_ended", "charged", "fixed", "leases", "reserved", "steps")

    def __init__(self, run: RunState) -> None:
        self.fixed, self.steps = run, run.plan.steps
        self.charged, self.reserved = run.charged, run.reserved
        self.leases = [OpenLease(held.first, held.count, held.reserved, held.settled) for held in run.leases]
        self._ended = 0

    def end(self, lease: OpenLease) -> None:
        """Close a lease. The list is swept when half of it is closed: a million leases take no square of that."""
        lease.open = False
        self._ended += 1
        if 2 * self._ended > len(self.leases):
            self.leases, self._ended = [held for held in self.leases if held.open], 0

    def state(self) -> RunState:
        """The run as a value."""
        leases = tuple(Lease(held.first, held.count, held.reserved, held.settled) for held in self.leases if held.open)
        return replace(self.fixed, charged=self.charged, reserved=self.reserved, leases=leases)


def open_lease(cell: Cell, step: int) -> OpenLease:
    """The open lease that holds a step; raises :class:`Tampered`."""
    leases = cell.leases
    if leases:
        # Sorted by their first steps; the newest is nearly always meant.
        lease = leases[-1]
        if step < lease.first:
            lease = leases[max(bisect_right(leases, step, key=lambda held: held.first) - 1, 0)]
        if lease.open and lease.first <= step < lease.first + lease.count:
            return lease
    raise Tampered(f"step {step} of run {cell.fixed.run_id} is in no open lease")
