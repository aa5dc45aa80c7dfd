"""What the ledger's tests share: keys, plans, a filter whose arithmetic is plain, and ledgers of known shape."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpbudget.ledger.journal import Draft
from dpbudget.ledger.ledger import Ledger
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.ledger.store.base import Snapshot
from dpbudget.ledger.store.jsonl import read_export
from dpbudget.plan import Budget, Claim, Phase, Plan, rate_from_float

OWNER = Ed25519Signer.from_seed(b"\x01" * 32)
WRITER = Ed25519Signer.from_seed(b"\x02" * 32)
STRANGER = Ed25519Signer.from_seed(b"\x03" * 32)
BUDGET = Budget(epsilon=3.0, delta=1e-6)
HALF_DELTA = 5e-7


class SumFilter:
    """Joint claim = sum of the plans' claims: no accountant, so that the rules are tested alone."""

    def joint_claim(self, plans: Sequence[Plan], delta: float) -> float:
        return float(sum(plan.claim.epsilon for plan in plans))


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


def export_bytes(ledger: Ledger) -> bytes:
    file = io.BytesIO()
    ledger.export(file)
    return file.getvalue()


def snapshot_of(ledger: Ledger) -> Snapshot:
    return read_export(export_bytes(ledger))


def draft_of(ledger: Ledger) -> Draft:
    return Draft(ledger.state)
