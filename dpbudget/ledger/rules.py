"""The rules of the ledger as a state machine without input or output.

Whatever a store returns passes through here before it is believed, and whatever a writer adds passes through here
before it is stored, so that writer and verifier cannot disagree about the rules. No epsilon is computed here: claims
are checked against each other and against the owner's totals, in exact rational arithmetic.

Rules, beside the schema of :mod:`dpbudget.ledger.entries`:

* chain: ``seq`` counts from 0 and ``prev`` is the leaf hash of the predecessor (zeros for the first);
* ``genesis`` comes first and only first; the second record of a ledger with the filter ``rdp``, and no other, is
  ``renyi``;
* ``portfolio``: the next index, only after the previous one froze; all deltas sum to at most the total delta;
* ``budget``: new totals that hold at least what is taken already;
* ``rekey``: a key that no role held before, signed by itself and by the old one (for the writer: or by the owner);
* ``plan``: with the ledger's adjacency and unit, a nominal size, an unused run id and a statement that the owner signed
  for this ledger and run; into the newest portfolio, not frozen, with its delta (``rdp``: with a table of its costs);
* ``commit``: a run's noise key, once and before its first lease; ``entropy``: the auditor's, once and after the commit.
  A committed run has both before its first lease; its leases carry its commitment, and its settles no fresh bytes;
* ``lease``: begins at the run's first step that is not leased and stays inside the plan. It carries the joint claim of
  its portfolio exactly when it is the portfolio's first; that claim is at most the portfolio's epsilon, and the
  epsilons of all portfolios sum to at most the total (``rdp``: some order stays within its allowance);
* ``reserve``: the next unreserved steps of one open lease, in order; ``settle``: a reserved step of an open lease, in
  increasing order; ``close``: an open lease by its first step, with exactly its steps that were never reserved. A lease
  whose last step is settled is closed by that. Nothing lowers a charge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from itertools import pairwise
from typing import Any

from dpbudget._record import hex_to_float
from dpbudget._renyi import RenyiTerms
from dpbudget.errors import Tampered
from dpbudget.ledger.cells import Cell, OpenLease, open_lease
from dpbudget.ledger.entries import ENVELOPED, NO_FRESH, Entry, read
from dpbudget.ledger.renyi import RenyiAccount, uses_of
from dpbudget.ledger.scan import scan
from dpbudget.ledger.signing import RECORD_TYPE, STATEMENT_TYPE, PublicKey, open_envelope
from dpbudget.ledger.state import Genesis, Grant, LedgerState, Portfolio, RunState
from dpbudget.ledger.statement import read_statement, statement_digest
from dpbudget.ledger.tree import Frontier
from dpbudget.mechanisms import Adjacency
from dpbudget.plan import Plan

#: More runs and phases than anybody plans; they bound what a hostile file makes a reader keep.
MAX_RUNS, MAX_ALL_PHASES, MAX_ALL_COSTS = 10_000, 32_768, 1_000_000
_DAMAGED = "stop spending from it, and compare it with an export, a backup or a signed head that was kept"


def admit(state: LedgerState, entry: Entry) -> LedgerState:
    """The state after one more record.

    Raises:
        Tampered: the record breaks a rule; the message names its sequence number (DP071, DP072, DP082).
    """
    machine = Machine(state)
    machine.feed((entry,))
    return machine.state()


class Machine:
    """Applies records one after the other; a failed record leaves it useless, and :meth:`state` says what it reached.

    Args:
        state: where to begin.
        watch: sizes whose root is kept in :attr:`roots`.
        remember: keep every nonce, commitment and fresh value, for :meth:`refuse_repeats`.

    Attributes:
        size: number of records.
        last: leaf hash of the newest record.
        roots: Merkle root at each watched size that was passed.
    """

    def __init__(self, state: LedgerState, *, watch: Collection[int] = (), remember: bool = False) -> None:
        self._begin = state
        self.size, self.last = state.size, state.last
        self.roots: dict[int, bytes] = {}
        self._peaks = list(state.tree.peaks)
        self._prev = state.last.hex()
        self._watch = frozenset(watch)
        self._genesis, self._grants = state.first_genesis, list(state.grants)
        self._owners, self._writers = list(state.owners), list(state.writers)
        self._keys = {*state.owners, *state.writers}
        self._portfolios = list(state.portfolios)
        self._charged = state.charged
        self._account, self._own_account = state.account, False
        self._cells: dict[str, Cell] = {}
        self._taken: list[Fraction] | None = None
        self._runs, self._phases = len(state.runs), state.phases
        self._drawn: dict[str, bytearray] | None = None
        if remember:
            self._drawn = {"nonce": bytearray(), "commitment": bytearray(), "fresh": bytearray()}

    def feed(self, entries: Iterable[Entry]) -> None:
        """Apply records.

        Raises:
            Tampered: a record breaks a rule; the message names its sequence number (DP071, DP072, DP082).
        """
        for entry in entries:
            try:
                self._apply(entry)
            except Tampered as error:
                raise Tampered(
                    f"record {self.size}: {error.message}", code=error.code, hint=error.hint or _DAMAGED
                ) from None

    def state(self) -> LedgerState:
        """What follows from all records so far."""
        runs: Mapping[str, RunState] = self._begin.runs
        if self._cells:
            runs = {**runs, **{run_id: cell.state() for run_id, cell in self._cells.items()}}
        # From now on the account belongs to that state too.
        self._own_account = False
        return LedgerState(
            trust=self._begin.trust,
            tree=Frontier(self.size, tuple(self._peaks)),
            last=self.last,
            first_genesis=self._genesis,
            owners=tuple(self._owners),
            writers=tuple(self._writers),
            grants=tuple(self._grants),
            portfolios=tuple(self._portfolios),
            account=self._account,
            runs=runs,
            charged=self._charged,
            phases=self._phases,
        )

    @property
    def trust(self) -> PublicKey | None:
        """The key that is trusted from outside, if any."""
        return self._begin.trust

    @property
    def trusted(self) -> bool:
        """Whether the trusted key holds the owner's role, or held it."""
        return self._begin.trust is not None and self._begin.trust in self._owners

    def refuse_repeats(self) -> None:
        """Refuse a nonce, commitment or fresh value that stands twice: a cloned process repeats its noise.

        Raises:
            Tampered: names the repeated value (DP071).
        """
        for name, drawn in (self._drawn or {}).items():
            width = 16 if name == "fresh" else 32
            seen: set[bytes] = set()
            for at in range(0, len(drawn), width):
                value = bytes(drawn[at : at + width])
                if value in seen:
                    raise Tampered(f"a record repeats the {name} {value.hex()}: a cloned process repeats its noise")
                seen.add(value)

    def _apply(self, entry: Entry) -> None:
        line, envelope = entry
        record = scan(line) or read(line)
        kind, size = record["type"], self.size
        if record["seq"] != size:
            raise Tampered(f"has sequence number {record['seq']}")
        if record["prev"] != self._prev:
            raise Tampered("does not continue the chain: prev is not the leaf hash before it")
        if (envelope is not None) != (kind in ENVELOPED):
            raise Tampered(f"{kind} with a missing or a superfluous envelope")
        if (kind == "genesis") != (size == 0):
            raise Tampered(f"{kind} cannot stand here; genesis comes first and once")
        if size == 1 and (kind == "renyi") != (self.facts().filter == "rdp"):
            raise Tampered(f"{kind} cannot stand here; the second record is renyi with the filter rdp, and only then")
        # tree.leaf_hash and Frontier.append, in place: these lines run a million times.
        leaf = carry = sha256(b"\x00" + line).digest()
        _RULES[kind](self, record, entry, leaf)
        self.size, peaks = size + 1, self._peaks
        while size & 1:
            carry = sha256(b"\x01" + peaks.pop() + carry).digest()
            size >>= 1
        peaks.append(carry)
        self.last, self._prev = leaf, leaf.hex()
        if self.size in self._watch:
            self.roots[self.size] = Frontier(self.size, tuple(peaks)).root

    # --- what the rules look at ---

    def facts(self) -> Genesis:
        """The ledger's facts."""
        if self._genesis is None:
            raise Tampered("the ledger has no records", code="DP070")
        return self._genesis

    def cell(self, record: Mapping[str, Any]) -> Cell:
        """The run that a record names."""
        run_id = record["run"]
        cell = self._cells.get(run_id)
        if cell is None:
            run = self._begin.runs.get(run_id)
            if run is None:
                raise Tampered(f"{record['type']} of the unknown run {run_id}")
            cell = self._cells[run_id] = Cell(run)
        return cell

    def account(self) -> RenyiAccount | None:
        """The account of an ``rdp`` ledger, for changing in place."""
        if self._account is not None and not self._own_account:
            self._account, self._own_account = self._account.copy(), True
        return self._account

    def put_portfolio(self, portfolio: Portfolio) -> None:
        """Add a portfolio, or put it in the place of its older self."""
        taken = self.taken()
        old = self._portfolios[portfolio.index - 1] if portfolio.index <= len(self._portfolios) else None
        if old is None:
            taken[1] += Fraction(portfolio.delta)
            self._portfolios.append(portfolio)
        else:
            taken[0] -= Fraction(old.charged_epsilon)
            self._portfolios[portfolio.index - 1] = portfolio
        taken[0] += Fraction(portfolio.charged_epsilon)

    def taken(self) -> list[Fraction]:
        """Epsilon and delta that the portfolios take, exactly; kept up to date once it was asked for."""
        if self._taken is None:
            epsilon = sum((Fraction(p.charged_epsilon) for p in self._portfolios), Fraction())
            self._taken = [epsilon, sum((Fraction(p.delta) for p in self._portfolios), Fraction())]
        return self._taken


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise Tampered(problem)


