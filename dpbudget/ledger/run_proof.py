"""The rules of a ledger as far as the records of one run go: what :mod:`dpbudget.ledger.proof_file` shows of it.

The whole ledger's rules (:mod:`dpbudget.ledger.rules`) need every record. Here are those that can be checked on the
records of one run, each of which is known to stand at its place in the history under a signed head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dpbudget._record import hex_to_float
from dpbudget.errors import Tampered
from dpbudget.ledger.entries import NO_FRESH
from dpbudget.ledger.head import Head
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, PublicKey, open_envelope
from dpbudget.ledger.statement import read_statement, statement_digest
from dpbudget.ledger.tree import NO_LEAF, leaf_hash
from dpbudget.plan import Plan


@dataclass(frozen=True)
class RunProof:
    """What a run proof shows under one head of its ledger.

    Attributes:
        ledger_id: 64 hexadecimal digits.
        head: the writer's signed head that all records shown are part of.
        run_id: 32 hexadecimal digits.
        plan: what the owner signed for this run in this ledger.
        charged: **at least** so many steps were charged.
        portfolio: index of the run's portfolio; 0 in an ``rdp`` ledger.
        portfolio_epsilon: the epsilon that the owner declared for the portfolio; None where none was.
        portfolio_claim: epsilon of all plans of the portfolio together at ``plan.claim.delta``; None where another
            run's lease carries it, and in an ``rdp`` ledger.
        unspent: steps without a reserve in leases whose close is shown; they stay charged.
        reserved, settled: steps with a reserve and with a settle among the records shown.
        commitment, entropy: of a run whose noise key is committed, as in the ledger; None for fresh keys.
    """

    ledger_id: str
    head: Head
    run_id: str
    plan: Plan
    charged: int
    portfolio: int
    portfolio_epsilon: float | None
    portfolio_claim: float | None
    unspent: int
    reserved: int
    settled: int
    commitment: str | None = None
    entropy: str | None = None

    @property
    def proved(self) -> tuple[str, ...]:
        """What the proof shows, in plain words."""
        claim = self.plan.claim
        said = [
            f"the owner signed a plan of {self.plan.steps} steps for run {self.run_id} of ledger {self.ledger_id}",
            f"the plan claims epsilon {claim.epsilon:.9g} at delta {claim.delta:g} for this run alone",
            f"at least {self.charged} of its steps are charged in the history under the head {self.head}",
        ]
        if self.portfolio_claim is not None:
            said.append(f"all plans of portfolio {self.portfolio} together claim epsilon {self.portfolio_claim:.9g}")
        if self.commitment is not None:
            said.append(f"the run committed to the noise key {self.commitment} before its first step")
        if self.entropy is not None:
            said.append(f"its noise follows from that key and the entropy {self.entropy}, which was given afterwards")
        return tuple(said)

    @property
    def not_proved(self) -> tuple[str, ...]:
        """What would need the whole ledger, or an outside anchor."""
        return (
            "that no more steps were charged: a later lease of the run can be left out of the proof",
            "that the records not shown obey the rules and the budget: verify the whole ledger under this head",
            "that the claims cover the plans: recompute epsilon from the plan, and from all plans of the portfolio",
            "that this head is the newest, or the only one of its size: ask for a cosignature or a consistency proof",
            "that the writer's key was not replaced later: a rekey can be left out with all that follows it",
        )


@dataclass(frozen=True, slots=True)
class Shown:
    """A record that a proof shows, with its inclusion proof."""

    record: Mapping[str, Any]
    line: bytes
    envelope: bytes | None
    path: tuple[bytes, ...]


@dataclass(slots=True)
class _Lease:
    first: int
    count: int
    reserved: int = 0
    settled: int = 0
    unspent: int | None = None


@dataclass
class RunHistory:
    """The rules of a ledger as far as the records of one run go."""

    ledger_id: str
    run_id: str
    owners: list[PublicKey] = field(default_factory=list)
    writers: list[PublicKey] = field(default_factory=list)
    genesis: Mapping[str, Any] = field(default_factory=dict)
    orders: int | None = None
    portfolio: Mapping[str, Any] | None = None
    plan: Plan | None = None
    signer: PublicKey | None = None
    claim: float | None = None
    leases: list[_Lease] = field(default_factory=list)
    settled: int = 0
    last: int = -1
    drawn: set[str] = field(default_factory=set)
    commitment: str | None = None
    entropy: str | None = None
    _leaf: bytes = NO_LEAF

    @property
    def writer(self) -> PublicKey:
        """The key that signs heads after the records so far."""
        if not self.writers:
            raise Tampered("a run proof without records", code="DP082")
        return self.writers[-1]

    @property
    def charged(self) -> int:
        """Steps leased so far."""
        return self.leases[-1].first + self.leases[-1].count if self.leases else 0

    def feed(self, item: Shown) -> None:
        """Take the next record; raises :class:`Tampered` where it breaks a rule."""
        record = item.record
        kind, seq = record["type"], record["seq"]
        _require((kind == "genesis") == (self.last < 0) == (seq == 0) and seq > self.last, f"{kind} at {seq}")
        _require(record.get("run", self.run_id) == self.run_id, f"{kind} of another run")
        rule = _RULES.get(kind)
        if rule is None:
            raise Tampered(f"a {kind} record says nothing about a run")
        follows = seq != self.last + 1 or record["prev"] == self._leaf.hex()
        _require(follows, f"record {seq} does not continue the chain")
        rule(self, item)
        self.last, self._leaf = seq, leaf_hash(item.line)

    def conclude(self, head: Head, trust: PublicKey) -> RunProof:
        """What all records come to."""
        if self.plan is None:
            raise Tampered(f"a run proof without the plan of run {self.run_id}", code="DP082")
        # Genesis and the plan's statement name the ledger. A rekey does not, so that a key it brings must have signed
        # this plan to vouch for this ledger.
        if trust not in (self.owners[0], self.signer):
            raise Tampered(
                f"neither the ledger nor the plan is signed by the trusted key {trust.hex}",
                code="DP072",
                hint="ask the owner for the public key by another way than this file",
            )
        reserved = sum(lease.reserved for lease in self.leases)
        closed = [lease for lease in self.leases if lease.unspent is not None]
        agree = all(lease.unspent == lease.count - lease.reserved for lease in closed)
        _require(agree or not reserved, "a close that does not agree with the reserves")
        return RunProof(
            ledger_id=self.ledger_id,
            head=head,
            run_id=self.run_id,
            plan=self.plan,
            charged=self.charged,
            portfolio=0 if self.portfolio is None else self.portfolio["index"],
            portfolio_epsilon=None if self.portfolio is None else _real(self.portfolio["epsilon"]),
            portfolio_claim=self.claim,
            unspent=sum(lease.unspent or 0 for lease in closed),
            reserved=reserved,
            settled=self.settled,
            commitment=self.commitment,
            entropy=self.entropy,
        )

    def draw(self, *values: str) -> None:
        """Note random values; one that stands twice is the mark of a cloned process."""
        for value in values:
            _require(value not in self.drawn, f"{value} stands in two records")
            self.drawn.add(value)

    def open_lease(self, step: int) -> _Lease:
        """The lease of a step, neither closed nor settled to its end."""
        for lease in reversed(self.leases):
            if lease.first <= step < lease.first + lease.count:
                _require(lease.unspent is None and lease.settled < lease.count, f"step {step} of a finished lease")
                return lease
        raise Tampered(f"step {step} of run {self.run_id} is in no lease that is shown")


def _genesis(run: RunHistory, item: Shown) -> None:
    record = item.record
    _require(leaf_hash(item.line).hex() == run.ledger_id, "genesis of another ledger")
    run.genesis = record
    run.owners.append(PublicKey.from_hex(record["owner"]))
    run.writers.append(PublicKey.from_hex(record["writer"]))
    _require(run.owners != run.writers, "owner and writer are one key; the roles are separate")
    _owner_signed(run, item)


def _renyi(run: RunHistory, item: Shown) -> None:
    record = item.record
    _require(run.genesis["filter"] == "rdp" and record["seq"] == 1, "renyi stands second in a ledger with filter rdp")
    run.orders = len(record["orders"])
    _owner_signed(run, item)


def _rekey(run: RunHistory, item: Shown) -> None:
    keys = run.owners if item.record["role"] == "owner" else run.writers
    new, old = PublicKey.from_hex(item.record["key"]), keys[-1]
    _require(item.record["old"] == old.hex, f"rekey of another {item.record['role']}")
    _require(new not in (*run.owners, *run.writers), f"rekey to the key {new.hex}, which was used before")
    allowed = (old,) if item.record["role"] == "owner" else (old, run.owners[-1])
    _require(open_envelope(item.envelope or b"", RECORD_TYPE, allowed, new) == item.line, "another record is signed")
    keys.append(new)


def _portfolio(run: RunHistory, item: Shown) -> None:
    _require(run.genesis["filter"] == "portfolio" and run.portfolio is None, "a second portfolio, or one with rdp")
    _owner_signed(run, item)
    run.portfolio = item.record


def _plan(run: RunHistory, item: Shown) -> None:
    record, genesis = item.record, run.genesis
    _require(run.plan is None, "a second plan")
    payload = open_envelope(item.envelope or b"", STATEMENT_TYPE, run.owners[-1])
    _require(statement_digest(payload) == record["statement"], "the envelope does not hold the statement of the plan")
    plan, _ = read_statement(payload, ledger_id=run.ledger_id, run_id=run.run_id, orders=run.orders)
    _require((plan.adjacency, plan.unit) == (genesis["adjacency"], genesis["unit"]), "a plan for other neighbours")
    _require(plan.nominal_size is not None, "a plan without a nominal dataset size")
    if genesis["filter"] == "portfolio":
        _require(
            run.portfolio is not None and run.portfolio["index"] == record["portfolio"], "no portfolio of the plan"
        )
        delta = None if run.portfolio is None else _real(run.portfolio["delta"])
        _require(plan.claim.delta == delta, "a plan at another delta than its portfolio's")
    else:
        _require(run.orders is not None and record["portfolio"] == 0, "a plan before renyi")
    run.plan, run.signer = plan, run.owners[-1]


def _commit(run: RunHistory, item: Shown) -> None:
    _require(run.plan is not None and not run.leases, "a commit to a noise key that is not before the first lease")
    _require(run.commitment is None, "a second commit to a noise key")
    run.commitment = item.record["commitment"]
    run.draw(run.commitment)


def _entropy(run: RunHistory, item: Shown) -> None:
    _require(run.commitment is not None and run.entropy is None, "entropy without a commit, or a second one")
    run.entropy = item.record["value"]


def _lease(run: RunHistory, item: Shown) -> None:
    first, count, claim = item.record["first"], item.record["count"], _real(item.record["claim"])
    _require(run.plan is not None and first == run.charged, f"lease from step {first} after {run.charged} steps")
    _require(run.plan is not None and first + count <= run.plan.steps, f"lease to step {first + count} of the plan")
    if claim is not None:
        limit = None if run.portfolio is None else _real(run.portfolio["epsilon"])
        _require(not run.leases and run.portfolio is not None, "a claim that the rules do not allow here")
        _require(limit is None or claim <= limit, f"claim {claim} of a portfolio of epsilon {limit}")
        run.claim = claim
    run.draw(item.record["nonce"])
    if run.commitment is None:
        run.draw(item.record["commitment"])
    else:
        same = item.record["commitment"] == run.commitment
        _require(run.entropy is not None and same, "a lease that does not belong to what the run committed to")
    run.leases.append(_Lease(first, count))


def _reserve(run: RunHistory, item: Shown) -> None:
    step, count = item.record["step"], item.record["count"]
    lease = run.open_lease(step)
    _require(step == lease.first + lease.reserved, f"reserve of step {step}, not of the lease's next")
    _require(lease.reserved + count <= lease.count, f"reserve of {count} steps beyond the lease")
    lease.reserved += count


def _settle(run: RunHistory, item: Shown) -> None:
    step = item.record["step"]
    lease = run.open_lease(step)
    _require(lease.settled <= step - lease.first < lease.reserved, f"settle of step {step}, which is not due")
    if run.commitment is None:
        run.draw(item.record["fresh"])
    else:
        _require(item.record["fresh"] == NO_FRESH, f"settle of step {step} of a committed run with bytes of its own")
    lease.settled = step - lease.first + 1
    run.settled += 1


def _close(run: RunHistory, item: Shown) -> None:
    first, unspent = item.record["first"], item.record["unspent"]
    lease = run.open_lease(first)
    _require(lease.first == first and unspent <= lease.count, f"close of a lease from step {first}")
    lease.unspent = unspent


_RULES = {
    "genesis": _genesis,
    "renyi": _renyi,
    "rekey": _rekey,
    "portfolio": _portfolio,
    "plan": _plan,
    "commit": _commit,
    "entropy": _entropy,
    "lease": _lease,
    "reserve": _reserve,
    "settle": _settle,
    "close": _close,
}


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise Tampered(problem)


def _owner_signed(run: RunHistory, item: Shown) -> None:
    _require(open_envelope(item.envelope or b"", RECORD_TYPE, run.owners[-1]) == item.line, "another record is signed")


def _real(text: str | None) -> float | None:
    return None if text is None else hex_to_float(text)
