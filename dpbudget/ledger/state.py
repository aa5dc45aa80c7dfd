"""The rules of the ledger as a pure state machine: ``state = state.admit(entry)``, without input or output.

Whatever a store returns passes through here before it is believed, and whatever a writer adds passes through here
before it is stored, so that writer and verifier cannot disagree about the rules. No epsilon is computed here: claims
are checked against each other and against the owner's totals, in exact rational arithmetic.

Rules, beside the schema of :mod:`dpbudget.ledger.entries`:

* chain: ``seq`` counts from 0 and ``prev`` is the leaf hash of the predecessor (zeros for the first);
* ``genesis`` comes first and only first; ``portfolio`` 1 follows before any plan;
* ``portfolio``: the next index, only after the previous one froze; all deltas sum to at most the total delta;
* ``plan``: into the newest portfolio, not frozen, with its delta, the ledger's adjacency and unit, a nominal size, an
  unused run id, and a statement that the owner signed for this ledger and run;
* ``lease``: begins at the run's first step that is not leased, stays inside the plan, and carries the joint claim of
  its portfolio exactly when it is the portfolio's first; that claim is at most the portfolio's epsilon, and the
  epsilons of all portfolios sum to at most the total;
* ``reserve``: the next unreserved steps of one open lease, in order; ``settle``: a reserved step of an open lease, in
  increasing order; ``close``: an open lease by its first step, with exactly its steps that were never reserved. A lease
  whose last step is settled is closed by that. Nothing lowers a charge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol

from dpbudget._record import hex_to_float
from dpbudget.errors import Tampered
from dpbudget.ledger.entries import ENVELOPED, Entry, read
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, PublicKey, open_envelope
from dpbudget.ledger.statement import read_statement, statement_digest
from dpbudget.ledger.tree import NO_LEAF, Frontier, leaf_hash
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import Plan

_DAMAGED = "stop spending from it, and compare it with an export, a backup or a signed head that was kept"


class SpendingFilter(Protocol):
    """The privacy arithmetic that a ledger is given."""

    def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
        """Certified epsilon of all ``plans`` together at ``delta``, rounded up by ``claimed_epsilon``."""


@dataclass(frozen=True, slots=True)
class Genesis:
    """The facts of the whole ledger, signed by the owner."""

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
        portfolio: index of its portfolio.
        charged: steps leased so far, whether or not they were released.
        reserved: steps whose receipt is known to have been issued.
        leases: leases that are neither complete nor closed, oldest first.
    """

    run_id: str
    plan: Plan
    statement: str
    portfolio: int
    charged: int = 0
    reserved: int = 0
    leases: tuple[Lease, ...] = ()


@dataclass(frozen=True)
class LedgerState:
    """All that follows from the records so far; a new value for every record.

    Attributes:
        trust: the owner's key, known from outside; None accepts whatever key the ledger names, which proves nothing.
        tree: Merkle frontier of all records.
        last: leaf hash of the newest record.
        first_genesis: the ledger's facts, None before the first record.
        portfolios: in order.
        runs: by run id; never changed in place.
    """

    trust: PublicKey | None = None
    tree: Frontier = field(default_factory=Frontier)
    last: bytes = NO_LEAF
    first_genesis: Genesis | None = None
    portfolios: tuple[Portfolio, ...] = ()
    runs: Mapping[str, RunState] = field(default_factory=dict)

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
    def remaining_epsilon(self) -> Fraction:
        """Total epsilon minus what the portfolios take, exactly."""
        return Fraction(self.genesis.epsilon) - sum(Fraction(p.charged_epsilon) for p in self.portfolios)

    @property
    def remaining_delta(self) -> Fraction:
        """Total delta minus the deltas of the portfolios, exactly."""
        return Fraction(self.genesis.delta) - sum(Fraction(p.delta) for p in self.portfolios)

    def room_for(self, portfolio: Portfolio) -> Fraction:
        """Largest claim with which ``portfolio`` may freeze, exactly."""
        room = self.remaining_epsilon + Fraction(portfolio.charged_epsilon)
        return room if portfolio.epsilon is None else min(room, Fraction(portfolio.epsilon))

    def plans_of(self, portfolio: Portfolio) -> tuple[Plan, ...]:
        """The plans of a portfolio, in the order in which they were signed."""
        return tuple(self.runs[run_id].plan for run_id in portfolio.runs)

    def admit(self, entry: Entry) -> LedgerState:
        """The state after one more record.

        Raises:
            Tampered: the record breaks a rule; the message names its sequence number (DP071, DP072, DP082).
        """
        try:
            return self._admit(entry)
        except Tampered as error:
            raise Tampered(
                f"record {self.size}: {error.message}", code=error.code, hint=error.hint or _DAMAGED
            ) from None

    def _admit(self, entry: Entry) -> LedgerState:
        record = read(entry.line)
        kind: str = record["type"]
        _require(record["seq"] == self.size, f"has sequence number {record['seq']}")
        _require(record["prev"] == self.last.hex(), "does not continue the chain: prev is not the leaf hash before it")
        _require(
            (entry.envelope is not None) == (kind in ENVELOPED), f"{kind} with a missing or a superfluous envelope"
        )
        _require((kind == "genesis") == (self.size == 0), f"{kind} cannot stand here; genesis comes first and once")
        leaf = leaf_hash(entry.line)
        changes = _RULES[kind](self, record, entry, leaf)
        return replace(self, tree=self.tree.append(leaf), last=leaf, **changes)

    def _with_run(self, run: RunState) -> dict[str, Any]:
        return {"runs": {**self.runs, run.run_id: run}}

    def _run(self, record: Mapping[str, Any]) -> RunState:
        run = self.runs.get(record["run"])
        if run is None:
            raise Tampered(f"{record['type']} of the unknown run {record['run']}")
        return run


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise Tampered(problem)


