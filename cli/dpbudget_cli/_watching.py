"""A ledger seen from outside, again and again: only what is new is read and checked, and nothing is written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from dpbudget.curve import Bounds, round_up, show_delta
from dpbudget.errors import DPBudgetError, StorageFailed
from dpbudget_cli import _output as out

if TYPE_CHECKING:
    from dpbudget.ledger.state import LedgerState, RunState
    from dpbudget.meter import Meter

#: A look that took t seconds is followed by a pause of at least this many t, so that watching costs little of a
#: processor however long the ledger is; but never of more seconds than the second number.
_PAUSE, _LONGEST = 20.0, 60.0
#: Where SQLite keeps the counter of commits in a file: bytes 24 to 27 of its header.
_COUNTER_END = 28


@dataclass(frozen=True)
class Row:
    """One run, as it stands.

    Attributes:
        epsilon: of the charged steps, *if stopping there had been planned*; None where no accountant can say.
    """

    run: RunState
    epsilon: Bounds | None

    @property
    def left(self) -> int:
        """Steps that are not charged yet."""
        return self.run.plan.steps - self.run.charged

    def line(self) -> str:
        """The row as one line of text."""
        claim = self.run.plan.claim
        reached = "epsilon unknown" if self.epsilon is None else f"epsilon {round_up(self.epsilon.upper, 4)}"
        return (
            f"run {self.run.run_id[:8]}: {self.run.charged} of {self.run.plan.steps} steps charged, {reached} of "
            f"{round_up(claim.epsilon, 4)} (delta {show_delta(claim.delta)})"
        )

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        claim = self.run.plan.claim
        return {
            "run": self.run.run_id,
            "charged": self.run.charged,
            "planned": self.run.plan.steps,
            "left": self.left,
            "epsilon_so_far": None if self.epsilon is None else out.bounds_json(self.epsilon),
            "claim": {"epsilon": claim.epsilon, "delta": claim.delta},
        }


@dataclass
class LedgerView:
    """What a ledger says, from the last look at it.

    Attributes:
        path: the ledger's location.
        state: after the newest record that was read; None before the first look.
        head: the signed head of that state.
    """

    path: str
    state: LedgerState | None = None
    head: str = ""
    _mark: tuple[int, ...] | None = None
    _meters: dict[str, Meter | None] = field(default_factory=dict)

    def look(self) -> bool:
        """Read what was added since; whether there was anything.

        Raises:
            Tampered: what was added breaks a rule, or the ledger is not the one of the last look (DP071).
            Unreadable: it is gone (DP070).
        """
        mark = _mark_of(self.path)
        if mark is not None and mark == self._mark:
            return False
        from dpbudget.ledger.journal import check_head, conclude
        from dpbudget.ledger.rules import Machine
        from dpbudget.ledger.state import LedgerState
        from dpbudget.ledger.store.locate import reading_at

        before = LedgerState() if self.state is None else self.state
        with reading_at(self.path) as reading:
            machine = Machine(before, remember=self.state is None)
            machine.feed(islice(reading.entries(), before.size, None))
            note = reading.newest()
        if self.state is None:
            self.state, head = conclude(machine, note)
        else:
            # What was read before is not read again: the head covers it, too.
            self.state = machine.state()
            head = check_head(self.state, note or b"")
        self._mark, self.head = mark, str(head)
        return self.state.size > before.size

    def rows(self) -> list[Row]:
        """Every run."""
        return [] if self.state is None else [Row(run, self._epsilon(run)) for run in self.state.runs.values()]

    @property
    def finished(self) -> bool:
        """Whether there are plans, and none of them has steps left."""
        runs = () if self.state is None else self.state.runs.values()
        return bool(runs) and all(run.charged == run.plan.steps for run in runs)

    def budget(self) -> dict[str, Any]:
        """``budget``, ``spent``, ``promised`` and ``left``, as ``ledger show`` has them."""
        from dpbudget_cli.ledger_show import standing_of

        assert self.state is not None  # noqa: S101 - nobody asks before the first look
        return {"budget": {"epsilon": self.state.epsilon, "delta": self.state.delta}, **standing_of(self.state)}

    def _epsilon(self, run: RunState) -> Bounds | None:
        if not run.charged:
            return Bounds(0.0, 0.0)
        if run.run_id not in self._meters:
            self._meters[run.run_id] = _meter_of(run)
        meter = self._meters[run.run_id]
        return None if meter is None else meter.epsilon(run.charged)


def _meter_of(run: RunState) -> Meter | None:
    from dpbudget._live import build_meter

    try:
        return build_meter(run.plan)
    except DPBudgetError:
        return None


def _mark_of(path: str) -> tuple[int, ...] | None:
    """What changes with every commit to a ledger file and costs one read of it; None for a database."""
    from dpbudget.ledger.store.postgres_url import is_database

    if is_database(path):
        return None
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            header = file.read(_COUNTER_END)
    except (OSError, ValueError):
        return None  # the look itself says why
    return status.st_ino, status.st_size, status.st_mtime_ns, int.from_bytes(header[-4:], "big")


def changes(view: LedgerView, interval: float, seconds: float | None) -> Iterator[None]:
    """One item at once, and one for every look that found something new, until nothing more can come.

    Args:
        view: looked at anew before each item.
        interval: seconds between two looks; longer where a look takes long, so that they cost little.
        seconds: end after so many; None to go on for as long as a plan has steps left.
    """
    ends = None if seconds is None else time.monotonic() + seconds
    took, found = 0.0, view.look()  # the first look loads what all others use
    yield
    while not view.finished and (ends is None or time.monotonic() < ends):
        pause = max(interval, min(_PAUSE * took, _LONGEST))
        time.sleep(pause if ends is None else max(min(pause, ends - time.monotonic()), 0.0))
        began = time.monotonic()
        try:
            found = view.look()
        except StorageFailed:  # written to all the time
            continue
        finally:
            took = time.monotonic() - began
        if found:
            yield
