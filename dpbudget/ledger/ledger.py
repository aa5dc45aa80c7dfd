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

import math
import os
import secrets
import weakref
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

from dpbudget.errors import InvalidParameter, StorageFailed
from dpbudget.ledger.admission import admit_plan, seal_record
from dpbudget.ledger.head import Head, verifier_key
from dpbudget.ledger.journal import Draft, Journal, replay
from dpbudget.ledger.run import Run
from dpbudget.ledger.signing import PublicKey, Signer
from dpbudget.ledger.state import LedgerState, SpendingFilter
from dpbudget.ledger.store import files
from dpbudget.ledger.store.base import LedgerStore
from dpbudget.ledger.store.jsonl import create_export, write_export
from dpbudget.ledger.store.memory import MemoryStore
from dpbudget.ledger.store.reader import read_ledger
from dpbudget.ledger.store.sqlite import SqliteStore
from dpbudget.mechanisms import Adjacency
from dpbudget.meter import Meter
from dpbudget.plan import Budget, Plan


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
        dataset: str | None = None,
        public_data: bool = False,
        whole_budget: bool = False,
    ) -> Ledger:
        """A new ledger with the owner's budget and its first portfolio.

        Two ledgers for one dataset cannot be detected: the owner keeps one ledger a dataset.

        Args:
            path: a new file on a local disk; None keeps the ledger in memory, where it is not durable.
            budget: total (epsilon, delta) for one record of the dataset.
            owner: signs budget and plans.
            writer: another key, that of the training process; it signs heads and cannot create budget.
            filter: computes joint claims.
            adjacency: which datasets are neighbours.
            dataset: the owner's id of the dataset, 64 hexadecimal digits: random (the default) or a keyed hash. An
                unkeyed hash of the data would let anybody test guesses of it.
            public_data: the owner declares the dataset public.
            whole_budget: the first portfolio takes the whole budget, so that one run can be calibrated to all of it;
                else it takes half of delta, and as much epsilon as its plans claim.

        Raises:
            InvalidParameter: the path exists (DP074), or owner and writer are one key (DP080).
        """
        if owner.public == writer.public:
            raise InvalidParameter(
                "owner and writer are one key", code="DP080", hint="make two keys: the writer must not create budget"
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
            "unit": "example",
            "epsilon": budget.epsilon,
            "delta": budget.delta,
            "filter": "portfolio",
            "owner": owner.public.hex,
            "writer": writer.public.hex,
            "public_data": public_data,
        }
        share = budget.epsilon if whole_budget else None
        delta = budget.delta if whole_budget else budget.delta / 2
        seal = partial(seal_record, owner)
        store: LedgerStore = MemoryStore() if path is None else SqliteStore.create(path)
        journal = Journal(store, writer, LedgerState(trust=owner.public), None)

        def write(draft: Draft) -> None:
            draft.add("genesis", seal=seal, **facts)
            draft.add("portfolio", seal=seal, index=1, delta=delta, epsilon=share)

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
    ) -> Ledger:
        """Open a ledger after every record, signature and rule in it was verified.

        Args:
            path: a ledger file; for reading, an export too.
            writer: the writer's key; None opens a private copy for reading and writes nothing.
            filter: computes joint claims; needed to sign plans and to begin a portfolio.
            trust: the owner's public key, known from outside. Without it :attr:`trusted` is False, since a key found
                inside the file proves nothing.

        Raises:
            Unreadable: missing or not a ledger (DP070), or unsafe to open (DP083).
            Tampered: anything in it does not agree (DP071, DP082), or another owner's key (DP072).
            InvalidParameter: ``writer`` is not the ledger's writer (DP080).
        """
        key = PublicKey(trust) if isinstance(trust, bytes) else trust
        if writer is None:
            snapshot = read_ledger(path)
            state, head = replay(snapshot.entries, snapshot.note, key)
            return cls(Journal(MemoryStore(snapshot), None, state, head), filter)
        store = SqliteStore.open(path)
        try:
            snapshot = store.snapshot()
            state, head = replay(snapshot.entries, snapshot.note, key)
            if writer.public != state.genesis.writer:
                raise InvalidParameter(
                    f"the key {writer.public.hex} is not the ledger's writer",
                    code="DP080",
                    hint=f"open it with the writer's key, whose public half is {state.genesis.writer.hex}",
                )
        except BaseException:
            store.close()
            raise
        return cls(Journal(store, writer, state, head), filter)

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
        return verifier_key(self.id, self.state.genesis.writer)

    @property
    def trusted(self) -> bool:
        """Whether the owner's key was known from outside the file."""
        return self.state.trust is not None

    @property
    def durable(self) -> bool:
        """False for a ledger in memory and for one that was opened for reading."""
        return not isinstance(self._journal.store, MemoryStore)

    @property
    def plan_delta(self) -> float:
        """The delta for which the next plan must be made: that of the open portfolio, else half of what is left."""
        portfolio = self.state.portfolios[-1]
        if not portfolio.frozen:
            return portfolio.delta
        left = self.state.remaining_delta / 2
        nearest = float(left)
        return nearest if nearest <= left else math.nextafter(nearest, 0.0)

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
        if self._filter is None:
            raise InvalidParameter(
                "the ledger was opened without a filter, so no claim can be checked",
                code="DP061",
                hint="pass filter=PortfolioFilter(accountant) to Ledger.open",
            )
        return admit_plan(self._journal, self._filter, plan, owner)

    def start(self, run: str | Plan, *, meter: Meter | None = None, lease_steps: int | None = None) -> Run:
        """The run of a signed plan, from its first step that is not charged yet.

        Args:
            run: a run id, or a plan: then its newest run with steps left.
            meter: live epsilon.
            lease_steps: steps charged together; the default follows from the plan alone.

        Raises:
            InvalidParameter: no such plan was signed (DP081).
        """
        run_id = run if isinstance(run, str) else self._run_of(run)
        if run_id not in self.state.runs:
            self.refresh()
        if run_id not in self.state.runs:
            raise InvalidParameter(f"the ledger has no run {run_id[:80]!r}", code="DP081", hint="sign the plan first")
        started = Run(self._journal, run_id, filter=self._filter, meter=meter, lease_steps=lease_steps)
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
        snapshot = self._journal.snapshot()
        if hasattr(target, "write"):
            write_export(snapshot, cast(BinaryIO, target))
            return self.head
        place = files.as_path(target)
        try:
            create_export(snapshot, place)
        except FileExistsError:
            raise InvalidParameter(f"{place} exists", code="DP074", hint="choose another path") from None
        return self.head

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