def _genesis(state: LedgerState, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> dict[str, Any]:
    owner, writer = PublicKey.from_hex(record["owner"]), PublicKey.from_hex(record["writer"])
    if state.trust is not None and owner != state.trust:
        raise Tampered(
            f"the ledger belongs to owner {owner.hex}, the trusted key is {state.trust.hex}",
            code="DP072",
            hint="ask the owner for the public key by another way than this file",
        )
    _require(owner != writer, "owner and writer are one key; the roles are separate")
    _check_owner_signature(owner, entry)
    genesis = Genesis(
        ledger_id=leaf.hex(),
        dataset=record["dataset"],
        adjacency=Adjacency(record["adjacency"]),
        unit=record["unit"],
        epsilon=hex_to_float(record["epsilon"]),
        delta=hex_to_float(record["delta"]),
        filter=record["filter"],
        owner=owner,
        writer=writer,
        public_data=record["public_data"],
    )
    return {"first_genesis": genesis}


def _portfolio(state: LedgerState, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> dict[str, Any]:
    index, delta = record["index"], hex_to_float(record["delta"])
    epsilon = None if record["epsilon"] is None else hex_to_float(record["epsilon"])
    _require(index == len(state.portfolios) + 1, f"portfolio {index} after {len(state.portfolios)} portfolios")
    _require(not state.portfolios or state.portfolios[-1].frozen, f"portfolio {index} before the previous one froze")
    _require(Fraction(delta) <= state.remaining_delta, f"portfolio {index} takes delta {delta:g} beyond the total")
    within = epsilon is None or Fraction(epsilon) <= state.remaining_epsilon
    _require(within, f"portfolio {index} takes epsilon {epsilon} beyond the total")
    _check_owner_signature(state.genesis.owner, entry)
    return {"portfolios": (*state.portfolios, Portfolio(index, delta, epsilon))}


def _plan(state: LedgerState, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> dict[str, Any]:
    run_id, genesis = record["run"], state.genesis
    _require(bool(state.portfolios), "plan before the first portfolio")
    portfolio = state.portfolios[-1]
    _require(record["portfolio"] == portfolio.index, f"plan for portfolio {record['portfolio']}, not for the newest")
    _require(not portfolio.frozen, f"plan for portfolio {portfolio.index}, which is frozen")
    _require(run_id not in state.runs, f"run {run_id} has a plan already")
    payload = open_envelope(entry.envelope or b"", STATEMENT_TYPE, genesis.owner)
    _require(statement_digest(payload) == record["statement"], "the envelope does not hold the statement of the plan")
    plan = read_statement(payload, ledger_id=genesis.ledger_id, run_id=run_id)
    same = plan.adjacency == genesis.adjacency
    _require(same, f"plan for {plan.adjacency} neighbours in a ledger for {genesis.adjacency}")
    _require(plan.unit == genesis.unit, f"plan for the unit {plan.unit} in a ledger for {genesis.unit}")
    _require(plan.nominal_size is not None, "plan without a nominal dataset size")
    same = plan.claim.delta == portfolio.delta
    _require(same, f"plan at delta {plan.claim.delta:g} in a portfolio at delta {portfolio.delta:g}")
    run = RunState(run_id, plan, record["statement"], portfolio.index)
    joined = replace(portfolio, runs=(*portfolio.runs, run_id))
    return {"portfolios": (*state.portfolios[:-1], joined), **state._with_run(run)}


def _lease(state: LedgerState, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> dict[str, Any]:
    run, first, count = state._run(record), record["first"], record["count"]
    _require(first == run.charged, f"lease from step {first}; the run is charged to step {run.charged}")
    end, planned = first + count, run.plan.steps
    _require(end <= planned, f"lease to step {end} of a plan of {planned}")
    portfolio = state.portfolios[run.portfolio - 1]
    claimed = record["claim"] is not None
    _require(claimed != portfolio.frozen, "the first lease of a portfolio, and no other, carries its claim")
    charged = replace(run, charged=end, leases=(*run.leases, Lease(first, count)))
    changes = state._with_run(charged)
    if claimed:
        frozen = _freeze(state, portfolio, hex_to_float(record["claim"]))
        index = portfolio.index - 1
        changes["portfolios"] = (*state.portfolios[:index], frozen, *state.portfolios[index + 1 :])
    return changes


def _freeze(state: LedgerState, portfolio: Portfolio, claim: float) -> Portfolio:
    room = state.room_for(portfolio)
    _require(Fraction(claim) <= room, f"claim {claim} where {float(room)} is left for portfolio {portfolio.index}")
    return replace(portfolio, claim=claim)


def _reserve(state: LedgerState, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> dict[str, Any]:
    run, step, count = state._run(record), record["step"], record["count"]
    lease = _open_lease(run, step)
    _require(step == lease.first + lease.reserved, f"reserve of step {step}, not of the lease's next")
    _require(lease.reserved + count <= lease.count, f"reserve of {count} steps beyond the lease")
    grown = replace(lease, reserved=lease.reserved + count)
    return state._with_run(replace(run, reserved=run.reserved + count, leases=_put(run.leases, lease, grown)))


def _settle(state: LedgerState, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> dict[str, Any]:
    run, step = state._run(record), record["step"]
    lease = _open_lease(run, step)
    _require(step < lease.first + lease.reserved, f"settle of step {step}, which is not reserved")
    _require(step >= lease.first + lease.settled, f"settle of step {step}, which is settled or passed over")
    settled = replace(lease, settled=step - lease.first + 1)
    # The last settle of a lease leaves nothing to say about it.
    left = None if settled.settled == settled.count else settled
    return state._with_run(replace(run, leases=_put(run.leases, lease, left)))


def _close(state: LedgerState, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> dict[str, Any]:
    run, first = state._run(record), record["first"]
    lease = _open_lease(run, first)
    _require(lease.first == first, f"close of a lease from step {first}, which does not exist")
    unspent = lease.count - lease.reserved
    _require(record["unspent"] == unspent, f"close with {record['unspent']} unspent steps of {unspent}")
    return state._with_run(replace(run, leases=_put(run.leases, lease, None)))


def _open_lease(run: RunState, step: int) -> Lease:
    for lease in reversed(run.leases):
        if lease.first <= step < lease.first + lease.count:
            return lease
    raise Tampered(f"step {step} of run {run.run_id} is in no open lease")


def _put(leases: tuple[Lease, ...], old: Lease, new: Lease | None) -> tuple[Lease, ...]:
    changed = (new if lease is old else lease for lease in leases)
    return tuple(lease for lease in changed if lease is not None)


def _check_owner_signature(owner: PublicKey, entry: Entry) -> None:
    payload = open_envelope(entry.envelope or b"", RECORD_TYPE, owner)
    _require(payload == entry.line, "the envelope signs another record")


_Rule = Callable[[LedgerState, Mapping[str, Any], Entry, bytes], dict[str, Any]]
_RULES: Mapping[str, _Rule] = {
    "genesis": _genesis,
    "portfolio": _portfolio,
    "plan": _plan,
    "lease": _lease,
    "reserve": _reserve,
    "settle": _settle,
    "close": _close,
}
