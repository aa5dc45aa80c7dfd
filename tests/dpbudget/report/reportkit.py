"""Ledgers of every kind, made once, and the documents of their reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import dpbudget
from dpbudget._verdict import Report
from dpbudget.ledger.plan_key import PlanKey
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.plan import Budget, Phase, Plan
from dpbudget.report.document import Document
from dpbudget.report.make import make_report

OWNER, WRITER = Ed25519Signer.from_seed(b"\x0b" * 32), Ed25519Signer.from_seed(b"\x0c" * 32)
DELTA = 1e-5


@dataclass
class Shelf:
    """Ledgers by name, with what is made of them."""

    folder: Path
    documents: dict[str, Document] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.ledger"

    def report(self, name: str, **options: object) -> Document:
        """The document of a ledger, made once where nothing special is asked."""
        if options:
            return make_report(self.path(name), **options)  # type: ignore[arg-type]
        if name not in self.documents:
            self.documents[name] = make_report(self.path(name), trust=OWNER.public)
        return self.documents[name]

    def verdict(self, name: str) -> Report:
        return dpbudget.verify(self.path(name), trust=OWNER.public)


def plan_for(epsilon: float = 1.0, **options: object) -> Plan:
    facts = {"delta": DELTA, "dataset_size": 2000, "batch_size": 100, "steps": 60, "max_parameters": 5000, **options}
    return dpbudget.calibrate(epsilon=epsilon, **facts)  # type: ignore[arg-type]


def build(path: Path, plans: list[tuple[Plan, int]], *, epsilon: float = 3.0, **options: object) -> dpbudget.Ledger:
    """A ledger in which so many steps of each plan were spent; it stays open."""
    facts = {"whole_budget": True, **options}
    budget = Budget(epsilon=epsilon, delta=DELTA)
    ledger = dpbudget.create_ledger(path, budget=budget, owner=OWNER, writer=WRITER, **facts)  # type: ignore[arg-type]
    runs = [(ledger.sign_plan(plan, owner=OWNER), steps) for plan, steps in plans]
    for run_id, steps in runs:
        if steps:
            spend(ledger, run_id, steps)
    return ledger


def spend(ledger: dpbudget.Ledger, run_id: str, steps: int) -> None:
    with dpbudget.start(ledger, run_id) as run:
        for _ in range(steps):
            run.next_receipt()


def fill(shelf: Shelf) -> None:
    """A ledger of every kind."""
    plan = plan_for(steps=20)
    build(shelf.path("one"), [(plan, 20)]).close()
    first, other = plan_for(batch_size=2000, steps=30), plan_for(0.8, batch_size=2000, steps=20, clip_norm=0.5)
    build(shelf.path("two"), [(first, 30), (other, 12)]).close()
    more = Phase(rate_k=1 << 62, noise_multiplier=30.0, steps=5)
    phases = plan.replace(phases=(plan.phases[0], more), claim=plan.claim.replace(epsilon=2.0))
    build(shelf.path("phases"), [(phases, 22)]).close()
    build(shelf.path("rdp"), [(plan, 12), (plan, 8)], kind="rdp").close()
    users = plan_for(adjacency="replace-one", unit="user", accountant="rdp", noise="exact", steps=20)
    build(shelf.path("users"), [(users, 20)], adjacency="replace-one", unit="user").close()
    build(shelf.path("waiting"), [(plan, 0)]).close()
    build(shelf.path("empty"), []).close()
    _changed(shelf.path("changed"))
    _committed(shelf.path("committed"))


def _committed(path: Path) -> None:
    """A run with fresh noise keys and one whose noise is committed."""
    key = PlanKey(bytearray(b"\x07" * 32))
    ledger = build(path, [(plan_for(0.5, delta=DELTA / 2, steps=8), 3)], whole_budget=False)
    run_id = ledger.sign_plan(plan_for(0.5, delta=ledger.plan_delta, steps=6), owner=OWNER)
    ledger.commit(run_id, key)
    ledger.add_entropy(run_id, "5e" * 32)
    with ledger.start(run_id, plan_key=key, expect_head=str(ledger.head)) as run:
        run.next_receipt()
    ledger.close()


def _changed(path: Path) -> None:
    """Two portfolios, a raise after spending, a note and a new writer."""
    ledger = build(path, [(plan_for(delta=DELTA / 2, batch_size=2000, steps=8), 8)], whole_budget=False)
    ledger.change_budget(Budget(epsilon=4.0, delta=DELTA), owner=OWNER)
    ledger.note("checked")
    spend(ledger, ledger.sign_plan(plan_for(0.7, delta=DELTA / 4, steps=12), owner=OWNER), 12)
    ledger.close()
