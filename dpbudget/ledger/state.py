"""What follows from the records of a ledger so far, as values that never change.

:mod:`dpbudget.ledger.rules` makes them: ``after = admit(state, entry)``. No epsilon is computed in either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

from dpbudget._renyi import PhaseCost, RenyiTerms
from dpbudget.errors import Tampered
from dpbudget.ledger.renyi import RenyiAccount
from dpbudget.ledger.signing import PublicKey
from dpbudget.ledger.tree import NO_LEAF, Frontier
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import Budget, Plan


class SpendingFilter(Protocol):
    """The privacy arithmetic that a ledger is given."""

    def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
        """Certified epsilon of all ``plans`` together at ``delta``, rounded up by ``claimed_epsilon``."""

    def what_fits(self, others: Sequence[Plan], plan: Plan, delta: float, room: float) -> str:
        """Which plan like ``plan`` fits ``room`` beside ``others``, in words for a hint."""

    def renyi_terms(self, budget: Budget) -> RenyiTerms:
        """Orders, shares and allowances of a new ``rdp`` ledger with this budget."""

    def renyi_allowances(self, budget: Budget, terms: RenyiTerms) -> tuple[float, ...]:
        """The allowances of the same orders and shares under another budget."""

    def renyi_costs(self, plan: Plan, terms: RenyiTerms) -> tuple[PhaseCost, ...]:
        """What one step of each phase of ``plan`` costs at most."""


@dataclass(frozen=True, slots=True)
class Genesis:
    """The facts of the whole ledger, signed by the owner; totals and keys are those of its first day."""

    ledger_id: str
    dataset: str
    adjacency: Adjacency
    unit: str
    epsilon: float
    delta: float
    filter: str
    owner: PublicKey
    writer: PublicKey
    public_data: bool


@dataclass(frozen=True, slots=True)
class Portfolio:
    """Plans that are composed jointly, with their share of the budget.

    Attributes:
        index: 1-based.
        delta: its share of delta.
        epsilon: its declared share of epsilon; None for whatever the joint claim is when it freezes.
        claim: the joint epsilon claim of its plans at ``delta`` since its first lease; None before.
        runs: run ids in the order of their plans.
    """

    index: int
    delta: float
    epsilon: float | None
    claim: float | None = None
    runs: tuple[str, ...] = ()

    @property
    def frozen(self) -> bool:
        """Whether a step was leased, so that no plan can join any more."""
        return self.claim is not None

    @property
    def charged_epsilon(self) -> float:
        """What it takes from the total: its claim, before that its declared share."""
        return self.claim if self.claim is not None else self.epsilon or 0.0


@dataclass(frozen=True, slots=True)
class Lease:
    """Steps ``first`` to ``first + count - 1`` of a run, charged; ``reserved`` and ``settled`` count from ``first``."""

    first: int
    count: int
    reserved: int = 0
    settled: int = 0


@dataclass(frozen=True, slots=True)
class RunState:
    """One signed plan and what was spent of it.

    Attributes:
        run_id: 32 hexadecimal digits.
        plan: the signed plan.
        statement: SHA-256 of the signed statement.
        portfolio: index of its portfolio; 0 in an ``rdp`` ledger.
        costs: what a step of each phase costs; None in a ``portfolio`` ledger.
        charged: steps leased so far, whether or not they were released.
        reserved: steps whose receipt is known to have been issued.
        leases: leases that are neither complete nor closed, oldest first.
        commitment: of a run whose noise key is committed, what it is committed to; None for fresh keys.
        entropy: the auditor's, given after the commitment.
        ready: number of records up to the entropy; 0 without.
    """

    run_id: str
    plan: Plan
    statement: str
    portfolio: int
    costs: tuple[PhaseCost, ...] | None = None
    charged: int = 0
    reserved: int = 0
    leases: tuple[Lease, ...] = ()
    commitment: str | None = None
    entropy: str | None = None
    ready: int = 0

    @property
    def keys(self) -> str:
        """Where the run's noise comes from: ``fresh`` keys, a new one in every lease, or a ``committed`` one."""
        return "fresh" if self.commitment is None else "committed"