def _genesis(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    owner, writer = PublicKey.from_hex(record["owner"]), PublicKey.from_hex(record["writer"])
    _require(owner != writer, "owner and writer are one key; the roles are separate")
    _check_owner_signature(owner, entry)
    machine._genesis = Genesis(
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
    machine._grants = [Grant(0, machine._genesis.epsilon, machine._genesis.delta)]
    machine._owners, machine._writers, machine._keys = [owner], [writer], {owner, writer}


def _renyi(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    genesis = machine.facts()
    _require(machine.size == 1, "renyi stands second in a ledger with the filter rdp")
    orders = tuple(hex_to_float(order) for order in record["orders"])
    allowances = tuple(hex_to_float(allowance) for allowance in record["allowances"])
    _require(all(low < high for low, high in pairwise(orders)), "Renyi orders that do not increase")
    _require(len(orders) == len(record["shares"]) == len(allowances), "not one share and one allowance an order")
    _check_owner_signature(machine._owners[-1], entry)
    machine._grants[0] = replace(machine._grants[0], allowances=allowances)
    machine._account = RenyiAccount.fresh(RenyiTerms(orders, tuple(record["shares"]), allowances), genesis.delta)


def _portfolio(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    index, delta, portfolios = record["index"], hex_to_float(record["delta"]), machine._portfolios
    epsilon = None if record["epsilon"] is None else hex_to_float(record["epsilon"])
    _require(machine.facts().filter == "portfolio", "portfolio in a ledger with another filter")
    _require(index == len(portfolios) + 1, f"portfolio {index} after {len(portfolios)} portfolios")
    _require(not portfolios or portfolios[-1].frozen, f"portfolio {index} before the previous one froze")
    taken, granted = machine.taken(), machine._grants[-1]
    left_epsilon, left_delta = Fraction(granted.epsilon) - taken[0], Fraction(granted.delta) - taken[1]
    _require(Fraction(delta) <= left_delta, f"portfolio {index} takes delta {delta:g} beyond the total")
    within = epsilon is None or Fraction(epsilon) <= left_epsilon
    _require(within, f"portfolio {index} takes epsilon {epsilon} beyond the total")
    _check_owner_signature(machine._owners[-1], entry)
    machine.put_portfolio(Portfolio(index, delta, epsilon))


def _budget(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    totals = hex_to_float(record["epsilon"]), hex_to_float(record["delta"])
    account, allowances = machine.account(), None
    _require((record["allowances"] is None) == (account is None), "budget with allowances exactly in an rdp ledger")
    _check_owner_signature(machine._owners[-1], entry)
    if account is not None:
        allowances = tuple(hex_to_float(allowance) for allowance in record["allowances"])
        _require(len(allowances) == len(account.terms.orders), "not one allowance an order")
        account.grant(allowances, totals[1])
        _require(account.fits, f"totals of epsilon {totals[0]:g} and delta {totals[1]:g} below what is spent")
    else:
        epsilon, delta = machine.taken()
        _require(
            Fraction(totals[0]) >= epsilon and Fraction(totals[1]) >= delta,
            f"totals of epsilon {totals[0]:g} and delta {totals[1]:g} below the {float(epsilon):g} and "
            f"{float(delta):g} in use",
        )
    machine._grants.append(Grant(machine.size, *totals, allowances, machine._charged))


def _rekey(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    keys = machine._owners if record["role"] == "owner" else machine._writers
    new, old = PublicKey.from_hex(record["key"]), keys[-1]
    _require(record["old"] == old.hex, f"rekey of the {record['role']} {record['old']}, who is {old.hex}")
    _require(new not in machine._keys, f"rekey to the key {new.hex}, which this ledger has used before")
    # The writer's key may be lost or stolen: then the owner names the next one.
    allowed = (old,) if record["role"] == "owner" else (old, machine._owners[-1])
    payload = open_envelope(entry.envelope or b"", RECORD_TYPE, allowed, new)
    _require(payload == entry.line, "the envelope signs another record")
    keys.append(new)
    machine._keys.add(new)


def _note(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    """A note changes nothing."""


def _plan(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    run_id, genesis, account = record["run"], machine.facts(), machine._account
    portfolio = None if genesis.filter == "rdp" else _place_of_plan(machine, record)
    _require(genesis.filter != "rdp" or record["portfolio"] == 0, "plan with a portfolio in an rdp ledger")
    known = run_id in machine._cells or run_id in machine._begin.runs
    _require(not known, f"run {run_id} has a plan already")
    payload = open_envelope(entry.envelope or b"", STATEMENT_TYPE, machine._owners[-1])
    _require(statement_digest(payload) == record["statement"], "the envelope does not hold the statement of the plan")
    orders = None if account is None else len(account.terms.orders)
    plan, costs = read_statement(payload, ledger_id=genesis.ledger_id, run_id=run_id, orders=orders)
    _check_plan(genesis, portfolio, plan)
    machine._phases += len(plan.phases)
    machine._runs += 1
    _require(machine._runs <= MAX_RUNS, f"more than {MAX_RUNS} runs")
    _require(machine._phases <= MAX_ALL_PHASES, f"more than {MAX_ALL_PHASES} phases in all")
    _require(machine._phases * (orders or 0) <= MAX_ALL_COSTS, f"more than {MAX_ALL_COSTS} costs of phases in all")
    index = 0 if portfolio is None else portfolio.index
    machine._cells[run_id] = Cell(RunState(run_id, plan, record["statement"], index, costs))
    if portfolio is not None:
        machine.put_portfolio(replace(portfolio, runs=(*portfolio.runs, run_id)))


def _place_of_plan(machine: Machine, record: Mapping[str, Any]) -> Portfolio:
    _require(bool(machine._portfolios), "plan before the first portfolio")
    portfolio = machine._portfolios[-1]
    _require(record["portfolio"] == portfolio.index, f"plan for portfolio {record['portfolio']}, not for the newest")
    _require(not portfolio.frozen, f"plan for portfolio {portfolio.index}, which is frozen")
    return portfolio


def _check_plan(genesis: Genesis, portfolio: Portfolio | None, plan: Plan) -> None:
    same = plan.adjacency == genesis.adjacency
    _require(same, f"plan for {plan.adjacency} neighbours in a ledger for {genesis.adjacency}")
    _require(plan.unit == genesis.unit, f"plan for the unit {plan.unit} in a ledger for {genesis.unit}")
    _require(plan.nominal_size is not None, "plan without a nominal dataset size")
    if portfolio is not None:
        same = plan.claim.delta == portfolio.delta
        _require(same, f"plan at delta {plan.claim.delta:g} in a portfolio at delta {portfolio.delta:g}")


def _commit(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    cell = machine.cell(record)
    _require(cell.charged == 0, f"commit to a noise key after {cell.charged} steps of the run")
    _require(cell.fixed.commitment is None, "a second commit to a noise key of the run")
    cell.fixed = replace(cell.fixed, commitment=record["commitment"])
    if machine._drawn is not None:
        machine._drawn["commitment"] += bytes.fromhex(record["commitment"])


def _entropy(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    cell = machine.cell(record)
    _require(cell.fixed.commitment is not None, "entropy for a run that committed to no noise key")
    _require(cell.fixed.entropy is None, "a second entropy of the run")
    cell.fixed = replace(cell.fixed, entropy=record["value"], ready=machine.size + 1)


def _lease(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    cell, first, count = machine.cell(record), record["first"], record["count"]
    if first != cell.charged:
        raise Tampered(f"lease from step {first}; the run is charged to step {cell.charged}")
    end = first + count
    if end > cell.steps:
        raise Tampered(f"lease to step {end} of a plan of {cell.steps}")
    claimed, run = record["claim"] is not None, cell.fixed
    if run.commitment is not None:
        _require(run.entropy is not None, "lease of a committed run before the auditor's entropy")
        _require(record["commitment"] == run.commitment, "lease of a committed run with another commitment")
    if run.costs is not None:
        _require(not claimed, "lease with a claim in an rdp ledger")
        _charge(machine, run, first, end)
    else:
        portfolio = machine._portfolios[run.portfolio - 1]
        if claimed == portfolio.frozen:
            raise Tampered("the first lease of a portfolio, and no other, carries its claim")
        if claimed:
            _freeze(machine, portfolio, hex_to_float(record["claim"]))
    cell.charged = end
    machine._charged += count
    cell.leases.append(OpenLease(first, count))
    if machine._drawn is not None:
        machine._drawn["nonce"] += bytes.fromhex(record["nonce"])
        if run.commitment is None:
            machine._drawn["commitment"] += bytes.fromhex(record["commitment"])


def _freeze(machine: Machine, portfolio: Portfolio, claim: float) -> None:
    room = Fraction(machine._grants[-1].epsilon) - machine.taken()[0] + Fraction(portfolio.charged_epsilon)
    if portfolio.epsilon is not None:
        room = min(room, Fraction(portfolio.epsilon))
    _require(Fraction(claim) <= room, f"claim {claim} where {float(room)} is left for portfolio {portfolio.index}")
    machine.put_portfolio(replace(portfolio, claim=claim))


def _charge(machine: Machine, run: RunState, first: int, end: int) -> None:
    account = machine.account()
    assert account is not None  # noqa: S101 - a run has costs only in a ledger with an account
    account.charge(run.run_id, uses_of(run.plan, run.costs or (), first, end))
    _require(account.fits, f"lease to step {end} of run {run.run_id}: no Renyi order has room for it")


def _reserve(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    cell, step, count = machine.cell(record), record["step"], record["count"]
    lease = open_lease(cell, step)
    if step != lease.first + lease.reserved:
        raise Tampered(f"reserve of step {step}, not of the lease's next")
    if lease.reserved + count > lease.count:
        raise Tampered(f"reserve of {count} steps beyond the lease")
    lease.reserved += count
    cell.reserved += count


def _settle(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    cell, step = machine.cell(record), record["step"]
    lease = open_lease(cell, step)
    offset = step - lease.first
    if offset >= lease.reserved:
        raise Tampered(f"settle of step {step}, which is not reserved")
    if offset < lease.settled:
        raise Tampered(f"settle of step {step}, which is settled or passed over")
    lease.settled = offset + 1
    if lease.settled == lease.count:
        # The last settle of a lease leaves nothing to say about it.
        cell.end(lease)
    if cell.fixed.commitment is not None:
        if record["fresh"] != NO_FRESH:
            raise Tampered(f"settle of step {step} of a committed run with bytes of its own")
    elif machine._drawn is not None:
        machine._drawn["fresh"] += bytes.fromhex(record["fresh"])


def _close(machine: Machine, record: Mapping[str, Any], entry: Entry, leaf: bytes) -> None:
    cell, first = machine.cell(record), record["first"]
    lease = open_lease(cell, first)
    _require(lease.first == first, f"close of a lease from step {first}, which does not exist")
    unspent = lease.count - lease.reserved
    _require(record["unspent"] == unspent, f"close with {record['unspent']} unspent steps of {unspent}")
    cell.end(lease)


def _check_owner_signature(owner: PublicKey, entry: Entry) -> None:
    payload = open_envelope(entry.envelope or b"", RECORD_TYPE, owner)
    _require(payload == entry.line, "the envelope signs another record")


_Rule = Callable[[Machine, Mapping[str, Any], Entry, bytes], None]
_RULES: Mapping[str, _Rule] = {
    "genesis": _genesis,
    "renyi": _renyi,
    "portfolio": _portfolio,
    "budget": _budget,
    "rekey": _rekey,
    "note": _note,
    "plan": _plan,
    "commit": _commit,
    "entropy": _entropy,
    "lease": _lease,
    "reserve": _reserve,
    "settle": _settle,
    "close": _close,
}
