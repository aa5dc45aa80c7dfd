"""The ledger: one append-only, signed file for one dataset, with many runs in it.

::

    budget = Budget(epsilon=3.0, delta=1e-6)
    ledger = Ledger.create("health.ledger", budget=budget, owner=owner, writer=writer, filter=filter)
    run_id = ledger.sign_plan(plan, owner=owner)
    with ledger.start(run_id) as run:
        for receipt in run:            # each step is charged on disk before its receipt exists
            ...
"""

from __future__ import annotations

import os
import secrets
import weakref
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, cast

from dpbudget.errors import InvalidParameter, StorageFailed, Tampered
from dpbudget.ledger.admission import (
    admit_plan,
    check_frozen,
    check_lowering,
    check_owner,
    first_portfolio,
    plan_delta_of,
    renyi_record,
    seal_record,
)
from dpbudget.ledger.committed import commit_run, give_entropy, ready_to_start
from dpbudget.ledger.entries import NOTES
from dpbudget.ledger.head import Head, verifier_key
from dpbudget.ledger.high_water import HighWater, marks_in
from dpbudget.ledger.journal import CheckedReading, Draft, Journal, check_writer, replay_store
from dpbudget.ledger.plan_key import PlanKey
from dpbudget.ledger.rekey import change_key
from dpbudget.ledger.requests import apply_request, request_budget, request_plan
from dpbudget.ledger.run import Run
from dpbudget.ledger.sealed import SealedKeys
from dpbudget.ledger.signing import PublicKey, Signer, check_signer
from dpbudget.ledger.state import LedgerState, SpendingFilter
from dpbudget.ledger.store import files
from dpbudget.ledger.store.base import LedgerStore, Snapshot
from dpbudget.ledger.store.jsonl import create_export, write_export
from dpbudget.ledger.store.locate import ReadingStore, create_store, open_store, reading_at
from dpbudget.ledger.store.memory import MemoryStore
from dpbudget.mechanisms import Adjacency
from dpbudget.meter import Meter
from dpbudget.plan import Budget, Plan, Unit