@dataclass(frozen=True, slots=True)
class Grant:
    """Totals that the owner signed.

    Attributes:
        seq: the record that holds them; 0 for those of genesis.
        epsilon, delta: the totals.
        allowances: what each Renyi order may spend under them; None in a ``portfolio`` ledger.
        charged: steps of all runs that were charged before.
    """

    seq: int
    epsilon: float
    delta: float
    allowances: tuple[float, ...] | None = None
    charged: int = 0


@dataclass(frozen=True)
class LedgerState:
    """All that follows from the records so far; a new value for every transaction.

    Attributes:
        trust: the owner's key, known from outside; None accepts whatever key the ledger names, which proves nothing.
        tree: Merkle frontier of all records.
        last: leaf hash of the newest record.
        first_genesis: the ledger's facts, None before the first record.
        owners, writers: every key that held the role, the present one last.
        grants: the totals as they were granted, the present ones last.
        portfolios: in order; empty in an ``rdp`` ledger.
        account: what was spent at each Renyi order; None in a ``portfolio`` ledger. Never changed in place.
        runs: by run id; never changed in place.
        charged: steps of all runs that are charged.
        phases: phases of all plans.
    """

    trust: PublicKey | None = None
    tree: Frontier = field(default_factory=Frontier)
    last: bytes = NO_LEAF
    first_genesis: Genesis | None = None
    owners: tuple[PublicKey, ...] = ()
    writers: tuple[PublicKey, ...] = ()
    grants: tuple[Grant, ...] = ()
    portfolios: tuple[Portfolio, ...] = ()
    account: RenyiAccount | None = None
    runs: Mapping[str, RunState] = field(default_factory=dict)
    charged: int = 0
    phases: int = 0

    @property
    def size(self) -> int:
        """Number of records."""
        return self.tree.size

    @property
    def genesis(self) -> Genesis:
        """The ledger's facts; raises :class:`Tampered` for an empty ledger."""
        if self.first_genesis is None:
            raise Tampered("the ledger has no records", code="DP070")
        return self.first_genesis

    @property
    def epsilon(self) -> float:
        """Total epsilon as the owner granted it last."""
        return self.grants[-1].epsilon

    @property
    def delta(self) -> float:
        """Total delta as the owner granted it last."""
        return self.grants[-1].delta

    @property
    def owner(self) -> PublicKey:
        """The key that grants now."""
        return self.owners[-1]

    @property
    def writer(self) -> PublicKey:
        """The key that signs heads now."""
        return self.writers[-1]

    @property
    def trusted(self) -> bool:
        """Whether a trusted key was given and is, or was made by, the owner of this history."""
        return self.trust is not None and self.trust in self.owners

    @property
    def remaining_epsilon(self) -> Fraction:
        """Total epsilon minus what the portfolios take, exactly."""
        return Fraction(self.epsilon) - sum(Fraction(p.charged_epsilon) for p in self.portfolios)

    @property
    def remaining_delta(self) -> Fraction:
        """Total delta minus the deltas of the portfolios, exactly."""
        return Fraction(self.delta) - sum(Fraction(p.delta) for p in self.portfolios)

    def room_for(self, portfolio: Portfolio) -> Fraction:
        """Largest claim with which ``portfolio`` may freeze, exactly."""
        room = self.remaining_epsilon + Fraction(portfolio.charged_epsilon)
        return room if portfolio.epsilon is None else min(room, Fraction(portfolio.epsilon))

    def plans_of(self, portfolio: Portfolio) -> tuple[Plan, ...]:
        """The plans of a portfolio, in the order in which they were signed."""
        return tuple(self.runs[run_id].plan for run_id in portfolio.runs)
