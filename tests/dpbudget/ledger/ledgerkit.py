"""What the ledger's tests share: keys, plans, a filter whose arithmetic is plain, and ledgers of known shape."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpbudget._renyi import PhaseCost, RenyiTerms
from dpbudget.ledger.high_water import HighWater
from dpbudget.ledger.journal import Draft
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.plan_key import PlanKey
from dpbudget.ledger.run import Run
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.ledger.store.base import Snapshot
from dpbudget.ledger.store.jsonl import read_export
from dpbudget.plan import Budget, Claim, Phase, Plan, rate_from_float

OWNER = Ed25519Signer.from_seed(b"\x01" * 32)
WRITER = Ed25519Signer.from_seed(b"\x02" * 32)
STRANGER = Ed25519Signer.from_seed(b"\x03" * 32)
NEXT_OWNER, NEXT_WRITER = Ed25519Signer.from_seed(b"\x04" * 32), Ed25519Signer.from_seed(b"\x05" * 32)
BUDGET = Budget(epsilon=3.0, delta=1e-6)
HALF_DELTA = 5e-7


class SumFilter:
    """Joint claim = sum of the plans' claims: no accountant, so that the rules are tested alone."""

    def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
        return float(sum(plan.claim.epsilon for plan in plans))

    def what_fits(self, others: Sequence[Plan], plan: Plan, delta: float, room: float) -> str:
        return f"what fits: {room:g}"

    def renyi_terms(self, budget: Budget) -> RenyiTerms:
        """Two orders; an order may spend the budget's epsilon, or half of it."""
        return RenyiTerms((2.0, 8.0), (1, 3), self.renyi_allowances(budget, None))

    def renyi_allowances(self, budget: Budget, terms: RenyiTerms | None) -> tuple[float, ...]:
        return budget.epsilon, budget.epsilon / 2

    def renyi_costs(self, plan: Plan, terms: RenyiTerms) -> tuple[PhaseCost, ...]:
        """Every step costs a hundredth of its claim at order 2, and twice that at order 8."""
        one = plan.claim.epsilon / 128
        return tuple(PhaseCost((one, 2 * one), 2.0**-150, 2.0**-60) for _ in plan.phases)


class WideFilter(SumFilter):
    """64 orders, with long spellings of every cost."""

    def renyi_terms(self, budget: Budget) -> RenyiTerms:
        return RenyiTerms(tuple(1.5 + order for order in range(64)), (1,) * 64, (2.9,) * 64)

    def renyi_costs(self, plan: Plan, terms: RenyiTerms) -> tuple[PhaseCost, ...]:
        return tuple(PhaseCost((2.0**-40 / 3,) * 64, 2.0**-150, 2.0**-60) for _ in plan.phases)


def make_plan(steps: int = 4, epsilon: float = 1.0, delta: float = HALF_DELTA, **changes: Any) -> Plan:
    facts: dict[str, Any] = {
        "phases": (Phase(rate_k=rate_from_float(0.01), noise_multiplier=1.0, steps=steps),),
        "clip_norm": 1.0,
        "nominal_size": 1000,
        "claim": Claim(epsilon=epsilon, delta=delta, accountant="prv", accountant_version=1),
    }
    return Plan(**{**facts, **changes})


def make_ledger(path: Path | None = None, **changes: Any) -> Ledger:
    facts: dict[str, Any] = {"budget": BUDGET, "owner": OWNER, "writer": WRITER, "filter": SumFilter()}
    return Ledger.create(path, **{**facts, **changes})


def reopen(path: Path, **changes: Any) -> Ledger:
    return Ledger.open(path, **{"writer": WRITER, "filter": SumFilter(), "trust": OWNER.public, **changes})


def lived_in_ledger(path: Path | None = None) -> Ledger:
    """A ledger with every type of record, two portfolios, a crash-free close and an interleaved pair of runs."""
    ledger = make_ledger(path)
    first, second = ledger.sign_plan(make_plan(6), owner=OWNER), ledger.sign_plan(make_plan(2), owner=OWNER)
    run, other = ledger.start(first, lease_steps=3), ledger.start(second, lease_steps=1)
    for _ in range(2):
        receipt = run.next_receipt()
        run.settle(receipt, "ab" * 32)
        other.next_receipt()
    other.close()
    run.next_receipt()
    run.next_receipt()
    run.close()
    third = ledger.sign_plan(make_plan(3, epsilon=0.5, delta=ledger.plan_delta), owner=OWNER)
    with ledger.start(third) as last:
        for _ in last:
            pass
    return ledger


def rdp_ledger(path: Path | None = None) -> Ledger:
    """A ledger with the filter rdp, and with every type of record that :func:`lived_in_ledger` lacks.

    Every step costs 1/128 at order 2 and 2/128 at order 8, of allowances 3 and 1.5 at first.
    """
    ledger = make_ledger(path, kind="rdp")
    run = ledger.start(ledger.sign_plan(make_plan(5), owner=OWNER), lease_steps=2)
    for _ in range(3):
        run.settle(run.next_receipt(), "cd" * 32)
    run.close()
    ledger.change_budget(Budget(epsilon=4.0, delta=1e-6), owner=OWNER)
    ledger.note("checked")
    ledger.rekey("writer", new=NEXT_WRITER, by=WRITER)
    with ledger.start(ledger.sign_plan(make_plan(2, epsilon=2.0), owner=OWNER)) as other:
        for _ in other:
            pass
    ledger.rekey("owner", new=NEXT_OWNER, by=OWNER)
    ledger.change_budget(Budget(epsilon=2.0, delta=1e-6), owner=NEXT_OWNER)
    return ledger


def plan_key(byte: int = 7) -> PlanKey:
    return PlanKey(bytearray([byte] * 32))


def committed_run(
    ledger: Ledger, plan: Plan, *, key: PlanKey | None = None, entropy: str = "5e" * 32, **options: Any
) -> Run:
    """A run of a new plan whose noise is committed, started under the head that the entropy left."""
    if ledger._journal.high_water is None:  # a ledger in memory
        ledger._journal.high_water = HighWater(Path(tempfile.mkdtemp()))
    run_id, secret = ledger.sign_plan(plan, owner=OWNER), plan_key() if key is None else key
    ledger.commit(run_id, secret)
    ledger.add_entropy(run_id, entropy)
    return ledger.start(run_id, plan_key=secret, expect_head=str(ledger.head), **options)


def committed_ledger(path: Path | None = None) -> Ledger:
    """A ledger with a run of fresh keys and one whose noise is committed, in several leases."""
    ledger = make_ledger(path)
    fresh = ledger.start(ledger.sign_plan(make_plan(4), owner=OWNER), lease_steps=2)
    with committed_run(ledger, make_plan(5), lease_steps=2) as run:
        fresh.next_receipt()
        for _ in range(3):
            run.settle(run.next_receipt(), "ab" * 32)
        fresh.next_receipt()
        fresh.next_receipt()
        run.next_receipt()
    fresh.close()
    return ledger


def export_bytes(ledger: Ledger) -> bytes:
    file = io.BytesIO()
    ledger.export(file)
    return file.getvalue()


def snapshot_of(ledger: Ledger) -> Snapshot:
    return read_export(export_bytes(ledger))


def draft_of(ledger: Ledger) -> Draft:
    return Draft(ledger.state)


def snapshot_in(ledger: Ledger) -> Snapshot:
    """What the store of an open ledger holds."""
    with ledger._journal.store.reading() as reading:
        return Snapshot.of(reading)