class Ledger:
    """An open ledger; :meth:`create` makes one and :meth:`open` verifies one."""

    def __init__(self, journal: Journal, filter: SpendingFilter | None) -> None:
        self._journal, self._filter = journal, filter
        self._runs: weakref.WeakSet[Run] = weakref.WeakSet()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None,
        *,
        budget: Budget,
        owner: Signer,
        writer: Signer,
        filter: SpendingFilter,
        adjacency: Adjacency = Adjacency.ADD_REMOVE,
        unit: Unit = "example",
        dataset: str | None = None,
        public_data: bool = False,
        whole_budget: bool = False,
        kind: Literal["portfolio", "rdp"] = "portfolio",
        high_water: HighWater | bool = True,
    ) -> Ledger:
        """A new ledger with the owner's budget, and its first portfolio or its Renyi orders.

        Two ledgers for one dataset cannot be detected: the owner keeps one ledger a dataset.

        Args:
            path: a new file on a local disk, or ``postgresql://...#name``; None keeps the ledger in memory, where it is
                not durable.
            budget: total (epsilon, delta) for one record of the dataset.
            owner: signs budget and plans.
            writer: another key, that of the training process; it signs heads and cannot create budget.
            filter: computes joint claims.
            adjacency: which datasets are neighbours.
            unit: whose presence is protected, an ``example`` or a ``user`` with all of its examples; for every plan.
            dataset: the owner's id of the dataset, 64 hexadecimal digits: random (the default) or a keyed hash. An
                unkeyed hash of the data would let anybody test guesses of it.
            public_data: the owner declares the dataset public.
            whole_budget: the first portfolio takes the whole budget, so that one run can be calibrated to all of it;
                else it takes half of delta, and as much epsilon as its plans claim.
            kind: ``portfolio`` composes plans that are signed before any of them is run, as tightly as is known;
                ``rdp`` lets every step be chosen after all others, at the price of Renyi accounting.
            high_water: where this machine remembers the newest head; True for the user's folder, False for nowhere.

        Raises:
            InvalidParameter: the path exists (DP074), or owner and writer are one key (DP080).
        """
        check_signer("owner", owner)
        check_signer("writer", writer)
        if owner.public == writer.public:
            raise InvalidParameter(
                "owner and writer are one key", code="DP080", hint="make two keys: the writer must not create budget"
            )
        if not isinstance(budget, Budget):
            raise InvalidParameter(
                f"budget is {budget!r:.60}, not a Budget",
                code="DP060",
                hint="budget=dpbudget.Budget(epsilon=3.0, delta=1e-5)",
            )
        dataset = secrets.token_hex(32) if dataset is None else dataset
        if len(dataset) != 64 or set(dataset) - set("0123456789abcdef"):
            raise InvalidParameter(
                f"dataset id {dataset[:80]!r} is not 64 lower-case hexadecimal digits",
                code="DP082",
                hint="use a random id or a keyed hash (HMAC-SHA-256) of the dataset's name",
            )
        facts: dict[str, Any] = {
            "dataset": dataset,
            "adjacency": Adjacency(adjacency).value,
            "unit": unit,
            "epsilon": budget.epsilon,
            "delta": budget.delta,
            "filter": kind,
            "owner": owner.public.hex,
            "writer": writer.public.hex,
            "public_data": public_data,
        }
        seal = partial(seal_record, owner)
        second = renyi_record(filter, budget) if kind == "rdp" else first_portfolio(budget, whole_budget)
        store: LedgerStore = MemoryStore() if path is None else create_store(path)
        marks = marks_in(high_water) if path is not None else None
        journal = Journal(store, writer, LedgerState(trust=owner.public), None, high_water=marks)

        def write(draft: Draft) -> None:
            draft.add("genesis", seal=seal, **facts)
            draft.add("renyi" if kind == "rdp" else "portfolio", seal=seal, **second)

        try:
            journal.transact(write)
        except BaseException:
            store.close()
            raise
        return cls(journal, filter)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writer: Signer | None = None,
        filter: SpendingFilter | None = None,
        trust: PublicKey | bytes | None = None,
        high_water: HighWater | bool = True,
    ) -> Ledger:
        """Open a ledger after every record, signature and rule in it was verified.

        Args:
            path: a ledger file; for reading, an export too.
            writer: the writer's key; None opens for reading and writes nothing.
            filter: computes joint claims; needed to sign plans and to begin a portfolio.
            trust: the owner's public key, known from outside. Without it :attr:`trusted` is False, since a key found
                inside the file proves nothing.
            high_water: with a writer, refuse an older copy than this machine has seen; True for the user's marks.

        Raises:
            Unreadable: missing or not a ledger (DP070), or unsafe to open (DP083).
            Tampered: anything in it does not agree (DP071, DP082), another owner's key (DP072), or an older copy
                (DP079).
            InvalidParameter: ``writer`` is not the ledger's writer (DP080).
        """
        key = PublicKey(trust) if isinstance(trust, bytes) else trust
        if writer is None:
            reader = ReadingStore(path)
            state, head = replay_store(reader, key)
            return cls(Journal(reader, None, state, head), filter)
        check_signer("writer", writer)
        store, marks = open_store(path), marks_in(high_water)
        try:
            state, head = replay_store(store, key, high_water=marks)
            check_writer(state, writer)
        except BaseException:
            store.close()
            raise
        return cls(Journal(store, writer, state, head, high_water=marks), filter)

    @classmethod
    def import_export(
        cls,
        source: str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        writer: Signer,
        trust: PublicKey,
        filter: SpendingFilter | None = None,
        high_water: HighWater | bool = True,
    ) -> Ledger:
        """A new ledger with the records of another one or of its export, and a note that tells both apart.

        Only one of the two may spend from then on: a second one is a fork, which nothing but a kept head shows.

        Raises:
            Tampered: the source breaks a rule, has another owner, or is older than this machine has seen (DP079).
            InvalidParameter: the target exists (DP074), or ``writer`` is not the writer (DP080).
        """
        with reading_at(source) as reading:
            snapshot = Snapshot.of(reading)
        marks = marks_in(high_water)
        state, _ = replay_store(MemoryStore(snapshot), trust, high_water=marks)
        check_writer(state, writer)
        store = create_store(path)
        try:
            with store.transaction() as transaction:
                transaction.append(snapshot.entries, snapshot.note or b"", size=state.size, keep=True)
            ledger = cls.open(path, writer=writer, filter=filter, trust=trust, high_water=marks or False)
        finally:
            store.close()
        ledger.note("imported")
        return ledger

    @classmethod
    def replace_writer(
        cls,
        path: str | os.PathLike[str],
        *,
        new: Signer,
        owner: Signer,
        filter: SpendingFilter | None = None,
        high_water: HighWater | bool = True,
    ) -> Ledger:
        """Open a ledger whose writer's key is lost or stolen, and hand the role to ``new`` by the owner's signature.

        Raises:
            InvalidParameter: ``owner`` is not the owner, or ``new`` was used before (DP080).
        """
        store, marks = open_store(path), marks_in(high_water)
        try:
            state, head = replay_store(store, owner.public, high_water=marks)
            journal = Journal(store, None, state, head, high_water=marks)
            change_key(journal, "writer", new=new, by=owner)
        except BaseException:
            store.close()
            raise
        return cls(journal, filter)

    @property
    def id(self) -> str:
        """Leaf hash of the first record, 64 hexadecimal digits."""
        return self.state.genesis.ledger_id

    @property
    def state(self) -> LedgerState:
        """The newest verified state that this process knows."""
        return self._journal.state

    @property
    def head(self) -> Head:
        """The newest signed head: size, root and note; print it at the start and the end of a run."""
        head = self._journal.head
        assert head is not None  # noqa: S101 - create and open both leave one
        return head

    @property
    def witness_key(self) -> str:
        """The writer's key in the form in which C2SP witnesses and Go's sumdb/note expect it."""
        return verifier_key(self.id, self.state.writer)

    @property
    def trusted(self) -> bool:
        """Whether the owner's key was known from outside the file."""
        return self.state.trusted

    @property
    def durable(self) -> bool:
        """False for a ledger in memory and for one that was opened for reading."""
        return not isinstance(self._journal.store, MemoryStore | ReadingStore)

    @property
    def plan_delta(self) -> float:
        """The delta for which the next plan must be made: that of the open portfolio, else half of what is left.

        In an ``rdp`` ledger, where plans have no delta of their own, the total.
        """
        return plan_delta_of(self.state)

    def refresh(self) -> LedgerState:
        """Read and check what other processes added; a ledger that was opened for reading stays as it was read."""
        if self._journal.writer is not None:
            self._journal.transact(lambda _: None)
        return self.state

    def sign_plan(self, plan: Plan, *, owner: Signer) -> str:
        """Admit a plan: the owner signs it for one run, and the ledger opens the next portfolio where it must.

        Returns:
            The run id, 32 hexadecimal digits.

        Raises:
            BudgetExceeded: the joint claim would not fit; nothing was written (DP052).
            InvalidParameter: the plan does not belong into this ledger, claims less than its filter certifies, or
                ``owner`` is not the owner (DP080).
            Tampered: the writer understated what was spent before (DP071).
        """
        self._journal.guard()
        check_signer("owner", owner)
        return admit_plan(self._journal, self._arithmetic(), plan, owner)

    def request_plan(self, plan: Plan) -> tuple[str, bytes]:
        """Run id and request of a plan, for an owner whose key is elsewhere; see :mod:`dpbudget.ledger.requests`.

        Raises:
            BudgetExceeded: the plan does not fit (DP052).
            InvalidParameter: as :meth:`sign_plan`.
        """
        return request_plan(self.refresh(), self._arithmetic(), plan)

    def request_budget(self, budget: Budget) -> bytes:
        """The request of new totals, for an owner whose key is elsewhere; good until something else is written."""
        state = self.refresh()
        check_frozen(state, self._arithmetic())
        allowances = self._allowances(state, budget)
        check_lowering(state, budget, allowances)
        return request_budget(state, budget, allowances)

    def apply_request(self, signed: bytes) -> str | None:
        """Write what the owner signed elsewhere; the run id of a plan, None for new totals.

        Raises:
            Tampered: a signature is not the owner's (DP071, DP072).
            InvalidParameter: the ledger went on since (DP081), or the request is for another ledger (DP081).
            BudgetExceeded: the plan does not fit any more (DP052).
        """
        self.refresh()
        return apply_request(self._journal, self._arithmetic(), signed)

    def change_budget(self, budget: Budget, *, owner: Signer) -> None:
        """Set new totals: a raise or a lower, signed by the owner.

        Raising is a decision about the people in the data. What was done up to the first raise keeps its own guarantee;
        the new total is one only if the raise did not depend on what was released (docs/ledger-format.md).

        Raises:
            InvalidParameter: not the owner's key (DP080), or the totals are below what is in use (DP052).
            Tampered: the writer understated what was spent before (DP071).
        """
        arithmetic = self._arithmetic()
        while True:
            seen = self.refresh()
            check_owner(seen, owner)
            check_frozen(seen, arithmetic)
            if self._journal.transact(partial(self._write_budget, seen, budget, owner)):
                return

    def _write_budget(self, seen: LedgerState, budget: Budget, owner: Signer, draft: Draft) -> bool:
        """Draft new totals; False where the claims that were checked are not those of the ledger any more."""
        state = draft.state
        if (state.portfolios, state.grants) != (seen.portfolios, seen.grants):
            return False
        allowances = self._allowances(state, budget)
        check_lowering(state, budget, allowances)
        seal = partial(seal_record, owner)
        draft.add("budget", seal=seal, epsilon=budget.epsilon, delta=budget.delta, allowances=allowances)
        return True

    def rekey(self, role: Literal["owner", "writer"], *, new: Signer, by: Signer) -> None:
        """Hand a role to a new key, signed by both; the old key is good for nothing from then on.

        Args:
            role: whose key.
            new: a key that this ledger has never used.
            by: the present key of the role; for the writer's, which may be lost, the owner's too.

        Raises:
            InvalidParameter: ``by`` may not do this, or ``new`` was used before (DP080).
        """
        change_key(self._journal, role, new=new, by=by)

    def note(self, event: str) -> None:
        """Record that something happened; ``event`` is one of ``entries.NOTES``, never free text."""
        if event not in NOTES:
            raise InvalidParameter(f"note {event[:40]!r} is not one of {', '.join(NOTES)}", code="DP082")
        self._journal.transact(lambda draft: draft.add("note", event=event))

    def commit(self, run_id: str, key: PlanKey, *, keep_keys: SealedKeys | None = None) -> None:
        """Commit a run to the key of all its noise, before its first step; what it is for is in docs/threat-model.md.

        Args:
            run_id: a signed run.
            key: of :func:`dpbudget.new_plan_key`; a key for each run.
            keep_keys: seal the key to an auditor, first. Whoever opens that file can remove all noise of the run.

        Raises:
            InvalidParameter: no such run (DP081), or it is committed or has charged steps (DP084).
        """
        commit_run(self._journal, run_id, key, keep_keys)

    def add_entropy(self, run_id: str, value: str) -> None:
        """Write what an auditor, who has seen the head with the commitment, gives to the noise: 64 hexadecimal digits.

        Raises:
            InvalidParameter: no such run (DP081), not committed or given before (DP084), or no such digits (DP082).
        """
        give_entropy(self._journal, run_id, value)

    def _allowances(self, state: LedgerState, budget: Budget) -> tuple[float, ...] | None:
        if state.account is None:
            return None
        return self._arithmetic().renyi_allowances(budget, state.account.terms)

    def _arithmetic(self) -> SpendingFilter:
        if self._filter is None:
            raise InvalidParameter(
                "the ledger was opened without a filter, so no claim can be checked",
                code="DP061",
                hint="pass filter=LedgerFilter() to Ledger.open",
            )
        return self._filter

    def start(
        self,
        run: str | Plan,
        *,
        meter: Meter | None = None,
        lease_steps: int | None = None,
        keep_keys: SealedKeys | None = None,
        plan_key: PlanKey | None = None,
        expect_head: str | None = None,
    ) -> Run:
        """The run of a signed plan, from its first step that is not charged yet.

        Args:
            run: a run id, or a plan: then its newest run with steps left.
            meter: live epsilon.
            lease_steps: steps charged together; the default follows from the plan alone.
            keep_keys: whoever opens this file can remove all noise: it keeps the noise keys, sealed to an auditor.
            plan_key: the key of a run that was committed (:meth:`commit`).
            expect_head: ``size:root`` of the newest head that you know by another way than the ledger, which must be
                part of it. A committed run needs it, since a copy would repeat its noise.

        Raises:
            InvalidParameter: no such plan was signed (DP081), or something of a committed run is missing (DP084).
            UnsafeKeyFile: others could read what ``keep_keys`` writes (DP073).
            Unanchored: ``expect_head`` is not part of this history (DP079).
        """
        run_id = run if isinstance(run, str) else self._run_of(run)
        if run_id not in self.state.runs:
            self.refresh()
        if run_id not in self.state.runs:
            raise InvalidParameter(f"the ledger has no run {run_id[:80]!r}", code="DP081", hint="sign the plan first")
        run_key = ready_to_start(self._journal, run_id, plan_key, expect_head, keep_keys)
        if keep_keys is not None:
            keep_keys.prepare()
        started = Run(
            self._journal, run_id, filter=self._filter, meter=meter, lease_steps=lease_steps, keep_keys=keep_keys,
            run_key=run_key,
        )  # fmt: skip
        self._runs.add(started)
        return started

    def _run_of(self, plan: Plan) -> str:
        runs = [run for run in self.refresh().runs.values() if run.plan == plan]
        if not runs:
            raise InvalidParameter("this plan was not signed into the ledger", code="DP081", hint="sign the plan first")
        return next((run for run in reversed(runs) if run.charged < plan.steps), runs[-1]).run_id

    def export(self, target: str | os.PathLike[str] | BinaryIO) -> Head:
        """Write the ledger as text, to a new file or to an open binary file; returns the head that it ends with.

        Raises:
            InvalidParameter: the path exists (DP074).
        """
        place = None if hasattr(target, "write") else files.as_path(target)
        # What is written is checked on its way: a damaged store must not become a fine-looking export.
        with self._journal.reading() as reading:
            checked = CheckedReading(reading, self.state.trust)
            if place is None:
                write_export(checked, cast(BinaryIO, target))
            else:
                create_export(checked, place)
        state, head = checked.conclusion()
        if state.size < self.state.size:
            raise Tampered(f"the store went back from {self.state.size} to {state.size} records")
        return head

    def close(self) -> None:
        """Close the runs of this ledger and the store; idempotent.

        Raises:
            StorageFailed: the last settles of a run could not be written; everything is closed all the same.
        """
        with ExitStack() as stack:  # closes the others too where one fails
            stack.callback(self._journal.close)
            for run in list(self._runs):
                stack.callback(run.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StorageFailed:
            # The error that ends the block says more.
            if error is None:
                raise
