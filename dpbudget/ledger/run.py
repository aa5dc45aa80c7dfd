"""A run: the steps of one signed plan, handed out as receipts, each charged durably before it exists."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from operator import length_hint
from types import TracebackType
from typing import Self

from dpbudget.curve import Bounds, round_down, round_up, show_delta
from dpbudget.errors import BudgetExceeded, InvalidParameter, PlanExhausted, PrivacyViolation, StorageFailed
from dpbudget.ledger.admission import out_of
from dpbudget.ledger.claims import portfolio_claim
from dpbudget.ledger.committed import remember_head
from dpbudget.ledger.journal import Draft, Journal
from dpbudget.ledger.noise_keys import LeaseKey, Lifetime, StepKeys
from dpbudget.ledger.plan_key import RunKey, SharedKey
from dpbudget.ledger.receipt import Receipt
from dpbudget.ledger.renyi import steps_that_fit
from dpbudget.ledger.sealed import SealedKeys
from dpbudget.ledger.state import LedgerState, Portfolio, RunState, SpendingFilter
from dpbudget.meter import Meter
from dpbudget.plan import Plan

#: Most steps of a lease where the caller names no number, and where they do: the keys of its steps are kept ready.
MAX_LEASE_STEPS, MOST_LEASE_STEPS = 64, 1 << 16


def default_lease_steps(steps: int) -> int:
    """Steps a lease: a fiftieth of the plan, at least 1, at most 64.

    A function of the public plan alone: step times depend on private batch sizes, so a lease that adapted to them would
    leak. For the same reason reserves and settles are written with the next lease or at the close, and never by the
    clock. A crash loses at most the rest of one lease, 2 % of the plan or one step.
    """
    return min(max(1, steps // 50), MAX_LEASE_STEPS)


@dataclass
class _Held:
    """The lease that this process holds: steps ``first`` to ``end - 1``, of which ``steps`` are left."""

    first: int
    end: int
    nonce: bytes
    keys: StepKeys | SharedKey
    # Taking a step is one call, so that neither a thread nor a signal handler between two instructions gets it again.
    steps: Iterator[int]

    @property
    def next(self) -> int:
        """The step that is issued next; ``end`` after the last."""
        return self.end - length_hint(self.steps)


@dataclass
class _Issued:
    step: int
    fresh: bytes
    output: str | None = None


class Run:
    """Receipts for the steps of one plan: ``for receipt in run: ...``; made by :meth:`Ledger.start`.

    A receipt exists only after the lease that holds its step is on disk. The steps of a lease are charged together;
    what a crash leaves of it stays charged. Several processes may hold runs of one ledger at once; two that start the
    same run get different steps of it.

    Attributes:
        meter: live epsilon, or None.
    """

    def __init__(
        self,
        journal: Journal,
        run_id: str,
        *,
        filter: SpendingFilter | None,
        meter: Meter | None,
        lease_steps: int | None,
        keep_keys: SealedKeys | None = None,
        run_key: RunKey | None = None,
    ) -> None:
        state = journal.state.runs[run_id]
        self._run_id, self._plan, self.meter = run_id, state.plan, meter
        self._digest = state.statement
        self._journal, self._filter, self._keep, self._run_key = journal, filter, keep_keys, run_key
        self._lease_steps = default_lease_steps(self.planned) if lease_steps is None else lease_steps
        if not 1 <= self._lease_steps <= min(self.planned, MOST_LEASE_STEPS):
            raise InvalidParameter(
                f"a lease of {self._lease_steps} steps; it must hold 1 to {min(self.planned, MOST_LEASE_STEPS)}",
                hint="leave lease_steps out",
            )
        self._held: _Held | None = None
        self._issued: list[_Issued] = []
        # For threads; a signal handler gets through, and finds every step passed and every key known to close().
        self._lock = threading.RLock()
        self._closed = False

    @property
    def run_id(self) -> str:
        """32 hexadecimal digits."""
        return self._run_id

    @property
    def plan(self) -> Plan:
        """The signed plan; nobody puts another in its place."""
        return self._plan

    @property
    def planned(self) -> int:
        """Planned steps, T."""
        return self.plan.steps

    @property
    def charged(self) -> int:
        """Steps charged so far, by any process this one has heard of; never below the steps released."""
        return self._state.charged

    @property
    def remaining(self) -> int:
        """Receipts that this run can still hand out."""
        held = self._held.end - self._held.next if self._held else 0
        return self.planned - self.charged + held

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def epsilon(self) -> Bounds | None:
        """Epsilon of the charged steps, **if stopping there had been planned**; None without a meter.

        The guarantee of the run is its plan's claim, whatever this shows.
        """
        return None if self.meter is None else self.meter.epsilon(self.charged)

    def __iter__(self) -> Iterator[Receipt]:
        while self.remaining:
            try:
                yield self.next_receipt()
            except PlanExhausted:
                # Another process took the last steps meanwhile.
                return

    def next_receipt(self) -> Receipt:
        """The right to release the next step; a new lease is made durable first where the last one is used up.

        Raises:
            PlanExhausted: every planned step is charged (DP050).
            BudgetExceeded: the first lease of a portfolio does not fit the budget (DP052).
            StorageFailed: the charge could not be made durable, or the key not kept; nothing may be released (DP075).
            ReceiptSpent: this process was forked from the one that started the run (DP076).
            PrivacyViolation: the run is closed (DP078).
        """
        self._guard()
        with self._lock:
            # Again, or a thread that waited for another's close() would begin a new lease of a closed run.
            self._guard()
            return self._next_receipt()

    def _next_receipt(self) -> Receipt:
        held, step = self._held, None
        # Passed before its receipt exists: an interrupt from here on loses the step and never gives it out twice.
        while held is None or (step := next(held.steps, None)) is None:
            held = self._take_lease()
        # After the commit: a copied file or a restored backup draws other bytes, hence other noise. Nothing of a
        # committed run is chosen here.
        fresh = os.urandom(16) if self._run_key is None else bytes(16)
        self._issued.append(_Issued(step, fresh))
        return self._receipt(held, step, fresh)

    def settle(self, receipt: Receipt, output_digest: str | None = None) -> None:
        """Record a hash of the noised output of a step; optional, and only before the next receipt is asked for.

        Args:
            receipt: the newest receipt of this run.
            output_digest: SHA-256 of the released values, 64 hexadecimal digits. Never a hash of data.
        """
        self._guard()
        with self._lock:
            self._settle(receipt, output_digest)

    def _settle(self, receipt: Receipt, output_digest: str | None) -> None:
        newest = self._issued[-1] if self._issued else None
        given = receipt.run_id, receipt.step, receipt.fresh
        if newest is None or given != (self.run_id, newest.step, newest.fresh):
            raise InvalidParameter(
                f"step {receipt.step} of run {receipt.run_id} is not the newest of this run",
                hint="settle a step before you ask for the next receipt",
            )
        if output_digest is not None and (len(output_digest) != 64 or set(output_digest) - set("0123456789abcdef")):
            raise InvalidParameter(f"{output_digest[:80]!r} is not a SHA-256 of 64 hexadecimal digits", code="DP082")
        newest.output = output_digest

    def close(self) -> None:
        """Write what was issued, give up the rest of the lease (it stays charged) and erase the keys; idempotent.

        Raises:
            StorageFailed: the last settles could not be written; their steps stay charged all the same.
        """
        if self._journal.forked:
            # A forked child holds a copy of the run, whose keys are gone; its parent closes the original.
            return
        with self._lock:
            self._closed = True
            # Each time: what an interrupt left undone is done by the next call.
            self._journal.wipe_keys(self.run_id)
            # Of a ledger that is closed there is nothing to write to; what was issued stays charged.
            if self._held is not None and not self._journal.closed:
                try:
                    self._journal.transact(partial(self._write_close, self._held))
                except Exception:
                    self._held = None
                    raise
                self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StorageFailed:
            # The error that ends the block says more; the unwritten settles cost nothing but their replay.
            if error is None:
                raise

    def __repr__(self) -> str:
        return f"<Run {self.run_id}: {self.charged} of {self.planned} steps charged>"

    @property
    def _state(self) -> RunState:
        return self._journal.state.runs[self.run_id]

    def _guard(self) -> None:
        self._journal.guard()
        if self._closed:
            raise PrivacyViolation(
                f"run {self.run_id} is closed", code="DP078", hint="start it again for the steps that are left"
            )

    def _receipt(self, held: _Held, step: int, fresh: bytes) -> Receipt:
        phase = self.plan.phase_at(step)
        assert self.plan.nominal_size is not None  # noqa: S101 - the ledger admits no plan without it
        return Receipt(
            run_id=self.run_id,
            step=step,
            steps=self.planned,
            rate_k=phase.rate_k,
            noise_multiplier=phase.noise_multiplier,
            clip_norm=self.plan.clip_norm,
            nominal_size=self.plan.nominal_size,
            max_parameters=self.plan.max_parameters,
            noise=self.plan.noise,
            adjacency=self.plan.adjacency,
            plan_digest=self._digest,
            lease_nonce=held.nonce,
            fresh=fresh,
            key=held.keys.take(step - held.first),
            committed=self._run_key is not None,
        )

    def _take_lease(self) -> _Held:
        lifetime = Lifetime()
        # Before the lease exists, so that whoever closes the run or the ledger from now on ends its keys.
        self._journal.keys.setdefault(self.run_id, weakref.WeakSet()).add(lifetime)
        nonce, key = os.urandom(32), self._key_of_lease(lifetime)
        taken: _Held | None = None
        while taken is None:
            state = self._journal.state
            seen = self._portfolio(state)
            # Outside the lock, since an accountant takes its time; inside, the portfolio must still be what was seen.
            claim = None if seen is None or seen.frozen else self._joint_claim(state, seen)
            taken = self._journal.transact(partial(self._write_lease, seen, claim, nonce, key))
        if self._run_key is not None:
            remember_head(self._journal)  # or an older copy could be put back here, and repeat this noise
        self._issued, self._held = [], taken
        key.wipe()  # the keys of the steps are made, and nothing leads back from one to those before it
        if self._closed:  # by a signal handler meanwhile
            lifetime.end()
            self._guard()
        return taken

    def _key_of_lease(self, lifetime: Lifetime) -> LeaseKey | RunKey:
        if self._run_key is not None:
            return self._run_key.for_lease(lifetime)
        key = LeaseKey(lifetime)
        if self._keep is not None:
            # Before the lease: a key that could not be kept costs nothing.
            ledger = self._journal.state.genesis.ledger_id
            self._keep.keep("lease-key", ledger=ledger, run=self.run_id, commitment=key.commitment, key=key.reveal())
        return key

    def _portfolio(self, state: LedgerState) -> Portfolio | None:
        index = state.runs[self.run_id].portfolio
        return state.portfolios[index - 1] if index else None

    def _joint_claim(self, state: LedgerState, portfolio: Portfolio) -> float:
        if self._filter is None:
            raise InvalidParameter(
                f"portfolio {portfolio.index} has no claim yet and the ledger was opened without a filter",
                code="DP061",
                hint="pass filter=PortfolioFilter(accountant) to Ledger.open",
            )
        return portfolio_claim(self._filter, state.plans_of(portfolio), portfolio.delta)

    def _write_lease(
        self, seen: Portfolio | None, claim: float | None, nonce: bytes, key: LeaseKey | RunKey, draft: Draft
    ) -> _Held | None:
        """Draft what was issued and the next lease; None where another process changed the portfolio meanwhile."""
        now, first = self._portfolio(draft.state), draft.state.runs[self.run_id].charged
        if now is not None and seen is not None and (now.frozen, now.runs) != (seen.frozen, seen.runs):
            return None
        if self._run_key is None and draft.state.runs[self.run_id].commitment is not None:
            raise InvalidParameter(
                f"run {self.run_id} was committed to a plan key meanwhile", code="DP084", hint="start it again with it"
            )
        if first >= self.planned:
            raise self._exhausted()
        if now is not None and claim is not None:
            _check_room(draft.state, now, claim)
        count = min(self._lease_steps, self.planned - first)
        if now is None:
            count = self._steps_with_room(draft.state, count)
        held = self._held
        if held is not None:
            self._write_issued(held, draft)
        draft.add(
            "lease",
            run=self.run_id,
            nonce=nonce.hex(),
            commitment=key.commitment,
            first=first,
            count=count,
            claim=claim,
        )
        return _Held(first, first + count, nonce, key.ratchet(count), iter(range(first, first + count)))

    def _steps_with_room(self, state: LedgerState, most: int) -> int:
        """Steps of the next lease of a run in an rdp ledger: as many as some order has room for."""
        run, account = state.runs[self.run_id], state.account
        assert account is not None and run.costs is not None  # noqa: S101, PT018 - a run without a portfolio
        count = steps_that_fit(account, self.run_id, run.plan, run.costs, most)
        if count == 0:
            raise BudgetExceeded(
                f"step {run.charged + 1} of {self.planned}: no Renyi order of the ledger has room for it beside what "
                f"is spent; {run.charged} steps of this run are charged",
                hint="the run ends here and stays covered; a plan with more noise, or a grant of the owner, goes on",
            )
        return count

    def _write_issued(self, held: _Held, draft: Draft) -> None:
        """Reserve and settle every receipt that was issued and is not on disk yet.

        What is on disk is asked of the ledger: an interrupt right after a commit leaves no trace in this object.
        """
        lease = next((lease for lease in draft.state.runs[self.run_id].leases if lease.first == held.first), None)
        written = held.end if lease is None else lease.first + lease.reserved
        if held.next <= written:
            return
        # A step whose receipt was lost in an interrupt is reserved like the others and never settled.
        draft.add("reserve", run=self.run_id, step=written, count=held.next - written)
        # In order and of this lease alone: a signal handler may have taken steps in between.
        for issued in sorted(
            (one for one in self._issued if written <= one.step < held.next), key=lambda one: one.step
        ):
            draft.add("settle", run=self.run_id, step=issued.step, fresh=issued.fresh.hex(), output=issued.output)

    def _write_close(self, held: _Held, draft: Draft) -> None:
        self._write_issued(held, draft)
        still_open = any(lease.first == held.first for lease in draft.state.runs[self.run_id].leases)
        if held.next < held.end and still_open:
            draft.add("close", run=self.run_id, first=held.first, unspent=held.end - held.next)

    def _exhausted(self) -> PlanExhausted:
        claim = self.plan.claim
        return PlanExhausted(
            f"step {self.planned + 1} of {self.planned} is not in the plan; its {self.planned} steps claim "
            f"epsilon {round_up(claim.epsilon)} at delta {show_delta(claim.delta)}, and nothing beyond them is covered",
            hint="stop here; to train longer, plan more steps before the first one (epochs), or sign another run where "
            "dpbudget ledger show says that some of the budget is left",
        )


def _check_room(state: LedgerState, portfolio: Portfolio, claim: float) -> None:
    room = state.room_for(portfolio)
    if Fraction(claim) > room:
        raise BudgetExceeded(
            f"the plans of portfolio {portfolio.index} claim epsilon {round_up(claim, 10)} together at delta "
            f"{portfolio.delta:g}; {round_down(out_of(room), 10)} is left of the budget",
            hint="nothing was charged; sign a smaller plan",
        )
